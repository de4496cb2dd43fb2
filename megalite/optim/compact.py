"""AdamW and SGD whose weights or moments are kept in fewer bits than their updates are computed in."""

from collections.abc import Callable, Sequence

import torch
from megalite_kernels.reference import adamw_moments, adamw_moved
from torch import Tensor

from megalite.optim.eager import Eager
from megalite.optim.moments import Chunk, Moments
from megalite.parallel.data import Piece

Groups = list[dict[str, object]]


class Compact(Eager):
    """`params` are the weights of the moments' pieces; bfloat16 ones are rounded stochastically. A group's "number" is
    the step's, which rounding is drawn from."""

    def __init__(self, params: Groups, defaults: dict[str, object], moments: Moments) -> None:
        super().__init__(params, defaults)
        self.moments = moments
        (group,) = self.param_groups
        self.weights: dict[Piece, Tensor] = dict(zip(moments.pieces, group["params"], strict=True))
        for piece, weight in self.weights.items():
            self.state[weight] = moments.state[piece]

    def change(self, chunk: Chunk, moved: Callable[[Tensor], Tensor]) -> None:
        """Replace some weights by what `moved` makes of them, in the dtype that updates are computed in."""
        weight, (group,) = self.weights[chunk.piece], self.param_groups
        wide = moved(chunk.of(weight).to(self.moments.wide))
        chunk.keep(weight, wide, f"{self.moments.seed}/{group['number']}/model")


class CompactAdamW(Compact):
    """AdamW (arXiv:1711.05101); the moments are "exp_avg" and "exp_avg_sq", and each weight's "step" counts."""

    def __init__(
        self, params: Groups, lr: float, betas: tuple[float, float], eps: float, weight_decay: float, moments: Moments
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}, moments)
        for weight in self.weights.values():
            self.state[weight]["step"] = torch.zeros((), dtype=torch.float32, device=weight.device)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        (group,) = self.param_groups
        rule = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay")}
        for weight in self.weights.values():
            self.state[weight]["step"] += 1

        def after(gradient: Tensor, old: list[Tensor]) -> Sequence[Tensor]:
            return adamw_moments(gradient, old[0], old[1], group["betas"])

        def use(chunk: Chunk, new: Sequence[Tensor]) -> None:
            count = self.state[self.weights[chunk.piece]]["step"]
            self.change(chunk, lambda weight: adamw_moved(weight, new[0], new[1], count, **rule))

        self.moments.update(group["number"], after, use)


class CompactSGD(Compact):
    """m = momentum·m + g; p = p (1 - lr·decay) - lr·m. The moment is "momentum_buffer"."""

    def __init__(self, params: Groups, lr: float, momentum: float, weight_decay: float, moments: Moments) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}, moments)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        (group,) = self.param_groups
        lr, kept = group["lr"], 1 - group["lr"] * group["weight_decay"]

        def after(gradient: Tensor, old: list[Tensor]) -> Sequence[Tensor]:
            return [old[0] * group["momentum"] + gradient]

        def use(chunk: Chunk, new: Sequence[Tensor]) -> None:
            self.change(chunk, lambda weight: weight * kept - lr * new[0])

        self.moments.update(group["number"], after, use)
