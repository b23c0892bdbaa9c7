"""The critical batch size, measured: branch from one checkpoint at several batch sizes and compare where they end.

Merrill et al. (2505.23971): every branch starts from the same weights and optimizer state, has its learning rate scaled
by the optimizer's rule, and sees the same number of tokens. The critical batch is the largest whose held-out loss is
still within a tolerance of the baseline's. No estimate of any noise is involved.

A branch is a process: the user's own training command, to which this adds

    --branch CHECKPOINT --batch B --steps N --lr-scale S --output DIRECTORY    [--skip-sequences N] [--noise-scale]

This module plans the branches, `ds_optim.batch_size.branch_runs` runs them, `ds_optim.batch_size.verdict` judges them.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_optim.batch_size.learning_rate import ScalingRule, rule_of, scale
from ds_optim.checkpoint.directory import MANIFEST, OBJECTS, folder_of, read_about
from ds_optim.json_file import read_object
from ds_optim.latest import newest

FINISHED = "finished.json"
"""In a branch's folder when it has ended: its setting, and what the command wrote."""

_OURS = ("--branch", "--batch", "--steps", "--tokens", "--lr-scale", "--output", "--skip-sequences", "--noise-scale")
_ROUNDED_BY = 0.05  # how far the budget may move so that it is a whole number of steps at every batch


class BranchingError(ValueError):
    """The measurement cannot begin; the message lists every reason."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(f"- {problem}" for problem in problems))


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Where the branches start.

    Attributes:
        folder: of the one checkpoint.
        identity: changes when its content does.
        optimizer: class name; None if it does not say.
        batch: sequences per step of the run that saved it; None if it does not say.
        seq_length: tokens per sequence of that run; None if it does not say.
    """

    folder: Path
    identity: str
    optimizer: str | None = None
    batch: int | None = None
    seq_length: int | None = None

    @classmethod
    def read(cls, directory: Path) -> Checkpoint:
        """Read a directory of checkpoints (the newest of it) or one checkpoint's folder.

        The canonical form says what optimizer and, if ``launcher/train.py`` saved it, what batch it was; that part of
        it is pickled, so branch only from what you trust. DeepSpeed's own form is taken by its path.

        Raises:
            BranchingError: there is no checkpoint, or a damaged one.
        """
        tag = newest(directory)
        folder = (folder_of(directory, tag) if tag else directory).resolve()
        if not (folder / MANIFEST).is_file():
            if not any(folder.glob("*_model_states.pt")):
                raise BranchingError([f"there is no checkpoint in {directory}"])
            return cls(folder, str(folder))
        import torch

        try:
            identity = read_object(folder / MANIFEST).get("sha256", str(folder))
            state = torch.load(folder / OBJECTS, map_location="cpu", weights_only=False)["client_state"]
            optimizer = read_about(folder)["optimizer"]
        except (OSError, EOFError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError) as error:
            said = f"{type(error).__name__}: {error}"
            raise BranchingError(
                [f"{folder} is damaged ({said}): see `ds-optim checkpoint verify`, and take another checkpoint"]
            ) from error
        known = state if isinstance(state, Mapping) else {}
        return cls(folder, identity, optimizer, known.get("batch"), known.get("seq_length"))


@dataclass(frozen=True, slots=True)
class Branch:
    """One run: ``steps`` of ``batch`` sequences, the checkpoint's learning rate times ``lr_scale``.

    A repeat reads the next stretch of the text, after ``skip_sequences``.
    """

    batch: int
    repeat: int
    steps: int
    lr_scale: float
    skip_sequences: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"batch_{self.batch}" + (f"_repeat_{self.repeat}" if self.repeat else "")


@dataclass(frozen=True, slots=True)
class Study:
    """What is measured: see `plan`."""

    checkpoint: Checkpoint
    command: tuple[str, ...]
    output: Path
    baseline: int
    seq_length: int
    rule: ScalingRule
    noise_scale: bool
    branches: tuple[Branch, ...]

    @property
    def batches(self) -> list[int]:
        """In ascending order."""
        return sorted({branch.batch for branch in self.branches})

    def tokens(self, branch: Branch) -> int:
        """That the branch sees."""
        return branch.steps * branch.batch * self.seq_length

    def measures_noise(self, branch: Branch) -> bool:
        """Whether the branch also estimates the noise scale: the baseline's first run does."""
        return self.noise_scale and branch.batch == self.baseline and not branch.repeat

    def arguments(self, branch: Branch) -> list[str]:
        """The whole command of a branch."""
        added: dict[str, Any] = {
            "--branch": self.checkpoint.folder,
            "--batch": branch.batch,
            "--steps": branch.steps,
            "--lr-scale": repr(branch.lr_scale),
            "--output": (self.output / branch.name).resolve(),
        }
        if branch.skip_sequences:
            added["--skip-sequences"] = branch.skip_sequences
        options = [str(part) for pair in added.items() for part in pair]
        return [*self.command, *options, *(["--noise-scale"] if self.measures_noise(branch) else [])]

    def setting(self, branch: Branch) -> dict[str, Any]:
        """What must be the same for a finished branch to count."""
        return {
            "checkpoint": self.checkpoint.identity,
            "command": list(self.command),
            "steps": branch.steps,
            "learning-rate scale": branch.lr_scale,
            "skipped sequences": branch.skip_sequences,
            "tokens per sequence": self.seq_length,
            "noise scale": self.measures_noise(branch),
        }


