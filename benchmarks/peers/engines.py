"""One step of the same Llama (peers/job.py) by megalite and by each peer.

A builder takes a `Job` and returns step(tokens_BS) -> loss: forward, backward, clip at 1.0, AdamW. tokens_BS is int64
[sequences of the step over all ranks, positions + 1]; a rank that does not know the loss returns NaN. Imports stand
inside the builders: most peers live elsewhere.
"""

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from peers import megatron, torch_parallel
from peers.job import ADAMW, MICRO_BATCH, Job, Step

LAYOUTS: dict[str, tuple[str, ...]] = {
    "tp": ("parallel.tp=2",),
    "tp+sp": ("parallel.tp=2", "parallel.sp=true"),
    "tp+sp+overlap": ("parallel.tp=2", "parallel.sp=true", "parallel.overlap=true"),
    "ring": ("parallel.cp=2",),
    "ulysses": ("parallel.cp=2", "parallel.cp_kind=ulysses"),
    "zero1": ("parallel.zero=1",),
    "zero2": ("parallel.zero=2",),
    "zero3": ("parallel.zero=3",),
}
"""Overrides of megalite's variants, besides its pipelines: each name is a schedule."""


def megalite(job: Job) -> Step:
    """The real trainer, its data replaced by the tokens that all engines get. Variants: pure (in bf16, weights and
    moments too, as transformers has them), fp32 (whatever the others compute in), compile, and layouts."""
    from megalite import Trainer, load_config
    from megalite.data.batch import Batch

    shape, variant = job.shape, job.variant
    precision = "fp32" if variant == "fp32" else job.precision
    precision = "bf16_pure" if (variant, precision) == ("pure", "bf16") else precision
    if variant in torch_parallel.PIPELINES:
        chunks, counts = torch_parallel.PIPELINES[variant]
        layout: tuple[str, ...] = ("parallel.pp=2", f"parallel.schedule={variant}", f"parallel.chunks={chunks}")
        layout, micro = (*layout, f"parallel.layers={','.join(map(str, counts))}"), 1
    else:
        layout = LAYOUTS.get(variant, ())
        shared = any(axis in " ".join(layout) for axis in ("tp=", "cp="))
        micro = job.rows if shared else MICRO_BATCH
    trainer = Trainer(
        load_config(
            *shape.overrides(),
            *("data=bytes", f"data.sequence_length={shape.sequence}", f"precision={precision}", *layout),
            *("train.steps=1000", f"train.micro_batch={micro}", f"train.global_batch={job.rows}"),
            *(f"train.threads={job.threads}", f"train.compile={str(variant == 'compile').lower()}"),
            *(f"run.dir={job.folder}", "checkpoint.every=null", "optim.schedule=constant", "optim.lr=3e-4"),
            world_size=job.ranks,
        ),
        callbacks=(),
    )

    class Given:
        n_samples = 1 << 30
        tokens: Tensor

        def batch(self, samples: Any) -> Batch:
            tokens = self.tokens[[sample % job.rows for sample in samples]]
            return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), None)

    given = Given()
    trainer.data.train = given

    def step(tokens_BS: Tensor) -> float:
        given.tokens = tokens_BS
        return trainer.train_step().loss

    return step


def _llama(job: Job) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = job.shape
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.sequence,
        tie_word_embeddings=False,
        use_cache=False,
    )
    return LlamaForCausalLM(config).train()


def _inputs(job: Job, tokens_BS: Tensor) -> dict[str, Tensor]:
    """What transformers' models take of this rank's sequences: every position has a target."""
    own = job.own(tokens_BS)
    tokens, targets = own[:, :-1].contiguous(), own[:, 1:].contiguous()
    return {"input_ids": tokens, "labels": tokens, "shift_labels": targets}


def transformers(job: Job) -> Step:
    """Llama of transformers in a plain loop; over several ranks under torch DDP. Variants: compile, amp, both."""
    amp = "amp" in job.variant
    model: Any = _llama(job).to(torch.float32 if amp else job.dtype)
    if job.ranks > 1:
        torch.distributed.init_process_group("gloo")
        model = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW, fused=True)
    run = torch.compile(model) if "compile" in job.variant else model

    def step(tokens_BS: Tensor) -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=amp and job.precision == "bf16"):
            loss = run(**_inputs(job, tokens_BS)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss)

    return step


