"""What DeepSpeed's ZeRO will make of parameter groups, from shapes alone: the layouts of a training that has not begun.

What a running engine really has is read by `ds_optim.deepspeed.reader`, and a test holds the two against each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from ds_optim.deepspeed.facts import START_ALIGNMENT
from ds_optim.sharding.layout import FlatPartition, Layout, ParameterSpec, Replicated, SlicedParameters


def predicted_layouts(
    groups: Sequence[Sequence[ParameterSpec]], stage: int, world_size: int, sub_group_size: int | None = None
) -> list[Layout]:
    """One layout per local tensor of a ZeRO stage, with DeepSpeed's default settings.

    Args:
        groups: the parameters of each parameter group, in order; empty groups are left out.
        stage: 0 (every parameter whole on every rank), 1, 2 or 3.
        world_size: data-parallel ranks.
        sub_group_size: of ZeRO-3, in elements of a rank; None: one sub-group per parameter group.
    """
    filled = [tuple(group) for group in groups if group]
    if stage == 0:
        return [Replicated(spec, world_size) for group in filled for spec in group]
    if stage == 3:
        return [
            SlicedParameters(part, world_size) for group in filled for part in _parts(group, world_size, sub_group_size)
        ]
    layouts: list[Layout] = []
    for group in filled:
        ends = list(accumulate(spec.numel for spec in group))
        alignment = START_ALIGNMENT * world_size
        padded = -(-ends[-1] // alignment) * alignment
        layouts.append(FlatPartition(group, (0, *ends[:-1]), padded // world_size, world_size))
    return layouts


def _parts(group: tuple[ParameterSpec, ...], world_size: int, size: int | None) -> list[tuple[ParameterSpec, ...]]:
    """A parameter group as ZeRO-3 cuts it: a sub-group is closed when it has reached the size."""
    slices = [-(-spec.numel // world_size) for spec in group]
    if size is None or size >= sum(slices):
        return [group]
    parts: list[list[ParameterSpec]] = [[]]
    filled = 0
    for spec, numel in zip(group, slices, strict=True):
        if filled >= size:
            parts.append([])
            filled = 0
        parts[-1].append(spec)
        filled += numel
    return [tuple(part) for part in parts]
