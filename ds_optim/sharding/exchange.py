"""Collectives: over a shard group for tensors on any device, over all ranks for what they must agree on."""

from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def from_all_ranks(mine: T) -> list[T]:
    """Every rank's value, in the order of the ranks; the only one's where nothing is distributed."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return [mine]
    found = [mine] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return found


class PendingSum:
    """An all-reduce under way; `wait` puts the sums into the tensor that was given."""

    def __init__(self, tensor: Tensor, group: dist.ProcessGroup) -> None:
        self._target = tensor
        carrier = _carrier(tensor.device, group)
        # CPU offload under a backend that only moves accelerator memory: stage the few bytes through the accelerator.
        self._sent = tensor if carrier == tensor.device else tensor.to(carrier)
        self._work = dist.all_reduce(self._sent, group=group, async_op=True)

    def wait(self) -> None:
        self._work.wait()
        if self._sent is not self._target:
            self._target.copy_(self._sent)


def _carrier(device: torch.device, group: dist.ProcessGroup) -> torch.device:
    """The device whose memory the group's backend can move: the tensor's own wherever possible."""
    supported = group._device_types
    if device in supported or torch.device(device.type) in supported:
        return device
    return torch.device(supported[0].type, torch.accelerator.current_device_index())