def plan(
    checkpoint: Checkpoint,
    command: Sequence[str],
    output: Path,
    batches: Sequence[int],
    tokens: float,
    *,
    baseline: int | None = None,
    seq_length: int | None = None,
    rule: ScalingRule | None = None,
    repeats: int = 1,
    noise_scale: bool = True,
) -> Study:
    """The branches, smallest batch first, the baseline before all.

    Args:
        checkpoint: where they start.
        command: the training command.
        output: a folder for the branches.
        batches: sequences per step, each a branch.
        tokens: for every branch, rounded to whole steps: to the same number for all of them if that moves it by 5 % at
            most, else each to its own nearest.
        baseline: the batch that the others are held against (the checkpoint's own, or the first of ``batches``).
        seq_length: tokens per sequence (the checkpoint's).
        rule: of the learning rate (the optimizer's).
        repeats: of every branch, each on the next stretch of the text.
        noise_scale: whether the baseline is asked for its estimate too.

    Raises:
        BranchingError: every reason why these branches cannot be run, or are not those that are finished in ``output``.
    """
    sizes = sorted(set(batches))
    baseline, problems = _baseline_among(sizes, batches, baseline, checkpoint)
    seq_length, wrong = _sequence_length(seq_length, checkpoint)
    problems += wrong
    if rule is None:
        try:
            rule = rule_of(checkpoint.optimizer or "an optimizer that the checkpoint does not name")
        except ValueError as error:
            problems.append(str(error))
    problems += _run_problems(command, repeats, tokens, sizes[-1], seq_length)
    if problems:
        raise BranchingError(problems)
    assert seq_length is not None
    assert rule is not None
    steps = _steps(sizes, tokens / seq_length)
    longest = max(size * steps[size] for size in sizes)
    at = checkpoint.batch or baseline  # the batch that the checkpoint's learning rate was meant for
    branches = [
        Branch(size, repeat, steps[size], scale(rule, size / at), repeat * longest)
        for repeat in range(repeats)
        for size in [baseline, *(size for size in sizes if size != baseline)]
    ]
    study = Study(checkpoint, tuple(command), output, baseline, seq_length, rule, noise_scale, tuple(branches))
    changed = [problem for branch in branches for problem in _changes(study, branch)]
    if changed:
        raise BranchingError([*changed, "what is finished was measured otherwise: give another --output"])
    return study


# ----------------------------------------------------------------------------------------------------------- the parts


def _baseline_among(
    sizes: Sequence[int], batches: Sequence[int], asked: int | None, checkpoint: Checkpoint
) -> tuple[int, list[str]]:
    """The batch to hold the others against, and what is wrong with it or with them."""
    problems = []
    if len(sizes) < 2 or sizes[0] < 1:
        problems.append(f"--batches is {', '.join(map(str, batches))}; two or more different sizes are needed")
    own = checkpoint.batch
    baseline = own if own is not None and own in sizes else batches[0] if batches else 0
    if asked is not None:
        baseline = asked
        if asked not in sizes:
            problems.append(f"--baseline is {asked}, which is not among --batches")
    if baseline == sizes[-1] and len(sizes) > 1:
        problems.append(f"the baseline, {baseline}, is the largest of --batches: add larger ones, or say --baseline")
    return baseline, problems


def _sequence_length(asked: int | None, checkpoint: Checkpoint) -> tuple[int | None, list[str]]:
    """Tokens per sequence, if they are known, and what is wrong with that."""
    problems = []
    if asked is not None and checkpoint.seq_length not in (None, asked):
        problems.append(f"--seq-length is {asked} and the checkpoint's run had {checkpoint.seq_length}")
    known = asked or checkpoint.seq_length
    if known is None:
        problems.append("the checkpoint does not say how long its sequences are: give --seq-length")
    return known, problems


def _run_problems(
    command: Sequence[str], repeats: int, tokens: float, largest: int, seq_length: int | None
) -> list[str]:
    """Why branches of these tokens, the largest batch of ``largest`` sequences, cannot be run with this command."""
    problems = []
    if repeats < 1:
        problems.append(f"--repeats is {repeats}; it must be 1 or more")
    if not command:
        problems.append("no training command is given: put it after --")
    ours = sorted({word.split("=")[0] for word in command} & set(_OURS))
    if ours:
        problems.append(f"the training command has {', '.join(ours)}: leave that out, each branch gets its own")
    if not math.isfinite(tokens):
        problems.append(f"--tokens is {tokens:g}; it must be a number of tokens")
    elif seq_length and tokens < largest * seq_length:
        problems.append(f"--tokens is {tokens:g}; one step of {largest} sequences takes {largest * seq_length:,}")
    return problems


def _steps(sizes: Sequence[int], sequences: float) -> dict[int, int]:
    """Steps at every batch size for a budget of sequences."""
    whole = math.lcm(*sizes)
    budget = round(sequences / whole) * whole
    if abs(budget - sequences) > _ROUNDED_BY * sequences:
        return {size: max(1, round(sequences / size)) for size in sizes}
    return {size: budget // size for size in sizes}


def _changes(study: Study, branch: Branch) -> list[str]:
    """How a finished branch differs from what would be run now."""
    path = study.output / branch.name / FINISHED
    if not path.is_file():
        return []
    try:
        before = read_object(path)["setting"]
    except (ValueError, KeyError):
        return [f"{path} cannot be read: remove {path.parent}"]
    return [
        f"{path.parent}: {key} was {_shown(before.get(key))} and is now {_shown(now)}"
        for key, now in study.setting(branch).items()
        if before.get(key) != now
    ]


def _shown(value: Any) -> str:
    return " ".join(value) if isinstance(value, list) else str(value)
