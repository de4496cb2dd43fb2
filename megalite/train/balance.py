"""What the routers of a step have done, over all ranks: for the metrics, and for the balance of the next step."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megalite.comm import Communicator
from megalite.config.schema import ModelConfig
from megalite.mesh import AXES
from megalite.model.moe import MoE
from megalite.model.router import Router, Seen
from megalite.model.size import is_moe
from megalite.model.transformer import Transformer


class Balance:
    """Sums up every MoE layer's `Seen` after a step. Loads are counts over the global batch, so that what follows from
    them is the same on every layout. Communicates over all axes, once a step; a model without experts does not."""

    def __init__(self, stages: Sequence[Transformer], comm: Communicator, config: ModelConfig) -> None:
        self.comm, self.config = comm, config
        self.layers = [layer for layer in range(config.layers + config.mtp) if is_moe(config, layer)]
        blocks = [of for stage in stages for of in stage.layers.items()]
        self.routers: dict[int, Router] = {n: block.mlp.router for n, block in blocks if isinstance(block.mlp, MoE)}

    def begin(self) -> None:
        """Forget what was routed outside of a step."""
        for router in self.routers.values():
            router.seen.take(self.config.moe.experts)

    def measure(self) -> Tensor:
        """[MoE layers, E + len(Seen.NAMES) + 2] of the whole step, on every rank: what was seen, and the range of the
        expert biases that the step began with."""
        experts, mesh = self.config.moe.experts, self.comm.mesh
        total = torch.zeros(len(self.layers), experts + len(Seen.NAMES) + 2, dtype=torch.float64)
        if self.routers:
            rows = [
                torch.cat([r.seen.take(experts).to(r.weight.device), r.bias_range()]) for r in self.routers.values()
            ]
            mine = torch.stack(rows).cpu()
            if mesh.index("dp", "cp", "tp") > 0:  # the bias is the same on all of them
                mine[:, -2:] = 0.0
            total[[self.layers.index(layer) for layer in self.routers]] = mine
        if self.layers:  # on the host, where ranks without a router are too
            self.comm.all_reduce(total, *AXES)
        return total

    @torch.no_grad()
    def update(self, total: Tensor) -> None:
        """Move each expert bias one step towards less loaded experts (arXiv:2408.15664); keep the load for the next
        step's balancing loss."""
        for layer, router in self.routers.items():
            load = total[self.layers.index(layer), : self.config.moe.experts].to(router.weight.device)
            if router.expert_bias is not None and self.config.moe.bias_rate:
                router.expert_bias.add_((load.mean() - load).sign(), alpha=self.config.moe.bias_rate)
            if router.last_load is not None:
                router.last_load.copy_(load)

    def described(self, total: Tensor) -> dict[str, Any] | None:
        """What metrics.jsonl shows, by layer; None without experts. `load`: shares of the slots. `dropped`: share of
        the slots that found their expert full. `entropy`: of the scores, 1 for even ones. `imbalance`: largest load
        over the mean. `bias`: smallest and largest expert bias."""
        if not self.layers:
            return None
        experts = self.config.moe.experts
        layers = {}
        for layer, row in zip(self.layers, total.tolist(), strict=True):
            load, (tokens, dropped, entropy, *_) = row[:experts], row[experts:]
            slots = max(sum(load), 1.0)
            described = {
                "load": [round(n / slots, 5) for n in load],
                "dropped": dropped / slots,
                "entropy": entropy / max(tokens, 1.0) / max(math.log(experts), 1e-9),
                "imbalance": max(load) * experts / slots,
            }
            if self.config.moe.bias_rate is not None:
                described["bias"] = row[-2:]
            layers[str(layer)] = described
        losses = total[:, experts:].sum(0).tolist()
        return {
            "balance_loss": losses[Seen.NAMES.index("balance_loss")],
            "router_z_loss": losses[Seen.NAMES.index("z_loss")],
            "layers": layers,
        }
