"""Hosts, links and ranks that fail in the middle of a run: does the job end, how soon, why, and does it go on rightly?

    python benchmarks/host_faults.py [--only NAME ...] [--markdown docs/results/host_faults.md]

Three hosts of a local cluster (namespaces on a bridge: launcher/local_cluster.py; needs root) train a small Llama with
launcher/multinode.sh and launcher/train.py. Once the run has passed `FAULT_AT` steps, one thing fails. Then:

- the command must end within `LIMIT` seconds, with a nonzero status and a reason, and leave no rank behind on the hosts
  that are still there; or, where the job is meant to survive, it must end well;
- started again with the hosts that are left, or restarted by torchrun, it must go on from the newest whole checkpoint;
- every tensor of the last checkpoint, weights and optimizer state, must be bitwise that of the same training on one
  host: so many steps with three ranks, then the rest with as many ranks as were left.

Exit status 1 if anything of this does not hold.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pages

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "launcher"))

import rank_logs  # noqa: E402
from crash_recovery import differing_tensors  # noqa: E402
from local_cluster import Host, LocalCluster, free_port  # noqa: E402

HOSTS = 3
STEPS, SAVE_EVERY, FAULT_AT = 60, 5, 22
TIMEOUT, SILENCE = 20, 15
# After the ranks have given up, ssh must notice that a host is silent, and launchers look once a second.
LIMIT = TIMEOUT + SILENCE + 15
START = 600.0  # seconds until the fault is due; only a hang takes that long
NO_TEXT = (".json", ".png", ".html", ".svg")
MODEL = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
TRAINING = (
    f"--optimizer shampoo --zero-stage 2 --steps {STEPS} --save-every {SAVE_EVERY} "
    f"--micro-batch 1 --seq-length 32 --eval-sequences 2 --timeout {TIMEOUT} --log-every 5 --autoresume --fallback"
).split()


class FaultError(Exception):
    """Something that had to hold did not."""


@dataclass(slots=True)
class Outcome:
    """A row of the table. Seconds are from the fault to the end of the command (or of the restarted run)."""

    fault: str
    launcher: str
    happened: str
    seconds: float
    reason: str
    then: str


@dataclass(slots=True)
class Job:
    """A training on the hosts of a cluster, in its own directory."""

    cluster: LocalCluster
    directory: Path
    options: Sequence[str] = ()
    runs: int = 0
    process: subprocess.Popen[str] | None = field(default=None)

    @property
    def saved(self) -> Path:
        return self.directory / "saved"

    @property
    def output(self) -> Path:
        return self.directory / f"output{self.runs}"

    def command(self, *more: str) -> list[str]:
        launcher = ["bash", str(ROOT / "launcher" / "multinode.sh"), "--hostfile", str(self.cluster.hostfile)]
        launcher += ["--interface", "eth0", "--silence", str(SILENCE), "--logs", str(self.directory / "logs"), *more]
        return [*launcher, *self.options, str(ROOT / "launcher" / "train.py"), *training(self.directory)]

    def start(self, *more: str) -> None:
        self.runs += 1
        with self.output.open("w") as output:
            self.process = self.cluster.hosts[0].start(
                self.command(*more), env=self.cluster.environment, stdout=output, stderr=subprocess.STDOUT
            )

    def wait_for_step(self, step: int) -> None:
        assert self.process is not None
        deadline = time.monotonic() + START
        while self.step() < step:
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise FaultError(f"the run ended or stood still before step {step}:\n{self.tail()}")
            time.sleep(0.02)

    def step(self) -> int:
        """The last step that the first rank logged."""
        with contextlib.suppress(OSError, ValueError, IndexError):
            return int(json.loads((self.directory / "log" / "log.jsonl").read_text().splitlines()[-1])["step"])
        return 0

    def wait(self, seconds: float) -> int:
        assert self.process is not None
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise FaultError(f"the command had not ended after {seconds:.0f} s:\n{self.tail()}") from None

    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def finish(self, *more: str) -> None:
        self.start(*more)
        if self.wait(START) != 0:
            raise FaultError(f"the restarted run failed:\n{self.tail()}")

    def resumed(self) -> list[int]:
        """The steps from which runs went on, in order."""
        text = "".join((self.directory / f"output{run + 1}").read_text() for run in range(self.runs))
        return [int(step) for step in re.findall(r"resumed +\S+, (\d+) steps done", text)]

    def reason(self) -> str:
        """The first line that `multinode.sh` gave as a rank's last error."""
        found = re.findall(r"^rank \d+: .*", self.output.read_text(errors="replace"), re.MULTILINE)
        return found[0] if found else ""

    def tail(self) -> str:
        return "\n".join("  " + line for line in self.output.read_text(errors="replace").splitlines()[-40:])


