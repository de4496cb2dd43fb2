"""The decoder-only transformer: embedding, blocks, final norm, and the loss or logits over its vocabulary.

One class spans GPT-2, Llama, Mistral, Qwen, Gemma and DeepSeek by ModelConfig alone, and is also one stage of a
pipeline: the blocks it keeps, with or without the two ends. Build it under `torch.device("meta")`, spread it with
`parallelize`, give it storage with `megalite.parallel.parameter.materialize`. Dimensions: B batch, S sequence,
E hidden, V vocab.
"""

import copy
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from megalite_kernels import linear
from torch import Tensor, nn

from megalite.config.schema import ModelConfig, RopeConfig
from megalite.model.attention import Context
from megalite.model.block import Block
from megalite.model.cache import KVCache
from megalite.model.embedding import Embedding, Head, Positions
from megalite.model.multi_token import MultiToken, targets_ahead, tokens_ahead
from megalite.model.norm import make_norm
from megalite.model.rope import RopeTables
from megalite.model.size import rotary_dim
from megalite.parallel.context import ContextParallel
from megalite.parallel.tensor import ALONE, TensorParallel


class Losses(NamedTuple):
    """Sums over the valid targets, float32 or float64 scalars: negative log-likelihood, squared log-partition, and the
    negative log-likelihood of each module that looks further ahead."""

    nll_sum: Tensor
    z_sum: Tensor
    ahead_sums: tuple[Tensor, ...] = ()


