"""Several hosts on one machine: to try a multi-node command, and to test one, without a second machine.

    python launcher/local_cluster.py up --hosts 3 -- bash launcher/multinode.sh launcher/train.py --steps 20
    python launcher/local_cluster.py up --hosts 2                   # a shell on the first host
    python launcher/local_cluster.py loopback --hosts 2 -- launcher/train.py --steps 20    # without root

A host is a set of Linux namespaces: network, processes, mounts, host name, shared memory. All hosts hang on one bridge,
and an ssh server runs in each; files are shared, as on a cluster with a network file system. The command runs on the
first host, with ``HOSTFILE`` in its environment, and finds host1, host2, ... by name and without a password.

Nothing outside the namespaces is changed: no interface, no /etc/hosts, no ssh key of yours. They live as long as their
processes, and those die with this one, however it ends. Needs root, and Debian's iproute2, openssh-server and pdsh.
``loopback`` needs none of these: the same script is started once per host with DeepSpeed's ``--no_ssh``, all of them
on 127.0.0.1; it shows everything but ssh and the network.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = {
    "ip": "iproute2",
    "sshd": "openssh-server",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "pdsh": "pdsh",
    "unshare": "util-linux",
    "nsenter": "util-linux",
    "setpriv": "util-linux",
}
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# A killed parent takes its children along, whatever killed it.
TIED = ["setpriv", "--pdeathsig", "KILL"]
START_SECONDS = 20

SSHD_CONFIG = """\
Port 22
HostKey {directory}/key
AuthorizedKeysFile {directory}/key.pub
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
MaxStartups 1024
PidFile none
"""
SSH_CONFIG = """\
Host *
    User root
    IdentityFile {directory}/key
    IdentitiesOnly yes
    StrictHostKeyChecking no
    UserKnownHostsFile /dev/null
    GlobalKnownHostsFile /dev/null
    LogLevel ERROR
"""
# The first process of a host: it waits for its cable, sets the host up and becomes the ssh server.
INIT = """\
read -r _
set -e
hostname {name}
mount --bind {directory}/hosts /etc/hosts
mount --bind {directory}/ssh_config /etc/ssh/ssh_config
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mkdir /run/sshd
ip link set lo up
ip address add {address}/24 dev eth0
ip link set eth0 up
exec {sshd} -D -e -f {directory}/sshd_config
"""


class ClusterError(RuntimeError):
    """No cluster can be had here; the message lists every reason and the remedies."""


class Host:
    """One host of a `LocalCluster`.

    Attributes:
        name: ``host1``, ...; its host name, and in the names of all hosts.
        address: IPv4, on eth0.
    """

    def __init__(self, name: str, address: str, directory: Path) -> None:
        self.name = name
        self.address = address
        self._log = (directory / f"{name}.log").open("w")
        script = INIT.format(name=name, address=address, directory=directory, sshd=_path_of("sshd"))
        namespaces = ["--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child=KILL", "--mount-proc"]
        self._process = subprocess.Popen(
            [*TIED, "unshare", *namespaces, "sh", "-c", script],
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PATH": SYSTEM_PATH},
            start_new_session=True,
        )
        self.pid = _first_child(self._process, self._log.name)

    def plugged(self) -> None:
        """Its cable is there: it may start."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(b"\n")
            self._process.stdin.close()

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def inside(self, command: Sequence[str]) -> list[str]:
        """The command line that runs ``command`` on this host, in the same working directory."""
        return ["nsenter", "--target", str(self.pid), "--all", "--", "env", "-C", str(Path.cwd()), *command]

    def run(self, command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
        """`subprocess.run` on this host; output is captured as text unless said otherwise."""
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, **options}
        return subprocess.run(self.inside(command), check=False, **options)

    def start(self, command: Sequence[str], **options: Any) -> subprocess.Popen[str]:
        """`subprocess.Popen` on this host."""
        return subprocess.Popen(self.inside(command), text=True, **options)

    def processes(self, containing: str) -> list[psutil.Process]:
        """Its processes whose command line contains a text, as this machine numbers them."""
        namespace = os.readlink(f"/proc/{self.pid}/ns/pid")
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if os.readlink(f"/proc/{process.pid}/ns/pid") != namespace:
                    continue
                if containing in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def power_off(self) -> None:
        """Everything on it dies at once. What the others notice depends on its cable: see `LocalCluster.lose`."""
        if self.is_alive:  # its number may be somebody else's by now
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)  # the first process of its namespace: all others go with it
        self._process.wait()
        self._log.close()


