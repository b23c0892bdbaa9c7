"""Buckets are arithmetic: whatever blocks, layouts and owners, what one rank sends is what another expects.

The exchange is played through for all ranks in numpy, by the tables alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from ds_optim.sharding.assignment import Block, Tile, Work, holdings
from ds_optim.sharding.boxes import Box, tiles
from ds_optim.sharding.layout import FlatPartition, Layout, ParameterSpec, Replicated, SlicedParameters
from ds_optim.sharding.plan import Plan
from ds_optim.sharding.schedule import Bucket, InBlock, Piece
from test_layout import cut_over

Flat = NDArray[np.float64]


@dataclass(frozen=True)
class Case:
    """A plan whose owners were drawn, and buckets of a drawn size: `buckets[rank]` is that rank's part."""

    plan: Plan
    bucket_size: int
    buckets: tuple[tuple[Bucket, ...], ...]

    @property
    def ranks(self) -> range:
        return range(self.plan.world_size)

    @property
    def limit(self) -> int:
        """Of one rank in one bucket."""
        message = self.bucket_size * 4 // 5
        largest = max((one.numel for of_rank in self.buckets for part in of_rank for one in part.owned), default=0)
        return max(message // self.plan.world_size if self.plan.replicated else message, largest)

    @property
    def count(self) -> int:
        return len(self.buckets[0])

    def numel(self, block: int) -> int:
        return self.plan.blocks[block].tile.box.numel

    def source(self, tensor: int, parameter: int) -> Flat:
        """The whole parameter: every element of the model has a number of its own."""
        sizes = [[spec.numel for spec in layout.parameters] for layout in self.plan.layouts]
        begin = sum(sum(of_one) for of_one in sizes[:tensor]) + sum(sizes[tensor][:parameter])
        return np.arange(begin, begin + sizes[tensor][parameter], dtype=np.float64) + 1

    def block_values(self, block: int) -> Flat:
        """A block's elements in its own row-major order: by slicing the whole parameter."""
        one = self.plan.blocks[block]
        shape = self.plan.layouts[one.tensor].parameters[one.parameter].shape
        box = one.tile.box
        slices = tuple(slice(start, stop) for start, stop in zip(box.start, box.stop, strict=True))
        return self.source(one.tensor, one.parameter).reshape(shape)[slices].reshape(-1)

    def local(self, rank: int) -> list[Flat]:
        """The flat local tensors of a rank; padding is NaN."""
        found = []
        for tensor, layout in enumerate(self.plan.layouts):
            flat = np.full(layout.local_numel(rank), np.nan)
            for one in layout.fragments(rank):
                box, shape = layout.parts(one.parameter)[one.part], layout.parameters[one.parameter].shape
                part = self.source(tensor, one.parameter).reshape(shape)[tuple(map(slice, box.start, box.stop))]
                flat[one.offset : one.offset + one.numel] = part.reshape(-1)[one.start : one.stop]
            found.append(flat)
        return found


@st.composite
def cases(draw: st.DrawFn, replicated: bool | None = None) -> Case:
    world_size = draw(st.integers(1, 5))
    same_everywhere = draw(st.booleans()) if replicated is None else replicated
    shapes = st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple)
    layouts: list[Layout] = []
    for tensor in range(draw(st.integers(1, 3))):
        specs = tuple(
            ParameterSpec(f"t{tensor}.p{index}", shape)
            for index, shape in enumerate(draw(st.lists(shapes, min_size=1, max_size=3)))
        )
        if same_everywhere:
            layouts.append(Replicated(specs[0], world_size))
        elif draw(st.booleans()):
            layouts.append(SlicedParameters(specs, world_size))
        elif draw(st.booleans()):
            layouts.append(cut_over(draw, specs, world_size))
        else:
            offsets, end = [], draw(st.integers(0, 2))
            for spec in specs:
                offsets.append(end)
                end += spec.numel + draw(st.integers(0, 2))
            layouts.append(FlatPartition(specs, tuple(offsets), -(-end // world_size), world_size))
    blocks, held = [], []
    for tensor, layout in enumerate(layouts):
        for parameter, spec in enumerate(layout.parameters):
            if draw(st.integers(0, 5)) == 0:
                continue  # not a matrix
            grid = tiles(Box((0,) * len(spec.shape), spec.shape), [draw(st.integers(1, 4)) for _ in spec.shape])
            held += holdings(layout, parameter, grid)
            blocks += [
                Block(tensor, parameter, index, Tile(box, box.shape), Work(1.0), draw(st.integers(0, 2)))
                for index, box in enumerate(grid)
            ]
    owners = tuple(draw(st.integers(0, world_size - 1)) for _ in blocks)
    plan = Plan(tuple(layouts), tuple(blocks), tuple(held), owners, world_size, 3, draw(st.booleans()))
    bucket_size = draw(st.integers(1, 60))
    order = draw(st.permutations(range(len(layouts))))
    stepped = order[: draw(st.integers(1, len(order)))]
    return Case(
        plan, bucket_size, tuple(tuple(plan.schedule(stepped, rank, bucket_size)) for rank in range(world_size))
    )


def read(flats: Sequence[Flat], piece: Piece) -> Flat:
    """A piece's elements, in its order."""
    return np.concatenate([flats[piece.tensor].reshape(-1)[index] for index in positions(piece)])


def write(flats: Sequence[Flat], piece: Piece, values: Flat) -> None:
    index = np.concatenate(positions(piece))
    assert len(index) == len(set(index.tolist())) == len(values) == piece.numel
    flats[piece.tensor][index] = values


def positions(piece: Piece | InBlock) -> list[NDArray[np.int64]]:
    found = []
    for one in piece.rectangles:
        index = np.array(one.offset)
        for size, stride in zip(one.shape, piece.strides, strict=True):
            index = index[..., None] + np.arange(size) * stride
        found.append(index.reshape(-1))
    return found


def in_block(place: InBlock | None) -> NDArray[np.int64]:
    """Where elements lie in their block, in the order of the wire."""
    assert place is not None
    return np.concatenate(positions(place))


def begins(counts: Sequence[int]) -> list[int]:
    return [0, *np.cumsum(counts).tolist()]


def exchange(
    buffers: Sequence[Flat], to_ranks: Sequence[Sequence[int]], from_ranks: Sequence[Sequence[int]]
) -> list[Flat]:
    """An all-to-all over all ranks' buffers."""
    ranks = range(len(buffers))
    received = []
    for target in ranks:
        parts = []
        for source in ranks:
            begin, end = begins(to_ranks[source])[target : target + 2]
            assert end - begin == from_ranks[target][source]
            parts.append(buffers[source][begin:end])
        received.append(np.concatenate(parts))
    return received


def gathered(case: Case, number: int, locals_: Sequence[Sequence[Flat]]) -> list[dict[int, Flat]]:
    """Per rank, its blocks' elements after the way in. Every element must come exactly once."""
    parts = [of_rank[number] for of_rank in case.buckets]
    buffers = [
        np.concatenate([np.empty(0), *(read(locals_[rank], one) for one in parts[rank].others)]) for rank in case.ranks
    ]
    received = exchange(buffers, [one.to_ranks for one in parts], [one.from_ranks for one in parts])
    found: list[dict[int, Flat]] = []
    for rank, part in enumerate(parts):
        blocks = {}
        for one in part.owned:
            values, times = np.full(one.numel, np.nan), np.zeros(one.numel, dtype=int)
            if one.local is not None:
                here = in_block(one.local.inside)
                values[here] = read(locals_[rank], one.local)
                times[here] += 1
            for segment in one.remote:
                here = in_block(segment.place)
                values[here] = received[rank][segment.buffer_start : segment.buffer_start + segment.numel]
                times[here] += 1
            assert (times == 1).all()
            blocks[one.block] = values
        found.append(blocks)
    return found


def returned(case: Case, number: int, blocks: Sequence[dict[int, Flat]], locals_: Sequence[Sequence[Flat]]) -> None:
    """The way back of a bucket over the same tables: updates of blocks to where the parameters lie."""
    parts = [of_rank[number] for of_rank in case.buckets]
    buffers = []
    for rank, part in enumerate(parts):
        buffer = np.full(sum(part.from_ranks), np.nan)
        for one in part.owned:
            values = blocks[rank][one.block]
            if one.local is not None:
                write(locals_[rank], one.local, values[in_block(one.local.inside)])
            for segment in one.remote:
                stretch = slice(segment.buffer_start, segment.buffer_start + segment.numel)
                assert np.isnan(buffer[stretch]).all()
                buffer[stretch] = values[in_block(segment.place)]
        assert not np.isnan(buffer).any()
        buffers.append(buffer)
    received = exchange(buffers, [one.from_ranks for one in parts], [one.to_ranks for one in parts])
    for rank, part in enumerate(parts):
        for piece in part.others:
            write(locals_[rank], piece, received[rank][piece.start : piece.start + piece.numel])


@given(cases(replicated=False))
def test_what_one_rank_sends_is_what_another_expects(case: Case) -> None:
    for number in range(case.count):
        parts = [of_rank[number] for of_rank in case.buckets]
        for one in case.ranks:
            assert parts[one].to_ranks[one] == parts[one].from_ranks[one] == 0
            for other in case.ranks:
                assert parts[one].to_ranks[other] == parts[other].from_ranks[one]
        sends = any(sum(part.to_ranks) for part in parts)
        assert {part.travels for part in parts} == {sends}
        assert len({part.shares for part in parts}) == 1
        assert parts[0].shares == tuple(part.numel for part in parts)


@given(cases())
def test_every_block_is_computed_once_by_its_owner_in_the_order_of_its_state(case: Case) -> None:
    assert len({len(of_rank) for of_rank in case.buckets}) == 1
    computed = []
    for rank in case.ranks:
        mine = [one.block for bucket in case.buckets[rank] for one in bucket.owned]
        assert {case.plan.owners[block] for block in mine} <= {rank}
        if not case.plan.stateless:
            by_tensor: dict[int, list[int]] = {}
            for block in mine:
                by_tensor.setdefault(case.plan.blocks[block].tensor, []).append(block)
            for tensor, of_tensor in by_tensor.items():
                assert of_tensor == case.plan.owned(tensor, rank)
        computed += mine
    stepped = {case.plan.blocks[block].tensor for block in computed}
    assert sorted(computed) == [index for index, one in enumerate(case.plan.blocks) if one.tensor in stepped]


@given(cases(replicated=False))
def test_every_element_arrives_once_and_goes_back_to_where_it_came_from(case: Case) -> None:
    kept = [case.local(rank) for rank in case.ranks]
    results = [[np.full_like(flat, np.nan) for flat in flats] for flats in kept]
    for number in range(case.count):
        blocks = gathered(case, number, kept)
        for of_rank in blocks:
            for block, values in of_rank.items():
                assert np.array_equal(values, case.block_values(block))
        returned(case, number, blocks, results)
    stepped = {one.block for of_rank in case.buckets for bucket in of_rank for one in bucket.owned}
    covered = {(case.plan.blocks[block].tensor, case.plan.blocks[block].parameter) for block in stepped}
    for rank in case.ranks:
        for tensor, layout in enumerate(case.plan.layouts):
            wanted = np.full_like(kept[rank][tensor], np.nan)
            for one in layout.fragments(rank):
                if (tensor, one.parameter) in covered:  # nothing else, and no padding, is written to
                    wanted[one.offset : one.offset + one.numel] = kept[rank][tensor][
                        one.offset : one.offset + one.numel
                    ]
            assert np.array_equal(results[rank][tensor], wanted, equal_nan=True)


@given(cases(replicated=False))
def test_no_rank_has_more_than_four_fifths_of_a_bucket_or_the_largest_block(case: Case) -> None:
    for of_rank in case.buckets:
        for part in of_rank:
            assert max(part.numel, sum(part.from_ranks), sum(part.to_ranks)) <= case.limit


@given(cases())
def test_buckets_are_no_more_than_they_must_be(case: Case) -> None:
    """A bucket ends for a rank because its next block does not fit, so two in a row hold more than one would."""
    for of_rank in case.buckets:
        for first, second in pairwise(of_rank):
            loads = [
                one + two
                for one, two in (
                    (first.numel, second.numel),
                    (sum(first.from_ranks), sum(second.from_ranks)),
                    (sum(first.to_ranks), sum(second.to_ranks)),
                )
            ]
            if second.owned and case.plan.world_size == 1:
                assert max(loads) > case.limit


@given(cases(replicated=True))
def test_updates_of_replicated_parameters_lie_where_an_all_gather_of_equal_shares_puts_them(case: Case) -> None:
    """The way back is the only one: one all-gather, padded to the largest owner's; if too large, a broadcast each."""
    results = [[np.full_like(flat, np.nan) for flat in case.local(rank)] for rank in case.ranks]
    for number in range(case.count):
        parts = [of_rank[number] for of_rank in case.buckets]
        assert len({part.shares for part in parts}) == 1
        assert parts[0].shares == tuple(part.numel for part in parts)
        assert {part.travels for part in parts} == {case.plan.world_size > 1}
        assert not any(sum(part.from_ranks) for part in parts)
        width = max(parts[0].shares)
        gathered_at_once = width * case.plan.world_size <= case.bucket_size * 4 // 5
        assert {part.gathered for part in parts} == {gathered_at_once}
        updates = [
            np.concatenate([np.empty(0), *(case.block_values(one.block) for one in part.owned)]) for part in parts
        ]
        padded = [np.pad(one, (0, width - len(one)), constant_values=np.nan) for one in updates]
        messages = [np.concatenate(padded)] * len(updates) if gathered_at_once else updates
        for rank, part in enumerate(parts):
            begin = 0
            for one in part.owned:
                assert not one.remote
                assert one.local is not None
                assert in_block(one.local.inside).tolist() == list(range(one.numel))
                write(results[rank], one.local, updates[rank][begin : begin + one.numel])
                begin += one.numel
            for piece in part.others:
                write(results[rank], piece, messages[piece.owner][piece.start : piece.start + piece.numel])
    stepped = {one.block for of_rank in case.buckets for bucket in of_rank for one in bucket.owned}
    for rank in case.ranks:
        for tensor, flat in enumerate(case.local(rank)):
            touched = any(case.plan.blocks[block].tensor == tensor for block in stepped)
            assert np.array_equal(results[rank][tensor], flat if touched else flat * np.nan, equal_nan=True)


def one_plan(shapes: Sequence[tuple[int, ...]], world_size: int, owners: Sequence[int]) -> Plan:
    """Every parameter one block."""
    layout = SlicedParameters(tuple(ParameterSpec(f"p{i}", shape) for i, shape in enumerate(shapes)), world_size)
    boxes = [Box((0,) * len(shape), shape) for shape in shapes]
    blocks = tuple(Block(0, index, 0, Tile(box, box.shape), Work(1.0)) for index, box in enumerate(boxes))
    held = tuple(holdings(layout, index, [box])[0] for index, box in enumerate(boxes))
    return Plan((layout,), blocks, held, tuple(owners), world_size, 1, True)


def test_no_block_no_bucket() -> None:
    assert one_plan([], 3, []).schedule([0], 0, 100) == []


@pytest.mark.parametrize(("bucket_size", "expected"), [(1000, 1), (40, 2), (20, 4), (19, 4), (1, 4)])
def test_equal_blocks_fill_four_fifths_of_a_bucket(bucket_size: int, expected: int) -> None:
    """Two ranks with four blocks of 16 elements each: one by one, side by side, however small a bucket is."""
    plan = one_plan([(4, 4)] * 8, 2, [0, 1] * 4)
    assert len(plan.schedule([0], 0, bucket_size)) == expected
