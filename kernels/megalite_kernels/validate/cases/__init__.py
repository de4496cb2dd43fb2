"""All cases and sweeps, an op a file."""

from megalite_kernels.validate.case import Case, Sweep
from megalite_kernels.validate.cases import activation, moe, norm, rope

OPS = (activation, moe, norm, rope)

CASES: tuple[Case, ...] = tuple(case for op in OPS for case in op.CASES)
SWEEPS: tuple[Sweep, ...] = tuple(sweep for op in OPS for sweep in op.SWEEPS)