def training(directory: Path) -> list[str]:
    model = directory / "model.json"
    model.write_text(json.dumps(MODEL))
    # One text for all runs, which nobody edits in the meantime.
    text = directory.parent / "text"
    if not text.exists():
        shutil.copytree(ROOT / "docs", text, ignore=lambda folder, names: [n for n in names if n.endswith(NO_TEXT)])
    return [
        "--model",
        str(model),
        "--text",
        str(text),
        *TRAINING,
        "--save",
        str(directory / "saved"),
        "--output",
        str(directory / "log"),
    ]


# ------------------------------------------------------------------------------------------ what the result must be


class Reference:
    """The same training on one host, under DeepSpeed's own launcher: all ranks to a step, fewer ranks from there."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def checkpoint(self, resumed: int | None = None, ranks: int = HOSTS) -> Path:
        """The last checkpoint of a run that went on from ``resumed`` with so many ranks (None: nobody disturbed it)."""
        whole = self._directory
        if not (whole / "saved" / f"global_step{STEPS}").exists():
            shutil.rmtree(whole, ignore_errors=True)
            self._run(whole, HOSTS)
        if resumed is None or ranks == HOSTS:
            return whole / "saved" / f"global_step{STEPS}"
        part = self._directory.with_name(f"reference-from{resumed}-with{ranks}")
        if not (part / "saved" / f"global_step{STEPS}").exists():
            shutil.rmtree(part, ignore_errors=True)
            tag = f"global_step{resumed}"
            shutil.copytree(whole / "saved" / tag, part / "saved" / tag)
            (part / "saved" / "latest").write_text(tag)
            self._run(part, ranks)
        return part / "saved" / f"global_step{STEPS}"

    def _run(self, directory: Path, ranks: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        launcher = [str(Path(sys.executable).with_name("deepspeed")), "--quiet", "--num_gpus", str(ranks)]
        command = [*launcher, "--master_port", str(free_port()), str(ROOT / "launcher" / "train.py")]
        done = subprocess.run(
            [*command, *training(directory)], capture_output=True, text=True, check=False, timeout=START
        )
        if done.returncode != 0:
            raise FaultError(f"the reference run failed:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")


def equal_to(job: Job, expected: Path) -> str:
    differing = differing_tensors(job.saved / f"global_step{STEPS}", expected)
    if differing:
        raise FaultError(f"the last checkpoint differs from the reference in {len(differing)} tensors: {differing[:3]}")
    return "weights and state bitwise equal"


def _has_ranks(host: Host) -> bool:
    return host.is_alive and bool(host.processes("train.py"))


# --------------------------------------------------------------------------------------------------------- the faults


def kill_a_rank(cluster: LocalCluster) -> None:
    # The launchers' command lines begin with -m; what a rank has forked is younger than itself.
    ranks = [one for one in cluster.hosts[1].processes("train.py") if one.cmdline()[1:2] == ["-u"]]
    min((one for one in ranks if "-m" not in one.cmdline()[:4]), key=lambda one: one.create_time()).kill()


def lose_a_host(cluster: LocalCluster) -> None:
    cluster.lose(cluster.hosts[2])


def cut_a_link(cluster: LocalCluster) -> None:
    cluster.cut(cluster.hosts[2])


def cut_a_link_for_five_seconds(cluster: LocalCluster) -> None:
    cluster.cut(cluster.hosts[2])
    time.sleep(5)
    cluster.mend(cluster.hosts[2])


def ends_and_goes_on(name: str, fault: Callable[[LocalCluster], None], ranks: int) -> Callable[..., Outcome]:
    """DeepSpeed's launcher: the command ends with a reason, and is started again by hand with what is left."""

    def scenario(job: Job, reference: Reference) -> Outcome:
        job.start()
        job.wait_for_step(FAULT_AT)
        failed = time.monotonic()
        fault(job.cluster)
        status = job.wait(LIMIT)
        seconds = time.monotonic() - failed
        reason = job.reason()
        if status == 0 or not reason:
            raise FaultError(f"status {status}, and the reason was {reason!r}:\n{job.tail()}")
        nobody_left_soon(job.cluster, LIMIT - seconds)
        job.finish("--skip-unreachable")
        step = job.resumed()[-1]
        same = equal_to(job, reference.checkpoint(step, ranks))
        then = f"started again with --skip-unreachable: {ranks} ranks from step {step}; {same}"
        return Outcome(name, "deepspeed", f"ended with status {status}", seconds, reason, then)

    return scenario


