"""The critical batch size by branching, the advice from a noise scale, and `--branch` of the training job."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import ds_optim
import ds_optim.checkpoint
import forked
from ds_optim.batch_size import branch_runs, branching, verdict
from ds_optim.batch_size.advice import (
    Estimate,
    Shares,
    change,
    excess_steps,
    excess_tokens,
    in_words,
    position,
    share_out,
    sharing_words,
)
from ds_optim.batch_size.learning_rate import rule_of, scale, scaling_rules
from ds_optim.cli import app
from ds_optim.optimizers.registry import optimizers
from pool import ALONE
from test_launcher import (
    CONFIGS,
    LAUNCHER,
    losses,
    refusal_in_pool,
    settings,
    short,  # noqa: F401  (a fixture)
    texts,  # noqa: F401  (a fixture)
    train_in_pool,
)

MAIN = "from ds_optim.cli import main; main()"
POSITIVE = st.floats(1e-3, 1e9)


# -------------------------------------------------------------------------------------------------------------- advice


@given(st.integers(1, 10**4), st.floats(1, 1e4))
def test_steps_and_tokens_lie_on_the_published_trade_off(batch: int, noise: float) -> None:
    assert (excess_steps(batch, noise) - 1) * (excess_tokens(batch, noise) - 1) == pytest.approx(1)


@given(POSITIVE, POSITIVE, POSITIVE)
def test_a_change_is_the_ratio_of_two_points_of_the_trade_off(old: float, new: float, noise: float) -> None:
    made = change(old, new, noise)
    assert made.steps == pytest.approx(excess_steps(new, noise) / excess_steps(old, noise))
    assert made.tokens == pytest.approx(excess_tokens(new, noise) / excess_tokens(old, noise))
    assert made.tokens == pytest.approx(made.steps * new / old)  # a step takes a batch


def test_without_noise_only_steps_count_and_with_nothing_else_only_tokens() -> None:
    assert (change(8, 16, 0).steps, change(8, 16, 0).tokens) == (1, 2)
    assert (change(8, 16, math.inf).steps, change(8, 16, math.inf).tokens) == (0.5, 1)


def test_the_issues_sentence() -> None:
    words = in_words(64, Estimate(213, 213, 213))
    assert words[0].startswith("At 64 sequences you are at 0.3 of the noise scale: below it")
    assert words[1] == "Doubling to 128 costs about 23 % more tokens for about 38 % fewer steps."
    assert words[2] == "Halving to 32 saves about 12 % of the tokens for about 77 % more steps."
    assert len(in_words(63, Estimate(213, 213, 213))) == 2  # an odd batch has no half


def test_the_intervals_ends_are_carried_through() -> None:
    estimate = Estimate(213, 100, 400)
    assert "0.3 of the noise scale (between 0.16 and 0.64)" in position(64, estimate)
    # 100: 228/164, of which 64/128 of the steps; 400: 528/464.
    wanted = "about 23 % (14 to 39 %) more tokens for about 38 % (30 to 43 %) fewer steps."
    assert in_words(64, estimate)[1].endswith(wanted)


@pytest.mark.parametrize(
    ("batch", "interval", "wanted"),
    [
        (10, (90, 110), "below it"),
        (100, (90, 110), "near it"),
        (1000, (90, 110), "above it"),
        (1000, (90, 5000), "most likely above it, but the interval does not settle that"),
        (10, (0, math.inf), "most likely below it, but the interval does not settle that"),
    ],
)
def test_a_position_is_said_as_firmly_as_the_interval_allows(
    batch: int, interval: tuple[float, float], wanted: str
) -> None:
    said = position(batch, Estimate(100, *interval))
    assert wanted in said
    assert ("settle" in said) == ("settle" in wanted)


@pytest.mark.parametrize("numbers", [(0, 0, 0), (-1, -1, -1), (10, 11, 12), (10, 1, 9), (math.inf, 1, math.inf)])
def test_an_impossible_noise_scale_is_refused(numbers: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="must be more than 0 and lie in its interval"):
        Estimate(*numbers)


@given(st.integers(1, 200), st.integers(1, 9), st.integers(1, 50))
def test_a_batch_is_shared_out_whole_in_the_fewest_passes(each: int, ranks: int, largest: int) -> None:
    shares = share_out(each * ranks, ranks, largest)
    assert shares.batch == each * ranks
    assert shares.micro_batch <= largest
    assert not [n for n in range(shares.micro_batch + 1, largest + 1) if each % n == 0]


def test_what_cannot_be_shared_out_is_refused_with_a_remedy() -> None:
    with pytest.raises(ValueError, match="no multiple of 3 ranks"):
        share_out(8, 3, 4)
    with pytest.raises(ValueError, match="a higher ZeRO stage"):
        share_out(8, 2, 0)


def test_micro_batch_accumulation_and_ranks_are_advised() -> None:
    exact = Estimate(213, 213, 213)
    words = sharing_words(Shares(4, 8, 2), [(2, 16), (4, 12)], exact)
    assert words[0] == "The largest micro-batch that fits is 16 on 2 ranks."
    assert "micro-batch 16 x accumulation 2 x 2 ranks instead of micro-batch 4 x accumulation 8 x 2 ranks" in words[1]
    assert words[2].startswith(
        "Doubling on 2 ranks: micro-batch 16 x accumulation 4 x 2 ranks; the run takes about 23 % "
    )
    assert words[3].startswith(
        "Doubling on 4 ranks: micro-batch 8 x accumulation 4 x 4 ranks; the run takes about 38 % "
    )
    assert "more time" in words[2]
    assert "less time" in words[3]
    above = sharing_words(Shares(16, 2, 2), [(2, 16), (1, 8)], Estimate(20, 20, 20))
    assert above[1].startswith(
        "Halving on 2 ranks: micro-batch 16 x accumulation 1 x 2 ranks; the run takes about 38 % less"
    )
    assert above[2].startswith(
        "Halving on 1 rank: micro-batch 8 x accumulation 4 x 1 rank; the run takes about 24 % more"
    )
    assert "predicted not to" in sharing_words(Shares(16, 2, 2), [(2, 8)], exact)[0]
    assert sharing_words(Shares(1, 2, 2), [(2, 0)], exact) == [
        "On 2 ranks not even a micro-batch of 1 fits: more ranks, a higher ZeRO stage, offload or checkpointing."
    ]


def test_all_optimizers_have_a_rule_and_a_reason() -> None:
    rules = scaling_rules()
    assert len(optimizers()) == 9
    assert all(rules[name].law == "sqrt" and rules[name].source for name in optimizers())
    page = (LAUNCHER.parent / "docs" / "batch_size.md").read_text()
    assert [name for name, rule in rules.items() if f"| {name} | {rule.law} |" not in page] == []
    assert (scale("sqrt", 4), scale("linear", 4), scale("none", 4)) == (2, 4, 1)
    with pytest.raises(ValueError, match=r"no learning-rate rule is known for Sophia.*give --lr-rule"):
        rule_of("Sophia")


# -------------------------------------------------------------------------------------------------- the advice command


def said(*arguments: object, status: int = 0) -> str:
    result = CliRunner().invoke(app, ["batch-size", *map(str, arguments)], env={"COLUMNS": "200"})
    assert result.exit_code == status, result.output
    return result.output


def test_advice_from_numbers_and_from_a_run(tmp_path: Path) -> None:
    assert "costs about 23 % (20 to 26 %) more tokens" in said(
        "advise", "--batch", 64, "--noise-scale", 213, "--interval", "180,250"
    )
    noise = {"ready": True, "why": "", "sequences": 213.0, "interval": [180.0, 250.0], "tokens": 1.0, "updates": 9}
    run = {"batch": 64, "noise_scale": noise, "ranks": 2, "micro_batch": 4, "seq_length": 128}
    (tmp_path / "summary.json").write_text(json.dumps(run))
    assert "costs about 23 % (20 to 26 %) more tokens" in said("advise", "--from", tmp_path)
    model, config = CONFIGS / "models" / "llama_small.json", CONFIGS / "adamw_zero2.json"
    more = said(
        "advise",
        "--from",
        tmp_path / "summary.json",
        "--model",
        model,
        "--deepspeed",
        config,
        "--device-memory",
        "300MiB",
        "--reserve",
        "0GiB",
    )
    assert "The largest micro-batch that fits is " in more
    assert "Doubling on 4 ranks: micro-batch " in more


def test_advice_says_what_it_lacks(tmp_path: Path) -> None:
    assert "give --noise-scale, or --from" in said("advise", "--batch", 64, status=1)
    assert "how large is the batch" in said("advise", "--noise-scale", 64, status=1)
    assert "--interval is '3': give LOW,HIGH" in said(
        "advise", "--batch", 64, "--noise-scale", 5, "--interval", 3, status=1
    )
    model = CONFIGS / "models" / "llama_60m.json"
    wanted = "--ranks, --micro-batch, --seq-length, --deepspeed, --device-memory are needed too"
    assert wanted in said("advise", "--batch", 64, "--noise-scale", 5, "--model", model, status=1)
    for content, reason in (
        ({"batch": 8}, "was --noise-scale given?"),
        ({"noise_scale": {"ready": False, "why": "only 3 updates"}}, "the run has no noise scale: only 3 updates"),
        ({"noise_scale": {"ready": True, "sequences": "many"}}, "it cannot be read"),
    ):
        (tmp_path / "summary.json").write_text(json.dumps(content))
        assert reason in said("advise", "--from", tmp_path, status=1)


# ------------------------------------------------------------------------------------------------ the measuring command

# Stands for a user's training command. The loss grows from a critical batch of 32 on; 64 sequences do not fit.
FAKE = """
import argparse, json, math, pathlib, sys
parser = argparse.ArgumentParser()
for option in ("--branch", "--output"):
    parser.add_argument(option, type=pathlib.Path, required=True)
