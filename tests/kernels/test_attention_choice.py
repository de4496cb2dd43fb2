"""Which implementation attention takes on machines that are not here, and what flash-attn's packages would be told."""

import importlib
import sys
import types
from typing import Any

import pytest
import torch
from megalite_kernels import attention, attention_choice, dispatch
from megalite_kernels.dispatch import Decision, Machine, Request
from torch import Tensor

TRITON = ("triton", "3.7.1")
ALL = (TRITON, ("flash-attn", "2.8.3"), ("flash-attn-3", "3.0.0"), ("flash-attn-4", "4.0.0b36"))


def decide(chip: str, packages: tuple[tuple[str, str], ...] = ALL, wanted: str = "auto", **asked: Any) -> Decision:
    dtype = asked.pop("dtype", torch.bfloat16)
    features = {"dims": (128, 128), "aligned": True, **asked}
    request = Request("attention", "cuda" if chip else "cpu", chip, dtype, tuple(features.items()))
    return dispatch.decide(dispatch.backends_of("attention"), request, Machine(packages, None), wanted)


@pytest.mark.parametrize(
    ("chip", "asked", "backend"),
    [
        ("sm_80", {}, "flash2"),
        ("sm_90", {}, "flash3"),
        ("sm_100", {}, "flash4"),
        ("gfx942", {}, "flash2"),
        ("", {}, "native"),
        ("sm_80", {"sinks": True}, "triton"),
        ("sm_90", {"sinks": True}, "flash4"),
        ("sm_100", {"sinks": True}, "flash4"),
        ("sm_100", {"sinks": True, "dims": (256, 256)}, "triton"),
        ("sm_100", {"dims": (256, 256)}, "flash4"),
        ("sm_100", {"dims": (160, 160)}, "triton"),
        ("sm_90", {"dims": (192, 128)}, "flash4"),
        ("sm_80", {"dims": (192, 128)}, "triton"),
        ("sm_90", {"dims": (256, 256), "deterministic": True}, "flash4"),
        ("sm_100", {"dims": (256, 256), "deterministic": True}, "triton"),
        ("sm_90", {"packed": True, "window": True, "softcap": True}, "flash3"),
        ("sm_90", {"documents": True}, "triton"),
        ("sm_90", {"lse": True}, "triton"),
        ("sm_90", {"spans": True}, "triton"),
        ("sm_90", {"dtype": torch.float32}, "triton"),
        ("sm_90", {"dtype": torch.float64}, "sdpa"),
        ("sm_90", {"dtype": torch.float64, "window": True}, "blocks"),
        ("sm_90", {"dims": (512, 512), "aligned": False}, "blocks"),
        ("", {"dtype": torch.float64}, "blocks"),
        ("gfx942", {"softcap": True}, "triton"),  # flash-attn's kernels for AMD take a softcap and ignore it
        ("sm_100", {"softcap": True}, "flash4"),
        ("sm_100", {"softcap": True, "packed": True}, "triton"),
        ("sm_90", {"dtype": torch.float64, "deterministic": True}, "blocks"),
        ("sm_90", {"deterministic": True}, "flash3"),
    ],
)
def test_choice_by_chip_and_feature(chip: str, asked: dict[str, Any], backend: str) -> None:
    assert decide(chip, **asked).backend == backend


def test_without_packages_pytorch_where_its_meaning_agrees() -> None:
    assert decide("sm_90", ()).backend == "sdpa"
    assert decide("sm_90", (), aligned=False).backend == "blocks"
    assert decide("sm_90", (TRITON,)).backend == "triton"


@pytest.mark.parametrize(("found", "backend"), [("4.0.0b1", "triton"), ("4.0.0b36", "flash4"), ("4.0.0", "flash4")])
def test_flash_4_older_than_what_was_probed(found: str, backend: str) -> None:
    """Its sinks got no gradient, silently."""
    assert decide("sm_100", (TRITON, ("flash-attn-4", found)), sinks=True).backend == backend


def test_a_package_that_does_not_import_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(dispatch.MODULES, "flash-attn-3", ("no_such_module", "nor_this_one"))
    dispatch.import_module.cache_clear()
    dispatch.import_failure.cache_clear()
    request = Request("attention", "cuda", "sm_90", torch.bfloat16, (("dims", (128, 128)), ("aligned", True)))
    machine = Machine((TRITON, ("flash-attn-3", "3.0.0")), None, real=True)
    decision = dispatch.decide(dispatch.backends_of("attention"), request, machine)
    assert decision.backend == "triton"
    assert "flash-attn-3 does not import: no_such_module: No module named 'no_such_module'; nor_this" in str(decision)


