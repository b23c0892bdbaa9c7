"""The C++ kernels on CPU tensors, called through their plain C interface; `ds_optim.kernels.build` builds them.

The work runs on the OpenMP threads of torch itself, `torch.get_num_threads()` of them: a second thread pool would
compete with the first one's spinning threads.
"""

from __future__ import annotations

import ctypes
import sys
from array import array
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ds_optim.kernels import codes
from ds_optim.kernels.build import UnavailableError, built_library
from ds_optim.kernels.operands import Formula, FormulaKind, Operands, Scalars, merged
from ds_optim.kernels.rounding import Place, Places, Rounding, Words
from ds_optim.kernels.streams import (
    DTYPES,
    FLOATS,
    Streams,
    check_table,
    check_tensors,
    raise_if_bad,
    rounding_words,
)
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

_SELECT: dict[Select, int] = {"all": 0, "uncut": 1, "cut": 2}


def has(formula: Formula) -> bool:
    """Whether there is a C++ kernel for a formula: one of its name, kind and numbers of states."""
    one = KERNELS.get(formula.name)
    wanted = formula.states, formula.block_states, formula.is_pass
    is_known = one is not None and (one.states, one.block_states, one.is_pass) == wanted
    return is_known and not (formula.is_pass and formula.codes)


_WORD, _POINTER = ctypes.c_int64, ctypes.c_void_p
_CODE_ARGUMENTS = [*[_POINTER] * 5, _WORD, _POINTER, _POINTER, _WORD, _WORD]
_BLOCK_ARGUMENTS = [_POINTER, _POINTER, _WORD, _POINTER, _WORD, _POINTER, _WORD]


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
    word, pointer = _WORD, _POINTER
    spans = [pointer, pointer, pointer, word, pointer, pointer, word]
    blocks = [pointer, pointer, pointer, pointer, word, pointer, word, pointer, word, word, pointer, pointer, word]
    for name, kernel in KERNELS.items():
        function = getattr(loaded, f"ds_optim_{name}")
        function.restype = word
        function.argtypes = [word, *(blocks if kernel.block_states else spans)]
        if not kernel.is_pass:
            coded = getattr(loaded, f"ds_optim_coded_{name}")
            coded.restype = word
            coded.argtypes = [word, *_CODE_ARGUMENTS, *(_BLOCK_ARGUMENTS if kernel.block_states else [word])]
            coded.argtypes += [pointer, pointer, word]
    loaded.ds_optim_partial_sums.restype = word
    loaded.ds_optim_partial_sums.argtypes = [
        *(word, pointer, pointer, pointer, word, pointer, word, pointer, word, word)
    ]
    loaded.ds_optim_descend.restype = None
    loaded.ds_optim_descend.argtypes = [pointer, word, pointer, word, word, word, ctypes.c_float, pointer, word]
    loaded.ds_optim_pack.restype = loaded.ds_optim_unpack.restype = None
    loaded.ds_optim_pack.argtypes = [pointer, pointer, word, word, word]
    loaded.ds_optim_unpack.argtypes = [pointer, pointer, word, word, word, word]
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
    check_table("spans", spans, 3)
    bad = _update_spans(formula, call, spans.data_ptr(), len(spans), operands.scalars, operands.rounding)
    raise_if_bad(bad, spans, None)
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
    formula: Formula, call: Streams, spans: int, count: int, scalars: Scalars, rounding: Rounding | None
) -> int:
    """As many rows of a table at an address; what the C++ side says to them."""
    constants, how = _scalars(formula, scalars), rounding_words(rounding)
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
    call = Streams([("grad", operands.grads)])
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
    raise_if_bad(bad, row_runs, column_runs)


def blockwise(formula: Formula, operands: Operands, select: Select) -> None:
    """`ds_optim.kernels.blockwise`.

    Raises:
        ValueError: there is no kernel for the formula, or a tensor or a table is not what it can work on.
    """
    call = _streams(formula, operands, "blockwise")
    row_runs, column_runs = _runs(operands)
    constants, how = _scalars(formula, operands.scalars), rounding_words(operands.rounding)
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
    raise_if_bad(bad, row_runs, column_runs)
    torch.autograd.graph.increment_version(operands.params)


def partial_maxima(formula: Formula, operands: Operands) -> None:
    """`ds_optim.kernels.partial_maxima`.

    Raises:
        ValueError: as for `coded`.
    """
    _run_coded(formula, operands, "cut", only_maxima=True)


