"""Sinks, latent attention and multi-token prediction on the layouts that spread them, against one process in float64;
attention against transformers' own modules.
"""

from typing import Any

import pytest
import torch
import transformers
from megalite_kernels.reference import visible
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek
from transformers.models.gpt_oss import modeling_gpt_oss as gpt_oss

from megalite.checkpoint.stored_model import empty_model
from megalite.config.schema import MLAConfig, ModelConfig, RopeConfig
from megalite.model.attention import Context
from megalite.model.cache import KVCache
from megalite.parallel.parameter import materialize
from tests.kernels.support import random
from tests.parity.layouts import Layout, Task, alone, trained, wrong
from tests.parity.test_transformers import Double

LAYOUTS = {
    "tp": Layout(tp=2),
    "tp with sp": Layout(tp=2, sp=True),
    "overlap": Layout(tp=2, sp=True, overlap=True),
    "ring": Layout(cp=2),
    "ulysses": Layout(cp=2, cp_kind="ulysses"),
    "hybrid": Layout(cp=4, cp_kind="hybrid"),
    "pp": Layout(pp=2),
    "zero bubble": Layout(pp=2, schedule="zb_h1"),
    "zero 1": Layout(dp=2, zero=1),
    "zero 2": Layout(dp=2, zero=2),
    "zero 3": Layout(dp=2, zero=3),
    "tp and pp": Layout(tp=2, pp=2),
}


def same_as_alone(layout: Layout, task: Task) -> None:
    """Ranks are threads, but processes where FSDP2 has them."""
    assert not wrong(trained(layout, task, threads=layout.zero < 3), alone(layout, task)), task


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", ["sinks", "mla", "mla, queries whole", "mtp"])
def test_same_as_one_process(model: str, layout: str) -> None:
    for task in (Task(model, steps=2), Task(model, "adamw", steps=2, packed=False, recompute="full")):
        same_as_alone(LAYOUTS[layout], task)


ENDS = [
    (Layout(pp=2, chunks=2, schedule="zbv"), Task("mtp", steps=2)),
    (Layout(pp=2, dp=2, zero=2), Task("mtp", "adamw", steps=2)),
    (Layout(pp=2, dp=2, zero=3, order="tp,pp,cp,dp"), Task("mtp", steps=2, micro=2)),
    (Layout(pp=2, cp=2, dp=2, schedule="zb_h1", zero=1), Task("mtp", "muon", steps=2)),
]


@pytest.mark.parametrize("case", ENDS, ids=lambda case: str(case[0]))
def test_the_last_stage_looks_tokens_up_too(case: tuple[Layout, Task]) -> None:
    same_as_alone(*case)


WHOLE = [
    Layout(dp=2, ep=2),
    Layout(tp=2, sp=True, ep=2),
    Layout(tp=2, dp=2, ep=2, etp=2),
    Layout(cp=2, dp=2, cp_kind="ulysses", ep=4),
    Layout(pp=2, dp=2, schedule="zb_h1", zero=1, ep=2),
    Layout(dp=4, zero=2, ep=2),
    Layout(dp=2, cp=2, zero=3, ep=2),
]


@pytest.mark.parametrize("layout", WHOLE, ids=str)
def test_latents_experts_and_further_tokens_together(layout: Layout) -> None:
    """DeepSeek-V3 as one model; the experts of its multi-token module are balanced too."""
    for task in (Task("deepseek-v3", steps=2), Task("deepseek-v3", "adamw", steps=2, packed=False, recompute="full")):
        same_as_alone(layout, task)


NO_TOKENS = torch.zeros(0)
BATCH, LENGTH = 2, 12


