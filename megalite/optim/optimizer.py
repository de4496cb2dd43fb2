"""The optimizer: groups by declared role, float32 main weights behind a low-precision model, state by logical name."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from megalite.config.schema import OptimConfig
from megalite.mesh import AXES
from megalite.optim.compact import Compact, CompactAdamW, CompactSGD
from megalite.optim.eager import SGD, AdamW
from megalite.optim.moments import SCALE, Moments
from megalite.optim.muon import Muon
from megalite.optim.schedule import lr_share
from megalite.optim.slabs import held_scales
from megalite.parallel.boxes import Held
from megalite.parallel.buckets import Slot
from megalite.parallel.data import Gradients, Piece
from megalite.parallel.parameter import Role, declaration, declared_parameters, placement
from megalite.parallel.weights import ShardedWeights
from megalite.precision import SHORT, Precision

ADAM_STATE = ("exp_avg", "exp_avg_sq")


class DecoupledSGD(SGD):
    """SGD with momentum; decay shrinks the weights directly (Loshchilov & Hutter 2019), not by the gradient."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        decays = [group["weight_decay"] for group in self.param_groups]
        for group, decay in zip(self.param_groups, decays, strict=True):
            if decay and group["params"]:
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
    decays = role in ("matrix", "router", "expert") or (embedding_like and optim.decay_embeddings)
    muon = optim.name == "muon" and role in ("matrix", "expert")
    own_rate = optim.embedding_lr is not None and (embedding_like or (optim.name == "muon" and not muon))
    lr = optim.embedding_lr if own_rate and optim.embedding_lr is not None else optim.lr
    return Rule(muon, lr, optim.weight_decay if decays else 0.0)


