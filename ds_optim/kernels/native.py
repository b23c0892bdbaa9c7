"""The C++ kernels on CPU tensors, called through their plain C interface; `ds_optim.kernels.build` builds them.

The work runs on the OpenMP threads of torch itself, `torch.get_num_threads()` of them: a second thread pool would
compete with the first one's spinning threads.
"""

from __future__ import annotations

import ctypes
import sys
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ds_optim.kernels.build import UnavailableError, built_library
from ds_optim.kernels.operands import Formula, FormulaKind, Operands, Scalars, merged
from ds_optim.kernels.rounding import Place, Places, Rounding, Words
from ds_optim.kernels.tables import Select, Tables


class CppKernel(NamedTuple):
    """What a C++ kernel computes, as far as it can be told from outside.

    Attributes:
        states, block_states, is_pass: as in `Formula`.
        scalars: their names, in the order of the fields of the C++ struct.
    """

    states: int
    block_states: int
    scalars: tuple[str, ...]
    is_pass: bool = False


_ADAM = ("decay", "one_minus_beta1", "beta2", "one_minus_beta2", "step_size", "bias2_sqrt", "eps")
_LION = ("decay", "beta1", "one_minus_beta1", "beta2", "one_minus_beta2", "lr")
_ADAN = (
    *("decay", "beta1", "one_minus_beta1", "beta2", "one_minus_beta2", "beta3", "one_minus_beta3"),
    *("step_size", "step_size_diff", "bias3_sqrt", "eps", "shrink", "has_previous"),
)
_MOMENTUM = ("beta", "weight", "of_average", "of_gradient")
_GRAFT = ("beta1", "one_minus_beta1", "beta2", "one_minus_beta2", "bias1", "bias2", "eps")

KERNELS = {
    "adamw": CppKernel(states=2, block_states=0, scalars=_ADAM),
    "lion": CppKernel(states=1, block_states=0, scalars=_LION),
    "adan": CppKernel(states=4, block_states=0, scalars=_ADAN),
    "momentum": CppKernel(states=1, block_states=0, scalars=_MOMENTUM, is_pass=True),
    "adam_graft": CppKernel(states=2, block_states=0, scalars=_GRAFT, is_pass=True),
    "adam_mini": CppKernel(states=1, block_states=1, scalars=_ADAM),
}
"""All C++ kernels of formulas, by name: what this table has, `library` has."""

_dtype_of = attrgetter("dtype")
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_SELECT: dict[Select, int] = {"all": 0, "uncut": 1, "cut": 2}


def has(formula: Formula) -> bool:
    """Whether there is a C++ kernel for a formula: one of its name, kind and numbers of states."""
    one = KERNELS.get(formula.name)
    wanted = formula.states, formula.block_states, formula.is_pass
    return one is not None and (one.states, one.block_states, one.is_pass) == wanted


@cache
def library() -> ctypes.CDLL:
    """The loaded kernels, built if this is the first use on this machine.

    Raises:
        UnavailableError: they cannot be built or loaded here; the message says why.
    """
    path = built_library()
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as problem:
        raise UnavailableError(f"the build cannot be loaded: {problem}") from problem
    loaded.ds_optim_use_threads.restype = None
    loaded.ds_optim_use_threads.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    word, pointer = ctypes.c_int64, ctypes.c_void_p
    spans = [pointer, pointer, pointer, word, pointer, pointer, word]
    blocks = [pointer, pointer, pointer, pointer, word, pointer, word, pointer, word, word, pointer, pointer, word]
    for name, kernel in KERNELS.items():
        function = getattr(loaded, f"ds_optim_{name}")
        function.restype = word
        function.argtypes = [word, *(blocks if kernel.block_states else spans)]
    loaded.ds_optim_partial_sums.restype = word
    loaded.ds_optim_partial_sums.argtypes = [
        *(word, pointer, pointer, pointer, word, pointer, word, pointer, word, word)
    ]
    loaded.ds_optim_descend.restype = None
    loaded.ds_optim_descend.argtypes = [pointer, word, pointer, word, word, word, ctypes.c_float, pointer, word]
    _lend_threads(loaded)
    return loaded


