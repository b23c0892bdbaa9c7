"""kill -9 of one rank at random moments, over and over: does every restart go on from a whole checkpoint, to the bit?

    python benchmarks/crash_recovery.py [--kills 20] [--seed 0] [--markdown docs/results/crash_recovery.md]

The real launcher starts the real job (launcher/train.py, the small Llama, two ranks) with ``--autoresume``. Half of the
kills are aimed into a save, half into a step; every rank tells in a file what it is doing, so that what a kill hit is
read afterwards from what the dead rank wrote last. A kill that missed its aim is done again. After each one:

- the other rank and the launcher must end within `PATIENCE` seconds, with a nonzero status;
- ``ds-optim checkpoint verify`` must pass on what ``latest`` names, and every folder under a final name must be whole;
- the restart must go on from exactly that step.

At the end every tensor of the last checkpoint (weights and optimizer state) and every logged loss must be bitwise those
of a run that nobody disturbed. Exit status 1 if anything of this does not hold.

With ``--tell FOLDER`` this file is one rank of the job.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import json
import mmap
import os
import platform
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pages

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
ROOT = Path(__file__).resolve().parents[1]
RUNS = {
    "AdamMini, ZeRO-2": ["--optimizer", "adam_mini", "--zero-stage", "2"],
    "Shampoo, ZeRO-3": ["--optimizer", "shampoo", "--zero-stage", "3"],
}
STEPS, SAVE_EVERY, KEEP, RANKS = 36, 2, 2, 2
JOB = f"--steps {STEPS} --save-every {SAVE_EVERY} --keep {KEEP} --micro-batch 1 --seq-length 32 --eval-sequences 2"
PATIENCE = 60.0  # seconds the others get to end after a kill
START = 600.0  # seconds a job gets until the moment to kill; only a hang takes that long
WIDTH = 128  # bytes in which a rank tells what it does


# -- one rank of the job: what it does, told in a file that outlives it -----------------------------------------------


class Teller:
    """What this rank is inside of, like ``save/tensors``, in a mapped file: the last word stays if it dies."""

    def __init__(self, folder: Path) -> None:
        path = folder / f"rank{os.environ['RANK']}"
        path.write_bytes(b" " * WIDTH)
        self._map = mmap.mmap(os.open(path, os.O_RDWR), WIDTH)
        self._inside: list[str] = []
        self._begun = {"forward": 0, "save": 0}
        self.seconds: dict[str, list[float]] = {"forward": [], "backward": [], "optimizer": [], "save": []}
        self._tell()

    def watch(self, owner: Any, name: str, word: str) -> None:
        """Have a function tell that it runs."""
        function: Callable[..., Any] = getattr(owner, name)

        @functools.wraps(function)
        def told(*args: Any, **kwargs: Any) -> Any:
            if not self._inside and word in self._begun:
                self._begun[word] += 1
            self._inside.append(word)
            self._tell()
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                if len(self._inside) == 1 and word in self.seconds:
                    self.seconds[word].append(time.perf_counter() - started)
                self._inside.pop()
                self._tell()

        setattr(owner, name, told)

    def _tell(self) -> None:
        words = [str(os.getpid()), *map(str, self._begun.values()), "/".join(self._inside) or "between"]
        self._map[:] = " ".join(words).ljust(WIDTH).encode()


def rank_of_the_job(folder: Path, arguments: list[str]) -> int:
    """`launcher/train.py`, telling what it does."""
    sys.path.insert(0, str(ROOT / "launcher"))
    import checkpoints
    import train
    from deepspeed.runtime.engine import DeepSpeedEngine

    from ds_optim.checkpoint import directory, ranges, save_load

    teller = Teller(folder)
    teller.watch(DeepSpeedEngine, "forward", "forward")
    teller.watch(DeepSpeedEngine, "backward", "backward")
    teller.watch(DeepSpeedEngine, "step", "optimizer")
    teller.watch(train.HeldOut, "losses", "evaluation")  # which `loss` calls
    teller.watch(checkpoints, "save", "save")
    teller.watch(directory, "make_folder", "make folder")
    teller.watch(ranges, "write", "tensors")
    teller.watch(directory, "described", "checksums")
    teller.watch(directory, "publish", "name and latest")
    teller.watch(save_load, "remove_older", "remove older")
    resume = checkpoints.resume

    def told_resume(*args: Any) -> Any:
        start = resume(*args)
        (folder / "resumed").write_text(str(start.steps))
        return start

    checkpoints.resume = told_resume
    status = train.main(arguments)
    (folder / f"seconds{os.environ['RANK']}").write_text(json.dumps(teller.seconds))
    return status


# -- the job, from outside --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Told:
    """What a rank said last: its process, how many steps and saves it began, what it was inside of."""

    pid: int
    steps: int
    saves: int
    inside: str

    @property
    def kind(self) -> str:
        word = self.inside.partition("/")[0]
        return {"save": "save", "forward": "step", "backward": "step", "optimizer": "step"}.get(word, "neither")

    def begun(self, kind: str) -> int:
        return self.saves if kind == "save" else self.steps


def told_by(folder: Path, rank: int) -> Told | None:
    words = (folder / f"rank{rank}").read_text().split(None, 3) if (folder / f"rank{rank}").exists() else []
    return Told(*map(int, words[:3]), words[3].strip()) if len(words) == 4 else None  # type: ignore[call-arg]


class RecoveryError(Exception):
    """Something that had to hold did not."""


@dataclass(slots=True)
class Job:
    """One start of the job under DeepSpeed's launcher."""

    folder: Path
    process: subprocess.Popen[bytes]

    def told(self, rank: int) -> Told | None:
        return told_by(self.folder, rank)

    def fail(self, why: str) -> RecoveryError:
        lines = (self.folder / "output").read_text(errors="replace").splitlines()
        return RecoveryError(f"{why}\n  " + "\n  ".join(lines[-40:]))