class Transformer(nn.Module):
    """`max_positions` bounds learned positions only; RoPE tables grow with what is asked.

    The residual stream x is [B, S, E], or [tokens, E] where sequence parallelism spreads it over tp; S is this rank's
    part of the sequence under context parallelism.
    """

    def __init__(self, config: ModelConfig, vocab: int, max_positions: int) -> None:
        super().__init__()
        self.config, self.vocab, self.max_positions = config, vocab, max_positions
        self.embedding = Embedding(vocab, config.hidden, std=config.init_std)
        if config.position == "learned":
            self.positions = Positions(max_positions, config.hidden, std=config.init_std)
        self.blocks = nn.ModuleDict({str(layer): Block(config, layer) for layer in range(config.layers)})
        self.final_norm = make_norm(config)
        if not config.tied_embeddings:
            self.head = Head(vocab, config.hidden, std=config.init_std)
        self.mtp = nn.ModuleDict({str(depth): MultiToken(config, depth) for depth in range(1, config.mtp + 1)})
        rotated, theta = rotary_dim(config), config.rope.local_theta
        self.rope = RopeTables(config.rope, rotated) if config.position == "rope" else None
        self.local_rope = RopeTables(RopeConfig(theta=theta), rotated) if self.rope and theta else None
        self.first = self.last = True
        self.tp: TensorParallel = ALONE
        self.backend = "auto"
        self.cp: ContextParallel | None = None

    def stage(self, layers: Iterable[int], first: bool, last: bool) -> "Transformer":
        """The part of this model with those blocks, sharing its modules. An embedding that is tied, or that
        multi-token modules read, is part of both ends."""
        kept = copy.copy(self)
        nn.Module.__init__(kept)  # hooks of its own: shared, one stage's would run, and gather, for another
        kept.first, kept.last = first, last
        ends = {"embedding": first or (last and self._shares_embedding), "positions": first}
        ends |= {"final_norm": last, "head": last, "blocks": True, "mtp": True}
        kept._modules = {name: module for name, module in self._modules.items() if ends[name]}
        kept.mtp = self.mtp if last else nn.ModuleDict()
        kept.blocks = nn.ModuleDict({str(layer): self.blocks[str(layer)] for layer in layers})
        return kept

    @property
    def layers(self) -> dict[int, Block]:
        """Every block by its number; those of multi-token modules follow the last layer."""
        blocks: list[Any] = [*self.blocks.values(), *(module.block for module in self.mtp.values())]
        return {block.attention.layer: block for block in blocks}

    @property
    def _shares_embedding(self) -> bool:
        return self.config.tied_embeddings or self.config.mtp > 0

    @property
    def tied_weight(self) -> nn.Parameter | None:
        """The weight that both ends of the model use, where this stage is one of them."""
        return self.embedding.weight if self._shares_embedding and (self.first or self.last) else None

    @property
    def head_weight(self) -> Tensor:
        """weight[V, E] of the output projection: the embedding's own when tied."""
        return self.embedding.weight if self.config.tied_embeddings else self.head.weight

    def forward(
        self,
        tokens_BS: Tensor,
        documents_BS: Tensor | None = None,
        cache: KVCache | None = None,
        x: Tensor | None = None,
    ) -> Tensor:
        """The residual stream after this stage's blocks, and after the final norm at the end, in the parameters' dtype.

        Tokens and documents are whole rows on every rank. `documents_BS` numbers the documents inside each row, rising
        along it: attention stays inside a document and positions restart with it. With `cache`, tokens follow those the
        cache holds. `x`: the stage before's result; the first stage looks the tokens up instead.
        """
        assert documents_BS is None or cache is None, "a cache holds one document a row"
        if x is None:
            x = self._embed(tokens_BS, documents_BS, cache)
        context = self._context(tokens_BS, documents_BS, cache, x)
        for block in self.blocks.values():
            x = block(x, context)
        if cache is not None:
            cache.advance(tokens_BS.shape[1])
        return self.final_norm(x) if self.last else x

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., E] to [..., V], soft-capped when the config says so. Of a whole model, not of one rank's part."""
        assert self.tp.size == 1, "logits of a vocabulary shard are never joined; use loss"
        logits = linear(hidden, self.head_weight)
        cap = self.config.logit_softcap
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def loss(
        self,
        tokens_BS: Tensor,
        targets_BS: Tensor,
        documents_BS: Tensor | None = None,
        *,
        z_loss: float = 0.0,
        x: Tensor | None = None,
        ahead: bool = False,
    ) -> Losses:
        """Summed losses of `targets_BS` (-100: not counted), of this rank's part of the sequence. `z_loss` is the
        weight the caller will give `z_sum`: the fused loss computes its gradient in the forward pass, so it must know.
        `ahead`: also those of the multi-token modules.
        """
        hidden = self(tokens_BS, documents_BS, x=x)
        nll_sum, z_sum = self._cross_entropy(hidden, targets_BS, z_loss)
        sums: list[Tensor] = []
        if ahead and self.mtp:
            context = self._context(tokens_BS, documents_BS, None, hidden)
            for module in self.mtp.values():
                assert isinstance(module, MultiToken)
                hidden = module(hidden, self._looked_up(tokens_ahead(tokens_BS, module.depth)), context)
                targets = targets_ahead(targets_BS, documents_BS, module.depth)
                sums.append(self._cross_entropy(hidden, targets, 0.0)[0])
        return Losses(nll_sum, z_sum, tuple(sums))

    def _cross_entropy(self, hidden: Tensor, targets_BS: Tensor, z_loss: float) -> tuple[Tensor, Tensor]:
        targets_N = (targets_BS if self.cp is None else self.cp.take(targets_BS)).flatten()
        cap = self.config.logit_softcap
        return self.tp.cross_entropy(hidden, self.head_weight, targets_N, self.vocab, z_loss, cap, self.backend)

    def _context(self, tokens_BS: Tensor, documents_BS: Tensor | None, cache: KVCache | None, like: Tensor) -> Context:
        """What the layers share; tables in the dtype of `like` and where it is."""
        start, (batch, length) = 0 if cache is None else cache.length, tokens_BS.shape
        where = (start, batch, length, self._positions(tokens_BS, documents_BS), like.dtype, like.device)
        rotation = self.rope.at(*where) if self.rope else None
        local = self.local_rope.at(*where) if self.local_rope else rotation
        return Context(batch, tokens_BS, rotation, local, documents_BS, cache)

    def _positions(self, tokens_BS: Tensor, documents_BS: Tensor | None) -> Tensor | None:
        """Positions [B, S] of this rank's tokens; None: 0, 1, … from the start in every row."""
        if documents_BS is not None:
            whole = document_positions(documents_BS)
            return whole if self.cp is None else self.cp.take(whole)
        if self.cp is None:
            return None
        return self.cp.positions(tokens_BS.shape[1], tokens_BS.device).expand(tokens_BS.shape[0], -1)

    def _looked_up(self, tokens_BS: Tensor) -> Tensor:
        x: Tensor = self.embedding(tokens_BS if self.cp is None else self.cp.take(tokens_BS))
        return x if self.config.embedding_scale == 1.0 else x * self.config.embedding_scale

    def _embed(self, tokens_BS: Tensor, documents_BS: Tensor | None, cache: KVCache | None) -> Tensor:
        x = self._looked_up(tokens_BS)
        if self.config.position == "learned":
            start, (batch, length) = 0 if cache is None else cache.length, tokens_BS.shape
            positions_BS = self._positions(tokens_BS, documents_BS)
            if start + length > self.max_positions:
                raise ValueError(
                    f"{start + length} positions: this model has learned {self.max_positions} (model.max_positions)"
                )
            if positions_BS is None:
                positions_BS = torch.arange(start, start + length, device=tokens_BS.device).expand(batch, -1)
            x = x + self.positions(self.tp.tokens(positions_BS))
        return x


def document_positions(documents_BS: Tensor) -> Tensor:
    """Each token's position inside its document [B, S] int64; a document begins where the number changes."""
    index_S = torch.arange(documents_BS.shape[1], device=documents_BS.device)
    begins_BS = torch.ones_like(documents_BS, dtype=torch.bool)
    begins_BS[:, 1:] = documents_BS[:, 1:] != documents_BS[:, :-1]
    return index_S - torch.where(begins_BS, index_S, 0).cummax(dim=1).values