for option in ("--batch", "--steps", "--skip-sequences", "--broken", "--diverges", "--says"):
    parser.add_argument(option, type=int, default=0)
parser.add_argument("--lr-scale", type=float, required=True)
parser.add_argument("--critical", type=float, default=32)
parser.add_argument("--noise-scale", action="store_true")
given = parser.parse_args()
with open(pathlib.Path(__file__).with_name("calls.txt"), "a") as calls:
    calls.write(" ".join(sys.argv[1:]) + "\\n")
if given.batch == given.broken:
    raise MemoryError("4 TB are needed")
loss = 4 + 0.1 * max(0, math.log2(given.batch / given.critical)) + 1e-3 * (given.skip_sequences > 0)
losses = [loss + 0.1 * (-1) ** i + 0.001 * (i % 3) * (given.batch > 8) - 0.001 * (given.batch > 8) for i in range(12)]
summary = {"held_out_loss_after": loss, "held_out_losses_after": losses, "batch": given.says or given.batch}
if given.batch == given.diverges:
    summary["held_out_loss_after"] = math.nan
if given.noise_scale:
    summary["noise_scale"] = {"ready": True, "why": "", "sequences": 40.0, "interval": [30.0, 50.0]}
given.output.mkdir(exist_ok=True)
(given.output / "summary.json").write_text(json.dumps(summary))
"""


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint of AdamW, by a run of 8 sequences of 16 tokens a step."""
    model = torch.nn.Linear(4, 4)
    optimizer = ds_optim.AdamW(model.named_parameters())
    model(torch.ones(4)).sum().backward()
    optimizer.step()
    ds_optim.checkpoint.save(tmp_path / "saved", model, optimizer, client_state={"batch": 8, "seq_length": 16})
    return tmp_path / "saved"


