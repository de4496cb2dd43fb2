"""Predicted memory against what autograd keeps, and against what a training process is seen to need."""

import gc
import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megalite.config.load import load_config
from megalite.model.parallelize import apply_recompute, defer_weights
from megalite.model.transformer import Transformer
from megalite.parallel import buckets
from megalite.parallel.parameter import materialize
from megalite.precision import PRESETS, Precision
from megalite.train import build
from megalite.train.memory import begin_measuring, kept_per_token, measured_memory, predict
from megalite.train.peak import measured_matmul_peak
from megalite.train.trainer import Trainer
from tests.ranks import run_ranks
from tests.tiny_job import tiny_job

SMALL = ("model.layers=3", "model.hidden=64", "model.heads=4", "model.ffn=96", "data.sequence_length=48")
VOCAB = 211


class Made(TorchDispatchMode):
    """Every storage made inside, and how many bytes of them are still alive; `given` are views of something else."""

    def __init__(self, given: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.given = {tensor.untyped_storage().data_ptr() for tensor in given}
        self.storages: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.given:
                    self.storages[StorageWeakRef(storage)] = storage.nbytes()
        return result

    def alive_bytes(self) -> int:
        return sum(nbytes for storage, nbytes in self.storages.items() if not storage.expired())


def kept_bytes(*overrides: str, precision: Precision) -> tuple[float, float]:
    """(kept for backward by autograd beyond parameters and the loss's own gradients, predicted)."""
    config = load_config(*SMALL, *overrides)
    with torch.device("meta"):
        model = Transformer(config.model, VOCAB, config.data.sequence_length)
    materialize(model, torch.device("cpu"), seed=0, dtype=precision.compute)
    apply_recompute(model, config.recompute)  # type: ignore[arg-type]
    shape = (config.train.micro_batch, config.data.sequence_length)
    tokens = torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), Made([*model.parameters(), tokens]) as own:  # made once: tables of positions
        model.loss(tokens, tokens, ahead=True)
    with Made([*model.parameters(), tokens]) as made:
        losses = model.loss(tokens, tokens, ahead=True)
    gc.collect()
    kept = made.alive_bytes() - own.alive_bytes() + 2 * tokens.nbytes  # as tokens and as targets
    assert losses.nll_sum.requires_grad
    loss_gradients = (1 + config.model.mtp) * (tokens.numel() + VOCAB) * config.model.hidden * 4
    return kept - loss_gradients, predict(config, VOCAB, precision).activations


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("model.kv_heads=2",),
        ("model.qk_norm=true", "model.norm_place=sandwich"),
        ("model.norm_place=post", "model.tied_embeddings=true"),
        ("model.norm=layernorm", "model.activation=gelu", "model.position=learned"),
        ("model.attention_sinks=true",),
        ("model.mtp=2",),
        ("model.moe.experts=8",),
        ("model.moe.experts=8", "model.moe.top_k=3", "model.moe.ffn=24", "model.moe.shared_ffn=40", "recompute=none"),
        ("model.moe.experts=64", "model.moe.dense_layers=1", "model.moe.aux_loss=0.1", "model.moe.z_loss=0.1"),
        ("model.moe.experts=8", "recompute=full"),
        ("model.mtp=1", "model.tied_embeddings=true", "recompute=none"),
        ("model.mla.kv_rank=24", "model.mla.rope_dim=8", "model.mla.q_rank=40", "model.mla.value_dim=12"),
        ("model.mla.kv_rank=24", "model.mla.rope_dim=8"),
        ("model.mla.kv_rank=24", "model.mla.rope_dim=8", "recompute=full"),
        ("model.attention_sinks=true", "recompute=selective"),
        ("recompute=none",),
        ("recompute=selective",),
        ("recompute=full",),
    ],
)
def test_activations_are_those_autograd_keeps(overrides: tuple[str, ...], precision: str) -> None:
    kept, predicted = kept_bytes(*overrides, precision=PRESETS[precision])
    assert predicted == pytest.approx(kept, rel=0.06, abs=32e3)


