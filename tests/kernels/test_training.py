"""A two-layer model trained on the Triton kernels, interpreted, and on the reference: the same losses."""

from pathlib import Path

import pytest

from megalite.config.load import load_config
from megalite.train.trainer import Trainer
from tests.tiny_job import tiny_job

pytest.importorskip("triton", reason="Triton is for Linux")
MODELS = {
    "llama": ("train.steps=20", "model.qk_norm=true", "model.kv_heads=1"),
    "gpt2": (
        "train.steps=4",
        "model.position=learned", "model.norm=layernorm", "model.activation=gelu_tanh", "model.qkv_bias=true",
        "model.mlp_bias=true",
    ),
}  # fmt: skip


@pytest.mark.parametrize("model", MODELS)
def test_same_losses_as_the_reference(tmp_path: Path, model: str) -> None:
    losses = {}
    for kernels in ("reference", "triton"):
        words = tiny_job(
            f"run.dir={tmp_path / kernels}", f"train.kernels={kernels}",
            "model.layers=2", "model.hidden=16", "model.ffn=32",
            "data.sequence_length=16", "train.micro_batch=2", "train.global_batch=2", "optim.lr=0.02",
            "precision=fp32", "checkpoint.every=null", "train.dry_run=false", *MODELS[model],
        )  # fmt: skip
        losses[kernels] = [row.loss for row in Trainer(load_config(*words))]
    assert losses["triton"][-1] < losses["triton"][0] - 0.05, "it learns"
    assert losses["triton"] == pytest.approx(losses["reference"], rel=2e-5)
