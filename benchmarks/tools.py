"""Runs examples/tools/ in the environment that it is started in, and puts what passed into docs/results/tools.md.

    python benchmarks/tools.py            every tool that is installed here
    python benchmarks/tools.py trl        one of them

Each tool wants releases of its own; one environment need not have all of them. Exit status 1 if anything fails, or if
nothing was run.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import pages

ROOT = Path(__file__).resolve().parents[1]
KEPT, PAGE = ROOT / "docs" / "results" / "tools.json", ROOT / "docs" / "results" / "tools.md"

TRL = "deepspeed --num_gpus {ranks} examples/on_cpu.py examples/tools/trl_train.py {method}"
TRL += " --deepspeed examples/tools/{json}.json"
LIGHTNING = "torchrun --nproc_per_node {ranks} examples/tools/lightning_train.py examples/tools/lightning.json runs/lit"
AXOLOTL = "deepspeed --num_gpus {ranks} examples/on_cpu.py examples/tools/axolotl_train.py"
AXOLOTL += " examples/tools/axolotl_sft.yaml"
COMMANDS = {
    "trl": [
        TRL.format(ranks=2, method="sft", json="zero2") + " --output runs/trl",
        TRL.format(ranks=1, method="sft", json="zero3") + " --output runs/trl --resume runs/trl/checkpoint-3",
        TRL.format(ranks=2, method="dpo", json="zero2"),
        TRL.format(ranks=2, method="grpo", json="zero2"),
    ],
    "lightning": [LIGHTNING.format(ranks=2), LIGHTNING.format(ranks=1) + " --resume"],
    "torchtitan": ["torchrun --nproc_per_node 2 examples/tools/torchtitan_train.py"],
    "llamafactory": [
        "python examples/tools/llamafactory_data.py",
        "deepspeed --num_gpus 2 examples/on_cpu.py examples/tools/llamafactory_train.py "
        "examples/tools/llamafactory_sft.yaml",
        "deepspeed --num_gpus 1 examples/on_cpu.py examples/tools/llamafactory_train.py "
        "examples/tools/llamafactory_sft.yaml resume_from_checkpoint=runs/llamafactory/checkpoint-3",
    ],
    "axolotl": [
        "python examples/tools/llamafactory_data.py",
        AXOLOTL.format(ranks=2),
        AXOLOTL.format(ranks=1) + " resume_from_checkpoint=runs/axolotl/checkpoint-3 micro_batch_size=8"
        " deepspeed=examples/tools/zero3.json",
    ],
}


def ran(command: str) -> dict[str, Any]:
    """What became of a command: its last words if it failed, else what its script says that it trained."""
    scripts = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PATH": scripts,
        "DISABLE_VERSION_CHECK": "1",
        "AXOLOTL_DO_NOT_TRACK": "1",
    }
    begun = time.monotonic()
    with tempfile.TemporaryFile("w+") as output:
        done = subprocess.run(
            command, shell=True, cwd=ROOT, env={**os.environ, **environment}, stdout=output, stderr=output, check=False
        )
        output.seek(0)
        lines = output.read().splitlines()
    found: dict[str, Any] = {
        "command": command,
        "seconds": round(time.monotonic() - begun),
        "passes": not done.returncode,
    }
    said = [json.loads(line) for line in lines if line.startswith('{"optimizer"')]
    if said:
        found.update(said[-1])
    if not found["passes"]:
        found["reason"] = next((line for line in reversed(lines) if "Error" in line), lines[-1] if lines else "")[:200]
    return found


def page(kept: dict[str, Any]) -> str:
    """The page, from what every run found."""
    lines = [
        "# The tools around, run",
        "",
        "`python benchmarks/tools.py`, in environments that have the tools. No GPU: `examples/on_cpu.py` lets",
        "Accelerate count ranks, and the Lightning example pretends an accelerator.",
        "",
        "| tool | date, machine | command | trained by | steps | loss, first to last | seconds | |",
        "|---|---|---|---|---:|---|---:|---|",
    ]
    for tool, run in kept.items():
        for row in run["rows"]:
            loss = row.get("loss") or []
            ends = f"{loss[0]:.3f} to {loss[-1]:.3f}" if loss else ""
            cells = [
                *(f"{tool} {run['version']}", f"{run['date']}, {run['machine']}", f"`{row['command']}`"),
                *(row.get("optimizer", ""), str(row.get("steps", "")), ends, str(row["seconds"])),
                "passes" if row["passes"] else row["reason"],
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    kept = json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.exists() else {}
    asked, passed = sys.argv[1:] or list(COMMANDS), list[bool]()
    for tool in asked:
        try:
            version = importlib.metadata.version(tool)
        except importlib.metadata.PackageNotFoundError:
            print(f"{tool} is not installed here")
            continue
        rows = []
        for command in COMMANDS[tool]:
            rows.append(ran(command))
            print(tool, version, json.dumps(rows[-1]), flush=True)
        passed += [row["passes"] for row in rows]
        machine = f"{os.cpu_count()} cores, {platform.machine()}"
        kept[tool] = {"version": version, "date": str(date.today()), "machine": machine, "rows": rows}
    KEPT.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    pages.write(PAGE, page(kept))
    return int(not passed or not all(passed))


if __name__ == "__main__":
    raise SystemExit(main())