def survives(name: str, fault: Callable[[LocalCluster], None]) -> Callable[..., Outcome]:
    def scenario(job: Job, reference: Reference) -> Outcome:
        job.start()
        job.wait_for_step(FAULT_AT)
        failed, step = time.monotonic(), job.step()
        fault(job.cluster)
        job.wait_for_step(step + 2)
        seconds = time.monotonic() - failed
        if job.wait(START) != 0 or job.resumed():
            raise FaultError(f"the run did not survive:\n{job.tail()}")
        then = equal_to(job, reference.checkpoint())
        return Outcome(name, "deepspeed", "the run waited and went on", seconds, "none", then)

    return scenario


def restarts(name: str, fault: Callable[[LocalCluster], None], ranks: int) -> Callable[..., Outcome]:
    """torchrun: it restarts by itself with what is left."""

    def scenario(job: Job, reference: Reference) -> Outcome:
        job.options = ["--elastic", "2"]
        job.start()
        job.wait_for_step(FAULT_AT)
        failed = time.monotonic()
        fault(job.cluster)
        while not job.resumed() and job.is_running() and time.monotonic() < failed + START:
            time.sleep(0.1)
        seconds = time.monotonic() - failed
        status = job.wait(START)
        steps = job.resumed()
        if status != 0 or not steps:
            raise FaultError(f"status {status}, resumed {steps}:\n{job.tail()}")
        same = equal_to(job, reference.checkpoint(steps[-1], ranks))
        happened = f"went on by itself with {ranks} ranks from step {steps[-1]}, and finished"
        return Outcome(name, "torchrun (--elastic 2)", happened, seconds, "none: it goes on", same)

    return scenario


def lose_the_first_host(job: Job, reference: Reference) -> Outcome:
    """The command runs there: nobody can tell a reason. The other ranks must end, and any host can start again."""
    job.start()
    job.wait_for_step(FAULT_AT)
    failed = time.monotonic()
    job.cluster.lose(job.cluster.hosts[0])
    assert job.process is not None
    job.process.wait(10)
    nobody_left_soon(job.cluster, LIMIT)
    seconds = time.monotonic() - failed
    lost = job.cluster.hosts.pop(0)
    reason = "in the ranks' logs: " + _first_reason(job.directory / "logs")
    job.finish("--skip-unreachable")
    step = job.resumed()[-1]
    same = equal_to(job, reference.checkpoint(step, HOSTS - 1))
    then = f"started again on host2 with --skip-unreachable: {HOSTS - 1} ranks from step {step}; {same}"
    happened = f"the command died with {lost.name}; the ranks of the others ended"
    return Outcome("the first host loses its power", "deepspeed", happened, seconds, reason, then)


def _first_reason(logs: Path) -> str:
    return next((f"{rank}: {said.splitlines()[0]}" for rank, said in rank_logs.reasons(logs).items()), "")


