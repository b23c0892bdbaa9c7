"""The same bytes, counted by others: the profiler's memory events, the process as the kernel sees it, CUDA's allocator.

None of them knows what a byte is for; each must agree with the sum of the storages. The profiler is exact. The kernel
counts pages, so small tensors are a poor test (freed blocks stay in the heap): measured differences are 0.3 % with
tensors of 64 MB and 11 % with 4 KB. It also counts what is no tensor's:

- what libraries take when they are first used, tens of MB;
- what they keep for every shape of matrices that they meet. On processors with AVX-512 BF16 oneDNN makes machine code
  for each product of bf16 matrices, 0.6 MB a shape: for a Llama 1024 wide this and MKL's buffers are 9 MB, with
  ONEDNN_MAX_CPU_ISA=AVX2 they are 0.6 MB;
- their own copies inside an operator (`benchmarks/memory_peak.py` measures some), and Python's objects.

The first two are taken once. So the kernel's view is judged only when asked for, and it can be judged on a model of
large tensors, after one layer of the same width was trained for a step in the same process. What is left is allowed
for: `LIBRARIES`.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from ds_optim.memory.errors import MemoryAccountError, unknown_torch
from ds_optim.memory.record import Amount, Check, CountedBy, Moment
from ds_optim.memory.steps import StepLog, own_allocations

Witness = Literal["events", "process"]

EVENTS_TOLERANCE = 0.001
"""Of the profiler's sum, relative to all bytes alive: its few bytes of difference are scalars that torch caches."""

LIBRARIES = 4_000_000
"""Bytes that a process may hold beyond the storages when its libraries are warm. Measured with four layers of the Llama
above, after one, on two ranks of ZeRO-2: 0.6 MB after the step, 3.6 MB at its highest point (AMD EPYC, torch 2.13)."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_PERTURB = -1, -3, -6  # malloc.h


@dataclass(frozen=True, slots=True)
class ProcessView:
    """Bytes of this process as the operating system sees them.

    Attributes:
        own: its anonymous memory and its share of shared memory; pages of files, of libraries and of tensors that are
            mapped from a checkpoint, are not counted. Where the kernel does not tell these apart, what no other process
            shares (USS), which falls when another one maps a library of this one's.
        resident: in memory now.
        peak: the most that was ever resident since it was last reset; None where the kernel does not say.
    """

    own: int
    resident: int
    peak: int | None

    @classmethod
    def now(cls) -> ProcessView:
        """Read it, after giving freed blocks back to the system."""
        import psutil

        peak = _peak()  # before anything here adds to it
        _trim()
        process, own = psutil.Process(), _without_files()
        resident = int(process.memory_info().rss)
        return cls(int(process.memory_full_info().uss) if own is None else own, resident, peak)


class Probe(Protocol):
    """Watches one training step from outside: made at its start, asked at its end."""

    kind: Witness

    def checks(self, log: StepLog, closing: int, peak: int) -> list[Check]:
        """What was found, against the bytes of storages that are alive now and at the highest point."""
        ...


def start(
    kind: Witness, opening: int, before: ProcessView | None, os_tolerance: float | None, os_allowance: int = LIBRARIES
) -> Probe:
    """Begin to watch a step.

    Args:
        kind: who watches.
        opening: bytes of storages alive now.
        before: the process before the model was made.
        os_tolerance: for the operating system's view; None shows it only.
        os_allowance: bytes that only the operating system sees.

    Raises:
        MemoryAccountError: the process was not looked at before.
    """
    if kind == "events":
        return EventProbe(opening)
    if before is None:
        raise MemoryAccountError('give cross_check="process" when the accountant is made: it compares with that moment')
    return ProcessProbe(before, os_tolerance, os_allowance)


class EventProbe:
    """The profiler's memory events: every allocation and release of torch's allocators.

    It does not know blocks that are older than itself, so what is compared is what the step itself allocates. Its sum
    is judged where there is no process group: a collective, even of a single rank, may release its tensors on a thread
    of the communication library, which the profiler does not follow (with ``profile_all_threads`` it follows no memory
    at all), and it then reports more than there is. It also sees temporaries inside an operator, which storages do not
    show; so the highest point is shown and not judged.
    """

    kind: Witness = "events"

    def __init__(self, opening: int) -> None:
        self._opening = opening
        self._profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._profiler.start()

    def checks(self, log: StepLog, closing: int, peak: int) -> list[Check]:
        self._profiler.stop()
        running = highest = 0
        blocks: dict[int, int] = {}
        for address, size in _allocations(self._profiler):
            if size > 0:
                running += size - blocks.pop(address, 0)  # an address given out again: its release was not seen
                blocks[address] = size
                highest = max(highest, running)
            else:
                running -= blocks.pop(address, 0)
        our_highest, freed = own_allocations(log)
        return [
            Check(
                name="alive after the step, against what was alive before it and each allocation that the step left",
                ours=closing,
                theirs=self._opening - freed + running,
                method=CountedBy.EVENTS,
                tolerance=None if dist.is_initialized() else EVENTS_TOLERANCE,
            ),
            Check(
                name="highest point of what the step itself allocated",
                ours=our_highest,
                theirs=highest,
                method=CountedBy.EVENTS,
            ),
        ]


class ProcessProbe:
    """The process as the kernel sees it; growth since the accountant was entered, libraries loaded since included."""

    kind: Witness = "process"

    def __init__(self, before: ProcessView, tolerance: float | None, allowance: int) -> None:
        self._before, self._tolerance, self._allowance = before, tolerance, allowance
        _trim()
        self._resettable = reset_peak()

    def checks(self, log: StepLog, closing: int, peak: int) -> list[Check]:
        view, before = ProcessView.now(), self._before
        found = [
            Check(
                name="alive after the step, against the growth of the process since the accountant was entered",
                ours=closing,
                theirs=view.own - before.own,
                method=CountedBy.PROCESS,
                tolerance=self._tolerance,
                allowance=self._allowance,
            )
        ]
        if self._resettable and view.peak is not None:
            found.append(
                Check(
                    name="highest point of the step, against the process's peak in it",
                    ours=peak,
                    theirs=view.peak - before.resident,
                    method=CountedBy.KERNEL,
                    tolerance=self._tolerance,
                    allowance=self._allowance,
                )
            )
        return found


def reset_peak() -> bool:
    """Set the kernel's peak counter of this process to what is resident now; False where it does not allow that."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def reset_allocator_peak(device: torch.device) -> None:
    """Set the peak of CUDA's allocator to what is allocated now; nothing on other devices."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def allocator_slack(device: torch.device) -> Amount | None:
    """Bytes that CUDA's caching allocator reserved and does not use now; None on other devices."""
    if device.type != "cuda":
        return None
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return Amount(bytes=unused, method=CountedBy.ALLOCATOR)


