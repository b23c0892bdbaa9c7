"""Persistent ranks for the tests: one set of worker processes per world size, gloo and DeepSpeed initialised.

    def mean_of_ranks(scale):                      # module level: it is sent by reference
        return float(comm.all_reduce(...)) * scale

    def test_it(pool):
        assert pool(3).run(mean_of_ranks, 2.0) == [2.0, 2.0, 2.0]      # one result per rank

Importing torch and DeepSpeed costs seconds, so it is done once, in multiprocessing's fork server, and every rank is
forked from there. World sizes never share processes: DeepSpeed keeps groups for the life of a process, and cloning them
at another size hangs.

A job can rely on this: RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set, there is one thread,
DS_ACCELERATOR is cpu, the default dtype is fp32, torch's and Python's generators are seeded with 0. It must leave no
engine behind (`engine.destroy()`) and no hook in DeepSpeed.

Ranks are stopped between two jobs. Any failure ends the whole set, since the process group is then in an unknown state;
the next `run` starts a new one. This is not for tests of the launcher or of the import hook: the former have `forked`,
and the latter need fresh interpreters.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import faulthandler
import gc
import io
import multiprocessing
import multiprocessing.forkserver
import os
import queue
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from torch.distributed import TCPStore, distributed_c10d

from ds_optim.releases import DEEPSPEED

START_TIMEOUT = 300.0  # seconds until every rank of a new set must have joined the process group
JOB_TIMEOUT = 300.0  # seconds a job may take unless `run` is told otherwise
GRACE = 10.0  # seconds the other ranks get to answer once one has failed; they usually wait for it in a collective
LOG_LINES = 40  # lines of a failed rank's output to show

# Modules that every rank needs and that are safe to fork (no threads, no process group yet).
PRELOADED = [
    "torch",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "deepspeed",
    "transformers.models.llama.modeling_llama",
    "transformers.models.mixtral.modeling_mixtral",
    # What the first engine of a process would import, for seconds.
    "torch._inductor.compile_fx",
    "torch.distributed.checkpoint.state_dict",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.pipe",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "transformers.trainer",
    "ds_optim.checkpoint.resume",
]
PR_SET_PDEATHSIG = 1  # Linux's prctl: the signal that a process gets when its parent dies
# Of a process that is the only rank of its world; the system picks the port.
ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


class RanksFailedError(RuntimeError):
    """What `Pool.run` raises; `reports` maps a rank that failed, died or fell silent to its traceback or the reason."""

    def __init__(self, job: str, world_size: int, reports: dict[int, str], logs: dict[int, str]) -> None:
        self.reports = reports
        text = [f"{job}: {len(reports)} of {world_size} ranks failed"]
        for rank, report in sorted(reports.items()):
            text.append(f"---- rank {rank} ----\n{report.rstrip()}")
            if logs.get(rank):
                text.append(f"---- rank {rank}, end of its output ----\n{logs[rank]}")
        super().__init__("\n".join(text))


class Pools:
    """The pool of each world size, made when it is first asked for: `Pools()(4).run(...)`. Close it when done."""

    def __init__(self) -> None:
        self._pools: dict[int, Pool] = {}
        atexit.register(self.close)  # stopped ranks would not hear of multiprocessing's own end

    def __call__(self, world_size: int) -> Pool:
        if world_size not in self._pools:
            self._pools[world_size] = Pool(world_size)
        return self._pools[world_size]

    def close(self) -> None:
        for pool in self._pools.values():
            pool.close()
        self._pools.clear()

    def __enter__(self) -> Pools:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class _Worker:
    process: multiprocessing.process.BaseProcess
    connection: Connection
    log: Path


class Pool:
    """The ranks of one world size. Processes are started by the first `run` and again after a failure."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._workers: list[_Worker] = []
        self._store: TCPStore | None = None
        self._folder: str | None = None

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = JOB_TIMEOUT) -> list[Any]:
        """Calls `function(*args)` on every rank and returns the results in the order of the ranks.

        `function` is a module-level callable of a module that the workers can import (any test file, any module beside
        it), or a `functools.partial` of one. Arguments and results are copied; tensors may occur anywhere in them.

        Raises RanksFailedError with the traceback of every rank that raised, died, or did not answer within `timeout`
        seconds (or within GRACE seconds of the first failure, since ranks often wait for the one that failed).
        """
        job = _serialise((function, args))
        self._start()
        self._signal(signal.SIGCONT)
        for worker in self._workers:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # a dead rank is reported by _collect
                worker.connection.send_bytes(_serialise((list(sys.path), job)))
        results = self._collect(getattr(function, "__qualname__", repr(function)), timeout)
        # The threads of gloo's groups wake a hundred times a second each, whatever they have to do.
        self._signal(signal.SIGSTOP)
        return results

    def close(self) -> None:
        """Ends every process of this pool, whatever it is doing."""
        for worker in self._workers:
            worker.connection.close()
            worker.process.kill()
        for worker in self._workers:
            worker.process.join()
            worker.process.close()
        self._workers = []
        self._store = None
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def _start(self) -> None:
        if self._workers:
            return
        start_fork_server()
        context = multiprocessing.get_context("forkserver")
        # The store lives here, on a port that the system picks, so that no two pools can race for one.
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._folder = tempfile.mkdtemp(prefix="ds_optim_pool_")
        for rank in range(self.world_size):
            here, there = context.Pipe()
            log = Path(self._folder, f"rank{rank}.log")
            process = context.Process(
                target=_serve,
                args=(there, rank, self.world_size, self._store.port, str(log)),
                name=f"rank {rank} of {self.world_size}",
                daemon=True,
            )
            process.start()
            there.close()
            self._workers.append(_Worker(process, here, log))
        self._collect("starting the ranks", START_TIMEOUT)

    def _collect(self, job: str, timeout: float) -> list[Any]:
        """One answer per rank, or an error after ending the pool (on Ctrl-C too, which would leave answers behind)."""
        try:
            results, reports = self._answers(timeout)
            if reports:
                logs = {rank: _tail(self._workers[rank].log) for rank in reports}
                raise RanksFailedError(job, self.world_size, reports, logs)
        except BaseException:
            self.close()
            raise
        return [results[rank] for rank in range(self.world_size)]

    def _answers(self, timeout: float) -> tuple[dict[int, Any], dict[int, str]]:
        results: dict[int, Any] = {}
        reports: dict[int, str] = {}
        waiting = {worker.connection: rank for rank, worker in enumerate(self._workers)}
        deadline = time.monotonic() + timeout
        reason = f"no answer within {timeout:g} s"
        while waiting:
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = waiting.pop(connection)
                try:
                    succeeded, answer = _deserialise(connection.recv_bytes())
                except (EOFError, ConnectionResetError):
                    process = self._workers[rank].process
                    process.join(1.0)
                    succeeded, answer = False, f"the process died with exit code {process.exitcode}"
                (results if succeeded else reports)[rank] = answer
            if reports and deadline > time.monotonic() + GRACE:
                deadline = time.monotonic() + GRACE
                reason = f"no answer within {GRACE:g} s of another rank's failure"
            if not ready:
                self._ask_for_stacks(list(waiting.values()))
                reports.update((rank, f"{reason}; its stacks are in its output") for rank in waiting.values())
                break
        return results, reports

    def _signal(self, number: signal.Signals) -> None:
        for worker in self._workers:
            if worker.process.pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker.process.pid, number)

    def _ask_for_stacks(self, ranks: list[int]) -> None:
        """Has each rank write the Python stacks of its threads into its log."""
        for rank in ranks:
            pid = self._workers[rank].process.pid
            if pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGUSR1)
        time.sleep(0.5)


