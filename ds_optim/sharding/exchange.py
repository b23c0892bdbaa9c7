"""Collectives: over a shard group for tensors on any device, over `Ranks` for what they must agree on.

Every one names the processes that take part. The job may have others (another engine's, a server's), which do something
else and would be waited for in vain.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ds_optim import known_torch

T = TypeVar("T")


def rank_in_job() -> int:
    """Of this process; 0 if it is alone."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def from_all_ranks(mine: T, group: dist.ProcessGroup | None) -> list[T]:
    """Every rank's value, in the order of the ranks of a group; None: of a process on its own."""
    if group is None or dist.get_world_size(group) == 1:
        return [mine]
    found = [mine] * dist.get_world_size(group)
    dist.all_gather_object(found, mine, group)
    return found


@dataclass(frozen=True, slots=True)
class Ranks:
    """The processes that have a part in something: an engine's, a mesh's, or this one alone.

    Attributes:
        axes: process groups with this process in them, whose product they are: the dimensions of a mesh, data and model
            parallelism of an engine. What one says goes along one axis, then along the next: a group of them all need
            not exist, and making one costs memory.
    """

    axes: tuple[dist.ProcessGroup, ...] = ()

    @classmethod
    def of_job(cls) -> Ranks:
        """Every process there is."""
        world = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
        return cls() if world is None else cls((world,))

    @property
    def size(self) -> int:
        """How many they are."""
        return math.prod(dist.get_world_size(axis) for axis in self.axes)

    @property
    def index(self) -> int:
        """This process's place among them, from 0."""
        place, stride = 0, 1
        for axis in self.axes:
            place, stride = place + stride * dist.get_rank(axis), stride * dist.get_world_size(axis)
        return place

    @property
    def group(self) -> dist.ProcessGroup | None:
        """A process group of them all, made at need: a collective. None for a process on its own."""
        if len(self.axes) > 1:
            return group_over(self.everyones(None))
        return self.axes[0] if self.axes else None

    def everyones(self, mine: T) -> dict[int, T]:
        """Every one's value, by its rank in the job, in the order of their places: a collective."""
        found = {rank_in_job(): mine}
        for axis in self.axes:
            found = {rank: value for part in from_all_ranks(found, axis) for rank, value in part.items()}
        return found

    def union(self, mine: Mapping[str, T]) -> dict[str, T]:
        """What they have between them, by name, each as the first of them has it: a collective."""
        found: dict[str, T] = {}
        for theirs in self.everyones(mine).values():
            for name, its in theirs.items():
                found.setdefault(name, its)
        return found


ALONE = Ranks()

_groups: dict[tuple[object, ...], dist.ProcessGroup] = {}


def group_over(ranks: Iterable[int]) -> dist.ProcessGroup:
    """A group of these ranks, which all of them and no others must ask for."""
    members = tuple(sorted(ranks))
    if len(members) == dist.get_world_size():
        group = dist.group.WORLD
        assert group is not None
        return group
    key = (dist.group.WORLD, *members)  # a job that is initialised again has other groups
    if key not in _groups:
        made = dist.new_group(list(members), use_local_synchronization=True)
        assert isinstance(made, dist.ProcessGroup)
        _groups[key] = made
    return _groups[key]


class PendingSum:
    """An all-reduce under way; `wait` puts the sums, or the largest values, into the tensor that was given."""

    def __init__(self, tensor: Tensor, group: dist.ProcessGroup, op: dist.ReduceOp.RedOpType | None = None) -> None:
        self._target = tensor
        carrier = carrier_of(tensor.device, group)
        # CPU offload under a backend that only moves accelerator memory: stage the few bytes through the accelerator.
        self._sent = tensor if carrier == tensor.device else tensor.to(carrier)
        self._work = dist.all_reduce(self._sent, op or dist.ReduceOp.SUM, group, async_op=True)

    def wait(self) -> None:
        self._work.wait()
        if self._sent is not self._target:
            self._target.copy_(self._sent)


def carrier_of(device: torch.device, group: dist.ProcessGroup) -> torch.device:
    """The device whose memory the group's backend can move: the tensor's own wherever possible."""
    supported = group._device_types
    if device in supported or torch.device(device.type) in supported:
        return device
    return torch.device(supported[0].type, torch.accelerator.current_device_index())


