"""Grouped-query self-attention: projections, head norms, rotation, and the attention kernel that all forms share."""

from typing import NamedTuple

from megalite_kernels import apply_rope, attention
from torch import Tensor, nn

from megalite.config.schema import ModelConfig
from megalite.model import recompute
from megalite.model.cache import KVCache
from megalite.model.linear import Linear
from megalite.model.norm import RMSNorm
from megalite.model.rope import Rotation
from megalite.model.size import head_dim, kv_heads, layer_windows, query_dim
from megalite.parallel.context import ContextParallel
from megalite.parallel.parameter import declare
from megalite.parallel.tensor import ALONE, TensorParallel


class Context(NamedTuple):
    """What every layer of one forward pass shares. Rotations are None without RoPE; documents number the tokens of
    whole rows, also where context parallelism gives this rank a part of them; so do token ids."""

    batch: int
    tokens_BS: Tensor
    rotation: Rotation | None
    local_rotation: Rotation | None  # of layers with a sliding window
    documents_BS: Tensor | None
    cache: KVCache | None


class Core(nn.Module):
    """What is between queries, keys, values and the heads' output, in every form of attention of one layer.

    `sinks`: a learned score a query head that softmax counts beside the keys' (arXiv:2508.10925).
    Dimensions: B batch, S new tokens, T all tokens, E hidden, H query heads, K key and value heads, D head_dim.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.window = layer_windows(config)[min(layer, config.layers - 1)]  # behind the last layer: as that
        self.softcap = config.attention_softcap
        self.scale = query_dim(config) ** -0.5 if config.attention_scale is None else config.attention_scale
        sinks = config.attention_sinks
        self.sinks = declare(config.heads, role="bias", std=config.init_std, shard={"tp": 0}) if sinks else None
        self.recompute = False  # the core: attention probabilities are computed again in backward
        self.tp: TensorParallel = ALONE
        self.cp: ContextParallel | None = None
        self.backend = "auto"

    def attend(self, q_BSHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, documents_BS: Tensor | None) -> Tensor:
        return recompute.run(self.recompute, self._core, q_BSHD, k_BTKD, v_BTKD, documents_BS)

    def _core(self, q_BSHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, documents_BS: Tensor | None) -> Tensor:
        attend = attention if self.cp is None else self.cp.attention
        return attend(
            q_BSHD, k_BTKD, v_BTKD, scale=self.scale, window=self.window, softcap=self.softcap, documents=documents_BS,
            sinks=self.sinks, backend=self.backend,
        )  # fmt: skip


class Attention(Core):
    """Causal self-attention of one layer."""

    def __init__(self, config: ModelConfig, layer: int, output_std: float) -> None:
        super().__init__(config, layer)
        self.head_dim = head_dim(config)
        hidden, std, bias = config.hidden, config.init_std, config.qkv_bias
        query_rows, kv_rows = config.heads * self.head_dim, kv_heads(config) * self.head_dim
        self.query = Linear(hidden, query_rows, split="outputs", std=std, bias=bias)
        self.key = Linear(hidden, kv_rows, split="outputs", std=std, bias=bias)
        self.value = Linear(hidden, kv_rows, split="outputs", std=std, bias=bias)
        self.output = Linear(query_rows, hidden, split="inputs", std=output_std, bias=config.output_bias)
        if config.qk_norm:
            self.query_norm = RMSNorm(self.head_dim, config.norm_eps, config.norm_zero_centered, sees="heads")
            self.key_norm = RMSNorm(self.head_dim, config.norm_eps, config.norm_zero_centered, sees="heads")
        self.qk_norm, self.heads, self.kv_heads = config.qk_norm, config.heads, kv_heads(config)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        rows = self.tp.columns(x, (self.query, self.key, self.value))
        q, k, v = (r.reshape(context.batch, -1, r.shape[-1]) for r in rows)
        q_BSHD = q.unflatten(-1, (-1, self.head_dim))
        k_BSKD = self.tp.heads(k, self.kv_heads, self.head_dim, self.heads)
        v_BSKD = self.tp.heads(v, self.kv_heads, self.head_dim, self.heads)
        if self.qk_norm:
            q_BSHD, k_BSKD = self.query_norm(q_BSHD), self.key_norm(k_BSKD)
        rotation = context.rotation if self.window is None else context.local_rotation
        if rotation is not None:
            q_BSHD, k_BSKD = (apply_rope(x, *rotation, backend=self.backend) for x in (q_BSHD, k_BSKD))
        if context.cache is not None:
            k_BSKD, v_BSKD = context.cache.extend(self.layer, k_BSKD, v_BSKD)
        return self.output(self.attend(q_BSHD, k_BSKD, v_BSKD, context.documents_BS).flatten(-2))