@pytest.fixture
def fake(tmp_path: Path, saved: Path) -> Callable[..., str]:
    """Run ``measure`` with the stand-in; returns what it printed."""
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(FAKE))

    def measure(*more: object, batches: str = "16,8,32,64", options: tuple[object, ...] = (), status: int = 0) -> str:
        common = ["--checkpoint", saved, "--batches", batches, "--tokens", 16 * 640, "--output", tmp_path / "out"]
        return said("measure", *common, *options, "--", sys.executable, script, *more, status=status)

    return measure


def calls(tmp_path: Path) -> list[dict[str, str]]:
    """The options of every run of the stand-in, by name."""
    path = tmp_path / "calls.txt"
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        words = [word for word in line.split() if word != "--noise-scale"]
        found.append(dict(zip(words[::2], words[1::2], strict=True)))
    return found


def result(tmp_path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((tmp_path / "out" / "result.json").read_text())
    return found


def test_it_finds_the_largest_batch_within_the_tolerance(fake: Callable[..., str], tmp_path: Path) -> None:
    printed = fake()
    assert "The critical batch size is 32 sequences or more, and less than 64." in printed
    assert "The noise scale, an estimate of the same, is 40 sequences (interval 30 to 50)." in printed
    assert "At 8 sequences you are at 0.2 of the noise scale" in printed
    found = result(tmp_path)
    assert {key: found["critical_batch"][key] for key in ("kind", "largest", "first_outside")} == {
        "kind": "between",
        "largest": 32,
        "first_outside": 64,
    }
    assert [row["batch"] for row in found["rows"]] == [8, 16, 32, 64]
    assert [row["difference"] for row in found["rows"]] == pytest.approx([0, 0, 0, 0.1])
    # Differences of the sequences are -0.001, 0, 0.001, four times each.
    assert found["rows"][1]["standard_error"] == pytest.approx(1e-3 * math.sqrt(8 / 11 / 12))
    assert (tmp_path / "out" / "result.png").stat().st_size > 10_000
    # The same tokens for all; the rate by the square root; the baseline, the checkpoint's own batch, comes first.
    options = calls(tmp_path)
    assert [int(one["--batch"]) for one in options] == [8, 16, 32, 64]
    assert {int(one["--batch"]) * int(one["--steps"]) for one in options} == {640}
    assert [float(one["--lr-scale"]) for one in options] == pytest.approx([1, 2**0.5, 2, 8**0.5])
    assert {one["--branch"] for one in options} == {str((tmp_path / "saved" / "step1").resolve())}


def test_finished_branches_are_kept_and_missing_ones_run(fake: Callable[..., str], tmp_path: Path) -> None:
    fake(batches="8,16")
    (tmp_path / "out" / "batch_16" / branching.FINISHED).unlink()  # as an interruption would leave it
    again = fake(batches="8,16,32")
    assert [int(one["--batch"]) for one in calls(tmp_path)] == [8, 16, 16, 32]
    assert "batch_8: held-out loss 4.0000 (finished before)" in again
    assert "at least 32 sequences. Nothing larger was tried." in again


def test_a_changed_setting_is_refused_with_the_difference(fake: Callable[..., str], tmp_path: Path) -> None:
    fake(batches="8,16")
    refused = fake("--critical", 64, batches="8,16", status=1)
    assert "command was" in refused
    assert "--critical 64" in refused
    assert "give another --output" in refused
    assert "learning-rate scale was 1.4142" in fake(batches="8,16", options=("--lr-rule", "linear"), status=1)
    assert "steps was 80 and is now 40" in fake(batches="8,16", options=("--tokens", 16 * 320), status=1)
    assert len(calls(tmp_path)) == 2


def test_a_branch_that_fails_or_diverges_does_not_stop_the_others(fake: Callable[..., str], tmp_path: Path) -> None:
    printed = fake("--broken", 64, "--critical", 1000, batches="8,16,64,128")
    assert "batch_64: exit status 1: MemoryError: 4 TB are needed (see" in printed
    assert "batch_128: held-out loss" in printed
    assert "at least 16 sequences. 64 cannot be judged: exit status 1" in printed
    assert not (tmp_path / "out" / "batch_64" / branching.FINISHED).exists()  # it is tried again next time
    assert result(tmp_path)["rows"][2]["loss"] is None


def test_a_branch_that_diverged_is_outside_the_tolerance(fake: Callable[..., str], tmp_path: Path) -> None:
    printed = fake("--diverges", 32, "--critical", 1000)
    assert "batch_32: it diverged" in printed
    assert "16 sequences or more, and less than 32." in printed
    fake("--diverges", 32, "--critical", 1000)
    assert len(calls(tmp_path)) == 4  # that is a result, which is kept


def test_without_a_baseline_nothing_is_said(fake: Callable[..., str]) -> None:
    printed = fake("--broken", 8, batches="8,16", status=1)
    assert "batch_8: exit status 1: MemoryError" in printed
    assert "the baseline, batch_8, failed, and there is nothing to hold the others against" in printed
    assert "batch_16:" not in printed  # it was not run


def test_a_command_that_took_another_batch_is_found_out(fake: Callable[..., str]) -> None:
    assert "batch_16: summary.json says that the batch was 8" in fake("--says", 8, batches="8,16", status=1)


def test_a_command_that_cannot_be_started_or_says_nothing_is_a_failure(saved: Path, tmp_path: Path) -> None:
    common = ["measure", "--checkpoint", saved, "--batches", "8,16", "--tokens", 4096, "--output", tmp_path / "out"]
    assert "it cannot be started: [Errno 2]" in said(*common, "--", "no-such-program", status=1)
    assert "left no summary" in said(*common, "--", sys.executable, "-c", "pass", status=1)
    killed = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    assert "batch_8: signal SIGKILL: it said nothing" in said(*common, "--", sys.executable, "-c", killed, status=1)


def test_a_measurement_that_is_terminated_stops_its_branch(saved: Path, tmp_path: Path) -> None:
    slow = "import os, sys, time; open(sys.argv[1], 'w').write(f'{os.getpid()} '); time.sleep(99)"
    options = ["--checkpoint", saved, "--batches", "8,16", "--tokens", 4096, "--output", tmp_path / "out"]
    command = [
        sys.executable,
        "-c",
        MAIN,
        "batch-size",
        "measure",
        *options,
        "--",
        sys.executable,
        "-c",
        slow,
        tmp_path / "pid",
    ]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL)
    started = time.monotonic()
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text().endswith(" "):
        assert time.monotonic() - started < 120
        time.sleep(0.05)
    process.terminate()
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_repeats_read_on_in_the_text_and_tell_how_sure_it_is(fake: Callable[..., str], tmp_path: Path) -> None:
    fake(batches="8,16", options=("--repeats", 2))
    assert [one.get("--skip-sequences") for one in calls(tmp_path)] == [None, None, "640", "640"]
    assert result(tmp_path)["rows"][0]["loss"] == pytest.approx(4.0005)