def fabric(job: Job) -> Step:
    """Lightning Fabric around the same model."""
    os.environ["TORCHELASTIC_RUN_ID"] = "throughput"  # how Fabric knows that its ranks are started from outside
    from lightning_fabric import Fabric

    engine = Fabric(
        accelerator="cpu",
        devices=job.ranks,
        strategy="ddp" if job.ranks > 1 else "auto",
        precision="bf16-true" if job.precision == "bf16" else "32-true",
    )
    engine.launch()
    model = _llama(job)
    model, optimizer = engine.setup(model, torch.optim.AdamW(model.parameters(), **ADAMW, fused=True))

    def step(tokens_BS: Tensor) -> float:
        loss = model(**_inputs(job, tokens_BS)).loss
        engine.backward(loss)
        engine.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss)

    return step


def olmo_core(job: Job) -> Step:
    """OLMo-core's TransformerTrainModule; its metric recorder needs a trainer, which is stood in for."""
    from unittest.mock import MagicMock

    from olmo_core.config import DType
    from olmo_core.distributed.parallel import DataParallelType
    from olmo_core.nn.transformer import TransformerConfig
    from olmo_core.optim import AdamWConfig
    from olmo_core.train.train_module import TransformerTrainModule
    from olmo_core.train.train_module.transformer.config import TransformerDataParallelConfig

    if job.ranks > 1:
        torch.distributed.init_process_group("gloo")
    shape = {
        "d_model": job.shape.hidden,
        "vocab_size": job.shape.vocab,
        "n_layers": job.shape.layers,
        "n_heads": job.shape.heads,
        "n_kv_heads": job.shape.kv_heads,
    }
    half = job.precision == "bf16"
    model = TransformerConfig.llama_like(
        **shape, hidden_size_multiple_of=256, dtype=DType.bfloat16 if half else DType.float32
    ).build(init_device="cpu")
    module = TransformerTrainModule(
        model=model,
        optim=AdamWConfig(**ADAMW, fused=True),
        rank_microbatch_size=MICRO_BATCH * job.shape.sequence,
        max_sequence_length=job.shape.sequence,
        dp_config=TransformerDataParallelConfig(name=DataParallelType.ddp) if job.ranks > 1 else None,
        max_grad_norm=1.0,
        device=torch.device("cpu"),
    )
    module._trainer = MagicMock()
    losses: list[float] = []
    module.record_ce_loss = lambda value, *_, **__: losses.append(float(value))

    def step(tokens_BS: Tensor) -> float:
        own = job.own(tokens_BS)
        module.zero_grads()
        module.train_batch({"input_ids": own[:, :-1].contiguous(), "labels": own[:, 1:].contiguous()})
        module.optim_step()
        return losses[-1]

    return step


def deepspeed(job: Job) -> Step:
    """DeepSpeed ZeRO-1 around the same model."""
    os.environ.update(DS_ACCELERATOR="cpu", LOCAL_SIZE=str(job.ranks))
    import deepspeed as engine

    engine.init_distributed("gloo")
    model = _llama(job)
    wrapped, *_ = engine.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), **ADAMW, fused=True),
        config={
            "train_micro_batch_size_per_gpu": MICRO_BATCH,
            "gradient_clipping": 1.0,
            "zero_optimization": {"stage": 1},
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": job.precision == "bf16"},
        },
    )

    def step(tokens_BS: Tensor) -> float:
        loss = wrapped(**_inputs(job, tokens_BS)).loss
        wrapped.backward(loss)
        wrapped.step()
        return float(loss)

    return step


ENGINES: dict[str, Callable[[Job], Step]] = {
    "megalite": megalite,
    "transformers": transformers,
    "fabric": fabric,
    "olmo_core": olmo_core,
    "deepspeed": deepspeed,
    "megatron": megatron.build,
    "torch": torch_parallel.build,
}
