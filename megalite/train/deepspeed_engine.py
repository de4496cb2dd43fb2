"""DeepSpeed as another engine for data parallelism (parallel.engine=deepspeed): ZeRO 1 to 3, optimizer on the host.

The same model, data and step; two objects with the methods of `Gradients` and `Optimizer` stand in for ours. DeepSpeed
has collectives of its own, so these alone do not pass through our one door: nothing counts or checks them. It averages
gradients over the ranks where we sum them, and clips by (norm + 1e-6) inside its own step.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from megalite.comm import Communicator
from megalite.config.schema import Config, OptimConfig
from megalite.errors import UserError
from megalite.model.transformer import Losses, Transformer
from megalite.optim.optimizer import ADAM_STATE, DecoupledSGD, Optimizer, Rule, rule_for
from megalite.optim.schedule import lr_share
from megalite.parallel.boxes import Held
from megalite.parallel.data import Gradients
from megalite.parallel.parameter import Declaration, declared_parameters
from megalite.precision import Precision


def import_deepspeed(device: torch.device) -> Any:
    """The library; UserError when it is not installed."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)  # or it looks for a GPU by starting other programs
    try:
        import deepspeed
    except ImportError as error:
        raise UserError(
            f"parallel.engine=deepspeed: not usable here ({error}); pip install 'megalite[deepspeed]', or set megalite"
        ) from error
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it compiles an all-reduce of its own for CPUs
    return deepspeed


class DeepSpeedGradients(Gradients):
    """Stands in for ours, without buckets: one stage, whose backward DeepSpeed follows. `engine`: DeepSpeed's own."""

    def __init__(self, stage: Transformer, comm: Communicator, config: Config, precision: Precision) -> None:
        self.comm, self.compute, self.dtype = comm, precision.compute, torch.float32
        self.zero_level = config.parallel.zero
        self.deepspeed = import_deepspeed(next(stage.parameters()).device)
        if self.zero_level == 3:  # norms give nothing again: their weights are there in calls of theirs alone
            for block in stage.layers.values():
                block.keeping.norms = False
        self.parameters = list(declared_parameters(stage))
        self.engine, *_ = self.deepspeed.initialize(
            model=_Loss(stage, self.deepspeed if config.parallel.zero == 3 else None),
            optimizer=plain_optimizer(self.parameters, config.optim),
            config=deepspeed_config(config, precision, comm.mesh.size("dp")),
            dist_init_required=False,
        )
        stage.loss = self._loss  # type: ignore[method-assign]

    def _loss(self, *arguments: Any, **options: Any) -> Losses:
        """The stage's loss, run by DeepSpeed. Its gradient is multiplied by what the average will divide by."""
        losses = Losses(*self.engine(*arguments, **options))
        for value in (losses.nll_sum, losses.z_sum):
            if value.requires_grad:
                value.register_hook(lambda gradient: gradient * self.comm.mesh.size("dp"))
        return losses

    def zero(self) -> None:
        """Forget what a step that was skipped left behind."""
        optimizer = self.engine.optimizer
        optimizer.zero_grad(set_to_none=True)
        optimizer.averaged_gradients.clear()
        if self.zero_level < 3:
            optimizer.all_grad_tensors.clear()
            optimizer.micro_step_id = -1
        optimizer.reset_cpu_buffers()

    @contextmanager
    def accumulating(self, chunk: int = 0, last: bool = False, complete: bool = True) -> Iterator[None]:
        """Around one backward. `last`: of the step; DeepSpeed finishes its sums with it."""
        self.engine.set_gradient_accumulation_boundary(last)
        yield

    def reduce(self, chunk: int) -> None:
        """DeepSpeed has reduced already."""

    def finish(self) -> None:
        """DeepSpeed has waited already."""

    def global_norm(self) -> Tensor:
        """L2 norm over every gradient element, a scalar, before clipping."""
        optimizer = self.engine.optimizer
        groups = [optimizer.scaled_global_norm()] if self.zero_level < 3 else optimizer._get_norm_groups()
        return torch.linalg.vector_norm(torch.stack([torch.as_tensor(norm).double() for norm in groups]))

    def scale(self, factor: float) -> None:
        """DeepSpeed clips in its own step."""

    def full(self, parameter: nn.Parameter) -> Tensor:
        """The summed gradient of a parameter; a collective."""
        gradient: Tensor = self.deepspeed.utils.safe_get_full_grad(parameter)
        return gradient


