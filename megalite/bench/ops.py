"""What is measured: an entry an op, with its inputs, its call, what that costs and where it is compared.

`run(shape, tensors, backend)` is megalite's own; backend "reference" makes the same call the specification. Letters:
B batch, S tokens of a sequence, H and K heads of queries and keys, D size of a head, N = B · S.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from megalite_kernels import (
    adamw_step,
    apply_rope,
    attention,
    dequantize_fp8,
    grouped_gemm,
    layer_norm,
    linear_cross_entropy,
    moe_permute,
    newton_schulz,
    quantize_fp8,
    rms_norm,
    swiglu,
)
from megalite_kernels.dispatch import Request, backends_of, chip_name, decide, this_machine
from megalite_kernels.reference.fp8 import scale_shape
from megalite_kernels.tuning import Tuned
from torch import Tensor
from torch.nn import Parameter

from megalite.bench import shapes
from megalite.bench.shapes import Cost, Shape
from megalite.errors import UserError

EPS = 1e-5
THETA = 500_000.0
ADAMW: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
NEWTON_STEPS = 5
Tensors = dict[str, Tensor]
"""What an op takes. Those with a gradient are parameters; an implementation may put others in their place."""


@dataclass
class Maker:
    """Random tensors, the same for the same seed."""

    device: torch.device
    dtype: torch.dtype
    seed: int = 0
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator(self.device).manual_seed(self.seed)

    def normal(self, *size: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        options: dict[str, Any] = {"device": self.device, "dtype": dtype or self.dtype}
        return torch.randn(size, generator=self.generator, **options).mul_(scale)

    def leaf(self, *size: int, scale: float = 1.0) -> Parameter:
        return Parameter(self.normal(*size, scale=scale))

    def integers(self, below: int, *size: int) -> Tensor:
        return torch.randint(below, size, generator=self.generator, device=self.device)


@dataclass(frozen=True)
class Tiled:
    """The op by Triton's kernels with tiles that were measured; `sizes`: what these depend on."""

    run: Callable[[Shape, Tensors, Tuned], Any]
    sizes: Callable[[Shape], tuple[int, ...]]


@dataclass(frozen=True)
class Op:
    """`kernel`: its name to the dispatcher, which also asks for `features`. `cost`: forward and backward, by bytes of
    an element. `of`: what its speed is counted in. `keys`: the sizes it depends on, besides tokens. `small`: the
    largest sizes at which outputs are compared. `slack`: times the usual tolerance. `float32`: its only dtype.
    `tiled`: where its tiles can be tuned."""

    kernel: str
    inputs: Callable[[Shape, Maker], Tensors]
    run: Callable[[Shape, Tensors, str], Any]
    cost: Callable[[Shape, int], tuple[Cost, Cost]]
    of: str
    keys: tuple[str, ...]
    small: dict[str, int]
    features: Callable[[Shape], tuple[tuple[str, Any], ...]] = lambda shape: ()
    differentiable: bool = True
    by_tokens: bool = True
    float32: bool = False
    slack: float = 1.0
    tiled: Tiled | None = None

    def backend(self, shape: Shape, wanted: str, device: torch.device, dtype: torch.dtype) -> str:
        """The implementation that runs. Raises UserError for one that cannot, or would only be interpreted."""
        if wanted == "triton" and device.type == "cpu":
            raise UserError("backend=triton: on a CPU Triton is only interpreted, which says nothing of its speed")
        request = Request(self.kernel, device.type, chip_name(device.type), dtype, self.features(shape))
        try:
            return decide(backends_of(self.kernel), request, this_machine(), wanted).backend
        except ValueError as error:
            raise UserError(f"backend={wanted}: {error}") from None


def _attention_inputs(s: Shape, make: Maker) -> Tensors:
    queries, keys = ((s.batch, s.sequence_length, heads, s.head_dim) for heads in (s.heads, s.kv_heads))
    tensors: Tensors = {"q": make.leaf(*queries), "k": make.leaf(*keys), "v": make.leaf(*keys)}
    if s.documents > 1:
        numbers = [i for i, length in enumerate(s.document_lengths()) for _ in range(length)]
        tensors["documents"] = torch.tensor(numbers, device=make.device).expand(s.batch, -1).contiguous()
    return tensors


def _attention(s: Shape, t: Tensors, backend: str, tuned: Tuned | None = None) -> Any:
    return attention(
        t["q"], t["k"], t["v"], scale=s.head_dim**-0.5, causal=s.causal, window=s.window, softcap=s.softcap,
        documents=t.get("documents"), tuned=tuned, backend=backend,
    )  # fmt: skip


