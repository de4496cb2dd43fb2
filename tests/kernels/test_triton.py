"""Every case of every Triton kernel, interpreted: exact enough (E1), safe in memory (E3), no more traffic (E5)."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is for Linux")
from megalite_kernels.validate.case import Case, Far
from megalite_kernels.validate.cases import CASES, FAR
from megalite_kernels.validate.levels import exactness, reaches, safety

from tests.kernels.support import in_a_fork


@pytest.mark.parametrize("case", CASES, ids=str)
def test_as_exact_as_pytorch(case: Case) -> None:
    for dtype in case.dtypes:
        found = exactness(case, dtype)
        assert found.right, f"{dtype}: result {found.which} is off by {found.worst:.1f} times what is allowed"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_safe_in_memory_and_lean(case: Case) -> None:
    found = safety(case)
    assert found.right, str(found)
    if case.traffic is not None:
        assert (found.seen.loaded, found.seen.stored) == (case.traffic.loaded, case.traffic.stored)
        assert found.seen.flops == case.traffic.flops


@pytest.mark.parametrize("far", FAR, ids=str)
def test_offsets_past_two_billion(far: Far) -> None:
    assert in_a_fork(reaches, far).stored


def test_norms_refuse_what_does_not_belong_together() -> None:
    from megalite_kernels import layer_norm

    x = torch.ones(2, 32)
    with pytest.raises(ValueError, match=r"bias \[D\]"):
        layer_norm(x, x[0], torch.ones(8), 1e-6, backend="triton")
    strided = torch.arange(64.0)[::2]
    expected = layer_norm(x, x[0], strided.clone(), 1e-6, backend="triton")
    assert torch.equal(layer_norm(x, x[0], strided, 1e-6, backend="triton"), expected)


def test_a_backend_says_why_not() -> None:
    from megalite_kernels import rms_norm

    x = torch.ones(2, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match="float32, bf16 and fp16, not float64"):
        rms_norm(x, x[0], 1e-6, backend="triton")
    with pytest.raises(ValueError, match="no backend 'cuda'; there are auto, triton"):
        rms_norm(x, x[0], 1e-6, backend="cuda")
