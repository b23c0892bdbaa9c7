"""One step's kernel calls: flat views of what is read and written, the tables to walk, and the order of the exchange.

Tensors that share their settings and their step count go through one call, so that hundreds of small ones cost one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ds_optim import kernels
from ds_optim.kernels.rounding import identity_of
from ds_optim.sharding.binding import BoundTensor, local_grad, local_of
from ds_optim.sharding.exchange import PendingSum
from ds_optim.sharding.runs import Runs, held_spans

Scalars = dict[str, Any]
"""A formula's constants for one call, by name: Python floats, or 0-dim tensors where the learning rate is one."""

StateSpec = tuple[tuple[int, ...], torch.dtype]
"""Shape and dtype of one kind of state."""


@dataclass(frozen=True, slots=True)
class Rule:
    """The mathematics of an optimizer, as its formula and the state it keeps.

    Attributes:
        name: the formula's name among the native kernels.
        update: the formula, a pure function ``(param, grad, *states, **scalars) -> (param, *states)`` on fp32 tensors;
            a blockwise rule's takes its blocks' mean squared gradient after ``grad``.
        element_state: state with one value per element.
        block_state: state with one value per block; a rule that has any is blockwise.
    """

    name: str
    update: Callable[..., tuple[Tensor, ...]]
    element_state: tuple[str, ...]
    block_state: tuple[str, ...] = ()


def _table(rows: Sequence[Sequence[int]], columns: int) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, columns)


@dataclass(slots=True)
class Tables:
    """What kernels walk for one list of tensors; columns as in `ds_optim.kernels.tables`.

    Attributes:
        num_cuts: blocks of these tensors' layouts that a shard boundary cuts, the same on every rank.
    """

    spans: Tensor = field(default_factory=lambda: _table([], 3))
    row_runs: Tensor = field(default_factory=lambda: _table([], 8))
    column_runs: Tensor = field(default_factory=lambda: _table([], 11))
    num_cuts: int = 0


def span_tables(bounds: Sequence[BoundTensor]) -> Tables:
    """Tables of an elementwise rule: every stretch without padding."""
    spans = [(index, *span) for index, bound in enumerate(bounds) for span in held_spans(bound.layout, bound.rank)]
    return Tables(spans=_table(spans, 3))


def block_tables(runs: Sequence[Runs]) -> Tables:
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
    return Tables(row_runs=_table(rows, 8), column_runs=_table(columns, 11), num_cuts=cuts)


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
        tables: what to walk.
        scalars: the formula's constants.
        group: the shard group, over which cut blocks are summed.
        rounding: how the bf16 ones among the tensors are rounded; None rounds them to nearest.
    """

    def __init__(
        self,
        rule: Rule,
        tensors: Sequence[Tensor],
        states: Sequence[dict[str, Any]],
        tables: Tables,
        scalars: Scalars,
        group: dist.ProcessGroup | None,
        rounding: kernels.Rounding | None = None,
    ) -> None:
        self.rule, self.tables, self.scalars, self.group, self.rounding = rule, tables, scalars, group, rounding
        self._copied: list[tuple[Tensor, Tensor]] = []
        self.params = [self._flat(local_of(tensor)) for tensor in tensors]
        self.grads = [None if (grad := local_grad(t)) is None else row_major(grad) for t in tensors]
        self.states = [[local_of(state[name]).view(-1) for state in states] for name in rule.element_state]
        self.block_states = [[state[name] for state in states] for name in rule.block_state]
        self.device = self.params[0].device
        self.backend = kernels.backend_for(self.device)
        self.cut_sums = _zero_sums(0, self.device)  # replaced by `run`, where calls share one exchange

    def _flat(self, tensor: Tensor) -> Tensor:
        flat = row_major(tensor)
        if not tensor.is_contiguous():
            self._copied.append((tensor, flat))
        return flat

    def narrowed(self, stretches: Sequence[tuple[int, int, int, int]]) -> Call:
        """This call over parts of its tensors, whose state has no room for the rest.

        Args:
            stretches: (tensor, start, length, where its state begins).
        """

        def part(of: list[Any], index: int, start: int, length: int) -> Any:
            return None if of[index] is None else of[index].narrow(0, start, length)

        self.tables = Tables(spans=_table([(i, 0, s[2]) for i, s in enumerate(stretches)], 3))
        self.grads = [part(self.grads, s[0], s[1], s[2]) for s in stretches]
        self.params = [part(self.params, s[0], s[1], s[2]) for s in stretches]
        self.states = [[part(of_kind, s[0], s[3], s[2]) for s in stretches] for of_kind in self.states]
        if self.rounding is not None:
            bf16 = [index for index, param in enumerate(self.params) if param.dtype == torch.bfloat16]
            self.rounding = self.rounding.narrowed({index: stretches[index][:3] for index in bf16})
        return self

    def elementwise(self) -> None:
        """Update every element of the spans."""
        kernels.elementwise(
            self.backend,
            self.rule.name,
            self.rule.update,
            self.params,
            self.grads,
            self.states,
            self.tables.spans,
            self.scalars,
            self.rounding,
        )

    def partial_sums(self) -> None:
        """Add this rank's squares of cut blocks to `cut_sums`."""
        kernels.partial_sums(self.backend, self.grads, self.tables.row_runs, self.tables.column_runs, self.cut_sums)

    def blockwise(self, select: kernels.Select) -> None:
        """Update the elements of cut or of uncut blocks."""
        kernels.blockwise(
            self.backend,
            self.rule.name,
            self.rule.update,
            self.params,
            self.grads,
            self.states,
            self.block_states,
            self.tables.row_runs,
            self.tables.column_runs,
            self.cut_sums,
            self.scalars,
            select,
            self.rounding,
        )

    def finish(self) -> None:
        """Put copies of tensors that are not row-major back."""
        for tensor, flat in self._copied:
            tensor.copy_(flat.view(tensor.shape))


def run(calls: Sequence[Call]) -> None:
    """Run the calls of one step. Whole blocks are updated while the sums of cut ones travel; then those follow."""
    pending = _sum_cut_blocks([call for call in calls if call.tables.num_cuts])
    for call in calls:
        if call.rule.block_state:
            call.blockwise("uncut")
        else:
            call.elementwise()
    for sums, sharing in pending:
        sums.wait()
        for call in sharing:
            call.blockwise("cut")
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
        counts = [call.tables.num_cuts for call in sharing]
        sums = _zero_sums(sum(counts), device)
        for call, part in zip(sharing, sums.split(counts), strict=True):
            call.cut_sums = part
            call.partial_sums()
        pending.append((PendingSum(sums, group), sharing))
    return pending


def _zero_sums(count: int, device: torch.device) -> Tensor:
    """Sums of squares are fp64, so that their order hardly shows; one device has none."""
    return torch.zeros(count, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