@contextlib.contextmanager
def started(folder: Path, arguments: list[str]) -> Iterator[Job]:
    """The job, running; whatever is left of it at the end is ended."""
    folder.mkdir(parents=True)
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(RANKS), "--master_port", str(port)]
    with open(folder / "output", "wb") as output:
        process = subprocess.Popen(
            [*command, __file__, "--tell", str(folder), *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield Job(folder, process)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def job_arguments(run: str, folder: Path) -> list[str]:
    return [*RUNS[run], *JOB.split(), "--save", str(folder / "saved"), "--output", str(folder / "log"), "--autoresume"]


def finish(folder: Path, arguments: list[str]) -> dict[str, list[float]]:
    """Run the job to its end; seconds of what rank 0 did."""
    with started(folder, arguments) as job:
        try:
            if job.process.wait(600) != 0:
                raise job.fail(f"the job ended with status {job.process.returncode}")
        except subprocess.TimeoutExpired:
            raise job.fail("the job did not end in 600 s") from None
    seconds: dict[str, list[float]] = json.loads((folder / "seconds0").read_text())
    return seconds


@dataclass(frozen=True, slots=True)
class Kill:
    """What one kill hit, and what came of it."""

    rank: int
    inside: str
    kind: str
    step: int
    resumed: int
    latest: int
    other: float
    launcher: float
    left: str


def kill_one(folder: Path, arguments: list[str], aim: str, seconds: float, chance: random.Random) -> Kill:
    """Start the job, kill one rank inside a save or a step, and see how it ends.

    Args:
        aim: "save" or "step".
        seconds: such a thing takes.
    """
    saved = Path(arguments[arguments.index("--save") + 1])
    before = newest_step(saved)
    victim, wanted, delay = (
        chance.randrange(RANKS),
        chance.randint(1, 2 if aim == "save" else 4),
        chance.uniform(0, 0.9),
    )
    with started(folder, arguments) as job:
        deadline = time.monotonic() + START
        while (now := job.told(victim)) is None or now.begun(aim) < wanted or now.kind != aim:
            if job.process.poll() is not None or time.monotonic() > deadline:
                raise job.fail("the job ended, or stood still, before the moment to kill it")
            time.sleep(0.0005)
        time.sleep(delay * seconds)
        pids = [told.pid for rank in range(RANKS) if (told := job.told(rank)) is not None]
        killed = time.monotonic()
        os.kill(now.pid, signal.SIGKILL)
        ended: dict[int, float] = {}
        while len(ended) < len(pids) or job.process.poll() is None:
            ended.update({pid: time.monotonic() - killed for pid in pids if pid not in ended and not is_running(pid)})
            if time.monotonic() > killed + PATIENCE:
                raise job.fail(f"not all had ended {PATIENCE:g} s after the kill")
            time.sleep(0.01)
        launcher = time.monotonic() - killed
        if job.process.returncode == 0:
            raise job.fail("the launcher said that all was well")
        last = job.told(victim)
    assert last is not None
    resumed = int((folder / "resumed").read_text())
    if resumed != before:
        raise RecoveryError(f"the restart went on from step {resumed}, and step {before} was the newest")
    check(saved)
    left = ", ".join(sorted(path.name for path in saved.glob(".*"))) if saved.exists() else ""
    other = max((value for pid, value in ended.items() if pid != now.pid), default=0.0)
    return Kill(
        victim, last.inside, last.kind, resumed + last.steps, resumed, newest_step(saved), other, launcher, left
    )


def newest_step(saved: Path) -> int:
    """The step of what a restart would load; 0: nothing."""
    if (saved / "latest").exists():
        return int((saved / "latest").read_text().removeprefix("global_step"))
    return max((int(path.name.removeprefix("global_step")) for path in saved.glob("global_step*")), default=0)


def check(saved: Path) -> None:
    """Whatever has a final name is whole, and the command says so of the newest."""
    from ds_optim.checkpoint.directory import damages

    for folder in saved.glob("[!.]*"):
        if folder.is_dir() and (found := damages(folder)):
            raise RecoveryError(f"{folder} is damaged: {found}")
    if (saved / "latest").exists():
        command = [str(Path(sys.executable).with_name("ds-optim")), "checkpoint", "verify", str(saved)]
        verified = subprocess.run(command, capture_output=True, text=True)
        if verified.returncode != 0 or "is whole" not in verified.stdout:
            raise RecoveryError(f"{' '.join(command)}:\n{verified.stdout}{verified.stderr}")


def differing_tensors(one: Path, two: Path) -> list[str]:
    """Names of the tensors in which two canonical checkpoints differ, bitwise, or that only one of them has."""
    import torch

    from ds_optim.checkpoint import ranges

    def stored(folder: Path) -> dict[str, torch.Tensor]:
        whole = {name: torch.zeros(numel, dtype=dtype) for name, (numel, dtype) in ranges.lengths(folder).items()}
        ranges.read(folder, {name: ranges.Ranges(len(t), t.dtype, [(0, t)]) for name, t in whole.items()})
        return whole

    tensors = stored(one), stored(two)
    common = tensors[0].keys() & tensors[1].keys()
    differ = {name for name in common if not torch.equal(*(of_one[name].view(torch.uint8) for of_one in tensors))}
    return sorted((tensors[0].keys() ^ tensors[1].keys()) | differ)


def differences(one: Path, two: Path) -> list[str]:
    """Where two runs' last checkpoints and logs differ, bitwise."""

    def losses(folder: Path) -> dict[int, set[tuple[float, float]]]:
        found: dict[int, set[tuple[float, float]]] = {}
        for record in map(json.loads, (folder / "log" / "log.jsonl").read_text().splitlines()):
            if "loss" in record:
                found.setdefault(record["step"], set()).add((record["loss"], record["grad_norm"]))
        return found

    found = differing_tensors(*(folder / "saved" / f"global_step{STEPS}" for folder in (one, two)))
    if losses(one) != losses(two):
        found.append("the losses")
    return found


# -- the whole --------------------------------------------------------------------------------------------------------


def disturb(run: str, folder: Path, kills: int, chance: random.Random) -> tuple[list[Kill], dict[str, float]]:
    """One run undisturbed, one killed again and again; what was hit, and how long steps and saves take."""
    say = functools.partial(print, flush=True)
    say(f"{run}: undisturbed ...")
    timed = finish(folder / "undisturbed job", job_arguments(run, folder / "undisturbed"))
    parts = ("forward", "backward", "optimizer")
    seconds = {"step": sum(statistics.median(timed[part]) for part in parts), "save": statistics.median(timed["save"])}
    say(f"{run}: a step takes {seconds['step']:.3f} s, a save {seconds['save']:.3f} s")
    arguments = job_arguments(run, folder / "disturbed")
    done: list[Kill] = []
    aims = [*["save"] * (kills - kills // 2), *["step"] * (kills // 2)]
    chance.shuffle(aims)
    while aims:
        aim = aims.pop()
        one = kill_one(folder / f"job{len(done)}", arguments, aim, seconds[aim], chance)
        done.append(one)
        say(f"{run}: kill {len(done)} hit rank {one.rank} in {one.inside}, {one}")
        if one.kind != aim:
            aims.insert(0, aim)  # a miss is shown, and does not count
        if len(done) > 2 * kills:
            raise RecoveryError("more misses than hits")
    before = newest_step(folder / "disturbed" / "saved")
    finish(folder / "last job", arguments)
    if int((folder / "last job" / "resumed").read_text()) != before:
        raise RecoveryError("the last restart did not go on from the newest checkpoint")
    check(folder / "disturbed" / "saved")
    found = differences(folder / "undisturbed", folder / "disturbed")
    if found:
        raise RecoveryError(f"not bitwise the undisturbed run: {found}")
    say(f"{run}: bitwise the undisturbed run")
    return done, seconds


def section(run: str, done: list[Kill], seconds: dict[str, float]) -> str:
    hits = {kind: sum(one.kind == kind for one in done) for kind in ("save", "step", "neither")}
    lines = [
        f"## {run}\n",
        f"{len(done)} kills: {hits['save']} inside a save, {hits['step']} inside a step, {hits['neither']} between. "
        f"A step took {1000 * seconds['step']:.0f} ms, a save {1000 * seconds['save']:.0f} ms (median). After a kill "
        f"the other rank had ended within {max(one.other for one in done):.1f} s, the launcher within "
        f"{max(one.launcher for one in done):.1f} s. The last checkpoint (every tensor) and all logged losses are "
        "bitwise those of the undisturbed run.\n",
        "| kill | rank | inside | at step | started from | newest whole afterwards | other rank ended | launcher ended "
        "| left behind |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for number, one in enumerate(done, 1):
        lines.append(
            f"| {number} | {one.rank} | {one.inside} | {one.step} | {one.resumed} | {one.latest} | {one.other:.1f} s "
            f"| {one.launcher:.1f} s | {one.left} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    """Disturb every run; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="per run, half of them inside a save (20)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--run", nargs="*", choices=list(RUNS), default=list(RUNS), help="only these")
    parser.add_argument("--markdown", type=Path, help="where to write the table")
    arguments = parser.parse_args()
    began = time.time()
    sections: list[str] = []
    failures = 0
    with tempfile.TemporaryDirectory(prefix="crash_recovery_") as folder:
        jobs = ThreadPoolExecutor(len(arguments.run))  # side by side: most of the time processes are starting
        found = {
            run: jobs.submit(
                disturb, run, Path(folder) / run.replace(", ", "_"), arguments.kills, random.Random(arguments.seed)
            )
            for run in arguments.run
        }
        jobs.shutdown(wait=True)
        for run, result in found.items():
            try:
                sections.append(section(run, *result.result()))
            except RecoveryError as failure:
                print(f"{run}: FAILED: {failure}", file=sys.stderr, flush=True)
                failures += 1
    print("\n".join(sections))
    if failures:
        return 1
    if arguments.markdown:
        import torch

        command = ["python", "benchmarks/crash_recovery.py", *sys.argv[1:]]
        pages.write(
            arguments.markdown,
            "# kill -9 of one rank, again and again\n\n"
            f"The small Llama (4.3 M parameters) on {RANKS} ranks under the `deepspeed` launcher: {STEPS} steps, a "
            f"checkpoint every {SAVE_EVERY} steps, `--keep {KEEP} --autoresume`. After every kill what `latest` names "
            "passed `ds-optim checkpoint verify`, everything under a final name was whole, and the restart went on "
            'from exactly that step. "Inside" is what the dead rank said last; "left behind" are hidden names that the '
            "next save removes.\n\n"
            + "\n".join(sections)
            + f"\n`{' '.join(command)}`, {datetime.date.today()}, {os.cpu_count()} CPU cores ({platform.machine()}), "
            f"torch {torch.__version__}, {time.time() - began:.0f} s.\n",
        )
    return 0


if __name__ == "__main__":
    told = argparse.ArgumentParser(add_help=False)
    told.add_argument("--tell", type=Path)
    mine, others = told.parse_known_args()
    sys.exit(rank_of_the_job(mine.tell, others) if mine.tell else main())
