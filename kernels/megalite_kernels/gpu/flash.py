"""Calls of the flash-attn packages (BSD-3, Dao et al.), none of which is imported before it is chosen.

Only the arguments differ between their versions: see `attention_choice` for what each can do.
"""

from typing import Any

from torch import Tensor

from megalite_kernels.dispatch import import_module

PACKAGES = {"flash2": "flash-attn", "flash3": "flash-attn-3", "flash4": "flash-attn-4"}


def flash(
    which: str, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, window: int | None, softcap: float | None,
    sinks: Tensor | None, cu_q: Tensor | None, cu_k: Tensor | None, longest: tuple[int, int], deterministic: bool,
) -> Tensor:  # fmt: skip
    """Attention out [B, S, H, E] by "flash2", "flash3" or "flash4"; packed where cu_q is given, and then B is 1."""
    module = import_module(PACKAGES[which])
    endless = None if which == "flash4" else -1
    options: dict[str, Any] = {
        "softmax_scale": scale,
        "causal": causal,
        # Keys to the left of a query's own position and to its right; causal closes the right side.
        "window_size": (endless if window is None else window - 1, 0 if causal and window is not None else endless),
        "softcap": softcap or 0.0,
        "deterministic": deterministic,
    }
    if sinks is not None:
        options["learnable_sink"] = sinks
    if cu_q is None or cu_k is None:
        result = module.flash_attn_func(q, k, v, **options)
    else:
        packed = {
            "cu_seqlens_q": cu_q.int(), "cu_seqlens_k": cu_k.int(),
            "max_seqlen_q": longest[0], "max_seqlen_k": longest[1],
        }  # fmt: skip
        result = module.flash_attn_varlen_func(q[0], k[0], v[0], **packed, **options)
    out: Tensor = result[0] if isinstance(result, tuple) else result  # some versions give the log-sum-exp too
    return out if cu_q is None else out[None]
