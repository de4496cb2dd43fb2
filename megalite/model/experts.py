"""The experts of an MoE layer on this rank: one grouped product for each of their matrices."""

from functools import partial

import torch
from megalite_kernels import grouped_gemm, moe_permute, moe_unpermute, multiple_of_rows
from torch import Tensor, nn

from megalite.comm import Communicator
from megalite.config.schema import ModelConfig
from megalite.model import recompute
from megalite.model.mlp import ACTIVATIONS
from megalite.model.size import expert_ffn, gated
from megalite.parallel.experts import Work
from megalite.parallel.fp8 import KINDS, Recipe
from megalite.parallel.fp8_grouped import GroupedFp8
from megalite.parallel.parameter import declare


class Experts(nn.Module):
    """down[e](activation(gate[e](x), up[e](x))) for each row and each of its experts, summed by probability.

    Weights are [E, outputs, inputs], experts spread over ep, inner values over etp: this rank's result is a term of a
    sum over etp. Dimensions: E experts of this rank, R rows, K experts a row, D hidden, F inner.
    """

    def __init__(self, config: ModelConfig, output_std: float) -> None:
        super().__init__()
        experts, hidden, ffn, std = config.moe.experts, config.hidden, expert_ffn(config), config.init_std
        self.activation, self.gated, self.bias = ACTIVATIONS[config.activation], gated(config), config.mlp_bias
        self.recompute = False
        self.fp8: dict[str, GroupedFp8] = {}  # how each matrix multiplies, where not in the dtype of x
        self.backend = "auto"
        self.first_part = True  # of the inner values: the one that adds the bias of the output
        inner = partial(declare, experts, ffn, shard={"ep": 0, "etp": 1})
        if self.gated:
            self.gate = inner(hidden, role="expert", std=std)
        self.up = inner(hidden, role="expert", std=std)
        self.down = declare(experts, hidden, ffn, role="expert", std=output_std, shard={"ep": 0, "etp": 2})
        if self.bias:
            if self.gated:
                self.gate_bias = inner(role="bias")
            self.up_bias = inner(role="bias")
            self.down_bias = declare(experts, hidden, role="bias", shard={"ep": 0}, sees="own")

    def multiply_in(self, fp8: Recipe, comm: Communicator, steps: int) -> None:
        """Multiply so from now on; `steps` of history where that scales by one."""
        names = ("gate", "up", "down") if self.gated else ("up", "down")
        self.fp8 = {name: GroupedFp8(fp8, comm, "inputs" if name == "down" else "outputs") for name in names}
        if fp8.name == "delayed":
            experts = len(self.up)
            self.amax_history = declare(experts, len(names), len(KINDS), steps, role="state", shard={"ep": 0})

    def forward(self, work: Work, rows_an_expert: int | None = None) -> Tensor:
        """[R, D]. `rows_an_expert`: every expert computes so many, filled up with zeros."""
        parts = len(self.up) * work.sources
        if rows_an_expert is not None:
            x, offsets, inverse = _padded(work, parts, rows_an_expert // work.sources, self.backend)
        else:
            # A CPU sees at once how many rows have an expert here; a GPU makes room for all rather than wait.
            rows = int((work.indices_RK >= 0).sum()) if work.rows_RD.device.type == "cpu" else work.slots
            pad_to = 1 if self.fp8 or rows is None else multiple_of_rows(rows, parts, work.rows_RD)
            x, offsets, inverse = moe_permute(
                work.rows_RD, work.indices_RK, parts, pad_to=pad_to, rows=rows, backend=self.backend
            )
        names = ("gate", "up") if self.gated else ("up",)
        inner = [self._product(x, name, offsets, getattr(self, f"{name}_bias", None)) for name in names]
        y = recompute.run(self.recompute, self._contract, offsets, *inner)
        return moe_unpermute(y, inverse, work.probs_RK, backend=self.backend)

    def _contract(self, offsets: Tensor, *inner: Tensor) -> Tensor:
        bias = self.down_bias * float(self.first_part) if self.bias else None
        return self._product(self.activation(*inner, backend=self.backend), "down", offsets, bias)

    def _product(self, x: Tensor, name: str, offsets: Tensor, bias: Tensor | None) -> Tensor:
        weight = getattr(self, name)
        if self.fp8:
            return self.fp8[name].product(x, weight, offsets, bias)
        return grouped_gemm(x, weight.transpose(1, 2), offsets, bias, backend=self.backend)


def _padded(work: Work, experts: int, room: int, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """As `moe_permute`, every expert's rows filled up with zeros to `room`, which none exceeds."""
    _, offsets, inverse = moe_permute(work.rows_RD[:, :0], work.indices_RK, experts, backend=backend)
    expert = work.indices_RK.clamp(min=0)
    place = (inverse - offsets[expert] + expert * room).masked_fill(inverse < 0, -1)
    rows = work.rows_RD.repeat_interleave(place.shape[1], dim=0)
    free = place.flatten().masked_fill(place.flatten() < 0, experts * room).long()
    x = work.rows_RD.new_zeros(experts * room + 1, work.rows_RD.shape[1]).index_copy(0, free, rows)[:-1]
    return x, torch.arange(experts + 1, device=x.device, dtype=torch.int32) * room, place.int()