def _attention_features(s: Shape) -> tuple[tuple[str, Any], ...]:
    asked = {"softcap": s.softcap is not None, "window": s.window is not None, "documents": s.documents > 1}
    return (("dims", (s.head_dim, s.head_dim)), *asked.items(), ("aligned", True))


def _rope_inputs(s: Shape, make: Maker) -> Tensors:
    frequencies = THETA ** (-torch.arange(0, s.head_dim, 2, device=make.device) / s.head_dim)
    angles = torch.outer(torch.arange(s.sequence_length, device=make.device), frequencies).repeat(1, 2)
    q, k = (make.leaf(s.batch, s.sequence_length, heads, s.head_dim) for heads in (s.heads, s.kv_heads))
    return {"q": q, "k": k, "cos": angles.cos(), "sin": angles.sin()}


def _rope(s: Shape, t: Tensors, backend: str) -> Any:
    return tuple(apply_rope(t[name], t["cos"], t["sin"], backend=backend) for name in ("q", "k"))


def _norm_inputs(s: Shape, make: Maker) -> Tensors:
    x = make.leaf(s.batch, s.sequence_length, s.hidden)
    return {"x": x, "weight": make.leaf(s.hidden), "bias": make.leaf(s.hidden)}


def _rms_norm_inputs(s: Shape, make: Maker) -> Tensors:
    return {name: tensor for name, tensor in _norm_inputs(s, make).items() if name != "bias"}


def _swiglu_inputs(s: Shape, make: Maker) -> Tensors:
    return {name: make.leaf(s.batch, s.sequence_length, s.ffn) for name in ("gate", "up")}


def _cross_entropy_inputs(s: Shape, make: Maker) -> Tensors:
    hidden, weight = make.leaf(s.tokens, s.hidden), make.leaf(s.vocab, s.hidden, scale=s.hidden**-0.5)
    return {"hidden": hidden, "weight": weight, "targets": make.integers(s.vocab, s.tokens)}


def _cross_entropy(s: Shape, t: Tensors, backend: str) -> Any:
    return linear_cross_entropy(t["hidden"], t["weight"], t["targets"], softcap=s.logit_softcap, backend=backend)[0]


def _chosen_experts(s: Shape, make: Maker) -> Tensor:
    scores = torch.rand(s.tokens, s.experts, generator=make.generator, device=make.device)
    return scores.topk(s.top_k).indices


def _grouped_gemm_inputs(s: Shape, make: Maker) -> Tensors:
    counts = _chosen_experts(s, make).flatten().bincount(minlength=s.experts)
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
    weight = make.leaf(s.experts, s.hidden, s.ffn, scale=s.hidden**-0.5)
    return {"x": make.leaf(s.tokens * s.top_k, s.hidden), "weight": weight, "offsets": offsets}


def _grouped_gemm(s: Shape, t: Tensors, backend: str, tuned: Tuned | None = None) -> Any:
    return grouped_gemm(t["x"], t["weight"], t["offsets"], tuned=tuned, backend=backend)


def _moe_permute_inputs(s: Shape, make: Maker) -> Tensors:
    return {"x": make.leaf(s.tokens, s.hidden), "experts": _chosen_experts(s, make)}


def _quantize(s: Shape, t: Tensors, backend: str) -> Any:
    return quantize_fp8(t["x"], recipe=s.recipe, backend=backend)


def _quantize_cost(s: Shape, item: int) -> tuple[Cost, Cost]:
    down, across = scale_shape((s.tokens, s.hidden), s.recipe)
    return shapes.quantize_cost(s, item, down * across * (1 if s.recipe == "mxfp8" else 4))


def _adamw_inputs(s: Shape, make: Maker) -> Tensors:
    sizes = list(enumerate(shapes.block_shapes(s)))
    tensors = {f"{kind}{i}": make.normal(*size) for kind in ("param", "grad", "mean") for i, size in sizes}
    tensors |= {f"square{i}": make.normal(*size).square_() for i, size in sizes}
    return {**tensors, "step": torch.full((), 10.0, device=make.device)}


def adamw_lists(t: Tensors) -> list[list[Tensor]]:
    """Weights, gradients, first and second moments."""
    kinds = ("param", "grad", "mean", "square")
    return [[tensor for name, tensor in t.items() if name.startswith(kind)] for kind in kinds]