def test_everything_that_is_wrong_is_listed(tmp_path: Path, saved: Path) -> None:
    start = branching.Checkpoint.read(saved)
    assert (start.optimizer, start.batch, start.seq_length) == ("AdamW", 8, 16)
    command = ["train", "--steps", "3", "--output=x"]
    with pytest.raises(branching.BranchingError) as error:
        branching.plan(start, command, tmp_path, [8], 64, baseline=4, seq_length=32, repeats=0)
    wanted = (
        "--batches is 8; two or more",
        "--baseline is 4, which is not among",
        "--seq-length is 32 and the checkpoint's run had 16",
        "--repeats is 0",
        "has --output, --steps: leave that out",
        "one step of 8 sequences takes 256",
    )
    assert [text for text in wanted if text not in str(error.value)] == []
    assert str(error.value).count("- ") >= len(wanted)
    larger = branching.plan(start, ["train"], tmp_path, [16, 32], 1e4)  # the rate was meant for the saved batch of 8
    assert [(one.batch, one.lr_scale) for one in larger.branches] == [(16, math.sqrt(2)), (32, 2.0)]
    with pytest.raises(branching.BranchingError, match="largest of --batches"):
        branching.plan(start, ["train"], tmp_path, [4, 8], 1e4)
    with pytest.raises(branching.BranchingError, match="--tokens is inf; it must be a number of tokens"):
        branching.plan(start, ["train"], tmp_path, [8, 16], math.inf)
    silent = branching.Checkpoint(tmp_path, "identity")
    with pytest.raises(branching.BranchingError, match=r"does not say how long.*\n.*no learning-rate rule is known"):
        branching.plan(silent, ["train"], tmp_path, [4, 8], 1e4)
    with pytest.raises(branching.BranchingError, match="there is no checkpoint in"):
        branching.Checkpoint.read(tmp_path)


