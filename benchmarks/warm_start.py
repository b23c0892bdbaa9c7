"""Does a run that switches from AdamW go on? A small Llama on real text, switched to each optimizer at step 200.

    OMP_NUM_THREADS=1 python benchmarks/warm_start.py       # minutes of one core; writes docs/results/warm_start.md

The model is trained by AdamW and saved. From that checkpoint AdamW goes on unswitched; every other optimizer goes on
warm (`ds_optim.checkpoint.warm_start`) and cold (weights alone, empty state), on the same batches. The held-out loss is
taken on the same sequences at the switch's first step and at every tenth, and compared with AdamW's at the same step.
Beside them, the mapping's choices undone one by one, to show what they are for. The learning rate is constant after
AdamW's warm-up; each optimizer has its usual multiple of AdamW's. The text is that of ``launcher/corpus.py``. fp32, one
process, one thread, one seed.

Ends with status 1 if a warm start is more than 2 % above AdamW's loss anywhere.
"""

from __future__ import annotations

import datetime
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pages

os.environ.setdefault("DS_ACCELERATOR", "cpu")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "launcher"))

import corpus
import torch
import transformers
from convergence import TEXT_CACHE, _machine
from torch import nn
from torch.nn.functional import cross_entropy

import ds_optim
from ds_optim import checkpoint
from ds_optim.checkpoint.warm_start import warm_start

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results" / "warm_start.md"
VOCABULARY, HIDDEN, INTERMEDIATE, LAYERS, HEADS, LENGTH, BATCH = 512, 128, 384, 2, 4, 64, 16
SWITCH, AFTER, EVERY, WARMUP, HELD_OUT = 200, 100, 10, 50, 128
LEARNING_RATE = 1e-3
ALLOWED = 0.02
BETAS = {"betas": (0.9, 0.95)}


@dataclass(frozen=True, slots=True)
class Recipe:
    """How an optimizer goes on: its multiple of AdamW's learning rate, its settings, a choice of the mapping undone.

    Attributes:
        undone: what is undone, in words.
        undo: on one parameter's state.
    """

    ratio: float
    settings: dict[str, Any]
    undone: str = ""
    undo: Callable[[dict[str, Any]], object] | None = None


def _without_factors(state: dict[str, Any]) -> None:
    for key in ("factor_0", "factor_1"):
        if key in state:
            state[key].zero_()


RECIPES = {
    "AdamMini": Recipe(1, {**BETAS, "weight_decay": 0.1}),
    "Lion": Recipe(
        1 / 5,
        {"betas": (0.9, 0.99), "weight_decay": 0.5},
        "momentum m-hat, not a tenth of it",
        lambda state: state["exp_avg"].mul_(10),
    ),
    "Adan": Recipe(
        5,
        {"betas": (0.98, 0.92, 0.99), "weight_decay": 0.02},
        "momentum m-hat, not a fifth of it",
        lambda state: state["exp_avg"].mul_(5),
    ),
    "SWAN": Recipe(1, BETAS),
    "Muon": Recipe(1, {**BETAS, "weight_decay": 0.1}),
    "NorMuon": Recipe(1, {**BETAS, "weight_decay": 0.1}),
    "SOAP": Recipe(
        1,
        {**BETAS, "weight_decay": 0.1, "max_preconditioner_dim": 128},
        "factors empty, not diagonal",
        _without_factors,
    ),
    "Shampoo": Recipe(
        1,
        {**BETAS, "weight_decay": 0.1, "max_preconditioner_dim": 128},
        "factors empty, not diagonal",
        _without_factors,
    ),
}


class Text:
    """Batches to train on, and the held-out loss."""

    def __init__(self) -> None:
        text = corpus.load(corpus.prepare(None, VOCABULARY, TEXT_CACHE, print))
        self.about = text.about
        self._windows = corpus.Windows(text.train, LENGTH, 0)
        held_out = corpus.Windows(text.held_out, LENGTH, 0).global_batch(0, HELD_OUT)
        self._held_out = torch.from_numpy(held_out).split(64)

    def loss(self, model: nn.Module, step: int) -> torch.Tensor:
        """The training loss of batch ``step``."""
        return _loss(model, torch.from_numpy(self._windows.global_batch(step, BATCH)))

    @torch.no_grad()
    def held_out_loss(self, model: nn.Module) -> float:
        return sum(_loss(model, ids).item() for ids in self._held_out) / len(self._held_out)


def _loss(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids, use_cache=False).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def llama() -> nn.Module:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            intermediate_size=INTERMEDIATE,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS,
            max_position_embeddings=LENGTH,
            tie_word_embeddings=False,
        )
    )


