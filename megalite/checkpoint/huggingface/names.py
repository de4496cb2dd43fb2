"""Which Hugging Face tensor holds which of our parameters, per family. Data only.

In a table {theirs: ours}, `{i}` stands for the layer and `{e}` for the expert that a tensor holds; `{block}` is our
name of the layer, `{module}` of the multi-token module around it: those count as layers behind the last. Several of
ours are joined ("a + b") or take turns ("a / b"); ".T" marks a transposed tensor, ".S" swapped halves, ".R(heads)"
RoPE's pairs side by side (`Rule`). Rules about parameters that a model does not have (a bias, a tied head) do not
apply to it.
"""

import re
from collections.abc import Iterable, Iterator

from megalite.checkpoint.huggingface.rule import Rule
from megalite.config.schema import ModelConfig

Table = dict[str, str]


def _layers(block: str, table: Table) -> Table:
    """A table about one layer, of all layers: names start with `block`, ours with {block}."""
    return {f"{block}.{{i}}.{theirs}": re.sub(r"(^| [+/] )", r"\1{block}.", ours) for theirs, ours in table.items()}


_LLAMA_ENDS = {
    "model.embed_tokens.weight": "embedding.weight",
    "model.norm.weight": "final_norm.weight",
    "lm_head.weight": "head.weight",
}
_PROJECTIONS = {
    f"{group}.{theirs}_proj.{kind}": f"{ours}.{kind}"
    for group, theirs, ours in (
        ("self_attn", "q", "attention.query"),
        ("self_attn", "k", "attention.key"),
        ("self_attn", "v", "attention.value"),
        ("self_attn", "o", "attention.output"),
        ("mlp", "gate", "mlp.gate"),
        ("mlp", "up", "mlp.up"),
        ("mlp", "down", "mlp.down"),
    )
    for kind in ("weight", "bias")
} | {
    "self_attn.q_norm.weight": "attention.query_norm.weight",
    "self_attn.k_norm.weight": "attention.key_norm.weight",
}
_PRE_NORMS = {
    "input_layernorm.weight": "attention_norm.weight",
    "post_attention_layernorm.weight": "mlp_norm.weight",
}
_SANDWICH_NORMS = {
    "input_layernorm.weight": "attention_norm.weight",
    "post_attention_layernorm.weight": "attention_post_norm.weight",
    "pre_feedforward_layernorm.weight": "mlp_norm.weight",
    "post_feedforward_layernorm.weight": "mlp_post_norm.weight",
}
_LLAMA = _LLAMA_ENDS | _layers("model.layers", _PRE_NORMS | _PROJECTIONS)
_GEMMA2 = _LLAMA_ENDS | _layers("model.layers", _SANDWICH_NORMS | _PROJECTIONS)
_GPT2 = {
    "transformer.wte.weight": "embedding.weight",
    "transformer.wpe.weight": "positions.weight",
    "transformer.ln_f.weight": "final_norm.weight",
    "transformer.ln_f.bias": "final_norm.bias",
    "lm_head.weight": "head.weight",
} | _layers(
    "transformer.h",
    {
        "ln_1.weight": "attention_norm.weight",
        "ln_1.bias": "attention_norm.bias",
        "attn.c_attn.weight": "attention.query.weight + attention.key.weight + attention.value.weight.T",
        "attn.c_attn.bias": "attention.query.bias + attention.key.bias + attention.value.bias",
        "attn.c_proj.weight": "attention.output.weight.T",
        "attn.c_proj.bias": "attention.output.bias",
        "ln_2.weight": "mlp_norm.weight",
        "ln_2.bias": "mlp_norm.bias",
        "mlp.c_fc.weight": "mlp.up.weight.T",
        "mlp.c_fc.bias": "mlp.up.bias",
        "mlp.c_proj.weight": "mlp.down.weight.T",
        "mlp.c_proj.bias": "mlp.down.bias",
    },
)

