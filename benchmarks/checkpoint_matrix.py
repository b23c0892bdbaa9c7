"""Checkpoints between all numbers of ranks and all ZeRO stages, each optimizer on real DeepSpeed engines.

    python benchmarks/checkpoint_matrix.py [--markdown docs/results/checkpoint_matrix.md]
    python benchmarks/checkpoint_matrix.py --form deepspeed [--markdown docs/results/checkpoint_matrix_deepspeed.md]
    python benchmarks/checkpoint_matrix.py --long-gradients --optimizer AdamMini
    python benchmarks/checkpoint_matrix.py --digests FILE --compare FILE

N ranks at ZeRO i -> M ranks at ZeRO j, for N and M in 1 to 4, i and j in 1 to 3: 144 pairs per optimizer. Sources and
targets are fp32 where ranks + stage is even and bf16 where it is odd, so every pair of precisions occurs 36 times.

A source saves after four steps and goes on for ten. Every target loads it into a fresh engine with other initial
weights, saves again in canonical form, and takes the same ten steps. With `--form deepspeed` a source also saves by
`engine.save_checkpoint`, and that is what targets load, by `engine.load_checkpoint` alone. A pair holds if

- the masters, the model's weights, the client state and the step counter are those of the checkpoint,
- what is saved again is byte-identical to the source's canonical form, every tensor of it,
- the ten steps end where the source's did: bitwise, for Adam-mini within 1e-6 of the largest element of each parameter.

The model is `tests/engines.py`'s, of one layer: sizes that divide by nothing. The learning rate changes every step,
gradients are the same bits everywhere. They have few bits, so that bf16 holds them, and their squares add up exactly in
any order. With `--long-gradients`, all in fp32, they round, and Adam-mini's means depend on where its blocks are cut.
Exit status 1 if a pair does not hold or, with --compare, if a checkpoint or the end of a run does not have the bits of
an earlier run (benchmarks/digests.py).
"""

from __future__ import annotations

import argparse
import concurrent.futures
import datetime
import gc
import importlib.metadata
import itertools
import os
import platform
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pages

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import digests
import torch
from rich.progress import track
from torch import Tensor

from ds_optim import checkpoint
from engines import WIDER, Case, assembled
from pool import Pools, RanksFailedError
from resumption import K, by_the_engine, relative_difference, resumed, same_bits, stored, uninterrupted, wrongly_loaded

RANKS = (1, 2, 3, 4)
STEPS = 14  # more than the tests take
STAGES = (1, 2, 3)
OPTIONS: dict[str, dict[str, Any]] = {
    "AdamW": {"weight_decay": 0.1},
    "Lion": {"weight_decay": 0.1, "state_dtype": "bf16"},
    "Adan": {"weight_decay": 0.02},
    "AdamMini": {"weight_decay": 0.1},
    # Blocks straddle the boundaries of these shapes; each is refreshed three times in the ten steps.
    "Shampoo": {"weight_decay": 0.05, "max_preconditioner_dim": 16, "precondition_frequency": 3},
    "SWAN": {"weight_decay": 0.05},
    "Muon": {"weight_decay": 0.1},
    "NorMuon": {"weight_decay": 0.1},
    "SOAP": {"weight_decay": 0.05, "max_preconditioner_dim": 16, "precondition_frequency": 3},
}
DEEPSPEEDS = ("AdamW", "Lion", "Muon")  # names of DeepSpeed's own optimizers
FORMS = {"canonical": checkpoint.load, "deepspeed": by_the_engine}
ADAM_MINI_TOLERANCE = 1e-6  # the sums of blocks cut by a rank's boundary are added up in another order


@dataclass(frozen=True, slots=True)
class Place:
    """Where a run is: an optimizer, a number of ranks and a ZeRO stage."""

    optimizer: str
    ranks: int
    stage: int
    long_gradients: bool

    def __str__(self) -> str:
        return f"{self.ranks} x ZeRO-{self.stage} {self.case.precision}"

    def paired(self, other: Place) -> bool:
        """Whether the other can take over from this."""
        return self.optimizer == other.optimizer

    @property
    def case(self) -> Case:
        """The case of `tests/engines.py`."""
        name = f"ds_optim.{self.optimizer}" if self.optimizer in DEEPSPEEDS else self.optimizer
        bf16 = not self.long_gradients and (self.ranks + self.stage) % 2
        return Case(
            name,
            OPTIONS[self.optimizer],
            stage=self.stage,
            precision="bf16" if bf16 else "fp32",
            layers=1,
            sizes=WIDER,
            more_bits=14 if self.long_gradients else 0,
        )


