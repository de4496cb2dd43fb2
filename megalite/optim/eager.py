"""torch.optim without torch's compiler, which its optimizers import (140 MB, a second and a half) to mark methods that
eager training never compiles."""

from collections.abc import Callable
from typing import Any

import torch


def _unmarked(method: Callable[..., Any]) -> Any:
    return getattr(method, "__wrapped__", method)


class Eager(torch.optim.Optimizer):
    add_param_group = _unmarked(torch.optim.Optimizer.add_param_group)


class AdamW(Eager, torch.optim.AdamW):
    step = torch.no_grad()(_unmarked(torch.optim.AdamW.step))


class SGD(Eager, torch.optim.SGD):
    step = torch.no_grad()(_unmarked(torch.optim.SGD.step))
