"""Boxes are arithmetic: rectangles, positions and grids are what indexing a real tensor of element numbers gives.

Also: of which true matrices a stacked or fused weight is made, which decides the boxes that exist at all.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ds_optim.optimizers.matrix_roles import is_matrix, is_preconditioned, true_matrices
from ds_optim.roles import resolve_roles
from ds_optim.roles.role import Part, Role
from ds_optim.sharding.boxes import Box, Rectangle, elements_before, placed, stretches, strides_of, tiles

SHAPES = st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple)


@st.composite
def shapes_and_boxes(draw: st.DrawFn) -> tuple[tuple[int, ...], Box]:
    shape = draw(SHAPES)
    ranges = [sorted((draw(st.integers(0, size - 1)), draw(st.integers(1, size)))) for size in shape]
    return shape, Box(tuple(start for start, _ in ranges), tuple(max(stop, start + 1) for start, stop in ranges))


def rectangles(shape: tuple[int, ...], box: Box, start: int, stop: int) -> list[Rectangle]:
    """What a box has in a range of the parameter."""
    low, high = elements_before(shape, box, np.array([start, stop])).tolist()
    return placed(shape, box, low, high)


def numbered(shape: tuple[int, ...]) -> Tensor:
    """A parameter whose elements are their own row-major positions."""
    return torch.arange(math.prod(shape)).view(shape)


def taken(shape: tuple[int, ...], box: Box) -> Tensor:
    """The positions of a box's elements, in the box's row-major order: by slicing."""
    slices = tuple(slice(start, stop) for start, stop in zip(box.start, box.stop, strict=True))
    return numbered(shape)[slices].flatten()


@given(shapes_and_boxes(), st.data())
def test_rectangles_reach_what_a_box_has_in_a_range_in_the_boxs_order(
    drawn: tuple[tuple[int, ...], Box], data: st.DataObject
) -> None:
    shape, box = drawn
    numel = math.prod(shape)
    start, stop = sorted((data.draw(st.integers(0, numel)), data.draw(st.integers(0, numel))))
    found = rectangles(shape, box, start, stop)
    flat = numbered(shape).flatten()
    reached = [flat.as_strided(one.shape, strides_of(shape), one.offset).flatten() for one in found]
    inside = taken(shape, box)
    wanted = inside[(inside >= start) & (inside < stop)]
    assert torch.equal(torch.cat([*reached, wanted[:0]]), wanted)
    assert [one.numel for one in found] == [len(part) for part in reached]
    assert all(one.numel for one in found)
    assert len(found) <= 2 * len(shape) - 1  # a head and a tail per dimension but the last, and a body


@given(shapes_and_boxes())
def test_elements_before_a_position_are_counted_as_slicing_counts_them(drawn: tuple[tuple[int, ...], Box]) -> None:
    shape, box = drawn
    positions = np.arange(math.prod(shape) + 1)
    inside = taken(shape, box)
    assert elements_before(shape, box, positions).tolist() == [int((inside < p).sum()) for p in positions]


@given(shapes_and_boxes(), st.data())
def test_a_range_of_a_boxs_own_order_is_found_in_the_parameter(
    drawn: tuple[tuple[int, ...], Box], data: st.DataObject
) -> None:
    shape, box = drawn
    inside = taken(shape, box)
    start, stop = sorted((data.draw(st.integers(0, len(inside))), data.draw(st.integers(0, len(inside)))))
    flat = numbered(shape).flatten()
    reached = [flat.as_strided(o.shape, strides_of(shape), o.offset).flatten() for o in placed(shape, box, start, stop)]
    assert torch.equal(torch.cat([*reached, inside[:0]]), inside[start:stop])
    ranges = list(stretches(shape, box, start, stop))
    assert [element for low, high in ranges for element in range(low, high)] == inside[start:stop].tolist()
    assert all(end < begin for (_, end), (begin, _) in pairwise(ranges)), "neighbours are one range"


@given(shapes_and_boxes())
def test_a_range_of_the_parameter_is_a_range_of_the_box(drawn: tuple[tuple[int, ...], Box]) -> None:
    """What the exchange relies on: cuts of the parameter cut a box's own order into consecutive stretches."""
    shape, box = drawn
    numel = math.prod(shape)
    inside = taken(shape, box)
    for cut in range(numel + 1):
        before = int(elements_before(shape, box, np.array([cut]))[0])
        assert torch.equal(inside[:before], inside[inside < cut])
        assert sum(one.numel for one in rectangles(shape, box, 0, cut)) == before


