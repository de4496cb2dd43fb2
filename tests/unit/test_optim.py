"""Schedules against closed forms, update rules against torch and plain formulas, groups by declared role."""

import dataclasses
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megalite_kernels import newton_schulz

from megalite.comm import Communicator
from megalite.config.schema import ModelConfig, OptimConfig
from megalite.mesh import Mesh
from megalite.model.transformer import Transformer
from megalite.optim.compact import Compact
from megalite.optim.exchange import share_out
from megalite.optim.optimizer import Optimizer, rule_for
from megalite.optim.schedule import lr_share
from megalite.parallel.boxes import Held
from megalite.parallel.data import Gradients
from megalite.parallel.parameter import declaration, materialize
from megalite.precision import Precision

ALONE = Communicator(Mesh({"pp": 1, "dp": 1, "cp": 1, "tp": 1}))


def test_schedules_at_their_landmarks() -> None:
    for name, middle in (("cosine", 0.1 + 0.9 * 0.5), ("linear", 0.55), ("constant", 1.0)):
        optim = OptimConfig(schedule=name, warmup_steps=10, min_lr_ratio=0.1)
        shares = [lr_share(optim, step, 110) for step in range(1, 111)]
        assert shares[0] == 0.1 and shares[9] == 1.0
        assert math.isclose(shares[59], middle)
        assert math.isclose(shares[-1], 1.0 if name == "constant" else 0.1)
    wsd = OptimConfig(schedule="wsd", warmup_steps=5, decay_steps=20, min_lr_ratio=0.0)
    assert [lr_share(wsd, step, 100) for step in (5, 80, 90, 100)] == [1.0, 1.0, 0.5, 0.0]
    root = OptimConfig(schedule="inverse_sqrt", warmup_steps=4, min_lr_ratio=0.2)
    assert [lr_share(root, step, 1000) for step in (1, 4, 16, 64, 400)] == [0.25, 1.0, 0.5, 0.25, 0.2]


@given(
    st.sampled_from(["cosine", "wsd", "linear", "inverse_sqrt", "constant"]),
    st.integers(1, 400),
    st.integers(0, 400),
    st.integers(0, 400),
    st.floats(0, 1),
)
def test_schedules_stay_in_bounds(name: str, steps: int, warmup: int, decay: int, ratio: float) -> None:
    optim = OptimConfig(
        schedule=name, warmup_steps=min(warmup, steps), decay_steps=min(decay, steps), min_lr_ratio=ratio
    )
    shares = [lr_share(optim, step, steps) for step in range(1, steps + 1)]
    assert all(0 <= share <= 1 for share in shares)
    after = shares[optim.warmup_steps :]
    assert all(a >= b - 1e-12 for a, b in pairwise(after)), "after warm-up it never rises"


def make(
    optim: OptimConfig, compute: torch.dtype = torch.float64, states: str = "fp64"
) -> tuple[Transformer, Gradients, Optimizer]:
    config = ModelConfig(layers=1, hidden=16, heads=2, ffn=24, norm="layernorm", qkv_bias=True, position="learned")
    with torch.device("meta"):
        model = Transformer(config, 20, 8)
    materialize(model, torch.device("cpu"), 1, compute)
    main = torch.float64 if compute == torch.float64 else torch.float32
    gradients = Gradients([model], ALONE, main, 1e9)
    precision = Precision("", compute, main, main, main, states)
    return model, gradients, Optimizer([model], gradients, optim, 10, precision if states != "fp64" else None)


def copied(tensors: dict[str, Held]) -> dict[str, Held]:
    return {
        key: dataclasses.replace(held, parts=tuple((box, values.clone()) for box, values in held.parts))
        for key, held in tensors.items()
    }


