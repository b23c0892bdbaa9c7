"""The drivers on Triton: as many launches per call as there are programs in it, whatever the number of tensors.

AdamW, Lion and Adan have one, and over state in eight bits two more where blocks are cut; a pass of a whole-matrix rule
has one; Adam-mini has one for wide blocks, one for each width of narrow ones, four for those that a shard boundary
cuts, and four for whole ones that are columns or huge, six where there are both columns and others. Tensors of other
dtypes are other launches. Nothing is filled beforehand: the sums of cut blocks come here as zeros, from whoever adds
them up over the ranks.
Nothing waits, and nothing is copied while tensors stay where they are.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ds_optim.kernels import codes, native
from ds_optim.kernels.operands import Formula, Operands, Scalars, merged
from ds_optim.kernels.rounding import Words
from ds_optim.kernels.tables import Select
from ds_optim.kernels.triton import launches
from ds_optim.kernels.triton.launches import Dtypes, LaunchGroup
from ds_optim.known_torch import compiles_codes, current

PROGRAMS = frozenset(("adamw", "lion", "adan", "momentum", "adam_graft", "adam_mini"))
"""The names of the formulas that there are programs for."""

_FUSION = {"enable_fp_fusion": False}
"""No contraction: a block must not depend on how it is cut."""


def has(formula: Formula) -> bool:
    """Whether there is a program for a formula: one of its name, kind and numbers of states, which compiles here."""
    if formula.codes and (formula.block_states or not compiles_codes(formula.states, torch.version.hip)):
        return False
    return formula.name in PROGRAMS and native.has(formula)


def serves(device_type: str) -> bool:
    """Whether the programs run on a kind of device: on CPUs in Triton's interpreter alone, where they are tested."""
    return device_type in ("cuda", "xpu") or os.environ.get("TRITON_INTERPRET") == "1"


kept = launches.kept


@torch.no_grad()
def elementwise(formula: Formula, operands: Operands) -> None:
    """`ds_optim.kernels.elementwise`."""
    if not operands.params:
        return
    from ds_optim.kernels.triton import access, elements

    with current(operands.params[0].device):
        scalars = _scalars(formula, operands.scalars, operands.params[0].device)
        for dtypes, group in launches.together(operands, (operands.tables.spans,), launches.spans).items():
            rows = group.rows["update_rows"]
            elements.update_rows[(len(rows),)](
                elements.ARITHMETIC[formula.name],
                *_tensors(dtypes, group),
                rows,
                *_rounding(dtypes, operands),
                *scalars,
                access.THREADS * 16 // min(dtype.itemsize for dtype in dtypes),
                **_options(),
            )
    torch.autograd.graph.increment_version(operands.params)


