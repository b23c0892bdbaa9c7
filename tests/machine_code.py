"""What Triton makes of our programs for GPUs that need not be here, as JSON; without its interpreter.

TRITON_INTERPRET=0 python tests/machine_code.py
"""

from __future__ import annotations

import bisect
import inspect
import itertools
import json
import re
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import triton
from triton.backends.compiler import GPUTarget

from ds_optim import kernels, known_torch
from ds_optim.kernels import Operands, Place, Places, Rounding
from ds_optim.kernels import triton as by_triton
from ds_optim.kernels.tables import table_of
from ds_optim.kernels.triton import blocks, code_blocks, elements
from ds_optim.linalg import triangle
from test_eight_bit_kernels import CODED, Coded, normal
from test_kernels import ADAM_MINI, FORMULAS, SCALARS, Blocks, Tensors

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
CASES: list[tuple[str, tuple[torch.dtype, torch.dtype, torch.dtype], bool]] = [
    ("adamw", (FP32,) * 3, False),
    ("adamw", (BF16, BF16, FP32), True),
    ("lion", (FP32,) * 3, False),
    ("lion", (FP16, FP16, FP32), False),
    ("adan", (FP32,) * 3, False),
    ("adan", (BF16,) * 3, True),
    ("momentum", (FP32,) * 3, False),
    ("adam_graft", (FP32, FP32, FP32), False),
    ("adam_graft", (FP32, FP32, BF16), False),
    ("adam_mini", (FP32,) * 3, False),
    ("adam_mini", (BF16, BF16, FP32), True),
]
FEW = [CASES[0], CASES[-1]]
CASES_OF = {
    GPUTarget("cuda", 75, 32): FEW,
    GPUTarget("cuda", 80, 32): CASES[::2],
    GPUTarget("cuda", 90, 32): CASES,
    GPUTarget("cuda", 100, 32): FEW,
    GPUTarget("hip", "gfx942", 64): FEW,
}
"""NVIDIA's T4 (which has no bf16), A100, H100 and B200, AMD's MI300, of 64 threads to a warp; what is read of each."""
UNKNOWN = GPUTarget("cuda", 999, 32)
"""One that no assembler knows."""
TARGETS = [*CASES_OF, *(GPUTarget("cuda", arch, 32) for arch in (86, 89, 120))]
"""And graphics cards since Ampere, whose programs may share less memory."""
SHARED = {
    "sm_75": 65_536,
    "sm_80": 166_912,
    "sm_86": 101_376,
    "sm_89": 101_376,
    "sm_90": 232_448,
    "sm_100": 232_448,
    "sm_120": 101_376,
    "gfx942": 65_536,
}
"""Bytes that the threads of a program may share, at most: a launch of one that needs more fails."""
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
PROGRAMS = {
    elements: ("update_rows", "update_all", "descend_rows"),
    code_blocks: ("update_codes",),
    blocks: (
        *("update_wide_blocks", "update_narrow_blocks", "sum_rows", "sum_columns"),
        *("add_up", "advance_known", "update_cut_rows", "update_columns"),
    ),
}
"""What is launched, by module."""
TOLD_APART = {"update_narrow_blocks": -1, "descend_rows": 3}
"""The argument that programs of one name are told apart by: the width of a block, the columns."""


