"""Which Hugging Face tensor holds which of our parameters, per family. Data only: `{i}` stands for the layer.

A rule's tensor is our tensors stacked along rows, then transposed where GPT-2 stores [inputs, outputs]. Rules about
parameters that a model does not have (a bias, a tied head) do not apply to it.
"""

from collections.abc import Iterable
from typing import NamedTuple


class Rule(NamedTuple):
    theirs: str
    ours: tuple[str, ...]
    transposed: bool = False


def _rules(block: str, ends: dict[str, str], blocks: dict[str, str]) -> list[Rule]:
    """Rules from tables {theirs: ours}; several of ours are separated by '+', and '.T' marks a transposed tensor."""
    table = ends | {
        f"{block}.{{i}}.{theirs}": " + ".join(f"blocks.{{i}}.{name}" for name in ours.split(" + "))
        for theirs, ours in blocks.items()
    }
    return [
        Rule(theirs, tuple(ours.removesuffix(".T").split(" + ")), ours.endswith(".T")) for theirs, ours in table.items()
    ]


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
_LLAMA = _rules("model.layers", _LLAMA_ENDS, _PRE_NORMS | _PROJECTIONS)
_GEMMA2 = _rules("model.layers", _LLAMA_ENDS, _SANDWICH_NORMS | _PROJECTIONS)
_GPT2 = _rules(
    "transformer.h",
    {
        "transformer.wte.weight": "embedding.weight",
        "transformer.wpe.weight": "positions.weight",
        "transformer.ln_f.weight": "final_norm.weight",
        "transformer.ln_f.bias": "final_norm.bias",
        "lm_head.weight": "head.weight",
    },
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
RULES = {
    "gpt2": _GPT2,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _GEMMA2,
    "gemma3": _GEMMA2,
}
PREFIXES = {family: "transformer." if family == "gpt2" else "model." for family in RULES}
"""Folders saved from a headless model lack this prefix."""
IGNORED = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")
"""Endings of stored constants that are no parameters (old Llama and GPT-2 folders)."""


def rules_for(family: str, layers: int, names: Iterable[str]) -> list[Rule]:
    """The family's rules written out for every layer, for a model with the parameters `names`."""
    present = set(names)
    rules = []
    for rule in RULES[family]:
        for i in range(layers if "{i}" in rule.theirs else 1):
            ours = tuple(name.format(i=i) for name in rule.ours)
            if present.issuperset(ours):
                rules.append(Rule(rule.theirs.format(i=i), ours, rule.transposed))
    return rules