def compared(
    config: ModelConfig, layer: int, theirs: Any, rotary: Any, weights: dict[str, str], cached: bool = False
) -> None:
    """The attention of a layer and a module of transformers given our `weights`, {ours: theirs}: output and every
    gradient, relative to the largest value. `cached`: ours as when it generates."""
    model = empty_model(config, 8, LENGTH)
    materialize(model, torch.device("cpu"), 0, torch.float64)
    ours = model.blocks[str(layer)].attention
    mine = {name: parameter.requires_grad_() for name, parameter in ours.named_parameters()}
    copied = dict(theirs.named_parameters())
    assert mine.keys() == weights.keys() and copied.keys() == set(weights.values())
    with torch.no_grad():
        for name, parameter in mine.items():
            parameter.add_(torch.linspace(-0.1, 0.2, parameter.numel(), dtype=torch.float64).view_as(parameter))
            copied[weights[name]].copy_(parameter)
    x, grad = random(BATCH, LENGTH, config.hidden).requires_grad_(), random(BATCH, LENGTH, config.hidden, seed=1)
    assert model.rope is not None
    rotation = model.rope.at(0, BATCH, LENGTH, None, x.dtype, x.device)
    cache = KVCache(config, BATCH, LENGTH, dtype=torch.float64) if cached else None
    out = ours(x, Context(BATCH, NO_TOKENS, rotation, rotation, None, cache))
    found = torch.autograd.grad(out, [x, *mine.values()], grad)
    seen = visible(LENGTH, LENGTH, causal=True, window=ours.window)
    mask = torch.zeros(LENGTH, LENGTH, dtype=torch.float64).masked_fill(~seen, -1e300)[None, None]
    with Double():
        wanted_out = theirs(x, rotary(x, torch.arange(LENGTH)[None].expand(BATCH, -1)), mask)[0]
    wanted = torch.autograd.grad(wanted_out, [x, *(copied[weights[name]] for name in mine)], grad)
    for name, ours_, theirs_ in zip(["out", "x", *mine], [out, *found], [wanted_out, *wanted], strict=True):
        assert (ours_ - theirs_).abs().max() <= 1e-10 * theirs_.abs().max(), name


@pytest.mark.parametrize("layer", [0, 1])
def test_sinks_as_in_gpt_oss(layer: int) -> None:
    """Its even layers see a window, the odd ones everything; YaRN without whole numbers for its limits."""
    yarn = {"rope_type": "yarn", "rope_theta": 150.0, "factor": 4.0, "beta_fast": 4.0, "beta_slow": 1.0}
    yarn |= {"truncate": False, "original_max_position_embeddings": 16}
    theirs = transformers.GptOssConfig(
        hidden_size=24, num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_hidden_layers=2, sliding_window=5,
        attention_bias=True, rope_parameters=yarn,
        attn_implementation="eager",
    )  # fmt: skip
    scaling = {name: value for name, value in yarn.items() if name != "rope_theta"}
    rope = RopeConfig(150.0, scaling=scaling)
    ours = ModelConfig(
        layers=2, hidden=24, heads=4, kv_heads=2, head_dim=8, ffn=8, qkv_bias=True, output_bias=True, window=5,
        window_pattern=2, attention_sinks=True, rope=rope, init_std=0.2,
    )  # fmt: skip
    weights = {"sinks": "sinks"} | {
        f"{mine}.{kind}": f"{mine[0]}_proj.{kind}"
        for mine in ("query", "key", "value", "output")
        for kind in ("weight", "bias")
    }
    with Double():
        module, rotary = gpt_oss.GptOssAttention(theirs, layer).double(), gpt_oss.GptOssRotaryEmbedding(theirs)
    compared(ours, layer, module, rotary, weights)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("q_rank", [None, 20])
def test_latents_as_in_deepseek(q_rank: int | None, cached: bool) -> None:
    theirs = transformers.DeepseekV3Config(
        hidden_size=24, num_attention_heads=4, num_key_value_heads=4, q_lora_rank=q_rank, kv_lora_rank=12,
        qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5, rope_interleave=False, attn_implementation="eager",
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
    )  # fmt: skip
    ours = ModelConfig(
        layers=1, hidden=24, heads=4, head_dim=6, ffn=8, norm_eps=1e-6, rope=RopeConfig(100.0), init_std=0.2,
        mla=MLAConfig(kv_rank=12, q_rank=q_rank, rope_dim=4, value_dim=5),
    )  # fmt: skip
    queries = {"query_down": "q_a_proj", "query_latent_norm": "q_a_layernorm", "query_up": "q_b_proj"}
    names = queries if q_rank else {"query": "q_proj"}
    names |= {"key_value_down": "kv_a_proj_with_mqa", "key_value_norm": "kv_a_layernorm", "key_value_up": "kv_b_proj"}
    weights = {f"{mine}.weight": f"{his}.weight" for mine, his in (names | {"output": "o_proj"}).items()}
    with Double():
        module, rotary = deepseek.DeepseekV3Attention(theirs, 0).double(), deepseek.DeepseekV3RotaryEmbedding(theirs)
    compared(ours, 0, module, rotary, weights, cached)
