"""Noise scale and critical batch size of the small Llama while it trains: AdamW at two points, Lion at one.

    python benchmarks/batch_size.py run         # about 30 minutes of two free cores; what is finished is kept
    python benchmarks/batch_size.py report      # docs/results/batch_size.{json,md,png}

Each optimizer trains once with ``--noise-scale`` at a constant learning rate (after a warm-up), so that no schedule
stands between the checkpoints. From them `ds-optim batch-size measure` branches at several batch sizes. Everything runs
on two ranks at ZeRO-2 with the configs of this repository; the text is the one of ``launcher/corpus.py``.

Drawing needs matplotlib: ``pip install "ds-optim[plot]"``.
"""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pages
import typer
from processor import processor

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
BATCH = 8  # of the base runs
BASELINE = 4
SEQ_LENGTH = 128
WARMUP = 40  # steps of the base runs
NAMES = {"adamw": "AdamW", "lion": "Lion"}


@dataclass(frozen=True, slots=True)
class Plan:
    """How long everything is; the defaults are the published ones."""

    base_steps: int
    early: int
    tokens: float
    batches: str

    @property
    def studies(self) -> list[tuple[str, int]]:
        """Optimizer, and step of its base run."""
        return [("adamw", self.early), ("adamw", self.base_steps), ("lion", self.base_steps)]


Out = Annotated[Path, typer.Option(help="Work folder.")]
DEFAULT_OUT = CACHE / "ds-optim-batch-size"

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)


@app.command()
def run(
    out: Out = DEFAULT_OUT,
    base_steps: Annotated[int, typer.Option(help="Of 1,024 tokens; a multiple of --early.")] = 400,
    early: Annotated[int, typer.Option(help="Step of AdamW's first measurement.")] = 80,
    tokens: Annotated[float, typer.Option(help="Of every branch.")] = 98_304,
    batches: Annotated[str, typer.Option(help="Of the branches.")] = "4,8,16,32",
) -> None:
    """Train the base runs and the branches that are missing. The same command goes on after an interruption."""
    plan = Plan(base_steps, early, tokens, batches)
    if base_steps % early:
        raise typer.BadParameter("--base-steps is no multiple of --early")
    out.mkdir(parents=True, exist_ok=True)
    status = 0
    for optimizer in dict.fromkeys(optimizer for optimizer, _ in plan.studies):
        with _timed(out):
            _train(optimizer, plan, out)
    for optimizer, step in plan.studies:
        with _timed(out):
            status |= _measure(optimizer, step, plan, out)
    raise typer.Exit(status)