def train(model: nn.Module, optimizer: Any, text: Text, steps: range) -> list[float]:
    """Steps numbered from 0; the held-out losses after the first one and every ``EVERY``."""
    losses = []
    for done, step in enumerate(steps, start=1):
        text.loss(model, step).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step >= SWITCH and (done == 1 or done % EVERY == 0):
            losses.append(text.held_out_loss(model))
    return losses


def go_on(name: str, kind: str, folder: Path, text: Text) -> list[float]:
    """Held-out losses after the switch; ``kind``: warm, cold, or undone."""
    model, recipe = llama(), RECIPES[name]
    settings = {"lr": LEARNING_RATE * recipe.ratio, **recipe.settings}
    optimizer = getattr(ds_optim, name)(model.named_parameters(), roles=model, **settings)
    if kind == "cold":
        checkpoint.load(folder, model)
    else:
        warm_start(folder, model, optimizer, weights=True)
    if kind == "undone":
        assert recipe.undo is not None
        for state in optimizer.state.values():
            recipe.undo(state)
    return train(model, optimizer, text, range(SWITCH, SWITCH + AFTER))


def main() -> int:
    torch.set_num_threads(1)
    started = time.perf_counter()
    text = Text()
    model = llama()
    adamw = ds_optim.AdamW(model.named_parameters(), lr=LEARNING_RATE, weight_decay=0.1, **BETAS)
    for step in range(SWITCH):
        adamw.param_groups[0]["lr"] = LEARNING_RATE * min(1.0, (step + 1) / WARMUP)
        train(model, adamw, text, range(step, step + 1))
    at_switch = text.held_out_loss(model)
    rows, worst = list[str](), 0.0
    with tempfile.TemporaryDirectory() as name:
        checkpoint.save(name, model, adamw)
        unswitched = train(model, adamw, text, range(SWITCH, SWITCH + AFTER))
        print("AdamW", unswitched, flush=True)
        for target, recipe in RECIPES.items():
            for kind in ("warm", "cold", *["undone"] * (recipe.undo is not None)):
                losses = go_on(target, kind, Path(name), text)
                apart = [loss / other - 1 for loss, other in zip(losses, unswitched, strict=True)]
                if kind == "warm":
                    worst = max(worst, *apart)
                rows.append(row(target, recipe, kind, apart))
                print(rows[-1], flush=True)
    report = page(at_switch, unswitched, rows, text.about, sum(p.numel() for p in model.parameters()), started)
    pages.write(RESULTS, report)
    print(report)
    return int(not worst <= ALLOWED)


def row(target: str, recipe: Recipe, kind: str, apart: list[float]) -> str:
    called = {"warm": "warm", "cold": "cold", "undone": f"warm, {recipe.undone}"}[kind]
    held = "" if kind != "warm" else "yes" if max(apart) <= ALLOWED else "NO"
    at = " | ".join(f"{100 * apart[index]:+.2f}" for index in (0, 1, 2, 5, len(apart) - 1))
    return f"| {target} | {recipe.ratio:g} | {called} | {at} | {100 * max(apart):+.2f} | {held} |"


def page(
    at_switch: float, unswitched: list[float], rows: list[str], about: str, parameters: int, started: float
) -> str:
    settings = "; ".join(
        f"{name} " + ", ".join(f"{key} {value}" for key, value in recipe.settings.items())
        for name, recipe in RECIPES.items()
    )
    columns = (1, EVERY, 2 * EVERY, 5 * EVERY, AFTER)
    return f"""# Switching from AdamW to another optimizer

`python benchmarks/warm_start.py`: {datetime.date.today()}, {_machine()}, one thread, torch {torch.__version__}, \
{time.perf_counter() - started:.0f} s.

A Llama of {parameters / 1e6:.2f} M parameters ({LAYERS} layers, {HIDDEN} wide, vocabulary {VOCABULARY}) on the \
interpreter's own text ({about}), {BATCH} x {LENGTH} tokens a step. AdamW (lr {LEARNING_RATE:g}, betas \
{BETAS["betas"]}, weight decay 0.1, {WARMUP} steps of warm-up) for {SWITCH} steps: held-out loss {at_switch:.4f}. \
Unswitched it goes on to {unswitched[0]:.4f} after 1 step and {unswitched[-1]:.4f} after {AFTER}. One seed.

Held-out loss relative to the unswitched run at the same step, in percent; negative is better. `held`: a warm start \
is never more than {ALLOWED:.0%} above, at the first and at every tenth of the {AFTER} steps. "Cold" has the \
weights and no state. `lr` is a multiple of AdamW's.

| optimizer | lr | start | {" | ".join(f"step {n}" for n in columns)} | worst | held |
|---|---:|---|{"---:|" * (len(columns) + 1)}---|
{chr(10).join(rows)}

Settings: {settings}.
"""


if __name__ == "__main__":
    sys.exit(main())
