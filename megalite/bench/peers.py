"""The same ops as other packages do them, each loaded only where it is asked for.

A builder gets shape and tensors and returns the call that is timed; what a user would do once, it does before. It
raises Unfit where the package can't do what is asked. Those for CUDA were written from their packages' documentation;
what one of them gets wrong shows as "wrong" or "failed", because every output is compared before anything is timed.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from megalite_kernels import reference
from megalite_kernels.reference import accumulation_dtype
from torch import Tensor
from torch.nn import Parameter

from megalite.bench.ops import ADAMW, EPS, OPS, Tensors, adamw_lists
from megalite.bench.shapes import Shape
from megalite.errors import UserError

Build = Callable[[Shape, Tensors], Callable[[], Any]]


class Unfit(Exception):
    """The package cannot do this; str() says what."""


@dataclass(frozen=True)
class Peer:
    """`package`: its distribution; `install`: how one gets it."""

    package: str
    install: str
    cuda: bool
    ops: dict[str, Build]

    def version(self) -> str | None:
        try:
            return version(self.package)
        except PackageNotFoundError:
            return None


def compiled(op: str) -> Build:
    """The specification under torch.compile."""

    def build(s: Shape, t: Tensors) -> Callable[[], Any]:
        torch.compiler.reset()  # each shape is compiled for itself, not dynamically after the first few
        call = torch.compile(lambda tensors: OPS[op].run(s, tensors, "reference"), dynamic=False)
        return partial(call, t)

    return build


def _mask(s: Shape, t: Tensors) -> Tensor:
    size = s.sequence_length
    return reference.visible(
        size, size, causal=s.causal, window=s.window, documents_BS=t.get("documents"), device=t["q"].device
    )


def _sdpa(s: Shape, t: Tensors) -> Callable[[], Any]:
    if s.softcap:
        raise Unfit("knows no softcap")
    mask = _mask(s, t) if s.window or s.documents > 1 else None
    options: dict[str, Any] = {"attn_mask": mask, "is_causal": s.causal and mask is None, "scale": s.head_dim**-0.5}
    options["enable_gqa"] = s.heads != s.kv_heads

    def call() -> Tensor:
        q, k, v = (t[name].transpose(1, 2) for name in "qkv")
        return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)

    return call


def _eager_attention(s: Shape, t: Tensors) -> Callable[[], Any]:
    hidden, group, dtype = ~_mask(s, t), s.heads // s.kv_heads, accumulation_dtype(t["q"].dtype)

    def call() -> Tensor:
        q, k, v = (t[name].transpose(1, 2) for name in "qkv")
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        scores = q @ k.transpose(-1, -2) * s.head_dim**-0.5
        if s.softcap:
            scores = s.softcap * torch.tanh(scores / s.softcap)
        scores = scores.masked_fill(hidden, float("-inf"))
        return (scores.softmax(-1, dtype=dtype).to(q.dtype) @ v).transpose(1, 2)

    return call


def _eager_rope(s: Shape, t: Tensors) -> Callable[[], Any]:
    cos, sin = (t[name].to(t["q"].dtype)[:, None] for name in ("cos", "sin"))

    def turned(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-second, first), dim=-1) * sin

    return lambda: (turned(t["q"]), turned(t["k"]))


def _eager_cross_entropy(s: Shape, t: Tensors) -> Callable[[], Any]:
    def call() -> Tensor:
        logits = t["hidden"] @ t["weight"].T
        if s.logit_softcap:
            logits = s.logit_softcap * torch.tanh(logits / s.logit_softcap)
        return F.cross_entropy(logits.to(accumulation_dtype(logits.dtype)), t["targets"], reduction="sum")

    return call


def _eager_grouped_gemm(s: Shape, t: Tensors) -> Callable[[], Any]:
    ends = list(pairwise(t["offsets"].tolist()))
    return lambda: torch.cat([t["x"][a:b] @ w for (a, b), w in zip(ends, t["weight"], strict=True)])


def _eager_permute(s: Shape, t: Tensors) -> Callable[[], Any]:
    return lambda: t["x"].index_select(0, t["experts"].flatten().argsort(stable=True) // s.top_k)


def _eager_adamw(s: Shape, t: Tensors) -> Callable[[], Any]:
    _, grads, means, squares = adamw_lists(t)
    _own(t, *(name for name in t if name.startswith("param")))
    params = adamw_lists(t)[0]
    optimizer = torch.optim.AdamW(params, **ADAMW, fused=True)
    for param, grad, mean, square in zip(params, grads, means, squares, strict=True):
        param.grad = grad
        optimizer.state[param] = {"step": t["step"].clone(), "exp_avg": mean, "exp_avg_sq": square}

    def call() -> tuple[Tensor, ...]:
        optimizer.step()
        return (*params, *means, *squares)

    return call


def _backend(op: str, name: str) -> Build:
    """PyTorch's own calls, as megalite_kernels has them too."""
    return lambda s, t: partial(OPS[op].run, s, t, name)


