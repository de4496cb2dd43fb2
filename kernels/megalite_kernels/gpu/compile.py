"""Compiles recorded launches ahead of time for chips that are not here, and reads what came out.

The compiler neither fails on spilled registers nor on too much shared memory: `Compiled.faults` says what a chip would
refuse or suffer from. Needs no driver: Triton's wheel has ptxas, nvdisasm and LLVM for AMD.
"""

import contextlib
import io
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megalite_kernels.gpu.chips import Chip
from megalite_kernels.gpu.launch import Launch

TYPES = {
    torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16",
    torch.float8_e4m3fn: "fp8e4nv", torch.float8_e5m2: "fp8e5", torch.int64: "i64", torch.int32: "i32",
    torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8", torch.bool: "i1",
}  # fmt: skip
MATRIX = ("HMMA", "HGMMA", "QMMA", "QGMMA", "UTCHMMA", "UTCQMMA", "MFMA")
"""Tensor-core instructions, by name or by how it begins."""
MOVES = ("LDGSTS", "UTMALDG", "UTMASTG", "LDL", "STL")
ALIGNED = [["tt.divisibility", 16]]


@dataclass(frozen=True)
class Compiled:
    """One kernel on one chip. `vector_bytes`: the widest load or store of global memory."""

    sweep: str
    chip: str
    kernel: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    tensor_memory_columns: int
    vector_bytes: int
    opcodes: dict[str, int]

    def faults(self, chip: Chip, spills: int = 0) -> list[str]:
        """What keeps this kernel from running well there; empty when nothing does. `spills`: bytes that may be."""
        limits = (
            ("bytes of registers spilled", self.spill_bytes, spills),
            ("registers", self.registers, chip.registers),
            ("bytes of shared memory", self.shared_bytes, chip.shared_bytes),
            ("columns of tensor memory", self.tensor_memory_columns, chip.tensor_memory_columns),
        )
        return [f"{found} {what}, at most {most}" for what, found, most in limits if found > most]

    @property
    def matrix_opcodes(self) -> int:
        return sum(count for name, count in self.opcodes.items() if name.startswith(MATRIX))


def signature(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int, ...], Any]]:
    """(types, constants, attributes) as a launch on a GPU would specialise them: 1 and None are constants, pointers and
    integers that 16 divides are marked so."""
    types: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for number, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            types[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        types[parameter.name] = _type(value)
        if isinstance(value, torch.Tensor) or (type(value) is int and value % 16 == 0):
            attributes[(number,)] = ALIGNED
    return types, constants, attributes


def _type(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return "*" + TYPES[value.dtype]
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    if isinstance(value, float):
        return "fp32"
    block = ",".join(map(str, value.block_shape))  # a host tensor descriptor
    return f"tensordesc<{TYPES[value.base.dtype]}[{block}]>"


def compile_for(launch: Launch, chip: Chip, sweep: str = "") -> Compiled:
    """Build the kernel of `launch` for `chip` and read its resources; `sweep` says for what."""
    types, constants, attributes = signature(launch)
    source = ASTSource(fn=launch.kernel, signature=types, constexprs=constants, attrs=attributes)
    target = GPUTarget("cuda" if isinstance(chip.target, int) else "hip", chip.target, chip.warp)
    log = io.StringIO()
    with knobs.compilation.scope(), knobs.nvidia.scope(), contextlib.redirect_stdout(log):
        knobs.compilation.always_compile = knobs.nvidia.dump_ptxas_log = True  # a hit in the cache prints no log
        options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
        built = triton.compile(source, target=target, options=options)
    name = launch.kernel.fn.__name__
    if isinstance(chip.target, int):
        return _nvidia(sweep, name, chip, built, log.getvalue())
    return _amd(sweep, name, chip, built)


def _nvidia(sweep: str, name: str, chip: Chip, built: Any, log: str) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.nvdisasm.path, "-c", file.name]
        sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = Counter(re.findall(r"\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]+)", sass))
    widths = re.findall(r"(?:ld|st)\.global[\w.:]*?(?:\.v(\d))?\.[bfusx](\d+)", built.asm["ptx"])
    copies = [
        int(n) for n in re.findall(r"cp\.async\.c[ag]\.shared\.global.*?,\s*0x([0-9a-f]+)", built.asm["ptx"]) if n
    ]
    return Compiled(
        sweep=sweep,
        chip=chip.name,
        kernel=name,
        registers=int(re.findall(r"Used (\d+) reg", log)[-1]),
        spill_bytes=int(re.findall(r"(\d+) bytes spill stores", log)[-1]),
        shared_bytes=built.metadata.shared,
        tensor_memory_columns=getattr(built.metadata, "tmem_size", 0) or 0,
        vector_bytes=max([*(int(many or 1) * int(bits) // 8 for many, bits in widths), *copies, 0]),
        opcodes={op: found[op] for op in (*MATRIX, *MOVES) if found[op]},
    )


def _amd(sweep: str, name: str, chip: Chip, built: Any) -> Compiled:
    text = built.asm["amdgcn"]

    def number(key: str) -> int:
        return int(re.findall(rf"\.{key}:\s+(\d+)", text)[0])

    found = Counter("MFMA" for _ in re.findall(r"\bv_mfma_", text))
    widths = re.findall(r"(?:global|buffer)_(?:load|store)_(?:dwordx?(\d)?|b(\d+))", text)
    return Compiled(
        sweep=sweep,
        chip=chip.name,
        kernel=name,
        registers=number("vgpr_count"),
        spill_bytes=4 * number("vgpr_spill_count"),
        shared_bytes=built.metadata.shared,
        tensor_memory_columns=0,
        vector_bytes=max([*(int(bits) // 8 if bits else 4 * int(words or 1) for words, bits in widths), 0]),
        opcodes=dict(found),
    )
