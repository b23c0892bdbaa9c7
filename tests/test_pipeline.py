"""The exchange on real ranks: every rank ends with what one process computes, and moves what the plan said it would.

The "update" of a block is its gradient plus the block's number, so that a block that went to a wrong place shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ds_optim.sharding import pipeline
from ds_optim.sharding.assignment import Tile, Work
from ds_optim.sharding.boxes import Box, tiles
from ds_optim.sharding.layout import FlatPartition, Layout, ParameterSpec, Replicated, SlicedParameters
from ds_optim.sharding.plan import Plan, make_plans
from ds_optim.sharding.schedule import Bucket, Piece
from pool import Pools

SPECS = (
    ParameterSpec("a", (13, 7)),
    ParameterSpec("skipped", (5,)),  # no block: nothing of it may travel or change
    ParameterSpec("b", (6, 10)),
    ParameterSpec("c", (3, 4, 5)),
    ParameterSpec("idle", (4, 4)),  # without a gradient on any rank
    ParameterSpec("d", (11,)),
    ParameterSpec("e", (9, 9)),
)
LARGEST = 4  # of a block, along every dimension
LAYOUTS = ("flat", "sliced", "replicated")


def layouts_of(kind: str, world_size: int) -> list[Layout]:
    if kind == "replicated":
        return [Replicated(spec, world_size) for spec in SPECS]
    half = len(SPECS) // 2  # two tensors, as of two parameter groups
    if kind == "sliced":
        return [SlicedParameters(SPECS[:half], world_size), SlicedParameters(SPECS[half:], world_size)]
    found: list[Layout] = []
    for specs in (SPECS[:half], SPECS[half:]):
        offsets, end = [], 0
        for spec in specs:
            offsets.append(end)
            end += -(-spec.numel // 4) * 4  # padding between parameters
        found.append(FlatPartition(specs, tuple(offsets), -(-end // world_size), world_size))
    return found


def grid_of(spec: ParameterSpec) -> list[Box]:
    dims = len(spec.shape)
    return [] if spec.name == "skipped" else tiles(Box((0,) * dims, spec.shape), [LARGEST] * dims)


@cache
def plan_of(kind: str, world_size: int) -> Plan:
    tiled = {spec.name: [Tile(box, box.shape) for box in grid_of(spec)] for spec in SPECS}
    layouts = [(layout, "group", 1) for layout in layouts_of(kind, world_size)]
    ((plan, _),) = make_plans(layouts, tiled, lambda shape: Work(float(torch.Size(shape).numel())), 1, False, True)
    return plan


def gradients() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {spec.name: torch.randn(spec.shape, generator=generator) for spec in SPECS}


def local_tensors(layouts: Sequence[Layout], rank: int) -> list[Tensor]:
    whole = gradients()
    found = []
    for layout in layouts:
        flat = torch.full((layout.local_numel(rank),), torch.nan)  # padding, which must never travel
        for one in layout.fragments(rank):
            values = whole[layout.parameters[one.parameter].name].flatten()
            flat[one.offset : one.offset + one.numel] = values[one.start : one.stop]
        found.append(flat)
    return found


@dataclass
class Result:
    """One rank's local updates and how often each element was updated; what travelled."""

    updates: list[Tensor]
    times: list[Tensor]
    traffic: pipeline.Traffic
    buckets: int


def one_step(kind: str, world_size: int, dtype: torch.dtype, bucket_size: int) -> Result:
    """A step of one rank; without a group in a process on its own."""
    plan = plan_of(kind, world_size)
    group = dist.group.WORLD if world_size > 1 else None
    wire = pipeline.Wire(group, torch.device("cpu"), dtype, plan.replicated, pipeline.Traffic())
    local = local_tensors(plan.layouts, wire.rank)
    updates, times = [torch.zeros_like(one) for one in local], [torch.zeros(one.shape) for one in local]

    def gradient_of(piece: Piece) -> Tensor | None:
        idle = plan.layouts[piece.tensor].parameters[piece.parameter].name == "idle"
        return None if idle else local[piece.tensor]

    def compute(bucket: Bucket, work: Tensor) -> None:
        assert work.dtype == torch.float32
        for values, one in zip(work.split([one.numel for one in bucket.owned]), bucket.owned, strict=True):
            values += one.block

    def apply(piece: Piece, update: list[Tensor]) -> None:
        for target, count, part in zip(
            pipeline.views(updates[piece.tensor], piece),
            pipeline.views(times[piece.tensor], piece),
            update,
            strict=True,
        ):
            target.copy_(part)
            count += 1

    buckets = plan.schedule(range(len(plan.layouts)), wire.rank, bucket_size)
    pipeline.run(buckets, wire, gradient_of, compute, apply)
    return Result(updates, times, wire.traffic, len(buckets))


def assembled(layouts: Sequence[Layout], locals_: Sequence[Sequence[Tensor]]) -> dict[str, Tensor]:
    """Whole parameters from every rank's local tensors."""
    whole = {spec.name: torch.full((spec.numel,), torch.nan) for spec in SPECS}
    for rank, tensors in enumerate(locals_):
        for layout, flat in zip(layouts, tensors, strict=True):
            for one in layout.fragments(rank):
                values = whole[layout.parameters[one.parameter].name]
                values[one.start : one.stop] = flat[one.offset : one.offset + one.numel]
    return {spec.name: whole[spec.name].view(spec.shape) for spec in SPECS}


