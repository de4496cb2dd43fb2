"""Megatron-Core's GPT on CPU ranks: data and tensor parallelism, its distributed optimizer, 1F1B and interleaved 1F1B.

Megatron-Core names the GPU throughout; `on_cpu` lets those names mean the CPU and gloo and changes nothing else. Its
layers are the ones it has without Transformer Engine, with the residual stream whole (sequence parallelism needs that
engine). Attention is PyTorch's, in which it is faster here and leaner than in Megatron's own local module.
"""

import functools
import os
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from peers.job import ADAMW, Job, Step

PIPELINES = {"1f1b": (1, "Et*5|t*3L"), "interleaved": (2, "Et*3|t*2|t*2|tL")}
"""(stages a rank, what each stage has: embedding, transformer layers, loss): the stages of the other engines."""
FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "arange", "randn")


def on_cpu() -> None:
    """`device="cuda"` and what Megatron-Core asks of torch.cuda, for this process."""

    def placed(factory: Any) -> Any:
        @functools.wraps(factory)
        def made(*arguments: Any, device: Any = None, **options: Any) -> Any:
            device = torch.device("cpu") if device is not None and str(device).startswith("cuda") else device
            return factory(*arguments, device=device, **options)

        return made

    for name in FACTORIES:
        setattr(torch, name, placed(getattr(torch, name)))
    cuda: Any = torch.cuda
    cuda.current_device = lambda: torch.device("cpu")
    cuda.get_rng_state = lambda *_: torch.get_rng_state()
    cuda.random.get_rng_state = lambda *_: torch.get_rng_state()
    for name in ("synchronize", "manual_seed", "set_rng_state", "_lazy_call", "_lazy_init"):
        setattr(cuda, name, lambda *_, **__: None)  # one each: torch.compile wants to tell them apart
    for name in ("current_stream", "Stream", "Event"):
        setattr(cuda, name, lambda *_, **__: _Stream())
    cuda.stream = lambda *_: nullcontext()
    kind = torch.Tensor.type

    def named(self: Tensor, *to: Any) -> Any:
        return kind(self, *to) if to else kind(self).replace("torch.", "torch.cuda.")

    torch.Tensor.type = named  # type: ignore[method-assign]
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    torch.nn.Module.cuda = lambda self, *_: self  # type: ignore[method-assign]


class _Stream:
    """A CPU does one thing after the other."""

    def _nothing(self, *_: Any) -> None: ...

    wait_stream = wait_event = record = synchronize = record_event = _nothing


def build(job: Job) -> Step:
    """The variant's step."""
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    on_cpu()
    torch.distributed.init_process_group("gloo")
    from megatron.core import parallel_state
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer import ModuleSpec, TransformerConfig

    chunks, stages_hold = PIPELINES.get(job.variant, (0, None))
    pp, tp = (job.ranks if chunks else 1), (job.ranks if job.variant == "tp" else 1)
    layout: dict[str, Any] = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
    layout["virtual_pipeline_model_parallel_size"] = chunks if chunks > 1 else None
    parallel_state.initialize_model_parallel(**layout)
    model_parallel_cuda_manual_seed(1)
    shape, half = job.shape, job.precision == "bf16"
    config = TransformerConfig(
        **layout,
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        ffn_hidden_size=shape.ffn,
        num_attention_heads=shape.heads,
        num_query_groups=shape.kv_heads,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        bf16=half,
        params_dtype=job.dtype,
        pipeline_dtype=job.dtype,
        finalize_model_grads_func=finalize_model_grads,
        pipeline_model_parallel_layout=stages_hold,
    )
    spec: Any = get_gpt_layer_local_spec(normalization="RMSNorm")
    spec.submodules.self_attention.submodules.core_attention = ModuleSpec(module=attention_module())
    stages = []
    for number in range(max(1, chunks)):
        ends = {
            "pre_process": parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=number),
            "post_process": parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=number),
        }
        model = GPTModel(
            config,
            spec,
            vocab_size=shape.vocab,
            max_sequence_length=shape.sequence,
            position_embedding_type="rope",
            share_embeddings_and_output_weights=False,
            vp_stage=number if chunks > 1 else None,
            **ends,
        ).to(job.dtype)
        settings = DistributedDataParallelConfig(
            overlap_grad_reduce=True, use_distributed_optimizer=job.variant == "zero1", grad_reduce_in_fp32=half
        )
        stages.append(DistributedDataParallel(config, settings, model))
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            lr=ADAMW["lr"],
            weight_decay=ADAMW["weight_decay"],
            adam_beta1=ADAMW["betas"][0],
            adam_beta2=ADAMW["betas"][1],
            clip_grad=1.0,
            bf16=half,
            params_dtype=job.dtype,
            use_distributed_optimizer=job.variant == "zero1",
        ),
        stages,
    )
    run, shared = get_forward_backward_func(), bool(chunks) or tp > 1
    positions = torch.arange(shape.sequence)[None]

    def forward(batches: Iterator[Tensor], model: Any) -> tuple[Tensor, Any]:
        tokens = next(batches)
        ids, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        value = model(ids, positions.expand_as(ids), None, labels=labels)

        def mean(losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            average = losses.float().mean()
            return average, {"loss": average.detach().clone()}  # the schedule divides the loss in place

        return value, mean

    def step(tokens_BS: Tensor) -> float:
        own = tokens_BS if shared else job.own(tokens_BS)
        parts = list(own.split(1)) if chunks else [own]
        for stage in stages:
            stage.zero_grad_buffer()
        optimizer.zero_grad()
        found = run(
            forward_step_func=forward,
            data_iterator=[iter(parts) for _ in stages] if chunks > 1 else iter(parts),
            model=stages if chunks > 1 else stages[0],
            num_microbatches=len(parts),
            seq_length=shape.sequence,
            micro_batch_size=len(parts[0]),
            forward_only=False,
        )
        optimizer.step()
        return float(torch.stack([of["loss"] for of in found]).mean()) if found else float("nan")

    return step


def attention_module() -> type[torch.nn.Module]:
    """Causal attention by scaled_dot_product_attention, where Megatron's local module makes the scores whole."""

    class Attention(torch.nn.Module):
        def __init__(self, config: Any, *_: Any, **__: Any) -> None:
            super().__init__()

        def forward(self, query_SBHD: Tensor, key_SBHD: Tensor, value_SBHD: Tensor, *_: Any, **__: Any) -> Tensor:
            query, key, value = (x.permute(1, 2, 0, 3) for x in (query_SBHD, key_SBHD, value_SBHD))
            grouped = query.shape[1] != key.shape[1]
            out = torch.nn.functional.scaled_dot_product_attention(
                query, key, value, is_causal=True, enable_gqa=grouped
            )
            return out.permute(2, 0, 1, 3).flatten(2)

    return Attention
