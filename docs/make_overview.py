"""Draws docs/overview.png, the README's picture: what each optimizer keeps, and where it ended in the same short run.

    python docs/make_overview.py

State is predicted for Llama 2 7B with all defaults (`ds-optim estimate`); losses are those of the runs in
docs/results/convergence.json, each at its best learning rate.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

from ds_optim.memory.estimate import Request, predict
from ds_optim.optimizers.registry import optimizers

DOCS = Path(__file__).parent


def state_per_parameter(name: str, model: dict[str, Any]) -> float:
    """Bytes of optimizer state for each parameter of a model."""
    [rank] = predict(Request(model, "llama2_7b", name, precision="bf16", states_only=True)).ranks
    return sum(entry.bytes for entry in rank.state) / rank.elements


def final_losses() -> dict[str, float]:
    """The lowest final held-out loss of each optimizer with its defaults in fp32, first seed."""
    found: dict[str, list[float]] = {}
    for one in json.loads((DOCS / "results" / "convergence.json").read_text(encoding="utf-8")):
        run = one["run"]
        if not (run.get("extra") or run.get("seed") or one["diverged"]):
            found.setdefault(run["optimizer"], []).append(one["curve"][-1][2])
    return {name: min(losses) for name, losses in found.items()}


def draw() -> None:
    """Write the picture."""
    losses = final_losses()
    model = json.loads((DOCS.parent / "configs" / "models" / "llama2_7b.json").read_text(encoding="utf-8"))
    names = list(optimizers())[::-1]
    state, ends = [state_per_parameter(name, model) for name in names], [losses[name] for name in names]
    colors = ["black" if name == "AdamW" else "tab:blue" for name in names]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), sharey=True, layout="constrained")
    left.bar_label(left.barh(names, state, color=colors, height=0.6), fmt="{:.2f}", padding=3, fontsize=9)
    left.set_title("State, bytes per parameter\n(Llama 2 7B, all defaults)", fontsize=10)
    right.hlines(names, losses["AdamW"], ends, color=colors, linewidth=2)
    right.scatter(ends, names, color=colors, zorder=3)
    right.axvline(losses["AdamW"], color="black", linewidth=0.8, linestyle=":")
    for name, end in zip(names, ends, strict=True):
        right.annotate(f"{end:.3f}", (end, name), (0, 6), textcoords="offset points", ha="center", fontsize=9)
    right.set_title("Held-out loss after 1.5 M tokens, lower is better\n(Llama of 3 M, one seed)", fontsize=10)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.12, y=0.09)
    figure.savefig(DOCS / "overview.png", dpi=110)


if __name__ == "__main__":
    draw()
