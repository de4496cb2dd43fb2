"""The transformer's own promises: initial values, documents, KV cache, windows, recompute, losses, dtypes."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from megalite.checkpoint.stored_model import empty_model
from megalite.config.schema import MLAConfig, ModelConfig, MoEConfig, RecomputeConfig, RopeConfig
from megalite.model.cache import KVCache
from megalite.model.parallelize import apply_compile, apply_recompute
from megalite.model.transformer import Transformer, document_positions
from megalite.parallel.parameter import declaration, declared_parameters, materialize

VOCAB, LENGTH = 61, 24
SMALL = ModelConfig(layers=2, hidden=32, heads=4, kv_heads=2, ffn=48)
GPT2 = dataclasses.replace(
    SMALL,
    kv_heads=None,
    position="learned",
    norm="layernorm",
    qkv_bias=True,
    output_bias=True,
    mlp_bias=True,
    activation="gelu_tanh",
    tied_embeddings=True,
)
GEMMA = dataclasses.replace(
    SMALL,
    layers=3,
    norm_place="sandwich",
    norm_zero_centered=True,
    activation="geglu",
    qk_norm=True,
    window=5,
    window_pattern=3,
    rope=RopeConfig(theta=1000.0, local_theta=100.0, scaling={"rope_type": "linear", "factor": 2.0}),
    embedding_scale=3.0,
    attention_softcap=2.0,
    logit_softcap=4.0,
)
OTHER = dataclasses.replace(SMALL, norm_place="post", activation="relu2", rope=RopeConfig(fraction=0.5))
SINKS = dataclasses.replace(SMALL, window=5, window_pattern=2, attention_sinks=True)
MLA = dataclasses.replace(
    SMALL, kv_heads=None, head_dim=6, mla=MLAConfig(kv_rank=12, q_rank=20, rope_dim=4, value_dim=9)
)
EXPERTS = dataclasses.replace(SMALL, moe=MoEConfig(experts=4, ffn=16, shared_ffn=8, aux_loss=0.1, bias_rate=0.1))
CONFIGS = {"llama": SMALL, "gpt2": GPT2, "gemma": GEMMA, "other": OTHER, "sinks": SINKS, "mla": MLA}


def build(config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float64) -> Transformer:
    model = empty_model(config, VOCAB, 32)
    materialize(model, torch.device("cpu"), seed, dtype)
    return model


def tokens(rows: int = 2) -> Tensor:
    return torch.randint(0, VOCAB, (rows, LENGTH), generator=torch.Generator().manual_seed(1))


def gradients(model: Transformer) -> dict[str, Tensor]:
    model.zero_grad()
    losses = model.loss(tokens()[:, :-1], tokens()[:, 1:], z_loss=1e-3)
    (losses.nll_sum + 1e-3 * losses.z_sum).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> ModelConfig:
    return CONFIGS[request.param]


def test_initial_values_depend_on_seed_and_name_alone() -> None:
    """A model with other layers, other sublayers and other parameters between gives a parameter the same values."""
    one = dict(build(SMALL).named_parameters())
    other = dict(
        build(
            dataclasses.replace(SMALL, layers=2, qkv_bias=True, qk_norm=True, tied_embeddings=True)
        ).named_parameters()
    )
    shared = one.keys() & other.keys()
    assert "blocks.1.mlp.down.weight" in shared and len(shared) > 10
    for name in shared:
        assert torch.equal(one[name], other[name]), name
    reseeded = dict(build(SMALL, seed=1).named_parameters())
    assert not torch.equal(one["embedding.weight"], reseeded["embedding.weight"])
    assert not torch.equal(one["blocks.0.mlp.up.weight"], one["blocks.1.mlp.up.weight"])


def test_initial_spread() -> None:
    model = build(dataclasses.replace(SMALL, layers=8, hidden=256, ffn=512), dtype=torch.float32)
    block = model.blocks["3"]
    assert block.attention.query.weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert block.attention.output.weight.std().item() == pytest.approx(0.02 / 4, rel=0.03)
    assert block.mlp.down.weight.std().item() == pytest.approx(0.02 / 4, rel=0.03)
    assert (block.mlp_norm.weight == 1).all() and (build(GEMMA).final_norm.weight == 0).all()


def test_declarations_match_their_parameters(config: ModelConfig) -> None:
    for name, parameter, declared in declared_parameters(build(config)):
        assert tuple(parameter.shape) == declared.shape, name
        assert declared.shard.get("tp", 0) < len(declared.shape)
    tied = [name for name, _ in build(GPT2).named_parameters() if "head" in name]
    assert tied == []
    assert declaration(build(SMALL).blocks["0"].attention.output.weight).shard == {"tp": 1}


def test_documents_are_separate_sequences(config: ModelConfig) -> None:
    model = build(config)
    documents = torch.zeros(2, LENGTH, dtype=torch.int32)
    documents[0, 7:], documents[1, 11:], documents[1, 12:] = 1, 1, 2
    with torch.no_grad():
        packed = model(tokens(), documents)
        for row, start, end in [(0, 0, 7), (0, 7, LENGTH), (1, 0, 11), (1, 11, 12), (1, 12, LENGTH)]:
            alone = model(tokens()[row : row + 1, start:end])
            torch.testing.assert_close(packed[row, start:end], alone[0], rtol=0, atol=1e-12)


def test_document_positions() -> None:
    documents = torch.tensor([[5, 5, 6, 6, 6, 5], [0, 1, 2, 2, 3, 3]])
    assert document_positions(documents).tolist() == [[0, 1, 0, 1, 2, 0], [0, 0, 0, 1, 0, 1]]


@pytest.mark.parametrize("pieces", [[24], [10, 1, 1, 12], [1] * 24])
def test_cache_changes_nothing(config: ModelConfig, pieces: list[int]) -> None:
    model = build(config)
    cache = KVCache(config, 2, LENGTH, dtype=torch.float64)
    with torch.no_grad():
        parts = [model(part, cache=cache) for part in tokens().split(pieces, dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens()), rtol=0, atol=1e-12)
        with pytest.raises(ValueError, match="do not fit its capacity of 24"):
            model(tokens()[:, :1], cache=cache)


def test_a_window_hides_what_lies_before() -> None:
    model = build(dataclasses.replace(SMALL, window=3))
    changed = tokens().clone()
    changed[:, 4] = (changed[:, 4] + 1) % VOCAB
    with torch.no_grad():
        same = (model(tokens()) == model(changed)).all(-1)
    # Two layers of window 3 carry a token two places forward each.
    assert same[:, :4].all() and not same[:, 4:9].any() and same[:, 9:].all()


def test_the_future_is_hidden(config: ModelConfig) -> None:
    model = build(config)
    changed = tokens().clone()
    changed[:, 12] = (changed[:, 12] + 1) % VOCAB
    with torch.no_grad():
        assert torch.equal(model(tokens())[:, :12], model(changed)[:, :12])


@pytest.mark.parametrize("mode", ["activation", "selective", "full"])
def test_recompute_gives_the_same_bits(config: ModelConfig, mode: str) -> None:
    model = build(config, dtype=torch.float32)
    kept = gradients(model)
    apply_recompute(model, RecomputeConfig(mode))
    again = gradients(model)
    assert kept.keys() == again.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(kept[name], again[name]) for name in kept)


@pytest.mark.parametrize("mode", ["activation", "selective", "full"])
def test_recompute_keeps_less(mode: str) -> None:
    def saved(mode: str) -> int:
        model = build(dataclasses.replace(SMALL, layers=4), dtype=torch.float32)
        apply_recompute(model, RecomputeConfig(mode))
        storages: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(tokens(8))
        return sum(storages.values())

    assert saved(mode) < 0.9 * saved("none")


def test_losses_are_sums_over_valid_targets(config: ModelConfig) -> None:
    model = build(config)
    targets = tokens().roll(-1, dims=1).clone()
    targets[0, :5] = -100
    losses = model.loss(tokens(), targets, z_loss=1.0)
    logits = model.logits(model(tokens()))
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    torch.testing.assert_close(losses.nll_sum, wanted, rtol=1e-12, atol=0)
    z = (logits.logsumexp(-1).square() * (targets != -100)).sum()
    torch.testing.assert_close(losses.z_sum, z, rtol=1e-12, atol=0)


def test_rows_do_not_touch_each_other(config: ModelConfig) -> None:
    model = build(config)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens())[1:], model(tokens()[1:]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_follow_the_parameters(config: ModelConfig, dtype: torch.dtype) -> None:
    model, exact = build(config, dtype=dtype), build(config)
    assert model(tokens()).dtype == dtype
    losses = model.loss(tokens(), tokens())
    assert losses.nll_sum.dtype == torch.float32
    wanted = exact.loss(tokens(), tokens()).nll_sum.item()
    assert losses.nll_sum.item() == pytest.approx(wanted, rel=1e-5 if dtype == torch.float32 else 2e-2)


def test_evaluation_before_training_leaves_training_possible() -> None:
    """Rotary tables made in inference mode must still serve a later backward."""
    model = build(SMALL)
    with torch.inference_mode():
        model(tokens())
    assert gradients(model)


def test_learned_positions_end() -> None:
    model = build(GPT2)
    with pytest.raises(ValueError, match=r"33 positions: this model has learned 32"):
        model(torch.zeros(1, 33, dtype=torch.int64))


@pytest.mark.slow
@pytest.mark.parametrize("config", [SMALL, EXPERTS])
def test_compile_computes_the_same(config: ModelConfig) -> None:
    model = build(config)
    kept = gradients(model)
    apply_compile(model)
    compiled: dict[str, Any] = gradients(model)
    for name in kept:
        torch.testing.assert_close(compiled[name], kept[name], rtol=1e-9, atol=1e-10)


def test_stages_of_a_model_share_modules_but_no_hooks() -> None:
    with torch.device("meta"):
        model = Transformer(SMALL, VOCAB, LENGTH)
    first, last = model.stage([0], True, False), model.stage([1], False, True)
    first.register_forward_pre_hook(lambda *_: None)
    assert first._forward_pre_hooks and not last._forward_pre_hooks and not model._forward_pre_hooks
    assert first.blocks["0"] is model.blocks["0"]
