"""A stand-in for ``python`` and the scripts beside it, of which `forked` makes executables: it has a fork do the work.

Standard library alone, and little of it: this is what starts in the place of an interpreter. It passes on what it was
started with (arguments, folder, environment, open streams), signals of launchers, and how the fork ended. What it does
not know how to ask for, the interpreter does itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import struct
import sys

BEGUN, ENDED = b"b", b"e"
ANSWER = struct.Struct("ci")
"""What the server says: `BEGUN` with the fork's number, `ENDED` with its exit status, negative for a signal."""
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def main(name: str, arguments: list[str], interpreter: str, address: str) -> None:
    """Be the interpreter.

    Args:
        name: of the executable.
        interpreter: the one that it stands for; others of its scripts lie beside it.
        address: of the Unix socket where `forked` waits.
    """
    if not name.startswith("python"):
        arguments = [os.path.join(os.path.dirname(interpreter), name), *arguments]
    kind, rest = asked_for(arguments)
    if not kind:
        os.execv(interpreter, [interpreter, *arguments])
    request = json.dumps([kind, rest, os.getcwd(), dict(os.environ)]).encode()
    link = socket.socket(socket.AF_UNIX)
    link.connect(address)
    socket.send_fds(link, [struct.pack("I", len(request))], [0, 1, 2])
    link.sendall(request)
    while True:
        try:
            kind_of, value = ANSWER.unpack(received(link, ANSWER.size))
        except EOFError:
            sys.exit("the server of forks is gone")
        if kind_of == BEGUN:
            pass_on_to(value)
            continue
        if value < 0:
            if -value in PASSED_ON:
                signal.signal(-value, signal.SIG_DFL)
            os.kill(os.getpid(), -value)
        os._exit(value)


def pass_on_to(pid: int) -> None:
    """Every signal that launchers send, while the fork is there."""

    def pass_on(number: int, _: object) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has ended, as is about to be told
            os.kill(pid, number)

    for number in PASSED_ON:
        signal.signal(number, pass_on)


def asked_for(arguments: list[str]) -> tuple[str, list[str]]:
    """What an interpreter is to run: "-m", "-c" or "script", and what follows; "" for anything else."""
    while arguments[:1] in (["-u"], ["-B"]):
        arguments = arguments[1:]
    first = arguments[0] if arguments else "-"
    if first in ("-m", "-c") and len(arguments) > 1:
        return first, arguments[1:]
    return ("", arguments) if first.startswith("-") else ("script", arguments)


def received(link: socket.socket, size: int) -> bytes:
    """So many bytes.

    Raises:
        EOFError: the other end is gone.
    """
    found = b""
    while len(found) < size:
        part = link.recv(size - len(found))
        if not part:
            raise EOFError
        found += part
    return found