def nobody_left_soon(cluster: LocalCluster, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while left := [host.name for host in cluster.hosts if _has_ranks(host)]:
        if time.monotonic() > deadline:
            raise FaultError(f"ranks were left behind on {', '.join(left)}")
        time.sleep(0.2)


def refused(name: str, prepare: Callable[[Job], None], wanted: Sequence[str]) -> Callable[..., Outcome]:
    """The preflight: nothing is started, and every problem is named."""

    def scenario(job: Job, reference: Reference) -> Outcome:
        prepare(job)
        began = time.monotonic()
        job.start()
        status = job.wait(LIMIT)
        seconds = time.monotonic() - began
        text = job.output.read_text()
        said = [line for line in text.splitlines() if line.startswith("preflight: ")]
        missing = [words for words in wanted if not any(words in line for line in said)]
        if status == 0 or missing or (job.directory / "log").exists():
            raise FaultError(f"status {status}; not said: {missing}:\n{job.tail()}")
        then = "nothing was started"
        return Outcome(name, "preflight", f"ended with status {status}", seconds, " / ".join(said[:-1]), then)

    return scenario


def other_version(job: Job) -> None:
    """One host's own mount of the package is another version of it."""
    other = job.directory / "other"
    shutil.copytree(ROOT / "ds_optim", other, ignore=shutil.ignore_patterns("__pycache__"))
    init = other / "__init__.py"
    init.write_text(init.read_text() + "\n# a later commit\n")
    job.cluster.hosts[1].run(["mount", "--bind", str(other), str(ROOT / "ds_optim")])


def unshared_path(job: Job) -> None:
    job.saved.mkdir()
    job.cluster.hosts[2].run(["mount", "-t", "tmpfs", "tmpfs", str(job.saved)])


def wrong_hostfile(job: Job) -> None:
    job.cluster.hostfile.write_text("host1 slots=1\nhost2 slots=one\nhost2 slots=1\nhost1 slots=2\n")


def unknown_hosts(job: Job) -> None:
    job.cluster.hostfile.write_text("host1 slots=1\n10.77.0.99 slots=1\nnowhere slots=1\n")


SCENARIOS: dict[str, Callable[[Job, Reference], Outcome]] = {
    "kill": ends_and_goes_on("a rank is killed (kill -9)", kill_a_rank, HOSTS),
    "lose": ends_and_goes_on("a host loses its power", lose_a_host, HOSTS - 1),
    "cut": ends_and_goes_on("a link is cut for good", cut_a_link, HOSTS - 1),
    "cut5": survives("a link is cut for five seconds", cut_a_link_for_five_seconds),
    "first": lose_the_first_host,
    "elastic-kill": restarts("a rank is killed (kill -9)", kill_a_rank, HOSTS),
    "elastic-lose": restarts("a host loses its power", lose_a_host, HOSTS - 1),
    "elastic-cut": restarts("a link is cut for good", cut_a_link, HOSTS - 1),
    "version": refused(
        "a host has another version of the package", other_version, ["hosts differ in the files of ds_optim"]
    ),
    "path": refused("a host does not see the checkpoints' directory", unshared_path, ["host3: it does not see"]),
    "hostfile": refused("a wrong hostfile", wrong_hostfile, ['line 2: "host2 slots=one"', "line 4: host1 was named"]),
    "unknown": refused("hosts that are not there", unknown_hosts, ["10.77.0.99 cannot be", "nowhere cannot be"]),
}


def table(outcomes: Sequence[Outcome]) -> str:
    lines = [
        "| fault, at step 22 of 60 | started by | what happened | seconds | reason given | then |",
        "|---|---|---|---|---|---|",
    ]
    for row in outcomes:
        reason = row.reason.replace("|", "/").replace(str(ROOT), "...")[:400]
        lines.append(f"| {row.fault} | {row.launcher} | {row.happened} | {row.seconds:.0f} | `{reason}` | {row.then} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SCENARIOS, default=list(SCENARIOS), metavar="NAME")
    parser.add_argument("--markdown", type=Path)
    given = parser.parse_args()
    # A part of the faults can be tried again: the others' rows are those of the last run that tried them.
    kept = given.markdown.with_suffix(".json") if given.markdown else None
    outcomes = (
        {name: Outcome(**row) for name, row in json.loads(kept.read_text()).items()}
        if kept is not None and kept.exists()
        else {}
    )
    failures: list[str] = []
    with tempfile.TemporaryDirectory(prefix="host-faults-") as scratch:
        reference = Reference(Path(scratch, "reference"))
        for name in given.only:
            directory = Path(scratch, name)
            directory.mkdir()
            began = time.monotonic()
            outcomes.pop(name, None)
            try:
                with LocalCluster(HOSTS) as cluster:
                    outcomes[name] = SCENARIOS[name](Job(cluster, directory), reference)
                print(f"{name}: {outcomes[name]} ({time.monotonic() - began:.0f} s in all)", flush=True)
            except (FaultError, subprocess.TimeoutExpired) as error:
                failures.append(f"{name}: {error}")
                print(f"{name} FAILED: {error}", flush=True)
            if kept is not None:
                kept.write_text(json.dumps({key: asdict(row) for key, row in outcomes.items()}, indent=1) + "\n")
    text = table([outcomes[name] for name in SCENARIOS if name in outcomes])
    print(text)
    missing = [name for name in SCENARIOS if name not in outcomes]
    if given.markdown is not None and not missing:
        pages.write(given.markdown, page(text))
    for failure in failures:
        print(f"FAILED {failure.splitlines()[0]}", file=sys.stderr)
    return 1 if failures else 0


def page(text: str) -> str:
    import torch
    from deepspeed import __version__ as deepspeed_version

    date = datetime.datetime.now(datetime.timezone.utc).date()
    return f"""# Faults on three hosts

`python benchmarks/host_faults.py --markdown docs/results/host_faults.md`, {date}, {os.cpu_count()} cores, three hosts
of `launcher/local_cluster.py` (namespaces on a bridge, an ssh server in each), torch {torch.__version__}, deepspeed
{deepspeed_version}, Python {platform.python_version()}, beside other work on the same cores.

A small Llama, Shampoo, ZeRO-2, one rank per host, `--timeout {TIMEOUT}` (ranks) and `--silence {SILENCE}` (ssh), a
checkpoint every {SAVE_EVERY} steps. Seconds are from the fault to the end of the command, which must come within
{LIMIT} (timeout + silence + 15); for the cut of five seconds to the second step after it; for torchrun until the
restarted ranks had loaded the checkpoint; of the preflight, all it took. "Bitwise equal" is against the same training
on one host: three ranks up to the step from which it went on, and as many as were left from there.

{text}
"""


if __name__ == "__main__":
    sys.exit(main())
