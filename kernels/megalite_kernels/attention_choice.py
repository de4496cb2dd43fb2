"""Which implementation attention takes, and why not the others: flash-attn where installed and able, then ours."""

import torch

from megalite_kernels.dispatch import (
    NATIVE,
    OPS,
    REFERENCE,
    Backend,
    Machine,
    Obstacle,
    Request,
    choose,
    import_failure,
    interpreted,
    never,
    no_triton,
)

LARGEST_HEAD = 256
MLA = (192, 128)
OLDEST_FLASH_4 = "4.0.0b36"
"""The version whose calls were read and probed."""
EVERY_CHIP = ("sm_80", "sm_90", "sm_100", "gfx942")


def _number(version: str) -> tuple[int, ...]:
    """4.0.0b36 as (4, 0, 0, 36); a release comes after all its betas."""
    release, beta, number = version.partition("b")
    parts = [int("".join(c for c in part if c.isdigit()) or 0) for part in [*release.split("."), "0", "0"][:3]]
    return *parts, int("".join(c for c in number if c.isdigit()) or 0) if beta else 1 << 30


def _older(version: str, major: int, minor: int) -> bool:
    return tuple(int("".join(c for c in part if c.isdigit()) or 0) for part in version.split(".")[:2]) < (major, minor)


def _no_flash(package: str, chips: tuple[str, ...]) -> Obstacle:
    """What keeps any of the flash-attn packages back; each one's own limits come on top."""

    def obstacle(request: Request, machine: Machine) -> str | None:
        if request.device != "cuda":
            return "flash-attn is for GPUs"
        if machine.version_of(package) is None:
            return f"{package} is not installed"
        if request.chip not in chips:
            return f"it has no kernels for {request.chip}"
        if machine.real and (failure := import_failure(package)):
            return f"{package} does not import: {failure}"
        if request.dtype not in (torch.bfloat16, torch.float16):
            return "flash-attn is for bf16 and fp16"
        if request.feature("lse"):
            return "no gradient flows through its log-sum-exp"
        if request.feature("spans"):
            return "it takes no intervals of keys"
        if request.feature("documents"):
            return "it takes documents as cu_seqlens, whose number a GPU would have to tell"
        if request.feature("empty"):
            return "nothing to compute"
        if max(request.feature("dims")) > LARGEST_HEAD:
            return f"heads over {LARGEST_HEAD}"
        return None

    return obstacle


def _no_flash_4(request: Request, machine: Machine) -> str | None:
    dims, blackwell = request.feature("dims"), request.chip == "sm_100"
    found = machine.version_of("flash-attn-4")
    if found is not None and _number(found) < _number(OLDEST_FLASH_4):
        return f"flash-attn-4 {found} is older than {OLDEST_FLASH_4}: sinks without a gradient, another softcap"
    if request.feature("packed") and request.feature("softcap"):
        return "no backward of packed documents with a softcap"
    if dims[0] != dims[1] and dims != MLA:
        return f"head sizes {dims}; it has equal ones and {MLA}"
    if blackwell and 128 < dims[0] < LARGEST_HEAD and dims != MLA:
        return f"heads of {dims[0]} on sm_100"
    if blackwell and dims[0] == LARGEST_HEAD and (request.feature("sinks") or request.feature("deterministic")):
        return "heads of 256 on sm_100 with sinks, or deterministic"
    return None


def _no_flash_3(request: Request, machine: Machine) -> str | None:
    dims = request.feature("dims")
    if dims[0] != dims[1]:
        return "values of another head size"
    if request.feature("sinks"):
        return "no sinks"
    if request.feature("deterministic") and dims[0] == LARGEST_HEAD:
        return "heads of 256 are not deterministic"
    return None


def _no_flash_2(request: Request, machine: Machine) -> str | None:
    if request.chip == "gfx942" and request.feature("softcap"):
        return "flash-attn's kernels for AMD take a softcap and ignore it"
    found = machine.version_of("flash-attn")
    if found is not None and _older(found, 2, 6):
        return f"flash-attn {found} is older than 2.6"
    dims = request.feature("dims")
    if dims[0] != dims[1]:
        return "values of another head size"
    return "no sinks" if request.feature("sinks") else None


def _not_its_chip(request: Request, machine: Machine) -> str | None:
    return f"written for Ampere, runs on {request.chip}" if request.chip in ("sm_90", "sm_100") else None


def _no_triton(request: Request, machine: Machine) -> str | None:
    if max(request.feature("dims")) > LARGEST_HEAD:
        return f"the kernels' heads are {LARGEST_HEAD} wide at most"
    return no_triton(request, machine)


def _no_sdpa(request: Request, machine: Machine) -> str | None:
    """torch.nn.functional.scaled_dot_product_attention, whose causal mask is aligned at the top left."""
    for feature in ("sinks", "softcap", "window", "documents", "packed", "spans"):
        if request.feature(feature):
            return f"PyTorch's kernel knows no {feature}"
    if request.feature("lse"):
        return "PyTorch's kernel gives no log-sum-exp"
    if request.feature("deterministic") and request.device == "cuda":
        return "PyTorch's kernels on a GPU may add gradients in any order"
    if not request.feature("aligned"):
        return "its causal mask is aligned at the first key, not at the last"
    return "nothing to compute" if request.feature("empty") else None


def _for_accelerators(request: Request, machine: Machine) -> str | None:
    return "our CPU routes come first" if request.device == "cpu" else None


def _both(first: Obstacle, second: Obstacle) -> Obstacle:
    return lambda request, machine: first(request, machine) or second(request, machine)


OPS["attention"] = (
    Backend("flash3", _both(_no_flash("flash-attn-3", ("sm_90",)), _no_flash_3)),
    Backend("flash4", _both(_no_flash("flash-attn-4", ("sm_90", "sm_100")), _no_flash_4)),
    Backend("flash2", _both(_no_flash("flash-attn", EVERY_CHIP), _no_flash_2), _not_its_chip),
    Backend("triton", _no_triton, interpreted),
    Backend("sdpa", _no_sdpa, _for_accelerators),
    NATIVE,
    Backend("blocks", never),
    REFERENCE,
)


def choose_for_spans(device: str, dtype: torch.dtype, dim: int, value_dim: int) -> str:
    """The backend where a query's keys come as an interval."""
    return choose("attention", "auto", device, dtype, (("dims", (dim, value_dim)), ("spans", True)))
