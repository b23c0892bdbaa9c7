"""What benchmarks/accelerator.py asks beside rates: cuts, surroundings and company change nothing, and bytes add up."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerator_bench import Bench
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import ds_optim
from ds_optim.batch_size.noise_scale import NoiseScale
from ds_optim.memory.accountant import MemoryAccountant
from ds_optim.memory.record import Category
from ds_optim.selftest import checks
from ds_optim.selftest.result import CheckResult, judged, not_here

UNACCOUNTED = 0.005  # of the bytes of any moment, at most
STAGES_APART = 0.02  # of a loss in bf16, at most

AROUND: dict[str, Callable[[torch.device], contextlib.AbstractContextManager[Any]]] = {
    "a dispatch mode": lambda device: FlopCounterMode(display=False),
    "a default device": lambda device: device,
    "autocast": lambda device: torch.autocast(device.type, torch.bfloat16),
}
TWO_RANKS = """
import dataclasses, json
from ds_optim.selftest import checks, job
with job.joined() as this:
    found = [dataclasses.asdict(one) for one in checks.ranks()]
    if this.rank == 0:
        print(json.dumps(found))
"""
WITHOUT_COMPILER = """
import torch, ds_optim
weight = torch.nn.Parameter(torch.ones(9, device="cuda"))
weight.grad = torch.ones_like(weight)
ds_optim.AdamW([("w", weight)]).step()
torch.cuda.synchronize()
"""


def bits(bench: Bench) -> Iterator[CheckResult]:
    """A matrix of odd width in one piece, and in pieces that begin anywhere in memory: the same bits."""
    rows, cuts = 997, (0, 1, 3, 500, 997)
    for name in ("AdamW", "Lion", "Adan", "AdamMini"):
        generator = torch.Generator().manual_seed(0)
        values = torch.randn(rows, 1003, generator=generator).to(bench.device)
        whole, held = nn.Parameter(values), values.clone()
        pieces = [nn.Parameter(held[begin:end]) for begin, end in itertools.pairwise(cuts)]
        made = [
            getattr(ds_optim, name)(
                [(f"{index}.weight", one) for index, one in enumerate(given)], roles={"*": "linear"}
            )
            for given in ([whole], pieces)
        ]
        for _ in range(3):
            whole.grad = torch.randn(rows, 1003, generator=generator).to(bench.device)
            for piece, begin, end in zip(pieces, cuts, cuts[1:], strict=False):
                piece.grad = whole.grad[begin:end].clone()
            for optimizer in made:
                optimizer.step()
        differ = int((whole != held).sum())
        yield judged(f"{name}, cut and whole", differ == 0, f"{differ:,} of {held.numel():,} elements differ")


def surroundings(bench: Bench) -> Iterator[CheckResult]:
    """What a training script may have around a step has no part in it."""
    cpu = torch.device("cpu")
    for around, context in AROUND.items():
        apart = {}
        for name in checks.TOLERANCE:
            found, plain = checks.toy(bench.device), checks.toy(bench.device)
            optimizer = checks.made(name, found.named_parameters(), found)
            with context(bench.device):
                checks.stepped(found, optimizer, 3)
            checks.stepped(plain, checks.made(name, plain.named_parameters(), plain), 3)
            apart[name] = checks.apart(found, plain, checks.toy(cpu))
        worst = max(apart, key=lambda name: apart[name] / checks.TOLERANCE[name])
        said = f"{worst} is the farthest from a step without: {apart[worst]:.1e} of the movement"
        passes = apart[worst] <= checks.TOLERANCE[worst]
        yield judged(f"steps under {around}", passes, said, **{f"{name}_apart": one for name, one in apart.items()})
    yield _captured(bench.device)
    yield _without_compiler(bench)


def _captured(device: torch.device) -> CheckResult:
    check = "capture in a CUDA graph is refused"
    if device.type != "cuda":
        return not_here(check, "there is no CUDA")
    model = checks.toy(device)
    optimizer = checks.made("AdamW", model.named_parameters(), model)
    checks.stepped(model, optimizer, 2)
    try:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            optimizer.step()
    except RuntimeError as error:
        said = f"{error} {error.__context__ or ''}"
        return judged(check, "cannot be captured" in said, said[:200])
    return judged(check, False, "it was captured: step count and learning rate are frozen in it")


def _without_compiler(bench: Bench) -> CheckResult:
    """Triton builds its driver with the C compiler."""
    check = "a step without a C compiler"
    if bench.device.type != "cuda":
        return not_here(check, "there is no CUDA")
    with tempfile.TemporaryDirectory() as empty:
        environment = {"PATH": empty, "CC": "", "TRITON_CACHE_DIR": empty}
        status, _, errors = _run(bench, [sys.executable, "-c", WITHOUT_COMPILER], environment, 120)
    return judged(check, status == 0, f"exit status {status} {errors.strip()[-200:]}")


def accounts(bench: Bench) -> Iterator[CheckResult]:
    """Every byte of a training is somebody's."""
    width = 4096 if bench.sizes.side > 1000 else 128
    for name in ("AdamW", "AdamMini", "SWAN"):
        with MemoryAccountant(strict=False) as account:
            model = nn.Sequential(*(nn.Linear(width, width) for _ in range(4))).to(bench.device)
            optimizer = getattr(ds_optim, name)(model.named_parameters(), lr=1e-3, roles=model)
            account.watch(model, optimizer)
            for _ in range(3):
                optimizer.zero_grad()
                model(torch.randn(8, width, device=bench.device)).square().mean().backward()
                optimizer.step()
            [rank] = account.record().ranks
        lost = max(one.bytes_of(Category.UNACCOUNTED) / max(one.total, 1) for one in rank.moments)
        said = f"{lost:.2%} of the bytes are nobody's at worst, at most {UNACCOUNTED:.1%}"
        said += "".join(f"; {one.name}: {one.ours:,} and {one.theirs:,}" for one in rank.checks)
        yield judged(f"{name}'s account", lost <= UNACCOUNTED, said, unaccounted=lost)
        del model, optimizer


