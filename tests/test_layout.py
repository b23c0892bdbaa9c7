"""Layouts and runs are arithmetic: whatever shapes, ranks and blocks, every element is held and summed exactly once."""

from __future__ import annotations

import math
import time
from itertools import accumulate, pairwise, product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ds_optim.sharding.block_runs import block_runs, held_spans
from ds_optim.sharding.blocks import BlockGrid
from ds_optim.sharding.boxes import Box
from ds_optim.sharding.layout import (
    Boxed,
    FlatPartition,
    Layout,
    ParameterSpec,
    Replicated,
    SlicedParameters,
    check,
    digest,
)
from ds_optim.sharding.tensor_parallel import TensorParallel


@st.composite
def grids(draw: st.DrawFn) -> BlockGrid:
    runs = tuple(draw(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 4)), min_size=1, max_size=3)))
    axis = sum(count * width for count, width in runs)
    reduce = draw(st.sampled_from([1, 1, 3]))
    inner = draw(st.integers(1, 5)) if reduce == 1 else 1
    return BlockGrid(draw(st.integers(1, 2)), reduce, axis, inner, runs)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[Layout, dict[str, BlockGrid]]:
    found = {f"p{index}": grid for index, grid in enumerate(draw(st.lists(grids(), min_size=1, max_size=4)))}
    specs = tuple(ParameterSpec(name, (grid.numel,)) for name, grid in found.items())
    world = draw(st.integers(1, 5))
    if draw(st.booleans()):
        return SlicedParameters(specs, world), found
    alignment = draw(st.sampled_from([1, 4]))
    offsets, end = [], 0
    for spec in specs:
        offsets.append(end)
        end += -(-spec.numel // alignment) * alignment
    return FlatPartition(specs, tuple(offsets), -(-end // (2 * world)) * 2, world), found


@st.composite
def boxed(draw: st.DrawFn) -> tuple[Layout, dict[str, BlockGrid]]:
    """A parameter that is cut along one or two of its dimensions."""
    grid = draw(grids())
    shape = (grid.batch, grid.reduce, grid.axis, grid.inner)
    edges = [[0, size] for size in shape]
    for dim in draw(st.lists(st.integers(0, 3), min_size=1, max_size=2, unique=True)):
        edges[dim] = sorted([0, shape[dim], *draw(st.lists(st.integers(0, shape[dim]), min_size=1, max_size=3))])
    corners = product(*(pairwise(of_dim) for of_dim in edges))
    boxes = [Box(tuple(low for low, _ in one), tuple(high for _, high in one)) for one in corners]
    return Boxed(ParameterSpec("p0", shape), tuple((box,) for box in draw(st.permutations(boxes)))), {"p0": grid}


def boxes_over(draw: st.DrawFn, shape: tuple[int, ...], columns: int) -> tuple[tuple[Box, ...], ...]:
    """What each of some ranks has of a parameter: nothing of it cut, one box of each, or stripes."""
    kind = draw(st.sampled_from(["whole", "box", "box", "stripes"]))
    if kind == "whole":
        return ()
    dim = draw(st.integers(0, len(shape) - 1))
    stripes = draw(st.integers(1, 3)) if kind == "stripes" else 1
    inner = draw(st.lists(st.integers(0, shape[dim]), min_size=stripes * columns - 1, max_size=stripes * columns - 1))
    edges = list(pairwise(sorted([0, shape[dim], *inner])))
    corners = list(product(*map(range, shape[:dim]))) if kind == "stripes" else [()]
    found = []
    for column in range(columns):
        boxes = []
        for corner in corners:
            for low, high in edges[column::columns]:
                start, stop = [0] * len(shape), list(shape)
                start[: len(corner)], stop[: len(corner)] = corner, [index + 1 for index in corner]
                start[dim], stop[dim] = low, high
                boxes.append(Box(tuple(start), tuple(stop)))
        found.append(tuple(boxes))
    return tuple(found)


def cut_over(draw: st.DrawFn, specs: tuple[ParameterSpec, ...], world_size: int) -> Layout:
    """Parameters over tensor-parallel ranks, and what each of these has over the others."""
    columns = draw(st.sampled_from([count for count in (1, 2, 3, 4) if world_size % count == 0]))
    boxes = tuple(boxes_over(draw, spec.shape, columns) for spec in specs)
    rows, layouts = world_size // columns, list[Layout]()
    is_flat = draw(st.booleans())
    for column in range(columns):
        sizes = [
            sum(box.numel for box in its[column]) if its else spec.numel for spec, its in zip(specs, boxes, strict=True)
        ]
        local = tuple(ParameterSpec(spec.name, (size,)) for spec, size in zip(specs, sizes, strict=True))
        if is_flat:
            offsets = tuple(accumulate(sizes[:-1], initial=0))
            layouts.append(FlatPartition(local, offsets, max(-(-sum(sizes) // rows), 1), rows))
        else:
            layouts.append(SlicedParameters(local, rows))
    places = draw(st.permutations([(column, row) for row in range(rows) for column in range(columns)]))
    return TensorParallel(specs, boxes, tuple(layouts), tuple(places))


@st.composite
def sliced(draw: st.DrawFn) -> tuple[Layout, dict[str, BlockGrid]]:
    """Parameters that tensor parallelism cuts, in boxes or stripes, or has a copy of on each rank, under ZeRO."""
    found = {f"p{index}": grid for index, grid in enumerate(draw(st.lists(grids(), min_size=1, max_size=3)))}
    specs = tuple(ParameterSpec(name, (one.batch, one.reduce, one.axis, one.inner)) for name, one in found.items())
    return cut_over(draw, specs, draw(st.integers(1, 6))), found


def elements_of(layout: Layout, rank: int) -> dict[int, tuple[int, int]]:
    """Parameter and row-major element at every offset of a local tensor: by slicing."""
    found = {}
    for one in layout.fragments(rank):
        shape, box = layout.parameters[one.parameter].shape, layout.parts(one.parameter)[one.part]
        slices = tuple(slice(start, stop) for start, stop in zip(box.start, box.stop, strict=True))
        elements = torch.arange(math.prod(shape)).view(shape)[slices].flatten()[one.start : one.stop].tolist()
        found.update({one.offset + index: (one.parameter, element) for index, element in enumerate(elements)})
    return found


def block_of(grid: BlockGrid, element: int) -> int:
    """The definition: unravel the element's index, find its segment by counting."""
    batch, rest = divmod(element, grid.reduce * grid.axis * grid.inner)
    position = rest // grid.inner % grid.axis
    block = begin = 0
    for count, width in grid.runs:
        for _ in range(count):
            if begin <= position < begin + width:
                return batch * grid.blocks_per_batch + block
            begin, block = begin + width, block + 1
    raise AssertionError


def sizes_of(grid: BlockGrid) -> list[int]:
    """How many elements every block has."""
    return torch.tensor([block_of(grid, element) for element in range(grid.numel)]).bincount().tolist()


def first_element(grid: BlockGrid, block: int) -> int:
    """The row-major element with which a block begins."""
    return next(element for element in range(grid.numel) if block_of(grid, element) == block)


@given(layouts() | boxed() | sliced())
def test_a_layout_holds_every_element_once(drawn: tuple[Layout, dict[str, BlockGrid]]) -> None:
    layout, _ = drawn
    assert check(layout) == []
    held = [elements_of(layout, rank) for rank in range(layout.world_size)]
    for parameter, spec in enumerate(layout.parameters):
        everyones = sorted(element for found in held for owner, element in found.values() if owner == parameter)
        assert everyones == list(range(spec.numel))
        for part, share in enumerate(layout.shares(parameter)):
            stated = dict(zip(share.ranks, pairwise(share.edges), strict=True))
            for rank in range(layout.world_size):
                listed = layout.fragments(rank)
                mine = [one for one in listed if (one.parameter, one.part) == (parameter, part)]
                assert [(one.start, one.stop) for one in mine] == [
                    edges for holder, edges in stated.items() if holder == rank and edges[0] < edges[1]
                ]


@given(layouts() | boxed() | sliced())
def test_runs_name_every_block_element_by_element(drawn: tuple[Layout, dict[str, BlockGrid]]) -> None:
    """Walk the tables as a kernel would and compare with the definition of a block."""
    layout, found = drawn
    holders: dict[tuple[int, int], set[int]] = {}
    cut_names: dict[int, tuple[int, int]] = {}
    num_cuts = set()
    for rank in range(layout.world_size):
        runs = block_runs(layout, rank, found)
        num_cuts.add(runs.num_cuts)
        element_of = elements_of(layout, rank)
        slots: dict[int, tuple[int, int]] = {}
        seen = set()
        for start, length, phase, width, slot, cut_first, cut_last, parameter, first in runs.rows:
            blocks = (phase + length - 1) // width
            assert first == block_of(found[layout.parameters[parameter].name], element_of[start][1])
            assert phase > 0 or element_of[start][1] == first_element(found[layout.parameters[parameter].name], first)
            for index in range(length):
                which = (phase + index) // width
                seen.add(start + index)
                owner, element = element_of[start + index]
                block = (owner, block_of(found[layout.parameters[owner].name], element))
                assert owner == parameter
                assert slots.setdefault(slot + which, block) == block
                holders.setdefault(block, set()).add(rank)
                cut = cut_first if which == 0 else cut_last if which == blocks else -1
                if cut >= 0:
                    assert cut_names.setdefault(cut, block) == block
        for start, length, phase, row, begin, end, width, slot, cut, numel, parameter, first, is_first in runs.columns:
            grid = found[layout.parameters[parameter].name]
            for index in range(length):
                column = (phase + index) % row
                if not begin <= column < end:
                    continue
                seen.add(start + index)
                owner, element = element_of[start + index]
                block = (owner, block_of(grid, element))
                which = (column - begin) // width
                assert numel == sizes_of(grid)[block[1]]
                assert block[1] == first + which
                if phase + index == begin + which * width:
                    assert is_first == (element == first_element(grid, block[1]))
                assert slots.setdefault(slot + which, block) == block
                holders.setdefault(block, set()).add(rank)
                if cut >= 0:
                    assert cut_names.setdefault(cut + which, block) == block
        assert seen == set(element_of)
        assert set(slots) <= set(range(runs.num_slots))
    assert len(num_cuts) == 1
    shared = {block for block, ranks in holders.items() if len(ranks) > 1}
    assert shared <= set(cut_names.values())
    assert set(cut_names) <= set(range(num_cuts.pop()))


@given(layouts() | boxed() | sliced())
def test_spans_leave_padding_out(drawn: tuple[Layout, dict[str, BlockGrid]]) -> None:
    layout, _ = drawn
    for rank in range(layout.world_size):
        covered = [0] * layout.local_numel(rank)
        for start, length in held_spans(layout, rank):
            for index in range(start, start + length):
                covered[index] += 1
        assert max(covered, default=0) <= 1
        assert sum(covered) == sum(fragment.numel for fragment in layout.fragments(rank))


def test_the_digest_tells_layouts_apart() -> None:
    spec = ParameterSpec("a", (4, 3))
    layouts = [Replicated(spec), Replicated(spec, 2), SlicedParameters((spec,), 2), FlatPartition((spec,), (0,), 6, 2)]
    assert len({digest([layout]) for layout in layouts}) == len(layouts)
    assert digest(layouts) == digest(list(layouts))


def test_a_broken_layout_is_described() -> None:
    spec = ParameterSpec("a", (10,))
    assert "a: ranks hold 8 of 10 elements" in check(FlatPartition((spec,), (0,), 4, 2))


def test_a_grid_must_fill_its_axis() -> None:
    with pytest.raises(ValueError, match="cover 3 of 4 positions"):
        BlockGrid(1, 1, 4, 2, ((3, 1),))


def test_one_process_lays_out_llama2_7b_on_1024_ranks() -> None:
    """Shapes alone, no tensor, in seconds; the sums over all ranks are the model's."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from ds_optim.optimizers.adam_mini import adam_mini_blocks
    from ds_optim.roles import infer_roles

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=32))
    roles = infer_roles(model)
    specs = tuple(ParameterSpec(name, tuple(p.shape)) for name, p in model.named_parameters())
    found = {spec.name: adam_mini_blocks(roles[spec.name], spec.shape) for spec in specs}
    started = time.perf_counter()
    layout = SlicedParameters(specs, 1024)
    total = sum(fragment.numel for rank in range(1024) for fragment in layout.fragments(rank))
    runs = [block_runs(layout, rank, found) for rank in (0, 511, 1023)]
    assert total == sum(spec.numel for spec in specs) == 6_738_415_616
    assert len({run.num_cuts for run in runs}) == 1
    assert time.perf_counter() - started < 30
