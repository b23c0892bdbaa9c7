"""The drivers in plain torch operations: the oracle of the other backends, and the fallback where no compiler is found.

Works on any device. Nothing of the tensor's size is allocated: the formula sees at most `CHUNK` elements at a time.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ds_optim.kernels import codes
from ds_optim.kernels.operands import Arithmetic, Formula, Operands, Scalars
from ds_optim.kernels.rounding import Rounding, Words, store
from ds_optim.kernels.tables import (
    ColumnPiece,
    ColumnRun,
    RowPiece,
    Select,
    Tables,
    iterate_column_runs,
    iterate_row_runs,
    iterate_spans,
)

CHUNK = {"cpu": 1 << 16}
"""Elements per call of a formula: on a CPU its temporaries should stay in the cache, elsewhere launches must be few."""
DEFAULT_CHUNK = 1 << 20


def chunk_of(device: torch.device) -> int:
    """Elements per call of a formula on ``device``."""
    return CHUNK.get(device.type, DEFAULT_CHUNK)


def has(_: Formula) -> bool:
    """Every formula can be run as it is."""
    return True


@torch.no_grad()
def elementwise(formula: Formula, operands: Operands) -> None:
    """`ds_optim.kernels.elementwise`."""
    operands = _flat(operands)
    scalars, rounding = operands.scalars, operands.rounding
    for tensor, start, length in placed_spans(operands):
        param, grad = operands.params[tensor], operands.grads[tensor]
        local = [state[tensor] for state in operands.states]
        chunk = chunk_of(param.device)
        for first in range(start, start + length, chunk):
            here = slice(first, min(first + chunk, start + length))
            targets = [param[here], *(state[here] for state in local)]
            words = words_at(rounding, param, tensor, first)
            apply(formula.update, targets, gradient(grad, here, targets[0]), [], scalars, words)


@torch.no_grad()
def one_pass(formula: Formula, values: Tensor, states: Sequence[Tensor], scalars: Scalars) -> None:
    """`ds_optim.kernels.one_pass`."""
    flat = [one.view(-1) for one in (values, *states)]
    chunk, numel = chunk_of(values.device), values.numel()
    for first in range(0, numel, chunk):
        part = slice(first, min(first + chunk, numel))
        targets = [one[part] for one in flat]
        apply(formula.update, targets, targets[0], [], rounded(scalars), ())


@torch.no_grad()
def descend(target: Tensor, update: Tensor, decay: float | Tensor, words: Words) -> None:
    """`ds_optim.kernels.descend`."""
    store(target, target.to(torch.float32, copy=True).mul_(decay).sub_(update), words)


@torch.no_grad()
def partial_sums(operands: Operands) -> None:
    """`ds_optim.kernels.partial_sums`."""
    operands = _flat(operands)
    cut_sums = operands.cut_sums
    for piece in iterate_row_runs(operands.tables.row_runs, "cut"):
        grad = operands.grads[piece.tensor]
        if grad is not None:
            cut_sums[piece.cut] += _row_sums(grad, piece, cut_sums.dtype)[0]
    for run in iterate_column_runs(operands.tables.column_runs, "cut"):
        grad = operands.grads[run.tensor]
        if grad is not None:
            cut_sums[run.cut : run.cut + run.blocks] += _column_sums(grad, run, cut_sums.dtype)


@torch.no_grad()
def blockwise(formula: Formula, operands: Operands, select: Select) -> None:
    """`ds_optim.kernels.blockwise`."""
    operands = _flat(operands)
    cut_sums = operands.cut_sums
    for piece in iterate_row_runs(operands.tables.row_runs, select):
        param, grad = operands.params[piece.tensor], operands.grads[piece.tensor]
        for part in _parts(piece, chunk_of(param.device)):
            sums = _row_sums(grad, part, cut_sums.dtype, like=param) if piece.cut < 0 else cut_sums[piece.cut, None]
            _update_rows(formula, operands, part, (sums / piece.numel).float())
    for run in iterate_column_runs(operands.tables.column_runs, select):
        if run.cut < 0:
            sums = _column_sums(operands.grads[run.tensor], run, cut_sums.dtype, like=operands.params[run.tensor])
        else:
            sums = cut_sums[run.cut : run.cut + run.blocks]
        _update_columns(formula, operands, run, (sums / run.block_numel).float())


@torch.no_grad()
def partial_maxima(formula: Formula, operands: Operands) -> None:
    """`ds_optim.kernels.partial_maxima`."""
    operands = _flat(operands)
    for piece in iterate_row_runs(operands.tables.code_runs, "cut"):
        nothing = torch.zeros(1, dtype=torch.float32, device=operands.params[piece.tensor].device)
        new = _new_values(formula, operands, piece, [nothing] * (1 + formula.block_states), None)
        for state, values in enumerate(new[1 : 1 + formula.states]):
            found = codes.maxima(values)[0]
            operands.cut_maxima[piece.cut, state] = torch.maximum(operands.cut_maxima[piece.cut, state], found)


@torch.no_grad()
def coded(formula: Formula, operands: Operands, select: Select) -> None:
    """`ds_optim.kernels.coded`."""
    operands = _flat(operands)
    shared, owners = _mean_squares(operands) if formula.block_states else [], _BlockOwners(operands.tables)
    for piece in iterate_row_runs(operands.tables.code_runs, "all" if formula.block_states else select):
        for part in _parts(piece, chunk_of(operands.params[piece.tensor].device)):
            tensor = part.tensor
            here = slice(part.start, part.start + part.blocks * part.length)
            of_blocks = [shared[tensor], *(state[tensor] for state in operands.block_states)] if shared else []
            param, *new = _new_values(formula, operands, part, of_blocks, owners)
            target = operands.params[tensor][here].view(param.shape)
            store(target, param, words_at(operands.rounding, target, tensor, part.start))
            for state, values in enumerate(new[: formula.states]):
                known = part.cut >= 0
                scales = codes.scales_of(operands.cut_maxima[part.cut, state, None] if known else codes.maxima(values))
                operands.scales[state][tensor][part.slot : part.slot + part.blocks] = scales
                operands.states[state][tensor][here] = codes.encode(values, scales, formula.codes[state]).view(-1)
    for tensor, mean_squares in enumerate(shared):
        of_tensor = [state[tensor] for state in operands.block_states]
        advance_blocks(formula.update, formula.states, of_tensor, mean_squares, operands.scalars)


def _new_values(
    formula: Formula, operands: Operands, piece: RowPiece, of_blocks: Sequence[Tensor], owners: _BlockOwners | None
) -> tuple[Tensor, ...]:
    """What a formula makes of some blocks of codes: parameter and states, (blocks, length) each.

    Args:
        of_blocks: the mean square and block states of all blocks of the tensor; none of an elementwise formula.
        owners: which of them an element has; None: there is one, for all.
    """
    tensor, shape = piece.tensor, (piece.blocks, piece.length)
    here = slice(piece.start, piece.start + piece.blocks * piece.length)
    param_BE = operands.params[tensor][here].view(shape)
    grad_BE = gradient(operands.grads[tensor], here, param_BE.view(-1)).view(shape)
    states = [
        codes.decode(
            state[tensor][here].view(shape), scales[tensor][piece.slot : piece.slot + piece.blocks, None], code
        )
        for state, scales, code in zip(operands.states, operands.scales, formula.codes, strict=True)
    ]
    if not formula.block_states:
        return formula.update(param_BE.float(), grad_BE, *states, **operands.scalars)
    slots = None if owners is None else owners.of(piece, param_BE.device)
    mean_square, *block_states = of_blocks if slots is None else (values[slots].view(shape) for values in of_blocks)
    return formula.update(param_BE.float(), grad_BE, mean_square, *states, *block_states, **operands.scalars)


def _mean_squares(operands: Operands) -> list[Tensor]:
    """Of all blocks of a blockwise rule, by tensor, in the order of their state."""
    cut_sums = operands.cut_sums
    found = [torch.zeros_like(state) for state in operands.block_states[0]]
    for piece in iterate_row_runs(operands.tables.row_runs, "all"):
        param, grad = operands.params[piece.tensor], operands.grads[piece.tensor]
        for part in _parts(piece, chunk_of(param.device)):
            sums = _row_sums(grad, part, cut_sums.dtype, like=param) if piece.cut < 0 else cut_sums[piece.cut, None]
            found[piece.tensor][part.slot : part.slot + part.blocks] = sums / piece.numel
    for run in iterate_column_runs(operands.tables.column_runs, "all"):
        grad, param = operands.grads[run.tensor], operands.params[run.tensor]
        is_whole = run.cut < 0
        sums = _column_sums(grad, run, cut_sums.dtype, param) if is_whole else cut_sums[run.cut : run.cut + run.blocks]
        found[run.tensor][run.slot : run.slot + run.blocks] = sums / run.block_numel
    return found


class _BlockOwners:
    """Which of a blockwise rule's blocks an element is in."""

    def __init__(self, tables: Tables) -> None:
        self._rows: dict[int, list[list[int]]] = {}
        self._columns: dict[int, list[ColumnRun]] = {}
        for row in tables.row_runs.tolist():
            self._rows.setdefault(row[0], []).append(row)
        for run in iterate_column_runs(tables.column_runs, "all"):
            self._columns.setdefault(run.tensor, []).append(run)

    def of(self, piece: RowPiece, device: torch.device) -> Tensor:
        """The slots of a piece's elements, int64."""
        begin, end = piece.start, piece.start + piece.blocks * piece.length
        slots = torch.zeros(end - begin, dtype=torch.int64, device=device)
        for _, start, length, phase, width, slot, _, _ in self._rows.get(piece.tensor, ()):
            low, high = max(start, begin), min(start + length, end)
            if low < high:
                at = torch.arange(low - start + phase, high - start + phase, dtype=torch.int64, device=device)
                slots[low - begin : high - begin] = slot + at // width
        for run in self._columns.get(piece.tensor, ()):
            low, high = max(run.start, begin), min(run.start + run.length, end)
            if low < high:
                skipped = run.phase - run.start
                at = torch.arange(low + skipped, high + skipped, dtype=torch.int64, device=device)
                column = at % run.row_length - run.column_start
                is_inside = (column >= 0) & (column < run.column_stop - run.column_start)
                target = slots[low - begin : high - begin]
                target.copy_(torch.where(is_inside, run.slot + column // run.width, target))
        return slots


def _flat(operands: Operands) -> Operands:
    """Without shapes, and with scalars rounded."""
    return replace(
        operands,
        params=[param.detach().view(-1) for param in operands.params],
        grads=[None if grad is None else grad.view(-1) for grad in operands.grads],
        states=[[state.view(-1) for state in of_kind] for of_kind in operands.states],
        scalars=rounded(operands.scalars),
    )


def rounded(scalars: Mapping[str, float | Tensor]) -> dict[str, float | Tensor]:
    """The scalars as every backend sees them: rounded to fp32 once. Tensors stay where they are: nothing waits."""
    numbers = {name: value for name, value in scalars.items() if not isinstance(value, Tensor)}
    values = array("f", numbers.values())  # as the C++ kernels round them
    tensors = {name: value.float() for name, value in scalars.items() if isinstance(value, Tensor)}
    return {**dict(zip(numbers, values, strict=True)), **tensors}


def placed_spans(operands: Operands) -> Iterator[tuple[int, int, int]]:
    """As `iterate_spans`; where elements are rounded by their places, no span reaches over the end of a parameter."""
    rounding = operands.rounding
    for tensor, start, length in iterate_spans(operands.tables.spans):
        if rounding is None or operands.params[tensor].dtype != torch.bfloat16:
            yield tensor, start, length
        else:
            for place in rounding.places.within(tensor, start, length):
                yield tensor, place.start, place.length


def words_at(rounding: Rounding | None, param: Tensor, tensor: int, start: int) -> Words:
    """What `store` rounds a parameter's elements from ``start`` on by; nothing if it rounds to nearest."""
    if rounding is None or param.dtype != torch.bfloat16:
        return ()
    place = rounding.places.at(tensor, start)
    return place.identity, place.first, rounding.key


def gradient(grad: Tensor | None, here: slice, like: Tensor) -> Tensor:
    """The gradient's fp32 elements ``here``, zeros if there is none."""
    return torch.zeros_like(like, dtype=torch.float32) if grad is None else grad[here].float()


def apply(
    update: Arithmetic,
    targets: Sequence[Tensor],
    grad: Tensor,
    block_values: Sequence[Tensor],
    scalars: Mapping[str, float | Tensor],
    words: Sequence[int | Tensor] = (),
) -> None:
    """Evaluate a formula on parameter and element states (``targets``) and store what it returns for them.

    ``block_values``, the mean square and the block states, broadcast against the targets and are only read. The
    parameter is rounded by ``words``, see `ds_optim.kernels.rounding.store`.
    """
    if block_values:
        mean_square, *block_states = block_values
        results = update(
            targets[0].float(), grad, mean_square, *(t.float() for t in targets[1:]), *block_states, **scalars
        )
    else:
        results = update(targets[0].float(), grad, *(t.float() for t in targets[1:]), **scalars)
    store(targets[0], results[0], words)
    for target, result in zip(targets[1:], results[1 : len(targets)], strict=True):
        target.copy_(result)


def advance_blocks(
    update: Arithmetic,
    num_states: int,
    block_states: Sequence[Tensor],
    mean_squares: Tensor,
    scalars: Mapping[str, float | Tensor],
) -> None:
    """Store the formula's new block states, given as many mean squares; no block value sees the made-up elements."""
    nothing = torch.zeros_like(mean_squares)
    results = update(nothing, nothing, mean_squares, *([nothing] * num_states), *block_states, **scalars)
    for state, result in zip(block_states, results[1 + num_states :], strict=True):
        state.copy_(result)


def _parts(piece: RowPiece, chunk: int) -> Iterator[RowPiece]:
    """The piece in parts of at most ``chunk`` elements (at least one block)."""
    step = max(1, chunk // piece.length)
    for first in range(0, piece.blocks, step):
        blocks = min(step, piece.blocks - first)
        start = piece.start + first * piece.length
        yield RowPiece(piece.tensor, start, blocks, piece.length, piece.numel, piece.slot + first, piece.cut)


def _row_sums(grad: Tensor | None, piece: RowPiece, dtype: torch.dtype, like: Tensor | None = None) -> Tensor:
    """Sums of squares (blocks,) of the piece's blocks."""
    if grad is None:
        assert like is not None
        return torch.zeros(piece.blocks, dtype=dtype, device=like.device)
    chunk = chunk_of(grad.device)
    if piece.length > chunk:
        total = torch.zeros(1, dtype=dtype, device=grad.device)
        for first in range(piece.start, piece.start + piece.length, chunk):
            total += grad[first : min(first + chunk, piece.start + piece.length)].float().square_().sum(dtype=dtype)
        return total
    block_BL = grad[piece.start : piece.start + piece.blocks * piece.length].view(piece.blocks, piece.length)
    return block_BL.float().square().sum(1, dtype=dtype)


def _update_rows(formula: Formula, operands: Operands, piece: RowPiece, mean_squares: Tensor) -> None:
    param, grad = operands.params[piece.tensor], operands.grads[piece.tensor]
    states = [state[piece.tensor] for state in operands.states]
    block_states = [state[piece.tensor][piece.slot : piece.slot + piece.blocks] for state in operands.block_states]
    block_values = [mean_squares[:, None], *(state[:, None] for state in block_states)]
    width = chunk_of(param.device) if piece.blocks == 1 else piece.length
    stop = piece.start + piece.blocks * piece.length
    for first in range(piece.start, stop, piece.blocks * width):
        here = slice(first, min(first + piece.blocks * width, stop))
        targets = [tensor[here].view(piece.blocks, -1) for tensor in (param, *states)]
        grad_BE = gradient(grad, here, param[here]).view(piece.blocks, -1)
        words = words_at(operands.rounding, param, piece.tensor, first)
        apply(formula.update, targets, grad_BE, block_values, operands.scalars, words)
    advance_blocks(formula.update, len(states), block_states, mean_squares, operands.scalars)


def _column_parts(run: ColumnRun, chunk: int) -> Iterator[ColumnPiece]:
    """The run's pieces in parts of at most ``chunk`` elements (at least one row)."""
    for piece in run.pieces():
        step = max(1, chunk // (piece.last - piece.first))
        for row in range(0, piece.rows, step):
            rows = min(step, piece.rows - row)
            yield ColumnPiece(piece.start + row * run.row_length, rows, piece.first, piece.last)


def column_view(tensor: Tensor, run: ColumnRun, piece: ColumnPiece) -> Tensor:
    """The piece's elements as a (rows, columns) view."""
    return tensor.as_strided(
        (piece.rows, piece.last - piece.first), (run.row_length, 1), tensor.storage_offset() + piece.start
    )


def _column_sums(grad: Tensor | None, run: ColumnRun, dtype: torch.dtype, like: Tensor | None = None) -> Tensor:
    """Sums of squares (blocks,) of the run's blocks: by column over rows, which lie apart, then over columns."""
    device = grad.device if grad is not None else like.device if like is not None else None
    columns = torch.zeros(run.blocks * run.width, dtype=dtype, device=device)
    if grad is not None:
        for part in _column_parts(run, chunk_of(grad.device)):
            columns[part.first : part.last] += column_view(grad, run, part).float().square().sum(0, dtype=dtype)
    return columns.view(run.blocks, run.width).sum(1)


def _update_columns(formula: Formula, operands: Operands, run: ColumnRun, mean_squares: Tensor) -> None:
    param, grad = operands.params[run.tensor], operands.grads[run.tensor]
    states = [state[run.tensor] for state in operands.states]
    block_states = [state[run.tensor][run.slot : run.slot + run.blocks] for state in operands.block_states]
    block_values = [value.repeat_interleave(run.width) for value in (mean_squares, *block_states)]
    for part in _column_parts(run, chunk_of(param.device)):
        targets = [column_view(tensor, run, part) for tensor in (param, *states)]
        grad_RC = torch.zeros_like(targets[0], dtype=torch.float32) if grad is None else column_view(grad, run, part)
        values = [value[part.first : part.last] for value in block_values]
        words = words_at(operands.rounding, param, run.tensor, part.start)
        apply(formula.update, targets, grad_RC.float(), values, operands.scalars, words)
    advance_blocks(formula.update, len(states), block_states, mean_squares, operands.scalars)
