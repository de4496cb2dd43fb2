"""Parameter counts of the presets against the published numbers, and the FLOPs formula against a counter."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from megalite_kernels.reference import attention as reference_attention
from megalite_kernels.reference import visible
from torch.utils.flop_counter import FlopCounterMode

from megalite.checkpoint.stored_model import empty_model, parameter_shapes
from megalite.config.build import build
from megalite.config.schema import MLAConfig, ModelConfig
from megalite.errors import UserError
from megalite.model.size import (
    flops_per_token,
    head_dim,
    kv_heads,
    layer_windows,
    parameter_counts,
    query_dim,
    rotary_dim,
    value_dim,
)

CONFIGS = Path(__file__).parents[2] / "configs" / "model"
PUBLISHED = {  # of the folders on the Hugging Face hub
    "gpt2": 124_439_808,
    "gpt2_medium": 354_823_168,
    "gpt2_large": 774_030_080,
    "gpt2_xl": 1_557_611_200,
    "llama2_7b": 6_738_415_616,
    "llama2_13b": 13_015_864_320,
    "llama2_70b": 68_976_648_192,
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "llama3_405b": 405_853_388_800,
    "llama3_2_1b": 1_235_814_400,
    "llama3_2_3b": 3_212_749_824,
    "mistral_7b": 7_241_732_096,
    "qwen2_5_0_5b": 494_032_768,
    "qwen2_5_1_5b": 1_543_714_304,
    "qwen2_5_3b": 3_085_938_688,
    "qwen2_5_7b": 7_615_616_512,
    "qwen2_5_14b": 14_770_033_664,
    "qwen2_5_32b": 32_763_876_352,
    "qwen2_5_72b": 72_706_203_648,
    "qwen3_0_6b": 596_049_920,
    "qwen3_1_7b": 1_720_574_976,
    "qwen3_4b": 4_022_468_096,
    "qwen3_8b": 8_190_735_360,
    "qwen3_14b": 14_768_307_200,
    "qwen3_32b": 32_762_123_264,
    "gemma_2b": 2_506_172_416,
    "gemma_7b": 8_537_680_896,
    "gemma2_2b": 2_614_341_888,
    "gemma2_9b": 9_241_705_984,
    "gemma2_27b": 27_227_128_320,
    "gemma3_1b": 999_885_952,
    "s19": 18_880_896,
    "mixtral_8x7b": 46_702_792_704,
    "mixtral_8x22b": 140_620_634_112,
    "qwen3_30b_a3b": 30_532_122_624,
    "qwen3_235b_a22b": 235_093_634_560,
    "gpt_oss_20b": 20_914_757_184,
    "gpt_oss_120b": 116_829_156_672,
    "deepseek_v3": 684_489_845_504 - 2 * 129_280 * 7168,  # whose folder has embedding and head twice
}
ACTIVE = {  # billions that a token meets, as the models' reports round them
    "mixtral_8x7b": 13,
    "mixtral_8x22b": 39,
    "qwen3_30b_a3b": 3.3,
    "qwen3_235b_a22b": 22,
    "gpt_oss_20b": 3.61,
    "gpt_oss_120b": 5.13,
    "deepseek_v3": 37,
}


def preset(name: str) -> ModelConfig:
    return build(ModelConfig, yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()))


def test_every_preset_has_its_published_count() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {*PUBLISHED, "tiny"}
    for name, count in PUBLISHED.items():
        config = preset(name)
        assert config.name == name
        assert parameter_counts(config, config.vocab or 0).total == count, name


@pytest.mark.parametrize("name", ACTIVE)
def test_a_token_meets_as_many_parameters_as_published(name: str) -> None:
    config = preset(name)
    counts = parameter_counts(config, config.vocab or 0)
    if config.mtp:  # the reports speak of the model without
        counts = parameter_counts(dataclasses.replace(config, mtp=0), config.vocab or 0)
    met = counts.total - counts.experts + counts.active_experts
    if name.startswith("gpt_oss"):  # its report leaves the embedding out
        met -= counts.embedding
    assert met / 1e9 == pytest.approx(ACTIVE[name], rel=0.02)


@pytest.mark.parametrize(
    "name", ["gpt2", "llama3_405b", "qwen2_5_7b", "qwen3_0_6b", "gemma2_9b", "gemma3_1b", "tiny", *ACTIVE]
)
def test_the_model_has_as_many_parameters_as_counted(name: str) -> None:
    config = preset(name)
    vocab, positions = config.vocab or 1000, config.max_positions or 512
    model = empty_model(config, vocab, positions)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameter_counts(config, vocab).total


def test_counts_by_role() -> None:
    config = ModelConfig(layers=2, hidden=8, heads=2, ffn=12, norm="layernorm", position="learned", mlp_bias=True)
    counts = parameter_counts(config, vocab=10, max_positions=6)
    shapes = parameter_shapes(config, 10, 6)

    def held(*endings: str) -> int:
        return sum(torch.Size(shape).numel() for name, shape in shapes.items() if name.endswith(endings))

    assert (counts.embedding, counts.positions, counts.head) == (80, 48, 80)
    assert counts.norms == held("norm.weight", "norm.bias") == 5 * 16
    assert counts.biases == held("up.bias", "down.bias", "gate.bias") == 2 * (12 + 12 + 8)
    assert counts.matrices == 2 * (4 * 64 + 3 * 96)


LATENT = MLAConfig(kv_rank=12, q_rank=20, rope_dim=4, value_dim=6)
FORMS = {
    "sinks": {"attention_sinks": True, "qkv_bias": True},
    "multi-token": {"mtp": 2, "qkv_bias": True, "norm": "layernorm", "norm_place": "sandwich"},
    "latent": {"kv_heads": None, "mla": LATENT, "output_bias": True},
    "latent, queries whole": {"kv_heads": None, "head_dim": 10, "mla": MLAConfig(kv_rank=12), "attention_sinks": True},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_has_as_many_parameters_as_counted(form: str) -> None:
    config = ModelConfig(**{"layers": 3, "hidden": 32, "heads": 4, "kv_heads": 2, "ffn": 48} | FORMS[form])
    held = sum(torch.Size(shape).numel() for shape in parameter_shapes(config, 10, 6).values())
    assert held == parameter_counts(config, vocab=10, max_positions=6).total


@pytest.mark.parametrize(
    ("window", "pattern", "mla"), [(None, 1, {}), (8, 1, {}), (8, 2, {}), (8, 2, FORMS["latent"]), (8, 1, {"mtp": 2})]
)
def test_flops_formula_against_a_counter(window: int | None, pattern: int, mla: dict[str, Any]) -> None:
    """torch's counter sees every weight matmul and, in the reference attention, every pair of positions; of those
    only the visible ones count, a query's pair with itself by half."""
    shape: dict[str, Any] = {"layers": 2, "hidden": 32, "heads": 4, "kv_heads": 2, "ffn": 48} | mla
    config = ModelConfig(**shape, window=window, window_pattern=pattern)
    s, vocab = 32, 64
    matrices = [shape for name, shape in parameter_shapes(config, vocab, s).items() if len(shape) == 2]
    counted = 0.0
    for rows, columns in matrices[1:]:  # all but the embedding, which is looked up
        weight = torch.randn(rows, columns, requires_grad=True)
        counted += flops(lambda x, weight=weight: x @ weight.T, torch.randn(s, columns))
    counted += config.mtp * flops(lambda x: x @ torch.randn(32, vocab, requires_grad=True), torch.randn(s, 32))
    for layer_window in layer_windows(config) + [window] * config.mtp:
        keys, dim = kv_heads(config), query_dim(config)
        q, k, v = (torch.randn(1, s, *of) for of in ((4, dim), (keys, dim), (keys, value_dim(config))))
        pairs = visible(s, s, causal=True, window=layer_window).sum().item() - min(layer_window or s, s) / 2
        every_pair = flops(
            lambda q, k=k, v=v: reference_attention(q, k.requires_grad_(), v.requires_grad_(), scale=1.0), q
        )
        counted += every_pair * pairs / s**2
    assert flops_per_token(config, vocab, s) == counted / s