@dataclass(frozen=True, slots=True)
class Source:
    """An uninterrupted run: its checkpoint's form and folder, the tensors of it, and the masters ten steps later."""

    form: str
    folder: Path
    tensors: dict[str, Tensor]
    after: dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one pair: what was loaded wrongly, whether the second save is byte-identical, how the continued run ended."""

    wrong: tuple[str, ...]
    identical: bool
    bitwise: bool
    difference: float
    after: str = "failed"  # digest of the masters at the end

    def holds(self, optimizer: str) -> bool:
        """Whether it is all that was asked."""
        tolerance = ADAM_MINI_TOLERANCE if optimizer == "AdamMini" else 0.0
        continued = self.bitwise or (optimizer == "AdamMini" and self.difference <= tolerance)
        return not self.wrong and self.identical and continued


def saved(pools: Pools, place: Place, folder: Path, form: str) -> Source:
    """Run the source."""
    canonical, theirs = folder / "canonical", str(folder / form) if form == "deepspeed" else ""
    reports = pools(place.ranks).run(partial(uninterrupted, steps=STEPS), place.case, str(canonical), theirs)
    return Source(form, folder / form, stored(canonical / f"global_step{K}"), assembled(reports))


def taken_over(pools: Pools, source: Source, place: Place, scratch: Path) -> Outcome:
    """Run the target from the source's checkpoint."""
    folder = Path(tempfile.mkdtemp(dir=scratch))
    job = partial(resumed, load=FORMS[source.form], steps=STEPS)
    try:
        reports = pools(place.ranks).run(job, place.case, str(source.folder), str(folder))
    except RanksFailedError as error:
        return Outcome((str(error),), False, False, float("inf"))
    again = stored(folder / f"global_step{K}")
    shutil.rmtree(folder)
    found = assembled(reports)
    return Outcome(
        tuple(wrongly_loaded(reports, source.tensors)),
        same_bits(source.tensors, again),
        same_bits(source.after, found),
        relative_difference(found, source.after),
        digests.digest(found),
    )


@dataclass(frozen=True, slots=True)
class Found:
    """What a run of the matrix found: the sources, and of every pair, (source, target), the outcome."""

    sources: dict[Place, Source]
    pairs: dict[tuple[Place, Place], Outcome]

    def digests(self, form: str, long_gradients: bool) -> dict[str, str]:
        """A digest of every checkpoint's tensors, of the masters of every uninterrupted and every continued run."""
        kind = " | deepspeed" * (form == "deepspeed") + " | long gradients" * long_gradients
        found = {}
        for place, source in self.sources.items():
            found[f"{place.optimizer} | {place}{kind} | checkpoint"] = digests.digest(source.tensors)
            found[f"{place.optimizer} | {place}{kind} | uninterrupted"] = digests.digest(source.after)
        for (begun, ended), outcome in self.pairs.items():
            found[f"{begun.optimizer} | {begun} -> {ended}{kind} | continued"] = outcome.after
        return found


def measured(optimizers: list[str], form: str, long_gradients: bool, scratch: Path) -> Found:
    """All pairs; checkpoints go to `scratch`."""
    places = [Place(*values, long_gradients) for values in itertools.product(optimizers, RANKS, STAGES)]
    pairs = [(source, target) for source, target in itertools.product(places, places) if source.paired(target)]
    # Ranks wait for each other more than they compute: the four sets of processes work side by side.
    threads = {ranks: concurrent.futures.ThreadPoolExecutor(1) for ranks in RANKS}
    try:
        with Pools() as pools:
            for ranks in RANKS:
                pools(ranks).run(gc.freeze)  # one set is started after the other
            saving = {
                place: threads[place.ranks].submit(saved, pools, place, scratch / f"{place.optimizer} {place}", form)
                for place in places
            }
            sources = {place: saving[place].result() for place in track(places, "sources")}
            for ranks in RANKS:
                pools(ranks).run(gc.freeze)  # DeepSpeed collects garbage for every engine: not among all imports
            resuming = {
                pair: threads[pair[1].ranks].submit(taken_over, pools, sources[pair[0]], pair[1], scratch)
                for pair in pairs
            }
            for _ in track(concurrent.futures.as_completed(resuming.values()), "pairs", total=len(pairs)):
                pass
            return Found(sources, {pair: future.result() for pair, future in resuming.items()})
    finally:
        for thread in threads.values():
            thread.shutdown(cancel_futures=True)


