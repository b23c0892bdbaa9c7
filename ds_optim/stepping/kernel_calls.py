"""One step's kernel calls: what is read and written, the tables to walk, and the order of the exchange.

Tensors that share their settings and their step count go through one call, so that hundreds of small ones cost one.
"""

from __future__ import annotations

from collections.abc import Sequence
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


@dataclass(frozen=True, slots=True)
class Walk:
    """What a call over certain tensors walks.

    Attributes:
        tables: of the tensors, or of their stretches.
        stretches: what is seen of the tensors; None: the tensors themselves.
    """

    tables: kernels.Tables
    stretches: Sequence[TensorStretch] | None


def block_tables(runs: Sequence[BlockRuns]) -> kernels.Tables:
    """Tables of a blockwise rule: every tensor's runs, their cut blocks numbered through."""
    rows: list[tuple[int, ...]] = []
    columns: list[tuple[int, ...]] = []
    cuts = 0
    for index, of_tensor in enumerate(runs):
        for *head, first, last, _ in of_tensor.rows:
            shifted = (cut + cuts if cut >= 0 else -1 for cut in (first, last))
            rows.append((index, *head, *shifted))
        for *head, cut, block_numel, _ in of_tensor.columns:
            shifted_cut = cut + cuts if cut >= 0 else -1
            columns.append((index, *head, shifted_cut, block_numel))
        cuts += of_tensor.num_cuts
    return kernels.Tables(row_runs=table_of(rows, 8), column_runs=table_of(columns, 11), num_cuts=cuts)


def places(tensors: Sequence[Tensor], bounds: Sequence[BoundTensor]) -> kernels.Places:
    """Which parameter every element of the bf16 tensors of a call belongs to, and which element of it that is."""
    return kernels.Places(
        [
            kernels.Place(
                index, part.offset, part.numel, identity_of(bound.layout.parameters[part.parameter].name), part.start
            )
            for index, (tensor, bound) in enumerate(zip(tensors, bounds, strict=True))
            if tensor.dtype == torch.bfloat16
            for part in bound.layout.fragments(bound.rank)
        ]
    )


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
        self.formula, self.group = rule.formula, group
        self._copied: list[tuple[Tensor, Tensor]] = []
        # No views: there are hundreds of tensors, and kernels look at memory alone.
        params = [one if one.is_contiguous() else self._dense(one) for one in locals_of(tensors)]
        grads = [None if (grad := local_grad(t)) is None else grad.contiguous() for t in tensors]
        kept = [locals_of([state[name] for state in states]) for name in rule.element_state]
        self.device = params[0].device
        self.backend = kernels.backend_for(self.formula, self.device)
        if walk.stretches is not None:
            params, grads, kept, rounding = _narrowed(walk.stretches, params, grads, kept, rounding)
        self.operands = kernels.Operands(
            params=params,
            grads=grads,
            states=kept,
            block_states=[[state[name] for state in states] for name in rule.block_state],
            tables=walk.tables,
            scalars=scalars,
            rounding=rounding,
            # Replaced by `run`, where calls share one exchange.
            cut_sums=torch.empty(0, dtype=_dtype_of_sums(self.device), device=self.device),
        )

    def _dense(self, tensor: Tensor) -> Tensor:
        copy = tensor.detach().contiguous()
        self._copied.append((tensor, copy))
        return copy

    @property
    def num_cuts(self) -> int:
        """Blocks that a shard boundary cuts, the same on every rank."""
        return self.operands.tables.num_cuts

    def update(self, select: kernels.Select) -> None:
        """Update the elements of cut or of uncut blocks; an elementwise rule's elements are uncut."""
        if self.formula.block_states:
            kernels.blockwise(self.backend, self.formula, self.operands, select)
        elif select == "uncut":
            kernels.elementwise(self.backend, self.formula, self.operands)

    def add_cut_sums(self, sums: Tensor) -> None:
        """Add this rank's squares of cut blocks to ``sums``, which the update of those reads."""
        self.operands.cut_sums = sums
        kernels.partial_sums(self.backend, self.operands)

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
    new = [params[one.tensor].detach().view(-1).narrow(0, one.start, one.length) for one in stretches]
    if rounding is not None:
        bf16 = [index for index, param in enumerate(new) if param.dtype == torch.bfloat16]
        rounding = rounding.narrowed({index: stretches[index][:3] for index in bf16})
    new_grads = [
        None if (grad := grads[one.tensor]) is None else grad.view(-1).narrow(0, one.start, one.length)
        for one in stretches
    ]
    states = [[of_kind[one.tensor].view(-1).narrow(0, one.begin, one.length) for one in stretches] for of_kind in kept]
    return new, new_grads, states, rounding


def run(calls: Sequence[Call]) -> None:
    """Run the calls of one step. Whole blocks are updated while the sums of cut ones travel; then those follow."""
    pending = _sum_cut_blocks([call for call in calls if call.num_cuts])
    for call in calls:
        call.update("uncut")
    for sums, sharing in pending:
        sums.wait()
        for call in sharing:
            call.update("cut")
    for call in calls:
        call.finish()


def _sum_cut_blocks(calls: Sequence[Call]) -> list[tuple[PendingSum, list[Call]]]:
    """Start one all-reduce per shard group over all calls' cut blocks; the sums, and the calls that wait for them."""
    together: dict[tuple[dist.ProcessGroup, torch.device], list[Call]] = {}
    for call in calls:
        assert call.group is not None, "a tensor that one process holds whole has no cut blocks"
        together.setdefault((call.group, call.device), []).append(call)
    pending = []
    for (group, device), sharing in together.items():
        counts = [call.num_cuts for call in sharing]
        sums = torch.zeros(sum(counts), dtype=_dtype_of_sums(device), device=device)
        for call, part in zip(sharing, sums.split(counts), strict=True):
            call.add_cut_sums(part)
        pending.append((PendingSum(sums, group), sharing))
    return pending


def _dtype_of_sums(device: torch.device) -> torch.dtype:
    """Of squares: fp64, so that their order hardly shows; one device has none."""
    return torch.float32 if device.type == "mps" else torch.float64