def _adamw(s: Shape, t: Tensors, backend: str) -> Any:
    params, grads, means, squares = adamw_lists(t)
    adamw_step(params, grads, means, squares, t["step"], **ADAMW, backend=backend)
    return (*params, *means, *squares)


def widened(shape: Shape, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Outputs as numbers to be compared: FP8 codes with their scales are multiplied out."""
    if outputs[0].dtype == torch.float8_e4m3fn:
        return (dequantize_fp8(outputs[0], outputs[1], recipe=shape.recipe),)
    return outputs


HEADS = ("heads", "kv_heads", "head_dim")
ROWS = {"sequence_length": 64, "batch": 2}
OPS: dict[str, Op] = {
    "attention": Op(
        "attention", _attention_inputs, _attention, shapes.attention_cost, "flops",
        (*HEADS, "causal", "window", "softcap", "documents"), {"sequence_length": 160, "batch": 2, "window": 48},
        _attention_features,
        tiled=Tiled(
            lambda s, t, tuned: _attention(s, t, "triton", tuned),
            lambda s: (s.head_dim, s.head_dim, s.sequence_length, s.sequence_length),
        ),
    ),
    "rms_norm": Op(
        "rms_norm", _rms_norm_inputs, lambda s, t, backend: rms_norm(t["x"], t["weight"], EPS, backend=backend),
        lambda s, item: shapes.norm_cost(s, item, 1), "bytes", ("hidden",), ROWS,
    ),
    "layer_norm": Op(
        "layer_norm", _norm_inputs,
        lambda s, t, backend: layer_norm(t["x"], t["weight"], t["bias"], EPS, backend=backend),
        lambda s, item: shapes.norm_cost(s, item, 2), "bytes", ("hidden",), ROWS,
    ),
    "rope": Op("rope", _rope_inputs, _rope, shapes.rope_cost, "bytes", HEADS, ROWS),
    "swiglu": Op(
        "swiglu", _swiglu_inputs, lambda s, t, backend: swiglu(t["gate"], t["up"], backend=backend),
        shapes.swiglu_cost, "bytes", ("ffn",), ROWS,
    ),
    "cross_entropy": Op(
        "linear_cross_entropy", _cross_entropy_inputs, _cross_entropy, shapes.cross_entropy_cost, "flops",
        ("hidden", "vocab", "softcap"), {"sequence_length": 64, "batch": 1, "vocab": 2048},
    ),
    "grouped_gemm": Op(
        "grouped_gemm", _grouped_gemm_inputs,
        _grouped_gemm,
        shapes.grouped_gemm_cost, "flops", ("hidden", "ffn", "experts", "top_k"),
        {"sequence_length": 128, "batch": 1, "hidden": 1024, "ffn": 512},
        tiled=Tiled(
            lambda s, t, tuned: _grouped_gemm(s, t, "triton", tuned),
            lambda s: (s.tokens * s.top_k, s.experts, s.hidden, s.ffn),
        ),
    ),
    "moe_permute": Op(
        "moe_permute", _moe_permute_inputs,
        lambda s, t, backend: moe_permute(t["x"], t["experts"], s.experts, backend=backend)[0],
        shapes.moe_permute_cost, "bytes", ("hidden", "experts", "top_k"), {"sequence_length": 128, "batch": 1},
    ),
    "quantize": Op(
        "quantize_fp8", lambda s, make: {"x": make.normal(s.tokens, s.hidden)}, _quantize, _quantize_cost,
        "bytes", ("hidden", "recipe"), {"sequence_length": 128, "batch": 2}, differentiable=False,
    ),
    "adamw": Op(
        "adamw", _adamw_inputs, _adamw, shapes.adamw_cost, "bytes", (*HEADS, "hidden", "ffn"),
        {"heads": 2, "kv_heads": 2, "hidden": 256, "ffn": 512}, lambda s: (("one dtype", True),),
        differentiable=False, by_tokens=False, float32=True,
    ),
    "newton_schulz": Op(
        "newton_schulz", lambda s, make: {"x": make.normal(s.ffn, s.hidden)},
        lambda s, t, backend: newton_schulz(t["x"], NEWTON_STEPS, backend=backend),
        lambda s, item: shapes.newton_schulz_cost(s, item, NEWTON_STEPS), "flops", ("hidden", "ffn"),
        {"hidden": 256, "ffn": 512}, differentiable=False, by_tokens=False, slack=4,
    ),
}  # fmt: skip
