"""The drivers with the formula in functions that `torch.compile` fuses: for accelerators, where C++ cannot follow.

Every call of a compiled function is one kernel (one more for a reduction), without temporaries of the tensor's size.
Nothing recompiles from step to step: sizes are symbolic, and scalars are 0-dim tensors on the device, so that neither a
schedule nor a new length is a new program. What does make one, each once: another formula or dtype, a missing gradient,
a size of exactly one, and an offset in memory of zero, or one that is not a multiple of 16 bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from ds_optim.kernels import eager
from ds_optim.kernels.operands import Arithmetic, Formula, Operands
from ds_optim.kernels.rounding import store
from ds_optim.kernels.tables import ColumnPiece, ColumnRun, RowPiece, Select, iterate_column_runs, iterate_row_runs
from ds_optim.known_torch import compiled

ALIGNMENT = 16
"""Bytes. Inductor expects of every input what the first one had, and copies an input that is aligned less."""


@torch.no_grad()
def elementwise(formula: Formula, operands: Operands) -> None:
    """`ds_optim.kernels.elementwise`."""
    params, constants, words = operands.params, _on_device(operands), _Words(operands)
    for tensor, start, length in eager.placed_spans(operands):
        local = [params[tensor], *(state[tensor] for state in operands.states)]
        grad = _part(operands.grads[tensor], start, (length,))
        targets = [_part(target, start, (length,)) for target in local]
        _call(_apply, formula.update, targets, grad, [], constants, words.at(tensor, start))
    torch.autograd.graph.increment_version(params)


@torch.no_grad()
def descend(target: Tensor, update: Tensor, decay: float | Tensor, identity: int, first: int, key: int) -> None:
    """`ds_optim.kernels.descend`."""
    device = target.device
    factor = decay.to(device, torch.float32) if isinstance(decay, Tensor) else _scalar("decay", decay, device)
    words = [_word("identity", identity, device), _word("first", first, device), _key(key, device)]
    here, change = (_part(tensor, 0, tuple(tensor.shape), tensor.stride()) for tensor in (target, update))
    _call(_descend, [here], [change], factor, words)
    torch.autograd.graph.increment_version(target)


@torch.no_grad()
def partial_sums(operands: Operands) -> None:
    """`ds_optim.kernels.partial_sums`."""
    cut_sums = operands.cut_sums
    for piece in iterate_row_runs(operands.tables.row_runs, "cut"):
        grad = operands.grads[piece.tensor]
        if grad is not None:
            row = _part(grad, piece.start, (piece.length,))
            cut_sums[piece.cut] += _call(_sum_squares, row, 0, cut_sums.dtype)
    for run in iterate_column_runs(operands.tables.column_runs, "cut"):
        grad = operands.grads[run.tensor]
        if grad is not None:
            cut_sums[run.cut : run.cut + run.blocks] += _column_sums(grad, run, cut_sums)


@torch.no_grad()
def blockwise(formula: Formula, operands: Operands, select: Select) -> None:
    """`ds_optim.kernels.blockwise`."""
    constants, words = _on_device(operands), _Words(operands)
    for piece in iterate_row_runs(operands.tables.row_runs, select):
        _update_rows(formula.update, operands, piece, constants, words.at(piece.tensor, piece.start))
    for run in iterate_column_runs(operands.tables.column_runs, select):
        _update_columns(formula.update, operands, run, constants, words)
    torch.autograd.graph.increment_version(operands.params)


def _update_rows(
    update: Arithmetic, operands: Operands, piece: RowPiece, constants: dict[str, Tensor], words: list[Tensor]
) -> None:
    local = [operands.params[piece.tensor], *(state[piece.tensor] for state in operands.states)]
    grad, cut_sums = operands.grads[piece.tensor], operands.cut_sums
    blocks = [_part(state[piece.tensor], piece.slot, (piece.blocks,)) for state in operands.block_states]
    if piece.cut < 0:
        shape = (piece.blocks, piece.length)
        targets = [_part(target, piece.start, shape) for target in local]
        grad_BE = _part(grad, piece.start, shape)
        _call(_apply_rows, update, targets, grad_BE, blocks, cut_sums.dtype, constants, words)
    else:
        targets = [_part(target, piece.start, (piece.length,)) for target in local]
        mean_squares = (cut_sums[piece.cut : piece.cut + 1] / piece.numel).float()
        values = [mean_squares, *blocks]
        _call(_apply, update, targets, _part(grad, piece.start, (piece.length,)), values, constants, words)
        eager.advance_blocks(update, len(operands.states), blocks, mean_squares, constants)


def _update_columns(
    update: Arithmetic, operands: Operands, run: ColumnRun, constants: dict[str, Tensor], words: _Words
) -> None:
    local = [operands.params[run.tensor], *(state[run.tensor] for state in operands.states)]
    grad, cut_sums = operands.grads[run.tensor], operands.cut_sums
    blocks = [_part(state[run.tensor], run.slot, (run.blocks,)) for state in operands.block_states]
    sums = _column_sums(grad, run, cut_sums) if run.cut < 0 else cut_sums[run.cut : run.cut + run.blocks]
    mean_squares = (sums / run.block_numel).float()
    by_column = [value.repeat_interleave(run.width) for value in (mean_squares, *blocks)]
    for part in run.pieces():
        targets = [_columns(target, run, part) for target in local]
        values = [_part(value, part.first, (part.last - part.first,)) for value in by_column]
        here = words.at(run.tensor, part.start)
        _call(_apply, update, targets, _columns(grad, run, part), values, constants, here)
    eager.advance_blocks(update, len(operands.states), blocks, mean_squares, constants)


def _apply(
    update: Arithmetic,
    targets: list[Tensor],
    grad: Tensor | None,
    block_values: list[Tensor],
    scalars: dict[str, Tensor],
    words: list[Tensor],
) -> None:
    """Elements whose block values, if any, are known."""
    known_grad = torch.zeros_like(targets[0]).float() if grad is None else grad.float()
    eager.apply(update, targets, known_grad, block_values, scalars, words)


def _descend(target: list[Tensor], update: list[Tensor], decay: Tensor, words: list[Tensor]) -> None:
    store(target[0], target[0].float() * decay - update[0], words)


def _apply_rows(
    update: Arithmetic,
    targets: list[Tensor],
    grad: Tensor | None,
    block_states: list[Tensor],
    dtype: torch.dtype,
    scalars: dict[str, Tensor],
    words: list[Tensor],
) -> None:
    """Whole blocks as the rows of (blocks, elements) targets: sums, block states and elements in one program."""
    grad_BE = torch.zeros_like(targets[0]).float() if grad is None else grad.float()
    mean_square_B1 = ((grad_BE * grad_BE).sum(1, keepdim=True, dtype=dtype) / grad_BE.shape[1]).float()
    param_BE, *state_BE = [target.float() for target in targets]
    block_state_B1 = [state[:, None] for state in block_states]
    results = update(param_BE, grad_BE, mean_square_B1, *state_BE, *block_state_B1, **scalars)
    store(targets[0], results[0], words)
    for target, result in zip(targets[1:], results[1 : len(targets)], strict=True):
        target.copy_(result)
    for state, result in zip(block_states, results[len(targets) :], strict=True):
        state.copy_(result[:, 0])


def _sum_squares(values: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    values = values.float()
    return (values * values).sum(dim, dtype=dtype)


def _column_sums(grad: Tensor | None, run: ColumnRun, like: Tensor) -> Tensor:
    """Sums of squares (blocks,) of the run's blocks."""
    columns = torch.zeros(run.blocks * run.width, dtype=like.dtype, device=like.device)
    for part in run.pieces() if grad is not None else ():
        columns[part.first : part.last] += _call(_sum_squares, _columns(grad, run, part), 0, like.dtype)
    return columns.view(run.blocks, run.width).sum(1)


