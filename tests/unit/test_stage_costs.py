"""Costs by which pipeline stages are cut: every kind of layer has its own."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from megalite.config.schema import Config, ModelConfig, MoEConfig
from megalite.precision import PRESETS
from megalite.train import stage_costs


def operations(forward: Callable[[], Tensor], device: torch.device) -> float:
    """Instead of seconds: what a machine counts is the same every time."""
    with FlopCounterMode(display=False) as counter:
        forward().sum().backward()
    return float(counter.get_total_flops())


@pytest.mark.parametrize("dense_layers", [0, 2, 3])
def test_layers_with_a_dense_mlp_have_their_own_cost(monkeypatch: pytest.MonkeyPatch, dense_layers: int) -> None:
    monkeypatch.setattr(stage_costs, "_seconds", operations)
    config = Config()
    config.data.sequence_length, config.train.micro_batch = 16, 2
    moe = MoEConfig(experts=4, top_k=1, ffn=8, normalize=False, dense_layers=dense_layers)
    config.model = ModelConfig(layers=4, hidden=32, heads=4, ffn=256, moe=moe)
    _, costs, _ = stage_costs.measured_costs(config, 50, PRESETS["fp32"], torch.device("cpu"))
    of_tokens = 3 * 2 * 32 * 32  # forward, and back by input and weight; 32 tokens, 32 hidden
    assert len(costs) == 4 and len(set(costs[:dense_layers])) <= 1 and len(set(costs[dense_layers:])) == 1
    if dense_layers:  # the experts' products are inside an op that is not counted
        assert costs[0] - costs[-1] == of_tokens * (3 * 256 - 4)
