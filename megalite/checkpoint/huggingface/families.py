"""What sets the supported Hugging Face architectures apart. Data only."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Family:
    """`fixed`: what the architecture leaves no choice in. `defaults`: config.json's keys when they are left out."""

    architecture: str
    fixed: dict[str, Any]
    defaults: dict[str, Any] = field(default_factory=dict)
    model_type: str = ""
    activation_key: str = "hidden_act"


LATENT_NORM_EPS = 1e-6
"""Of the norms inside DeepSeek-V3's attention, whatever its config.json says of the others."""
_GEMMA = {"norm_zero_centered": True}
_GEMMA_DEFAULTS = {"tie_word_embeddings": True, "head_dim": 256, "rms_norm_eps": 1e-6, "query_pre_attn_scalar": 256}
_GEMMA_DEFAULTS |= {"max_position_embeddings": 8192, "sliding_window": 4096}
FAMILIES = {
    "gpt2": Family(
        "GPT2LMHeadModel",
        {"position": "learned", "norm": "layernorm", "qkv_bias": True, "output_bias": True, "mlp_bias": True},
        {"tie_word_embeddings": True},
        activation_key="activation_function",
    ),
    "llama": Family("LlamaForCausalLM", {}, {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048}),
    "mistral": Family(
        "MistralForCausalLM", {}, {"rms_norm_eps": 1e-6, "max_position_embeddings": 131072, "sliding_window": 4096}
    ),
    "qwen2": Family("Qwen2ForCausalLM", {"qkv_bias": True}, {"rms_norm_eps": 1e-6, "max_position_embeddings": 32768}),
    "qwen3": Family(
        "Qwen3ForCausalLM", {"qk_norm": True}, {"rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "head_dim": 128}
    ),
    "gemma": Family("GemmaForCausalLM", _GEMMA, _GEMMA_DEFAULTS),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        _GEMMA | {"norm_place": "sandwich"},
        _GEMMA_DEFAULTS
        | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "sliding_window_pattern": 2},
        activation_key="hidden_activation",
    ),
    "gemma3": Family(
        "Gemma3ForCausalLM",
        _GEMMA | {"norm_place": "sandwich", "qk_norm": True},
        _GEMMA_DEFAULTS
        | {
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
            "max_position_embeddings": 131072,
            "sliding_window_pattern": 6,
        },
        model_type="gemma3_text",
        activation_key="hidden_activation",
    ),
    "mixtral": Family(
        "MixtralForCausalLM", {}, {"rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "rope_theta": 1e6}
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        {"qk_norm": True},
        {"rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "sliding_window": 4096, "norm_topk_prob": False},
    ),
    "gpt_oss": Family(
        "GptOssForCausalLM",
        {"attention_sinks": True, "mlp_bias": True, "activation": "swiglu_clamped"},
        {
            "attention_bias": True,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 131072,
            "head_dim": 64,
            "sliding_window": 128,
            "sliding_window_pattern": 2,
            "rope_theta": 150000.0,
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 32.0,
                "truncate": False,
                "original_max_position_embeddings": 4096,
            },
        },
    ),
    "deepseek_v3": Family(
        "DeepseekV3ForCausalLM",
        {"norm_eps": LATENT_NORM_EPS},
        {"rms_norm_eps": LATENT_NORM_EPS, "max_position_embeddings": 4096},
    ),
}
BY_MODEL_TYPE = {entry.model_type or name: name for name, entry in FAMILIES.items()}
PLAIN_ACTIVATIONS = {"gelu_tanh": ("gelu_new", "gelu_pytorch_tanh"), "gelu": ("gelu",), "relu2": ("relu2",)}
GATED_ACTIVATIONS = {"swiglu": ("silu", "swish"), "geglu": ("gelu_pytorch_tanh", "gelu_new")}
"""Our activations and Hugging Face's spellings of them; the first is the one written. Only GPT-2's MLP has no gate."""
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
"""Keys of config.json that are the tokenizer's, kept beside the model."""
WITH_SOFTCAPS = ("gemma2", "gemma3")
ONE_KIND_OF_LAYER = ("gpt2", "llama", "gemma", "deepseek_v3")
"""Families without sliding windows."""
ONE_WINDOW = ("mistral", "mixtral", "qwen3_moe")
"""Families whose layers all have the window, if any."""
WITH_ATTENTION_BIAS = ("llama", "qwen3", "gemma", "gemma2", "gemma3", "qwen3_moe", "gpt_oss")
"""Families whose attention_bias is a choice."""
WITH_EXPERTS = ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3")