def _flash(which: str) -> Build:
    def build(s: Shape, t: Tensors) -> Callable[[], Any]:
        from megalite_kernels.gpu.flash import flash

        cu = None
        if s.documents > 1:
            lengths = torch.tensor(s.document_lengths() * s.batch, device=t["q"].device)
            cu = F.pad(lengths.cumsum(0), (1, 0)).int()
        longest = max(s.document_lengths())

        def call() -> Tensor:
            q, k, v = (t[name] if cu is None else t[name].flatten(0, 1)[None] for name in "qkv")
            out = flash(
                which, q, k, v, s.head_dim**-0.5, s.causal, s.window, s.softcap, None, cu, cu, (longest, longest), False
            )
            return out.view(t["q"].shape)

        return call

    return build


def _own(t: Tensors, *names: str) -> None:
    """Copies of tensors that the package writes over."""
    for name in names:
        t[name] = Parameter(t[name].detach().clone())


def _liger(name: str) -> Any:
    from liger_kernel.transformers import functional

    return getattr(functional, f"liger_{name}")


def _liger_rope(s: Shape, t: Tensors) -> Callable[[], Any]:
    call, cos, sin = _liger("rope"), t["cos"].to(t["q"].dtype)[None], t["sin"].to(t["q"].dtype)[None]
    _own(t, "q", "k")
    return lambda: tuple(x.transpose(1, 2) for x in call(t["q"].transpose(1, 2), t["k"].transpose(1, 2), cos, sin))


def _liger_swiglu(s: Shape, t: Tensors) -> Callable[[], Any]:
    _own(t, "gate", "up")
    return partial(_liger("swiglu"), t["gate"], t["up"])


def _liger_cross_entropy(s: Shape, t: Tensors) -> Callable[[], Any]:
    options = {"reduction": "sum", "softcap": s.logit_softcap}
    return partial(_liger("fused_linear_cross_entropy"), t["hidden"], t["weight"], t["targets"], **options)


def _te_attention(s: Shape, t: Tensors) -> Callable[[], Any]:
    if s.softcap or s.documents > 1:
        raise Unfit("no softcap, and no documents but by cu_seqlens")
    import transformer_engine.pytorch as te

    module = te.DotProductAttention(
        s.heads, s.head_dim, num_gqa_groups=s.kv_heads, attention_dropout=0.0, qkv_format="bshd",
        attn_mask_type="causal" if s.causal else "no_mask", softmax_scale=s.head_dim**-0.5,
        window_size=None if s.window is None else (s.window - 1, 0 if s.causal else -1),
    )  # fmt: skip
    return lambda: module(t["q"], t["k"], t["v"]).view(t["q"].shape)


def _te_norm(kind: str) -> Build:
    def build(s: Shape, t: Tensors) -> Callable[[], Any]:
        import transformer_engine.pytorch as te

        module = getattr(te, kind)(s.hidden, eps=EPS, device=t["x"].device, dtype=t["x"].dtype)
        for name, _ in list(module.named_parameters()):
            setattr(module, name, t[name])
        return partial(module, t["x"])

    return build