@pytest.mark.parametrize(
    ("overrides", "least"), [((), 0.9), (("model.qk_norm=true",), 0.8), (("model.moe.experts=8",), 0.2)]
)
def test_what_waits_for_its_weight_gradient_is_counted(overrides: tuple[str, ...], least: float) -> None:
    """A zero-bubble schedule keeps inputs and output gradients of linears from I to W. The prediction counts a layer's
    whole activations until W instead: that must cover the stash, and not by far but where experts, whose weight
    gradients do not wait, have most of them."""
    config = load_config(*SMALL, *overrides)
    with torch.device("meta"):
        model = Transformer(config.model, VOCAB, config.data.sequence_length)
    materialize(model, torch.device("cpu"), seed=0, dtype=torch.float32)
    deferred = defer_weights(model)
    deferred.waiting = 0
    shape = (config.train.micro_batch, config.data.sequence_length)
    tokens = torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(0))
    model.loss(tokens, tokens).nll_sum.backward()
    counted = tokens.numel() * config.model.layers * kept_per_token(config.model, 4, "none")
    kept = [tensor.untyped_storage() for _, x, grad_y, _ in deferred.kept[0] for tensor in (x, grad_y)]
    held = sum({storage.data_ptr(): storage.nbytes() for storage in kept}.values())
    assert least * counted < held < 1.02 * counted


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gradients_take_memory_from_their_arrival_on(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a step of one microbatch never holds all activations and all gradients, and is not predicted to."""
    monkeypatch.setattr(buckets, "UNSENT", 1)
    words = tiny_job(
        f"run.dir={tmp_path / 'run'}", f"precision={precision}", "train.micro_batch=4", "train.global_batch=4"
    )
    trainer = Trainer(load_config(*words), callbacks=())
    gradients = trainer.gradients
    seen: list[int] = []

    def held() -> int:
        return sum(buffer.whole.untyped_storage().nbytes() for buffer in gradients._buffers if buffer.whole is not None)

    def look(_module: object, _inputs: object, output: torch.Tensor) -> None:
        seen.append(held())
        output.register_hook(lambda _: seen.append(held()))

    for layer in trainer.stages[0].blocks.values():
        layer.register_forward_hook(look)
    for _ in range(2):
        trainer.train_step()
        forward, back = seen[: len(seen) // 2], seen[len(seen) // 2 :]
        seen.clear()
        assert forward == [0] * len(forward)
        assert back[0] > 0 and back == sorted(back) and back[-1] < held() == gradients.kept_bytes()
    alone, several = (
        predict(load_config(*tiny_job(*words, f"train.global_batch={n}")), VOCAB, PRESETS[precision]) for n in (4, 8)
    )
    passing = alone.activations + alone.transient
    assert several.total - alone.total == min(alone.gradients, passing - alone.end) > 0


def test_state_is_counted_by_dtype_and_optimizer() -> None:
    config = load_config(*SMALL)
    full, mixed, pure = (predict(config, VOCAB, PRESETS[name]) for name in ("fp32", "bf16", "bf16_pure"))
    parameters = full.weights / 4
    assert (full.gradients, full.optimizer) == (4 * parameters, 8 * parameters)
    assert (mixed.weights, mixed.gradients, mixed.optimizer) == (2 * parameters, 4 * parameters, 12 * parameters)
    assert (pure.weights, pure.gradients, pure.optimizer) == (2 * parameters, 4 * parameters, 4 * parameters)
    config.optim.name = "sgd"
    assert predict(config, VOCAB, PRESETS["fp32"]).optimizer == 4 * parameters
    config.optim.name = "muon"
    assert 4 * parameters < predict(config, VOCAB, PRESETS["fp32"]).optimizer < 8 * parameters


def held(*overrides: str) -> dict[str, float]:
    """Bytes of weights and of optimizer state that this rank really has, beside what was predicted."""
    trainer = Trainer(load_config(*tiny_job(*overrides)), callbacks=[])
    share = build.rank_share(trainer.config, trainer.mesh, trainer.stages, trainer.pipeline.schedule)
    predicted = predict(trainer.config, trainer.vocab, PRESETS["fp32"], share=share)
    weights = {p for stage in trainer.stages for p in stage.parameters()}
    state = sum(held.bytes for name, held in trainer.optimizer.state_tensors().items() if name.startswith("optim."))
    return {
        "weights": sum(p.numel() * 4 for p in weights),
        "predicted weights": predicted.weights,
        "optimizer": state,
        "predicted optimizer": predicted.optimizer,
        "predicted activations": predicted.activations,
    }


EXPERTS = ("model.moe.experts=4", "parallel.zero=1", "parallel.ep=2")


@pytest.mark.parametrize("layout", [("parallel.tp=2", "parallel.zero=1"), ("parallel.pp=2",), EXPERTS])
def test_a_rank_holds_its_share(tmp_path: Path, layout: tuple[str, ...]) -> None:
    words = (f"run.dir={tmp_path / 'run'}", f"data.cache={tmp_path}", "train.micro_batch=1", "precision=fp32")
    alone = run_ranks(1, held, *words, *(word for word in layout if word.startswith("model.")))[0]
    for rank in run_ranks(4, held, *words, f"run.dir={tmp_path / 'four'}", *layout):
        assert rank["predicted weights"] == pytest.approx(rank["weights"], rel=1e-9)
        assert rank["predicted optimizer"] == pytest.approx(rank["optimizer"], rel=0.05), "pads and step counters"
        assert rank["weights"] < 0.8 * alone["weights"]
        if "parallel.zero=1" in layout:
            assert rank["optimizer"] < 0.3 * alone["optimizer"]
            assert layout == EXPERTS or rank["predicted activations"] < alone["predicted activations"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_real_run_needs_what_was_predicted(tmp_path: Path, precision: str) -> None:
    words = [
        "data.tokenizer=bytes", "data.max_bytes=200000", f"data.cache={tmp_path}", f"run.dir={tmp_path / 'run'}",
        "model.layers=4", "model.hidden=256", "model.heads=4", "model.ffn=704", "data.sequence_length=256",
        "train.micro_batch=8", "train.global_batch=8", "train.steps=2", "train.final_eval=false",
        "checkpoint.every=null", "log.progress=none", "log.report=false", "train.threads=1", f"precision={precision}",
    ]  # fmt: skip
    command = [sys.executable, "-m", "megalite", "train", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    facts = json.loads((tmp_path / "run" / "environment.json").read_text())["facts"]
    measured = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["memory_gb"]
    assert facts["predicted_memory_gb"] == pytest.approx(measured, rel=0.15)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells and forgets a process's peak")
def test_the_peak_is_of_training_alone() -> None:
    device, texts = (
        torch.device("cpu"),
        [str(n) * 100 for n in range(300_000)],
    )  # of 600 bytes: freed, but not handed back
    high = measured_memory(device)
    del texts
    assert measured_memory(device) > high - 1e6
    begin_measuring(device)
    assert measured_memory(device) < high - 100e6


def test_peak_is_quick_and_plausible() -> None:
    threads = torch.get_num_threads()
    peak = measured_matmul_peak(torch.device("cpu"), torch.float32, threads=1)
    assert 1e8 < peak < 1e13
    assert torch.get_num_threads() == threads


def test_peak_of_bf16_is_not_below_the_fp32_that_emulates_it(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {torch.bfloat16: 1e9, torch.float32: 6e10}
    monkeypatch.setattr("megalite.train.peak.matmul_rate", lambda device, dtype, threads: rates[dtype])
    assert measured_matmul_peak(torch.device("cpu"), torch.bfloat16) == 6e10
    assert measured_matmul_peak(torch.device("cuda"), torch.bfloat16) == 1e9