class LocalCluster:
    """Use as a context manager.

    Args:
        hosts: how many.
        slots: ranks per host, as the hostfile says.
        subnet: the first three numbers of the addresses.

    Attributes:
        hosts: the first is where commands start.
        hostfile: for ``deepspeed --hostfile``.

    Raises:
        ClusterError: this machine cannot; every reason. On entry: something did not start.
    """

    def __init__(self, hosts: int = 2, slots: int = 1, subnet: str = "10.77.0") -> None:
        problems = problems_here(hosts, slots)
        if problems:
            raise ClusterError(_refusal(problems, hosts))
        self._count, self._subnet, self._slots = hosts, subnet, slots
        self._switch: subprocess.Popen[bytes] | None = None
        self.hosts: list[Host] = []

    def __enter__(self) -> LocalCluster:
        self._directory = Path(tempfile.mkdtemp(prefix="local-cluster-"))
        self.hostfile = self._directory / "hostfile"
        try:
            self._build()
        except BaseException:
            self.down()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.down()

    @property
    def environment(self) -> dict[str, str]:
        """For commands on the hosts: this process's, and the hostfile."""
        return {**os.environ, "HOSTFILE": str(self.hostfile)}

    def cut(self, host: Host) -> None:
        """Pull its cable: packets vanish, and no connection is told."""
        self._on_switch("link", "set", host.name, "down")

    def mend(self, host: Host) -> None:
        """Put the cable back."""
        self._on_switch("link", "set", host.name, "up")

    def lose(self, host: Host) -> None:
        """The host loses its power: cable and processes are gone in one moment, and nobody is told."""
        self._on_switch("link", "delete", host.name)
        host.power_off()

    def down(self) -> None:
        """Remove everything. May be called twice."""
        for host in self.hosts:
            host.power_off()
        if self._switch is not None:
            self._switch.kill()
            self._switch.wait()
        self.hosts, self._switch = [], None
        shutil.rmtree(self._directory, ignore_errors=True)

    def _build(self) -> None:
        names = {f"host{i + 1}": f"{self._subnet}.{i + 1}" for i in range(self._count)}
        self._write("hosts", "127.0.0.1 localhost\n" + "".join(f"{ip} {name}\n" for name, ip in names.items()))
        self._write("hostfile", "".join(f"{name} slots={self._slots}\n" for name in names))
        self._write("sshd_config", SSHD_CONFIG.format(directory=self._directory))
        self._write("ssh_config", SSH_CONFIG.format(directory=self._directory))
        _checked(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self._directory / "key")])
        self._switch = subprocess.Popen([*TIED, "unshare", "--net", "sleep", "infinity"], start_new_session=True)
        own = os.readlink("/proc/self/ns/net")
        _wait_until(lambda: os.readlink(f"/proc/{self._switch_pid}/ns/net") != own, "the switch's namespace")
        self._on_switch("link", "add", "bridge0", "type", "bridge")
        self._on_switch("link", "set", "bridge0", "up")
        for name, address in names.items():
            host = Host(name, address, self._directory)
            self.hosts.append(host)
            self._on_switch("link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", str(host.pid))
            self._on_switch("link", "set", name, "master", "bridge0", "up")
            host.plugged()
        for host in self.hosts:
            self._wait_for_ssh(host)

    def _wait_for_ssh(self, host: Host) -> None:
        probe = ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=2", host.name, "true"]
        log = self._directory / f"{host.name}.log"

        def answers() -> bool:
            if not host.is_alive:
                raise ClusterError(f"{host.name} did not start:\n{log.read_text()}")
            return self.hosts[0].run(probe, env=self.environment).returncode == 0

        _wait_until(answers, f"the ssh server of {host.name}")

    @property
    def _switch_pid(self) -> int:
        assert self._switch is not None
        return self._switch.pid

    def _on_switch(self, *arguments: str) -> None:
        _checked(["nsenter", "--target", str(self._switch_pid), "--net", "--", _path_of("ip"), *arguments])

    def _write(self, name: str, content: str) -> None:
        (self._directory / name).write_text(content)


def size_problems(hosts: int, slots: int) -> list[str]:
    """What is wrong with the numbers."""
    problems = []
    if not 1 <= hosts <= 200:
        problems.append(f"--hosts is {hosts}; it must be from 1 to 200")
    if slots < 1:
        problems.append(f"--slots is {slots}; it must be 1 or more")
    return problems


def problems_here(hosts: int, slots: int = 1) -> list[str]:
    """Every reason why this machine cannot play a cluster; empty if it can."""
    problems = size_problems(hosts, slots)
    missing = sorted({package for program, package in PROGRAMS.items() if _path_of(program) == ""})
    if missing:
        problems.append(f"programs are missing: apt-get install --no-install-recommends {' '.join(missing)}")
    if os.geteuid() != 0:
        problems.append("namespaces and network interfaces need root: sudo, with the same command")
    elif not missing:
        tried = subprocess.run(
            [
                "unshare",
                "--net",
                "--mount",
                "--uts",
                "--pid",
                "--fork",
                "ip",
                "link",
                "add",
                "bridge0",
                "type",
                "bridge",
            ],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PATH": SYSTEM_PATH},
        )
        if tried.returncode != 0:
            problems.append(
                f"this machine makes no namespaces or no bridge ({tried.stderr.strip()}): in a container, give it "
                "--privileged"
            )
    return problems


def _refusal(problems: Sequence[str], hosts: int) -> str:
    listed = "\n".join(f"  - {problem}" for problem in problems)
    return (
        f"no local cluster here:\n{listed}\n"
        "Without root and without ssh the same job runs over loopback:\n"
        f"  python launcher/local_cluster.py loopback --hosts {hosts} -- launcher/train.py ..."
    )