def _train(optimizer: str, plan: Plan, out: Path) -> None:
    """The base run; goes on from its newest checkpoint, and is done when the last is there."""
    if (out / optimizer / "saved" / f"global_step{plan.base_steps}").is_dir():
        return
    config = json.loads((ROOT / "configs" / f"{optimizer}_zero2.json").read_text(encoding="utf-8"))
    rate = config["optimizer"]["params"]["lr"]
    warmup = {"warmup_min_lr": 0, "warmup_max_lr": rate, "warmup_num_steps": WARMUP, "warmup_type": "linear"}
    config["scheduler"] = {"type": "WarmupLR", "params": warmup}
    (out / f"{optimizer}.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    saving = ["--save", out / optimizer / "saved", "--save-every", plan.early, "--autoresume"]
    length = ["--steps", plan.base_steps, "--micro-batch", BATCH // 2, "--output", out / optimizer]
    _call([*_training(optimizer, out), *length, *saving, "--noise-scale", "--log-every", 10])


def _measure(optimizer: str, step: int, plan: Plan, out: Path) -> int:
    """The branches; returns the exit status."""
    measure = [Path(sys.executable).parent / "ds-optim", "batch-size", "measure"]
    start = ["--checkpoint", out / optimizer / "saved" / f"global_step{step}", "--output", out / f"{optimizer}_{step}"]
    about = ["--batches", plan.batches, "--baseline", BASELINE, "--tokens", plan.tokens]
    # A larger micro-batch is faster; the loss does not depend on it.
    return _call([*measure, *start, *about, "--", *_training(optimizer, out), "--micro-batch", 16], check=False)


def _training(optimizer: str, out: Path) -> list[object]:
    launch = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", 2, ROOT / "launcher" / "train.py"]
    about = ["--deepspeed", out / f"{optimizer}.json", "--model", ROOT / "configs" / "models" / "llama_small.json"]
    return [*launch, *about, "--seq-length", SEQ_LENGTH, "--eval-sequences", 128]


def _call(command: list[object], *, check: bool = True) -> int:
    environment = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **os.environ}
    return subprocess.run([str(word) for word in command], env=environment, check=check).returncode


@contextmanager
def _timed(out: Path) -> Iterator[None]:
    """Adds up the time of all parts, of interrupted ones too."""
    path, started = out / "seconds.json", time.monotonic()
    before = json.loads(path.read_text()) if path.exists() else 0
    try:
        yield
    finally:
        path.write_text(json.dumps(round(before + time.monotonic() - started)))


# ----------------------------------------------------------------------------------------------------------- the report


@app.command()
def report(out: Out = DEFAULT_OUT, directory: Annotated[Path, typer.Option(help="Where to write.")] = RESULTS) -> None:
    """Write batch_size.json, .md and .png from what has run."""
    found = _collect(out)
    if not found["measurements"]:
        raise typer.BadParameter(f"{out} holds no measurement: run it first")
    (directory / "batch_size.json").write_text(json.dumps(found, separators=(",", ":")) + "\n", encoding="utf-8")
    pages.write(directory / "batch_size.md", _markdown(found))
    _draw(found, directory / "batch_size.png")


def _collect(out: Path) -> dict[str, Any]:
    """Readings of the noise scale by optimizer, and the results of the branches."""
    import torch

    readings = {}
    for optimizer in NAMES:
        log = out / optimizer / "log.jsonl"
        records = map(json.loads, log.read_text(encoding="utf-8").splitlines()) if log.exists() else ()
        keys = ("step", "sequences", "interval")
        # An interrupted run logs some steps again.
        noise = {one["step"]: {"step": one["step"], **one["noise_scale"]} for one in records if "noise_scale" in one}
        readings[optimizer] = [{key: one[key] for key in keys} for one in noise.values() if one["ready"]]
    measurements = []
    for path in sorted(out.glob("*_*/result.json"), key=lambda path: (path.parent.name.split("_")[0], _step(path))):
        content = json.loads(path.read_text(encoding="utf-8"))
        kept = ("optimizer", "baseline", "lr_rule", "tolerance", "critical_batch", "noise_scale", "rows", "branches")
        base = next((one for one in readings[path.parent.name.split("_")[0]] if one["step"] == _step(path)), None)
        measurements.append({"step": _step(path), "base": base, **{key: content[key] for key in kept}})
    seconds = out / "seconds.json"
    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"{processor()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "seconds": json.loads(seconds.read_text()) if seconds.exists() else None,
        "readings": readings,
        "measurements": measurements,
    }


def _step(path: Path) -> int:
    return int(path.parent.name.rpartition("_")[2])


def _markdown(found: dict[str, Any]) -> str:
    minutes = f", {found['seconds'] / 60:.0f} min" if found["seconds"] else ""
    lines = [
        "# Noise scale and critical batch size while training",
        "",
        f"`python benchmarks/batch_size.py run`, then `report`: {found['date']}, {found['machine']}, two ranks, torch "
        f"{found['torch']}{minutes}. Numbers: [batch_size.json](batch_size.json).",
        "",
        "The small Llama (`configs/models/llama_small.json`) on the source and language reference of Python, sequences "
        f"of {SEQ_LENGTH} tokens. Base runs: {BATCH} sequences per step, ZeRO-2, bf16, the learning rate of "
        f"`configs/NAME_zero2.json`, constant after {WARMUP} steps. Branches: "
        "[`ds-optim batch-size measure`](../batch_size.md), learning rate by the square root of the batch, held-out "
        "loss on 128 sequences. One run each.",
        "",
        "![Noise scale against step, and loss against batch size](batch_size.png)",
        "",
        "## The noise scale while training",
        "",
        *_growth(found["readings"]),
        "",
        "## Loss against batch size",
    ]
    for one in found["measurements"]:
        lines += ["", *_measurement(one)]
    return "\n".join(lines) + "\n"