def _part(tensor: Any, start: int, shape: tuple[int, ...], strides: tuple[int, ...] | None = None) -> Any:
    """Elements of a flat tensor from ``start`` on. Not a view: a program that sees views depends on their bases."""
    if tensor is None:
        return None
    if strides is None:
        strides = (shape[1], 1) if len(shape) == 2 else (1,)
    part = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return part.set_(tensor.untyped_storage(), tensor.storage_offset() + start, shape, strides)


def _columns(tensor: Any, run: ColumnRun, piece: ColumnPiece) -> Any:
    """The piece's elements as (rows, columns)."""
    return _part(tensor, piece.start, (piece.rows, piece.last - piece.first), (run.row_length, 1))


def _on_device(operands: Operands) -> dict[str, Tensor]:
    """The scalars as 0-dim tensors where the parameters are; a call works on one device."""
    if not operands.params:
        return {}
    device = operands.params[0].device
    return {
        name: value.to(device=device, dtype=torch.float32)
        if isinstance(value, Tensor)
        else _scalar(name, value, device)
        for name, value in operands.scalars.items()
    }


@lru_cache(maxsize=256)
def _scalar(name: str, value: float, device: torch.device) -> Tensor:
    # One tensor per name: a program that once saw one tensor for two names insists on it.
    return torch.full((), value, dtype=torch.float32, device=device)  # filled there: nothing is sent, nothing waits


class _Words:
    """What parameters are rounded by, as 0-dim tensors where they are: neither a step nor a place is a new program."""

    def __init__(self, operands: Operands) -> None:
        rounding, params = self._rounding, self._params = operands.rounding, operands.params
        self._key = _key(rounding.key, params[0].device) if rounding is not None and params else None

    def at(self, tensor: int, start: int) -> list[Tensor]:
        """As `eager.words_at`."""
        words = eager.words_at(self._rounding, self._params[tensor], tensor, start)
        if not words or self._key is None:
            return []
        device = self._params[tensor].device
        return [_word("identity", words[0], device), _word("first", words[1], device), self._key]


def _key(value: int, device: torch.device) -> Tensor:
    return torch.full((), value, dtype=torch.int64, device=device)


@lru_cache(maxsize=1 << 14)
def _word(name: str, value: int, device: torch.device) -> Tensor:
    return torch.full((), value, dtype=torch.int64, device=device)  # one per name, as in `_scalar`


def _call(function: Callable[..., Any], *arguments: Any) -> Any:
    tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
    for argument in arguments:
        if isinstance(argument, list):
            tensors += argument
    aligned = all(tensor.storage_offset() * tensor.element_size() % ALIGNMENT == 0 for tensor in tensors)
    update = arguments[0] if callable(arguments[0]) else None
    return _program(function, update, aligned)(*arguments)


@cache
def _program(function: Callable[..., Any], update: Arithmetic | None, aligned: bool) -> Callable[..., Any]:
    """Looked up by what must not be mixed in one program; its other variants are dynamo's business."""
    return compiled(function)
