r"""Warm start: what AdamW learned about the gradients becomes the state of another optimizer, so that a run goes on.

AdamW keeps two averages per element, of gradients (decay :math:`\beta_1`) and of their squares (:math:`\beta_2`), that
start at zero; :math:`\hat m` and :math:`\hat v` are what they estimate, bias-corrected at its step :math:`t`. Step
counts are kept, so every average :math:`a` of decay :math:`\beta` is stored as :math:`(1-\beta^t)\,\hat a`: the value
that the target corrects back to :math:`\hat a`. Where the betas are equal that is AdamW's tensor, bit for bit.

==========  =============================================================================================
target      state
==========  =============================================================================================
AdamW       ``exp_avg``, ``exp_avg_sq`` from m-hat and v-hat; so is every Adam inside the others
AdamMini    ``exp_avg`` from m-hat; ``exp_avg_sq`` of a block from the mean of v-hat over its elements
Lion        ``exp_avg`` from m-hat (Lion corrects no bias), shortened, see below
Adan        ``exp_avg`` from m-hat, shortened; ``exp_avg_diff`` zero; ``previous_grad`` m-hat, the best guess at it;
            ``exp_avg_sq`` from :math:`((1+\beta_2)^2 + \beta_2^2)\,\hat v`
SWAN        matrices have no state; embeddings, heads, norms and biases go on with their Adam
Shampoo     ``momentum`` from m-hat, ``graft`` from v-hat; factors from the diagonals that v-hat implies
==========  =============================================================================================

*Shortened*: an average with a longer memory than AdamW's would carry the noise of AdamW's last few gradients for all of
that memory. It starts as :math:`\hat m\,(1-\beta)/(1-\beta_1)` instead: the recent gradients at the weight that the
longer average gives them, the older ones, which nobody kept, at zero.

*Adan* averages squares of :math:`g_t + \beta_2 (g_t - g_{t-1})`, which are that much larger than :math:`g_t^2` where
gradients are mostly noise, as in training by mini-batches.

*Shampoo* judges by its step count that its factors have long been averaging. Empty ones would break that: the first
root, due within ``precondition_frequency`` steps, would be one of a few gradients, its scale wrong by the bias
correction. But :math:`\operatorname{diag}(G G^\top)` is the row sums of :math:`G^2`, and v-hat is the mean of
:math:`G^2`: the factors' diagonals are known. They start as these, off-diagonals at zero, and the scale is right from
the first step on. Every block stays on its graft, which is AdamW's own step, until its first refresh.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_optim.checkpoint import content
from ds_optim.checkpoint.adam_source import (
    FIRST,
    SECOND,
    AdamSource,
    CanonicalSource,
    Entry,
    Want,
    source_in,
    state_dict_source,
)
from ds_optim.checkpoint.save_load import load
from ds_optim.errors import raise_everywhere
from ds_optim.kernels.codes import BLOCK, Code, encode_rows
from ds_optim.ranks import ranks_of
from ds_optim.roles import canonical_name
from ds_optim.rule import AdamMoments, Blockwise, Elementwise
from ds_optim.sharding.binding import local_of
from ds_optim.sharding.blocks import BlockGrid
from ds_optim.sharding.boxes import Box, strides_of
from ds_optim.stepping.eight_bits import coded_keys
from ds_optim.stepping.in_place import InPlace
from ds_optim.stepping.logical_tensors import LogicalParameter, LogicalRange
from ds_optim.stepping.owned_blocks import OwnedBlocks
from ds_optim.stepping.owner_state import state_begins
from ds_optim.stepping.sharded import ShardedOptimizer

_BATCH_ELEMENTS = 1 << 24  # parameters are read together up to this size: what is needed beside the shards


# -- where blocks lie in a parameter ----------------------------------------------------------------------------------


def block_means(grid: BlockGrid, first: int, values: Tensor) -> Tensor:
    """Means (fp32) over whole blocks.

    Args:
        grid: of the parameter.
        first: the first block; block 0 of a batch if the grid has a ``reduce`` axis.
        values: the elements of the blocks, flat and row-major.
    """
    widths = torch.tensor([width for count, width in grid.runs for _ in range(count)], device=values.device)
    found = [torch.empty(0, dtype=torch.float64, device=values.device)]  # a rank may hold nothing of a parameter
    while values.numel():
        within = first % grid.blocks_per_batch
        skipped = int(widths[:within].sum())
        axis = min(grid.axis - skipped, values.numel() // (grid.reduce * grid.inner))
        count = int((widths[within:].cumsum(0) <= axis).sum())
        of_batch, values = values.split((n := grid.reduce * axis * grid.inner, values.numel() - n))
        per_position = of_batch.view(grid.reduce, axis, grid.inner).sum((0, 2), dtype=torch.float64)
        its_widths = widths[within : within + count]
        sums = torch.segment_reduce(per_position, "sum", lengths=its_widths)
        found.append(sums / (its_widths * (grid.reduce * grid.inner)))
        first += count
    return torch.cat(found).float()


def block_range(grid: BlockGrid, first: int, stop: int) -> tuple[int, int, int]:
    """The elements ``[start, end)`` that hold blocks ``[first, stop)``, and the first block that begins there."""
    per_batch = grid.blocks_per_batch
    if grid.reduce > 1:  # the elements of a block lie strewn over its batch
        first, stop = first // per_batch * per_batch, -(-stop // per_batch) * per_batch
    edges = [0]
    for count, width in grid.runs:
        edges += [edges[-1] + width * index for index in range(1, count + 1)]

    def begin(block: int) -> int:
        batch, within = divmod(block, per_batch)
        return (batch * grid.axis + edges[within]) * grid.reduce * grid.inner

    return begin(first), begin(stop), first


def box_runs(shape: Sequence[int], box: Box) -> Iterator[tuple[int, int]]:
    """The contiguous ranges of a parameter's elements that are a box, in the box's row-major order."""
    dim = len(shape)
    while dim and box.shape[dim - 1] == shape[dim - 1]:
        dim -= 1
    dim = max(dim - 1, 0)  # the last dimension that is cut still gives ranges
    strides = strides_of(shape)
    length = math.prod(box.shape[dim:])
    behind = sum(begin * stride for begin, stride in zip(box.start[dim:], strides[dim:], strict=True))
    for corner in product(*(range(a, b) for a, b in zip(box.start[:dim], box.stop[:dim], strict=True))):
        start = behind + sum(index * stride for index, stride in zip(corner, strides[:dim], strict=True))
        yield start, start + length


# A filler says what it needs of one parameter, is resumed when that was read, and fills the target's state.


@dataclass(frozen=True, slots=True)
class _Filling:
    """One parameter in the target: its ``index`` in the local tensor's layout, its group's settings, its source."""

    optimizer: ShardedOptimizer
    tensor: Tensor
    index: int
    one: LogicalParameter
    group: Mapping[str, Any]
    entry: Entry

    def fill(self) -> Iterator[list[Want]]:
        """What is wanted, once; then the state is filled."""
        rule, stepper = self.optimizer.rule, self.optimizer.stepper
        if isinstance(stepper, OwnedBlocks):
            is_block = not set(stepper.element_state) & set(self.one.state)
            return self._fill_owned(stepper) if is_block else self._fill_elements(stepper.rule.others)
        return self._fill_blocks(rule, stepper) if isinstance(rule, Blockwise) else self._fill_elements(stepper.rule)

    def _moments(self, first: Tensor, second: Tensor) -> AdamMoments:
        assert self.entry.step is not None
        return AdamMoments(first, second, self.entry.betas, self.entry.step)

    def _room(self, ranges: Sequence[LogicalRange]) -> tuple[Tensor, Tensor, list[Want]]:
        """Room for ranges of both moments, one behind the other, and the wish to have it filled."""
        numel = sum(stop - start for start, stop, _ in ranges)
        first, second = (torch.empty(numel, device=self.tensor.device) for _ in range(2))
        begins = list(accumulate((stop - start for start, stop, _ in ranges), initial=0))
        wants = [
            Want(self.one.name, key, start, room[begin : begin + stop - start])
            for key, room in ((FIRST, first), (SECOND, second))
            for (start, stop, _), begin in zip(ranges, begins, strict=False)
            if stop > start
        ]
        return first, second, wants

    def _put(self, key: str, ranges: Sequence[LogicalRange], values: Tensor) -> None:
        """Put values, one range behind the other, where the ranges lie in the target's state."""
        target = local_of(self.optimizer.state[self.tensor][key]).view(-1)
        begin = 0
        for start, stop, offset in ranges:
            target[offset : offset + stop - start] = values[begin : begin + stop - start]
            begin += stop - start

    def _held(self, rule: Elementwise | Blockwise) -> tuple[Sequence[LogicalRange], int]:
        """The elements that are here, and what the ends of what is read for them must be multiples of."""
        key = rule.element_state[0]
        codes = coded_keys(key).codes
        return (self.one.state[codes].read, BLOCK) if codes in self.one.state else (self.one.state[key].read, 1)

    def _keep(self, key: str, code: Code, its: LogicalRange, values: Tensor, start: int) -> None:
        """Put state per element where it is kept: one range of elements.

        Args:
            values: those from element ``start`` on; in eight bits, whole blocks of codes.
        """
        names, stop = coded_keys(key), its.stop - start
        if names.codes not in self.one.state:
            self._put(key, [its], values[its.start - start : stop])
            return
        begin = (its.start - start) // BLOCK * BLOCK  # others may hold the rest of the first block, and of the last
        codes, scales = encode_rows(values[None, begin : -(-stop // BLOCK) * BLOCK], code)
        self._put(names.codes, [its], codes[0, its.start - start - begin :])
        first, last = (start + begin) // BLOCK, (start + begin) // BLOCK + scales.shape[1]
        for of_blocks in self.one.state[names.scales].read:
            low, high = max(of_blocks.start, first), min(of_blocks.stop, last)
            if low < high:
                place = LogicalRange(low, high, of_blocks.offset + low - of_blocks.start)
                self._put(names.scales, [place], scales[0, low - first : high - first])

    def _fill_elements(self, rule: Elementwise | Blockwise) -> Iterator[list[Want]]:
        ranges, step = self._held(rule)
        numel = math.prod(self.one.shape)
        read = [LogicalRange(its.start // step * step, min(-(-its.stop // step) * step, numel), 0) for its in ranges]
        first, second, wants = self._room(read)
        yield wants
        found = rule.from_adam.state(self._moments(first, second), self.group)
        begin = 0
        for its, (start, stop, _) in zip(ranges, read, strict=True):
            for key, code in zip(rule.element_state, rule.codes, strict=True):
                self._keep(key, code, its, found[key][begin : begin + stop - start], start)
            begin += stop - start

    def _fill_blocks(self, rule: Blockwise, stepper: InPlace) -> Iterator[list[Want]]:
        """Elements from moments, blocks from their means over whole blocks, of which others may hold a part."""
        (elements, step), blocks = self._held(rule), self.one.state[rule.block_state[0]].read
        layout = stepper.shards.of(self.tensor).layout
        grid = stepper.grids_of(layout)[layout.parameters[self.index].name]
        first_block = min((its.start for its in blocks), default=0)
        last_block = max((its.stop for its in blocks), default=0)
        start, stop, first_block = block_range(grid, first_block, last_block)
        begin, end = start // step * step, min(-(-stop // step) * step, grid.numel)
        first, second, wants = self._room([LogicalRange(begin, end, 0)])
        yield wants
        for its in elements:
            low = its.start // step * step
            held = slice(low - begin, min(-(-its.stop // step) * step, grid.numel) - begin)
            found = rule.from_adam.state(self._moments(first[held], second[held]), self.group)
            for key, code in zip(rule.element_state, rule.codes, strict=True):
                self._keep(key, code, its, found[key], low)
        whole = slice(start - begin, stop - begin)
        means = self._moments(
            block_means(grid, first_block, first[whole]), block_means(grid, first_block, second[whole])
        )
        found = rule.from_adam.state(means, self.group)
        for its in blocks:
            for key in rule.block_state:
                self._put(key, [its], found[key][its.start - first_block :])

    def _fill_owned(self, stepper: OwnedBlocks) -> Iterator[list[Want]]:
        plan, _ = stepper.plans.place_of(self.tensor)
        owned = stepper.plans.owned(self.tensor)
        begins = state_begins(plan, owned, stepper.plans.state_of_block)
        rooms = {}
        for block in owned:
            if plan.blocks[block].parameter == self.index and begins[block]:
                box = plan.blocks[block].tile.box
                rooms[block] = self._room([LogicalRange(*ends, 0) for ends in box_runs(self.one.shape, box)])
        yield [want for _, _, wants in rooms.values() for want in wants]
        for block, (first, second, _) in rooms.items():
            shape = plan.blocks[block].tile.shape
            moments = self._moments(first.view(shape), second.view(shape))
            found = {key: one[None] for key, one in stepper.rule.from_adam.state(moments, self.group).items()}
            for key, values in stepper.coded.encoded(found, begins[block]).items():
                self._put(key, [LogicalRange(0, values.numel(), begins[block][key])], values.view(-1))


# -- the call ---------------------------------------------------------------------------------------------------------


def warm_start(
    source: str | os.PathLike[str] | Mapping[str, Any],
    model: Any,
    optimizer: Any = None,
    *,
    tag: str | None = None,
    names: Sequence[str] | None = None,
    weights: bool = False,
) -> None:
    """Give an optimizer the state that continues an AdamW run; what it had before is dropped.

    All ranks of the engine or model call it, as for `ds_optim.checkpoint.save`. Every parameter's step count is kept,
    settings stay the target's own. On any number of ranks, under any strategy: a rank reads what it needs of the
    source, and nobody else's.

    Args:
        source: a directory that `ds_optim.checkpoint.save` wrote for a `ds_optim.AdamW`; one that DeepSpeed's
            ``save_checkpoint`` wrote at ZeRO 1, 2 or 3, whoever's AdamW it was; or the ``state_dict()`` of a
            `torch.optim.AdamW` or `Adam` (on every rank, whole, on the CPU or the device).
        model: a DeepSpeed engine whose optimizer is one of ours, or a model.
        optimizer: of a plain model.
        tag: of a directory's checkpoint; unset, the one that ``latest`` names.
        names: of a state dict's parameters, in its order. Unset: its own (``param_names``); one group without names is
            taken to be in the order of ``model.named_parameters()``, frozen ones left out.
        weights: also load the weights, buffers, counters and learning-rate schedule of a directory of
            `ds_optim.checkpoint.save`, see `load`. Otherwise the model is left alone.

    Raises:
        CheckpointError: on every rank, before anything is changed: no Adam in the source, names, shapes or step counts
            that do not match (each is named), or a Shampoo without a graft.
    """
    ranks = ranks_of(model, optimizer)
    training, problems = content.training_state_of(model, optimizer, ranks)
    if training is not None and training.optimizer is None:
        problems = ["give the optimizer too: warm_start(source, model, optimizer)"]
    raise_everywhere(ranks, problems, "nothing can be started here")
    assert training is not None
    content.ask_others(training)
    assert training.optimizer is not None
    found: AdamSource
    if isinstance(source, Mapping):
        trained = {one.name for _, one in training.listed()}
        in_order = [name for name, _ in training.model.named_parameters() if canonical_name(name) in trained]
        found, problems = state_dict_source(source, names, in_order)
        raise_everywhere(ranks, problems, "this is not the state of an AdamW")
    else:
        found = source_in(ranks, Path(source), tag)
    if weights and not isinstance(found, CanonicalSource):
        problems.append("weights=True needs a directory of ds_optim.checkpoint.save: load others as usual before")
    raise_everywhere(
        ranks, problems + _misfits(training, found.entries), "this AdamW's state does not fit, nothing was changed"
    )
    if weights:
        assert not isinstance(source, Mapping)
        load(source, model, optimizer, tag=tag, load_optimizer_states=False)
    _fill(training, found)
    training.optimizer.stepper.forget_past()


def _fill(training: content.TrainingState, source: AdamSource) -> None:
    """Make the state of every parameter from the source, batch by batch: all ranks read together."""
    batches = list(_batches(training, source.entries))
    everyones = max(training.ranks.everyones(len(batches)).values())
    for batch in [*batches, *[[]] * (everyones - len(batches))]:
        fillers = [one.fill() for one in batch]
        source.read([want for filler in fillers for want in next(filler)])
        for filler in fillers:
            next(filler, None)


def _misfits(training: content.TrainingState, entries: Mapping[str, Entry]) -> list[str]:
    """Every reason why the moments are not those of these parameters, as sentences."""
    optimizer, problems = training.optimizer, list[str]()
    assert optimizer is not None
    reason = optimizer.rule.from_adam.problem(optimizer.defaults)
    if reason:
        problems.append(reason)
    for parameters in training.parameters.values():
        steps: dict[int, str] = {}
        for one in parameters:
            entry = entries.get(one.name)
            if entry is None:
                problems.append(f"{one.name} is not in the source")
            elif entry.step is not None:
                steps.setdefault(entry.step, one.name)
                if entry.shape != one.shape:
                    problems.append(f"{one.name} has shape {entry.shape} in the source, {one.shape} here")
        if len(steps) > 1:
            listed = ", ".join(f"{name} {step}" for step, name in steps.items())
            problems.append(f"these are stepped together here and took different numbers of steps: {listed}")
    here = {one.name for _, one in training.listed()} | set(training.untrained) | set(training.elsewhere)
    return [*problems, *(f"the source has {name}, which is not here" for name in entries if name not in here)]


def _batches(training: content.TrainingState, entries: Mapping[str, Entry]) -> Iterator[list[_Filling]]:
    """Parameters to be read together, alike on every rank; their tensors' state is made first, zero at AdamW's step."""
    optimizer, indices = training.optimizer, content.group_indices(training)
    assert optimizer is not None
    batch, size = list[_Filling](), 0
    for tensor, parameters in training.parameters.items():
        optimizer.state.pop(tensor, None)
        steps = {entries[one.name].step for one in parameters} - {None}
        if not steps:
            continue
        optimizer.state_of(tensor)["step"].fill_(steps.pop())
        group = optimizer.param_groups[indices[tensor]]
        for index, one in enumerate(parameters):
            entry = entries[one.name]
            if entry.step is None:  # never used: its gradients were zero
                continue
            if batch and size + math.prod(one.shape) > _BATCH_ELEMENTS:
                yield batch
                batch, size = [], 0
            batch.append(_Filling(optimizer, tensor, index, one, group, entry))
            size += math.prod(one.shape)
    if batch:
        yield batch
