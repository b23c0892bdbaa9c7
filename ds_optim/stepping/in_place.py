"""Elementwise and blockwise rules: every rank steps the elements that it holds, where they lie.

Elementwise rules need nobody; a blockwise rule's sums over blocks that a shard boundary cuts are added up over the
shard group. A whole-matrix rule has one of these for what is no matrix, whose state then has no room for matrices.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ds_optim import kernels
from ds_optim.kernels.rounding import key_of
from ds_optim.kernels.tables import table_of
from ds_optim.roles import warn_unclaimed
from ds_optim.roles.role import Role
from ds_optim.rule import Blockwise, Elementwise, Settings, StateSpec
from ds_optim.sharding.block_runs import BlockRuns, block_runs, held_spans
from ds_optim.sharding.blocks import BlockGrid
from ds_optim.sharding.layout import Layout
from ds_optim.stepping.kernel_calls import Call, TensorStretch, Walk, block_tables, places, run
from ds_optim.stepping.logical_tensors import Logical, block_ranges, element_ranges
from ds_optim.stepping.options import Options
from ds_optim.stepping.shards import Shards
from ds_optim.stepping.stepper import HeldState, ShapeRule, States, Together

_KEPT = 64  # lists of tensors whose tables are remembered: a training run has a few


class Covered(NamedTuple):
    """What is stepped of a local tensor.

    Attributes:
        spans: ``(start, length)``, ascending.
        is_whole: whether state has the tensor's shape; otherwise it has room for the spans alone, one behind the other.
    """

    spans: list[tuple[int, int]]
    is_whole: bool


class InPlace:
    """Steps of an elementwise or blockwise rule, see `ds_optim.stepping.stepper.Stepper`.

    Args:
        rule: whose.
        options: of the whole optimizer.
        shards: whose tensors.
        owner: the optimizer's name, for messages.
        covers: what is stepped of each tensor; None: all of it.
    """

    def __init__(
        self,
        rule: Elementwise | Blockwise,
        options: Options,
        shards: Shards,
        owner: str,
        covers: Callable[[Tensor], Covered] | None = None,
    ) -> None:
        self.rule, self.options, self.shards, self._owner, self._covers = rule, options, shards, owner, covers
        self.kept = HeldState()
        self._generation = shards.generation
        self._grids: dict[str, BlockGrid] = {}
        self._runs: dict[Tensor, BlockRuns] = {}
        self._walks: dict[tuple[int, ...], tuple[list[Tensor], Walk]] = {}  # the tensors too, or another gets their ids
        self._places: dict[tuple[int, ...], tuple[list[Tensor], kernels.Places]] = {}
        self._warned_of_bf16 = False

    def at_rank(self, rank: int) -> InPlace:
        """The same on another rank, of shards that are predicted."""
        other = InPlace(self.rule, self.options, self.shards.at_rank(rank), self._owner, self._covers)
        other._grids = self._grids
        return other

    # -- what follows from the shards -------------------------------------------------------------------------------

    def agreed(self) -> str:
        if isinstance(self.rule, Blockwise):
            for tensor in self.shards.tensors:
                self.runs_of(tensor)
        return ""

    def backends(self, device: torch.device) -> set[str]:
        return {kernels.backend_for(self.rule.formula, device)}

    def forget(self) -> None:
        """Drop what was derived from tensors and roles."""
        self._grids.clear()
        self._runs.clear()
        self._walks.clear()
        self._places.clear()

    def _follow(self) -> None:
        if self._generation != self.shards.generation:
            self._generation = self.shards.generation
            self.forget()

    def covered(self, tensor: Tensor) -> Covered:
        """What is stepped of a local tensor."""
        if self._covers is not None:
            return self._covers(tensor)
        bound = self.shards.of(tensor)
        return Covered(held_spans(bound.layout, bound.rank), is_whole=True)

    def grids_of(self, layout: Layout) -> dict[str, BlockGrid]:
        """The block grid of every parameter of a layout, by name."""
        assert isinstance(self.rule, Blockwise)
        self._follow()
        roles = self.shards.roles
        if not self._grids:
            shapes = self.shards.shapes
            its = {name: roles[name] for name in shapes}
            warn_unclaimed(its, shapes, _is_understood, "makes every output row of them a block")
        for spec in layout.parameters:
            if spec.name not in self._grids:
                self._grids[spec.name] = self.rule.blocks(roles[spec.name], spec.shape)
        return {spec.name: self._grids[spec.name] for spec in layout.parameters}

    def runs_of(self, tensor: Tensor) -> BlockRuns:
        """The blocks that this rank holds something of."""
        self._follow()
        if tensor not in self._runs:
            bound = self.shards.of(tensor)
            self._runs[tensor] = block_runs(bound.layout, bound.rank, self.grids_of(bound.layout))
        return self._runs[tensor]

    # -- state ------------------------------------------------------------------------------------------------------

    @property
    def element_state(self) -> tuple[str, ...]:
        return self.rule.element_state

    @property
    def element_keys(self) -> tuple[str, ...]:
        return self.rule.element_state

    def spec(self, tensor: Tensor) -> dict[str, StateSpec]:
        shape = tuple(tensor.shape)
        if self._covers is not None:
            covered = self.covered(tensor)
            shape = shape if covered.is_whole else (sum(length for _, length in covered.spans),)
        spec: dict[str, StateSpec] = dict.fromkeys(self.rule.element_state, (shape, self.options.state_dtype))
        for name in self.rule.block_state:
            spec[name] = ((self.runs_of(tensor).num_slots,), torch.float32)
        return spec

    def shape_rule(self, key: str) -> ShapeRule:
        return "element" if key in self.rule.element_state else "block"

    def logical_state(self, tensor: Tensor) -> list[dict[str, Logical]]:
        bound = self.shards.of(tensor)
        found: list[dict[str, Logical]] = [
            {key: Logical(spec.numel, self.options.state_dtype, held, held) for key in self.rule.element_state}
            for spec, held in zip(bound.layout.parameters, element_ranges(bound.layout, bound.rank), strict=True)
        ]
        if self.rule.block_state:
            blocks = block_ranges(bound.layout, bound.rank, self.grids_of(bound.layout), self.runs_of(tensor))
            for state, of_blocks in zip(found, blocks, strict=True):
                state.update(dict.fromkeys(self.rule.block_state, of_blocks))
        return found

    def blocks_in_words(self, tensor: Tensor) -> list[str]:
        layout = self.shards.of(tensor).layout
        if not self.rule.block_state:
            return [""] * len(layout.parameters)
        return [str(grid) for grid in self.grids_of(layout).values()]

    def structure(self) -> dict[str, Any]:
        return {"state_dtype": str(self.options.state_dtype).removeprefix("torch.")}

    def forget_past(self) -> None:
        """Nothing is remembered."""

    def workspace(self, device_type: str) -> list[tuple[int, int]]:
        return []

    def buffers(self) -> list[Tensor]:
        return [one for _, walk in self._walks.values() for one in kernels.kept_for(walk.tables)]

    # -- the step ---------------------------------------------------------------------------------------------------

    def prepare(
        self, together: Mapping[Together, list[Tensor]], groups: Mapping[int, dict[str, Any]], states: States
    ) -> list[Callable[[], None]]:
        self._follow()
        calls = [self._call(tensors, groups[key.group_id], key.step, states) for key, tensors in together.items()]
        return [partial(run, calls)]

    def _call(self, tensors: list[Tensor], group: Settings, step: int, states: States) -> Call:
        return Call(
            self.rule,
            tensors,
            [states[tensor] for tensor in tensors],
            self._walk(tensors),
            self.rule.scalars(group, step),
            self.shards.of(tensors[0]).group,
            self.rounding(tensors, step),
        )

    def _walk(self, tensors: list[Tensor]) -> Walk:
        key = tuple(map(id, tensors))
        if key not in self._walks:
            if len(self._walks) >= _KEPT:
                self._walks.clear()
            self._walks[key] = tensors, self._new_walk(tensors)
        return self._walks[key][1]

    def _new_walk(self, tensors: Sequence[Tensor]) -> Walk:
        if self.rule.block_state:
            return Walk(block_tables([self.runs_of(tensor) for tensor in tensors]), None)
        covered = [self.covered(tensor) for tensor in tensors]
        if self._covers is None:
            spans = [(index, *span) for index, one in enumerate(covered) for span in one.spans]
            return Walk(kernels.Tables(spans=table_of(spans, 3)), None)
        stretches = []
        for index, one in enumerate(covered):
            begin = 0
            for start, length in one.spans:
                stretches.append(TensorStretch(index, start, length, begin))
                begin += length
        spans = [(index, 0, stretch.length) for index, stretch in enumerate(stretches)]
        return Walk(kernels.Tables(spans=table_of(spans, 3)), stretches)

    def rounding(self, tensors: list[Tensor], step: int) -> kernels.Rounding | None:
        """How the bf16 ones among tensors are rounded at a step; None if all are rounded to nearest."""
        if torch.bfloat16 not in {tensor.dtype for tensor in tensors}:
            return None
        if not self.options.bf16_stochastic_round:
            if not self._warned_of_bf16:
                self._warned_of_bf16 = True
                warnings.warn(
                    f"{self._owner} steps parameters in bf16 that have no fp32 master copy: rounding to "
                    "nearest loses every update below 1/512 of a weight; set bf16_stochastic_round=True",
                    stacklevel=2,
                )
            return None
        together = tuple(map(id, tensors))
        if together not in self._places:
            if len(self._places) >= _KEPT + len(self.shards.tensors):  # whole-matrix rules ask for each tensor as well
                self._places.clear()
            self._places[together] = tensors, places(tensors, [self.shards.of(tensor) for tensor in tensors])
        return kernels.Rounding(key_of(self.options.seed, step), self._places[together][1])


def _is_understood(role: Role) -> bool:
    return role.is_understood