def _lend_threads(loaded: ctypes.CDLL) -> None:
    """Hand over torch's OpenMP runtime, found among what libtorch_cpu itself is linked with.

    Both GNU's and LLVM's runtime have these symbols. Without them the kernels start threads of their own.
    """
    suffix = {"darwin": "dylib"}.get(sys.platform, "so")
    try:
        openmp = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / f"libtorch_cpu.{suffix}"))
        region = ctypes.cast(openmp.GOMP_parallel, ctypes.c_void_p)
        number = ctypes.cast(openmp.omp_get_thread_num, ctypes.c_void_p)
    except (OSError, AttributeError):
        return
    loaded.ds_optim_use_threads(region, number)


def elementwise(formula: Formula, operands: Operands) -> None:
    """`ds_optim.kernels.elementwise`.

    Raises:
        ValueError: there is no kernel for the formula, or a tensor or a table is not what it can work on.
    """
    call, spans = _streams(formula, operands, "elementwise"), operands.tables.spans
    _check_table("spans", spans, 3)
    bad = _update_spans(formula, call, spans.data_ptr(), len(spans), operands.scalars, operands.rounding)
    _raise_if_bad(bad, spans, None)
    torch.autograd.graph.increment_version(operands.params)


def one_pass(formula: Formula, values: Tensor, states: Sequence[Tensor], scalars: Scalars) -> None:
    """`ds_optim.kernels.one_pass`.

    Raises:
        ValueError: there is no kernel for the formula, or a tensor is not what it can work on.
    """
    no_sums = torch.empty(0, device="cpu")
    operands = Operands([values], [values], [[one] for one in states], [], Tables(), scalars, None, no_sums)
    call, everything = _streams(formula, operands, "elementwise"), array("q", [0, 0, values.numel()])
    _update_spans(formula, call, everything.buffer_info()[0], 1, scalars, None)
    torch.autograd.graph.increment_version(values)


def _update_spans(
    formula: Formula, call: _Streams, spans: int, count: int, scalars: Scalars, rounding: Rounding | None
) -> int:
    """As many rows of a table at an address; what the C++ side says to them."""
    constants, how = _scalars(formula, scalars), _rounding(rounding)
    bad: int = getattr(library(), f"ds_optim_{formula.name}")(
        call.tensors,
        call.address,
        call.numels,
        spans,
        count,
        constants.buffer_info()[0],
        how and how.buffer_info()[0],
        torch.get_num_threads(),
    )
    return bad


def partial_sums(operands: Operands) -> None:
    """`ds_optim.kernels.partial_sums`.

    Raises:
        ValueError: a tensor or a table is not what the kernels can work on.
    """
    call = _Streams([("grad", operands.grads)])
    row_runs, column_runs = _runs(operands)
    bad = library().ds_optim_partial_sums(
        len(operands.grads),
        call.address,
        call.numels,
        row_runs.data_ptr(),
        len(row_runs),
        column_runs.data_ptr(),
        len(column_runs),
        operands.cut_sums.data_ptr(),
        operands.cut_sums.numel(),
        torch.get_num_threads(),
    )
    _raise_if_bad(bad, row_runs, column_runs)


def blockwise(formula: Formula, operands: Operands, select: Select) -> None:
    """`ds_optim.kernels.blockwise`.

    Raises:
        ValueError: there is no kernel for the formula, or a tensor or a table is not what it can work on.
    """
    call = _streams(formula, operands, "blockwise")
    row_runs, column_runs = _runs(operands)
    constants, how = _scalars(formula, operands.scalars), _rounding(operands.rounding)
    bad = getattr(library(), f"ds_optim_{formula.name}")(
        len(operands.params),
        call.address,
        call.numels,
        call.slots,
        row_runs.data_ptr(),
        len(row_runs),
        column_runs.data_ptr(),
        len(column_runs),
        operands.cut_sums.data_ptr(),
        operands.cut_sums.numel(),
        _SELECT[select],
        constants.buffer_info()[0],
        how and how.buffer_info()[0],
        torch.get_num_threads(),
    )
    _raise_if_bad(bad, row_runs, column_runs)
    torch.autograd.graph.increment_version(operands.params)


