"""Ahead-of-time compiles (E4): every launch is on record for every chip, within its limits; and the record is true."""

import pytest

pytest.importorskip("triton", reason="Triton is for Linux")
from megalite_kernels.gpu.chips import CHIPS
from megalite_kernels.gpu.compile import Compiled
from megalite_kernels.validate import snapshot
from megalite_kernels.validate.case import Sweep
from megalite_kernels.validate.cases import SWEEPS

RECORD = snapshot.load()


@pytest.mark.parametrize("sweep", SWEEPS, ids=str)
def test_every_launch_is_compiled_and_within_limits(sweep: Sweep) -> None:
    for chip in CHIPS.values():
        assert not snapshot.faults(sweep, chip, RECORD), chip.name


@pytest.mark.parametrize("op", sorted({sweep.op for sweep in SWEEPS}))
def test_the_record_is_what_the_compiler_makes(op: str) -> None:
    """One launch of each op anew, on a chip that differs from op to op."""
    sweeps = [sweep for sweep in SWEEPS if sweep.op == op]
    chip = list(CHIPS.values())[len(op) % len(CHIPS)]
    launch = snapshot.launches(sweeps[0], chip)[0]
    recorded = RECORD[snapshot.key(launch, chip)]
    assert snapshot.compile_for(launch, chip, recorded.sweep) == recorded


def test_limits_are_seen() -> None:
    entry = Compiled("op: shape", "sm_80", "kernel", 256, 8, 200_000, 16, 16, {})
    found = entry.faults(CHIPS["sm_80"], spills=4)
    assert [fault.split(",")[0] for fault in found] == [
        "8 bytes of registers spilled", "256 registers", "200000 bytes of shared memory", "16 columns of tensor memory",
    ]  # fmt: skip
    assert not Compiled("op: shape", "sm_100", "kernel", 255, 4, 200_000, 256, 16, {}).faults(CHIPS["sm_100"], spills=4)