class DeepSpeedOptimizer(Optimizer):
    """Stands in for ours. A checkpoint takes weights and moments whole: every rank needs the room for all of them."""

    def __init__(self, gradients: DeepSpeedGradients, optim: OptimConfig, steps: int) -> None:
        self.gradients, self.config, self.steps = gradients, optim, steps
        self.inner = gradients.engine.optimizer
        self.moments = ADAM_STATE if optim.name == "adamw" else ("momentum_buffer",)
        self.states = [self._made(flat) for flat in self._flats()]
        if gradients.zero_level < 3:
            self.inner._lazy_init_hp_params_optimizer_state()

    def _flats(self) -> list[Tensor]:
        """The float32 weights that this rank updates."""
        if self.gradients.zero_level < 3:
            return list(self.inner.single_partition_of_fp32_groups)
        return list(self.inner.fp32_partitioned_groups_flat)

    def _made(self, flat: Tensor) -> dict[str, Tensor]:
        """Every moment now, so that checkpoints have the same keys before and after the first step."""
        state: dict[str, Tensor] = self.inner.optimizer.state[flat]
        state.update({key: torch.zeros_like(flat.detach()) for key in self.moments})
        if self.config.name == "adamw":
            state["step"] = torch.zeros((), dtype=torch.float32)
        return state

    def step(self, step: int) -> None:
        for group in self.inner.param_groups:
            group["lr"] = group["peak_lr"] * lr_share(self.config, step, self.steps)
        self.gradients.engine.step()

    def wait(self) -> None:
        """DeepSpeed has waited already."""

    def state_bytes(self) -> int:
        """What weights and moments take in a checkpoint."""
        elements = sum(prod(declared.shape) for _, _, declared in self.gradients.parameters)
        return 4 * elements * (1 + len(self.moments))

    def state_tensors(self) -> dict[str, Held]:
        """Copies of main weights and moments, keyed as by `Optimizer`, whole on every rank; a collective."""
        utils, tensors = self.gradients.deepspeed.utils, {}
        for name, parameter, _ in self.gradients.parameters:
            tensors[f"model.{name}"] = Held.whole(utils.safe_get_full_fp32_param(parameter).detach().clone())
            for key in self.moments:
                moment = utils.safe_get_full_optimizer_state(parameter, key)
                tensors[f"optim.{name}.{key}"] = Held.whole(moment.detach().clone())
            if "step" in self.states[0]:
                tensors[f"optim.{name}.step"] = Held.whole(self.states[0]["step"].detach().clone())
        return tensors

    @torch.no_grad()
    def load_state_tensors(self, tensors: Mapping[str, Held]) -> None:
        """Take over tensors saved by `state_tensors`, all of them; a collective."""
        utils = self.gradients.deepspeed.utils
        for name, parameter, _ in self.gradients.parameters:
            utils.safe_set_full_fp32_param(parameter, _whole(tensors[f"model.{name}"]))
            with self.gradients.deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.copy_(_whole(tensors[f"model.{name}"]))  # what the model computes with
            for key in self.moments:
                utils.safe_set_full_optimizer_state(parameter, _whole(tensors[f"optim.{name}.{key}"]), key)
            for state in self.states if "step" in self.states[0] else ():
                state["step"].copy_(_whole(tensors[f"optim.{name}.step"]))


def _whole(held: Held) -> Tensor:
    ((_, values),) = held.parts
    return values


def plain_optimizer(parameters: list[tuple[str, nn.Parameter, Declaration]], optim: OptimConfig) -> Any:
    """The rule that DeepSpeed is to shard: a group for each of our rules."""
    by_rule: dict[Rule, list[nn.Parameter]] = {}
    for _, parameter, declared in parameters:
        by_rule.setdefault(rule_for(declared.role, optim), []).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": chosen, "lr": rule.lr, "peak_lr": rule.lr, "weight_decay": rule.weight_decay}
        for rule, chosen in by_rule.items()
    ]
    if optim.name == "sgd":
        return DecoupledSGD(groups, optim.lr, optim.momentum)
    return torch.optim.AdamW(groups, optim.lr, (optim.beta1, optim.beta2), optim.eps)


def deepspeed_config(config: Config, precision: Precision, ranks: int) -> dict[str, Any]:
    """Microbatches are counted by us (DeepSpeed is told where a step ends), so to DeepSpeed each is a batch."""
    parallel, bucket = config.parallel, max(1, int(config.parallel.bucket_mb * 2**20 / 4))
    zero: dict[str, Any] = {"stage": parallel.zero, "reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
    if parallel.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": config.train.micro_batch,
        "gradient_accumulation_steps": 1,
        "train_batch_size": config.train.micro_batch * ranks,
        "gradient_clipping": config.optim.clip,
        "zero_optimization": zero,
        "bf16": {"enabled": precision.compute == torch.bfloat16},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }


class _Loss(nn.Module):
    """The stage's loss as a module: what DeepSpeed calls, and the module that reads the head's weight."""

    def __init__(self, stage: Transformer, deepspeed: Any) -> None:
        super().__init__()
        self.stage = stage
        if deepspeed is not None:
            deepspeed.zero.register_external_parameter(self, stage.head_weight)

    def forward(self, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
        losses = type(self.stage).loss(self.stage, *arguments, **options)
        return losses.nll_sum, losses.z_sum
