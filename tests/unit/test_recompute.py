"""What backward computes again: the bits of what was kept, freed when it is over, and no other course unnoticed."""

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megalite import Trainer, load_config
from megalite.model import recompute
from megalite.model.norm import RMSNorm
from megalite.model.recompute import HostMemory, Keeping
from tests.tiny_job import tiny_job


def inner(x: Tensor, weight: Tensor, power: int) -> Tensor:
    return (x @ weight).sigmoid().exp() ** power


def outer(again: bool) -> Callable[..., Tensor]:
    return lambda x, weight, power: recompute.run(again, inner, x, weight, power).tanh() @ weight


def gradients(call: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, weight = (torch.randn(4, 4, generator=generator, requires_grad=True) for _ in range(2))
    y = call(x, weight)
    return [y.detach(), *torch.autograd.grad(y.sum(), [x, weight])]


@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize("offload", [False, True])
def test_the_bits_of_what_was_kept(within: bool, offload: bool) -> None:
    """Also a call inside a call, and with what is kept in host memory."""
    plain = gradients(lambda x, w: outer(False)(x, w, 2))
    again = gradients(lambda x, w: Keeping(again=True, offload=offload).run(outer(within), x, w, 2))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_backward_twice() -> None:
    x = torch.ones(3, requires_grad=True)
    y = recompute.run(True, lambda x: x.exp().sin(), x).sum()
    first, second = (torch.autograd.grad(y, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second) and first.count_nonzero() == 3


def test_only_arguments_are_kept() -> None:
    kept: list[tuple[int, ...]] = []

    class Seen(HostMemory):
        def __init__(self) -> None:
            torch.autograd.graph.saved_tensors_hooks.__init__(self, self.note, lambda x: x)

        def note(self, tensor: Tensor) -> Tensor:
            kept.append(tuple(tensor.shape))
            return tensor

    with Seen():
        recompute.run(True, lambda x: torch.cat([x, x]).exp().sin(), torch.ones(3, requires_grad=True))
    assert kept == [(3,)]


def test_another_course_is_noticed() -> None:
    lengths = iter((3, 2))
    x = torch.ones(4, requires_grad=True)
    y = recompute.run(True, lambda x: x[: next(lengths)].exp().sum(), x)
    with pytest.raises(AssertionError, match="another course"):
        y.backward()


def normed(norms: bool, sublayer: Callable[..., Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    norm = RMSNorm(4, 1e-5)
    torch.nn.init.constant_(norm.weight, 1.5)
    keeping = Keeping(norms=norms)
    return lambda x, w: x + keeping.normed(norm, sublayer, x, w)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "sublayer",
    [
        lambda y, w: y @ w,
        lambda y, w: (y @ w).exp() * y.sigmoid() + y[1:3].T.contiguous().square().sum(),
        lambda y, w: recompute.run(True, inner, y, w, 2) + y @ w.T,
        lambda y, w: w.clone(),
    ],
)
def test_what_a_norm_gives_is_made_again(sublayer: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever reads it, and through whichever view: the same bits, once in a backward, and nothing left."""
    made = 0
    forward = RMSNorm.forward

    def counted(self: RMSNorm, x: Tensor) -> Tensor:
        nonlocal made
        made += 1
        return forward(self, x)

    plain = gradients(normed(False, sublayer))
    monkeypatch.setattr(RMSNorm, "forward", counted)
    again = gradients(normed(True, sublayer))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert made <= 2


def test_a_norms_output_is_gone_after_its_sublayer_and_after_backward() -> None:
    seen: list[weakref.ref[Tensor]] = []

    def sublayer(y: Tensor, w: Tensor) -> Tensor:
        seen.append(weakref.ref(y))
        return y @ w

    x, w = (torch.ones(4, 4, requires_grad=True) for _ in range(2))
    y = normed(True, sublayer)(x, w).sum()
    assert seen[0]() is None
    first, second = (torch.autograd.grad(y, w, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second) and first.count_nonzero() == 16


@pytest.mark.parametrize("mode", ["activation", "selective", "full"])
@pytest.mark.parametrize("experts", [0, 4])
def test_nothing_is_left_of_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, experts: int) -> None:
    """Garbage collection cannot see a node of autograd that holds its own output."""
    alive: list[weakref.ref[Any]] = []

    def note(kind: Any) -> None:
        begin = kind.__init__

        def noted(self: Any, *arguments: Any) -> None:
            begin(self, *arguments)
            alive.append(weakref.ref(self))

        monkeypatch.setattr(kind, "__init__", noted)

    note(recompute._ComputedAgain)
    note(recompute._Dropped)
    gc.collect()
    gc.disable()
    words = [f"recompute={mode}", f"run.dir={tmp_path}", "train.steps=1", "checkpoint.every=null", "precision=fp32"]
    words += [f"model.moe.experts={experts}"] if experts else []
    trainer = Trainer(load_config(*tiny_job(*words)), callbacks=[])
    try:
        trainer.train_step()
    finally:
        gc.enable()
    assert alive and not [frame for frame in alive if frame() is not None]
