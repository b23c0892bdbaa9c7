"""Layouts and runs are arithmetic: whatever shapes, ranks and blocks, every element is held and summed exactly once."""

from __future__ import annotations

import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ds_optim.sharding.block_runs import block_runs, held_spans
from ds_optim.sharding.blocks import BlockGrid
from ds_optim.sharding.layout import FlatPartition, Layout, ParameterSpec, Replicated, SlicedParameters, check, digest


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


@given(layouts())
def test_a_layout_holds_every_element_once(drawn: tuple[Layout, dict[str, BlockGrid]]) -> None:
    layout, _ = drawn
    assert check(layout) == []
    for parameter in range(len(layout.parameters)):
        ends = sorted(
            fragment.stop
            for rank in range(layout.world_size)
            for fragment in layout.fragments(rank)
            if fragment.parameter == parameter
        )
        assert layout.cuts(parameter) == ends[:-1]


@given(layouts())
def test_runs_name_every_block_element_by_element(drawn: tuple[Layout, dict[str, BlockGrid]]) -> None:
    """Walk the tables as a kernel would and compare with the definition of a block."""
    layout, found = drawn
    holders: dict[tuple[int, int], set[int]] = {}
    cut_names: dict[int, tuple[int, int]] = {}
    num_cuts = set()
    for rank in range(layout.world_size):
        runs = block_runs(layout, rank, found)
        num_cuts.add(runs.num_cuts)
        element_of = {}
        for fragment in layout.fragments(rank):
            for index in range(fragment.numel):
                element_of[fragment.offset + index] = (fragment.parameter, fragment.start + index)
        slots: dict[int, tuple[int, int]] = {}
        seen = set()
        for start, length, phase, width, slot, cut_first, cut_last, parameter in runs.rows:
            blocks = (phase + length - 1) // width
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
        for start, length, phase, row, begin, end, width, slot, cut, block_numel, parameter in runs.columns:
            grid = found[layout.parameters[parameter].name]
            for index in range(length):
                column = (phase + index) % row
                if not begin <= column < end:
                    continue
                seen.add(start + index)
                owner, element = element_of[start + index]
                block = (owner, block_of(grid, element))
                which = (column - begin) // width
                assert block_numel == grid.reduce * width
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


@given(layouts())
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
