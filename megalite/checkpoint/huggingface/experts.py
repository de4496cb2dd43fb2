"""What config.json says of experts, latents and multi-token modules, both ways. Knows nothing of tensors or of torch.

Settings of training alone (losses that balance, capacity, jitter) are neither read nor written: transformers routes
without them, and its router_aux_loss_coef weighs another formula than model.moe.aux_loss.
"""

import dataclasses
from typing import Any

from megalite.checkpoint.huggingface.families import LATENT_NORM_EPS, WITH_EXPERTS
from megalite.config.schema import MLAConfig, ModelConfig, MoEConfig
from megalite.errors import UserError
from megalite.model.size import expert_ffn, head_dim, latent, value_dim

BIAS_RATE = 0.001
"""DeepSeek-V3's (arXiv:2412.19437, section 4.2); config.json does not hold it."""
OF_TRAINING = ("router_dtype", "aux_loss", "aux_scope", "z_loss", "jitter", "capacity", "drop", "pad")
ONLY: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"decoder_sparse_step": 1},
    "gpt_oss": {"swiglu_alpha": 1.702, "swiglu_limit": 7.0},
    "deepseek_v3": {
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "moe_layer_freq": 1,
        "rope_interleave": True,
        "attention_bias": False,
        "rms_norm_eps": LATENT_NORM_EPS,
    },
}
"""Keys of which one value is supported, the usual one."""


def read_experts(name: str, values: dict[str, Any], where: str) -> MoEConfig:
    if name not in WITH_EXPERTS:
        return MoEConfig()
    for key, only in ONLY.get(name, {}).items():
        if values.get(key, only) != only:
            raise UserError(f"{where}: {key}={values[key]} is not supported; supported: {only}")
    experts = next((values[key] for key in EXPERTS_KEYS if key in values), None)
    if experts is None:
        raise UserError(f"{where}: has no '{EXPERTS_KEYS[0]}'; fetch the file again")
    moe = MoEConfig(experts=int(experts), top_k=int(values["num_experts_per_tok"]))
    if name == "qwen3_moe":
        moe.ffn, moe.normalize = int(values["moe_intermediate_size"]), bool(values["norm_topk_prob"])
        moe.dense_layers = _dense_layers(values.get("mlp_only_layers", []), where)
    elif name == "gpt_oss":
        moe.router_bias = True
    elif name == "deepseek_v3":
        moe.router, moe.bias_rate = "sigmoid", BIAS_RATE
        moe.ffn, moe.normalize = int(values["moe_intermediate_size"]), bool(values.get("norm_topk_prob", True))
        moe.shared_ffn = moe.ffn * int(values.get("n_shared_experts", 1))
        moe.dense_layers = int(values.get("first_k_dense_replace", 3))
        moe.scale = float(values.get("routed_scaling_factor", 2.5))
        moe.groups, moe.top_groups = int(values.get("n_group", 8)), int(values.get("topk_group", 4))
    return moe


EXPERTS_KEYS = ("num_local_experts", "num_experts", "n_routed_experts")


def read_latents(name: str, values: dict[str, Any]) -> MLAConfig:
    if name != "deepseek_v3":
        return MLAConfig()
    q_rank = values.get("q_lora_rank")
    return MLAConfig(
        kv_rank=int(values["kv_lora_rank"]),
        q_rank=None if q_rank is None else int(q_rank),
        rope_dim=int(values["qk_rope_head_dim"]),
        value_dim=int(values["v_head_dim"]),
    )


def read_modules(name: str, values: dict[str, Any]) -> int:
    """Multi-token modules, in the older or the newer word."""
    key = "num_nextn_predict_layers" if "num_nextn_predict_layers" in values else "num_mtp_layers"
    return int(values.get(key, 0)) if name == "deepseek_v3" else 0


def write_experts(config: ModelConfig) -> dict[str, Any]:
    moe = config.moe
    document: dict[str, Any] = {"num_experts_per_tok": moe.top_k, "router_aux_loss_coef": 0.0}
    if config.family == "deepseek_v3":
        return document | {
            "n_routed_experts": moe.experts,
            "moe_intermediate_size": expert_ffn(config),
            "n_shared_experts": moe.shared_ffn // expert_ffn(config),
            "first_k_dense_replace": moe.dense_layers,
            "moe_layer_freq": 1,
            "num_nextn_predict_layers": config.mtp,
            "norm_topk_prob": moe.normalize,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "routed_scaling_factor": moe.scale,
            "n_group": moe.groups,
            "topk_group": normal_experts(config)["top_groups"],
        }
    document["num_experts" if config.family == "qwen3_moe" else "num_local_experts"] = moe.experts
    if config.family == "qwen3_moe":
        document |= {"moe_intermediate_size": expert_ffn(config), "norm_topk_prob": moe.normalize}
        document |= {"decoder_sparse_step": 1, "mlp_only_layers": list(range(moe.dense_layers))}
    return document


def write_latents(config: ModelConfig) -> dict[str, Any]:
    """Keys and values of DeepSeek-V3's attention. Its scale is that of a head times mscale², which `rope_scaling` says:
    see `mscales`."""
    mla = config.mla
    return {
        "kv_lora_rank": mla.kv_rank,
        "q_lora_rank": mla.q_rank,
        "qk_rope_head_dim": mla.rope_dim,
        "qk_nope_head_dim": head_dim(config),
        "v_head_dim": value_dim(config),
        "rope_interleave": True,
    }


def normal_experts(config: ModelConfig) -> dict[str, Any]:
    """model.moe with what is implied written out, what has no effect at its default, and without settings of training
    alone."""
    moe = dataclasses.replace(config.moe) if config.moe.experts else MoEConfig()
    moe.ffn = expert_ffn(config) if moe.experts else None
    moe.bias_rate = None if moe.bias_rate is None else BIAS_RATE
    moe.top_groups = 1 if moe.groups == 1 else moe.top_groups
    moe.shared_gate = moe.shared_gate and moe.shared_ffn > 0
    return {key: value for key, value in dataclasses.asdict(moe).items() if key not in OF_TRAINING}


def normal_latents(config: ModelConfig) -> dict[str, Any]:
    mla = dataclasses.replace(config.mla, value_dim=value_dim(config)) if latent(config) else MLAConfig()
    return dataclasses.asdict(mla)


def _dense_layers(listed: Any, where: str) -> int:
    """Of qwen3_moe's mlp_only_layers: they must be the first ones."""
    layers = sorted(int(layer) for layer in listed)
    if layers != list(range(len(layers))):
        raise UserError(f"{where}: mlp_only_layers={listed} is not supported; only the first layers can be dense")
    return len(layers)
