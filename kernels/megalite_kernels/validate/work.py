"""What a process of validation is given to do: a case, or a sweep on a chip, by its number."""

from megalite_kernels.gpu.chips import CHIPS
from megalite_kernels.gpu.compile import Compiled
from megalite_kernels.validate import page, snapshot
from megalite_kernels.validate.cases import CASES, SWEEPS
from megalite_kernels.validate.levels import exactness, repeats, safety


def try_case(number: int, device: str) -> page.Evidence:
    """A case in every dtype; a failure is evidence too."""
    case, found = CASES[number], page.Evidence(device)
    try:
        for dtype in case.dtypes:
            one = exactness(case, dtype, device)
            found.exact(case, str(dtype).removeprefix("torch."), one.worst)
        if device == "cpu":
            found.safe(case, safety(case))
        elif not repeats(case, device):
            found.wrong.append(f"{case}: two runs differ")
    except Exception as error:
        found.wrong.append(f"{case}: {type(error).__name__}: {error}")
    return found


def build(work: tuple[int, str]) -> tuple[dict[str, Compiled], list[str]]:
    """(entries, faults) of a sweep on a chip; what is on record is not compiled again."""
    sweep, chip = SWEEPS[work[0]], CHIPS[work[1]]
    try:
        entries = snapshot.refresh(sweep, chip, snapshot.load())
    except Exception as error:
        return {}, [f"{sweep} on {chip.name}: {type(error).__name__}: {error}"]
    return entries, [f"{sweep} on {chip.name}: {fault}" for fault in snapshot.faults(sweep, chip, entries)]
