"""What Triton makes of our programs for GPUs that need not be here, as JSON; without its interpreter.

TRITON_INTERPRET=0 python tests/machine_code.py
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ds_optim import kernels
from ds_optim.kernels import Place, Places, Rounding, native
from ds_optim.kernels.triton import programs
from test_kernels import FORMULAS, SCALARS, Tensors

FP32, BF16, FP16 = tl.float32, tl.bfloat16, tl.float16
CASES: list[tuple[str, tuple[Any, ...], bool]] = [
    ("adamw", (FP32,) * 4, False),
    ("adamw", (BF16, BF16, FP32, FP32), True),
    ("lion", (FP32,) * 3, False),
    ("lion", (FP16, FP16, FP32), False),
    ("adan", (FP32,) * 6, False),
    ("adan", (BF16,) * 6, True),
]
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def compiled(name: str, dtypes: tuple[Any, ...], is_rounded: bool, capability: int) -> Any:
    """A program's code for one kind of GPU. Scalars are numbers, but for the first, which lies on the device."""
    scalars = len(native.KERNELS[name].scalars)
    pointed = (True, *[False] * (scalars - 1))
    signature = {
        **dict.fromkeys(("update", "DTYPES", "POINTED", "ROUNDED", "ROW", "BLOCK"), "constexpr"),
        "addresses": "*i64",
        "tensors": "i32",
        "rows": "*i64",
        "key": "i64",
        "scalars": tuple("*fp32" if one else "fp32" for one in pointed),
    }
    constants = {
        "update": programs.ARITHMETIC[name],
        "DTYPES": dtypes,
        "POINTED": pointed,
        "ROUNDED": is_rounded,
        "ROW": programs.ROW,
        "BLOCK": programs.BLOCK,
    }
    signature = {argument: signature[argument] for argument in programs.update_rows.arg_names}
    source = ASTSource(programs.update_rows, signature, constexprs=constants, attrs={})
    options = {"num_warps": 4, "enable_fp_fusion": False}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def report(name: str, dtypes: tuple[Any, ...], is_rounded: bool, capability: int) -> dict[str, Any]:
    """128-bit accesses, registers and spills from the machine code; contractions from what it was assembled from."""
    code = compiled(name, dtypes, is_rounded, capability)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code.asm["cubin"])
        file.flush()
        listed, used = (
            subprocess.run([TOOLS / tool[0], *tool[1:], file.name], capture_output=True, text=True, check=True).stdout
            for tool in (("nvdisasm", "-c"), ("cuobjdump", "-res-usage"))
        )
    return {
        "program": f"{name} {' '.join(map(str, dtypes))}{' rounded' * is_rounded}",
        "target": f"sm_{capability}",
        "bytes": [dtype.primitive_bitwidth // 8 for dtype in dtypes],
        "loads": len(re.findall(r"\bLDG\.E\S*\.128\b", listed)),
        "stores": len(re.findall(r"\bSTG\.E\S*\.128\b", listed)),
        "numbers": len(re.findall(r"\bLDG\.E\S*\.64\b", listed)),
        "spilled": len(re.findall(r"\b(?:LDL|STL)\b", listed)),
        "fused": len(re.findall(r"\bfma\.rn\.f32\b", code.asm["ptx"])),
        "registers": int(re.findall(r"REG:(\d+)", used)[-1]),
    }


class Driver:
    """Of a GPU that is not here, as far as Triton asks before it launches."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0


class Warmed:
    """A program that is bound to its arguments and compiled for them, but not launched."""

    def __init__(self, program: Any) -> None:
        self.program, self.made = program, list[Any]()

    def __getitem__(self, grid: tuple[int]) -> Any:
        return lambda *arguments, **options: self.made.append(self.program.warmup(*arguments, grid=grid, **options))


def variants() -> list[int]:
    """How many programs there are after each of some calls that differ in what must not make another one."""
    triton.runtime.driver.set_active(Driver())
    warmed = programs.update_rows = Warmed(programs.update_rows)
    found = []
    calls = [(1e-3, 5, [5000, 17]), (1.0, 16, [70_000]), (torch.tensor(0.5), 7, [33] * 16), (torch.tensor(1.0), 1, [1])]
    for lr, key, numels in calls:
        tensors = Tensors.random("lion", numels, 0, (torch.bfloat16, torch.float32, torch.bfloat16))
        spans = [(index, 0, numel) for index, numel in enumerate(numels)]
        operands = tensors.operands(spans, {**SCALARS["lion"], "lr": lr})
        operands.rounding = Rounding(key, Places([Place(*span, index, 0) for index, span in enumerate(spans)]))
        kernels.elementwise("triton", FORMULAS["lion"], operands)
        found.append(len({one.hash for one in warmed.made}))
    return found


if __name__ == "__main__":
    reports = [report(*case, capability) for case in CASES for capability in (80, 90)]
    print(json.dumps({"programs": reports, "variants": variants()}))
