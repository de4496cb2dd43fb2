"""One step of the same 18.9M-parameter Llama (configs/model/s19.yaml) by megalite and by each peer.

A builder takes a `Job` and returns step(tokens_BS) -> loss: forward, backward, clip at 1.0, AdamW.
tokens_BS is int64 [micro_batch, SEQUENCE + 1]. Imports stand inside the builders: most peers live elsewhere.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

VOCAB, SEQUENCE, MICRO_BATCH = 8192, 512, 4
LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": SEQUENCE,
    "tie_word_embeddings": False,
    "use_cache": False,
}
ADAMW: dict[str, Any] = {"lr": 3e-4, "betas": (0.9, 0.95), "weight_decay": 0.1}
Step = Callable[[Tensor], float]


@dataclass(frozen=True)
class Job:
    """`precision`: fp32 or bf16; `variant`: what stands behind the peer's name after a colon."""

    precision: str
    variant: str
    rank: int
    ranks: int
    threads: int
    folder: str

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bf16" else torch.float32


def megalite(job: Job) -> Step:
    """The real trainer, its data replaced by the tokens that all engines get."""
    from megalite import Trainer, load_config
    from megalite.data.batch import Batch

    trainer = Trainer(
        load_config(
            *("model=s19", "data=bytes", f"data.sequence_length={SEQUENCE}", f"precision={job.precision}"),
            *("train.steps=1000", f"train.micro_batch={MICRO_BATCH}", f"train.global_batch={MICRO_BATCH * job.ranks}"),
            *(f"train.threads={job.threads}", f"train.compile={str(job.variant == 'compile').lower()}"),
            *(f"run.dir={job.folder}", "checkpoint.final=false", "optim.schedule=constant", "optim.lr=3e-4"),
            world_size=job.ranks,
        ),
        callbacks=(),
    )

    class Given:
        n_samples = 1 << 30
        tokens: Tensor

        def batch(self, samples: Any) -> Batch:
            return Batch(self.tokens[:, :-1].contiguous(), self.tokens[:, 1:].contiguous(), None)

    given = Given()
    trainer.data.train = given

    def step(tokens_BS: Tensor) -> float:
        given.tokens = tokens_BS
        return trainer.train_step().loss

    return step


def _llama(job: Job) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**LLAMA)).train()


def _inputs(tokens_BS: Tensor) -> dict[str, Tensor]:
    """What transformers' models take: exactly SEQUENCE positions, every one with a target."""
    tokens, targets = tokens_BS[:, :-1].contiguous(), tokens_BS[:, 1:].contiguous()
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
            loss = run(**_inputs(tokens_BS)).loss
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
        loss = model(**_inputs(tokens_BS)).loss
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
    shape = {"d_model": 384, "vocab_size": VOCAB, "n_layers": 8, "n_heads": 6, "n_kv_heads": 2}
    half = job.precision == "bf16"
    model = TransformerConfig.llama_like(
        **shape, hidden_size_multiple_of=256, dtype=DType.bfloat16 if half else DType.float32
    ).build(init_device="cpu")
    module = TransformerTrainModule(
        model=model,
        optim=AdamWConfig(**ADAMW, fused=True),
        rank_microbatch_size=MICRO_BATCH * SEQUENCE,
        max_sequence_length=SEQUENCE,
        dp_config=TransformerDataParallelConfig(name=DataParallelType.ddp) if job.ranks > 1 else None,
        max_grad_norm=1.0,
        device=torch.device("cpu"),
    )
    module._trainer = MagicMock()
    losses: list[float] = []
    module.record_ce_loss = lambda value, *_, **__: losses.append(float(value))

    def step(tokens_BS: Tensor) -> float:
        module.zero_grads()
        module.train_batch({"input_ids": tokens_BS[:, :-1].contiguous(), "labels": tokens_BS[:, 1:].contiguous()})
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
        loss = wrapped(**_inputs(tokens_BS)).loss
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
}
