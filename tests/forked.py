"""Interpreters without the seconds that an import of torch, DeepSpeed and transformers takes.

    subprocess.run([forked.python(), "-m", "torch.distributed.run", ...], env=forked.environment())

The executables in `scripts` do what an interpreter and the scripts of this environment do; what they start through
``sys.executable`` or ``PATH``, a launcher's ranks for instance, they start as quickly. Each is a fork of a process that
has imported everything, so variables that libraries read when they are imported (OMP_NUM_THREADS, DS_ACCELERATOR) have
the values of the suite; limits, affinity and umask are the test process's. This is not for tests of what an import
does, nor of how launchers kill their ranks; what a local cluster's host runs dies with the host.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import json
import multiprocessing
import os
import runpy
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from forked_python import ANSWER, BEGUN, ENDED, received
from pool import let_fork_server_end, start_fork_server

NAMESPACES = ("net", "uts", "ipc", "pid", "mnt")
NAMES = ("python", "python3", "ds-optim", "torchrun", "deepspeed", "accelerate")


def python() -> str:
    """What to put where ``sys.executable`` would stand."""
    return str(scripts() / "python")


def environment(**more: str) -> dict[str, str]:
    """This process's variables, with `scripts` in front of the path."""
    return {**os.environ, "PATH": f"{scripts()}:{Path(sys.executable).parent}:{os.environ['PATH']}", **more}


@functools.cache
def scripts() -> Path:
    """A folder with the executables. The process that serves them ends with this one."""
    start_fork_server()
    folder = Path(tempfile.mkdtemp(prefix="ds_optim_forked_"))
    path = json.loads(
        subprocess.run(
            [sys.executable, "-c", "import json, sys; print(json.dumps(sys.path[1:]))"],
            env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
            capture_output=True,
            check=True,
        ).stdout
    )
    (folder / "ninja").symlink_to(Path(sys.executable).with_name("ninja"))  # is looked for beside the interpreter
    for name in NAMES:
        (folder / name).write_text(
            f"#!{sys.executable} -IS\nimport sys\nsys.path.append({str(Path(__file__).parent)!r})\n"
            "from forked_python import main\n"
            f"main({name!r}, sys.argv[1:], {sys.executable!r}, {str(folder / 'socket')!r})\n"
        )
        (folder / name).chmod(0o755)
    context = multiprocessing.get_context("forkserver")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(folder, path, there))
    process.start()
    there.close()
    assert here.recv() == "listening"

    def end(owner: int = os.getpid()) -> None:
        if os.getpid() == owner:
            here.close()  # which ends the server
            process.join()
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(end)
    return folder


def _serve(folder: Path, path: list[str], owner: Connection) -> None:
    """Fork for every link until the owner is gone."""
    let_fork_server_end()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # reaches the whole terminal group; the test process decides
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(folder / "socket"))
    listener.listen(64)
    owner.send("listening")
    links: dict[int, socket.socket] = {}
    while True:
        ready, _, _ = select.select([listener, owner, woken], [], [])
        if owner in ready:
            return
        if woken in ready:
            os.read(woken, 4096)
            _tell_of_ends(links)
        if listener in ready:
            link, _ = listener.accept()
            try:
                request, streams = _request(link)
            except (EOFError, OSError):  # it was killed before it had asked
                link.close()
                continue
            if pid := os.fork():
                links[pid] = link
                for stream in streams:
                    os.close(stream)
                continue
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            for other in (listener, *links.values()):
                other.close()
            owner.close()
            os.close(woken)
            os.close(wake)
            _enter_host_of(link)
            link.sendall(ANSWER.pack(BEGUN, os.getpid()))
            _be(folder, path, link, request, streams)


def _request(link: socket.socket) -> tuple[Any, list[int]]:
    size, streams, _, _ = socket.recv_fds(link, 4, 3)
    try:
        return json.loads(received(link, int.from_bytes(size, sys.byteorder))), streams
    except (EOFError, ValueError):  # also of nothing at all
        for stream in streams:
            os.close(stream)
        raise EOFError from None


def _tell_of_ends(links: dict[int, socket.socket]) -> None:
    while links:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        with links.pop(pid) as link:
            try:
                link.sendall(ANSWER.pack(ENDED, os.waitstatus_to_exitcode(status)))
            except BrokenPipeError:  # nobody waits any more
                continue


def _enter_host_of(link: socket.socket) -> None:
    """Go where the stand-in is: it may be on a host of a local cluster, which is a set of namespaces."""
    pid, _, _ = struct.unpack("3i", link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    there, here = (Path(f"/proc/{process}/ns") for process in (pid, "self"))
    kinds = [kind for kind in NAMESPACES if os.readlink(there / kind) != os.readlink(here / kind)]
    if not kinds:
        return
    handles = [os.open(there / kind, os.O_RDONLY) for kind in kinds]
    libc = ctypes.CDLL(None, use_errno=True)
    for handle in handles:
        if libc.setns(handle, 0):
            raise OSError(ctypes.get_errno(), "setns")
        os.close(handle)
    if pid := os.fork():  # a child is the first process that is in the other space of processes
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if code < 0:
            if -code != signal.SIGKILL:
                signal.signal(-code, signal.SIG_DFL)
            os.kill(os.getpid(), -code)
        os._exit(code)


def _be(folder: Path, path: list[str], link: socket.socket, request: Any, streams: list[int]) -> None:
    """What an interpreter does, from its start to its end."""
    kind, arguments, there, variables = request
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    os.chdir(there)
    os.environ.clear()
    os.environ.update(variables)
    sys.executable = str(folder / "python")
    sys.path[:] = [*filter(None, variables.get("PYTHONPATH", "").split(":")), *path]
    threading.Thread(target=_end_with, args=(link,), daemon=True).start()
    code = _status_of(kind, arguments)
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def _end_with(link: socket.socket) -> None:
    """The stand-in was killed."""
    link.recv(1)
    os._exit(128 + signal.SIGKILL)


def _status_of(kind: str, arguments: list[str]) -> int:
    try:
        if kind == "-m":
            sys.path.insert(0, os.getcwd())
            sys.argv = arguments
            runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
        elif kind == "-c":
            sys.path.insert(0, "")
            sys.argv = ["-c", *arguments[1:]]
            exec(compile(arguments[0], "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
            sys.argv = arguments
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0