def start_fork_server() -> None:
    """Have the process ready that ranks, and programs of `forked`, are forked from."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
    with _environment(ENVIRONMENT):
        multiprocessing.forkserver.ensure_running()


def _serve(connection: Connection, rank: int, world_size: int, port: int, log: str) -> None:
    """The life of one rank: join the group, then one job after another until the other end of the connection closes."""
    # A stopped rank would not notice that the test process is gone.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    let_fork_server_end()
    # Ctrl-C reaches the whole terminal group; the test process decides what happens.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    faulthandler.enable(file=2)
    faulthandler.register(signal.SIGUSR1, file=2, all_threads=True)

    jobs: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(connection, jobs), daemon=True).start()
    connection.send_bytes(_attempt(_join_group, rank, world_size, port))
    _gather_one_by_one()
    # DeepSpeed collects garbage in every engine that it builds; modules are none, and there are many.
    gc.freeze()
    while True:
        search_path, job = _deserialise(jobs.get())
        sys.path.extend(folder for folder in search_path if folder not in sys.path)
        os.ftruncate(output, 0)
        random.seed(0)
        torch.manual_seed(0)
        torch.set_default_dtype(torch.float32)
        answer = _attempt(_call, job)
        gc.collect()  # engines are full of cycles; what they hold must not outlive the job
        gc.freeze()  # what is left are modules that the job imported, and torch's caches
        sys.stdout.flush()
        sys.stderr.flush()
        connection.send_bytes(answer)


def let_fork_server_end() -> None:
    """With the test process, that is: every child of it is given what keeps it alive."""
    os.close(multiprocessing.forkserver._forkserver._forkserver_alive_fd)  # type: ignore[attr-defined]


def _gather_one_by_one() -> None:
    """Older releases of DeepSpeed are refused at ZeRO-3 on CPUs unless they do: here it is their default."""
    if DEEPSPEED.is_before("0.19.8"):
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

        DeepSpeedZeroConfig.model_fields["allgather_sequential"].default = True
        DeepSpeedZeroConfig.model_rebuild(force=True)


def _receive(connection: Connection, jobs: queue.SimpleQueue[bytes]) -> None:
    """Fetches jobs in its own thread, so that a rank stuck in a collective still notices that the parent is gone."""
    while True:
        try:
            jobs.put(connection.recv_bytes())
        except (EOFError, OSError):
            os._exit(0)


def _join_group(rank: int, world_size: int, port: int) -> None:
    os.environ.update(ENVIRONMENT)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # no dependence on what the host's name resolves to
    torch.set_num_threads(1)

    import deepspeed
    import deepspeed.ops

    # DeepSpeed compiles a shared-memory all-reduce on its first initialisation (a minute), which only inference uses.
    # To say so spares a look for a compiler in every rank, too.
    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    store = TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=START_TIMEOUT))
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    deepspeed.init_distributed("gloo")
    _share_groups()


def _share_groups() -> None:
    """Have the same ranks always get the same process group.

    Engines and meshes make groups and give none back, and torch's caches hold on to them. An idle group of gloo's is
    three threads and a hundred wake-ups a second: those of a hundred jobs would take all of the machine.
    """
    make, made = distributed_c10d._new_group_with_tag, dict[Any, Any]()

    def shared(ranks: Any = None, *args: Any, group_desc: Any = None, **kwargs: Any) -> Any:
        key = repr((ranks and sorted(ranks), args, sorted(kwargs.items())))
        if key not in made:
            made[key] = make(ranks, *args, group_desc=group_desc, **kwargs)
        return made[key]

    distributed_c10d._new_group_with_tag = shared


def _call(job: bytes) -> Any:
    function, args = _deserialise(job)
    return function(*args)


def _attempt(action: Callable[..., Any], *args: Any) -> bytes:
    """(True, result) or (False, traceback), serialised; a result that cannot be serialised is a failure too."""
    try:
        return _serialise((True, action(*args)))
    except BaseException:  # SystemExit of a job must not end the rank without a word
        return _serialise((False, traceback.format_exc()))


def _serialise(value: Any) -> bytes:
    """torch.save puts tensors into the bytes; multiprocessing's own pickler would send shared-memory handles."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _deserialise(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=False)


def _tail(log: Path) -> str:
    try:
        return "\n".join(log.read_text(errors="replace").splitlines()[-LOG_LINES:])
    except OSError:
        return ""


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
