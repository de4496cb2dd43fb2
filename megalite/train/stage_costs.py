"""What embedding, a layer and the head cost on this machine, so that pipeline stages can be cut to equal work."""

import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from megalite.config.schema import Config
from megalite.model.transformer import Losses, Transformer
from megalite.parallel.parameter import materialize
from megalite.precision import Precision

REPEATS = 3


def measured_costs(
    config: Config, vocab: int, precision: Precision, device: torch.device
) -> tuple[float, float, float]:
    """Seconds of a microbatch's forward and backward through the embedding, one layer, and final norm with the loss.

    Measured on this process with whole weights: tensor and context parallelism share out all three alike.
    """
    tokens = torch.zeros(config.train.micro_batch, config.data.sequence_length, dtype=torch.int64, device=device)
    with torch.device("meta"):
        small = replace(config.model, layers=2)
        model = Transformer(small, vocab, config.model.max_positions or config.data.sequence_length)
    materialize(model, device, config.train.seed, precision.compute)
    x = torch.zeros(*tokens.shape, config.model.hidden, dtype=precision.compute, device=device, requires_grad=True)
    embedding = _seconds(lambda: model.stage([], True, False)(tokens), device)
    layers = _seconds(lambda: model.stage([0, 1], False, False)(tokens, x=x), device)
    head = _seconds(lambda: _sum(model.stage([], False, True).loss(tokens, tokens, x=x, ahead=True)), device)
    return embedding, layers / 2, head


def _sum(losses: Losses) -> Tensor:
    return sum(losses.ahead_sums, losses.nll_sum)


def _seconds(forward: Callable[[], Tensor], device: torch.device) -> float:
    """The fastest of a few runs there and back."""
    best = float("inf")
    for _ in range(REPEATS):
        started = time.perf_counter()
        forward().sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return best