def test_deepspeeds_own_checkpoint_is_taken_by_its_path(tmp_path: Path) -> None:
    (tmp_path / "global_step7").mkdir()
    (tmp_path / "global_step7" / "mp_rank_00_model_states.pt").touch()
    (tmp_path / "latest").write_text("global_step7")
    folder = (tmp_path / "global_step7").resolve()
    for directory in (tmp_path, folder):
        assert branching.Checkpoint.read(directory) == branching.Checkpoint(folder, str(folder))


def test_progress_is_read_off_the_log_of_a_branch(tmp_path: Path) -> None:
    log = """
import json, pathlib, sys, time
output = pathlib.Path(sys.argv[sys.argv.index("--output") + 1])
(output / "log.jsonl").write_text('{"tokens": 30}\\n{"held_out_loss": 1}\\n{"tokens": 12}\\n{"tok')
time.sleep(1)
(output / "summary.json").write_text('{"held_out_loss_after": 2.5}')
"""
    start = branching.Checkpoint(tmp_path, "identity", "Lion", 8, 10)
    study = branching.plan(start, [sys.executable, "-c", log], tmp_path, [8, 16], 1000)
    seen: list[int] = []
    ended = branch_runs.run(study, study.branches[0], seen.append)
    assert (ended.loss, ended.losses, ended.failure) == (2.5, (), "")
    assert seen[-1] == 42
    assert branch_runs.finished(study, study.branches[0]) == ended


