"""The commands of benchmarks/convergence.py: which runs they ask for, and what their page says of finished ones."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import convergence
from convergence import IN_EIGHT_BITS, Record, Run

Asked = Callable[..., tuple[int, list[str]]]


def finish(out: Path, run: Run, loss: float) -> None:
    """The file of a run that ended with this loss."""
    setting = {"num_hidden_layers": 2, "hidden_size": 8, "vocab_size": 16, "steps": 2, "batch_size": 1}
    setting |= {"seq_length": 4, "warmup": 0.1, "final_lr": 0.1, "clip": 1.0, "held_out_sequences": 2, "evaluations": 2}
    content: dict[str, Any] = {
        "run": {"optimizer": run.optimizer, "lr": run.lr, "extra": run.extra, "seed": run.seed, "name": run.name},
        "curve": [[0, None, 9.0], [4, 8.0, loss + 1], [8, 7.0, loss]],
        "diverged": False,
        "setting": setting,
        "seconds": 2.0,
        "seconds_in_optimizer": 1.0,
        **dict.fromkeys(("date", "machine", "torch", "transformers", "text", "source"), "2026"),
        "parameters": 100,
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{run.name}.json").write_text(json.dumps(content))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Asked:
    """Calls a command whose runs end at once, with the losses that are given; returns its status and what ran."""

    def call(*words: str, losses: Callable[[Run], float] = lambda run: 4.0) -> tuple[int, list[str]]:
        ran: list[str] = []

        def train_all(ask: Callable[[dict[Run, Record]], list[Run]], out: Path, *_: Any) -> None:
            while missing := [run for run in ask(convergence.finished(out)) if run not in convergence.finished(out)]:
                for run in missing:
                    ran.append(run.name)
                    finish(out, run, losses(run))

        monkeypatch.setattr(convergence, "train_all", train_all)
        result = CliRunner().invoke(convergence.app, [*words, "--out", str(tmp_path)])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.output
        return result.exit_code, ran

    return call


def test_learning_rates_go_on_until_the_best_has_a_worse_one_on_either_side(asked: Asked) -> None:
    status, ran = asked("run", "--optimizer", "Muon", losses=lambda run: 4 + abs(run.lr - 4e-3))
    assert (status, ran) == (0, ["Muon-0.001", "Muon-0.002", "Muon-0.0005", "Muon-0.004", "Muon-0.008"])


def test_every_optimizer_has_three_learning_rates(asked: Asked) -> None:
    middles = {name: recipe.learning_rates[1] for name, recipe in convergence.RECIPES.items()}
    _, ran = asked("run", losses=lambda run: abs(run.lr - middles[run.optimizer]))
    assert len(ran) == 3 * len(convergence.RECIPES)


def test_eight_bits_are_held_against_fp32_at_the_same_rate(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "torchao")
    status, ran = asked("int8", losses=lambda run: 4.03 if run.extra == IN_EIGHT_BITS else 4.0)
    coded = "-state_dtype=int8-int8_embeddings=True"
    assert status == 0
    assert ran == [
        *(f"{name}{end}" for name in ("AdamW-0.001", "AdamMini-0.001", "Lion-0.0004") for end in ("", coded)),
        "torchao.optim.AdamW8bit-0.001",
    ]


def test_an_optimizer_that_loses_more_than_one_per_cent_in_eight_bits_fails(asked: Asked) -> None:
    def one_worse(run: Run) -> float:
        return 4.05 if (run.optimizer, run.extra) == ("Lion", IN_EIGHT_BITS) else 4.0

    assert asked("int8", losses=one_worse)[0] == 1


def test_others_follow_the_best_rate_and_the_axes(asked: Asked) -> None:
    asked("run", "--optimizer", "SWAN", losses=lambda run: abs(run.lr - 3e-3))
    assert asked("repeat", "--seed", "1", "--optimizer", "SWAN")[1] == ["SWAN-0.003-seed=1"]
    assert asked("axis")[1] == [f"SWAN-0.003-norm_axis={axis}" for axis in convergence.AXES]


def test_the_page_has_a_line_for_each_pair_and_each_rival(tmp_path: Path) -> None:
    for run, loss in (
        (Run("AdamW", 1e-3), 4.0),
        (Run("AdamW", 1e-3, IN_EIGHT_BITS), 4.02),
        (Run("Lion", 4e-4, IN_EIGHT_BITS), 4.3),  # without its twin
        (Run("bitsandbytes.optim.AdamW8bit", 1e-3), 4.1),
        (Run("SWAN", 6e-3, (("norm_axis", "out"),)), 3.5),
    ):
        finish(tmp_path, run, loss)
    page = convergence.markdown(convergence.finished(tmp_path))
    assert "| AdamW | 0.001 | 4.0000 | 4.0200 | +0.50% | yes |" in page
    assert "| bitsandbytes.optim.AdamW8bit | 0.001 | 4.0000 | 4.1000 | +2.50% | NO |" in page
    assert "| Lion | 0.0004 |" not in page
    assert "| norm_axis | lr 0.006 |" in page
    assert "| Lion-0.0004-state_dtype=int8-int8_embeddings=True | 4.3000 |" in page
