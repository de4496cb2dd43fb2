"""ModelConfig to config.json of a Hugging Face folder. Knows nothing of tensors or of torch."""

import dataclasses
import math
from typing import Any

from megalite.checkpoint.huggingface.experts import (
    mscales,
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
    ntk_theta,
)
from megalite.checkpoint.huggingface.read import read_config
from megalite.config.schema import ModelConfig, RopeConfig
from megalite.errors import UserError
from megalite.model.size import (
    expert_ffn,
    head_dim,
    kv_heads,
    latent,
    layer_windows,
    query_dim,
    rotary_dim,
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
    rope, plain = dataclasses.replace(config.rope), RopeConfig()
    windowed = config.window is not None
    if rope.scaling == "ntk":
        rope = RopeConfig(
            theta=ntk_theta(rope.theta, rope.factor, rotary_dim(config)),
            fraction=rope.fraction,
            local_theta=rope.local_theta,
        )
    used = {"linear": ("factor",), "llama3": ("factor", "original_length", "low_freq_factor", "high_freq_factor")}
    used["yarn"] = ("factor", "original_length", "beta_fast", "beta_slow", "truncate", "attention_factor")
    if rope.scaling == "yarn" and rope.attention_factor is None:
        rope.attention_factor = 0.1 * math.log(rope.factor) + 1.0
    for entry in dataclasses.fields(RopeConfig):
        if entry.name not in ("theta", "fraction", "scaling", "local_theta", *used.get(rope.scaling, ())):
            setattr(rope, entry.name, getattr(plain, entry.name))
    rope.local_theta = (
        None if not windowed or (rope.local_theta == rope.theta and rope.scaling == "none") else rope.local_theta
    )
    values = dataclasses.asdict(dataclasses.replace(config, rope=rope if config.position == "rope" else plain))
    values |= {"kv_heads": kv_heads(config), "head_dim": head_dim(config), "windows": layer_windows(config)}
    values["attention_scale"] = config.attention_scale or query_dim(config) ** -0.5
    if config.moe.experts and not config.moe.dense_layers:
        values["ffn"] = expert_ffn(config)
    if config.norm == "layernorm":
        values["norm_zero_centered"] = False
    for unused in ("name", "window", "window_pattern", "init_output_scale", "mtp_weight"):
        del values[unused]
    values |= {"moe": normal_experts(config), "mla": normal_latents(config)}
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
    return document | _write_window(config) | _write_rope(config)


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


def _write_rope(config: ModelConfig) -> dict[str, Any]:
    rope = config.rope
    theta = ntk_theta(rope.theta, rope.factor, rotary_dim(config)) if rope.scaling == "ntk" else rope.theta
    document: dict[str, Any] = {"rope_theta": theta}
    if config.family == "gemma3":
        document["rope_local_base_freq"] = theta if rope.local_theta is None else rope.local_theta
    if rope.scaling in ("none", "ntk"):
        # Left out, gpt_oss would be scaled.
        return document | ({"rope_scaling": {"rope_type": "default"}} if config.family == "gpt_oss" else {})
    scaling: dict[str, Any] = {"rope_type": rope.scaling, "factor": rope.factor}
    if rope.scaling != "linear":
        scaling["original_max_position_embeddings"] = rope.original_length
    if rope.scaling == "llama3":
        scaling |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.scaling == "yarn":
        scaling |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}
        if not rope.truncate:
            scaling["truncate"] = False
        if config.family == "deepseek_v3" and config.attention_scale is not None:
            scaling |= mscales(config)
        elif rope.attention_factor is not None:
            scaling["attention_factor"] = rope.attention_factor
    return document | {"rope_scaling": scaling}