def test_a_budget_is_the_same_for_all_where_that_moves_it_little(tmp_path: Path) -> None:
    start = branching.Checkpoint(tmp_path, "identity", "Lion", 8, 10)
    same = branching.plan(start, ["train"], tmp_path, [8, 16, 64], 10_000)
    assert {same.tokens(branch) for branch in same.branches} == {10_240}
    each = branching.plan(start, ["train"], tmp_path, [7, 11, 13], 10_000)
    assert [each.tokens(branch) for branch in each.branches] == [10_010, 10_010, 10_010]  # 1001 = 7 x 11 x 13
    each = branching.plan(start, ["train"], tmp_path, [8, 48, 100], 10_000)
    assert [each.tokens(branch) for branch in each.branches] == [10_000, 10_080, 10_000]


def outcome(batch: int, loss: float, *, repeat: int = 0, failure: str = "", losses: tuple[float, ...] = ()) -> Any:
    branch = branching.Branch(batch, repeat, 1, 1.0, 0)
    return branch_runs.BranchResult(branch, loss, losses, failure, 1.0, {})


@pytest.mark.parametrize(
    ("above", "wanted"),
    [
        ([0.0, 0.02, 0.0], ("between", 16, 32)),  # a later one that is within again does not count
        ([0.0, 0.005, 0.01], ("at least", 64, None)),
        ([0.02, 0.0, 0.0], ("none", 8, 16)),
        ([-1.0, -1.0, 5.0], ("between", 32, 64)),
    ],
)
def test_the_rule_stops_at_the_first_batch_outside(
    above: list[float], wanted: tuple[str, int | None, int | None]
) -> None:
    outcomes = [outcome(8, 4.0), outcome(4, 9.0), *(outcome(16 * 2**i, 4.0 + d) for i, d in enumerate(above))]
    found = verdict.judge(verdict.rows(outcomes, 8, 0.0101), 8, 0.0101)
    assert (found.kind, found.largest, found.first_outside) == wanted


def test_a_difference_near_the_tolerance_is_not_clear() -> None:
    base = outcome(8, 4.0, losses=(3.0, 4.0, 5.0, 4.0))
    near = outcome(16, 4.02, losses=(3.05, 4.0, 5.03, 4.0))
    row = verdict.rows([base, near], 8, 0.01)[1]
    assert row.standard_error == pytest.approx(torch.tensor([0.05, 0.0, 0.03, 0.0]).std().item() / 2)
    assert (row.within, row.clear) == (False, False)
    assert "less than two standard errors" in verdict.judge(verdict.rows([base, near], 8, 0.01), 8, 0.01).words
    assert verdict.rows([base, near], 8, 0.5)[1].clear is True
    assert verdict.rows([outcome(8, 4.0), outcome(16, 4.0)], 8, 0.01)[1].clear is None  # nothing to tell it by
    repeated = [outcome(8, 4.0), outcome(8, 4.5, repeat=1), outcome(16, 4.1), outcome(16, 4.8, repeat=1)]
    row = verdict.rows(repeated, 8, 0.01)[1]
    assert (row.difference, row.standard_error) == (pytest.approx(0.2), pytest.approx(0.1))