def flops(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> int:
    """Floating point operations of the matmuls in function(x) and in its backward."""
    with FlopCounterMode(display=False) as counter:
        function(x.requires_grad_()).sum().backward()
    return int(counter.get_total_flops())


def test_flops_of_the_benchmark_model() -> None:
    assert flops_per_token(preset("s19"), 8192, 512) == pytest.approx(103.8e6, rel=1e-3)


def test_windows_follow_the_pattern() -> None:
    assert layer_windows(preset("gemma2_2b"))[:4] == [4096, None, 4096, None]
    assert [i for i, window in enumerate(layer_windows(preset("gemma3_1b"))) if window is None] == [5, 11, 17, 23]
    assert layer_windows(preset("mistral_7b")) == [4096] * 32


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"kv_heads": 4, "heads": 6}, "model.kv_heads=4: does not divide model.heads=6"),
        ({"heads": 7}, "model.heads=7: does not divide model.hidden=384"),
        ({"head_dim": 63}, "model.rope.fraction=1.0: rotates 63 of 63 head dimensions"),
    ],
)
def test_impossible_heads_are_explained(changes: dict[str, int], line: str) -> None:
    config = ModelConfig(**changes)
    with pytest.raises(UserError, match=line):
        kv_heads(config), head_dim(config), rotary_dim(config)
