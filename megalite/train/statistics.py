"""What narrow numbers cost, by module (log.statistics): how much of each factor and product of a linear layer is lost.

Sums over the microbatches of a step; activations and gradients are those of each of them. `train/watched.py` counts.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch

from megalite.comm import Communicator
from megalite.mesh import AXES
from megalite.model.experts import Experts
from megalite.model.linear import Linear
from megalite.model.transformer import Transformer
from megalite.parallel.fp8 import KINDS
from megalite.train.watched import LARGEST, PRODUCTS, SUMS, Watched, WatchedExperts, WatchedLinear


class Statistics:
    """Of this rank's stages, every `every`-th step; 0: never. `begin`, the step, `measure`. Changes no bit of training.

    Communicates while a step runs that is looked at: where ranks agree on scales, and where they hold terms of a sum.
    """

    def __init__(self, stages: Sequence[Transformer], comm: Communicator, every: int) -> None:
        self.comm, self.every, self.active = comm, every, False
        self.watched: list[Watched] = []
        if every == 0:
            return
        for name, module in (of for stage in stages for of in stage.named_modules()):
            if isinstance(module, Linear) and module.watch is None:
                module.watch = watched = WatchedLinear(name, comm, module)
                self.watched.append(watched)
            if isinstance(module, Experts):
                for matrix, fp8 in module.fp8.items():
                    fp8.watch = WatchedExperts(f"{name}.{matrix}", comm, fp8, module.up.device)
                    self.watched.append(fp8.watch)
        everyone = comm.gather_json([watched.name for watched in self.watched])
        self.names = sorted({name for names in everyone for name in names}, key=_natural)

    def begin(self, step: int) -> None:
        self.active = self.every > 0 and step % self.every == 0
        for watched in self.watched:
            watched.active = self.active
            if self.active:
                watched.clear()

    @torch.no_grad()
    def measure(self) -> dict[str, Any] | None:
        """By module, over the whole step, the same on every rank; None in a step that is not looked at."""
        if not self.active:
            return None
        self.active = False
        for watched in self.watched:
            watched.active = False
        # On the host, where ranks without a linear are too.
        sums = torch.zeros(len(self.names), len(SUMS), dtype=torch.float64)
        largest = torch.zeros(len(self.names), len(LARGEST), dtype=torch.float64)
        for watched in self.watched:
            place = self.names.index(watched.name)
            sums[place], largest[place] = watched.sums.cpu(), watched.largest.cpu()
        self.comm.all_reduce(sums, *AXES)
        self.comm.all_reduce(largest, *AXES, op="max")
        rows = zip(self.names, sums.tolist(), largest.tolist(), strict=True)
        return {name: described(*row) for name, *row in rows}


def described(sums: list[float], largest: list[float]) -> dict[str, Any]:
    """What metrics.jsonl has of a module. Of each factor: `amax`; the shares of its values that are not zero that
    become zero (`underflow`) or are cut off (`saturation`); `scale` where the whole tensor has one. Of each product:
    `sqnr_db`, the wide product's power over that of the difference (None: there is none); shares of its values that
    become zero, or inf (`overflow`)."""
    of, most = dict(zip(SUMS, sums, strict=True)), dict(zip(LARGEST, largest, strict=True))
    found: dict[str, Any] = {}
    for kind in KINDS:
        values = max(of[kind, "nonzero"], 1.0)
        found[kind] = {"amax": most[kind, "amax"]}
        found[kind] |= {name: of[kind, name] / values for name in ("underflow", "saturation")}
        if most[kind, "scale"]:
            found[kind]["scale"] = most[kind, "scale"]
    for product in PRODUCTS:
        values, signal, noise = max(of[product, "nonzero"], 1.0), of[product, "signal"], of[product, "noise"]
        decibel = 10 * math.log10(signal / noise) if 0 < noise < math.inf and 0 < signal < math.inf else None
        found[product] = {"sqnr_db": decibel, **{n: of[product, n] / values for n in ("underflow", "overflow")}}
    return found


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """So that layer 10 comes behind layer 9."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split(".")]
