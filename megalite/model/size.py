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
    return head_dim(config) + (config.mla.rope_dim if latent(config) else 0)


def value_dim(config: ModelConfig) -> int:
    """Size of a head of values, and of what attention returns."""
    return config.mla.value_dim or head_dim(config) if latent(config) else head_dim(config)


def latent(config: ModelConfig) -> bool:
    """Whether keys and values come from a latent (model.mla)."""
    return config.mla.kv_rank > 0


def rotary_dim(config: ModelConfig) -> int:
    """Dimensions of a head that RoPE rotates (even)."""
    if latent(config):
        return config.mla.rope_dim
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
    """Blocks with experts, among them those of multi-token modules."""
    return sum(is_moe(config, layer) for layer in range(config.layers + config.mtp))


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
    hidden, ffn = config.hidden, config.ffn
    of_attention = _attention_counts(config)
    ups = 2 if gated(config) else 1
    norms_a_block = 4 if config.norm_place == "sandwich" else 2
    norm_size = 2 if config.norm == "layernorm" else 1
    moe, sparse, blocks = config.moe, moe_layers(config), config.layers + config.mtp
    matrices = blocks * of_attention[0] + (blocks - sparse) * (ups + 1) * ffn * hidden + config.mtp * 2 * hidden**2
    matrices += sparse * ((ups + 1) * moe.shared_ffn + moe.experts + moe.shared_gate) * hidden
    biases = blocks * of_attention[1] + (blocks - sparse) * config.mlp_bias * (ups * ffn + hidden)
    each = moe.experts * (ups * expert_ffn(config) + hidden) + (moe.shared_ffn > 0) * (ups * moe.shared_ffn + hidden)
    states = (moe.bias_rate is not None) + (moe.aux_scope == "global" and moe.aux_loss > 0)
    biases += sparse * (config.mlp_bias * each + moe.experts * (moe.router_bias + states))
    expert = (ups + 1) * expert_ffn(config) * hidden
    block_norms = of_attention[2] + norms_a_block * norm_size * hidden
    return ParameterCounts(
        embedding=vocab * hidden,
        positions=(max_positions or config.max_positions or 0) * hidden if config.position == "learned" else 0,
        matrices=matrices,
        biases=biases,
        norms=blocks * block_norms + (1 + 3 * config.mtp) * norm_size * hidden,
        head=0 if config.tied_embeddings else vocab * hidden,
        experts=sparse * moe.experts * expert,
        active_experts=sparse * moe.top_k * expert,
    )


def _attention_counts(config: ModelConfig) -> tuple[int, int, int]:
    """Parameters of one layer's attention: in matrices, biases (sinks too) and norms."""
    hidden, dim, mla = config.hidden, head_dim(config), config.mla
    query_rows, value_rows = config.heads * query_dim(config), config.heads * value_dim(config)
    biases = config.output_bias * hidden + config.attention_sinks * config.heads
    if not latent(config):
        kv_rows = kv_heads(config) * dim
        biases += config.qkv_bias * (query_rows + 2 * kv_rows)
        return (2 * query_rows + 2 * kv_rows) * hidden, biases, config.qk_norm * 2 * dim
    queries = mla.q_rank * (hidden + query_rows) if mla.q_rank else hidden * query_rows
    downs, ups = (mla.kv_rank + mla.rope_dim) * hidden, mla.kv_rank * (config.heads * dim + value_rows)
    return queries + downs + ups + value_rows * hidden, biases, mla.kv_rank + (mla.q_rank or 0)


def flops_per_token(config: ModelConfig, vocab: int, sequence_length: int) -> int:
    """Model FLOPs of one training token, forward and backward (recompute not counted).

    Six for every weight of a matmul that the token meets (the head included, tied or not), and for each layer's causal
    attention 6 * heads * (query_dim + value_dim) for every key a query sees on average: s/2, or w - w²/2s under a
    window of w < s.
    """
    counts = parameter_counts(config, vocab)
    matmuls = counts.matrices + counts.active_experts + (1 + config.mtp) * vocab * config.hidden
    s, of_layers = sequence_length, layer_windows(config)
    windows = [min(window or s, s) for window in of_layers + config.mtp * of_layers[-1:]]
    doubled_keys = sum(2 * w * s - w * w for w in windows)  # times s/2: kept whole until the end
    return 6 * matmuls + 3 * config.heads * (query_dim(config) + value_dim(config)) * doubled_keys // s
