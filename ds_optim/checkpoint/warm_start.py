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
from ds_optim.optimizers.adam_mini import AdamMini
from ds_optim.optimizers.adan import Adan
from ds_optim.optimizers.lion import Lion
from ds_optim.optimizers.logical import LogicalParameter, Piece
from ds_optim.optimizers.owner_state import state_begins
from ds_optim.optimizers.shampoo import Shampoo
from ds_optim.optimizers.sharded import ShardedOptimizer
from ds_optim.optimizers.whole_matrix import WholeMatrixOptimizer
from ds_optim.ranks import ranks_of
from ds_optim.roles import canonical_name
from ds_optim.sharding.binding import local_of
from ds_optim.sharding.blocks import BlockGrid
from ds_optim.sharding.boxes import Box, strides_of

_BATCH_ELEMENTS = 1 << 24  # parameters are read together up to this size: what is needed beside the shards


# -- the mapping ------------------------------------------------------------------------------------------------------


def _debiased(average: Tensor, old: float, new: float, step: int) -> Tensor:
    """An average of decay ``old`` as one of decay ``new`` after as many steps that estimates the same."""
    return average if old == new else average * ((1 - new**step) / (1 - old**step))


def _shortened(old: float, new: float) -> float:
    """The weight of the gradients that an average of decay ``old`` remembers in one of decay ``new``."""
    return min(1.0, (1 - new) / (1 - old))


def _betas(optimizer: ShardedOptimizer, group: Mapping[str, Any]) -> tuple[float, float]:
    """Of the target's Adam: in Shampoo the second is the graft's."""
    constants = optimizer.scalars(dict(group), 1)
    return constants["beta1"], constants["beta2"]


def element_state(
    optimizer: ShardedOptimizer, group: Mapping[str, Any], entry: Entry, first: Tensor, second: Tensor
) -> dict[str, Tensor]:
    """What a target keeps per element, from AdamW's moments (fp32, any shape) of the same elements.

    Args:
        group: the target's settings.
        entry: AdamW's step count and betas.
    """
    (old1, old2), step = entry.betas, entry.step
    assert step is not None
    if isinstance(optimizer, Lion):
        beta = group["betas"][1]
        return {FIRST: first * (_shortened(old1, beta) / (1 - old1**step))}
    if isinstance(optimizer, Adan):
        beta1, beta2, beta3 = group["betas"]
        noise = (1 + beta2) ** 2 + beta2**2
        return {
            FIRST: _debiased(first, old1, beta1, step) * _shortened(old1, beta1),
            SECOND: _debiased(second, old2, beta3, step) * noise,
            "exp_avg_diff": torch.zeros_like(first),
            "previous_grad": first / (1 - old1**step),
        }
    beta1, beta2 = _betas(optimizer, group)
    return {FIRST: _debiased(first, old1, beta1, step), SECOND: _debiased(second, old2, beta2, step)}


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
class _Place:
    """One parameter in the target: its ``index`` in the local tensor's layout, its group's settings, its source."""

    optimizer: ShardedOptimizer
    tensor: Tensor
    index: int
    one: LogicalParameter
    group: Mapping[str, Any]
    entry: Entry

    def fill(self) -> Iterator[list[Want]]:
        if isinstance(self.optimizer, WholeMatrixOptimizer) and FIRST not in self.one.state:
            return self._fill_blocks(self.optimizer) if isinstance(self.optimizer, Shampoo) else iter(([],))
        return self._fill_mini(self.optimizer) if isinstance(self.optimizer, AdamMini) else self._fill_elements()

    def _moment(self, key: str, pieces: Sequence[Piece]) -> tuple[Tensor, list[Want]]:
        """Room for ranges of a moment, one behind the other, and the wish to have it filled."""
        room = torch.empty(sum(stop - start for start, stop, _ in pieces), device=self.tensor.device)
        begins = accumulate((stop - start for start, stop, _ in pieces), initial=0)
        return room, [
            Want(self.one.name, key, start, room[begin : begin + stop - start])
            for (start, stop, _), begin in zip(pieces, begins, strict=False)
            if stop > start
        ]

    def _put(self, key: str, pieces: Sequence[Piece], values: Tensor) -> None:
        """Put values, one piece behind the other, where the pieces lie in the target's state."""
        target = local_of(self.optimizer.state[self.tensor][key]).view(-1)
        begin = 0
        for start, stop, offset in pieces:
            target[offset : offset + stop - start] = values[begin : begin + stop - start]
            begin += stop - start

    def _fill_elements(self) -> Iterator[list[Want]]:
        pieces = self.one.state[FIRST].read
        first, wants_first = self._moment(FIRST, pieces)
        second, wants_second = self._moment(SECOND, pieces)
        yield [*wants_first, *wants_second]
        for key, values in element_state(self.optimizer, self.group, self.entry, first, second).items():
            self._put(key, pieces, values)

    def _fill_mini(self, optimizer: AdamMini) -> Iterator[list[Want]]:
        pieces, blocks = self.one.state[FIRST].read, self.one.state[SECOND].read
        first, wants = self._moment(FIRST, pieces)
        layout = optimizer._bound_tensor(self.tensor).layout
        grid = optimizer._grids(layout)[layout.parameters[self.index].name]
        begin_block = min((piece.start for piece in blocks), default=0)
        last_block = max((piece.stop for piece in blocks), default=0)
        start, stop, begin_block = block_range(grid, begin_block, last_block)
        second, wants_second = self._moment(SECOND, [Piece(start, stop, 0)])
        yield [*wants, *wants_second]
        assert self.entry.step is not None
        beta1, beta2 = _betas(optimizer, self.group)
        self._put(FIRST, pieces, _debiased(first, self.entry.betas[0], beta1, self.entry.step))
        means = _debiased(block_means(grid, begin_block, second), self.entry.betas[1], beta2, self.entry.step)
        for piece in blocks:
            self._put(SECOND, [piece], means[piece.start - begin_block :])

    def _fill_blocks(self, optimizer: Shampoo) -> Iterator[list[Want]]:
        plan, _ = optimizer._plan_of(self.tensor)
        mine = [block for block in optimizer._owned(self.tensor) if plan.blocks[block].parameter == self.index]
        begins = state_begins(plan, optimizer._owned(self.tensor), optimizer.block_state)
        runs = {
            block: [Piece(start, stop, 0) for start, stop in box_runs(self.one.shape, plan.blocks[block].tile.box)]
            for block in mine
        }
        firsts, seconds = ({block: self._moment(key, runs[block]) for block in mine} for key in (FIRST, SECOND))
        yield [want for moments in (firsts, seconds) for _, wants in moments.values() for want in wants]
        step, decay = self.entry.step, self.entry.betas[1]
        assert step is not None
        for block in mine:
            averages = element_state(optimizer, self.group, self.entry, firsts[block][0], seconds[block][0])
            shape = plan.blocks[block].tile.shape
            named = {"momentum": averages[FIRST], "graft": averages[SECOND]}
            unbiased = seconds[block][0].view(shape) / (1 - decay**step)
            named |= factors(unbiased, self.group["betas"][1], step)
            for key, values in named.items():
                offset = begins[block][key]
                self._put(key, [Piece(0, values.numel(), offset)], values.view(-1))