def allocator_checks(device: torch.device, moments: Sequence[Moment]) -> list[Check]:
    """Storages against the statistics of CUDA's allocator at the end of a step; none on other devices.

    Args:
        device: of the model.
        moments: of the step, the last one being now.
    """
    if device.type != "cuda":
        return []
    found = torch.cuda.memory_stats(device)
    peak = max(moment.on_device for moment in moments)
    return [
        Check(name=name, ours=ours, theirs=int(found[f"allocated_bytes.all.{kind}"]), method=CountedBy.ALLOCATOR)
        for name, ours, kind in (
            ("alive after the step, on the device", moments[-1].on_device, "current"),
            ("highest point of the step, on the device", peak, "peak"),
        )
    ]


def _allocations(profiler: profile) -> list[tuple[int, int]]:
    """Address and size of every block allocated, and (negative) released, in the order of time.

    Raises:
        MemoryAccountError: this torch's profiler keeps its events otherwise.
    """
    found = []
    try:
        from torch._C._profiler import _EventType

        waiting = list(profiler.profiler.kineto_results.experimental_event_tree())  # type: ignore[union-attr]
        while waiting:
            event = waiting.pop()
            waiting += event.children
            if event.tag == _EventType.Allocation:
                found.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
    except (ImportError, AttributeError) as error:
        raise unknown_torch(f"the profiler keeps its memory events otherwise ({error})") from error
    return [(address, size) for _, address, size in sorted(found, key=lambda one: one[0])]


def _peak() -> int | None:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return None


def _without_files() -> int | None:
    """Bytes of anonymous memory and of a fair share of shared memory; None where the kernel does not say."""
    with contextlib.suppress(OSError):
        lines = [line.split() for line in Path("/proc/self/smaps_rollup").read_text().splitlines()]
        found = [int(words[1]) * 1024 for words in lines if words[0] in ("Anonymous:", "Pss_Shmem:")]
        if len(found) == 2:
            return sum(found)
    return None


def give_back_freed_blocks(at_once: bool) -> None:
    """Have glibc return freed blocks to the system at once, as the process's peak is otherwise that of its free lists.

    Measured on two ranks of ZeRO-3 with 46 M parameters: the kernel's peak is 30 % above the storages' without this,
    0.1 % with it. Turning it off sets the thresholds to what glibc's own adjustment ends at. Other C libraries: no
    effect.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, (1 << 16) if at_once else (1 << 25))
        libc.mallopt(_M_TRIM_THRESHOLD, (1 << 17) if at_once else (1 << 26))


def write_to_new_blocks(on: bool) -> None:
    """Have glibc fill every block that it hands out with zeros, as pages that nobody wrote to are not resident.

    ZeRO-2 allocates the gradients of its slice at once and fills them during the backward pass: without this the
    kernel's peak of that phase is up to 4 % below the storages'. Libraries' own buffers become resident too, so train
    a model of the same width first with this on. Other C libraries: no effect.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_PERTURB, 255 if on else 0)  # glibc writes the complement


def _trim() -> None:
    """Freed small blocks stay with the process until glibc is asked to return them."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