def descend(target: Tensor, update: Tensor, decay: float | Tensor, words: Words) -> None:
    """`ds_optim.kernels.descend`.

    Raises:
        ValueError: a tensor is not what the kernel can work on.
    """
    _check_tensors("update", [update])
    if target.dtype not in _DTYPES or target.device.type != "cpu" or update.dtype != torch.float32:
        raise ValueError(
            f"the C++ kernel subtracts fp32 from fp32, bf16 or fp16 on the CPU, not {update.dtype} from {target.dtype}"
        )
    *outer, (rows, row_stride), (columns, _) = merged(target)
    number, begin = float(decay), 0
    for corner in product(*(range(size) for size, _ in outer)):
        skipped = sum(index * stride for index, (_, stride) in zip(corner, outer, strict=True))
        length = (rows - 1) * row_stride + columns
        rounding = None
        if words and target.dtype == torch.bfloat16:
            identity, first, key = words
            rounding = Rounding(key, Places([Place(0, 0, length, identity, first + skipped)]))
        how = _rounding(rounding)  # points into it
        library().ds_optim_descend(
            target.data_ptr() + skipped * target.element_size(),
            _DTYPES[target.dtype],
            update.data_ptr() + begin * update.element_size(),
            rows,
            columns,
            row_stride,
            number,
            how and how.buffer_info()[0],
            torch.get_num_threads(),
        )
        begin += rows * columns
    torch.autograd.graph.increment_version(target)


_ABSENT = 1 << 62
"""The size of a gradient that is None: any row of a table fits it, and nothing is read."""


@dataclass(frozen=True, slots=True)
class _Stream:
    """One stream: addresses, dtypes and sizes of all its tensors, also in the layout that the C++ side reads."""

    addresses: list[int]
    dtypes: list[torch.dtype]
    numels: list[int]
    words: array[int]


_recent: dict[tuple[str, int, int], _Stream] = {}
"""Streams of recent calls: hundreds of parameters keep their memory from step to step."""
_RECENT_LIMIT = 256


def _stream(label: str, tensors: Sequence[Tensor | None]) -> _Stream:
    """The tensors as a stream, checked unless it equals a recent one."""
    try:
        addresses = list(map(Tensor.data_ptr, cast("Sequence[Tensor]", tensors)))
        dtypes = list(map(_dtype_of, tensors))
        numels = list(map(Tensor.numel, cast("Sequence[Tensor]", tensors)))
    except TypeError:  # some gradient is None
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        dtypes = [torch.float32 if tensor is None else tensor.dtype for tensor in tensors]
        numels = [_ABSENT if tensor is None else tensor.numel() for tensor in tensors]
    key = (label, len(addresses), addresses[0] if addresses else 0)
    known = _recent.get(key)
    if known is not None and known.addresses == addresses and known.dtypes == dtypes and known.numels == numels:
        return known
    _check_tensors(label, tensors)
    codes = [_DTYPES[dtype] for dtype in dtypes]
    stream = _Stream(addresses, dtypes, numels, array("q", [*addresses, *codes, *numels]))
    if len(addresses) > 1:  # a single one is soon made, and stacks of blocks have hundreds
        if len(_recent) >= _RECENT_LIMIT:
            _recent.clear()
        _recent[key] = stream
    return stream