def coded(formula: Formula, operands: Operands, select: Select) -> None:
    """`ds_optim.kernels.coded`.

    Raises:
        ValueError: there is no kernel for the formula, or a tensor or a table is not what it can work on.
    """
    _run_coded(formula, operands, select, only_maxima=False)
    torch.autograd.graph.increment_version(operands.params)


def _run_coded(formula: Formula, operands: Operands, select: Select, *, only_maxima: bool) -> None:
    call, tables = _streams(formula, operands, formula.kind), operands.tables
    scales = Streams([(f"scales {index}", of_state) for index, of_state in enumerate(operands.scales)])
    check_table("code_runs", tables.code_runs, 8)
    known = array("q", [word for code in formula.codes for word in _code_words(code)])
    constants, how = _scalars(formula, operands.scalars), rounding_words(operands.rounding)
    of_codes = [scales.address, scales.numels, tables.code_runs.data_ptr(), len(tables.code_runs)]
    of_codes += [known.buffer_info()[0], operands.cut_maxima.data_ptr(), len(operands.cut_maxima)]
    row_runs, column_runs = _runs(operands)
    if formula.block_states:
        of_blocks = [int(only_maxima), call.slots, row_runs.data_ptr(), len(row_runs), column_runs.data_ptr()]
        of_blocks += [len(column_runs), operands.cut_sums.data_ptr(), operands.cut_sums.numel()]
    else:
        of_blocks = [_SELECT[select], int(only_maxima)]
    bad = getattr(library(), f"ds_optim_coded_{formula.name}")(
        len(operands.params),
        call.address,
        call.numels,
        *of_codes,
        *of_blocks,
        constants.buffer_info()[0],
        how and how.buffer_info()[0],
        torch.get_num_threads(),
    )
    raise_if_bad(
        bad, torch.cat([row_runs, tables.code_runs]) if formula.block_states else tables.code_runs, column_runs
    )


def _code_words(code: codes.Code) -> tuple[int, int, int, int]:
    """A code's tables as the C++ side reads them; they stay where they are."""
    values, places = codes.values(code), codes.places(code)
    return values.data_ptr(), places.data_ptr(), codes.first_place(code), int(code == "signed")


def descend(target: Tensor, update: Tensor, decay: float | Tensor, words: Words) -> None:
    """`ds_optim.kernels.descend`.

    Raises:
        ValueError: a tensor is not what the kernel can work on.
    """
    check_tensors("update", [update])
    if target.dtype not in FLOATS or target.device.type != "cpu" or update.dtype != torch.float32:
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
        how = rounding_words(rounding)  # points into it
        library().ds_optim_descend(
            target.data_ptr() + skipped * target.element_size(),
            DTYPES[target.dtype],
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


def _streams(formula: Formula, operands: Operands, kind: FormulaKind) -> Streams:
    """The streams of a formula's kernel, as many as that reads."""
    states, block_states = operands.states, operands.block_states
    given = len(states), len(block_states)
    if not has(formula) or formula.kind != kind or given != (formula.states, formula.block_states):
        raise ValueError(f"no {kind} C++ kernel named {formula.name!r} with {given[0]} and {given[1]} (block) states")
    elements = (("param", operands.params), ("grad", operands.grads))
    listed = [(f"{'codes' if formula.codes else 'state'} {index}", state) for index, state in enumerate(states)]
    blocks = [("block state", state) for state in block_states]
    return Streams(elements, blocks, listed) if formula.codes else Streams([*elements, *listed], blocks)


def _runs(operands: Operands) -> tuple[Tensor, Tensor]:
    """The tables of blocks, checked as well as the sums that they point into."""
    tables = operands.tables
    check_table("row_runs", tables.row_runs, 8)
    check_table("column_runs", tables.column_runs, 11)
    _check_sums(operands.cut_sums)
    return tables.row_runs, tables.column_runs


def _check_sums(cut_sums: Tensor) -> None:
    if cut_sums.dtype != torch.float64 or not cut_sums.is_contiguous() or cut_sums.device.type != "cpu":
        raise ValueError(f"cut_sums must be a contiguous torch.float64 CPU tensor, not {cut_sums.dtype}")


def _scalars(formula: Formula, scalars: Mapping[str, Any]) -> array[float]:
    return array("f", [float(scalars[key]) for key in KERNELS[formula.name].scalars])
