"""What the compilers made of every kernel (E4), kept in `compiled.json`: one entry a launch and chip.

An entry's key is a digest of the kernel's source and what it calls, the types and constants of the launch, the options
and Triton's version. So a test sees within seconds, compiling nothing, whether each launch of today is on record; and a
new Triton or a changed kernel shows as a diff of registers, spills and opcodes.
"""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import triton
import triton.language as tl

from megalite_kernels.gpu.chips import Chip
from megalite_kernels.gpu.compile import Compiled, compile_for, signature
from megalite_kernels.gpu.launch import Launch, recording
from megalite_kernels.validate.case import Sweep

FILE = Path(__file__).parent / "compiled.json"


def launches(sweep: Sweep, chip: Chip) -> list[Launch]:
    """What the op's wrappers start at this shape on `chip`."""
    with recording() as found:
        sweep.run(chip)
    assert found, f"{sweep} launches nothing"
    return found


def source(kernel: triton.JITFunction) -> dict[str, str]:
    """The text of a kernel and of all it calls, and its constants. Triton's own key counts the lines above them too."""
    texts: dict[str, str] = {}
    functions = [kernel]
    while functions:
        function = functions.pop()
        texts[function.__name__] = function.src
        for name in function.fn.__code__.co_names:
            value = function.fn.__globals__.get(name)
            if isinstance(value, triton.JITFunction) and value.__name__ not in texts:
                functions.append(value)
            elif isinstance(value, tl.constexpr):
                texts[name] = str(value.value)
    return texts


def key(launch: Launch, chip: Chip) -> str:
    types, constants, attributes = signature(launch)
    said = {name: str(value) for name, value in constants.items()}
    places = sorted(attributes)
    text = source(launch.kernel)
    what = [triton.__version__, text, types, said, places, launch.num_warps, launch.num_stages, chip.name]
    return hashlib.blake2b(json.dumps(what, sort_keys=True).encode(), digest_size=12).hexdigest()


def load(path: Path = FILE) -> dict[str, Compiled]:
    return {entry.pop("key"): Compiled(**entry) for entry in json.loads(path.read_text())} if path.exists() else {}


def save(entries: dict[str, Compiled], path: Path = FILE) -> None:
    """One line an entry, in an order that does not move when a kernel changes."""
    ordered = sorted(entries.items(), key=lambda item: (item[1].sweep, item[1].chip, item[1].kernel, item[0]))
    lines = (json.dumps({"key": name} | asdict(entry)) for name, entry in ordered)
    beside = path.with_suffix(".new")
    beside.write_text("[\n" + ",\n".join(lines) + "\n]\n")
    beside.replace(path)  # others read it meanwhile


def refresh(sweep: Sweep, chip: Chip, known: dict[str, Compiled]) -> dict[str, Compiled]:
    """Every launch of `sweep` on `chip`, with what `known` says of it, or compiled now."""
    names = {key(launch, chip): launch for launch in launches(sweep, chip)}
    return {name: known.get(name) or compile_for(launch, chip, str(sweep)) for name, launch in names.items()}


def faults(sweep: Sweep, chip: Chip, entries: dict[str, Compiled]) -> list[str]:
    """What is wrong with this op at this shape on `chip`: a launch not on record, a limit passed, no tensor cores."""
    found = []
    for launch in launches(sweep, chip):
        entry = entries.get(key(launch, chip))
        name = launch.kernel.fn.__name__
        if entry is None:
            found.append(f"{name}: not compiled since it changed; run `make kernels`")
            continue
        found += [f"{name}: {fault}" for fault in entry.faults(chip, sweep.spills.get(chip.name, 0))]
    if sweep.products and not found and not any(entries[key(x, chip)].matrix_opcodes for x in launches(sweep, chip)):
        found.append("no tensor-core instructions")
    return found
