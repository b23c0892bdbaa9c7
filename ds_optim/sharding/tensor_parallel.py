"""Who holds which elements where tensor or expert parallelism cuts parameters and ZeRO what is left of them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from ds_optim.sharding.boxes import Box, whole
from ds_optim.sharding.layout import Fragment, Layout, ParameterSpec, Share, one_behind_the_other


@dataclass(frozen=True)
class TensorParallel:
    """Local tensors of which each holds boxes of parameters, spread over data-parallel ranks: one on every
    tensor-parallel rank.

    A parameter that all of these have whole (a norm) is listed once for each, under the same name: what is kept for one
    copy, and the sums over its blocks, concern the ranks that have it.

    Attributes:
        whole: the parameters in the local tensors.
        boxes: of each of them, what every tensor-parallel rank has, as in `Boxed`; none where all have the whole.
        layouts: on every tensor-parallel rank: what its local tensor holds, parameters as if a rank's box were all.
        places: of every rank: its tensor-parallel rank, and its rank in that layout.
        axis: what a plan calls the former: ``tp``, or ``ep`` of stacks of experts.
    """

    whole: tuple[ParameterSpec, ...]
    boxes: tuple[tuple[tuple[Box, ...], ...], ...]
    layouts: tuple[Layout, ...]
    places: tuple[tuple[int, int], ...]
    axis: str = "tp"

    @cached_property
    def parameters(self) -> tuple[ParameterSpec, ...]:
        return tuple(self.whole[index] for index, _ in self._listed)

    @property
    def world_size(self) -> int:
        return len(self.places)

    @cached_property
    def _ranks(self) -> dict[tuple[int, int], int]:
        return {place: rank for rank, place in enumerate(self.places)}

    @cached_property
    def _listed(self) -> list[tuple[int, int]]:
        """Every parameter's index in the local tensors, and whose copy it is; -1: everyone's, in boxes."""
        copies = range(len(self.layouts))
        return [(i, copy) for i, boxes in enumerate(self.boxes) for copy in ((-1,) if boxes else copies)]

    def local_numel(self, rank: int) -> int:
        column, row = self.places[rank]
        return self.layouts[column].local_numel(row)

    def fragments(self, rank: int) -> list[Fragment]:
        column, row = self.places[rank]
        index = {inner: at for at, (inner, copy) in enumerate(self._listed) if copy in (-1, column)}
        found = list[Fragment]()
        for one in self.layouts[column].fragments(row):
            boxes, at = self.boxes[one.parameter], index[one.parameter]
            if not boxes:
                found.append(replace(one, parameter=at))
                continue
            before = sum(map(len, boxes[:column]))
            for part, (begin, box) in enumerate(one_behind_the_other(boxes[column]), before):
                low, high = max(one.start, begin), min(one.stop, begin + box.numel)
                if low < high:
                    found.append(Fragment(at, low - begin, high - begin, one.offset + low - one.start, part))
        return found

    def parts(self, parameter: int) -> Sequence[Box]:
        inner, _ = self._listed[parameter]
        return [box for of_column in self.boxes[inner] for box in of_column] or [whole(self.whole[inner].shape)]

    def shares(self, parameter: int) -> Sequence[Share]:
        inner, copy = self._listed[parameter]
        found = []
        for column in range(len(self.layouts)) if copy < 0 else (copy,):
            (edges, rows), *_ = self.layouts[column].shares(inner)
            has_any = self.layouts[column].parameters[inner].numel > 0
            ranks = [self._ranks[column, row] for row in (rows if has_any else (0,))]
            for begin, box in one_behind_the_other(self.boxes[inner][column]) if copy < 0 else [(0, None)]:
                end = begin + box.numel if box is not None else edges[-1]
                inside = [edge for edge in edges if begin < edge < end]
                first = bisect_right(edges, begin, hi=len(ranks)) - 1
                its = ranks[first : first + len(inside) + 1]
                found.append(Share([0, *(edge - begin for edge in inside), end - begin], its))
        return found
