"""The optimizer: groups by declared role, float32 main weights behind a low-precision model, state by logical name."""

from dataclasses import dataclass

import torch
from torch import nn

from megalite.config.schema import OptimConfig
from megalite.optim.muon import Muon
from megalite.optim.schedule import lr_share
from megalite.parallel.data import REPLICATED_OVER, Gradients
from megalite.parallel.parameter import Role, declared_parameters

ADAM_STATE = ("exp_avg", "exp_avg_sq")


class DecoupledSGD(torch.optim.SGD):
    """SGD with momentum; decay shrinks the weights directly (Loshchilov & Hutter 2019), not by the gradient."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        decays = [group["weight_decay"] for group in self.param_groups]
        for group, decay in zip(self.param_groups, decays, strict=True):
            if decay:
                torch._foreach_mul_(group["params"], 1 - group["lr"] * decay)
            group["weight_decay"] = 0.0
        super().step(closure)
        for group, decay in zip(self.param_groups, decays, strict=True):
            group["weight_decay"] = decay


@dataclass(frozen=True)
class Rule:
    """How one role is updated: by Muon or the plain rule, its peak learning rate and its decay."""

    muon: bool
    lr: float
    weight_decay: float


def rule_for(role: Role, optim: OptimConfig) -> Rule:
    """Matrices decay and may take Muon; embeddings and head may have a rate of their own; norms never decay."""
    embedding_like = role in ("embedding", "head", "position")
    decays = role == "matrix" or (embedding_like and optim.decay_embeddings)
    muon = optim.name == "muon" and role == "matrix"
    own_rate = optim.embedding_lr is not None and (embedding_like or (optim.name == "muon" and not muon))
    lr = optim.embedding_lr if own_rate and optim.embedding_lr is not None else optim.lr
    return Rule(muon, lr, optim.weight_decay if decays else 0.0)


class Optimizer:
    """Updates a model from its `Gradients`.

    The weights that are updated ("main") are the model's own parameters where these have the gradients' dtype;
    otherwise float32 copies, written back after each step.
    """

    def __init__(self, model: nn.Module, gradients: Gradients, optim: OptimConfig, steps: int) -> None:
        self.config, self.steps, self.comm = optim, steps, gradients.comm
        self.main: dict[str, torch.Tensor] = {}
        self._copies: list[tuple[nn.Parameter, torch.Tensor]] = []
        groups: dict[Rule, list[torch.Tensor]] = {}
        for name, parameter, declared in declared_parameters(model):
            gradient = gradients.of(parameter)
            main: torch.Tensor = parameter
            if gradient.dtype != parameter.dtype:
                main = parameter.detach().to(gradient.dtype)
                main.grad = gradient
                self._copies.append((parameter, main))
            self.main[name] = main
            groups.setdefault(rule_for(declared.role, optim), []).append(main)
        self.rules = [self._build(rule, weights) for rule, weights in groups.items()]
        self._make_state()

    def _build(self, rule: Rule, weights: list[torch.Tensor]) -> torch.optim.Optimizer:
        optim = self.config
        groups = [{"params": weights, "peak_lr": rule.lr}]
        if rule.muon:
            return Muon(groups, rule.lr, optim.momentum, rule.weight_decay, self.comm, REPLICATED_OVER)
        if optim.name == "sgd":
            return DecoupledSGD(groups, rule.lr, optim.momentum, weight_decay=rule.weight_decay)
        betas = (optim.beta1, optim.beta2)
        return torch.optim.AdamW(groups, rule.lr, betas, optim.eps, weight_decay=rule.weight_decay, fused=True)

    def _make_state(self) -> None:
        """Create every moment now, so that checkpoints have the same keys before and after the first step."""
        for rule in self.rules:
            for weight in rule.param_groups[0]["params"]:
                state = rule.state[weight]
                if isinstance(rule, torch.optim.AdamW):
                    state["step"] = torch.zeros((), dtype=torch.float32, device=weight.device)
                    state.update({key: torch.zeros_like(weight) for key in ADAM_STATE})
                else:
                    state["momentum_buffer"] = torch.zeros_like(weight)

    def lr(self, step: int) -> float:
        """The main learning rate of `step` (1 is the first)."""
        return self.config.lr * lr_share(self.config, step, self.steps)

    def step(self, step: int) -> None:
        """Update from the gradients as they stand, with the learning rate of `step`."""
        share = lr_share(self.config, step, self.steps)
        for rule in self.rules:
            for group in rule.param_groups:
                group["lr"] = group["peak_lr"] * share
            rule.step()
        if self._copies:
            with torch.no_grad():
                models, mains = zip(*self._copies, strict=True)
                torch._foreach_copy_(models, mains)

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """Main weights and moments, as live tensors keyed `model.<name>` and `optim.<name>.<moment>`."""
        names = {id(main): name for name, main in self.main.items()}
        tensors = {f"model.{name}": main.detach() for name, main in self.main.items()}
        for rule in self.rules:
            for weight, state in rule.state.items():
                for key, value in state.items():
                    tensors[f"optim.{names[id(weight)]}.{key}"] = value
        return tensors

    @torch.no_grad()
    def load_state_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take over tensors saved by `state_tensors`, all of them."""
        for key, value in self.state_tensors().items():
            value.copy_(tensors[key])
        for parameter, main in self._copies:
            parameter.copy_(main)