def _growth(readings: dict[str, list[dict[str, Any]]]) -> list[str]:
    lines = ["| optimizer | step | noise scale, sequences | interval |", "|---|---:|---:|---:|"]
    words = []
    for optimizer, all_of_it in readings.items():
        if not all_of_it:
            words.append(f"{NAMES[optimizer]}: never ready.")
            continue
        for one in all_of_it[:: max(1, len(all_of_it) // 8)]:
            low, high = one["interval"]
            lines.append(
                f"| {NAMES[optimizer]} | {one['step']} | {one['sequences']:,.1f} | {low:,.1f} to {high:,.1f} |"
            )
        first, last = all_of_it[0], all_of_it[-1]
        apart = first["interval"][1] < last["interval"][0] or last["interval"][1] < first["interval"][0]
        words.append(
            f"{NAMES[optimizer]}: {first['sequences']:,.1f} at step {first['step']}, {last['sequences']:,.1f} at step "
            f"{last['step']}, {last['sequences'] / first['sequences']:.2f} times as much; the two intervals "
            f"{'do not overlap' if apart else 'overlap'}."
        )
    return [*lines, "", *(f"- {line}" for line in words)]


def _measurement(one: dict[str, Any]) -> list[str]:
    tokens = sorted({branch["tokens"] for branch in one["branches"]})
    noise = one["noise_scale"] or {}
    if noise.get("ready"):
        low, high = noise["interval"]
        estimate = f"The baseline's noise scale: {noise['sequences']:,.1f} sequences ({low:,.1f} to {high:,.1f})."
    else:
        estimate = f"The baseline's noise scale: not ready ({noise.get('why', 'not asked for')})."
    if one["base"] is not None:
        low, high = one["base"]["interval"]
        estimate += f" The base run's at the checkpoint: {one['base']['sequences']:,.1f} ({low:,.1f} to {high:,.1f})."
    lines = [
        f"### {one['optimizer']}, from step {one['step']}",
        "",
        f"{' to '.join(f'{count:,}' for count in tokens)} tokens per branch, tolerance {one['tolerance']:g}. "
        f"{one['critical_batch']['words']} {estimate}",
        "",
        "| batch | steps | learning rate x | held-out loss | from the baseline | standard error | within |",
        "|---:|---:|---:|---:|---:|---:|---|",
    ]
    branches = {branch["batch"]: branch for branch in one["branches"]}
    for row in one["rows"]:
        branch = branches[row["batch"]]
        start = f"| {row['batch']} | {branch['steps']} | {branch['lr_scale']:.3g} |"
        if row["loss"] is None or row["difference"] is None:
            lines.append(f"{start} - | - | - | {row['failure'] or 'no baseline'} |")
            continue
        within = ("yes" if row["within"] else "no") + (", not clearly" if row["clear"] is False else "")
        error = "-" if row["standard_error"] is None else f"{row['standard_error']:.4f}"
        lines.append(f"{start} {row['loss']:.4f} | {row['difference']:+.4f} | {error} | {within} |")
    return lines


def _draw(found: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for optimizer, readings in found["readings"].items():
        steps = [one["step"] for one in readings]
        left.plot(steps, [one["sequences"] for one in readings], label=NAMES[optimizer])
        left.fill_between(
            steps, [one["interval"][0] for one in readings], [one["interval"][1] for one in readings], alpha=0.2
        )
    left.set_xlabel("step")
    left.set_ylabel("noise scale, sequences (95 % interval)")
    left.set_ylim(bottom=0)
    left.legend()
    right.set_xscale("log", base=2)
    for one in found["measurements"]:
        rows = [row for row in one["rows"] if row["difference"] is not None]
        errors = [2 * (row["standard_error"] or 0) for row in rows]
        batches = [row["batch"] for row in rows]
        differences = [row["difference"] for row in rows]
        label = f"{one['optimizer']}, step {one['step']}"
        right.errorbar(batches, differences, yerr=errors, marker="o", capsize=3, label=label)
    right.axhspan(0, found["measurements"][0]["tolerance"], color="gray", alpha=0.3, label="tolerance")
    every = sorted({row["batch"] for one in found["measurements"] for row in one["rows"]})
    right.set_xticks(every, [str(batch) for batch in every])
    right.minorticks_off()
    right.set_xlabel("sequences per step")
    right.set_ylabel("held-out loss minus the baseline's (2 standard errors)")
    right.legend()
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    app()
