"""One step's kernel calls: what is read and written, the tables to walk, and the order of the exchange.

Tensors that share their settings and their step count go through one call, so that hundreds of small ones cost one.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ds_optim import kernels
from ds_optim.kernels.rounding import identity_of
from ds_optim.kernels.tables import table_of
from ds_optim.rule import Blockwise, Elementwise, Scalars
from ds_optim.sharding.binding import BoundTensor, local_grad, locals_of
from ds_optim.sharding.block_runs import BlockRuns
from ds_optim.sharding.exchange import PendingSum
from ds_optim.stepping.eight_bits import coded_keys
from ds_optim.stepping.logical_tensors import element_ranges


class TensorStretch(NamedTuple):
    """A part of a local tensor that a call sees as a tensor of its own.

    Attributes:
        tensor: index in the call.
        start: first element.
        length: elements.
        begin: where its state begins, in state that has no room for the rest.
    """

    tensor: int
    start: int
    length: int
    begin: int


class Stretches:
    """What a call sees of its tensors.

    Args:
        covered: of each tensor, ``(start, length)`` of what is stepped, ascending; its state has room for that alone.
        has_all: whether that is all of every tensor; then calls are over the tensors themselves.

    Attributes:
        listed: the stretches; None: the tensors.
    """

    def __init__(self, covered: Sequence[Sequence[tuple[int, int]]], *, has_all: bool) -> None:
        self.listed: list[TensorStretch] | None = None if has_all else []
        self._places: list[list[tuple[int, int]]] = []  # by tensor: start, and index of the stretch
        for tensor, spans in enumerate(covered if self.listed is not None else ()):
            assert self.listed is not None
            self._places.append([])
            begin = 0
            for start, length in spans:
                self._places[-1].append((start, len(self.listed)))
                self.listed.append(TensorStretch(tensor, start, length, begin))
                begin += length

    def moved(self, row: Sequence[int]) -> tuple[int, ...]:
        """A table's row, which begins with a tensor and an element, of elements that lie in one stretch."""
        tensor, start, *rest = row
        if self.listed is None:
            return tuple(row)
        places = self._places[tensor]
        first, index = places[bisect_right(places, (start, len(self.listed))) - 1]
        return (index, start - first, *rest)


@dataclass(frozen=True, slots=True)
class Walk:
    """What a call walks of certain tensors.

    Attributes:
        members: which of the tensors it is over, by index.
        tables: of these, or of their stretches.
        stretches: what is seen of them; None: all.
        coded: whether their state is in eight bits.
    """

    members: Sequence[int]
    tables: kernels.Tables
    stretches: Sequence[TensorStretch] | None
    coded: bool


def block_tables(runs: Sequence[BlockRuns], stretches: Stretches) -> kernels.Tables:
    """Tables of blocks: every tensor's runs, their cut blocks numbered through."""
    rows: list[tuple[int, ...]] = []
    columns: list[tuple[int, ...]] = []
    cuts = 0
    for index, of_tensor in enumerate(runs):
        for *head, first, last, _, _ in of_tensor.rows:
            shifted = (cut + cuts if cut >= 0 else -1 for cut in (first, last))
            rows.append(stretches.moved((index, *head, *shifted)))
        for *head, cut, block_numel, _, _, _ in of_tensor.columns:
            shifted_cut = cut + cuts if cut >= 0 else -1
            columns.append(stretches.moved((index, *head, shifted_cut, block_numel)))
        cuts += of_tensor.num_cuts
    return kernels.Tables(row_runs=table_of(rows, 8), column_runs=table_of(columns, 11), num_cuts=cuts)