@given(shapes_and_boxes(), st.data())
def test_tiles_cover_a_box_once_with_full_tiles_first(drawn: tuple[tuple[int, ...], Box], data: st.DataObject) -> None:
    shape, box = drawn
    largest = [data.draw(st.integers(1, 7)) for _ in shape]
    found = tiles(box, largest)
    covered = torch.zeros(math.prod(shape), dtype=torch.int64)
    for tile in found:
        covered[taken(shape, tile)] += 1
        for dim, most in enumerate(largest):
            assert (tile.start[dim] - box.start[dim]) % most == 0, "a tile begins off the grid"
            assert tile.shape[dim] == most or tile.stop[dim] == box.stop[dim]
            assert tile.shape[dim] <= most
    wanted = torch.zeros_like(covered)
    wanted[taken(shape, box)] = 1
    assert torch.equal(covered, wanted)
    assert [tile.start for tile in found] == sorted(tile.start for tile in found)  # row-major


def test_shapes_and_sizes_of_boxes() -> None:
    box = Box((1, 0, 2), (3, 4, 3))
    assert box.shape == (2, 4, 1)
    assert box.numel == 8
    assert strides_of((2, 3, 4)) == (12, 4, 1)


# -- true matrices -----------------------------------------------------------------------------------------------------


def test_stacked_experts_are_one_box_each() -> None:
    found = true_matrices(Role("mlp", output_dim=1, batch_dims=1), (3, 4, 5))
    assert found == [Box((expert, 0, 0), (expert + 1, 4, 5)) for expert in range(3)]
    two_deep = true_matrices(Role("mlp", output_dim=2, batch_dims=2), (2, 3, 4, 5))
    assert [box.start[:2] for box in two_deep] == [(i, j) for i in range(2) for j in range(3)]
    assert {box.shape for box in two_deep} == {(1, 1, 4, 5)}


@pytest.mark.parametrize("output_dim", [0, 1])
def test_a_fused_weight_has_one_box_per_part(output_dim: int) -> None:
    parts = (Part("query", 8), Part("key", 2), Part("value", 2))
    shape = (12, 5) if output_dim == 0 else (5, 12)
    found = true_matrices(Role("fused", output_dim=output_dim, parts=parts), shape)
    assert [(box.start[output_dim], box.stop[output_dim]) for box in found] == [(0, 8), (8, 10), (10, 12)]
    assert all((box.start[1 - output_dim], box.stop[1 - output_dim]) == (0, 5) for box in found)


def test_fused_experts_have_a_box_per_expert_and_part() -> None:
    role = Role("fused", output_dim=1, batch_dims=1, parts=(Part("mlp", 4), Part("mlp", 6)))
    found = true_matrices(role, (2, 10, 3))
    assert [(box.start, box.stop) for box in found] == [
        ((0, 0, 0), (1, 4, 3)),
        ((0, 4, 0), (1, 10, 3)),
        ((1, 0, 0), (2, 4, 3)),
        ((1, 4, 0), (2, 10, 3)),
    ]


def test_a_stated_role_makes_a_fused_weight_one_matrix_or_one_per_head() -> None:
    shapes = {"attn.qkv.weight": (12, 6)}

    def rows(stated: object) -> list[tuple[int, int]]:
        role = resolve_roles({"*.qkv.weight": stated}, shapes)["attn.qkv.weight"]
        return [(box.start[0], box.stop[0]) for box in true_matrices(role, (12, 6))]

    assert rows("linear") == [(0, 12)]
    assert rows({"parts": [["query", 4], ["key", 4], ["value", 4]]}) == [(0, 4), (4, 8), (8, 12)]
    per_head = {"parts": [["query", 2]] * 2 + [["key", 2]] * 2 + [["value", 2]] * 2}
    assert rows(per_head) == [(start, start + 2) for start in range(0, 12, 2)]


def test_a_weight_without_stack_or_parts_is_one_matrix() -> None:
    for kind in ("linear", "query", "fused", "other", "conv"):
        assert true_matrices(Role(kind), (4, 6)) == [Box((0, 0), (4, 6))]  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["embedding", "head", "norm", "bias"])
def test_what_adam_steps_is_never_a_matrix(kind: str) -> None:
    assert not is_preconditioned(Role(kind), (4, 6))  # type: ignore[arg-type]
    assert not is_matrix(Role(kind), (4, 6))  # type: ignore[arg-type]


def test_a_matrix_is_longer_than_one_along_two_dimensions_behind_its_stack() -> None:
    assert is_matrix(Role("linear"), (4, 6))
    assert not is_matrix(Role("linear"), (4,))
    assert not is_matrix(Role("linear"), (4, 1))
    assert is_matrix(Role("linear"), (4, 1, 6))
    assert not is_matrix(Role("mlp", output_dim=1, batch_dims=1), (3, 1, 6))
    assert not is_matrix(Role("linear"), ())
    assert not is_matrix(Role("linear"), (0, 6))
    assert is_preconditioned(Role("other"), (4,))  # Shampoo takes vectors that are neither norm nor bias
    assert not is_preconditioned(Role("other"), ())
    assert not is_preconditioned(Role("linear"), (0, 6))
