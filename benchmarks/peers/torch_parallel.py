"""PyTorch's own parallelisms around the plain Llama: DDP, ZeRO-1, FSDP2, DTensor tensor parallelism, pipelining.

Set up as their documentation does; where it leaves a choice, the faster one: one gather or sum for all projections of
a sublayer, a loss on the cut vocabulary, stages of equal work.
"""

from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from peers.job import ADAMW, Job, Step
from peers.llama import Llama, loss

PIPELINES: dict[str, tuple[int, tuple[int, ...]]] = {
    "1f1b": (1, (5, 3)),
    "zb_h1": (1, (5, 3)),
    "interleaved": (2, (3, 2, 2, 1)),
    "zbv": (2, (2, 3, 2, 1)),
}
"""(stages a rank, layers of each stage). The head costs about as much as two layers: either rank has half the work."""


def build(job: Job) -> Step:
    """The variant's step."""
    dist.init_process_group("gloo")
    model = Llama(job.shape).to(job.dtype)
    if job.variant in PIPELINES:
        return pipelined(job, model)
    builders = {"tp": tensor_parallel, "tp+sp": tensor_parallel, "fsdp2": sharded, "fsdp2:kept": sharded}
    return builders.get(job.variant, replicated)(job, model)


def _halves(tokens_BS: Tensor) -> tuple[Tensor, Tensor]:
    return tokens_BS[:, :-1].contiguous(), tokens_BS[:, 1:].contiguous()


def replicated(job: Job, model: nn.Module) -> Step:
    """DistributedDataParallel; "zero1": with ZeroRedundancyOptimizer."""
    model = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    if job.variant == "zero1":
        from torch.distributed.optim import ZeroRedundancyOptimizer

        optimizer: torch.optim.Optimizer = ZeroRedundancyOptimizer(
            model.parameters(), torch.optim.AdamW, parameters_as_bucket_view=True, fused=True, **ADAMW
        )
    else:
        optimizer = torch.optim.AdamW(model.parameters(), fused=True, **ADAMW)
    return data_parallel(job, model, optimizer)


def sharded(job: Job, model: nn.Module) -> Step:
    """FSDP2 by block; "kept": weights stay whole between forward and backward, as in ZeRO 2."""
    from torch.distributed.fsdp import fully_shard

    mesh = torch.distributed.init_device_mesh("cpu", (job.ranks,))
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh, reshard_after_forward="kept" not in job.variant)
    return data_parallel(job, model, torch.optim.AdamW(model.parameters(), fused=True, **ADAMW))


def data_parallel(job: Job, model: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    def step(tokens_BS: Tensor) -> float:
        tokens, targets = _halves(job.own(tokens_BS))
        value = loss(model(tokens), targets)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=not getattr(model, "gradient_as_bucket_view", False))
        return float(value)

    return step


def tensor_parallel(job: Job, model: nn.Module) -> Step:
    """parallelize_module over all ranks; "sp": norms and the residual stream on parts of the sequence."""
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        SequenceParallel,
        loss_parallel,
        parallelize_module,
    )

    mesh = torch.distributed.init_device_mesh("cpu", (job.ranks,))
    sequence = "sp" in job.variant
    stream = Shard(1) if sequence else Replicate()
    entrance = {"input_layouts": (stream,), "desired_input_layouts": (Replicate(),)}
    plan: dict[str, Any] = {
        "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=stream),
        "blocks.*.attention": PrepareModuleInput(**entrance),
        "blocks.*.mlp": PrepareModuleInput(**entrance),
        "head": ColwiseParallel(input_layouts=stream, output_layouts=Shard(-1), use_local_output=False),
    }
    plan |= {f"blocks.*.attention.{name}": ColwiseParallel() for name in ("query", "key", "value")}
    plan |= {f"blocks.*.mlp.{name}": ColwiseParallel() for name in ("gate", "up")}
    plan |= {f"blocks.*.{name}": RowwiseParallel(output_layouts=stream) for name in ("attention.output", "mlp.down")}
    if sequence:
        plan |= dict.fromkeys(("norm", "blocks.*.attention_norm", "blocks.*.mlp_norm"), SequenceParallel())
    parallelize_module(model, mesh, plan)
    kinds: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for parameter in model.parameters():
        kinds[isinstance(parameter, DTensor)].append(parameter)
    groups = [parameters for parameters in kinds.values() if parameters]  # no op takes tensors of both kinds
    optimizer = torch.optim.AdamW([{"params": group} for group in groups], fused=True, **ADAMW)

    def norm(parameters: list[nn.Parameter]) -> Tensor:
        total = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        return total.full_tensor() if isinstance(total, DTensor) else total

    def step(tokens_BS: Tensor) -> float:
        tokens, targets = _halves(tokens_BS)
        with loss_parallel():
            value = loss(model(tokens), targets)
            value.backward()
        total = torch.stack([norm(group) for group in groups]).norm()
        for group in groups:
            nn.utils.clip_grads_with_norm_(group, 1.0, total)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(value.full_tensor() if isinstance(value, DTensor) else value)

    return step


def pipelined(job: Job, model: nn.Module) -> Step:
    """torch.distributed.pipelining over all ranks, a microbatch for each of the step's sequences."""
    from torch.distributed import pipelining

    chunks, counts = PIPELINES[job.variant]
    bounds = list(pairwise(accumulate(counts, initial=0)))
    held = [job.rank, 2 * job.ranks - 1 - job.rank if job.variant == "zbv" else job.rank + job.ranks][:chunks]
    stages = []
    for number in held:
        torch.manual_seed(1)
        part = Llama(job.shape).to(job.dtype).stage(range(*bounds[number]), number == 0, number == len(bounds) - 1)
        stages.append(pipelining.PipelineStage(part, number, len(bounds), torch.device("cpu")))
    kind = {
        "1f1b": pipelining.Schedule1F1B,
        "interleaved": pipelining.ScheduleInterleaved1F1B,
        "zbv": pipelining.ScheduleZBVZeroBubble,
    }[job.variant]
    schedule = kind(stages[0] if chunks == 1 else stages, job.rows, loss)
    parameters = [parameter for stage in stages for parameter in stage.submod.parameters()]
    optimizer = torch.optim.AdamW(parameters, fused=True, **ADAMW)

    def step(tokens_BS: Tensor) -> float:
        tokens, targets = _halves(tokens_BS)
        losses: list[Tensor] = []
        last = len(bounds) - 1 in held
        schedule.step(*([tokens] if 0 in held else []), **({"target": targets, "losses": losses} if last else {}))
        square = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]).square()
        dist.all_reduce(square)
        nn.utils.clip_grads_with_norm_(parameters, 1.0, square.sqrt())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(torch.stack(losses).mean()) if last else float("nan")

    return step
