"""Multi-token prediction (arXiv:2412.19437, section 2.2): modules behind the last layer that look further ahead.

The module of depth d joins, at position i, what the depth before knows there with the token d places on, and predicts
the one after that. Embedding and head are the model's own. A target counts where position i + d is in the same row and
the same document as i, and the model's own loss would count it there.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalite.config.schema import ModelConfig
from megalite.data.batch import NOT_COUNTED, Batch
from megalite.model.attention import Context
from megalite.model.block import Block
from megalite.model.linear import Linear
from megalite.model.norm import make_norm


class MultiToken(nn.Module):
    """The module of `depth` ≥ 1; its block is like the last layer and numbered on behind it.

    projection[E, 2E] takes the two norms' outputs, the hidden state's first. Every tp rank has it whole, for its tokens
    of the residual stream.
    """

    def __init__(self, config: ModelConfig, depth: int) -> None:
        super().__init__()
        self.depth = depth
        self.hidden_norm, self.token_norm = make_norm(config), make_norm(config)
        self.projection = Linear(2 * config.hidden, config.hidden, split=None, std=config.init_std, bias=False)
        self.block = Block(config, config.layers + depth - 1)
        self.final_norm = make_norm(config)

    def forward(self, hidden: Tensor, embedded: Tensor, context: Context) -> Tensor:
        """`hidden`: of the depth before, behind its final norm; `embedded`: the tokens `depth` places on; both, and the
        result, as the residual stream."""
        both = torch.cat((self.hidden_norm(hidden), self.token_norm(embedded)), dim=-1)
        x: Tensor = self.final_norm(self.block(self.projection(both), context))
        return x


def tokens_ahead(tokens_BS: Tensor, depth: int) -> Tensor:
    """The token `depth` places on in the row; behind its end 0, of which no target comes."""
    return _moved(tokens_BS, depth, 0)


def targets_ahead(targets_BS: Tensor, documents_BS: Tensor | None, depth: int) -> Tensor:
    """The target `depth` places on, -100 where that is in another document or behind the end of the row."""
    moved = _moved(targets_BS, depth, NOT_COUNTED)
    if documents_BS is None:
        return moved
    return moved.masked_fill(_moved(documents_BS, depth, -1) != documents_BS, NOT_COUNTED)


def counted(batch: Batch, depths: int) -> Tensor:
    """Targets that count at depth 0 (the model's own) to `depths`, float64 [1 + depths]."""
    ahead = [targets_ahead(batch.targets, batch.documents, depth) for depth in range(1 + depths)]
    return torch.stack([(targets != NOT_COUNTED).sum() for targets in ahead]).double()


def _moved(x_BS: Tensor, depth: int, behind: int) -> Tensor:
    return F.pad(x_BS[:, depth:], (0, min(depth, x_BS.shape[1])), value=behind)
