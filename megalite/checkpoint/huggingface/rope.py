"""What config.json says of rotary positions, both ways. Knows nothing of tensors or of torch."""

import dataclasses
import math
from typing import Any

from megalite.config.rope import scaling_of, stretched_theta, yarn_factor
from megalite.config.schema import ModelConfig, RopeConfig, RopeScaling
from megalite.errors import UserError
from megalite.model.size import query_dim, rotary_dim

USED = {
    "linear": ("factor",),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow"),
}
"""What each rule reads, beside what only yarn may state: truncate and attention_factor."""


def read_rope(values: dict[str, Any], where: str) -> RopeConfig:
    stated = dict(values.get("rope_parameters") or {})
    local = values.get("rope_local_base_freq")
    if "full_attention" in stated:
        local = (stated.get("sliding_attention") or {}).get("rope_theta", local)
        stated = dict(stated["full_attention"])
    stated |= values.get("rope_scaling") or {}
    kind = stated.get("rope_type", stated.get("type", "default"))
    rope = RopeConfig(
        theta=float(stated.get("rope_theta", values.get("rope_theta", 10000.0))),
        local_theta=None if local is None else float(local),
    )
    if kind == "default":
        return rope
    if kind not in USED:
        raise UserError(f"{where}: RoPE scaling {kind} is not supported; supported: default, {', '.join(USED)}")
    length = stated.get("original_max_position_embeddings", values["max_position_embeddings"])
    rope.scaling = {
        "rope_type": kind,
        "factor": float(stated["factor"]),
        "original_max_position_embeddings": int(length),
    }
    for key in ("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor"):
        if stated.get(key) is not None:
            rope.scaling[key] = float(stated[key])
    if stated.get("truncate") is False:
        rope.scaling["truncate"] = False
    if "attention_factor" not in rope.scaling and stated.get("mscale") and stated.get("mscale_all_dim"):
        over, under = (mscale(rope.scaling["factor"], float(stated[key])) for key in ("mscale", "mscale_all_dim"))
        rope.scaling["attention_factor"] = over / under
    rope.scaling = spelled(scaling_of(rope))
    return rope


def spelled(scaling: RopeScaling) -> dict[str, Any]:
    """The mapping of a rule in USED, without what the rule does not read and what need not be said."""
    entries = {name: getattr(scaling, name) for name in ("rope_type", *USED[scaling.rope_type])}
    if scaling.rope_type == "yarn" and not scaling.truncate:
        entries["truncate"] = False
    if scaling.rope_type == "yarn" and scaling.attention_factor is not None:
        entries["attention_factor"] = scaling.attention_factor
    return entries


def write_rope(config: ModelConfig) -> dict[str, Any]:
    rope, scaling, theta = config.rope, scaling_of(config.rope), stretched_theta(config.rope, rotary_dim(config))
    document: dict[str, Any] = {"rope_theta": theta}
    if config.family == "gemma3":
        document["rope_local_base_freq"] = theta if rope.local_theta is None else rope.local_theta
    if scaling.rope_type not in USED:
        # Left out, gpt_oss would be scaled.
        return document | ({"rope_scaling": {"rope_type": "default"}} if config.family == "gpt_oss" else {})
    written = spelled(scaling)
    if scaling.rope_type == "yarn" and config.family == "deepseek_v3" and config.attention_scale is not None:
        written.pop("attention_factor", None)
        written |= _mscales(config, scaling)
    return document | {"rope_scaling": written}


def normal_rope(config: ModelConfig) -> dict[str, Any]:
    """model.rope with what is implied written out and what has no effect at its default."""
    if config.position != "rope":
        config = dataclasses.replace(config, rope=RopeConfig())
    stated, scaling = scaling_of(config.rope), RopeScaling()
    theta = stretched_theta(config.rope, rotary_dim(config)) if config.position == "rope" else config.rope.theta
    if stated.rope_type in USED:
        scaling = RopeScaling(**spelled(stated))
    if stated.rope_type == "yarn":
        scaling.attention_factor = yarn_factor(stated)
    local = config.rope.local_theta
    if config.window is None or (local == theta and scaling.rope_type == "default"):
        local = None
    flat = {f"scaling.{name}": value for name, value in dataclasses.asdict(scaling).items()}
    return {"theta": theta, "fraction": config.rope.fraction, "local_theta": local, **flat}


def attention_scale(values: dict[str, Any], dim: int) -> float | None:
    """DeepSeek-V3's for heads of `dim`: yarn's mscale_all_dim multiplies queries and keys alike; None: no factor."""
    scaling = dict(values.get("rope_parameters") or {}) | dict(values.get("rope_scaling") or {})
    if scaling.get("rope_type", scaling.get("type", "default")) == "default" or not scaling.get("mscale_all_dim"):
        return None
    return float(dim**-0.5 * mscale(float(scaling["factor"]), float(scaling["mscale_all_dim"])) ** 2)


def mscale(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0


def _mscales(config: ModelConfig, scaling: RopeScaling) -> dict[str, float]:
    """mscale_all_dim and mscale of config.json that give this attention scale and yarn's factor on cos and sin."""
    if scaling.factor <= 1 or config.attention_scale is None:
        return {}
    over, step = math.sqrt(config.attention_scale * query_dim(config) ** 0.5), 0.1 * math.log(scaling.factor)
    factor = yarn_factor(scaling)
    return {"mscale": round((factor * over - 1) / step, 12), "mscale_all_dim": round((over - 1) / step, 12)}
