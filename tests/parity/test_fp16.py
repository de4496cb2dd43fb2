"""A whole float16 model against float64 on the same weights: with the loss scaled, gradients are as exact as float16's
eleven significant bits allow; without, what is small is lost."""

import copy

import pytest
from torch import Tensor

from megalite.model.transformer import Transformer
from tests.parity.test_bf16 import BOUND as BF16_BOUND
from tests.parity.test_bf16 import CASES, batch, model

BOUND = BF16_BOUND / 8
"""As derived there; each rounding errs by an eighth of bfloat16's."""
SHARE = 2.0**-14
"""Of the loss, as where one of many microbatches is a small part of the global batch."""


def gradients(model: Transformer, scale: float) -> dict[str, Tensor]:
    tokens, targets, _ = batch()
    (model.loss(tokens, targets).nll_sum / targets.numel() * SHARE * scale).backward()
    return {name: p.grad.double() / scale for name, p in model.named_parameters() if p.grad is not None}


def errors(case: str, scale: float) -> dict[str, float]:
    narrow = model(**CASES[case]).half()
    exact = gradients(copy.deepcopy(narrow).double(), 1.0)
    ours = gradients(narrow, scale)
    assert ours.keys() == exact.keys() == dict(narrow.named_parameters()).keys()
    return {name: ((ours[name] - exact[name]).norm() / exact[name].norm()).item() for name in exact}


@pytest.mark.parametrize("case", CASES)
def test_every_gradient_is_as_exact_as_float16_allows(case: str) -> None:
    found = errors(case, 2.0**16)
    assert max(found.values()) <= BOUND, sorted(found.items(), key=lambda item: -item[1])[:5]


def test_without_a_scale_gradients_are_lost() -> None:
    found = errors("untied", 1.0)
    assert min(found.values()) > 2 * BOUND and max(found.values()) > 0.1, found