class _Streams:
    """A call's tensors: the first streams have one value per element, those in ``blocks`` one per block.

    Attributes:
        tensors: how many.
        address: of the array of the streams' tables.
        numels: address of the sizes of the first stream's tensors.
        slots: address of the sizes of the last stream's tensors.
    """

    def __init__(
        self,
        streams: Sequence[tuple[str, Sequence[Tensor | None]]],
        blocks: Sequence[tuple[str, Sequence[Tensor]]] = (),
    ) -> None:
        tables = [_stream(label, tensors) for label, tensors in (*streams, *blocks)]
        first = tables[0]
        for (label, _), table in zip((*streams, *blocks), tables, strict=True):
            if len(table.numels) != len(first.numels):
                raise ValueError(f"{len(table.numels)} tensors as {label}, {len(first.numels)} as {streams[0][0]}")
        for (label, _), table in zip(streams, tables, strict=False):
            if table.numels != first.numels and any(
                a != b for a, b in zip(first.numels, table.numels, strict=True) if b != _ABSENT
            ):
                raise ValueError(f"{label} and {streams[0][0]} differ in size: {table.numels} and {first.numels}")
        for label, tensors in blocks:
            if any(tensor.dtype != torch.float32 for tensor in tensors):
                raise ValueError(f"every {label} must be torch.float32")
        self.tensors = len(first.numels)
        self._tables = tables  # kept alive: the C++ side points into them
        self._pointers = array("q", [table.words.buffer_info()[0] for table in tables])
        self.address = self._pointers.buffer_info()[0]
        sizes_at = 2 * len(first.numels) * first.words.itemsize
        self.numels = tables[0].words.buffer_info()[0] + sizes_at
        self.slots = tables[-1].words.buffer_info()[0] + sizes_at


def _streams(formula: Formula, operands: Operands, kind: FormulaKind) -> _Streams:
    """The streams of a formula's kernel, as many as that reads."""
    states, block_states = operands.states, operands.block_states
    given = len(states), len(block_states)
    if not has(formula) or formula.kind != kind or given != (formula.states, formula.block_states):
        raise ValueError(f"no {kind} C++ kernel named {formula.name!r} with {given[0]} and {given[1]} (block) states")
    elements = (("param", operands.params), ("grad", operands.grads))
    return _Streams(
        [*elements, *((f"state {index}", state) for index, state in enumerate(states))],
        [("block state", state) for state in block_states],
    )


def _runs(operands: Operands) -> tuple[Tensor, Tensor]:
    """The tables of blocks, checked as well as the sums that they point into."""
    tables = operands.tables
    _check_table("row_runs", tables.row_runs, 8)
    _check_table("column_runs", tables.column_runs, 11)
    _check_sums(operands.cut_sums)
    return tables.row_runs, tables.column_runs


def _check_tensors(label: str, tensors: Sequence[Tensor | None]) -> None:
    problems = set()
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.device.type != "cpu":
            problems.add(f"{label} is on {tensor.device}")
        if not tensor.is_contiguous():
            problems.add(f"{label} is not contiguous")
        if tensor.dtype not in _DTYPES:
            problems.add(f"{label} is {tensor.dtype}")
    if problems:
        raise ValueError(
            f"the C++ kernels work on contiguous fp32, bf16 or fp16 CPU tensors: {', '.join(sorted(problems))}"
        )


def _check_table(label: str, table: Tensor, columns: int) -> None:
    if table.dtype != torch.int64 or table.dim() != 2 or table.shape[1] != columns or not table.is_contiguous():
        raise ValueError(
            f"{label} must be a contiguous int64 tensor of shape (n, {columns}), not {tuple(table.shape)} {table.dtype}"
        )


def _check_sums(cut_sums: Tensor) -> None:
    if cut_sums.dtype != torch.float64 or not cut_sums.is_contiguous() or cut_sums.device.type != "cpu":
        raise ValueError(f"cut_sums must be a contiguous torch.float64 CPU tensor, not {cut_sums.dtype}")


def _raise_if_bad(code: int, rows: Tensor, columns: Tensor | None) -> None:
    """Codes count rows of the first table from 1 upwards, of the second from -1 downwards."""
    if code == 0:
        return
    row = rows[code - 1] if code > 0 or columns is None else columns[-code - 1]
    raise ValueError(f"a row of the table does not fit the tensors or contradicts itself: {row.tolist()}")


def _rounding(rounding: Rounding | None) -> array[int] | None:
    """As the C++ side reads it; alive as long as ``rounding``."""
    if rounding is None:
        return None
    table = rounding.places.table
    return array("q", [table.data_ptr(), len(table), rounding.key])


def _scalars(formula: Formula, scalars: Mapping[str, Any]) -> array[float]:
    return array("f", [float(scalars[key]) for key in KERNELS[formula.name].scalars])
