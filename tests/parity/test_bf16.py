"""A whole bf16 model against float64 on the same weights: every parameter's gradient, over thousands of tokens."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megalite.config.schema import ModelConfig
from megalite.model import embedding
from megalite.model.transformer import Transformer
from megalite.parallel import tensor
from megalite.parallel.parameter import materialize

BOUND = 2e-2
"""Largest ‖gradient - exact‖ / ‖exact‖ of a parameter.

A rounding to bf16 (8 significant bits) errs by up to 2⁻⁸, by about 1.6e-3 in the root mean square. Some fifty lie on
the way through these two blocks, forward and back; being independent they add as squares: 1.6e-3 · √50 = 1.1e-2. Sums
over tokens happen in float32 and add nothing, as long as each is rounded once: that is what the bound is to prove. A
sum kept in bf16 stops growing at 256 times its terms.
"""
VOCAB, BATCH, LENGTH = 257, 8, 512


def model(**changes: object) -> Transformer:
    config = ModelConfig(layers=2, hidden=64, heads=4, kv_heads=2, ffn=128, init_std=0.1, **changes)  # type: ignore[arg-type]
    with torch.device("meta"):
        built = Transformer(config, VOCAB, LENGTH)
    materialize(built, torch.device("cpu"), 0, torch.bfloat16)
    return built


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Bytes with a text's skew (the commonest is three in ten), the targets, and documents of four tokens."""
    generator = torch.Generator().manual_seed(0)
    frequency = (torch.arange(VOCAB) + 1.0) ** -1.3
    text = torch.multinomial(frequency, BATCH * (LENGTH + 1), replacement=True, generator=generator)
    tokens_BS = text.view(BATCH, LENGTH + 1)
    documents_BS = (torch.arange(LENGTH) // 4).expand(BATCH, LENGTH)
    return tokens_BS[:, :-1], tokens_BS[:, 1:], documents_BS


def gradients(model: Transformer, documents: bool) -> dict[str, Tensor]:
    tokens, targets, documents_BS = batch()
    losses = model.loss(tokens, targets, documents_BS if documents else None)
    (losses.nll_sum / targets.numel()).backward()
    return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}


def errors(model: Transformer, documents: bool) -> dict[str, float]:
    exact = gradients(copy.deepcopy(model).double(), documents)
    ours = gradients(model, documents)
    assert ours.keys() == exact.keys() == dict(model.named_parameters()).keys()
    return {name: ((ours[name] - exact[name]).norm() / exact[name].norm()).item() for name in exact}


CASES: dict[str, dict[str, object]] = {
    "tied": {"tied_embeddings": True},
    "untied": {"tied_embeddings": False},
    "learned positions": {"tied_embeddings": False, "position": "learned"},
}


@pytest.mark.parametrize("case", CASES)
def test_every_gradient_is_as_exact_as_bf16_allows(case: str) -> None:
    found = errors(model(**CASES[case]), documents=case == "learned positions")
    assert max(found.values()) <= BOUND, sorted(found.items(), key=lambda item: -item[1])[:5]


@pytest.mark.parametrize("case", CASES)
def test_the_bound_catches_a_sum_in_bf16(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for user in (embedding, tensor):  # learned positions, and tokens
        monkeypatch.setattr(user, "embedding", F.embedding)
    found = errors(model(**CASES[case]), documents=case == "learned positions")
    tables = [name for name in found if name in ("embedding.weight", "positions.weight")]
    assert min(found[name] for name in tables) > 1.5 * BOUND, found