def places(tensors: Sequence[Tensor], bounds: Sequence[BoundTensor]) -> kernels.Places:
    """Which parameter every element of the bf16 tensors of a call belongs to, and which element of it that is."""
    found = []
    for index, (tensor, bound) in enumerate(zip(tensors, bounds, strict=True)):
        if tensor.dtype == torch.bfloat16:
            for spec, ranges in zip(bound.layout.parameters, element_ranges(bound.layout, bound.rank), strict=True):
                identity = identity_of(spec.name)
                found += [kernels.Place(index, one.offset, one.stop - one.start, identity, one.start) for one in ranges]
    return kernels.Places(found)


def row_major(tensor: Tensor) -> Tensor:
    """A flat view in row-major order; of a tensor that is not (channels_last) a flat copy, to be put back."""
    return tensor.detach().contiguous().view(-1)


class Call:
    """One kernel call over tensors that share settings, step count, device and shard group.

    Args:
        rule: what to compute.
        tensors: parameters as the optimizer's groups hold them, gradients attached (None counts as zero).
        states: the optimizer's state of each of them.
        walk: what to walk.
        scalars: the formula's constants.
        group: the shard group, over which cut blocks are summed.
        rounding: how the bf16 ones among the tensors are rounded; None rounds them to nearest.
    """

    def __init__(
        self,
        rule: Elementwise | Blockwise,
        tensors: Sequence[Tensor],
        states: Sequence[dict[str, Any]],
        walk: Walk,
        scalars: Scalars,
        group: dist.ProcessGroup | None,
        rounding: kernels.Rounding | None,
    ) -> None:
        self.formula, self.group = rule.coded_formula if walk.coded else rule.formula, group
        self._copied: list[tuple[Tensor, Tensor]] = []
        # No views: there are hundreds of tensors, and kernels look at memory alone.
        params = [one if one.is_contiguous() else self._dense(one) for one in locals_of(tensors)]
        grads = [None if (grad := local_grad(t)) is None else grad.contiguous() for t in tensors]
        names = [coded_keys(key) for key in rule.element_state] if walk.coded else []
        keys = [name.codes for name in names] or rule.element_state
        kept = [locals_of([state[key] for state in states]) for key in keys]
        of_blocks = [[state[key] for state in states] for key in (*rule.block_state, *(name.scales for name in names))]
        self.device = params[0].device
        self.backend = kernels.backend_for(self.formula, self.device)
        if walk.stretches is not None:
            params, grads, kept, rounding = _narrowed(walk.stretches, params, grads, kept, rounding)
            of_blocks = [[of_kind[one.tensor] for one in walk.stretches] for of_kind in of_blocks]
        self.operands = kernels.Operands(
            params=params,
            grads=grads,
            states=kept,
            block_states=of_blocks[: len(rule.block_state)],
            tables=walk.tables,
            scalars=scalars,
            rounding=rounding,
            # Replaced by `run`, where calls share one exchange.
            cut_sums=torch.empty(0, dtype=_dtype_of_sums(self.device), device=self.device),
            scales=of_blocks[len(rule.block_state) :],
        )

    def _dense(self, tensor: Tensor) -> Tensor:
        copy = tensor.detach().contiguous()
        self._copied.append((tensor, copy))
        return copy

    @property
    def num_cuts(self) -> int:
        """Blocks that a shard boundary cuts, the same on every rank."""
        return self.operands.tables.num_cuts

    @property
    def num_maxima(self) -> int:
        """Largest magnitudes of state in eight bits whose block a shard boundary cuts, the same on every rank."""
        return self.operands.tables.num_code_cuts * len(self.formula.codes)

    def update(self, select: kernels.Select) -> None:
        """Update the elements of cut or of uncut blocks; an elementwise rule's elements are uncut.

        In eight bits blocks are those of codes; under a blockwise rule then all elements wait for those that are cut.
        """
        if not self.operands.params:
            return
        is_blockwise = bool(self.formula.block_states)
        if self.formula.codes:
            if select == "cut" if is_blockwise else select == "uncut" or self.num_maxima:
                kernels.coded(self.backend, self.formula, self.operands, select)
        elif is_blockwise:
            if select == "uncut" or self.num_cuts:
                kernels.blockwise(self.backend, self.formula, self.operands, select)
        elif select == "uncut":
            kernels.elementwise(self.backend, self.formula, self.operands)

    def add_cut_sums(self, sums: Tensor) -> None:
        """Add this rank's squares of cut blocks to ``sums``, which the update of those reads."""
        self.operands.cut_sums = sums
        kernels.partial_sums(self.backend, self.operands)

    def enter_cut_maxima(self, maxima: Tensor) -> None:
        """Enter this rank's largest magnitudes of cut blocks of codes into ``maxima``, likewise."""
        self.operands.cut_maxima = maxima.view(-1, len(self.formula.codes))
        kernels.partial_maxima(self.backend, self.formula, self.operands)

    def finish(self) -> None:
        """Put copies of tensors that are not row-major back."""
        for tensor, copy in self._copied:
            tensor.copy_(copy)