def test_what_torch_is_asked_for_reaches_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """train.deterministic asks torch; flash-attn has to hear of it."""
    seen = []

    def choose(op: str, wanted: str, device: str, dtype: torch.dtype, features: tuple[tuple[str, Any], ...]) -> str:
        seen.append(dict(features)["deterministic"])
        return "blocks"

    monkeypatch.setattr(sys.modules["megalite_kernels.attention"], "choose", choose)
    q = torch.zeros(1, 2, 1, 4)
    for asked in (False, True):
        torch.use_deterministic_algorithms(asked)
        attention(q, q, q, scale=1.0)
    assert seen == [False, True]


def test_every_rejection_has_its_reason() -> None:
    said = str(decide("sm_80", documents=True))
    assert said.startswith("triton (") and "not flash3: it has no kernels for sm_80" in said
    assert "not flash2: it takes documents as cu_seqlens" in said
    assert "older than 2.6" in str(decide("sm_80", (TRITON, ("flash-attn", "2.5.9"))))
    assert "flash-attn-3 is not installed" in str(decide("sm_90", (TRITON,)))
    assert "on a CPU Triton is only interpreted" in str(decide(""))
    with pytest.raises(ValueError, match="backend 'sdpa' cannot run this: PyTorch's kernel knows no sinks"):
        decide("sm_90", wanted="sdpa", sinks=True)
    with pytest.raises(ValueError, match="backend 'triton' cannot run this: the kernels' heads are 256 wide at most"):
        decide("sm_90", wanted="triton", dims=(512, 512))


def test_asked_by_name_flash_2_runs_on_later_chips() -> None:
    assert decide("sm_90", wanted="flash2").backend == "flash2"


class Recorder(types.ModuleType):
    """A flash-attn package that notes what it is told and gives back zeros."""

    def flash_attn_func(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        self.told = ("dense", tuple(q.shape), options)
        return q.new_zeros(*q.shape[:-1], v.shape[-1])

    def flash_attn_varlen_func(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        self.told = ("packed", tuple(q.shape), options)
        return q.new_zeros(*q.shape[:-1], v.shape[-1]), "log-sum-exp"


@pytest.fixture(params=["flash2", "flash3", "flash4"])
def package(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Recorder]:
    flash = importlib.import_module("megalite_kernels.gpu.flash")
    dispatch.import_module.cache_clear()
    name = dispatch.MODULES[flash.PACKAGES[request.param]][0]
    module, parts = Recorder(name), name.split(".")
    for end in range(1, len(parts)):
        monkeypatch.setitem(sys.modules, ".".join(parts[:end]), types.ModuleType(parts[end - 1]))
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(sys.modules["megalite_kernels.attention"], "choose", lambda *_: request.param)
    return request.param, module


def test_flash_is_told_the_same(package: tuple[str, Recorder]) -> None:
    name, module = package
    endless = None if name == "flash4" else -1
    q, k = torch.zeros(2, 5, 4, 8), torch.zeros(2, 7, 2, 8)
    assert attention(q, k, k, scale=0.5).shape == q.shape
    told = {"softmax_scale": 0.5, "causal": True, "softcap": 0.0, "deterministic": False}
    assert module.told == ("dense", (2, 5, 4, 8), {**told, "window_size": (endless, endless)})
    attention(q, k, k, scale=0.5, window=3, softcap=2.0, deterministic=True)
    told |= {"softcap": 2.0, "deterministic": True}
    assert module.told[2] == {**told, "window_size": (2, 0)}
    attention(q, k, k, scale=0.5, window=3, causal=False)
    assert module.told[2]["window_size"] == (2, endless) and module.told[2]["causal"] is False


def test_flash_gets_packed_documents(package: tuple[str, Recorder]) -> None:
    q, cu = torch.zeros(9, 4, 8), torch.tensor([0, 4, 9])
    assert attention(q, q, q, scale=1.0, cu_seqlens_q=cu, max_seqlen_q=5).shape == q.shape
    kind, shape, told = package[1].told
    assert (kind, shape) == ("packed", (9, 4, 8))
    assert told["cu_seqlens_q"].dtype == torch.int32 and told["cu_seqlens_k"].tolist() == [0, 4, 9]
    assert (told["max_seqlen_q"], told["max_seqlen_k"]) == (5, 9)


def test_flash_4_gets_sinks(package: tuple[str, Recorder]) -> None:
    name, module = package
    q, sinks = torch.zeros(1, 3, 2, 8), torch.zeros(2)
    attention(q, q, q, scale=1.0, sinks=sinks if name == "flash4" else None)
    assert ("learnable_sink" in module.told[2]) == (name == "flash4")


def test_intervals_go_where_they_are_understood() -> None:
    assert attention_choice.choose_for_spans("cpu", torch.float64, 8, 8) == "blocks"