def worker_of(device: torch.device, group: dist.ProcessGroup | None) -> torch.device:
    """Where matrices are multiplied: where the tensors are, or, of a process whose accelerator is at work while they
    are kept on the host (offload), on that accelerator, if the group can carry its memory."""
    accelerator = accelerator_at_work() if device.type == "cpu" else None
    if accelerator is not None and (group is None or torch.device(accelerator.type) in group._device_types):
        return accelerator
    return device if group is None else carrier_of(device, group)


def accelerator_at_work() -> torch.device | None:
    """The accelerator that this process has begun to use."""
    found = _accelerator()
    if found is None or not known_torch.is_at_work(found):
        return None
    return torch.device(found.type, torch.accelerator.current_device_index())


@functools.cache
def _accelerator() -> torch.device | None:
    """That of the machine: asking whether there is one loads a driver's library anew each time."""
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None


def staged(values: Tensor) -> Tensor:
    """Room for values of an accelerator in memory of the host that it copies from and to without anybody waiting."""
    return torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=True)


@contextlib.contextmanager
def beside(device: torch.device, *used: Tensor) -> Iterator[torch.Stream]:
    """What is enqueued here runs beside the device's computations: behind those that are enqueued already.

    Args:
        used: tensors of the device that are used here and were made outside; what is computed later must not write to
            them before it has waited.
    """
    stream = _copy_stream(device)
    stream.wait_stream(torch.accelerator.current_stream(device))  # not that of the current device
    try:
        with stream:
            yield stream
    finally:
        for tensor in used:
            tensor.record_stream(stream)


@functools.cache
def _copy_stream(device: torch.device) -> torch.Stream:
    return torch.Stream(device)


class DeviceCopy:
    """Values of the host on their way to an accelerator, beside its computations.

    Args:
        values: `staged`, or any others, which are staged first.
        device: the accelerator.
        dtype: that they are to have there.
    """

    def __init__(self, values: Tensor, device: torch.device, dtype: torch.dtype) -> None:
        host = values if values.is_pinned() else staged(values).copy_(values)
        self._copy = torch.empty(values.shape, dtype=dtype, device=device)
        with beside(device, self._copy) as stream:
            self._copy.copy_(host, non_blocking=True)
            self._arrived = stream.record_event()

    def arrived(self) -> Tensor:
        """The copy; what is enqueued from here on comes after it."""
        torch.accelerator.current_stream(self._copy.device).wait_event(self._arrived)
        return self._copy


class HostCopy:
    """Values that a device computes and the host reads later: in the next step, without waiting for either.

    Until it has been waited for, nothing may write to them.
    """

    def __init__(self, values: Tensor) -> None:
        self.values = values.detach()
        self._event: torch.Event | None = None
        if values.device.type != "cpu":
            self.values = staged(values)
            with beside(values.device, values) as stream:
                self.values.copy_(values, non_blocking=True)
                self._event = stream.record_event()

    def read(self) -> list[Any]:
        return self.wait().tolist()

    def wait(self) -> Tensor:
        """The values, on the host."""
        if self._event is not None:
            self._event.synchronize()
        return self.values


class FailureCount:
    """How many blocks went wrong on all ranks in a step: summed over them meanwhile, read in a later step.

    Four bytes per rank, in a collective of their own: riding in the updates' messages they would force one between
    every two ranks, also where there is nothing else to say.

    Args:
        failures: 0-dim fp32, this rank's count, on the device that computed it.
        axes: the groups over which it is summed, one behind the other; none for a process on its own.
    """

    def __init__(self, failures: Tensor, axes: Sequence[dist.ProcessGroup]) -> None:
        self._failures = failures.reshape(1)
        self._pending: PendingSum | None = None
        for axis in axes:
            if self._pending is not None:
                self._pending.wait()
            self._pending = PendingSum(self._failures, axis)
        self._copy: HostCopy | None = None
        if failures.device.type != "cpu":
            self._finish()

    def _finish(self) -> HostCopy:
        if self._pending is not None:
            self._pending.wait()
            self._pending = None
        if self._copy is None:
            self._copy = HostCopy(self._failures)
        return self._copy

    def buffers(self) -> list[Tensor]:
        """What is kept until it is read."""
        return [self._failures, *([self._copy.values] if self._copy is not None else [])]

    def read(self) -> bool:
        """Whether any rank failed; the same on every rank."""
        return any(self._finish().read())
