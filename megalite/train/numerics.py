"""Where a number first stopped being finite (debug.numerics=true): every module's inputs, outputs and their gradients
are counted on the device while a step runs, and read when the step turned out not to be finite.

A microbatch's values flow from its first layer to its last and, as gradients, back. What did not come from a value
before it that was not finite either is where it began; ranks compare places in that order, whoever ran first.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megalite.comm import Communicator
from megalite.model.transformer import Transformer
from megalite.parallel.data import Gradients
from megalite.parallel.parameter import local
from megalite.pipeline.runtime import Pipeline

BLOCK = re.compile(r"blocks\.(\d+)\.")
AFTER = 2**31
"""Behind every round of microbatches: the sums of gradients."""


IDLE = (nn.Identity, nn.ModuleDict)
"""What computes nothing."""


class Noted(NamedTuple):
    """`place`: where in a step, in the order in which values depend on each other. `counts`: int64 [2], nan and inf
    among `elements` values."""

    place: tuple[int, int, int, int]
    microbatch: int | None
    module: str
    what: str
    counts: Tensor
    elements: int


class Numerics:
    """Watches this rank's stages; without `on` it does nothing at all. Changes no bit of what is computed.

    `begin`, then a step, then `first` on every rank where the step was not finite.
    """

    def __init__(
        self, stages: Sequence[Transformer], pipeline: Pipeline, gradients: Gradients, comm: Communicator, on: bool
    ) -> None:
        self.pipeline, self.gradients, self.comm, self.on = pipeline, gradients, comm, on
        self.noted: list[Noted] = []
        self.calls: Counter[tuple[int, int]] = Counter()  # modules run so far, by microbatch and layer
        self.watching = False
        self.modules: dict[str, nn.Module] = {}
        for stage in stages if on else ():
            layers, depth = stage.config.layers, stage.config.mtp
            self.behind = layers + depth + 1
            for name, module in stage.named_modules():
                if list(module.children()) or isinstance(module, IDLE) or module in self.modules.values():
                    continue
                self.modules[name] = module
                watched = _Module(self, name, layer_of(name, layers))
                module.register_forward_pre_hook(watched.before)
                module.register_forward_hook(watched.after)

    def begin(self) -> None:
        """Forget the step before; the next one is watched."""
        self.noted, self.watching = [], self.on
        self.calls.clear()

    def end(self) -> None:
        self.watching = False

    def note(self, place: tuple[int, int, int, int], microbatch: int | None, module: str, what: str, x: Tensor) -> None:
        x = x.detach()
        counts = torch.stack([x.isnan().sum(), x.isinf().sum()])
        self.noted.append(Noted(place, microbatch, module, what, counts, x.numel()))

    def first(self, sums: Tensor) -> dict[str, Any] | None:
        """Where it began, the same on every rank; None: nothing that is watched. A collective, if on.

        `sums`: [microbatches, …], the losses as `Pipeline.train` returns them. Looked at in this order: a module's
        values and the loss, then gradients, then the sums of weight gradients over microbatches and ranks.
        """
        if not self.on:
            return None
        for row, losses in enumerate(sums):
            self.note((row, 0, self.behind, 0), row, "loss", "output", losses)
        for number, piece in enumerate(self.gradients.pieces()):
            self.note((AFTER, 0, 0, number), None, piece.slot.name, "sum of its gradient", piece.gradient)
        counts = torch.stack([noted.counts for noted in self.noted]).tolist()
        bad = [(noted, *found) for noted, found in zip(self.noted, counts, strict=True) if any(found)]
        ranks = self.comm.gather_json(self._described(*min(bad, key=lambda of: of[0].place)) if bad else None)
        found = [(rank, record) for rank, record in enumerate(ranks) if record is not None]
        if not found:
            return None
        earliest = min(record["place"] for _, record in found)
        where = [(record["microbatch"], rank, record) for rank, record in found if record["place"] == earliest]
        _, rank, record = min(where, key=lambda of: (-1 if of[0] is None else of[0], of[1]))
        del record["place"]
        return record | {"rank": rank, "ranks": [rank for _, rank, _ in where]}

    def _described(self, noted: Noted, nans: int, infs: int) -> dict[str, Any]:
        mesh, microbatch = self.comm.mesh, noted.microbatch
        if microbatch is not None:
            microbatch = microbatch * mesh.size("dp") + mesh.index("dp") + 1
        weights = dict(self.modules[noted.module].named_parameters()) if noted.module in self.modules else {}
        return {
            "place": list(noted.place),
            "module": noted.module,
            "layer": int(block[1]) if (block := BLOCK.match(noted.module)) else None,
            "what": noted.what,
            "pass": "forward" if noted.place[1] == 0 and microbatch is not None else "backward",
            "kind": " and ".join(name for name, n in (("nan", nans), ("inf", infs)) if n),
            "count": nans + infs,
            "share": (nans + infs) / noted.elements,
            "microbatch": microbatch,
            "weights": [name for name, weight in weights.items() if not local(weight).isfinite().all()],
        }


class _Module:
    """The hooks of one module of `layer`."""

    def __init__(self, numerics: Numerics, name: str, layer: int) -> None:
        self.numerics, self.name, self.layer = numerics, name, layer

    def before(self, _: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not self._runs():
            return None
        microbatch, order = self._next()
        for x in _tensors(arguments):
            self.numerics.note((microbatch, 0, self.layer, order), microbatch, self.name, "input", x)
        backward = self._backward(microbatch, order, "gradient of its input")
        return tuple(_watched(argument, backward) for argument in arguments)

    def after(self, _: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        if not self._runs():
            return
        microbatch, order = self._next()
        backward = self._backward(microbatch, order, "gradient of its output")
        for x in _tensors((output,)):
            self.numerics.note((microbatch, 0, self.layer, order), microbatch, self.name, "output", x)
            if x.requires_grad:
                x.register_hook(backward)

    def _runs(self) -> bool:
        """Not in a forward pass that backward runs a second time."""
        return self.numerics.watching and torch._C._current_graph_task_id() == -1

    def _next(self) -> tuple[int, int]:
        microbatch = self.numerics.pipeline.running.microbatch
        assert microbatch is not None, "modules run in ops of a microbatch"
        self.numerics.calls[microbatch, self.layer] += 1
        return microbatch, self.numerics.calls[microbatch, self.layer]

    def _backward(self, microbatch: int, order: int, what: str) -> Callable[[Tensor], None]:
        def note(gradient: Tensor) -> None:
            self.numerics.note((microbatch, 1, -self.layer, -order), microbatch, self.name, what, gradient)

        return note


class _Watched(torch.autograd.Function):
    """x as it is; `note` sees the gradient that the one module behind it gives, and no other's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, note: Callable[[Tensor], None]) -> Tensor:
        ctx.note = note
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.note(gradient)
        return gradient, None