# ----------------------------------------------------------------------------------------- --branch of the training job


def test_a_batch_is_reached_with_the_largest_micro_batch_allowed() -> None:
    def shares(world_size: int, *arguments: str) -> tuple[int, int]:
        chosen = settings.read(["--optimizer", "adamw", *arguments], world_size)
        return chosen.micro_batch, chosen.accumulation

    assert shares(2, "--batch", "64", "--micro-batch", "8") == (8, 4)
    assert shares(2, "--batch", "24") == (4, 3)  # 4 is the config's
    assert shares(2, "--batch", "6", "--micro-batch", "8") == (3, 1)
    assert shares(1, "--accumulation", "5") == (4, 5)
    tokens = settings.read(["--batch", "64", "--tokens", "1e5", "--seq-length", "50"], 4)
    assert tokens.steps == math.ceil(1e5 / (64 * 50))
    with pytest.raises(settings.SettingsError, match="--tokens is inf"):
        settings.read(["--tokens", "inf"], 2)
    with pytest.raises(settings.SettingsError, match="--batch is 9; it must be a multiple of the 2 ranks"):
        shares(2, "--batch", "9")


def test_what_a_branch_cannot_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(settings.SettingsError) as error:
        settings.read(["--branch", str(tmp_path / "no"), "--save", "x", "--lr-scale", "-1", "--skip-sequences", "-1"])
    for text in ("no: no such directory", "leave --save out", "--lr-scale is -1", "--skip-sequences is -1"):
        assert text in str(error.value)
    with pytest.raises(settings.SettingsError, match="need --branch DIR"):
        settings.read(["--lr-scale", "2"])


def with_constant_rate(tmp_path: Path) -> str:
    """AdamW's config with a schedule that is constant after two steps: there a branch and a resumed run agree."""
    config = json.loads((CONFIGS / "adamw_zero2.json").read_text())
    warmup = {"warmup_min_lr": 0, "warmup_max_lr": 1e-3, "warmup_num_steps": 2, "warmup_type": "linear"}
    config["scheduler"] = {"type": "WarmupLR", "params": warmup}
    (tmp_path / "constant.json").write_text(json.dumps(config))
    return str(tmp_path / "constant.json")


def rates(output: Path) -> dict[int, float]:
    records = map(json.loads, (output / "log.jsonl").read_text().splitlines())
    return {record["step"]: record["lr"] for record in records if "lr" in record}


