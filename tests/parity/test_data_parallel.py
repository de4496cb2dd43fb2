"""Data parallelism against one process, in float64: loss, every gradient, the global norm, weights after SGD and AdamW.

Ranks see unequal numbers of valid tokens, one microbatch none at all: only the global count normalises rightly.
"""

import pytest
import torch

from megalite.comm import Call, Communicator
from megalite.config.schema import ModelConfig, OptimConfig
from megalite.mesh import Mesh
from megalite.model.transformer import Transformer
from megalite.optim.optimizer import Optimizer
from megalite.parallel.data import Gradients
from megalite.parallel.parameter import materialize
from megalite.world import join, world_from_environment
from tests.ranks import run_ranks

VOCAB, SEQUENCE, SAMPLES = 31, 12, 8
MODEL = ModelConfig(layers=2, hidden=16, heads=4, kv_heads=2, ffn=24, qk_norm=True, tied_embeddings=True)


def samples() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(VOCAB, (SAMPLES, SEQUENCE), generator=generator)
    targets = torch.randint(VOCAB, (SAMPLES, SEQUENCE), generator=generator)
    for row in range(SAMPLES):
        targets[row, : row * 2] = -100
    targets[5] = -100
    return tokens, targets


def train(
    optim: OptimConfig,
    steps: int,
    bucket_bytes: float,
    zero: int = 0,
    ordered: bool = False,
    compute: torch.dtype = torch.float64,
    main: torch.dtype = torch.float64,
) -> dict[str, object]:
    """Steps over the same global batch, microbatches of one sample; what a rank ends up with."""
    world = world_from_environment()
    join(world)
    calls: list[Call] = []
    comm = Communicator(Mesh({"pp": 1, "dp": world.size, "cp": 1, "tp": 1}, world.rank), calls.append, ordered=ordered)
    with torch.device("meta"):
        model = Transformer(MODEL, VOCAB, SEQUENCE)
    materialize(model, torch.device("cpu"), seed=3, dtype=compute)
    gradients = Gradients([model], comm, main, bucket_bytes, zero)
    optimizer = Optimizer([model], gradients, optim, steps)
    tokens, targets = samples()
    valid = float((targets >= 0).sum())
    mine = list(range(world.rank, SAMPLES, world.size))
    losses, norms, first = [], [], {}
    for step in range(1, steps + 1):
        gradients.zero()
        terms = torch.zeros(SAMPLES, dtype=torch.float64)
        for row in mine:
            loss = model.loss(tokens[row : row + 1], targets[row : row + 1]).nll_sum / valid
            with gradients.accumulating(0, last=row == mine[-1]):
                loss.backward()
            terms[row] = loss.detach()
        gradients.finish()
        comm.all_reduce(terms, "dp")
        norm = gradients.global_norm().item()
        if step == 1:
            first = {name: gradients.full(p).clone() for name, p in model.named_parameters()}
        if optim.clip and norm > optim.clip:
            gradients.scale(optim.clip / norm)
        optimizer.step(step)
        losses.append(sum(terms.tolist()))
        norms.append(norm)
    optimizer.wait()
    state = sum(held.bytes for held in optimizer.state_tensors().values())
    return {
        "losses": losses,
        "norms": norms,
        "gradients": first,
        "weights": {name: p.detach().clone() for name, p in model.named_parameters()},
        "calls": len(calls),
        "state_bytes": state,
        "gradient_bytes": gradients.kept_bytes(),
    }


OPTIMIZERS = {
    "sgd": OptimConfig(name="sgd", lr=0.1, momentum=0.9, clip=0.0, schedule="constant"),
    "adamw": OptimConfig(name="adamw", lr=0.01, clip=0.05, schedule="constant"),
    "muon": OptimConfig(name="muon", lr=0.01, clip=0.0, schedule="constant"),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("zero", [0, 1, 2])
@pytest.mark.parametrize("world", [2, 4])
def test_same_as_one_process(world: int, zero: int, name: str) -> None:
    alone = run_ranks(1, train, OPTIMIZERS[name], 5, 2000.0)[0]
    for rank in run_ranks(world, train, OPTIMIZERS[name], 5, 2000.0, zero):
        torch.testing.assert_close(rank["losses"], alone["losses"], rtol=1e-11, atol=0)
        torch.testing.assert_close(rank["norms"], alone["norms"], rtol=1e-11, atol=0)
        for kind, bound in (("gradients", 1e-9), ("weights", 1e-8)):
            for key, expected in alone[kind].items():
                error = torch.linalg.vector_norm(rank[kind][key] - expected) / torch.linalg.vector_norm(expected)
                assert error <= bound, f"{kind} of {key}: relative error {error:.2e}"


def test_two_ranks_do_not_depend_on_buckets() -> None:
    """At two ranks a sum has one order, so bucket sizes must not change a bit."""
    small, large = (run_ranks(2, train, OPTIMIZERS["adamw"], 3, size)[0] for size in (1.0, 1e9))
    assert small["calls"] > large["calls"] > 0
    assert all(torch.equal(small["weights"][key], value) for key, value in large["weights"].items())


def test_gradient_norm_counts_each_element_once() -> None:
    """The tied embedding is used twice and must enter the norm once: compare with a norm over plain autograd."""
    with torch.device("meta"):
        model = Transformer(MODEL, VOCAB, SEQUENCE)
    materialize(model, torch.device("cpu"), seed=3, dtype=torch.float64)
    tokens, targets = samples()
    loss = model.loss(tokens, targets).nll_sum / (targets >= 0).sum()
    plain = torch.autograd.grad(loss, list(model.parameters()))
    expected = torch.cat([g.flatten() for g in plain]).norm().item()
    assert abs(run_ranks(2, train, OPTIMIZERS["sgd"], 1, 2000.0)[1]["norms"][0] - expected) <= 1e-11 * expected