def noise_scale(bench: Bench) -> Iterator[CheckResult]:
    """Measuring the gradient noise scale makes nothing wait."""
    model = nn.Sequential(*(nn.Linear(512, 512) for _ in range(8))).to(bench.device)
    optimizer = ds_optim.AdamW(model.named_parameters(), lr=1e-4)
    inputs = torch.randn(4, 512, device=bench.device)
    waits = ""

    def update() -> None:
        for _ in range(2):
            model(inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(3):
        update()
    bare = bench.host_milliseconds(update)
    with NoiseScale(model, optimizer=optimizer, micro_batch_size=4, min_updates=2) as noise:
        for _ in range(3):
            update()
        if bench.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            update()
        except RuntimeError as error:
            waits = str(error)[:100]
        finally:
            if bench.device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
        watched = bench.host_milliseconds(update)
        noise.read()
    said = waits or f"an update takes the host {watched:.2f} ms, without it {bare:.2f} ms"
    yield judged("noise scale", not waits, said, host_ms=watched, bare_host_ms=bare)


def two_ranks(bench: Bench) -> Iterator[CheckResult]:
    """On one device, over gloo: NCCL takes no two ranks there."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    command = [*launcher, sys.executable, "-c", TWO_RANKS]
    for one in _printed(bench, command, {}, 150):
        yield CheckResult(**one)


def engines(bench: Bench) -> Iterator[CheckResult]:
    """A DeepSpeed engine of one rank, where DeepSpeed is installed: every stage of ZeRO trains as the others do."""
    try:
        import deepspeed  # noqa: F401
    except ImportError:
        yield not_here("DeepSpeed engines", "DeepSpeed is not installed")
        return
    script = Path(__file__).with_name("accelerator_engine.py")
    found = _printed(bench, [sys.executable, str(script)], {"DS_ACCELERATOR": bench.device.type}, 200)
    for name, losses in found.items():
        wanted = losses.pop("2")
        apart = max(abs(a - b) / abs(b) for one in losses.values() for a, b in zip(one, wanted, strict=True))
        said = f"ZeRO {', '.join(losses)} are {apart:.1e} of the loss from ZeRO 2 at most, limit {STAGES_APART:.0e}"
        yield judged(f"{name} in DeepSpeed engines", apart <= STAGES_APART, said, apart=apart, last_loss=wanted[-1])


def _printed(bench: Bench, command: list[str], environment: dict[str, str], seconds: float) -> Any:
    """The JSON in the last line that a process prints.

    Raises:
        RuntimeError: it printed none.
    """
    status, printed, errors = _run(bench, command, environment, seconds)
    try:
        return json.loads(printed.strip().rpartition("\n")[2])
    except json.JSONDecodeError:
        raise RuntimeError(f"exit status {status}: {errors.strip()[-300:]}") from None


def _run(bench: Bench, command: list[str], environment: dict[str, str], seconds: float) -> tuple[int, str, str]:
    """Exit status and output of a process in this environment, but for some variables: an empty one is left out.

    Raises:
        TimeIsUpError: before it ended.
        subprocess.TimeoutExpired: it took longer than so many seconds.
    """
    bench.look()
    path = f"{Path(ds_optim.__file__).parents[1]}:{os.environ.get('PYTHONPATH', '')}"
    together = {**os.environ, "PYTHONPATH": path, **environment}
    together = {key: value for key, value in together.items() if value}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=together)
    try:
        printed, errors = process.communicate(timeout=min(seconds, bench.seconds_left))
    except subprocess.TimeoutExpired:
        process.terminate()  # a launcher ends its ranks
        process.communicate()
        bench.look()
        raise
    return process.returncode, printed, errors