def factors(mean_square: Tensor, beta: float, step: int) -> dict[str, Tensor]:
    """Shampoo's factors of a block after ``step`` steps as far as they follow from the gradient's mean square."""
    weight = 1 - beta**step if beta < 1 else float(step)
    return {
        f"factor_{axis}": torch.diag(weight * mean_square.movedim(axis, 0).reshape(size, -1).sum(1))
        for axis, size in enumerate(mean_square.shape)
    }


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
    subject, problems = content.subject_of(model, optimizer, ranks)
    if subject is not None and subject.optimizer is None:
        problems = ["give the optimizer too: warm_start(source, model, optimizer)"]
    raise_everywhere(ranks, problems, "nothing can be started here")
    assert subject is not None
    assert subject.optimizer is not None
    found: AdamSource
    if isinstance(source, Mapping):
        trained = {one.name for _, one in subject.listed()}
        in_order = [name for name, _ in subject.model.named_parameters() if canonical_name(name) in trained]
        found, problems = state_dict_source(source, names, in_order)
        raise_everywhere(ranks, problems, "this is not the state of an AdamW")
    else:
        found = source_in(ranks, Path(source), tag)
    if weights and not isinstance(found, CanonicalSource):
        problems.append("weights=True needs a directory of ds_optim.checkpoint.save: load others as usual before")
    raise_everywhere(
        ranks, problems + _misfits(subject, found.entries), "this AdamW's state does not fit, nothing was changed"
    )
    if weights:
        assert not isinstance(source, Mapping)
        load(source, model, optimizer, tag=tag, load_optimizer_states=False)
    batches = list(_batches(subject, found.entries))
    for batch in [*batches, *[[]] * (max(ranks.everyones(len(batches)).values()) - len(batches))]:
        fillers = [place.fill() for place in batch]
        found.read([want for filler in fillers for want in next(filler)])
        for filler in fillers:
            next(filler, None)
    subject.optimizer.forget_past()


def _misfits(subject: content.Subject, entries: Mapping[str, Entry]) -> list[str]:
    """Every reason why the moments are not those of these parameters, as sentences."""
    optimizer, problems = subject.optimizer, list[str]()
    if isinstance(optimizer, Shampoo) and not optimizer.defaults["graft"]:
        problems.append('Shampoo without a graft has no AdamW step to go on with: use graft "adam", or start cold')
    for parameters in subject.parameters.values():
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
    here = {one.name for _, one in subject.listed()} | set(subject.untrained)
    return [*problems, *(f"the source has {name}, which is not here" for name in entries if name not in here)]


def _batches(subject: content.Subject, entries: Mapping[str, Entry]) -> Iterator[list[_Place]]:
    """Parameters to be read together, alike on every rank; their tensors' state is made first, zero at AdamW's step."""
    optimizer, indices = subject.optimizer, content._group_indices(subject)
    assert optimizer is not None
    batch, size = list[_Place](), 0
    for tensor, parameters in subject.parameters.items():
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
            batch.append(_Place(optimizer, tensor, index, one, group, entry))
            size += math.prod(one.shape)
    if batch:
        yield batch
