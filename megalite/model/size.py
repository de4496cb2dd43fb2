"""Sizes that follow from a ModelConfig by arithmetic alone: head shapes, windows, parameters, FLOPs. No torch here."""

from dataclasses import dataclass

from megalite.config.schema import ModelConfig
from megalite.errors import UserError


def kv_heads(config: ModelConfig) -> int:
    """Key and value heads; every one of them serves the same number of query heads."""
    heads = config.kv_heads or config.heads
    if config.heads % heads:
        raise UserError(f"model.kv_heads={heads}: does not divide model.heads={config.heads}; choose a divisor of it")
    return heads


def head_dim(config: ModelConfig) -> int:
    if config.head_dim:
        return config.head_dim
    if config.hidden % config.heads:
        raise UserError(
            f"model.heads={config.heads}: does not divide model.hidden={config.hidden}; "
            "change one of them or set model.head_dim"
        )
    return config.hidden // config.heads


def query_dim(config: ModelConfig) -> int:
    """Size of a head of queries and of keys."""
    return head_dim(config)


def rotary_dim(config: ModelConfig) -> int:
    """Dimensions of a head that RoPE rotates (even)."""
    rotated = int(head_dim(config) * config.rope.fraction)
    if config.position == "rope" and (rotated % 2 or rotated > head_dim(config)):
        raise UserError(
            f"model.rope.fraction={config.rope.fraction}: rotates {rotated} of {head_dim(config)} head dimensions; "
            "it must be an even number of them"
        )
    return rotated


def gated(config: ModelConfig) -> bool:
    """Whether the MLP has a gate projection beside its up projection."""
    return config.activation in ("swiglu", "geglu", "swiglu_clamped")


def is_moe(config: ModelConfig, layer: int) -> bool:
    """Whether the layer has experts in the place of an MLP."""
    return config.moe.experts > 0 and layer >= config.moe.dense_layers


def moe_layers(config: ModelConfig) -> int:
    return sum(is_moe(config, layer) for layer in range(config.layers))


def expert_ffn(config: ModelConfig) -> int:
    """Inner width of an expert."""
    return config.moe.ffn or config.ffn


def layer_windows(config: ModelConfig) -> list[int | None]:
    """Each layer's sliding window (tokens seen, itself included); None where the layer sees everything."""
    n = config.window_pattern
    return [None if n > 1 and (layer + 1) % n == 0 else config.window for layer in range(config.layers)]


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters by role; `matrices` are the blocks' dense weights (routers among them), `experts` those of
    all experts, of which a token meets `active_experts`; `head` is 0 when the embedding is tied."""

    embedding: int
    positions: int
    matrices: int
    biases: int
    norms: int
    head: int
    experts: int = 0
    active_experts: int = 0

    @property
    def total(self) -> int:
        ends = self.embedding + self.positions + self.head
        return ends + self.matrices + self.experts + self.biases + self.norms


def parameter_counts(config: ModelConfig, vocab: int, max_positions: int = 0) -> ParameterCounts:
    """Exact counts of the Transformer that this config builds. `max_positions` matters for learned positions only
    (default: model.max_positions)."""
    hidden, ffn, dim = config.hidden, config.ffn, head_dim(config)
    query_rows, kv_rows = config.heads * dim, kv_heads(config) * dim
    ups = 2 if gated(config) else 1
    norms_a_block = 4 if config.norm_place == "sandwich" else 2
    norm_size = 2 if config.norm == "layernorm" else 1
    moe, sparse = config.moe, moe_layers(config)
    matrices = config.layers * (2 * query_rows + 2 * kv_rows) * hidden
    matrices += (config.layers - sparse) * (ups + 1) * ffn * hidden
    matrices += sparse * ((ups + 1) * moe.shared_ffn + moe.experts + moe.shared_gate) * hidden
    attention_biases = config.qkv_bias * (query_rows + 2 * kv_rows) + config.output_bias * hidden
    biases = config.layers * (attention_biases + config.attention_sinks * config.heads)
    biases += (config.layers - sparse) * config.mlp_bias * (ups * ffn + hidden)
    each = moe.experts * (ups * expert_ffn(config) + hidden) + (moe.shared_ffn > 0) * (ups * moe.shared_ffn + hidden)
    states = (moe.bias_rate is not None) + (moe.aux_scope == "global" and moe.aux_loss > 0)
    biases += sparse * (config.mlp_bias * each + moe.experts * (moe.router_bias + states))
    expert = (ups + 1) * expert_ffn(config) * hidden
    block_norms = norms_a_block * norm_size * hidden + config.qk_norm * 2 * dim
    return ParameterCounts(
        embedding=vocab * hidden,
        positions=(max_positions or config.max_positions or 0) * hidden if config.position == "learned" else 0,
        matrices=matrices,
        biases=biases,
        norms=config.layers * block_norms + norm_size * hidden,
        head=0 if config.tied_embeddings else vocab * hidden,
        experts=sparse * moe.experts * expert,
        active_experts=sparse * moe.top_k * expert,
    )


def flops_per_token(config: ModelConfig, vocab: int, sequence_length: int) -> int:
    """Model FLOPs of one training token, forward and backward (recompute not counted).

    Six for every weight of a matmul that the token meets (the head included, tied or not), and for each layer's causal
    attention 12 * heads * head_dim for every key a query sees on average: s/2, or w - w²/2s under a window of w < s.
    """
    counts = parameter_counts(config, vocab)
    matmuls = counts.matrices + counts.active_experts + vocab * config.hidden
    s = sequence_length
    windows = [min(window or s, s) for window in layer_windows(config)]
    doubled_keys = sum(2 * w * s - w * w for w in windows)  # times s/2: kept whole until the end
    return 6 * matmuls + 6 * config.heads * head_dim(config) * doubled_keys // s