def table(found: dict[tuple[Place, Place], Outcome]) -> list[str]:
    """Counts per optimizer."""
    headings = ["optimizer", "pairs", "loaded right", "byte-identical", "bitwise equal", "largest difference", "hold"]
    rows = ["| " + " | ".join(headings) + " |", "|---|" + "---:|" * (len(headings) - 1)]
    for optimizer in dict.fromkeys(source.optimizer for source, _ in found):
        outcomes = [outcome for (source, _), outcome in found.items() if source.optimizer == optimizer]
        counts = [
            len(outcomes),
            sum(not outcome.wrong for outcome in outcomes),
            sum(outcome.identical for outcome in outcomes),
            sum(outcome.bitwise for outcome in outcomes),
        ]
        worst = max(outcome.difference for outcome in outcomes)
        hold = sum(outcome.holds(optimizer) for outcome in outcomes)
        cells = [optimizer, *map(str, counts), f"{worst:.1e}" if worst else "0", str(hold)]
        rows.append("| " + " | ".join(cells) + " |")
    return rows


def failures(found: dict[tuple[Place, Place], Outcome]) -> list[str]:
    """Every pair that does not hold, and why."""
    lines = []
    for (source, target), outcome in found.items():
        if not outcome.holds(source.optimizer):
            why = [] if outcome.identical else ["saved again with other bytes"]
            why += [f"ends {outcome.difference:.1e} away"] * (not outcome.bitwise) + list(outcome.wrong)
            lines.append(f"- FAIL {source.optimizer} {source} -> {target}: {'; '.join(why)}")
    return lines


def introduction(arguments: argparse.Namespace, seconds: float) -> list[str]:
    """What was measured, where, and what the columns mean."""
    options = ["--form", arguments.form] * (arguments.form != "canonical")
    options += ["--long-gradients"] * arguments.long_gradients
    if arguments.optimizer != list(OPTIONS):
        options += ["--optimizer", *arguments.optimizer]
    precisions = "fp32 (ranks + stage even) and bf16 (odd)"
    gradients = "few bits, so that their squares add up exactly in any order"
    saved_by = "in canonical form, loaded"
    if arguments.form == "deepspeed":
        saved_by = "by `engine.save_checkpoint`, loaded by `engine.load_checkpoint` alone"
    if arguments.long_gradients:
        precisions, gradients = "fp32", "21 bits, so that sums of their squares round and depend on the order"
    return [
        f"`{' '.join(['python benchmarks/checkpoint_matrix.py', *options])}`: {datetime.date.today()}, "
        f"{os.cpu_count()} CPU cores ({platform.machine()}), torch {torch.__version__}, "
        f"deepspeed {importlib.metadata.version('deepspeed')}, {seconds:.0f} s.",
        "",
        "N ranks at ZeRO i -> M ranks at ZeRO j, N and M in 1 to 4, i and j in 1 to 3, on real DeepSpeed engines,",
        f"{precisions}. Saved after {K} steps {saved_by} into a fresh engine with",
        f"other initial weights, saved again in canonical form, {STEPS - K} further steps on identical gradients",
        f"({gradients}).",
        "",
        "- *loaded right*: the fp32 masters, the model's weights, client state and step counter",
        "- *byte-identical*: every tensor of the second save is that of the source in canonical form",
        f"- *bitwise equal*: after the {STEPS - K} steps, to the run that was never interrupted",
        "- *largest difference* from it: in any parameter, relative to its largest element; allowed is",
        f"  {ADAM_MINI_TOLERANCE:g} for Adam-mini, whose blocks are cut by the boundaries of ranks, else nothing",
        "",
    ]


def main() -> int:
    """Run the matrix; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--markdown", type=Path, help="where to write the table")
    parser.add_argument("--optimizer", nargs="*", choices=list(OPTIONS), default=list(OPTIONS), help="only these")
    parser.add_argument("--form", choices=list(FORMS), default="canonical", help="what is saved and loaded")
    parser.add_argument("--long-gradients", action="store_true", help="fp32 alone, gradients of 21 bits")
    digests.add_options(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    started = time.time()
    with tempfile.TemporaryDirectory() as scratch:
        whole = measured(arguments.optimizer, arguments.form, arguments.long_gradients, Path(scratch))
    found = whole.pairs
    failed = failures(found)
    text = [*table(found), "", *failed, *[""] * bool(failed), f"{len(found) - len(failed)} of {len(found)} pairs hold"]
    print("\n".join(text))
    if arguments.markdown:
        title = "# Checkpoints from everywhere to everywhere"
        title += ", by the JSON alone" * (arguments.form == "deepspeed")
        lines = [title, "", *introduction(arguments, time.time() - started), *text]
        pages.write(arguments.markdown, "\n".join(lines) + ".\n")
    unchanged = digests.finish(whole.digests(arguments.form, arguments.long_gradients), arguments)
    return 1 if failed or not unchanged else 0


if __name__ == "__main__":
    sys.exit(main())