def fill(model: Transformer, gradients: Gradients, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        view = gradients.of(parameter)
        view.copy_(torch.randn(view.shape, generator=generator, dtype=torch.float64))


def test_adamw_is_the_textbook_formula() -> None:
    """Loshchilov & Hutter 2019, algorithm 2, written out for one tensor."""
    optim = OptimConfig(lr=0.01, schedule="constant", weight_decay=0.1, beta1=0.9, beta2=0.95, eps=1e-8)
    model, gradients, optimizer = make(optim)
    parameter = model.get_parameter("blocks.0.mlp.down.weight")
    w, m, v = parameter.detach().clone(), torch.zeros(parameter.shape), torch.zeros(parameter.shape)
    for step in range(1, 4):
        fill(model, gradients, step)
        g = gradients.of(parameter).clone()
        optimizer.step(step)
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        w = w - 0.01 * 0.1 * w
        w = w - 0.01 * (m / (1 - 0.9**step)) / ((v / (1 - 0.95**step)).sqrt() + 1e-8)
        torch.testing.assert_close(parameter.detach(), w, rtol=1e-9, atol=1e-12)


def test_sgd_decays_weights_not_gradients() -> None:
    model, gradients, optimizer = make(
        OptimConfig(name="sgd", lr=0.1, momentum=0.9, weight_decay=0.5, schedule="constant")
    )
    parameter = model.get_parameter("blocks.0.mlp.down.weight")
    w, m = parameter.detach().clone(), torch.zeros(parameter.shape)
    for step in range(1, 4):
        fill(model, gradients, step)
        m = 0.9 * m + gradients.of(parameter)
        optimizer.step(step)
        w = w * (1 - 0.1 * 0.5) - 0.1 * m
        torch.testing.assert_close(parameter.detach(), w, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["adamw", "sgd", "muon"])
def test_plain_moments_in_the_compact_rules_are_the_usual_rules(name: str) -> None:
    """float64 moments, kept by the rules that may keep fewer bits."""
    usual, compact = (make(OptimConfig(name=name, lr=0.01, schedule="constant"), states=s) for s in ("fp64", "fp32"))
    for rule in compact[2].rules:
        assert isinstance(rule, Compact)
        for piece, state in rule.moments.state.items():
            for key in state.keys() - {"step"}:
                state[key] = rule.state[rule.weights[piece]][key] = state[key].double()
    for step in range(1, 4):
        for model, gradients, optimizer in (usual, compact):
            fill(model, gradients, step)
            optimizer.step(step)
    for ours, theirs in zip(compact[0].parameters(), usual[0].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)


def test_roles_decide_decay_and_rule() -> None:
    muon = OptimConfig(name="muon", lr=1.0, embedding_lr=0.5, weight_decay=0.1)
    assert (rule_for("matrix", muon).muon, rule_for("matrix", muon).lr) == (True, 1.0)
    for role in ("embedding", "head", "position"):
        assert (rule_for(role, muon).muon, rule_for(role, muon).lr, rule_for(role, muon).weight_decay) == (
            False,
            0.5,
            0.1,
        )
    for role in ("norm", "bias"):
        assert rule_for(role, OptimConfig()).weight_decay == 0.0
    assert rule_for("embedding", OptimConfig(decay_embeddings=False)).weight_decay == 0.0
    model, _, optimizer = make(muon)
    where = {p.data_ptr(): p for p in model.parameters()}
    covered = [where[weight.data_ptr()] for rule in optimizer.rules for weight in rule.param_groups[0]["params"]]
    assert set(covered) == set(model.parameters()) and len(covered) == len(set(covered))
    (muons,) = [rule for rule in optimizer.rules if type(rule).__name__ == "Muon"]
    by_muon = {where[weight.data_ptr()] for weight in muons.param_groups[0]["params"]}
    assert by_muon == {p for p in model.parameters() if declaration(p).role == "matrix"}


def test_bf16_model_has_float32_main_weights() -> None:
    """A thousand updates below bf16's resolution must add up."""
    model, gradients, optimizer = make(
        OptimConfig(name="sgd", lr=1.0, momentum=0.0, schedule="constant"), torch.bfloat16
    )
    parameter = model.final_norm.weight
    before = parameter.detach().clone()
    for _ in range(1000):
        gradients.zero()
        gradients.of(parameter).fill_(1e-4)
        optimizer.step(1)
    moved = (before.float() - parameter.detach().float()).mean().item()
    assert parameter.dtype == torch.bfloat16 and abs(moved - 0.1) < 0.005


@pytest.mark.parametrize("shape", [(8, 8), (24, 8), (8, 24)])
def test_newton_schulz_flattens_singular_values(shape: tuple[int, int]) -> None:
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    found = newton_schulz(matrix)
    singular = torch.linalg.svdvals(found)
    assert singular.min() > 0.3 and singular.max() < 1.3
    assert torch.nn.functional.cosine_similarity(found.flatten(), (u @ v).flatten(), dim=0) > 0.95


@given(st.lists(st.tuples(st.integers(1, 64), st.integers(1, 64)), min_size=1, max_size=30), st.integers(1, 8))
def test_muon_shares_out_evenly(shapes: list[tuple[int, int]], ranks: int) -> None:
    owners = share_out([torch.Size(shape) for shape in shapes], ranks)
    cost = [min(s) ** 2 * max(s) for s in shapes]
    load = [sum(c for c, owner in zip(cost, owners, strict=True) if owner == rank) for rank in range(ranks)]
    assert max(load) <= sum(cost) / ranks + max(cost)


@pytest.mark.parametrize("states", ["fp64", "bf16", "fp8", "int8"])
def test_state_round_trips(states: str) -> None:
    for name in ("adamw", "muon", "sgd"):
        model, gradients, optimizer = make(OptimConfig(name=name), states=states)
        fill(model, gradients, 1)
        optimizer.step(1)
        saved = copied(optimizer.state_tensors())
        other, other_gradients, restored = make(OptimConfig(name=name), states=states)
        assert restored.state_tensors().keys() == saved.keys()
        restored.load_state_tensors(saved)
        for one, two in ((gradients, model), (other_gradients, other)):
            fill(two, one, 2)
        optimizer.step(2)
        restored.step(2)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
