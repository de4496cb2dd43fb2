"""The learning rate as a pure function of the step."""

import math

from megalite.config.schema import OptimConfig


def lr_share(optim: OptimConfig, step: int, steps: int) -> float:
    """Share of the peak learning rate used in `step` (1 is the first of `steps`).

    Linear warm-up reaches the peak at step `warmup_steps`. cosine and linear then fall to `min_lr_ratio` at the last
    step; wsd stays at the peak and falls linearly over the last `decay_steps` (Hu et al. 2024, arXiv:2404.06395);
    inverse_sqrt falls as 1/sqrt(step), not below `min_lr_ratio` (Vaswani et al. 2017, arXiv:1706.03762).
    """
    if step <= optim.warmup_steps:
        return step / optim.warmup_steps
    if optim.schedule == "constant":
        return 1.0
    start = optim.warmup_steps
    if optim.schedule == "inverse_sqrt":
        return max(optim.min_lr_ratio, math.sqrt(max(1, start) / step))
    if optim.schedule == "wsd":
        start = max(start, steps - (optim.decay_steps or steps // 5))
    if step <= start:
        return 1.0
    progress = min(1.0, (step - start) / max(1, steps - start))
    fall = 0.5 * (1 + math.cos(math.pi * progress)) if optim.schedule == "cosine" else 1 - progress
    return optim.min_lr_ratio + (1 - optim.min_lr_ratio) * fall