class Optimizer:
    """Updates this rank's stages from their `Gradients`, each rank the pieces that ZeRO leaves it.

    The weights that are updated ("main") are the model's own parameters where these have the gradients' dtype;
    otherwise float32 copies, written back after each step. `precision` says if they or their moments are narrower than
    the gradients (default: they are not), `seed` what their rounding is drawn from. Sharded weights are gathered while
    the next forward pass already runs; `wait` before reading parameters otherwise than through a module.
    """

    def __init__(
        self,
        chunks: Sequence[nn.Module],
        gradients: Gradients,
        optim: OptimConfig,
        steps: int,
        precision: Precision | None = None,
        seed: int = 0,
    ) -> None:
        self.config, self.steps, self.comm = optim, steps, gradients.comm
        self.seed, self.compact = seed, precision is not None and precision.compact
        self.kept_as = SHORT[gradients.dtype] if precision is None else precision.moments
        kept = gradients.dtype if precision is None else precision.main
        self.weights = ShardedWeights(chunks, gradients.buckets, gradients.comm)
        self.main: dict[Piece, torch.Tensor] = {}
        self._copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        for piece in gradients.pieces():
            weight = self.weights.part(piece).detach()
            main = self.main[piece] = weight.to(kept)
            if main.dtype == piece.gradient.dtype:
                main.grad = piece.gradient
            if main.dtype != weight.dtype:
                self._copies.append((weight, main))
        by_rule: dict[Rule, list[Slot]] = {}
        for slot in gradients.slots:
            by_rule.setdefault(rule_for(slot.declared.role, optim), []).append(slot)
        self.rules = [self._build(rule, slots, gradients) for rule, slots in by_rule.items()]
        self.untrained = {name: p for name, p, _ in declared_parameters(chunks) if not p.requires_grad}
        self._make_state()

    def _build(self, rule: Rule, slots: list[Slot], gradients: Gradients) -> torch.optim.Optimizer:
        optim, chosen = self.config, set(slots)
        pieces = [piece for piece in self.main if piece.slot in chosen]
        groups = [{"params": [self.main[piece] for piece in pieces], "peak_lr": rule.lr}]
        betas = (optim.beta1, optim.beta2)

        def moments(*names: str) -> Moments:
            return Moments(names, self.kept_as, pieces, slots, self.comm, gradients.dtype, self.seed)

        if rule.muon:
            kept = moments("momentum_buffer")
            return Muon(groups, rule.lr, optim.momentum, rule.weight_decay, gradients, slots, kept)
        if optim.name == "sgd":
            if self.compact:
                return CompactSGD(groups, rule.lr, optim.momentum, rule.weight_decay, moments("momentum_buffer"))
            return DecoupledSGD(groups, rule.lr, optim.momentum, weight_decay=rule.weight_decay)
        if self.compact:
            return CompactAdamW(groups, rule.lr, betas, optim.eps, rule.weight_decay, moments(*ADAM_STATE))
        # The fused kernel rounds the last few elements of a tensor differently, so its bits depend on sharding.
        fused = not self.comm.ordered
        return AdamW(groups, rule.lr, betas, optim.eps, weight_decay=rule.weight_decay, fused=fused)

    def _make_state(self) -> None:
        """Create every moment now, so that checkpoints have the same keys before and after the first step."""
        for rule in self.rules:
            for weight in rule.param_groups[0]["params"] if not isinstance(rule, Compact) else ():
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
        for piece in self.main:  # its memory is gone between zero() and finish(), and reading it would end the process
            there = piece.gradient.untyped_storage().nbytes() > 0 or not piece.gradient.numel()
            assert there, f"{piece.slot.name}: no gradient; Gradients.finish comes before step"
        self.wait()
        share = lr_share(self.config, step, self.steps)
        for rule in self.rules:
            for group in rule.param_groups:
                group["lr"], group["number"] = group["peak_lr"] * share, step
            rule.step()
        self._publish()

    def _publish(self) -> None:
        """Bring the main weights into the model, on every replica."""
        if self._copies:
            with torch.no_grad():
                models, mains = zip(*self._copies, strict=True)
                torch._foreach_copy_(models, mains)
        self.weights.gather()

    def wait(self) -> None:
        """Every parameter of the model is as the last step left it."""
        self.weights.wait()

    def state_bytes(self) -> int:
        """What weights and moments take in a checkpoint, over all ranks; a collective."""
        states = {id(weight): state for rule in self.rules for weight, state in rule.state.items()}
        stored = sum(
            tensor.numel() * tensor.element_size()
            for piece, main in self.main.items()
            if piece.slot.placed.counted and (piece.bucket.sharded or piece.bucket.place == 0)
            for tensor in (main, *states[id(main)].values())
        )
        total = torch.tensor([stored])
        self.comm.all_reduce(total, *AXES)
        return int(total)

    def state_tensors(self) -> dict[str, Held]:
        """Main weights, moments and what no gradient moves, live, keyed `model.<name>` and `optim.<name>.<moment>`: the
        boxes held here."""
        states = {id(weight): state for rule in self.rules for weight, state in rule.state.items()}
        tensors: dict[str, Held] = {}
        for piece, main in self.main.items():
            tensors[f"model.{piece.slot.name}"] = _held(piece, main.detach())
            for key, value in states[id(main)].items():
                held = held_scales if key.endswith(SCALE) else _held
                tensors[f"optim.{piece.slot.name}.{key}"] = held(piece, value)
        tensors |= {f"model.{name}": _state(state) for name, state in self.untrained.items()}
        return {key: held for key, held in tensors.items() if held.read}

    @torch.no_grad()
    def load_state_tensors(self, tensors: Mapping[str, Held]) -> None:
        """Take over tensors saved by `state_tensors`, all of them; those may be the live ones, filled in place."""
        for key, held in self.state_tensors().items():
            for (_, value), (_, loaded) in zip(held.read, tensors[key].read, strict=True):
                value.copy_(loaded)
        self._publish()
        self.wait()


def _state(state: nn.Parameter) -> Held:
    """What no gradient moves: all of it, or what this rank's experts have."""
    placed = placement(state)
    return Held(declaration(state).shape, (((placed.offsets, placed.shape), state.detach()),), placed.counted)


def _held(piece: Piece, value: torch.Tensor) -> Held:
    """A piece's values, or its scalar, which whoever holds the tensor's first element stores."""
    placed, declared = piece.slot.placed, piece.slot.declared
    if value.dim() == 0:
        first = piece.start == 0 and not any(placed.offsets)
        return Held((), ((((), ()), value),), placed.counted and first)
    box = (placed.offsets, placed.shape)
    return Held.run(declared.shape, box, value, piece.start, piece.stop, placed.counted)
