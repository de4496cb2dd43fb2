"""The sizes an op is measured at: those of a model in configs/model, changed by the user's own, and what follows.

FLOPs are those of matrix products, a multiply-add being two; bytes are those that must move once between memory and
processor, however often an implementation really moves them. Neither depends on who computes.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megalite.config.load import load_config
from megalite.config.words import choices
from megalite.errors import UserError
from megalite.model.size import head_dim, kv_heads


@dataclass(frozen=True)
class Shape:
    """`name`: the model. `documents`: equal ones packed into a sequence. `recipe`: of FP8 scales."""

    name: str
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    ffn: int
    vocab: int
    window: int | None = None
    softcap: float | None = None
    logit_softcap: float | None = None
    sequence_length: int = 1
    batch: int = 1
    causal: bool = True
    documents: int = 1
    experts: int = 8
    top_k: int = 2
    recipe: str = "blockwise_1x128"

    @property
    def tokens(self) -> int:
        return self.batch * self.sequence_length

    def capped(self, limits: Mapping[str, int]) -> "Shape":
        """With each of the named sizes at most so large."""
        lower: dict[str, Any] = {key: limit for key, limit in limits.items() if (getattr(self, key) or 0) > limit}
        return dataclasses.replace(self, **lower)

    def document_lengths(self) -> list[int]:
        ends = [self.sequence_length * i // self.documents for i in range(self.documents + 1)]
        return [end - start for start, end in itertools.pairwise(ends)]

    def visible_pairs(self) -> int:
        """Pairs of a query and a key that it sees, in one sequence and head."""
        total = 0
        for length in self.document_lengths():
            window = min(self.window or length, length)
            total += window * (window + 1) // 2 + (length - window) * window
            total += 0 if self.causal else length * (length - 1) // 2
        return total


def model_shape(name: str, given: Mapping[str, Any]) -> Shape:
    """The sizes of configs/model/`name`.yaml, with those `given` that are not None in their place.

    A window or softcap of 0 turns the model's off. Raises UserError.
    """
    legal = choices("model", None)
    if name not in legal:
        raise UserError(f"shapes={name}: no such model; legal: {', '.join(legal)}")
    config = load_config(f"model={name}")
    model = config.model
    shape = Shape(
        name, model.heads, kv_heads(model), head_dim(model), model.hidden, model.ffn, model.vocab or config.data.vocab,
        model.window, model.attention_softcap, model.logit_softcap,
    )  # fmt: skip
    changes = {key: value for key, value in given.items() if value is not None}
    if "softcap" in changes:
        changes["logit_softcap"] = changes["softcap"]
    changes |= {key: None for key in ("window", "softcap", "logit_softcap") if changes.get(key) == 0}
    if "heads" in changes and "kv_heads" not in changes:
        changes["kv_heads"] = changes["heads"]
    shape = dataclasses.replace(shape, **changes)
    wrong = []
    if shape.heads % shape.kv_heads:
        wrong.append(f"kv_heads={shape.kv_heads}: does not divide heads={shape.heads}; choose a divisor of it")
    if shape.head_dim % 2:
        wrong.append(f"head_dim={shape.head_dim}: heads are turned in pairs; choose an even number")
    if shape.top_k > shape.experts:
        wrong.append(f"top_k={shape.top_k}: there are {shape.experts} experts; choose at most {shape.experts}")
    if wrong:
        raise UserError(*wrong)
    return shape


@dataclass(frozen=True)
class Cost:
    flops: float
    bytes: float

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


NOTHING = Cost(0.0, 0.0)


def attention_cost(s: Shape, item: int) -> tuple[Cost, Cost]:
    """Forward, backward: 2 and 5 products of queries by keys (arXiv:2307.08691), over the visible pairs alone."""
    product = 2.0 * s.batch * s.heads * s.head_dim * s.visible_pairs()
    queries, keys, lse = s.tokens * s.heads * s.head_dim, s.tokens * s.kv_heads * s.head_dim, 4 * s.tokens * s.heads
    forward = Cost(2 * product, item * (2 * queries + 2 * keys) + lse)  # q, o; k, v
    return forward, Cost(5 * product, item * (4 * queries + 4 * keys) + lse)  # q, o, do, dq; k, v, dk, dv


def norm_cost(s: Shape, item: int, vectors: int) -> tuple[Cost, Cost]:
    """`vectors`: learned ones of a row's width, 1 for RMSNorm and 2 for LayerNorm."""
    rows = s.tokens * s.hidden
    return Cost(0, item * (2 * rows + vectors * s.hidden)), Cost(0, item * (3 * rows + (1 + vectors) * s.hidden))


def rope_cost(s: Shape, item: int) -> tuple[Cost, Cost]:
    moved = item * 2 * s.tokens * (s.heads + s.kv_heads) * s.head_dim
    each = Cost(0, moved + 4 * 2 * s.sequence_length * s.head_dim)  # and both tables
    return each, each


def swiglu_cost(s: Shape, item: int) -> tuple[Cost, Cost]:
    rows = s.tokens * s.ffn
    return Cost(0, item * 3 * rows), Cost(0, item * 5 * rows)


def cross_entropy_cost(s: Shape, item: int) -> tuple[Cost, Cost]:
    product, moved = 2.0 * s.tokens * s.hidden * s.vocab, item * (s.tokens + s.vocab) * s.hidden
    return Cost(product, moved + 8 * s.tokens), Cost(2 * product, 2 * moved + 8 * s.tokens)


def grouped_gemm_cost(s: Shape, item: int) -> tuple[Cost, Cost]:
    rows, weights = s.tokens * s.top_k, s.experts * s.hidden * s.ffn
    product = 2.0 * rows * s.hidden * s.ffn
    forward = Cost(product, item * (rows * (s.hidden + s.ffn) + weights))
    return forward, Cost(2 * product, item * (rows * (2 * s.hidden + s.ffn) + 2 * weights))


def moe_permute_cost(s: Shape, item: int) -> tuple[Cost, Cost]:
    """The choice [N, K] in int64, each slot's row in int32, and the rows."""
    slots = s.tokens * s.top_k
    rows = item * (s.tokens + slots) * s.hidden
    return Cost(0, rows + 12 * slots), Cost(0, rows + 4 * slots)


def quantize_cost(s: Shape, item: int, scale_bytes: int) -> tuple[Cost, Cost]:
    return Cost(0, s.tokens * s.hidden * (item + 1) + scale_bytes), NOTHING


def block_shapes(s: Shape) -> list[tuple[int, ...]]:
    """The weights of a block: query, key, value, output, gate, up, down, two norms."""
    width, keys = s.heads * s.head_dim, s.kv_heads * s.head_dim
    attention = [(width, s.hidden), (keys, s.hidden), (keys, s.hidden), (s.hidden, width)]
    return [*attention, (s.ffn, s.hidden), (s.ffn, s.hidden), (s.hidden, s.ffn), (s.hidden,), (s.hidden,)]


def adamw_cost(s: Shape, item: int) -> tuple[Cost, Cost]:
    """Read weight, gradient and two moments, write weight and moments."""
    return Cost(0, 7 * item * sum(map(math.prod, block_shapes(s)))), NOTHING


def newton_schulz_cost(s: Shape, item: int, steps: int) -> tuple[Cost, Cost]:
    """A step: X Xᵀ, its square, and that times X; for a matrix [m, n], m the smaller."""
    m, n = sorted((s.hidden, s.ffn))
    return Cost(steps * (4.0 * m * m * n + 2.0 * m**3), item * 2 * m * n), NOTHING
