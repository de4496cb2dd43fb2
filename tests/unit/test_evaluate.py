"""Evaluation counts every target once, in batches that all have the rows that the layout was checked for."""

import math

import pytest
import torch

from megalite.comm import Communicator
from megalite.data.batch import Batch
from megalite.mesh import AXES, Mesh
from megalite.model.transformer import Losses
from megalite.train.evaluate import evaluate

LENGTH, VOCAB = 3, 7


class Rows:
    """Sample i has the targets i, i + 1, i + 2 (modulo VOCAB)."""

    name = "rows"

    def __init__(self, n_samples: int) -> None:
        self.n_samples = n_samples

    def batch(self, samples: list[int]) -> Batch:
        assert all(0 <= sample < self.n_samples for sample in samples)
        targets = (torch.tensor(samples)[:, None] + torch.arange(LENGTH)) % VOCAB
        return Batch(torch.zeros_like(targets), targets, None)


@pytest.mark.parametrize(("n_samples", "micro_batch", "most"), [(5, 2, 0), (1, 4, 0), (6, 2, 3), (4, 2, 0)])
def test_every_target_counts_once_and_every_batch_is_whole(n_samples: int, micro_batch: int, most: int) -> None:
    rows = []

    def losses_of(batch: Batch) -> Losses:
        rows.append(len(batch.targets))
        counted = batch.targets[batch.targets >= 0]
        return Losses(counted.double().sum(), torch.zeros(()))

    comm = Communicator(Mesh(dict.fromkeys(AXES, 1)))
    found = evaluate(losses_of, Rows(n_samples), torch.arange(VOCAB), comm, micro_batch, torch.device("cpu"), most)
    seen = [(i + j) % VOCAB for i in range(min(n_samples, most or n_samples)) for j in range(LENGTH)]
    assert found.tokens == len(seen)
    assert found.loss == pytest.approx(sum(seen) / len(seen))
    assert found.bits_per_byte == pytest.approx(1 / math.log(2)), "the loss of a token is its bytes here"
    assert set(rows) == {micro_batch}
