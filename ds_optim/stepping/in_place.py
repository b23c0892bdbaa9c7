"""Elementwise and blockwise rules: every rank steps the elements that it holds, where they lie.

Elementwise rules need nobody; a blockwise rule's sums over blocks that a shard boundary cuts are added up over the
shard group. A whole-matrix rule has one of these for what is no matrix, whose state then has no room for matrices.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from ds_optim import kernels
from ds_optim.kernels.rounding import key_of
from ds_optim.kernels.tables import table_of
from ds_optim.roles import warn_unclaimed
from ds_optim.roles.role import Role
from ds_optim.rule import Blockwise, Elementwise, Settings, StateSpec
from ds_optim.sharding.binding import BoundTensor, local_of
from ds_optim.sharding.block_runs import BlockRuns, block_runs, held_spans
from ds_optim.sharding.blocks import BlockGrid
from ds_optim.sharding.layout import Layout
from ds_optim.stepping.eight_bits import EIGHT_BITS, CodedBlocks, code_grid, coded_among, coded_keys, plain_dtype
from ds_optim.stepping.kernel_calls import Call, Stretches, Walk, block_tables, places, run
from ds_optim.stepping.logical_tensors import Logical, block_ranges, element_ranges, packed
from ds_optim.stepping.options import Options
from ds_optim.stepping.shards import Shards
from ds_optim.stepping.stepper import HeldState, ShapeRule, States, Together

_KEPT = 64  # lists of tensors whose tables are remembered: a training run has a few


class KeptPart(NamedTuple):
    """What is stepped of a local tensor whose state is kept in one way.

    Attributes:
        parameters: of the layout, by index.
        spans: ``(start, length)``, ascending.
        is_whole: whether state has the tensor's shape; otherwise it has room for the spans alone, one behind the other.
        codes: the blocks of codes of which something is here; None: state is kept as it is.
    """

    parameters: frozenset[int]
    spans: list[tuple[int, int]]
    is_whole: bool
    codes: BlockRuns | None


class InPlace:
    """Steps of an elementwise or blockwise rule, see `ds_optim.stepping.stepper.Stepper`.

    Args:
        rule: whose.
        options: of the whole optimizer.
        shards: whose tensors.
        owner: the optimizer's name, for messages.
        left_out: the parameters of each tensor that somebody else steps, by their index in its layout; None: none are.
    """

    def __init__(
        self,
        rule: Elementwise | Blockwise,
        options: Options,
        shards: Shards,
        owner: str,
        left_out: Callable[[Tensor], Set[int]] | None = None,
    ) -> None:
        self.rule, self.options, self.shards, self._owner, self._left_out = rule, options, shards, owner, left_out
        self.kept = HeldState(CodedBlocks.of(rule))
        self._is_coded = options.state_dtype == EIGHT_BITS
        self._generation = shards.generation
        self._grids: dict[str, BlockGrid] = {}
        self._runs: dict[Tensor, BlockRuns] = {}
        self._parts: dict[Tensor, list[KeptPart]] = {}
        self._walks: dict[tuple[int, ...], tuple[list[Tensor], list[Walk]]] = {}  # tensors too, or others get their ids
        self._places: dict[tuple[int, ...], tuple[list[Tensor], kernels.Places]] = {}
        self._warned_of_bf16 = False
        self._warned_of = -1  # the generation whose guesses were told of

    def at_rank(self, rank: int) -> InPlace:
        """The same on another rank, of shards that are predicted."""
        other = InPlace(self.rule, self.options, self.shards.at_rank(rank), self._owner, self._left_out)
        other._grids, other._warned_of = self._grids, self._warned_of
        return other

    # -- what follows from the shards -------------------------------------------------------------------------------

    def agreed(self) -> dict[dist.ProcessGroup | None, str]:
        if isinstance(self.rule, Blockwise):
            for tensor in self.shards.tensors:
                self.runs_of(tensor)
        if self._is_coded:
            for tensor in self.shards.tensors:
                self.parts_of(tensor)
        return {}

    def backends(self, device: torch.device) -> set[str]:
        formulas = [self.rule.formula, *([self.rule.coded_formula] if self._is_coded else [])]
        return {kernels.backend_for(formula, device) for formula in formulas}

    def forget(self) -> None:
        """Drop what was derived from tensors and roles."""
        self._grids.clear()
        self._runs.clear()
        self._parts.clear()
        self._walks.clear()
        self._places.clear()

    def _follow(self) -> None:
        if self._generation != self.shards.generation:
            self._generation = self.shards.generation
            self.forget()

    def parts_of(self, tensor: Tensor) -> list[KeptPart]:
        """What is stepped of a local tensor: what is kept as it is, and what is in eight bits, where there is any."""
        self._follow()
        if tensor not in self._parts:
            specs, left_out = self.shards.parameters_of(tensor), self._left_out or _of_nobody
            coded = frozenset[int]()
            if self._is_coded:  # nothing else here needs roles
                coded = coded_among(self.options, self.shards.roles, specs)
                if self._warned_of != self._generation:
                    self._warned_of = self._generation
                    _warn_of_guesses(self.options, self.shards, left_out)
            everything = frozenset(range(len(specs))) - left_out(tensor)
            found = [(everything - coded, False), (everything & coded, True)]
            has_room = self._left_out is None and not self._is_coded
            self._parts[tensor] = [
                _part(tensor, self.shards.of(tensor), parameters, has_room=has_room, in_codes=codes)
                for parameters, codes in found
                if parameters or not (coded or codes)
            ]
        return self._parts[tensor]

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
        codes = [coded_keys(key).codes for key in self.rule.element_state] if self._is_coded else []
        return (*self.rule.element_state, *codes)

    @property
    def element_keys(self) -> tuple[str, ...]:
        return () if self._is_coded else self.rule.element_state  # what is in eight bits is elsewhere

    @property
    def keys(self) -> tuple[str, ...]:
        """Of all that is kept."""
        scales = [coded_keys(key).scales for key in self.rule.element_state] if self._is_coded else []
        return (*self.element_state, *scales, *self.rule.block_state)

    def spec(self, tensor: Tensor) -> dict[str, StateSpec]:
        spec: dict[str, StateSpec] = {}
        for part in self.parts_of(tensor):
            shape = tuple(tensor.shape) if part.is_whole else (sum(length for _, length in part.spans),)
            for key in self.rule.element_state:
                if part.codes is None:
                    spec[key] = shape, plain_dtype(self.options)
                else:
                    spec[coded_keys(key).codes] = shape, torch.uint8
                    spec[coded_keys(key).scales] = (part.codes.num_slots,), torch.float32
        for name in self.rule.block_state:
            spec[name] = ((self.runs_of(tensor).num_slots,), torch.float32)
        return spec

    def shape_rule(self, key: str) -> ShapeRule:
        return "element" if key in self.element_state else "block"

    def logical_state(self, tensor: Tensor) -> list[dict[str, Logical]]:
        bound = self.shards.of(tensor)
        layout, held = bound.layout, element_ranges(bound.layout, bound.rank)
        found: list[dict[str, Logical]] = [{} for _ in layout.parameters]
        for part in self.parts_of(tensor):
            its = [pieces if index in part.parameters else [] for index, pieces in enumerate(held)]
            pieces_of = its if part.is_whole else packed(its)
            scales = []
            if part.codes is not None:
                grids = {layout.parameters[i].name: code_grid(layout.parameters[i].numel) for i in part.parameters}
                scales = block_ranges(layout, bound.rank, grids, part.codes)
            for index in part.parameters:
                numel, pieces = layout.parameters[index].numel, pieces_of[index]
                for key in self.rule.element_state:
                    if part.codes is None:
                        found[index][key] = Logical(numel, plain_dtype(self.options), pieces, pieces)
                    else:
                        found[index][coded_keys(key).codes] = Logical(numel, torch.uint8, pieces, pieces)
                        found[index][coded_keys(key).scales] = scales[index]
        if self.rule.block_state:
            blocks = block_ranges(layout, bound.rank, self.grids_of(layout), self.runs_of(tensor))
            for state, of_blocks in zip(found, blocks, strict=True):
                state.update(dict.fromkeys(self.rule.block_state, of_blocks))
        return found

    def blocks_in_words(self, tensor: Tensor) -> list[str]:
        layout = self.shards.of(tensor).layout
        if not self.rule.block_state:
            return [""] * len(layout.parameters)
        grids = self.grids_of(layout)
        return [str(grids[spec.name]) for spec in layout.parameters]

    def structure(self) -> dict[str, Any]:
        found: dict[str, Any] = {"state_dtype": str(self.options.state_dtype).removeprefix("torch.")}
        return {**found, "int8_embeddings": self.options.int8_embeddings} if self._is_coded else found

    def forget_past(self) -> None:
        """Nothing is remembered."""

    def workspace(self, device_type: str) -> list[tuple[int, int]]:
        return []

    def buffers(self) -> list[Tensor]:
        return [one for _, walks in self._walks.values() for walk in walks for one in kernels.kept_for(walk.tables)]

    # -- the step ---------------------------------------------------------------------------------------------------

    def prepare(
        self, together: Mapping[Together, list[Tensor]], groups: Mapping[int, dict[str, Any]], states: States
    ) -> list[Callable[[], None]]:
        self._follow()
        calls = [
            call
            for key, tensors in together.items()
            for call in self._calls(tensors, groups[key.group_id], key, states)
        ]
        return [partial(run, calls)]

    def _calls(self, tensors: list[Tensor], group: Settings, key: Together, states: States) -> list[Call]:
        scalars, ranks = self.rule.scalars(group, key.step), self.shards.of(tensors[0]).group
        calls = []
        for walk in self._walks_of(tensors):
            its = tensors if len(walk.members) == len(tensors) else [tensors[index] for index in walk.members]
            of_tensors = [states[tensor] for tensor in its]
            calls.append(Call(self.rule, its, of_tensors, walk, scalars, ranks, self.rounding(its, key.step)))
        return calls

    def _walks_of(self, tensors: list[Tensor]) -> list[Walk]:
        key = tuple(map(id, tensors))
        if key not in self._walks:
            if len(self._walks) >= _KEPT:
                self._walks.clear()
            self._walks[key] = tensors, [walk for coded in (False, True) if (walk := self._walk(tensors, coded))]
        return self._walks[key][1]

    def _walk(self, tensors: Sequence[Tensor], coded: bool) -> Walk | None:
        """What is walked of those tensors that have something that is kept in eight bits, or something that is not."""
        parts = {
            index: part
            for index, tensor in enumerate(tensors)
            for part in self.parts_of(tensor)
            if (part.codes is not None) == coded
        }
        if not parts:
            return None
        listed, sizes = list(parts.values()), [local_of(tensors[index]).numel() for index in parts]
        # State that has a tensor's shape may have elements, padding, that no table covers.
        covered = [[(0, size)] if one.is_whole else one.spans for one, size in zip(listed, sizes, strict=True)]
        stretches = Stretches(covered, has_all=all(part.is_whole for part in listed))
        tables = kernels.Tables()
        if self.rule.block_state:
            runs = [self.runs_of(tensors[index]).of(part.parameters) for index, part in parts.items()]
            tables = block_tables(runs, stretches)
        elif not coded:
            spans = [(place, *span) for place, part in enumerate(listed) for span in part.spans]
            tables = kernels.Tables(spans=table_of([stretches.moved(row) for row in spans], 3))
        if coded:
            codes = block_tables([part.codes for part in listed if part.codes is not None], stretches)
            tables = replace(tables, code_runs=codes.row_runs, num_code_cuts=codes.num_cuts)
        return Walk(list(parts), tables, stretches.listed, coded)

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


def _of_nobody(_: Tensor) -> Set[int]:
    """The parameters that are left out where none are."""
    return frozenset()


def _warn_of_guesses(options: Options, shards: Shards, left_out: Callable[[Tensor], Set[int]]) -> None:
    """One warning that names what is kept in eight bits for want of a role: a norm or an embedding, perhaps."""
    roles, its = shards.roles, dict[str, Role]()
    for tensor in shards.tensors:
        specs = shards.parameters_of(tensor)
        names = [specs[index].name for index in sorted(coded_among(options, roles, specs) - left_out(tensor))]
        its.update({name: roles[name] for name in names})
    consequence = "keeps their state in eight bits, as if none were an embedding, a norm or a bias"
    warn_unclaimed(its, shards.shapes, lambda role: role.kind != "other", consequence, vectors=True)


def _part(
    tensor: Tensor, bound: BoundTensor, parameters: frozenset[int], *, has_room: bool, in_codes: bool
) -> KeptPart:
    """The part of a tensor that some parameters are.

    Args:
        has_room: whether state has room for all of the tensor, padding too.
    """
    layout = bound.layout
    others = frozenset(range(len(layout.parameters))) - parameters
    spans = held_spans(layout, bound.rank, others)
    is_all = not others if isinstance(tensor, DTensor) else sum(length for _, length in spans) == tensor.numel()
    codes = None
    if in_codes:
        grids = {layout.parameters[index].name: code_grid(layout.parameters[index].numel) for index in parameters}
        try:
            codes = block_runs(layout, bound.rank, grids)
        except ValueError as error:
            raise ValueError(
                f"{error.args[0].partition(':')[0]}: neighbouring elements, which share a scale in eight bits, lie on "
                'several ranks: set state_dtype="fp32", or cut it along dimension 0 alone'
            ) from None
    return KeptPart(parameters, spans, has_room or is_all, codes)


def _is_understood(role: Role) -> bool:
    return role.is_understood
