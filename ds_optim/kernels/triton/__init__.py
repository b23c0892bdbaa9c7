"""The drivers on Triton: as many launches per call as there are programs in it, whatever the number of tensors.

AdamW, Lion and Adan have one; Adam-mini has one for wide blocks, one for each width of narrow ones, and four for those
that a shard boundary cuts. Tensors of other dtypes are another launch. Blocks of columns, and `descend`, are still
compiled by torch. Nothing waits, and nothing is copied while tensors stay where they are.
"""

from __future__ import annotations

import os
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ds_optim.kernels import compiled, native
from ds_optim.kernels.operands import Formula, Operands
from ds_optim.kernels.tables import Select, Tables
from ds_optim.kernels.triton import launches
from ds_optim.kernels.triton.launches import Dtypes, Together

PROGRAMS = frozenset(("adamw", "lion", "adan", "adam_mini"))
"""The names of the formulas that there are programs for."""

_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
"""No contraction: a block must not depend on how it is cut."""


def has(formula: Formula) -> bool:
    """Whether there is a program for a formula: one of its name, kind and numbers of states."""
    return formula.name in PROGRAMS and native.has(formula)


def serves(device_type: str) -> bool:
    """Whether the programs run on a kind of device: on CPUs in Triton's interpreter alone, where they are tested."""
    return device_type in ("cuda", "xpu") or os.environ.get("TRITON_INTERPRET") == "1"


@cache
def problem() -> str:
    """Why nothing can be compiled for the accelerator here; empty if it can. Builds Triton's driver and no program."""
    try:
        from triton.runtime import driver

        driver.active.get_current_target()
    except Exception as error:  # no triton, no C compiler, no device, or one that is too old
        return f"Triton cannot be used here: {type(error).__name__}: {error}"
    return ""


@torch.no_grad()
def elementwise(formula: Formula, operands: Operands) -> None:
    """`ds_optim.kernels.elementwise`."""
    if not operands.params:
        return
    from ds_optim.kernels.triton import programs

    scalars = _scalars(formula, operands)
    for dtypes, group in launches.together(operands, operands.tables.spans, launches.spans).items():
        rows = group.rows["update_rows"]
        programs.update_rows[(len(rows),)](
            programs.ARITHMETIC[formula.name],
            *_tensors(dtypes, group),
            rows,
            *_rounding(dtypes, operands),
            *scalars,
            programs.BLOCK,
            **_OPTIONS,
        )
    torch.autograd.graph.increment_version(operands.params)


@torch.no_grad()
def partial_sums(operands: Operands) -> None:
    """`ds_optim.kernels.partial_sums`."""
    if not operands.params:
        return
    from ds_optim.kernels.triton import programs

    for dtypes, group in launches.together(operands, operands.tables.row_runs, launches.blocks).items():
        if "parts" in group.rows:
            parts, cut = group.rows["parts"], group.rows["cut"]
            partials = operands.cut_sums.new_empty(len(parts))
            programs.sum_rows[(len(parts),)](*_tensors(dtypes, group), parts, partials, programs.BLOCK, **_OPTIONS)
            programs.add_up[(len(cut),)](cut, partials, operands.cut_sums, **_OPTIONS)
    if (columns := _columns(operands)) is not None:
        compiled.partial_sums(columns)


@torch.no_grad()
def blockwise(formula: Formula, operands: Operands, select: Select) -> None:
    """`ds_optim.kernels.blockwise`."""
    if not operands.params:
        return
    scalars = _scalars(formula, operands)
    for dtypes, group in launches.together(operands, operands.tables.row_runs, launches.blocks).items():
        if select != "cut":
            _update_whole(dtypes, group, operands, scalars)
        if select != "uncut" and "parts" in group.rows:
            _update_cut(dtypes, group, operands, scalars)
    torch.autograd.graph.increment_version(operands.params)
    if (columns := _columns(operands)) is not None:
        compiled.blockwise(formula, columns, select)


def descend(target: Tensor, update: Tensor, decay: float | Tensor, identity: int, first: int, key: int) -> None:
    """`ds_optim.kernels.descend`."""
    compiled.descend(target, update, decay, identity, first, key)


def _update_whole(dtypes: Dtypes, group: Together, operands: Operands, scalars: tuple[Any, Any]) -> None:
    from ds_optim.kernels.triton import programs

    for width, rows in group.rows.items():
        common = (*_tensors(dtypes, group), rows, *_rounding(dtypes, operands), *scalars)
        if width == "wide":
            programs.update_wide_blocks[(len(rows),)](*common, programs.BLOCK, **_OPTIONS)
        elif width.isdecimal():
            programs.update_narrow_blocks[(len(rows),)](*common, launches.NARROW[int(width)], int(width), **_OPTIONS)


def _update_cut(dtypes: Dtypes, group: Together, operands: Operands, scalars: tuple[Any, Any]) -> None:
    from ds_optim.kernels.triton import programs

    cut, parts = group.rows["cut"], group.rows["parts"]
    factors = torch.empty(len(cut), dtype=torch.float32, device=cut.device)
    words, addresses, count = _tensors(dtypes, group)
    programs.advance_cut[(len(cut),)](addresses, count, cut, operands.cut_sums, factors, *scalars, **_OPTIONS)
    where = (words, addresses, count, parts, factors)
    programs.update_cut_rows[(len(parts),)](*where, *_rounding(dtypes, operands), *scalars, programs.BLOCK, **_OPTIONS)


def _columns(operands: Operands) -> Operands | None:
    """The call's runs of columns alone."""
    columns = operands.tables.column_runs
    return replace(operands, tables=Tables(column_runs=columns)) if len(columns) else None


def _tensors(dtypes: Dtypes, group: Together) -> tuple[Any, Any, int]:
    """What every program begins with: Triton's words for the dtypes, the addresses, and how many tensors there are."""
    return tuple(map(_language, dtypes)), group.addresses, len(group.members)


def _rounding(dtypes: Dtypes, operands: Operands) -> tuple[int, bool]:
    """The key of the step, and whether parameters are rounded by it."""
    if operands.rounding is None or dtypes[0] != torch.bfloat16:
        return 0, False
    return operands.rounding.key, True


def _scalars(formula: Formula, operands: Operands) -> tuple[tuple[Any, ...], tuple[bool, ...]]:
    """The formula's scalars, in the order of its program, and which of them lie on the device."""
    device = operands.params[0].device
    values = [operands.scalars[name] for name in native.KERNELS[formula.name].scalars]
    scalars = tuple(
        one.to(device, torch.float32, non_blocking=True) if isinstance(one, Tensor) else float(one) for one in values
    )
    return scalars, tuple(isinstance(one, Tensor) for one in values)


@cache
def _language(dtype: torch.dtype) -> Any:
    """Triton's word for a dtype."""
    import triton.language as tl

    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]
