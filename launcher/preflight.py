"""Asks every host of a job, before it starts, for all that would make it fail later; lists ALL problems at once.

    python launcher/preflight.py --hostfile hosts launcher/train.py --optimizer adan        over ssh, from one host
    python launcher/preflight.py --hostfile hosts --no-ssh --node-rank 1 --master-addr 10.0.0.1 launcher/train.py

Without ssh the same command runs on every host, with its own ``--node-rank``; the hosts meet at the master's address
and port, which shows that these can be reached. Checked: the hostfile, ssh, clocks, versions of Python and of packages,
the same files of ds_optim and of the script, the same layout of parameters over ranks, accelerators for all slots, the
port, the network interface, the shared path, and locks of killed builds. The exit status is 1 if there is a problem.

Standard output is for `multinode.sh`: assignments for a shell.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

try:
    import builds
    import job_files
    import settings
    from host_report import MARK, Question, Report, is_train_py, port_problems, report
    from pydantic import ValidationError
except ImportError as missing:  # not in the environment that was made for it
    sys.exit(f"preflight: {missing} for {sys.executable}: activate the virtual environment of ds-optim")

_Read = TypeVar("_Read")
CLOCK_SECONDS = 2.0
"""How far clocks may be apart: file times and log lines of several hosts are compared."""
CONNECT_SECONDS = 5
ENVIRONMENT_FILES = (Path.home() / ".deepspeed_env", Path(".deepspeed_env"))
"""Where DeepSpeed looks."""
REPORT_SECONDS = 180  # importing torch and deepspeed from a network file system takes a while


class SharedPathError(OSError):
    """The launching host cannot write to the path that all should see."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What is known of a host.

    Attributes:
        name: in the hostfile.
        slots: its ranks.
        report: None if there is none; ``problem`` says why.
        clock: its time minus ours, seconds, and how uncertain that is; None if unknown.
        is_reachable: whether it let us in at all.
    """

    name: str
    slots: int
    report: Report | None = None
    problem: str = ""
    clock: tuple[float, float] | None = None
    is_reachable: bool = True


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be started, and how hosts are reached.

    Attributes:
        hosts: slots by name; the first is the master.
        script: of the training, with its ``arguments``.
        port: for the rendezvous on the first host.
        interface: that every host must have; empty if any will do.
        environment: for every process.
        shared: a directory that all hosts must see; None if there is none.
        ssh_port: None for ssh's own.
    """

    hosts: Mapping[str, int]
    script: str
    arguments: Sequence[str] = ()
    port: int = 29500
    interface: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    shared: Path | None = None
    ssh_port: int | None = None

    @property
    def world_size(self) -> int:
        return sum(self.hosts.values())

    def question(self, is_first: bool, shared: tuple[str, str] | None) -> Question:
        return Question(
            script=self.script,
            arguments=list(self.arguments),
            world_size=self.world_size,
            shared=shared,
            port=self.port if is_first else None,
        )


# ----------------------------------------------------------------------------------------------------- asking the hosts


def ask_over_ssh(plan: Plan) -> list[Answer]:
    """Every host's answer, in the order of the hostfile; all are asked at the same time."""
    with _shared_token(plan.shared) as token, ThreadPoolExecutor(len(plan.hosts)) as pool:

        def ask(host: tuple[int, tuple[str, int]]) -> Answer:
            place, (name, slots) = host
            return _ask_one(plan, name, slots, plan.question(place == 0, token))

        return list(pool.map(ask, enumerate(plan.hosts.items())))


def _ask_one(plan: Plan, name: str, slots: int, question: Question) -> Answer:
    ssh = ["ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_SECONDS}"]
    ssh += ["-p", str(plan.ssh_port)] if plan.ssh_port else []
    before = time.time()
    greeting = _run([*ssh, name, "date +%s.%N"], CONNECT_SECONDS * 3)
    after = time.time()
    if isinstance(greeting, str):
        problem = f"{name} cannot be reached over ssh: {greeting}"
        return Answer(name, slots, problem=problem, is_reachable=False)
    try:
        clock = float(greeting.stdout.split()[-1]) - (before + after) / 2, (after - before) / 2
    except (IndexError, ValueError):
        clock = None
    assignments = [f"{key}={value}" for key, value in plan.environment.items()]
    here = Path(__file__).resolve()
    command = ["env", *assignments, sys.executable, str(here.with_name("host_report.py")), question.model_dump_json()]
    remote = f"cd {shlex.quote(os.getcwd())} && {shlex.join(command)}"
    said = _run([*ssh, name, remote], REPORT_SECONDS)
    if isinstance(said, str):
        hint = f"does it have {sys.executable} and {Path.cwd()}?"
        return Answer(name, slots, problem=f"{name} gives no report: {said} ({hint})", clock=clock)
    try:
        found = Report.model_validate_json(said.stdout.rsplit(MARK, 1)[-1].strip())
    except ValidationError as error:
        return Answer(
            name, slots, problem=f"{name}: its report cannot be read: {error.errors()[0]['msg']}", clock=clock
        )
    return Answer(name, slots, found, clock=clock)


