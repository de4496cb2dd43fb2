"""What embedding, layers and the head cost on this machine, so that pipeline stages can be cut to equal work."""

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
) -> tuple[float, list[float], float]:
    """Seconds of a microbatch's forward and backward through the embedding, each layer, and final norm with the loss.

    Measured on this process with whole weights: tensor and context parallelism share out all alike. Layers differ where
    the first ones keep a dense MLP; of each kind one or two are measured.
    """
    tokens = torch.zeros(config.train.micro_batch, config.data.sequence_length, dtype=torch.int64, device=device)
    dense = config.model.moe.dense_layers
    kept = min(1, dense)
    with torch.device("meta"):
        small = replace(config.model, layers=kept + 2, moe=replace(config.model.moe, dense_layers=kept))
        model = Transformer(small, vocab, config.model.max_positions or config.data.sequence_length)
    materialize(model, device, config.train.seed, precision.compute)
    x = torch.zeros(*tokens.shape, config.model.hidden, dtype=precision.compute, device=device, requires_grad=True)

    def through(*layers: int) -> float:
        return _seconds(lambda: model.stage(list(layers), False, False)(tokens, x=x), device) / len(layers)

    embedding = _seconds(lambda: model.stage([], True, False)(tokens), device)
    costs = [through(0)] * dense if dense else []
    costs += [through(kept, kept + 1)] * (config.model.layers - dense)
    head = _seconds(lambda: _sum(model.stage([], False, True).loss(tokens, tokens, x=x, ahead=True)), device)
    return embedding, costs, head


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
