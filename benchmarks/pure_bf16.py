"""Training without fp32 master weights: does stochastic rounding keep up with fp32? A small Llama on real text.

    OMP_NUM_THREADS=1 python benchmarks/pure_bf16.py       # minutes of one core; writes docs/results/pure_bf16.md

The same model (that of ``benchmarks/warm_start.py``), batches and settings three times for each of the six optimizers:
in fp32; in bf16 throughout (weights, activations, gradients) with updates rounded to nearest; and the same with
``bf16_stochastic_round``. SWAN's bf16 runs keep their state in bf16 too, as its memory claim does. Warm-up, then a
cosine to a tenth; each optimizer has its usual multiple of AdamW's learning rate. Only logits become fp32, for the
loss. The held-out loss is that after the last step. One thread for a run, one seed; optimizers side by side on the
cores at hand.

Ends with status 1 if a stochastic run is more than 2 % above the fp32 loss.
"""

from __future__ import annotations

import datetime
import math
import multiprocessing
import os
import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pages

os.environ.setdefault("DS_ACCELERATOR", "cpu")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "launcher"))

import torch
from convergence import _machine
from torch import nn
from warm_start import BATCH, BETAS, HIDDEN, LAYERS, LENGTH, RECIPES, VOCABULARY, Recipe, Text, llama

import ds_optim

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results" / "pure_bf16.md"
STEPS, WARMUP, PEAK, FLOOR = 200, 30, 1e-3, 0.1
ALLOWED = 0.02
ALL = {"AdamW": Recipe(1, {**BETAS, "weight_decay": 0.1}), **RECIPES}


@dataclass(frozen=True, slots=True)
class Result:
    """The end of a run.

    Attributes:
        loss: held out.
        moved: of the parameters' elements, the part that the last step changed.
        bytes: per parameter: weights, gradients and state, as they lie in memory.
        seconds: of all steps.
    """

    loss: float
    moved: float
    bytes: tuple[float, float, float]
    seconds: float


def learning_rate(step: int) -> float:
    """Of AdamW at ``step``, from 0."""
    if step < WARMUP:
        return PEAK * (step + 1) / WARMUP
    turn = math.pi * (step - WARMUP) / (STEPS - WARMUP)
    return PEAK * (FLOOR + (1 - FLOOR) * (1 + math.cos(turn)) / 2)


def run(name: str, dtype: torch.dtype, text: Text, **options: Any) -> Result:
    """Train the model from its first weights."""
    recipe, model = ALL[name], llama().to(dtype)
    if name == "SWAN":
        options["state_dtype"] = dtype
    model.get_output_embeddings().register_forward_hook(lambda *call: call[-1].float())
    optimizer = getattr(ds_optim, name)(model.named_parameters(), roles=model, **recipe.settings, **options)
    started = time.perf_counter()
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = recipe.ratio * learning_rate(step)
        text.loss(model, step).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if step == STEPS - 1:
            sizes = memory(model, optimizer)
            before = [parameter.detach().clone() for parameter in model.parameters()]
        optimizer.step()
        optimizer.zero_grad()
    seconds = time.perf_counter() - started
    changed = sum(int((p != old).sum()) for p, old in zip(model.parameters(), before, strict=True))
    return Result(text.held_out_loss(model), changed / sum(old.numel() for old in before), sizes, seconds)


def compare(name: str) -> tuple[Result, Result, Result]:
    """In fp32, rounded to nearest and stochastically; a process of its own."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", ".*set bf16_stochastic_round=True")
    text = Text()
    return (
        run(name, torch.float32, text),
        run(name, torch.bfloat16, text),
        run(name, torch.bfloat16, text, bf16_stochastic_round=True),
    )


def memory(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[float, float, float]:
    """Bytes per parameter of weights, gradients and state."""
    parameters = list(model.parameters())
    count = sum(p.numel() for p in parameters)
    grads = [p.grad for p in parameters if p.grad is not None]
    state = [value for of_one in optimizer.state.values() for value in of_one.values()]
    return tuple(sum(t.numel() * t.element_size() for t in kind) / count for kind in (parameters, grads, state))  # type: ignore[return-value]


def main() -> int:
    started, text, rows, worst = time.perf_counter(), Text(), list[str](), 0.0
    with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn")) as processes:
        for name, results in zip(ALL, processes.map(compare, ALL), strict=True):
            fp32, _, stochastic = results
            worst = max(worst, stochastic.loss / fp32.loss - 1)
            rows.append(row(name, *results))
            print(rows[-1], flush=True)
    report = page(rows, text.about, sum(p.numel() for p in llama().parameters()), started)
    pages.write(RESULTS, report)
    print(report)
    return int(not worst <= ALLOWED)


def row(name: str, fp32: Result, nearest: Result, stochastic: Result) -> str:
    apart = [one.loss / fp32.loss - 1 for one in (nearest, stochastic)]
    cells = [
        name,
        f"{ALL[name].ratio * PEAK:g}",
        f"{fp32.loss:.4f}",
        *(f"{100 * value:+.2f}" for value in apart),
        "yes" if apart[1] <= ALLOWED else "NO",
        *(f"{100 * one.moved:.0f}" for one in (fp32, nearest, stochastic)),
        *(" + ".join(f"{part:.2f}" for part in one.bytes) + f" = {sum(one.bytes):.2f}" for one in (fp32, stochastic)),
    ]
    return f"| {' | '.join(cells)} |"


def page(rows: list[str], about: str, parameters: int, started: float) -> str:
    settings = "; ".join(
        f"{name} " + ", ".join(f"{key} {value}" for key, value in recipe.settings.items())
        for name, recipe in ALL.items()
    )
    return f"""# Training in bf16 without fp32 master weights

`python benchmarks/pure_bf16.py`: {datetime.date.today()}, {_machine()}, one thread a run, torch {torch.__version__}, \
{time.perf_counter() - started:.0f} s.

A Llama of {parameters / 1e6:.2f} M parameters ({LAYERS} layers, {HIDDEN} wide, vocabulary {VOCABULARY}) on the \
interpreter's own text ({about}), {BATCH} x {LENGTH} tokens a step, {STEPS} steps: {WARMUP} of warm-up to the learning \
rate in the table, then a cosine to {FLOOR:g} of it. The same batches and first weights in every run.

`fp32`: held-out loss after the last step. The other losses are relative to it, in percent; negative is better. They \
are of runs in bf16 throughout, with updates rounded to nearest or stochastically (`bf16_stochastic_round=True`). \
`held`: the stochastic run is at most {ALLOWED:.0%} above fp32. `moved`: elements that the last step changed, in \
percent, in fp32, rounded to nearest, stochastically. Bytes per parameter: weights + gradients + state, as they lie in \
memory before the last step; SWAN's state is fp32 in the fp32 run and bf16 in the others, the others' is fp32.

| optimizer | lr | fp32 | nearest | stochastic | held | moved: fp32 | nearest | stochastic | bytes: fp32 | bytes: bf16 |
|---|---:|---:|---:|---:|---|---:|---:|---:|---:|---:|
{chr(10).join(rows)}

Settings: {settings}.
"""


if __name__ == "__main__":
    sys.exit(main())
