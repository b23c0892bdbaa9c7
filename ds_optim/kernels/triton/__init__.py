"""The drivers on Triton: one launch per call, whatever the number of tensors, over tables that lie on the device.

A launch's tables are sent when they change: the rows with the layout, the addresses when a tensor has another place in
memory, as gradients have that are freed between steps. Tensors of other dtypes are another launch. Nothing waits.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ds_optim.kernels import compiled, eager, native
from ds_optim.kernels.operands import Formula, Operands
from ds_optim.kernels.rounding import Places
from ds_optim.kernels.tables import Select

_WORD = 1 << 32  # indices of a row have the same high word
_STEP = 8  # elements: 16 bytes of the shortest format

Dtypes = tuple[torch.dtype, ...]


PROGRAMS = frozenset(("adamw", "lion", "adan"))
"""The names of the formulas that there are programs for."""


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


@dataclass(slots=True)
class _Launch:
    """The tensors of a call that have the same dtypes.

    Attributes:
        members: their indices in the call.
        rows: int64 (programs, 5) on the device, see `programs.update_rows`.
        words: of `addresses`, as they were sent.
        addresses: int64 (streams + 1, members) on the device.
    """

    members: list[int]
    rows: Tensor
    words: list[list[int]] = field(default_factory=list)
    addresses: Tensor | None = None


_known: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""{spans: {(dtypes of all tensors, device, places): {dtypes: _Launch}}}"""


@torch.no_grad()
def elementwise(formula: Formula, operands: Operands) -> None:
    """`ds_optim.kernels.elementwise`."""
    if not operands.params:
        return
    from ds_optim.kernels.triton import programs

    device = operands.params[0].device
    scalars = tuple(_scalar(operands.scalars[name], device) for name in native.KERNELS[formula.name].scalars)
    for dtypes, launch in _launches(operands).items():
        _send_addresses(launch, operands)
        is_rounded = operands.rounding is not None and dtypes[0] == torch.bfloat16
        programs.update_rows[(len(launch.rows),)](
            programs.ARITHMETIC[formula.name],
            tuple(map(_language, dtypes)),
            launch.addresses,
            len(launch.members),
            launch.rows,
            operands.rounding.key if is_rounded and operands.rounding is not None else 0,
            scalars,
            tuple(isinstance(scalar, Tensor) for scalar in scalars),
            is_rounded,
            programs.ROW,
            programs.BLOCK,
            num_warps=4,
            enable_fp_fusion=False,
        )
    torch.autograd.graph.increment_version(operands.params)


def partial_sums(operands: Operands) -> None:
    """`ds_optim.kernels.partial_sums`."""
    compiled.partial_sums(operands)


def blockwise(formula: Formula, operands: Operands, select: Select) -> None:
    """`ds_optim.kernels.blockwise`."""
    compiled.blockwise(formula, operands, select)


def descend(target: Tensor, update: Tensor, decay: float | Tensor, identity: int, first: int, key: int) -> None:
    """`ds_optim.kernels.descend`."""
    compiled.descend(target, update, decay, identity, first, key)


def _launches(operands: Operands) -> dict[Dtypes, _Launch]:
    """What a call launches, from an earlier call if its tables and dtypes are the same."""
    spans, rounding = operands.tables.spans, operands.rounding
    streams: Sequence[Sequence[Tensor | None]] = (operands.params, operands.grads, *operands.states)
    dtypes = tuple(tuple(_dtype(tensor, streams[0][i]) for i, tensor in enumerate(stream)) for stream in streams)
    device = operands.params[0].device
    key = (dtypes, device, None if rounding is None else id(rounding.places))
    known: dict[Any, tuple[Places | None, dict[Dtypes, _Launch]]] = _known.setdefault(spans, {})
    if key not in known:
        by_dtypes: dict[Dtypes, list[int]] = {}
        for index, of_tensor in enumerate(zip(*dtypes, strict=True)):
            by_dtypes.setdefault(of_tensor, []).append(index)
        listed = np.array(list(_rows(operands)), dtype=np.int64).reshape(-1, 5)
        made = {}
        for of_tensor, members in by_dtypes.items():
            place = np.full(len(operands.params), -1)
            place[members] = np.arange(len(members))
            rows = listed[place[listed[:, 0]] >= 0]
            rows[:, 0] = place[rows[:, 0]]
            if len(rows):
                made[of_tensor] = _Launch(members, _sent(rows, device))
        known[key] = None if rounding is None else rounding.places, made  # kept: its id is part of the key
    return known[key][1]


def _rows(operands: Operands) -> Iterator[tuple[int, int, int, int, int]]:
    """The spans in rows, cut so that as many elements as can be are in whole ones."""
    from ds_optim.kernels.triton import programs

    rounding = operands.rounding
    for tensor, start, length in eager.placed_spans(operands):
        identity, first, _ = eager.words_at(rounding, operands.params[tensor], tensor, start) or (0, 0, 0)
        stop = start + length
        head = min(stop, start + -start % _STEP)
        edges = {start, head, *range(head, stop, programs.ROW), stop}
        if rounding is not None:
            edges |= {start + carry - first for carry in range(first + _WORD - first % _WORD, first + length, _WORD)}
        for begin, end in itertools.pairwise(sorted(edges)):
            yield tensor, begin, end - begin, identity, first + begin - start


def _send_addresses(launch: _Launch, operands: Operands) -> None:
    """Have the device know where the tensors are."""
    streams = (operands.params, operands.grads, *operands.states)
    words = [[_address(stream[index]) for index in launch.members] for stream in streams]
    if words != launch.words:
        aligned = [int(all(word and not word % 16 for word in of_tensor)) for of_tensor in zip(*words, strict=True)]
        launch.words, launch.addresses = words, _sent(np.array([*words, aligned]), operands.params[0].device)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _dtype(tensor: Tensor | None, param: Tensor | None) -> torch.dtype:
    """A gradient that is missing makes no launch of its own."""
    found = param if tensor is None else tensor
    assert found is not None
    return found.dtype


def _sent(words: Any, device: torch.device) -> Tensor:
    """An int64 table on the device: from pinned memory, so that nothing waits for it."""
    table = torch.from_numpy(np.ascontiguousarray(words, dtype=np.int64))
    return table if device.type == "cpu" else table.pin_memory().to(device, non_blocking=True)


def _scalar(value: float | Tensor, device: torch.device) -> float | Tensor:
    return value.to(device, torch.float32, non_blocking=True) if isinstance(value, Tensor) else float(value)


@cache
def _language(dtype: torch.dtype) -> Any:
    """Triton's word for a dtype."""
    import triton.language as tl

    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]