def _narrowed(
    stretches: Sequence[TensorStretch],
    params: list[Tensor],
    grads: list[Tensor | None],
    kept: list[list[Tensor]],
    rounding: kernels.Rounding | None,
) -> tuple[list[Tensor], list[Tensor | None], list[list[Tensor]], kernels.Rounding | None]:
    """The same over stretches of the tensors."""
    new = [_stretch(params[one.tensor].detach(), one.start, one.length) for one in stretches]
    if rounding is not None:
        bf16 = [index for index, param in enumerate(new) if param.dtype == torch.bfloat16]
        rounding = rounding.narrowed({index: stretches[index][:3] for index in bf16})
    new_grads = [
        None if (grad := grads[one.tensor]) is None else _stretch(grad, one.start, one.length) for one in stretches
    ]
    states = [[_stretch(of_kind[one.tensor], one.begin, one.length) for one in stretches] for of_kind in kept]
    return new, new_grads, states, rounding


def _stretch(tensor: Tensor, start: int, length: int) -> Tensor:
    return tensor if length == tensor.numel() else tensor.view(-1).narrow(0, start, length)


def run(calls: Sequence[Call]) -> None:
    """Run the calls of one step. Whole blocks are updated while what cut ones share travels; then those follow."""
    pending = [
        *_exchanged(calls, lambda call: call.num_cuts, Call.add_cut_sums, None),
        *_exchanged(calls, lambda call: call.num_maxima, Call.enter_cut_maxima, dist.ReduceOp.MAX),
    ]
    for call in calls:
        call.update("uncut")
    for shared in pending:
        shared.wait()
    for call in calls:
        call.update("cut")
        call.finish()


def _exchanged(
    calls: Sequence[Call],
    count: Callable[[Call], int],
    enter: Callable[[Call, Tensor], None],
    op: dist.ReduceOp.RedOpType | None,
) -> list[PendingSum]:
    """Start one all-reduce per shard group over what all calls share of cut blocks.

    Args:
        count: how many numbers a call shares.
        enter: has a call add what it has of them.
        op: None sums fp64 (fp32 where there is none); otherwise the numbers are int32.
    """
    together: dict[tuple[dist.ProcessGroup, torch.device], list[Call]] = {}
    for call in calls:
        if count(call):
            assert call.group is not None, "a tensor that one process holds whole has no cut blocks"
            together.setdefault((call.group, call.device), []).append(call)
    pending = []
    for (group, device), sharing in together.items():
        counts = [count(call) for call in sharing]
        dtype = _dtype_of_sums(device) if op is None else torch.int32
        shared = torch.zeros(sum(counts), dtype=dtype, device=device)
        for call, part in zip(sharing, shared.split(counts), strict=True):
            enter(call, part)
        pending.append(PendingSum(shared, group, op))
    return pending


def _dtype_of_sums(device: torch.device) -> torch.dtype:
    """Of squares: fp64, so that their order hardly shows; one device has none."""
    return torch.float32 if device.type == "mps" else torch.float64