@torch.no_grad()
def one_pass(formula: Formula, values: Tensor, states: Sequence[Tensor], scalars: Scalars) -> None:
    """`ds_optim.kernels.one_pass`."""
    from ds_optim.kernels.triton import access, elements

    streams = (values, *states)
    if not all(one.is_contiguous() and one.numel() == values.numel() for one in streams):
        raise ValueError("a pass is over contiguous tensors of one size")
    is_aligned = not any(one.data_ptr() % 16 for one in streams)
    with current(values.device):
        elements.update_all[(-(-values.numel() // launches.ROW),)](
            elements.ARITHMETIC[formula.name],
            streams,
            values.numel(),
            *_scalars(formula, scalars, values.device),
            is_aligned,
            launches.ROW,
            access.THREADS * 16 // min(one.itemsize for one in streams),
            **_options(),
        )
    torch.autograd.graph.increment_version(values)


@torch.no_grad()
def partial_sums(operands: Operands) -> None:
    """`ds_optim.kernels.partial_sums`."""
    if not operands.params:
        return
    with current(operands.params[0].device):
        for dtypes, group in _blocks(operands):
            if "cut" in group.rows:
                _sum("cut", dtypes, group, operands.cut_sums)


@torch.no_grad()
def blockwise(formula: Formula, operands: Operands, select: Select) -> None:
    """`ds_optim.kernels.blockwise`."""
    if not operands.params:
        return
    with current(operands.params[0].device):
        scalars = _scalars(formula, operands.scalars, operands.params[0].device)
        for dtypes, group in _blocks(operands):
            how = (*_rounding(dtypes, operands), *scalars)
            if select != "cut":
                _update_whole(dtypes, group, how)
                if "whole" in group.rows:
                    sums = torch.empty(len(group.rows["whole"]), dtype=torch.float64, device=operands.params[0].device)
                    _sum("whole", dtypes, group, sums)
                    _update("whole", dtypes, group, sums, how)
            if select != "uncut" and "cut" in group.rows:
                _update("cut", dtypes, group, operands.cut_sums, how)
    torch.autograd.graph.increment_version(operands.params)


@torch.no_grad()
def partial_maxima(formula: Formula, operands: Operands) -> None:
    """`ds_optim.kernels.partial_maxima`."""
    _run_coded(formula, operands, "cut", only_maxima=True)


@torch.no_grad()
def coded(formula: Formula, operands: Operands, select: Select) -> None:
    """`ds_optim.kernels.coded`."""
    _run_coded(formula, operands, select, only_maxima=False)
    torch.autograd.graph.increment_version(operands.params)


def _run_coded(formula: Formula, operands: Operands, select: Select, *, only_maxima: bool) -> None:
    if not operands.params:
        return
    from ds_optim.kernels.triton import code_blocks, elements

    device = operands.params[0].device
    with current(device):
        scalars = _scalars(formula, operands.scalars, device)
        tables = [tuple(codes.table(of, code, device) for code in formula.codes) for of in (codes.values, codes.places)]
        first = tuple(codes.first_place(code) for code in formula.codes)
        signed = tuple(code == "signed" for code in formula.codes)
        layout = (operands.tables.code_runs,)
        for dtypes, group in launches.together(operands, layout, launches.code_blocks).items():
            for name, excluded in (("whole codes", "cut"), ("cut codes", "uncut")):
                rows = group.rows.get(name)
                if rows is None or select == excluded:
                    continue
                code_blocks.update_codes[(len(rows),)](
                    elements.ARITHMETIC[formula.name],
                    *_tensors(dtypes, group),
                    rows,
                    operands.cut_maxima,
                    *_rounding(dtypes, operands),
                    *tables,
                    first,
                    signed,
                    *scalars,
                    name == "cut codes",
                    only_maxima,
                    launches.CODE_BLOCKS if name == "whole codes" else 1,
                    **_options(),
                )


@torch.no_grad()
def descend(target: Tensor, update: Tensor, decay: float | Tensor, words: Words) -> None:
    """`ds_optim.kernels.descend`."""
    from ds_optim.kernels.triton import access, elements

    factor = decay.to(target.device, torch.float32) if isinstance(decay, Tensor) else float(decay)
    is_rounded = bool(words) and target.dtype == torch.bfloat16
    identity, first, key = words or (0, 0, 0)
    *outer, (rows, stride), (columns, _) = merged(target)
    done = 0
    with current(target.device):
        for corner in itertools.product(*(range(size) for size, _ in outer)):
            skipped = sum(index * step for index, (_, step) in zip(corner, outer, strict=True))
            # One axis: along the others a grid ends at 65,535, which 67 million elements in one row would exceed.
            elements.descend_rows[(rows * -(-columns // access.BLOCK),)](
                target.as_strided((rows, columns), (stride, 1), target.storage_offset() + skipped),
                update.view(-1)[done : done + rows * columns],
                *(rows, columns, stride, factor, isinstance(factor, Tensor)),
                *(identity, first + skipped, key, is_rounded, access.BLOCK),
                **_options(),
            )
            done += rows * columns
    torch.autograd.graph.increment_version(target)


@cache
def _options() -> dict[str, Any]:
    """Of a launch: as many warps as have the threads that the programs are written for, 64 each on some of AMD's."""
    from ds_optim.kernels.triton import access

    if os.environ.get("TRITON_INTERPRET") == "1":
        return _FUSION
    import triton

    return {**_FUSION, "num_warps": access.THREADS // triton.runtime.driver.active.get_current_target().warp_size}


How = tuple[int, bool, tuple[Any, ...], tuple[bool, ...]]
"""What programs take of `_rounding` and of `_scalars`."""


def _blocks(operands: Operands) -> Iterable[tuple[Dtypes, LaunchGroup]]:
    tables = operands.tables
    return launches.together(operands, (tables.row_runs, tables.column_runs), launches.blocks).items()


def _update_whole(dtypes: Dtypes, group: LaunchGroup, how: How) -> None:
    """Blocks of neighbouring elements, each in one program."""
    from ds_optim.kernels.triton import access, blocks

    for width, rows in group.rows.items():
        common = (*_tensors(dtypes, group), rows, *how)
        if width == "wide":
            blocks.update_wide_blocks[(len(rows),)](*common, access.BLOCK, **_options())
        elif width.isdecimal():
            tile = launches.NARROW[int(width)], int(width)
            blocks.update_narrow_blocks[(len(rows),)](*common, *tile, **_options())


def _sum(which: str, dtypes: Dtypes, group: LaunchGroup, sums: Tensor) -> None:
    """Add this rank's squares to the sums of cut blocks; or make those of whole ones that are columns or huge."""
    from ds_optim.kernels.triton import access, blocks

    known, parts, tiles = (group.rows.get(f"{which}{of}") for of in ("", " parts", " sums"))
    assert known is not None
    partials = torch.empty(group.partials[which], dtype=torch.float64, device=sums.device)  # all are written
    if parts is not None:
        blocks.sum_rows[(len(parts),)](*_tensors(dtypes, group), parts, partials, access.BLOCK, **_options())
    if tiles is not None:
        tile = launches.HIGH, launches.BROAD
        blocks.sum_columns[(len(tiles),)](*_tensors(dtypes, group), tiles, partials, *tile, **_options())
    blocks.add_up[(len(known),)](known, partials, sums, which == "cut", launches.BROAD, **_options())


def _update(which: str, dtypes: Dtypes, group: LaunchGroup, sums: Tensor, how: How) -> None:
    """Blocks whose sums are known."""
    from ds_optim.kernels.triton import access, blocks

    known, parts, tiles = (group.rows.get(f"{which}{of}") for of in ("", " parts", " updates"))
    assert known is not None
    factors = torch.empty(len(known), dtype=torch.float32, device=sums.device)
    words, addresses, count = _tensors(dtypes, group)
    blocks.advance_known[(len(known),)](addresses, count, known, sums, factors, *how[2:], **_options())
    if parts is not None:
        blocks.update_cut_rows[(len(parts),)](words, addresses, count, parts, factors, *how, access.BLOCK, **_options())
    if tiles is not None:
        tile = launches.HIGH, launches.BROAD
        blocks.update_columns[(len(tiles),)](words, addresses, count, tiles, factors, *how, *tile, **_options())


def _tensors(dtypes: Dtypes, group: LaunchGroup) -> tuple[Any, Any, int]:
    """What every program begins with: Triton's words for the dtypes, the addresses, and how many tensors there are."""
    return tuple(map(_language, dtypes)), group.addresses, len(group.members)


def _rounding(dtypes: Dtypes, operands: Operands) -> tuple[int, bool]:
    """The key of the step, and whether parameters are rounded by it."""
    if operands.rounding is None or dtypes[0] != torch.bfloat16:
        return 0, False
    return operands.rounding.key, True


def _scalars(formula: Formula, given: Scalars, device: torch.device) -> tuple[tuple[Any, ...], tuple[bool, ...]]:
    """The formula's scalars, in the order of its program, and which of them lie on the device."""
    values = [given[name] for name in native.KERNELS[formula.name].scalars]
    pointed = tuple(isinstance(one, Tensor) and one.device == device for one in values)  # the host reads its own
    scalars = tuple(
        one.to(torch.float32) if lies_there and isinstance(one, Tensor) else float(one)
        for one, lies_there in zip(values, pointed, strict=True)
    )
    return scalars, pointed


@cache
def _language(dtype: torch.dtype) -> Any:
    """Triton's word for a dtype."""
    import triton.language as tl

    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.uint8: tl.uint8}[
        dtype
    ]
