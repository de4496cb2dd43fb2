"""The decoder-only transformer: embedding, blocks, final norm, and the loss or logits over its vocabulary.

One class spans GPT-2, Llama, Mistral, Qwen and Gemma by ModelConfig alone. Build it under `torch.device("meta")` and
give it storage with `megalite.parallel.parameter.materialize`. Dimensions: B batch, S sequence, E hidden, V vocab.
"""

from typing import NamedTuple

import torch
from megalite_kernels import linear, linear_cross_entropy
from torch import Tensor, nn

from megalite.config.schema import ModelConfig, RopeConfig
from megalite.model import recompute
from megalite.model.attention import Attention, Context
from megalite.model.cache import KVCache
from megalite.model.embedding import Embedding, Head
from megalite.model.mlp import MLP
from megalite.model.norm import make_norm
from megalite.model.rope import RopeTables
from megalite.model.size import rotary_dim


class Losses(NamedTuple):
    """Sums over the valid targets, float32 or float64 scalars: negative log-likelihood, squared log-partition."""

    nll_sum: Tensor
    z_sum: Tensor


class Block(nn.Module):
    """Attention and MLP, each added to the residual stream; norms before a sublayer, on its output, or both."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        std = config.init_std / (2 * config.layers) ** 0.5 if config.init_output_scale else config.init_std
        before, after = config.norm_place != "post", config.norm_place != "pre"
        self.attention_norm = make_norm(config) if before else nn.Identity()
        self.attention = Attention(config, layer, std)
        self.attention_post_norm = make_norm(config) if after else nn.Identity()
        self.mlp_norm = make_norm(config) if before else nn.Identity()
        self.mlp = MLP(config, std)
        self.mlp_post_norm = make_norm(config) if after else nn.Identity()
        self.recompute = False  # the whole block is computed again in backward

    def forward(self, x_BSE: Tensor, context: Context) -> Tensor:
        return recompute.run(self.recompute, self.sublayers, x_BSE, context)

    def sublayers(self, x_BSE: Tensor, context: Context) -> Tensor:
        x_BSE = x_BSE + self.attention_post_norm(self.attention(self.attention_norm(x_BSE), context))
        return x_BSE + self.mlp_post_norm(self.mlp(self.mlp_norm(x_BSE)))


class Transformer(nn.Module):
    """`max_positions` bounds learned positions only; RoPE tables grow with what is asked."""

    def __init__(self, config: ModelConfig, vocab: int, max_positions: int) -> None:
        super().__init__()
        self.config, self.vocab, self.max_positions = config, vocab, max_positions
        self.embedding = Embedding(vocab, config.hidden, role="embedding", std=config.init_std)
        if config.position == "learned":
            self.positions = Embedding(max_positions, config.hidden, role="position", std=config.init_std)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.final_norm = make_norm(config)
        if not config.tied_embeddings:
            self.head = Head(vocab, config.hidden, std=config.init_std)
        rotated, theta = rotary_dim(config), config.rope.local_theta
        self.rope = RopeTables(config.rope, rotated) if config.position == "rope" else None
        self.local_rope = RopeTables(RopeConfig(theta=theta), rotated) if self.rope and theta else None

    @property
    def head_weight(self) -> Tensor:
        """weight[V, E] of the output projection: the embedding's own when tied."""
        return self.embedding.weight if self.config.tied_embeddings else self.head.weight

    def forward(self, tokens_BS: Tensor, documents_BS: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """Hidden states [B, S, E] after the final norm, in the parameters' dtype.

        `documents_BS` numbers the documents inside each row, rising along it: attention stays inside a document and
        positions restart with it. With `cache`, tokens follow those the cache holds.
        """
        assert documents_BS is None or cache is None, "a cache holds one document a row"
        start = cache.length if cache is not None else 0
        positions_BS = None if documents_BS is None else document_positions(documents_BS)
        x_BSE = self.embedding(tokens_BS)
        if self.config.embedding_scale != 1.0:
            x_BSE = x_BSE * self.config.embedding_scale
        if self.config.position == "learned":
            x_BSE = x_BSE + self._learned(start, tokens_BS, positions_BS)
        rotation = self.rope.at(start, x_BSE, positions_BS) if self.rope else None
        local = self.local_rope.at(start, x_BSE, positions_BS) if self.local_rope else rotation
        context = Context(rotation, local, documents_BS, cache)
        for block in self.blocks:
            x_BSE = block(x_BSE, context)
        if cache is not None:
            cache.advance(tokens_BS.shape[1])
        return self.final_norm(x_BSE)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., E] to [..., V], soft-capped when the config says so."""
        logits = linear(hidden, self.head_weight)
        cap = self.config.logit_softcap
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def loss(
        self, tokens_BS: Tensor, targets_BS: Tensor, documents_BS: Tensor | None = None, *, z_loss: float = 0.0
    ) -> Losses:
        """Summed losses of `targets_BS` (-100: not counted). `z_loss` is the weight the caller will give `z_sum`: the
        fused loss computes its gradient in the forward pass, so it must know."""
        hidden = self(tokens_BS, documents_BS).flatten(0, 1)
        return Losses(
            *linear_cross_entropy(
                hidden, self.head_weight, targets_BS.flatten(), z_loss=z_loss, softcap=self.config.logit_softcap
            )
        )

    def _learned(self, start: int, tokens_BS: Tensor, positions_BS: Tensor | None) -> Tensor:
        end = start + tokens_BS.shape[1]
        if end > self.max_positions:
            raise ValueError(f"{end} positions: this model has learned {self.max_positions} (model.max_positions)")
        if positions_BS is None:
            return self.positions.weight[start:end]
        return self.positions(positions_BS)


def document_positions(documents_BS: Tensor) -> Tensor:
    """Each token's position inside its document [B, S] int64; a document begins where the number changes."""
    index_S = torch.arange(documents_BS.shape[1], device=documents_BS.device)
    begins_BS = torch.ones_like(documents_BS, dtype=torch.bool)
    begins_BS[:, 1:] = documents_BS[:, 1:] != documents_BS[:, :-1]
    return index_S - torch.where(begins_BS, index_S, 0).cummax(dim=1).values