EAGER: dict[str, Build] = {
    "attention": _eager_attention,
    "rms_norm": lambda s, t: partial(F.rms_norm, t["x"], (s.hidden,), t["weight"], EPS),
    "layer_norm": lambda s, t: partial(F.layer_norm, t["x"], (s.hidden,), t["weight"], t["bias"], EPS),
    "rope": _eager_rope,
    "swiglu": lambda s, t: lambda: F.silu(t["gate"]) * t["up"],
    "cross_entropy": _eager_cross_entropy,
    "grouped_gemm": _eager_grouped_gemm,
    "moe_permute": _eager_permute,
    "quantize": _backend("quantize", "reference"),
    "adamw": _eager_adamw,
    "newton_schulz": _backend("newton_schulz", "torch"),
}
LIGER: dict[str, Build] = {
    # In place the gradient that arrives would be overwritten, which is timed here more than once.
    "rms_norm": lambda s, t: partial(_liger("rms_norm"), t["x"], t["weight"], EPS, 0.0, "llama", in_place=False),
    "layer_norm": lambda s, t: partial(_liger("layer_norm"), t["x"], t["weight"], t["bias"], EPS),
    "rope": _liger_rope,
    "swiglu": _liger_swiglu,
    "cross_entropy": _liger_cross_entropy,
}
TE: dict[str, Build] = {
    "attention": _te_attention,
    "rms_norm": _te_norm("RMSNorm"),
    "layer_norm": _te_norm("LayerNorm"),
}
FLASH = ("flash2", "flash3", "flash4")
PEERS = {
    "sdpa": Peer("torch", "", False, {"attention": _sdpa}),
    "torch": Peer("torch", "", False, EAGER),
    "compile": Peer("torch", "", False, {op: compiled(op) for op in OPS}),
    "flash2": Peer("flash-attn", "pip install --no-build-isolation flash-attn", True, {"attention": _flash("flash2")}),
    "flash3": Peer("flash-attn-3", "build flash-attention/hopper", True, {"attention": _flash("flash3")}),
    "flash4": Peer("flash-attn-4", "pip install --pre flash-attn-4", True, {"attention": _flash("flash4")}),
    "liger": Peer("liger-kernel", "pip install liger-kernel", True, LIGER),
    "te": Peer("transformer-engine", "pip install --no-build-isolation transformer-engine[pytorch]", True, TE),
}


def installed(device: torch.device) -> list[str]:
    return [name for name, peer in PEERS.items() if peer.version() and (device.type == "cuda" or not peer.cuda)]


def asked(names: Iterable[str], op: str, device: torch.device) -> tuple[list[str], list[str]]:
    """The peers to run, in their order, and a line on each that cannot: no such op, not for this device, not installed;
    the first of these that holds, so that nobody installs what would not help.

    "installed" means all that are, "flash_attn" every version of it that is. Raises UserError for an unknown name.
    """
    found, notes, problems = list[str](), list[str](), list[str]()
    for name in dict.fromkeys(names):
        if name == "installed":
            found += [peer for peer in installed(device) if op in PEERS[peer].ops]
            continue
        if name not in PEERS and name != "flash_attn":
            legal = ", ".join(["installed", *PEERS, "flash_attn (every version)"])
            problems.append(f"against={name}: no such peer; legal: {legal}")
            continue
        versions = [name] if name in PEERS else [peer for peer in FLASH if PEERS[peer].version()] or ["flash2"]
        peer = PEERS[versions[0]]
        if op not in peer.ops:
            notes.append(f"not measured: {name}: {peer.package} has no {op}")
        elif peer.cuda and device.type != "cuda":
            notes.append(f"not measured: {name}: {peer.package} needs a CUDA device, and this is a CPU")
        elif peer.version() is None:
            notes.append(f"not measured: {name}: {peer.package} is not installed; {peer.install}")
        else:
            found += versions
    if problems:
        raise UserError(*problems)
    return list(dict.fromkeys(found)), notes
