"""ModelConfig to config.json of a Hugging Face folder. Knows nothing of tensors or of torch."""

import dataclasses
import math
from typing import Any

from megalite.checkpoint.huggingface.experts import (
    normal_experts,
    normal_latents,
    write_experts,
    write_latents,
)
from megalite.checkpoint.huggingface.families import (
    FAMILIES,
    GATED_ACTIVATIONS,
    LATENT_NORM_EPS,
    ONE_KIND_OF_LAYER,
    ONE_WINDOW,
    PLAIN_ACTIVATIONS,
    WITH_EXPERTS,
    WITH_SOFTCAPS,
)
from megalite.checkpoint.huggingface.read import read_config
from megalite.checkpoint.huggingface.rope import normal_rope, write_rope
from megalite.config.schema import ModelConfig
from megalite.errors import UserError
from megalite.model.size import (
    expert_ffn,
    head_dim,
    kv_heads,
    latent,
    layer_windows,
    query_dim,
)

GROUPS = ("rope", "moe", "mla")


def write_config(config: ModelConfig, vocab: int, max_positions: int) -> dict[str, Any]:
    """config.json of this model; UserError for every setting that its family's architecture cannot hold."""
    if config.family == "none":
        raise UserError(f"model.family=none: has no Hugging Face form; set one of {', '.join(FAMILIES)}")
    if config.family in WITH_EXPERTS and not config.moe.experts:
        raise UserError(f"model.moe.experts=0: a {config.family} folder holds experts; set another model.family")
    if config.family == "deepseek_v3" and not latent(config):
        raise UserError("model.mla.kv_rank=0: a deepseek_v3 folder holds latents; set another model.family")
    writer = _write_gpt2 if config.family == "gpt2" else _write_llama_like
    document = writer(config) | {
        "architectures": [FAMILIES[config.family].architecture],
        "model_type": FAMILIES[config.family].model_type or config.family,
        "vocab_size": vocab,
        "n_positions" if config.family == "gpt2" else "max_position_embeddings": max_positions,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tied_embeddings,
    }
    wanted, held = normal_form(config), normal_form(read_config(document, "config.json"))
    problems = [
        f"model.{key}={value}: a {config.family} folder can only hold {held[key]}; set it so, or another model.family"
        for key, value in wanted.items()
        if key not in ("vocab", "max_positions") and not _same(value, held[key])
    ]
    if problems:
        raise UserError(*problems)
    return document


def normal_form(config: ModelConfig) -> dict[str, Any]:
    """The config's values with everything that is implied written out and everything without effect at its default."""
    values = dataclasses.asdict(config)
    values |= {"kv_heads": kv_heads(config), "head_dim": head_dim(config), "windows": layer_windows(config)}
    values["attention_scale"] = config.attention_scale or query_dim(config) ** -0.5
    if config.moe.experts and not config.moe.dense_layers:
        values["ffn"] = expert_ffn(config)
    if config.norm == "layernorm":
        values["norm_zero_centered"] = False
    for unused in ("name", "window", "window_pattern", "init_output_scale", "mtp_weight"):
        del values[unused]
    values |= {"rope": normal_rope(config), "moe": normal_experts(config), "mla": normal_latents(config)}
    return values | {f"{group}.{key}": value for group in GROUPS for key, value in values.pop(group).items()}


def _write_gpt2(config: ModelConfig) -> dict[str, Any]:
    return {
        "n_layer": config.layers,
        "n_embd": config.hidden,
        "n_head": config.heads,
        "n_inner": config.ffn,
        "activation_function": PLAIN_ACTIVATIONS.get(config.activation, ("gelu_new",))[0],
        "layer_norm_epsilon": config.norm_eps,
        "scale_attn_weights": config.attention_scale is None,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    }


def _write_llama_like(config: ModelConfig) -> dict[str, Any]:
    family = FAMILIES[config.family]
    activation = GATED_ACTIVATIONS.get(config.activation, ("silu",))[0]
    document: dict[str, Any] = {
        "num_hidden_layers": config.layers,
        "hidden_size": config.hidden,
        "intermediate_size": config.ffn,
        "num_attention_heads": config.heads,
        "num_key_value_heads": kv_heads(config),
        "head_dim": head_dim(config),
        "hidden_act": activation,
        "rms_norm_eps": LATENT_NORM_EPS if config.family == "deepseek_v3" else config.norm_eps,
        "attention_bias": config.qkv_bias and config.family != "qwen2",
        "attention_dropout": 0.0,
    }
    if config.family == "llama":
        document["mlp_bias"] = config.mlp_bias
    if family.activation_key != "hidden_act":
        document[family.activation_key] = activation
    if config.family in WITH_SOFTCAPS:
        document["query_pre_attn_scalar"] = _scalar(config)
        document["attn_logit_softcapping"] = config.attention_softcap
        document["final_logit_softcapping"] = config.logit_softcap
    if config.family in ("mixtral", "gpt_oss"):
        document["intermediate_size"] = expert_ffn(config)
    if config.family in WITH_EXPERTS:
        document |= write_experts(config)
    if config.family == "deepseek_v3":
        del document["head_dim"]
        document |= write_latents(config)
    return document | _write_window(config) | write_rope(config)


def _scalar(config: ModelConfig) -> int:
    """attention_scale ** -2; Hugging Face takes whole numbers only, and the comparison after finds what is not one."""
    return head_dim(config) if config.attention_scale is None else round(config.attention_scale**-2)


def _same(one: object, other: object) -> bool:
    if isinstance(one, float) and isinstance(other, (int, float)):
        return math.isclose(one, other, rel_tol=1e-12)
    return one == other


def _write_window(config: ModelConfig) -> dict[str, Any]:
    if config.family in ONE_KIND_OF_LAYER:
        return {}
    document: dict[str, Any] = {"sliding_window": config.window}
    if config.family == "gpt_oss":
        document["sliding_window"] = config.window or 128  # a number also where layer_types never uses it
    if config.family.startswith("qwen"):
        document |= {"use_sliding_window": config.window is not None, "max_window_layers": 0}
    if config.family not in ONE_WINDOW:
        document["layer_types"] = [
            "sliding_attention" if window else "full_attention" for window in layer_windows(config)
        ]
    return document
