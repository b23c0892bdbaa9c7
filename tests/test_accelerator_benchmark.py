"""benchmarks/accelerator.py, at toy size on the CPU: that it runs, and ends. Its numbers are for accelerators."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_optim.kernels import native

BENCHMARK = Path(__file__).resolve().parents[1] / "benchmarks" / "accelerator.py"
sys.path.insert(0, str(BENCHMARK.parent))

import accelerator  # noqa: E402
import accelerator_soundness  # noqa: E402
import accelerator_training  # noqa: E402
import convergence  # noqa: E402
from accelerator_bench import Bench, Sizes, TimeIsUpError  # noqa: E402

import forked  # noqa: E402

CPU = torch.device("cpu")
OPTIMIZERS = tuple(convergence.RECIPES)
FOUND_BY = {  # findings of every section but the selftest, which has its own tests, and training
    "bandwidth": [
        f"{name}, 60,000 elements in {dtype}, state in {kept}"
        for dtype, kept in (("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16"))
        for name in ("AdamW", "Lion", "Adan", "AdamMini")
    ],
    "many_tensors": [
        f"{name}, 300 tensors{what}"
        for name in ("AdamW", "Lion", "Adan", "AdamMini")
        for what in ("", ", the host's time")
    ],
    "matrices": [
        *(f"SWAN, 1 layers of 128, {precision}" for precision in ("ieee", "tf32", "bf16")),
        *(f"Newton-Schulz in {precision}" for precision in ("ieee", "tf32", "bf16")),
    ],
    "roots": [
        f"root of 64, condition {condition}, {precision}"
        for condition in ("1e+02", "1e+06", "1e+10")
        for precision in ("ieee", "bf16")
    ],
    "shampoo": ["Shampoo, 8 x 128 x 256"],
    "bits": [f"{name}, cut and whole" for name in ("AdamW", "Lion", "Adan", "AdamMini")],
    "surroundings": [
        *(f"steps under {around}" for around in ("a dispatch mode", "a default device", "autocast")),
        "capture in a CUDA graph is refused",
        "a step without a C compiler",
    ],
    "accounts": [f"{name}'s account" for name in ("AdamW", "AdamMini", "SWAN")],
    "noise_scale": ["noise scale"],
    "two_ranks": [f"{name} on cpu: the same weights on all ranks" for name in ("AdamMini", "SWAN", "Shampoo")],
    "engines": [f"{name} in DeepSpeed engines" for name in ("AdamW", "AdamMini", "SWAN", "Shampoo")],
}
ABOUT_TIME = ("bandwidth", "many_tensors", "matrices", "shampoo")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = forked.environment()
    environment.pop("TRITON_INTERPRET", None)  # it is for users; on a CPU no program of Triton's is asked for
    command = [forked.python(), str(BENCHMARK), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def bench(minutes: float = 10) -> Bench:
    return Bench(CPU, Sizes.chosen(small=True), minutes)


def test_without_an_accelerator_it_says_so() -> None:
    done = run()
    assert done.returncode == 2
    assert "no accelerator here" in done.stderr


def test_every_section_runs_at_toy_size(tmp_path: Path) -> None:
    out = tmp_path / "not" / "there yet"
    sections = (*FOUND_BY, "convergence")
    assert {*sections, "selftest"} == accelerator.SECTIONS.keys()
    done = run("--small", "--only", *sections, "--out", str(out))
    assert done.returncode in (0, 1), done.stderr
    found = json.loads((out / "accelerator.json").read_text(encoding="utf-8"))["sections"]
    training = found.pop("convergence")
    assert {section: [one["check"] for one in every] for section, every in found.items()} == FOUND_BY
    sound = [one for section, every in found.items() for one in every if section not in ABOUT_TIME]
    assert "FAIL" not in {one["verdict"] for one in sound}, sound
    assert all(one["verdict"] == "PASS" for one in training), training
    ran = [one["check"].partition(",")[0] for one in training]
    every = len(OPTIMIZERS)
    assert [sorted(ran[begin : begin + every]) for begin in range(0, 3 * every, every)] == [sorted(OPTIMIZERS)] * 3
    text = (out / "accelerator.md").read_text(encoding="utf-8")
    assert all(one["check"] in text for every in found.values() for one in every)


# -- time -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("section", ["bandwidth", "two_ranks", "convergence"])
def test_when_time_is_up_no_section_begins(section: str) -> None:
    [finding] = accelerator.within(bench(0), section)
    assert (finding.check, finding.verdict) == (f"the rest of {section}", "NOT HERE")


def test_a_section_ends_between_two_measurements() -> None:
    here = bench()
    findings = accelerator.within(here, "bandwidth")
    assert next(findings).check == FOUND_BY["bandwidth"][0]
    here.ends = 0
    [rest] = findings
    assert (rest.verdict, rest.said) == ("NOT HERE", "time was up after what stands above")


def test_a_run_that_time_overtakes_is_dropped_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = 0

    def look(self: Bench, done: str = "") -> None:
        nonlocal looks
        looks += 1
        if (
            looks > 1 + len(OPTIMIZERS) * 20 + 10 + 4
        ):  # the section's, steps that are timed, the first run's, some of the second's
            raise TimeIsUpError(f"time was up after {done}")

    monkeypatch.setattr(Bench, "look", look)
    whole, dropped, rest = accelerator.within(bench(), "convergence")
    assert whole.verdict == "PASS"
    assert (dropped.verdict, dropped.said) == ("NOT HERE", "dropped: time was up after 4 of 10 steps")
    assert (rest.check, rest.verdict) == ("the rest of convergence", "NOT HERE")


@pytest.mark.parametrize("left", [0.0, 50.0, 400.0, 1e6])
def test_runs_have_tokens_that_fit_into_the_time(left: float) -> None:
    setting = dataclasses.replace(Sizes.chosen(small=False).setting, batch_size=128)
    seconds = {"AdamW": 0.01, "Shampoo": 0.04, "SWAN": 0.03}
    tokens = accelerator_training.affordable(seconds, setting, left, 6e7)
    steps = dataclasses.replace(setting, tokens=tokens).steps
    assert 3 * sum(steps * one for one in seconds.values()) <= left
    assert tokens == (round(6e7) if left == 1e6 else pytest.approx(left / 0.24 * 0.85 * 128 * 128, rel=0.01, abs=1))


@pytest.mark.parametrize("left", [400.0, 1.0])
def test_the_slowest_begin_and_what_does_not_fit_is_said(left: float, monkeypatch: pytest.MonkeyPatch) -> None:
    times = {name: 0.01 + 0.001 * index for index, name in enumerate(OPTIMIZERS)}
    times |= {"Shampoo": 0.3, "SWAN": 0.2}
    slowest_first = ["Shampoo", "SWAN", *(name for name in reversed(OPTIMIZERS) if name not in ("Shampoo", "SWAN"))]
    monkeypatch.setattr(accelerator_training, "seconds_per_step", lambda bench, text, name, setting: times[name])
    monkeypatch.setattr(accelerator_training, "trained", lambda *_: 1.0)
    here = dataclasses.replace(Sizes.chosen(small=True), tokens_per_parameter=20)
    findings = [*accelerator_training.with_batch(Bench(CPU, here, left / 60), None, 8)]
    if left == 1:
        [finding] = findings
        assert (finding.check, finding.verdict) == ("8 sequences", "NOT HERE")
        assert "more --minutes" in finding.said
    else:
        assert [one.check.partition(",")[0] for one in findings] == slowest_first * 3
        [steps] = {one.numbers["tokens"] / (8 * 16) for one in findings}
        assert 0 < 3 * steps * sum(times.values()) < left


# -- what is measured -------------------------------------------------------------------------------------------------


def test_twenty_products_are_timed_together(monkeypatch: pytest.MonkeyPatch) -> None:
    products = []
    multiply = torch.matmul

    def counted(*given: Any, **named: Any) -> torch.Tensor:
        products.append(given)
        return multiply(*given, **named)

    def timed(self: Bench, contender: Any) -> list[float]:
        contender()
        return [10.0]

    monkeypatch.setattr(torch, "matmul", counted)
    monkeypatch.setattr(Bench, "milliseconds", timed)
    assert accelerator.matmul_rate(bench()) == 20 * 2 * 128**3 / 10
    assert len(products) == 20


def test_a_device_is_asked_for_its_name_by_its_own_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.xpu, "get_device_name", lambda _: "Data Center GPU Max 1550")
    assert accelerator.name_of(torch.device("xpu", 0)) == "Data Center GPU Max 1550"
    assert accelerator.name_of(torch.device("mps")) == "mps"
    assert accelerator.name_of(CPU)


def test_bits_that_depend_on_cuts_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = native.elementwise

    def wrong(formula: Any, operands: Any) -> None:
        right(formula, operands)
        if len(operands.params) > 1:
            operands.params[0][:1].mul_(1.001)

    monkeypatch.setattr(native, "elementwise", wrong)
    verdicts = [one.verdict for one in accelerator_soundness.bits(bench())]
    assert verdicts == ["FAIL", "FAIL", "FAIL", "PASS"]  # Adam-mini has blocks


def test_a_process_that_says_nothing_is_an_error_with_its_last_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerator_soundness, "TWO_RANKS", "raise SystemExit('no such cable')")
    [finding] = accelerator.within(bench(), "two_ranks")
    assert (finding.check, finding.verdict) == ("the section two_ranks", "FAIL")
    assert "exit status 1" in finding.said