def _watched(argument: Any, note: Callable[[Tensor], None]) -> Any:
    if isinstance(argument, tuple) and hasattr(argument, "_fields"):
        return type(argument)(*(_watched(field, note) for field in argument))
    if isinstance(argument, Tensor) and argument.requires_grad:
        return _Watched.apply(argument, note)
    return argument


def _tensors(values: Sequence[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, tuple):
            yield from _tensors(value)
        elif isinstance(value, Tensor) and value.is_floating_point():
            yield value


def layer_of(name: str, layers: int) -> int:
    """Where a module of that name comes in the order of the model: embeddings, blocks, final norm, further modules."""
    group, _, rest = name.partition(".")
    if group in ("blocks", "mtp"):
        number = int(rest.partition(".")[0])
        return number if group == "blocks" else layers + number
    return layers if group in ("final_norm", "head") else -1


def sentence(found: dict[str, Any], microbatches: int) -> str:
    """One line of what `Numerics.first` found."""
    microbatch = "" if found["microbatch"] is None else f", microbatch {found['microbatch']} of {microbatches}"
    share = f"{found['count']:,} values ({found['share']:.3g} of all) {found['kind']}"
    ranks = f"rank {found['rank']}" if len(found["ranks"]) == 1 else f"ranks {', '.join(map(str, found['ranks']))}"
    weights = f"; not finite itself: {', '.join(found['weights'])}" if found["weights"] else ""
    return f"first in {found['module']}, {found['pass']}: {found['what']}, {share}{microbatch}, {ranks}{weights}"