def wanted(dtype: torch.dtype) -> dict[str, Tensor]:
    """By slicing whole parameters: blocks are numbered parameter by parameter, row-major."""
    found, number = {}, 0
    for name, gradient in gradients().items():
        values = torch.zeros_like(gradient) if name in ("idle", "skipped") else gradient.to(dtype).float()
        corners = product(*(range(0, size, LARGEST) for size in values.shape))
        for corner in [] if name == "skipped" else corners:
            values[tuple(slice(begin, begin + LARGEST) for begin in corner)] += number
            number += 1
        found[name] = values.to(dtype).float()
    return found


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.mark.parametrize("bucket_size", [1, 60, 10_000])
@pytest.mark.parametrize("wire", DTYPES)
@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("world_size", [2, 3])
def test_every_rank_ends_with_what_one_process_computes(
    pool: Pools, world_size: int, kind: str, wire: str, bucket_size: int
) -> None:
    dtype = DTYPES[wire]
    results: list[Result] = pool(world_size).run(one_step, kind, world_size, dtype, bucket_size)
    layouts = plan_of(kind, world_size).layouts
    expected = wanted(dtype)
    found = assembled(layouts, [one.updates for one in results])
    for name, values in expected.items():
        assert torch.equal(found[name], values), name
    if kind == "replicated":
        for one in results[1:]:
            assert all(map(torch.equal, one.updates, results[0].updates))
    for rank, one in enumerate(results):
        for layout, times in zip(layouts, one.times, strict=True):
            inside = torch.zeros_like(times)
            for fragment in layout.fragments(rank):
                if layout.parameters[fragment.parameter].name != "skipped":
                    inside[fragment.offset : fragment.offset + fragment.numel] = 1
            assert torch.equal(times, inside), "an element was updated twice, or not at all, or padding was"


@pytest.mark.parametrize("wire", DTYPES)
@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_process_on_its_own_rounds_as_the_wire_does(kind: str, wire: str) -> None:
    """So that a bf16 exchange gives the same result whatever the number of ranks, one included."""
    result = one_step(kind, 1, DTYPES[wire], 60)
    found = assembled(plan_of(kind, 1).layouts, [result.updates])
    for name, values in wanted(DTYPES[wire]).items():
        assert torch.equal(found[name], values), name
    assert result.traffic == pipeline.Traffic(0, 0, 0)


def test_a_bf16_exchange_does_round() -> None:
    assert not torch.equal(wanted(torch.bfloat16)["a"], wanted(torch.float32)["a"])


@pytest.mark.parametrize("bucket_size", [60, 10_000])
@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("world_size", [2, 3])
def test_what_travels_is_what_the_plan_says(pool: Pools, world_size: int, kind: str, bucket_size: int) -> None:
    results: list[Result] = pool(world_size).run(one_step, kind, world_size, torch.float32, bucket_size)
    costs = plan_of(kind, world_size).costs
    assert [one.traffic.sent for one in results] == costs.sent.tolist()
    assert [one.traffic.received for one in results] == costs.received.tolist()
    messages = (world_size if kind == "replicated" else 2) * results[0].buckets  # a broadcast each, if need be
    assert all(one.traffic.messages <= messages for one in results)
    assert len({one.buckets for one in results}) == 1
    if bucket_size == 10_000:
        assert results[0].buckets == 1


def one_owner(world_size: int) -> list[list[float]]:
    """A replicated parameter of one block: its update is broadcast by whoever owns it."""
    layout = Replicated(ParameterSpec("w", (2, 2)), world_size)
    box = Box((0, 0), (2, 2))
    ((plan, _),) = make_plans([(layout, 0, 1)], {"w": [Tile(box, (2, 2))]}, lambda shape: Work(1.0), 1, False, True)
    found = []
    for dtype in DTYPES.values():
        for owner in range(world_size):
            moved = Plan(plan.layouts, plan.blocks, plan.held, (owner,), world_size, 1, True)
            rank = dist.get_rank()
            wire = pipeline.Wire(dist.group.WORLD, torch.device("cpu"), dtype, True, pipeline.Traffic())
            result = torch.zeros(4)

            def compute(bucket: Bucket, work: Tensor, owner: int = owner) -> None:
                work.mul_(2).add_(owner)

            def apply(piece: Piece, update: Tensor, result: Tensor = result) -> None:
                result.copy_(update[0].flatten())

            pipeline.run(moved.schedule([0], rank, 100), wire, lambda piece: torch.arange(4.0), compute, apply)
            found.append(result.tolist())
    return found


def test_an_update_with_one_owner_is_broadcast(pool: Pools) -> None:
    expected = [[owner, 2.0 + owner, 4.0 + owner, 6.0 + owner] for _ in DTYPES for owner in range(3)]
    assert pool(3).run(one_owner, 3) == [expected] * 3