class Driver:
    """Of a GPU that is not here, as far as Triton asks before it launches."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return [*TARGETS, UNKNOWN].index(self.target)

    def get_current_stream(self, _: int) -> int:
        return 0


class Warmed:
    """A program that is bound to its arguments and compiled for them, but not launched."""

    made: ClassVar[list[tuple[str, Any]]] = []

    def __init__(self, program: Any) -> None:
        self.program = program

    def __getitem__(self, grid: tuple[int]) -> Any:
        def launch(*arguments: Any, **options: Any) -> None:
            made = self.program.warmup(*arguments, grid=grid, **options)
            name = self.program.__name__
            self.made.append((f"{name} of {arguments[TOLD_APART[name]]}" if name in TOLD_APART else name, made))

        return launch


def operands_of(rule: str, numels: list[int], dtypes: Any, rounding_key: int | None, **changed: Any) -> Operands:
    tensors = Tensors.random(rule, numels, 0, dtypes)
    spans = [(index, 0, numel) for index, numel in enumerate(numels)]
    operands = tensors.operands(spans, {**SCALARS[rule], **changed})
    if rounding_key is not None:
        operands.rounding = Rounding(rounding_key, Places([Place(*span, span[0], 0) for span in spans]))
    return operands


def calls(rule: str, dtypes: Any, is_rounded: bool) -> None:
    """Everything that a step may launch for a rule."""
    if rule in ("momentum", "adam_graft"):
        values, *states = Tensors.random(rule, [5000], 0, dtypes).flat()
        kernels.one_pass("triton", FORMULAS[rule], values, states, SCALARS[rule])
        return
    if rule != "adam_mini":
        kernels.elementwise("triton", FORMULAS[rule], operands_of(rule, [5000, 7], dtypes, 5 if is_rounded else None))
        return
    shards = Blocks([(40, 1), (20, 16), (3, 64), (5, 400), (3, 4096)], None, 1, 0, dtypes).shards([5000], 0)
    for rank in range(2):
        operands = shards._operands(rank, torch.zeros(shards.num_cuts, dtype=torch.float64))
        if is_rounded:
            operands.rounding = Rounding(5, Places([Place(0, 0, operands.params[0].numel(), 3, 0)]))
        kernels.partial_sums("triton", operands)
        kernels.blockwise("triton", ADAM_MINI, operands)
    columns = Blocks([(2, 64), (50, 1)], 178, 40, 0, dtypes).shards([3000], 0)._operands(0, torch.zeros(52).double())
    kernels.partial_sums("triton", columns)
    kernels.blockwise("triton", ADAM_MINI, columns)
    for rows, columns in ((torch.ones(4, 6), slice(1, 5)), (torch.ones(4, 2048), slice(1024, 2048))):
        target = rows.to(dtypes[0])[:, columns]
        kernels.descend("triton", target, torch.ones(target.shape), 0.9, (3, 1, 5) if is_rounded else ())


def instructions_of(cubin: bytes) -> bytes:
    """The section of an ELF file that has a program's instructions."""
    sections, size, number, names = *struct.unpack_from("<Q", cubin, 0x28), *struct.unpack_from("<HHH", cubin, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", cubin, sections + index * size) for index in range(number)]
    (found,) = (
        cubin[offset : offset + length]
        for name, _, _, _, offset, length in headers
        if cubin.startswith(b".text.", headers[names][4] + name)
    )
    return found


def listings(made: Sequence[tuple[GPUTarget, Any]]) -> list[str]:
    """The machine code of each program. The disassembler takes long to start: it reads all of a GPU's as one."""
    found = [code.asm.get("amdgcn", "") for _, code in made]
    for target in dict.fromkeys(target for target, _ in made if target.backend == "cuda"):
        places = [place for place, (its, _) in enumerate(made) if its == target]
        parts = [instructions_of(made[place][1].asm["cubin"]) for place in places]
        with tempfile.NamedTemporaryFile() as file:
            file.write(b"".join(parts))
            file.flush()
            tool = [TOOLS / "nvdisasm", "-b", f"SM{target.arch}", file.name]
            listed = subprocess.run(tool, capture_output=True, text=True, check=True).stdout
        ends = list(itertools.accumulate(map(len, parts)))
        for line in listed.splitlines(keepends=True):
            if address := re.match(r"\s+/\*([0-9a-f]{4,})\*/ ", line):
                found[places[bisect.bisect(ends, int(address[1], 16))]] += line
    return found


def order_of_states(listed: str) -> str:
    """Reading (``r``) and writing (``w``) of blocks' states, and all barriers (``b``), in the order of the assembly.

    It says which of our lines an instruction is of, except inside of inline assembly, where it counts wrong.
    """
    source, first = inspect.getsourcelines(blocks.advance.fn)
    read, written = (
        next(first + index for index, text in enumerate(source) if call in text) for call in ("tl.load(", "tl.store(")
    )
    order, line, is_inline = "", 0, False
    for text in listed.splitlines():
        if "inline asm" in text:
            is_inline = "begin" in text
        elif (place := re.search(r"\.loc\s.*?(\w+\.py):(\d+):", text)) and not is_inline:
            line = int(place[2]) if place[1] == "blocks.py" else 0
        elif re.search(r"\bbar\.sync\b|\bs_barrier\b", text):
            order += "b"
        elif line == read and re.search(r"\bld\.global\b|\b(?:global|flat|buffer|s)_load_", text):
            order += "r"
        elif line == written and re.search(r"\bst\.global\b|\b(?:global|flat|buffer)_store_", text):
            order += "w"
    return order


def report(name: str, code: Any, listed: str, dtypes: tuple[Any, ...], target: GPUTarget) -> dict[str, Any]:
    """128-bit accesses and spills from the machine code; from what it was assembled from contractions, what takes
    subnormal numbers for zero, and `order_of_states`."""
    common = {
        "program": name,
        "target": name_of(target),
        "dtypes": [dtype.itemsize for dtype in dtypes],
        "shared": code.metadata.shared,
        "order": order_of_states(code.asm["amdgcn" if target.backend == "hip" else "ptx"]),
    }
    if target.backend == "hip":
        return {
            **common,
            "loads": len(re.findall(r"\b(?:global|flat|buffer)_load_dwordx4\b", listed)),
            "stores": len(re.findall(r"\b(?:global|flat|buffer)_store_dwordx4\b", listed)),
            "spilled": sum(map(int, re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", listed))),
            "fused": len(re.findall(r"\bcontract\b|\bfmuladd\b", code.asm["llir"])),
            "flushing": len(re.findall(r"\.amdhsa_float_denorm_mode_32 [012]\b", listed)),
        }
    return {
        **common,
        "loads": len(re.findall(r"\bLDG\.E\S*\.128\b", listed)),
        "stores": len(re.findall(r"\bSTG\.E\S*\.128\b", listed)),
        "spilled": len(re.findall(r"\b(?:LDL|STL)\b", listed)),
        "fused": len(re.findall(r"\bfma\.rn\.f32\b", code.asm["ptx"])),
        "flushing": len(re.findall(r"\.ftz\b", code.asm["ptx"])),
    }


def name_of(target: GPUTarget) -> str:
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)


def drive(target: GPUTarget) -> None:
    """Let Triton take this for the GPU that is here."""
    triton.runtime.driver.set_active(Driver(target))
    by_triton._options.cache_clear()


def reports() -> list[dict[str, Any]]:
    """Of every program, for every target."""
    found = []
    for target, cases in CASES_OF.items():
        drive(target)
        for rule, dtypes, is_rounded in cases:
            Warmed.made.clear()
            calls(rule, dtypes, is_rounded)
            for name, code in {code.hash: (name, code) for name, code in Warmed.made}.values():
                found.append((rule, name, dtypes, target, code))
    return reported(found)


def reported(made: list[tuple[str, str, tuple[Any, ...], GPUTarget, Any]]) -> list[dict[str, Any]]:
    """The report of each program: its rule, name, dtypes, target and code."""
    listed = listings([one[-2:] for one in made])
    return [
        {"rule": rule, **report(name, code, its, dtypes, target)}
        for (rule, name, dtypes, target, code), its in zip(made, listed, strict=True)
    ]


def coded_cases() -> Iterator[tuple[GPUTarget, str, torch.dtype]]:
    """Every rule for every target, in fp32 and bf16 in turn; in both for the H100, and none of the T4 in bf16."""
    for (place, target), (number, rule) in itertools.product(enumerate(CASES_OF), enumerate(CODED)):
        in_turn = (FP32, BF16)[(place // 2 + number) % 2]
        for dtype in {75: (FP32,), 90: (FP32, BF16)}.get(target.arch, (in_turn,)):
            yield target, rule, dtype


def coded() -> list[dict[str, Any]]:
    """Of the programs over state in eight bits: whole blocks, cut ones, and the largest magnitudes of these."""
    found = []
    for target, rule, dtype in coded_cases():
        if not known_torch.compiles_codes(CODED[rule].states, "6" if target.backend == "hip" else None):
            continue
        drive(target)
        Warmed.made.clear()
        numel = 2000
        call = Coded.zero(CODED[rule], [numel], 0, dtype)
        runs = table_of([(0, 0, numel, 0, 256, 0, -1, 0)], 8)
        operands = call.operands(CODED[rule], [normal(numel, 1).to(dtype)], runs)
        operands.cut_maxima = torch.zeros(1, len(CODED[rule].codes), dtype=torch.int32)
        kernels.partial_maxima("triton", CODED[rule], operands)
        kernels.coded("triton", CODED[rule], operands)
        made = {code.hash: code for _, code in Warmed.made}
        assert len(made) == 3
        streams = (dtype, dtype, *[torch.uint8] * len(CODED[rule].codes))
        found += [(rule, "update_codes", streams, target, code) for code in made.values()]
    return reported(found)


def triangles() -> list[dict[str, Any]]:
    """Of the program for X X^T, in TF32 and bf16, for every GPU with tensor cores; of rows, and of columns.

    From bf16 to fp32 either the rows or the columns.
    """
    found = []
    for place, target in enumerate(TARGETS[1:]):
        drive(target)
        cases = itertools.product(((FP32, FP32), (BF16, BF16), (BF16, FP32)), (False, True))
        for (dtype, out_dtype), is_transposed in cases:
            if dtype != out_dtype and is_transposed == bool(place % 2):
                continue
            shape = (2, 4096, 1024) if is_transposed else (2, 1024, 4096)
            stack = torch.empty(shape, dtype=dtype)
            stack = stack.mT if is_transposed else stack
            Warmed.made.clear()
            triangle.times_own_transpose(stack, out=torch.empty(2, 1024, 1024, dtype=out_dtype))
            ((_, code),) = Warmed.made
            found.append((dtype, is_transposed, target, code))
    listed = listings([one[-2:] for one in found])
    return [report_of_triangle(*one, its) for one, its in zip(found, listed, strict=True)]


def report_of_triangle(
    dtype: torch.dtype, is_transposed: bool, target: GPUTarget, code: Any, listed: str
) -> dict[str, Any]:
    if target.backend == "hip":
        cores, reads, spills = r"\bv_mfma_", r"\b(?:global|buffer)_load_\S*", r"_spill_count: *[1-9]"
    else:
        cores, reads, spills = r"\b(?:HMMA|HGMMA|UTC\w*MMA)\b", r"\bLDG(?:STS)?\.E\S*", r"\b(?:LDL|STL)\b"
    widths = [one.endswith("dwordx4") or ".128" in one for one in re.findall(reads, listed)]
    return {
        "target": name_of(target),
        "dtype": str(dtype),
        "transposed": is_transposed,
        "shared": code.metadata.shared,
        "tensor core": len(re.findall(cores, listed)),
        "wide reads": widths.count(True),
        "narrow reads": widths.count(False),
        "spilled": len(re.findall(spills, listed)),
    }


def variants() -> list[int]:
    """How many programs there are after each of some calls that differ in what must not make another one."""
    Warmed.made.clear()
    drive(TARGETS[0])
    found = []
    calls = [(1e-3, 5, [5000, 17]), (1.0, 16, [70_000]), (torch.tensor(0.5), 7, [33] * 16), (torch.tensor(1.0), 1, [1])]
    for lr, key, numels in calls:
        kernels.elementwise("triton", FORMULAS["lion"], operands_of("lion", numels, (BF16, FP32, BF16), key, lr=lr))
        found.append(len({code.hash for _, code in Warmed.made}))
    return found


def problems() -> dict[str, str]:
    """Why Triton cannot be used, by target."""
    found = {}
    for target in (*TARGETS, UNKNOWN):
        drive(target)
        known_torch.triton_problem.cache_clear()
        found[name_of(target)] = known_torch.triton_problem()
    return found


if __name__ == "__main__":
    for module, names in PROGRAMS.items():
        for name in names:
            setattr(module, name, Warmed(getattr(module, name)))
    lower_triangle = Warmed(triangle.program())
    triangle.program = lambda: lower_triangle
    print(
        json.dumps(
            {
                "programs": reports(),
                "coded": coded(),
                "variants": variants(),
                "triangles": triangles(),
                "problems": problems(),
            }
        )
    )