def _run(command: Sequence[str], seconds: float) -> subprocess.CompletedProcess[str] | str:
    """What it printed, or in words why it failed."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, check=False, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        return f"no answer in {seconds:.0f} s"
    except OSError as error:
        return str(error)
    if done.returncode == 0:
        return done
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return lines[-1].strip() if lines else f"exit status {done.returncode}"


def ask_at_the_master(plan: Plan, node_rank: int, address: str, seconds: float) -> list[Answer] | str:
    """Every host's answer, on every host: they meet in a store at the master's address. A text if they did not meet.

    Every host must see the shared path by itself; that it is the same one is seen by a file that the master writes.
    """
    from torch.distributed import DistStoreError, TCPStore

    names = list(plan.hosts)
    is_first = node_rank == 0
    if is_first and (busy := port_problems(plan.port)):
        return f"{names[0]}: {busy[0]}"
    with _shared_token(plan.shared if is_first else None) as token:
        try:
            timeout = datetime.timedelta(seconds=seconds)
            store = TCPStore(address, plan.port, len(names), is_first, timeout)
            if is_first:
                store.set("token", json.dumps(token))
            written = json.loads(store.get("token"))
            if store.add("here", 1) == len(names):
                store.set("all here", "yes")
            store.get("all here")
            met = time.time()  # the same moment on every host
            shared = (written[0], written[1]) if written else None
            # The store itself holds the port by now: that it is free has been shown.
            question = plan.question(False, shared)
            store.set(names[node_rank], json.dumps({"report": report(question).model_dump_json(), "time": met}))
            said = {name: json.loads(store.get(name)) for name in names}
            store.set(f"heard {node_rank}", "yes")
            if is_first:
                for other in range(len(names)):
                    store.get(f"heard {other}")
        except (DistStoreError, RuntimeError) as error:
            return (
                f"not all of {', '.join(names)} met at {address}:{plan.port} in {seconds:.0f} s: start this command on "
                f"each of them, with its own --node-rank, and let the port through ({str(error).splitlines()[0]})"
            )
    mine = said[names[node_rank]]["time"]
    return [
        Answer(name, slots, Report.model_validate_json(said[name]["report"]), clock=(said[name]["time"] - mine, 0.5))
        for name, slots in plan.hosts.items()
    ]


@contextlib.contextmanager
def _shared_token(directory: Path | None) -> Iterator[tuple[str, str] | None]:
    """A file in the shared directory for as long as hosts are asked: its path and content; None without a directory."""
    if directory is None:
        yield None
        return
    content = secrets.token_hex(16)
    path = directory.resolve() / f".preflight-{content[:8]}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    except OSError as error:
        raise SharedPathError(f"the shared path {directory} cannot be written here: {error.strerror}") from error
    try:
        yield str(path), content
    finally:
        path.unlink(missing_ok=True)


# -------------------------------------------------------------------------------------------------------------- judging


def judge(plan: Plan, answers: Sequence[Answer]) -> list[str]:
    """Everything that is wrong, one sentence each, with what to do."""
    problems = [answer.problem for answer in answers if answer.problem]
    told = [(answer.name, answer.report) for answer in answers if answer.report is not None]
    for name, found in told:
        problems += [f"{name}: {problem}" for problem in found.problems]
        if plan.interface and plan.interface not in found.interfaces:
            has = ", ".join(f"{interface} {ip}" for interface, ip in found.interfaces.items())
            problems.append(f"{name} has no interface {plan.interface} with an IPv4 address (it has {has})")
        if found.devices < plan.hosts[name] and any(other.devices for _, other in told):
            problems.append(
                f"{name}: {plan.hosts[name]} slots, but {found.devices} accelerators: mend its driver, or the hostfile "
                "(DS_ACCELERATOR=cpu computes on processors)"
            )
    for package in sorted({package for _, found in told for package in found.versions}):
        problems += _different(
            f"the version of {package}",
            [(name, found.versions.get(package, "none")) for name, found in told],
            "install the same one everywhere (pip install -c constraints.txt)",
        )
    for what, attribute, remedy in (
        ("the files of ds_optim", "package", "install the same commit everywhere"),
        ("the training script and its modules", "script", "copy the same ones everywhere"),
        ("the layout of parameters over ranks", "layout", "give the same model and DeepSpeed JSON everywhere"),
    ):
        values = [(name, getattr(found, attribute)) for name, found in told]
        if attribute == "layout":  # none where the settings cannot be read, which that host says itself
            values = [(name, value) for name, value in values if value is not None]
        problems += _different(what, [(name, (value or "missing")[:12]) for name, value in values], remedy)
    return problems + _clock_problems(answers)


def _different(what: str, values: Sequence[tuple[str, str]], remedy: str) -> list[str]:
    by_value: dict[str, list[str]] = {}
    for name, value in values:
        by_value.setdefault(value, []).append(name)
    if len(by_value) < 2:
        return []
    listed = "; ".join(f"{value} on {_some(names)}" for value, names in by_value.items())
    return [f"hosts differ in {what}: {listed}: {remedy}"]


def _clock_problems(answers: Sequence[Answer]) -> list[str]:
    known = [(answer.name, *answer.clock) for answer in answers if answer.clock is not None]
    if not known:
        return []
    reference, base, base_doubt = known[0]
    return [
        f"the clock of {name} is {offset - base:+.1f} s from that of {reference}: run a time service (chrony, ntpd)"
        for name, offset, doubt in known[1:]
        if abs(offset - base) > CLOCK_SECONDS + doubt + base_doubt
    ]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def local_problems() -> list[str]:
    """What the launching host itself lacks to reach the others."""
    wanted = {"ssh": "openssh-client", "pdsh": "pdsh"}
    return [
        f"{program} is missing on the launching host (Debian: apt-get install {package})"
        for program, package in wanted.items()
        if shutil.which(program) is None
    ]


# ---------------------------------------------------------------------------------------------------------- the command


def main(arguments: Sequence[str] | None = None) -> int:
    given = _parser().parse_args(arguments)
    with contextlib.redirect_stdout(sys.stderr):  # whatever an import prints is not for the shell
        found = _judged(given)
    if found is None:
        return 1
    print(f"HOSTS={shlex.quote(','.join(answer.name for answer in found))}")
    print(f"SLOTS={found[0].slots}")
    print(f"MASTER_ADDR={shlex.quote(given.master_addr or _address(found[0], given.interface))}")
    return 0


def _judged(given: argparse.Namespace) -> list[Answer] | None:
    """The hosts that will take part; None if there is a problem, which is said."""
    started = time.monotonic()
    problems: list[str] = []
    hosts = _noting(problems, lambda: job_files.read_hostfile(given.hostfile)) or {}
    files = given.env_file or [path for path in ENVIRONMENT_FILES if path.is_file()]
    environment = _noting(problems, lambda: job_files.environment(files, given.interface)) or {}
    builds.use_own_folder(environment)  # the environment is at the same path on all hosts
    problems += _problems_of_the_command(given, hosts)
    answers = [Answer(name, slots) for name, slots in hosts.items()]
    if not problems and not given.hostfile_only:
        os.environ.update(environment)
        plan = Plan(
            hosts, given.script, given.arguments, given.port, given.interface, environment, given.shared, given.ssh_port
        )
        try:
            answers, problems = _ask(plan, given)
        except SharedPathError as error:
            problems = [str(error)]
    for problem in problems:
        print(f"preflight: {problem}", file=sys.stderr)
    if problems:
        print(f"preflight: {len(problems)} problem{'s' * (len(problems) > 1)}; nothing was started", file=sys.stderr)
        return None
    if not given.hostfile_only:
        about = f"{len(answers)} hosts, {sum(answer.slots for answer in answers)} ranks"
        seconds = time.monotonic() - started
        print(f"preflight: {about}, no problem found in {seconds:.0f} s", file=sys.stderr, flush=True)
    if given.write_environment is not None:
        given.write_environment.write_text("".join(f"{name}={value}\n" for name, value in environment.items()))
    return answers


def _noting(problems: list[str], read: Callable[[], _Read]) -> _Read | None:
    try:
        return read()
    except job_files.JobFilesError as error:
        problems += str(error).splitlines()
        return None


def _problems_of_the_command(given: argparse.Namespace, hosts: Mapping[str, int]) -> list[str]:
    """What can be seen before any host is asked."""
    problems: list[str] = [] if given.no_ssh else local_problems()
    if not Path(given.script).is_file():
        problems.append(f"{given.script}: no such training script")
    elif is_train_py(given.script) and hosts:
        try:
            settings.read(given.arguments, sum(hosts.values()))
        except settings.SettingsError as error:
            problems += [f"{given.script}: {line.removeprefix('  - ')}" for line in str(error).splitlines()]
        except SystemExit:  # argparse has said which
            problems.append(f"{given.script} does not take these options")
    if given.no_ssh and not 0 <= given.node_rank < max(1, len(hosts)):
        problems.append(f"--node-rank is {given.node_rank}; with {len(hosts)} hosts it must be 0 to {len(hosts) - 1}")
    if given.no_ssh and not given.master_addr:
        problems.append("--no-ssh needs --master-addr: an address of the first host that all others can reach")
    if given.torchrun and len(set(hosts.values())) > 1:
        problems.append(
            "torchrun starts equally many ranks on every host: give all hosts of the hostfile the same slots"
        )
    if not (given.no_ssh or given.torchrun):
        paths = [os.getcwd(), sys.executable, given.script, *([given.logs] if given.logs else [])]
        problems += job_files.unpassable(paths, given.arguments)
    if given.hostfile_only and given.skip_unreachable:
        problems.append("--skip-unreachable is for the preflight to find out: leave --no-preflight")
    return problems


def _ask(plan: Plan, given: argparse.Namespace) -> tuple[list[Answer], list[str]]:
    if given.no_ssh:
        met = ask_at_the_master(plan, given.node_rank, given.master_addr, given.wait)
        return ([], [met]) if isinstance(met, str) else (met, judge(plan, met))
    answers = ask_over_ssh(plan)
    lost = [answer for answer in answers if not answer.is_reachable]
    if not (given.skip_unreachable and lost and len(lost) < len(answers)):
        return answers, judge(plan, answers)
    for answer in lost:
        print(f"preflight: going on without it: {answer.problem}", file=sys.stderr)
    left = {answer.name: answer.slots for answer in answers if answer.is_reachable}
    # Everything about ranks is asked anew: there are fewer of them, and perhaps another first host.
    again = replace(plan, hosts=left)
    answers = ask_over_ssh(again)
    return answers, judge(again, answers)


def _address(first: Answer, interface: str) -> str:
    """Where the others find the first host: its address on the interface, else the one that its name stands for."""
    found = first.report.interfaces if first.report is not None else {}
    if interface in found:
        return found[interface]
    with contextlib.suppress(OSError):
        address = socket.gethostbyname(first.name)
        if address in found.values() and not address.startswith("127."):
            return address
    return next((ip for ip in found.values() if not ip.startswith("127.")), first.name)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python launcher/preflight.py", description=__doc__.split("\n")[0])
    parser.add_argument("--hostfile", type=Path, required=True, metavar="FILE", help="NAME slots=N a line")
    parser.add_argument("--port", type=int, default=29500, metavar="N", help="on the first host (29500)")
    parser.add_argument("--interface", default="", metavar="NAME", help="that every host must have (any)")
    parser.add_argument("--env-file", type=Path, action="append", metavar="FILE", help="NAME=VALUE a line")
    parser.add_argument("--write-environment", type=Path, metavar="FILE", help="what every process gets")
    parser.add_argument("--logs", default="", metavar="DIR", help="of the ranks")
    parser.add_argument("--shared", type=Path, metavar="DIR", help="that every host must see")
    parser.add_argument("--ssh-port", type=int, metavar="N", help="(ssh's own)")
    parser.add_argument("--hostfile-only", action="store_true", help="read the files, ask no host")
    parser.add_argument("--skip-unreachable", action="store_true", help="go on without hosts that do not answer")
    parser.add_argument("--torchrun", action="store_true", help="not DeepSpeed's launcher: all hosts need equal slots")
    parser.add_argument("--no-ssh", action="store_true", help="this command runs on every host")
    parser.add_argument("--node-rank", type=int, default=-1, metavar="I", help="of this host, without ssh")
    parser.add_argument("--master-addr", default="", metavar="IP", help="of the first host")
    parser.add_argument("--wait", type=float, default=300, metavar="S", help="for the other hosts, without ssh (300)")
    parser.add_argument("script", help="the training script; the rest of the line are its arguments")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    return parser


if __name__ == "__main__":
    sys.exit(main())
