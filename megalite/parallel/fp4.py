"""Linear layers multiplied in NVFP4 after arXiv:2509.25149: a recipe for research, emulated wherever it runs.

All three products of a layer take quantised factors, widened again, and add up in float32 (in float64 for a float64
model). Inputs and gradients have a scale for 1x16 along what a product sums over, weights for 16x16, so that they are
the same numbers forward and back. Gradients are rounded stochastically. Both factors of the weight's gradient go
through a random Hadamard transform of each 16 tokens first. Dimensions: M tokens, N outputs, K inputs.
"""

import copy
from typing import Any

import torch
from megalite_kernels.reference.fp4 import dequantize_nvfp4, hadamard, nvfp4_amax, quantize_nvfp4
from torch import Tensor, nn

from megalite.comm import Communicator
from megalite.parallel.context import ContextParallel
from megalite.parallel.deferred import DeferredWeights
from megalite.parallel.fp8 import Kind, Product, spread
from megalite.parallel.parameter import part
from megalite.parallel.random import random_bits, stirred, text_keys


class Text:
    """The microbatch that a block computes now: its token ids [B, L], whole rows on every rank."""

    def __init__(self) -> None:
        self.tokens: Tensor | None = None

    def note(self, _: nn.Module, arguments: tuple[Any, ...]) -> None:
        """A hook before the block's attention, which also runs when the block is computed again."""
        _, context = arguments
        self.tokens = context.tokens_BS


class Fp4:
    """How one linear multiplies. `name`: the weight's, which with `seed` and `text` random bits are drawn from.

    The ranks that hold parts of a tensor agree on its scale; blocks of 16 start anew with every rank's part.
    """

    history = None

    def __init__(self, comm: Communicator, split: str | None, sp: bool, seed: int, name: str, text: Text) -> None:
        self.comm, self.split, self.key, self.text = comm, split, f"{seed}/{name}", text
        self.over = spread(comm.mesh, split, sp)
        self.cp: ContextParallel | None = ContextParallel(comm) if comm.mesh.size("cp") > 1 else None
        self.signs = 1 - 2 * (random_bits(f"{seed}/hadamard", torch.arange(16)) & 1)
        self.tokens: Tensor | None = None  # of the microbatch that this object, a copy, was made for

    def linear(
        self, x: Tensor, weight_NK: nn.Parameter, bias_N: Tensor | None, deferred: DeferredWeights | None
    ) -> Tensor:
        """x[..., K] · weightᵀ + bias, in x's dtype. Communicates where scales are agreed on, also going back."""
        mine = copy.copy(self)
        mine.tokens = self.text.tokens
        y: Tensor = Product.apply(x, weight_NK, mine, deferred)
        return y if bias_N is None else y + bias_N

    @staticmethod
    def multiply(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
        """a · bᵀ."""
        return (a @ b.t()).to(dtype)

    def quantized(self, kind: Kind, values: Tensor, dims: str) -> Tensor:
        """A factor [rows, columns] of a product, quantised and widened; its `dims` are two of M, N and K."""
        wide = torch.promote_types(values.dtype, torch.float32)
        values = values.to(wide).contiguous()
        rows = 16 if kind == "weight" else 1
        amax = (
            nvfp4_amax(values, rows).amax().nan_to_num(torch.inf, torch.inf) if values.numel() else values.new_zeros(())
        )
        for axis in self.over[dims[0]] + self.over[dims[1]]:
            self.comm.all_reduce(amax, axis, op="max")
        bits = self._bits(values, dims) if kind == "gradient" else None
        return dequantize_nvfp4(*quantize_nvfp4(values, rows=rows, amax=amax, bits=bits), rows=rows, dtype=wide)

    @staticmethod
    def scales(kind: Kind, made: Tensor) -> dict[str, Tensor]:
        """Nothing: what is transposed is transformed first."""
        return {}

    def weight_gradient(self, x: Tensor, grad_y: Tensor, dtype: torch.dtype) -> Tensor:
        """[N, K] from the input [..., K] and the output's gradient [..., N]; both are quantised along the tokens."""
        x, grad_y = (t.to(torch.promote_types(t.dtype, torch.float32)).flatten(0, -2).t() for t in (x, grad_y))
        signs = self.signs.to(x.device)
        gradient = self.quantized("gradient", hadamard(grad_y, signs), "NM")
        return self.multiply(gradient, self.quantized("input", hadamard(x, signs), "KM"), dtype)

    def _bits(self, values: Tensor, dims: str) -> Tensor:
        """16 random bits for every element of the gradient, [M, N], or [N, M] with M filled up to 16."""
        outputs = values.shape[dims.index("N")]
        first = self.comm.mesh.index("tp") * outputs if self.split == "outputs" else 0
        columns = torch.arange(first, first + outputs, device=values.device)
        keys = self._keys(values.shape[dims.index("M")])
        index = keys[:, None] + columns if dims == "MN" else keys + columns[:, None]
        return random_bits(f"{self.key}/{dims}", index)

    def _keys(self, count: int) -> Tensor:
        """A number for each of this rank's tokens; after the last of them others drawn from theirs, up to `count`."""
        assert self.tokens is not None, "a gradient without a forward pass"
        keys = text_keys(self.tokens)
        keys = (keys if self.cp is None else self.cp.take(keys)).flatten()
        if self.over["M"] and "tp" in self.over["M"]:
            start, stop = part(len(keys), self.comm.mesh.size("tp"), self.comm.mesh.index("tp"))
            keys = keys[start:stop]
        filling = stirred(keys.sum() + torch.arange(count - len(keys), device=keys.device))
        return torch.cat((keys, filling))
