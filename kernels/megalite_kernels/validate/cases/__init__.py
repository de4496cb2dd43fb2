"""All cases and sweeps, an op a file."""

from megalite_kernels.validate.case import Case, Far, Sweep
from megalite_kernels.validate.cases import activation, attention, cross_entropy, fp8, moe, norm, optim, rope

OPS = (activation, attention, cross_entropy, fp8, moe, norm, optim, rope)

CASES: tuple[Case, ...] = tuple(case for op in OPS for case in op.CASES)
SWEEPS: tuple[Sweep, ...] = tuple(sweep for op in OPS for sweep in op.SWEEPS)
FAR: tuple[Far, ...] = tuple(far for op in OPS for far in getattr(op, "FAR", ()))