_STACKED = {
    "mlp.experts.gate_up_proj": "mlp.experts.gate + mlp.experts.up",
    "mlp.experts.down_proj": "mlp.experts.down",
}
"""Of all experts, as transformers holds and may save them."""
_EACH = {f"mlp.experts.{{e}}.{theirs}_proj.weight": f"mlp.experts.{theirs}" for theirs in ("gate", "up", "down")}
_QWEN3_MOE = _PRE_NORMS | _PROJECTIONS | {"mlp.gate.weight": "mlp.router.weight"}
_MIXTRAL_EACH = {
    "block_sparse_moe.gate.weight": "mlp.router.weight",
    "block_sparse_moe.experts.{e}.w1.weight": "mlp.experts.gate",
    "block_sparse_moe.experts.{e}.w2.weight": "mlp.experts.down",
    "block_sparse_moe.experts.{e}.w3.weight": "mlp.experts.up",
}
_GPT_OSS = {
    "self_attn.sinks": "attention.sinks",
    "mlp.router.weight": "mlp.router.weight",
    "mlp.router.bias": "mlp.router.bias",
    "mlp.experts.gate_up_proj": "mlp.experts.gate / mlp.experts.up.T",
    "mlp.experts.gate_up_proj_bias": "mlp.experts.gate_bias / mlp.experts.up_bias",
    "mlp.experts.down_proj": "mlp.experts.down.T",
    "mlp.experts.down_proj_bias": "mlp.experts.down_bias",
}
_DEEPSEEK = _QWEN3_MOE | {
    "self_attn.q_proj.weight": "attention.query.weight.R(heads)",
    "self_attn.q_a_proj.weight": "attention.query_down.weight",
    "self_attn.q_a_layernorm.weight": "attention.query_latent_norm.weight",
    "self_attn.q_b_proj.weight": "attention.query_up.weight.R(heads)",
    "self_attn.kv_a_proj_with_mqa.weight": "attention.key_value_down.weight.R(1)",
    "self_attn.kv_a_layernorm.weight": "attention.key_value_norm.weight",
    "self_attn.kv_b_proj.weight": "attention.key_value_up.weight",
    "mlp.gate.e_score_correction_bias": "mlp.router.expert_bias",
    **{f"mlp.shared_experts.{name}_proj.weight": f"mlp.shared.{name}.weight" for name in ("gate", "up", "down")},
}
_MULTI_TOKEN = {
    "model.layers.{i}.enorm.weight": "{module}.token_norm.weight",
    "model.layers.{i}.hnorm.weight": "{module}.hidden_norm.weight",
    "model.layers.{i}.eh_proj.weight": "{module}.projection.weight.S",
    "model.layers.{i}.shared_head.norm.weight": "{module}.final_norm.weight",
}
COPIES = {"embed_tokens.weight": "embedding.weight", "shared_head.head.weight": "head.weight"}
"""What a multi-token module's layer stores a second time, as published."""


def _with_experts(block: Table, *forms: Table) -> tuple[Table, ...]:
    return tuple(_LLAMA_ENDS | _layers("model.layers", block | form) | _MULTI_TOKEN for form in forms)


TABLES: dict[str, tuple[Table, ...]] = {
    "gpt2": (_GPT2,),
    "llama": (_LLAMA,),
    "mistral": (_LLAMA,),
    "qwen2": (_LLAMA,),
    "qwen3": (_LLAMA,),
    "gemma": (_LLAMA,),
    "gemma2": (_GEMMA2,),
    "gemma3": (_GEMMA2,),
    "mixtral": _with_experts(
        _PRE_NORMS | _PROJECTIONS, _MIXTRAL_EACH, _STACKED | {"mlp.gate.weight": "mlp.router.weight"}
    ),
    "qwen3_moe": _with_experts(_QWEN3_MOE, _EACH, _STACKED),
    "deepseek_v3": _with_experts(_DEEPSEEK, _EACH, _STACKED),
    "gpt_oss": _with_experts(_PRE_NORMS | _PROJECTIONS, _GPT_OSS),
}
"""A family's forms of folder; the first is the one written, the last has the names that transformers gives a model's
parameters."""
PREFIXES = {family: "transformer." if family == "gpt2" else "model." for family in TABLES}
"""Folders saved from a headless model lack this prefix."""
IGNORED = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")
"""Endings of stored constants that are no parameters (old Llama and GPT-2 folders)."""


def rules_for(config: ModelConfig, names: Iterable[str], form: int = 0) -> list[Rule]:
    """One of the family's tables written out for every layer and expert, for a model with the parameters `names`."""
    present = set(names)
    return [rule for row in TABLES[config.family][form].items() for rule in _written_out(*row, config, present)]


def copies_for(config: ModelConfig) -> list[Rule]:
    """Tensors that a folder has beside those of `rules_for`."""
    copies = dict.fromkeys(COPIES, "embedding.weight") if config.tied_embeddings else COPIES
    layers = range(config.layers, config.layers + config.mtp)
    return [Rule(f"model.layers.{i}.{theirs}", (ours,)) for i in layers for theirs, ours in copies.items()]


def _written_out(theirs: str, ours: str, config: ModelConfig, present: set[str]) -> Iterator[Rule]:
    mark = re.search(r"\.(T|S|R\((\w+)\))$", ours)
    names = re.split(r" [+/] ", ours[: mark.start()] if mark else ours)
    kind = mark[1][0] if mark else ""
    turned = (config.heads if mark and mark[2] == "heads" else 1, config.mla.rope_dim) if kind == "R" else None
    for i in range(config.layers + config.mtp if "{i}" in theirs else 1):
        module = f"mtp.{i - config.layers + 1}"
        block = f"blocks.{i}" if i < config.layers else f"{module}.block"
        of_layer = tuple(name.format(block=block, module=module) for name in names)
        if present.issuperset(of_layer):
            for e in range(config.moe.experts) if "{e}" in theirs else (None,):
                yield Rule(theirs.format(i=i, e=e), of_layer, " / " in ours, kind == "T", e, turned, kind == "S")
