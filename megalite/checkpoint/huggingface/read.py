"""config.json of a Hugging Face folder to ModelConfig. Knows nothing of tensors or of torch."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from megalite.checkpoint.huggingface.experts import read_experts, read_latents, read_modules
from megalite.checkpoint.huggingface.families import (
    BY_MODEL_TYPE,
    FAMILIES,
    GATED_ACTIVATIONS,
    ONE_KIND_OF_LAYER,
    ONE_WINDOW,
    PLAIN_ACTIVATIONS,
    WITH_ATTENTION_BIAS,
    WITH_SOFTCAPS,
)
from megalite.checkpoint.huggingface.rope import attention_scale, read_rope
from megalite.config.schema import ModelConfig
from megalite.errors import UserError


def read_config(document: dict[str, Any], where: str) -> ModelConfig:
    """The model that a config.json describes; UserError names what it asks for that this engine does not have."""
    name = BY_MODEL_TYPE.get(str(document.get("model_type")))
    if name is None:
        known = ", ".join(BY_MODEL_TYPE)
        raise UserError(f"{where}: model_type={document.get('model_type')} is not supported; supported: {known}")
    values = {key: value for key, value in (FAMILIES[name].defaults | document).items() if value is not None}
    try:
        return _read_gpt2(values, where) if name == "gpt2" else _read_llama_like(name, values, where)
    except KeyError as error:
        raise UserError(f"{where}: has no {error}; fetch the file again") from None
    except (TypeError, ValueError, AttributeError, ArithmeticError):
        raise UserError(f"{where}: a value has the wrong type or size; fetch the file again") from None


def _read_gpt2(values: dict[str, Any], where: str) -> ModelConfig:
    for key in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        if values.get(key):
            raise UserError(f"{where}: {key}=true is not supported; only plain GPT-2 folders are")
    hidden = int(values.get("n_embd", 768))
    return ModelConfig(
        family="gpt2",
        layers=int(values.get("n_layer", 12)),
        hidden=hidden,
        heads=int(values.get("n_head", 12)),
        ffn=int(values.get("n_inner") or 4 * hidden),
        vocab=int(values.get("vocab_size", 50257)),
        max_positions=int(values.get("n_positions", 1024)),
        norm_eps=float(values.get("layer_norm_epsilon", 1e-5)),
        activation=_activation(values.get("activation_function", "gelu_new"), PLAIN_ACTIVATIONS, where),
        tied_embeddings=bool(values["tie_word_embeddings"]),
        attention_scale=None if values.get("scale_attn_weights", True) else 1.0,
        init_std=float(values.get("initializer_range", 0.02)),
        **FAMILIES["gpt2"].fixed,
    )


def _read_llama_like(name: str, values: dict[str, Any], where: str) -> ModelConfig:
    gemma = name.startswith("gemma")
    heads, hidden = int(values["num_attention_heads"]), int(values["hidden_size"])
    bias = bool(values.get("attention_bias", False)) and name in WITH_ATTENTION_BIAS
    stated = values.get(FAMILIES[name].activation_key, "gelu_pytorch_tanh" if gemma else "silu")
    if gemma and stated == "gelu":  # early Gemma folders, which mean the tanh form
        stated = "gelu_pytorch_tanh"
    window, pattern = _read_window(name, values, where)
    moe, mla = read_experts(name, values, where), read_latents(name, values)
    dim = int(values["qk_nope_head_dim"]) if mla.kv_rank else int(values.get("head_dim", hidden // heads))
    scale = float(values["query_pre_attn_scalar"]) ** -0.5 if name in WITH_SOFTCAPS else None
    config = ModelConfig(
        family=name,
        layers=int(values["num_hidden_layers"]),
        hidden=hidden,
        heads=heads,
        kv_heads=int(values.get("num_key_value_heads", heads)),
        head_dim=dim,
        ffn=int(values["intermediate_size"]),
        vocab=int(values["vocab_size"]),
        max_positions=int(values["max_position_embeddings"]),
        rope=read_rope(values, where),
        norm_eps=float(values["rms_norm_eps"]),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bool(values.get("mlp_bias", False)) and name == "llama",
        tied_embeddings=bool(values.get("tie_word_embeddings", False)),
        embedding_scale=hidden**0.5 if gemma else 1.0,
        attention_scale=attention_scale(values, dim + mla.rope_dim) if mla.kv_rank else scale,
        attention_softcap=_softcap(name, values.get("attn_logit_softcapping")),
        logit_softcap=_softcap(name, values.get("final_logit_softcapping")),
        window=window,
        window_pattern=pattern,
        mla=mla,
        moe=moe,
        mtp=read_modules(name, values),
        init_std=float(values.get("initializer_range", 0.02)),
        activation=_activation(stated, GATED_ACTIVATIONS, where),
    )
    if config.rope.local_theta is not None and window is None:
        config.rope.local_theta = None
    return dataclasses.replace(config, **FAMILIES[name].fixed)


def _softcap(name: str, value: Any) -> float | None:
    return None if value is None or name not in WITH_SOFTCAPS else float(value)


def _activation(stated: object, spellings: Mapping[str, tuple[str, ...]], where: str) -> str:
    for ours, theirs in spellings.items():
        if stated in theirs:
            return ours
    raise UserError(f"{where}: activation {stated} is not supported in this family")


def _read_window(name: str, values: dict[str, Any], where: str) -> tuple[int | None, int]:
    """The sliding window and after how many layers one sees everything."""
    layers = int(values["num_hidden_layers"])
    window = values.get("sliding_window")
    unused = name.startswith("qwen") and not values.get("use_sliding_window")
    if window is None or unused or name in ONE_KIND_OF_LAYER:
        return None, 1
    if name in ONE_WINDOW:
        return int(window), 1
    kinds = values.get("layer_types")
    if kinds is None and name.startswith("qwen"):
        first = int(values.get("max_window_layers", 28))
        kinds = ["full_attention" if i < first else "sliding_attention" for i in range(layers)]
    if kinds is None:
        n = int(values["sliding_window_pattern"])
        kinds = ["sliding_attention" if (i + 1) % n else "full_attention" for i in range(layers)]
    return _pattern(int(window), list(kinds), layers, where)


def _pattern(window: int, kinds: list[Any], layers: int, where: str) -> tuple[int | None, int]:
    if len(kinds) == layers and set(kinds) == {"full_attention"}:
        return None, 1
    for n in range(1, layers + 1):
        if kinds == ["full_attention" if n > 1 and (i + 1) % n == 0 else "sliding_attention" for i in range(layers)]:
            return window, n
    raise UserError(f"{where}: layer_types is no repeated pattern that ends in full attention; not supported")