def test_a_branch_goes_on_like_a_resumed_run(pool: Any, short: list[str], tmp_path: Path) -> None:  # noqa: F811
    common = [*short, "--deepspeed", with_constant_rate(tmp_path)]
    pool(2).run(train_in_pool, [*common, "--save", str(tmp_path / "saved"), "--save-every", "3"])
    start = str(tmp_path / "saved" / "global_step3")
    pool(2).run(train_in_pool, [*common, "--resume", start, "--output", str(tmp_path / "resumed")])
    branch = [*common, "--branch", start, "--steps", "3"]
    pool(2).run(train_in_pool, [*branch, "--output", str(tmp_path / "branch")])
    assert sorted(losses(tmp_path / "branch")) == [4, 5, 6]
    assert losses(tmp_path / "branch") == losses(tmp_path / "resumed")
    assert rates(tmp_path / "branch") == rates(tmp_path / "resumed") == {4: 1e-3, 5: 1e-3, 6: 1e-3}

    # Twice the batch, in two passes.
    twice = [*branch, "--batch", "16", "--steps", "4", "--lr-scale", "3", "--warmup", "0.5"]
    pool(2).run(train_in_pool, [*twice, "--output", str(tmp_path / "twice")])
    assert rates(tmp_path / "twice") == pytest.approx({4: 2e-3, 5: 3e-3, 6: 3e-3, 7: 3e-3})
    summary = json.loads((tmp_path / "twice" / "summary.json").read_text())
    wanted = {"batch": 16, "micro_batch": 4, "accumulation": 2, "ranks": 2, "steps": 4, "seq_length": 32}
    assert {key: summary[key] for key in wanted} == wanted
    assert len(summary["held_out_losses_after"]) == 8
    assert sum(summary["held_out_losses_after"]) / 8 == pytest.approx(summary["held_out_loss_after"])

    # Skipping a step's sequences is where its next begins, so that its first step and this one see what `twice` saw.
    pool(2).run(train_in_pool, [*branch, "--skip-sequences", "8", "--output", str(tmp_path / "skipped")])
    one, next_one, both = (losses(tmp_path / name)[4][0] for name in ("branch", "skipped", "twice"))
    assert one != next_one
    assert both == pytest.approx((one + next_one) / 2, rel=1e-6)

    for said_there in pool(2).run(refusal_in_pool, [*branch, "--seed", "3", "--seq-length", "16"]):
        assert "--branch" in said_there
        assert "that run had --seed 0 and this one has 3" in said_there
        assert "--seq-length 32" in said_there
    for said_there in pool(2).run(refusal_in_pool, [*branch, "--branch", str(tmp_path)]):
        assert "there is no checkpoint" in said_there


def held_out_in_pool(arguments: list[str], micro_batch: int) -> list[float]:
    import corpus
    import deepspeed
    import train
    import transformers

    deepspeed.init_distributed()
    chosen = settings.read([*arguments, "--micro-batch", str(micro_batch)], int(os.environ["WORLD_SIZE"]))
    text = train.shared_text(chosen, int(os.environ["LOCAL_RANK"]))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**chosen.model))
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    evaluation = train.HeldOut(corpus.Windows(text.held_out, chosen.seq_length, 0), chosen, rank, ranks, "cpu")
    found: list[float] = evaluation.losses(model).tolist()
    mean = evaluation.loss(model)
    assert mean == pytest.approx(sum(found) / len(found))
    return found


def test_the_held_out_sequences_are_the_same_for_every_batch_and_number_of_ranks(pool: Any, short: list[str]) -> None:  # noqa: F811
    one, other = (pool(2).run(held_out_in_pool, short, micro_batch) for micro_batch in (1, 3))
    assert len(one[0]) == 8
    assert len(set(one[0])) == 8
    assert one[0] == one[1]
    assert one[0] == pytest.approx(other[0], rel=1e-5)
    assert one[0] == pytest.approx(pool(4).run(held_out_in_pool, short, 2)[0], rel=1e-5)


def test_branches_of_the_real_training_job(pool: Any, short: list[str], tmp_path: Path) -> None:  # noqa: F811
    """From a checkpoint of two ranks on one, which is enough here: no launcher."""
    common = [*short[: short.index("--steps")], *short[short.index("--steps") + 2 :], "--optimizer", "lion"]
    pool(2).run(train_in_pool, [*common, "--steps", "6", "--save", str(tmp_path / "saved"), "--save-every", "4"])
    command = [forked.python(), str(LAUNCHER / "train.py"), *common]
    start = str(tmp_path / "saved" / "global_step4")
    options = ["--checkpoint", start, "--batches", "8,16", "--tokens", "1024", "--output", str(tmp_path / "out")]
    finished = subprocess.run(
        ["ds-optim", "batch-size", "measure", *options, "--tolerance", "9", "--", *command],
        env=forked.environment(**ALONE),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "The critical batch size is at least 16 sequences. Nothing larger was tried." in finished.stdout
    found = result(tmp_path)
    assert (found["optimizer"], found["baseline"], found["seq_length"]) == ("Lion", 8, 32)
    assert [(one["steps"], one["accumulation"]) for one in found["branches"]] == [(4, 2), (2, 4)]
    assert all(0 < row["loss"] < 10 for row in found["rows"])
    assert found["rows"][1]["standard_error"] > 0
    assert (found["noise_scale"]["updates"], found["noise_scale"]["ready"]) == (4, False)