def up(hosts: int, slots: int, command: Sequence[str]) -> int:
    """Run ``command`` on the first of so many hosts (a shell if it is empty); its exit status."""
    # Should this be terminated, then the hosts' end is the command's end too.
    with _stopping_on_signals(), LocalCluster(hosts, slots) as cluster:
        first = cluster.hosts[0]
        names = ", ".join(f"{host.name} ({host.address})" for host in cluster.hosts)
        print(f"local cluster: {names}; hostfile {cluster.hostfile}", file=sys.stderr, flush=True)
        signal.signal(signal.SIGINT, lambda *_: None)  # Control-C reaches the command by itself
        return first.start(list(command) or _shell(), env=cluster.environment).wait()


def loopback(hosts: int, slots: int, command: Sequence[str]) -> int:
    """``deepspeed --no_ssh`` once per host, all on 127.0.0.1; the first exit status that is not 0.

    A host that fails takes the others along, as they could only wait for it.
    """
    with _stopping_on_signals(), tempfile.TemporaryDirectory(prefix="loopback-") as directory:
        hostfile = Path(directory, "hostfile")
        hostfile.write_text("".join(f"host{i + 1} slots={slots}\n" for i in range(hosts)))
        port = free_port()
        launcher = str(Path(sys.executable).with_name("deepspeed"))
        common = [launcher, "--quiet", "--hostfile", str(hostfile), "--no_ssh", "--master_addr", "127.0.0.1"]
        started = [
            subprocess.Popen([*common, f"--master_port={port}", f"--node_rank={rank}", *command])
            for rank in range(hosts)
        ]
        try:
            return _first_failure(started)
        finally:
            _end(started)


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])


def _first_failure(started: Sequence[subprocess.Popen[bytes]]) -> int:
    while True:
        ended = [process.poll() for process in started]
        failed = [status for status in ended if status not in (None, 0)]
        if failed or None not in ended:
            return failed[0] if failed and failed[0] is not None else 0
        time.sleep(0.2)


def _end(started: Sequence[subprocess.Popen[bytes]]) -> None:
    """End launchers and all that they started: DeepSpeed's runner hands no signal on."""
    tree = []
    for process in started:
        with contextlib.suppress(psutil.NoSuchProcess):
            tree += psutil.Process(process.pid).children(recursive=True)
        process.terminate()
    for child in tree:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    for process in started:
        process.wait()


def _shell() -> list[str]:
    return [os.environ.get("SHELL", "/bin/sh"), "-i"]


@contextlib.contextmanager
def _stopping_on_signals() -> Iterator[None]:
    """A termination of this process still tears down."""

    def stop(number: int, _: Any) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGHUP)}
    before[signal.SIGINT] = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _first_child(process: subprocess.Popen[bytes], log: str) -> int:
    """The process that `unshare` forked: the first one inside the namespaces."""

    def child() -> int | None:
        if process.poll() is not None:
            raise ClusterError(f"unshare failed: {Path(log).read_text()}")
        return next((found.pid for found in psutil.Process(process.pid).children() if found.name() == "sh"), None)

    return int(_wait_until(child, "a host's first process"))


def _wait_until(condition: Any, what: str) -> Any:
    deadline = time.monotonic() + START_SECONDS
    while not (result := condition()):
        if time.monotonic() > deadline:
            raise ClusterError(f"{what} was not there after {START_SECONDS} s")
        time.sleep(0.02)
    return result


def _path_of(program: str) -> str:
    """Its path; sshd and ip lie where a user's PATH may not look."""
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:{SYSTEM_PATH}") or ""


def _checked(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ClusterError(f"{shlex.join(command)}: {done.stderr.strip() or done.stdout.strip()}")


def main(arguments: Sequence[str] | None = None) -> int:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="python launcher/local_cluster.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    modes = parser.add_subparsers(dest="mode", required=True)
    for name, about in (
        ("up", "namespaces, a bridge and ssh servers; the command runs on the first host (a shell if there is none)"),
        ("loopback", "no root, no ssh: a training script and its options, started once per host on 127.0.0.1"),
    ):
        mode = modes.add_parser(name, help=about, description=about)
        mode.add_argument("--hosts", type=int, default=2, metavar="N", help="(2)")
        mode.add_argument("--slots", type=int, default=1, metavar="N", help="ranks per host (1)")
        mode.add_argument("command", nargs=argparse.REMAINDER, help="after --")
    given = parser.parse_args(arguments)
    command = given.command[1:] if given.command[:1] == ["--"] else given.command
    if given.mode == "loopback":
        if not command:
            parser.error("loopback needs a training script, after --")
        if problems := size_problems(given.hosts, given.slots):
            parser.error("; ".join(problems))
        return loopback(given.hosts, given.slots, command)
    try:
        return up(given.hosts, given.slots, command)
    except ClusterError as error:
        print(f"local_cluster: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
