"""What an optimizer is: data and a few functions, in one of three kinds. Nothing here knows tensors of ranks.

- `Elementwise` (AdamW, Lion, Adan): every element is updated by itself.
- `Blockwise` (Adam-mini): blocks of elements (a head, a row) share a value.
- `WholeMatrix` (Shampoo, SWAN, Muon, NorMuon, SOAP): matrices, or tiles of them, are updated whole; what is no matrix
  by another rule.

A rule states everything that anyone asks about an optimizer. No field has a default: what a rule leaves unsaid is a
`TypeError` that names it, when the rule's module is imported.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from numbers import Real
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from ds_optim.kernels import Formula
from ds_optim.kernels import Scalars as Scalars
from ds_optim.kernels.codes import Code
from ds_optim.linalg.packed import order_of, packed_size
from ds_optim.linalg.workers import Stepwise
from ds_optim.roles.role import Role
from ds_optim.sharding.assignment import Tile, Work
from ds_optim.sharding.blocks import BlockGrid
from ds_optim.stack import Stack as Stack

Settings: TypeAlias = Mapping[str, Any]
"""A parameter group's settings by name; of a whole optimizer, its defaults, ``state_dtype``, ``matmul_precision``."""

StateSpec: TypeAlias = tuple[tuple[int, ...], torch.dtype]
"""Shape and dtype of one kind of state."""


class PackedSymmetric(tuple[tuple[int, ...], torch.dtype]):
    """`StateSpec` of a symmetric fp32 matrix of ``order`` rows, kept as `ds_optim.linalg.packed` has it.

    Whoever loads state knows by it that versions up to 0.1.0 kept all ``order * order`` elements, see `kept_whole`.
    """

    __slots__ = ()

    def __new__(cls, order: int) -> PackedSymmetric:
        return super().__new__(cls, ((packed_size(order),), torch.float32))

    @property
    def order(self) -> int:
        return order_of(self[0][0])


# -- what is said of settings -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SettingCheck:
    """What one setting may be.

    Attributes:
        is_good: judges a value that is given.
        wanted: the same in words, behind "must be" or "must".
        is_optional: whether it may be None.
    """

    is_good: Callable[[Any], bool]
    wanted: str
    is_optional: bool

    def problems(self, key: str, value: Any) -> list[str]:
        """What is wrong with a value, as sentences."""
        if value is None and self.is_optional:
            return []
        return [] if self.is_good(value) else [f"{key} must {self.wanted}, not {value!r}"]


def number(is_good: Callable[[float], bool], wanted: str, *, is_optional: bool = False) -> SettingCheck:
    """A real number."""

    def judge(value: Any) -> bool:
        return not isinstance(value, bool) and isinstance(value, Real) and is_good(float(value))

    return SettingCheck(judge, wanted, is_optional)


def whole_number(least: int, of: str = "", *, is_optional: bool = False) -> SettingCheck:
    """A whole number that is not less than ``least``."""

    def judge(value: Any) -> bool:
        return not isinstance(value, bool) and isinstance(value, int) and value >= least

    return SettingCheck(judge, f"be a whole number {of}>= {least}", is_optional)


def one_of(values: Sequence[str], wanted: str = "", *, is_optional: bool = False) -> SettingCheck:
    """One of a few words."""

    def judge(value: Any) -> bool:
        return isinstance(value, str) and value in values

    return SettingCheck(judge, wanted or f"be one of {', '.join(values)}", is_optional)


def flag() -> SettingCheck:
    """True or false."""
    return SettingCheck(lambda value: isinstance(value, bool), "be true or false", is_optional=False)


def no_contradictions(settings: Settings) -> list[str]:
    """Of a rule whose settings can each be judged alone."""
    return []


@dataclass(frozen=True, slots=True)
class Betas:
    """How many decays a rule has, and whether the last may be 1 (a sum instead of an average)."""

    count: int
    last_may_be_one: bool


# -- what is said about a run that goes on from AdamW, and about its batch -------------------------------------------


@dataclass(frozen=True, slots=True)
class AdamMoments:
    r"""What an AdamW run knows of some elements, or of the mean over each block.

    Attributes:
        first: average of gradients, fp32, of any shape; it started at zero (decay ``betas[0]``).
        second: average of squared gradients, likewise (decay ``betas[1]``).
        betas: of that run.
        step: steps that it took, from 1.
    """

    first: Tensor
    second: Tensor
    betas: tuple[float, float]
    step: int

    def first_as(self, beta: float) -> Tensor:
        r"""As an average of another decay after as many steps that estimates the same.

        :math:`(1-\beta^t)\,\hat m`: the value that its reader corrects back to :math:`\hat m`; bit for bit AdamW's
        tensor where the betas are equal.
        """
        return _debiased(self.first, self.betas[0], beta, self.step)

    def second_as(self, beta: float) -> Tensor:
        """Likewise of squares."""
        return _debiased(self.second, self.betas[1], beta, self.step)

    def first_bias(self) -> float:
        """What the first moment is to be divided by to become an estimate."""
        return float(1 - self.betas[0] ** self.step)

    def second_bias(self) -> float:
        """Likewise the second."""
        return float(1 - self.betas[1] ** self.step)

    def shortening(self, beta: float) -> float:
        """The weight of the gradients that the first moment remembers in an average of decay ``beta``; at most 1."""
        return min(1.0, (1 - beta) / (1 - self.betas[0]))


def _debiased(average: Tensor, old: float, new: float, step: int) -> Tensor:
    return average if old == new else average * ((1 - new**step) / (1 - old**step))


class FromAdam(NamedTuple):
    """How a run of AdamW starts a rule's state.

    Attributes:
        state: from moments and a group's settings, the state by key. A rule with state per block is asked twice: with
            the moments of elements for what it keeps per element, with their means over blocks for what it keeps per
            block. A whole-matrix rule is asked for each block, with moments of the block's shape.
        problem: why it cannot under an optimizer's settings, with the remedy; empty if it can.
    """

    state: Callable[[AdamMoments, Settings], Mapping[str, Tensor]]
    problem: Callable[[Settings], str]


def always(settings: Settings) -> str:
    """Of a rule that AdamW's state can start under any settings."""
    return ""


class BatchScaling(NamedTuple):
    """How the learning rate follows the batch size, and where that is from ("judgement" where nobody states it)."""

    law: Literal["sqrt", "linear", "none"]
    source: str


# -- the three kinds --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What all rules state.

    Attributes:
        summary: one line for the table of optimizers in the documentation: when to choose it.
        memory: state in bytes per parameter at fp32, for the same table.
        learning_rate: against AdamW's, for the same table.
        checks: of its settings other than ``lr``, ``betas``, ``eps`` and ``weight_decay``, by name.
        contradictions: what is wrong with settings that are each good by themselves.
        betas: how many, and of what kind.
        from_adam: how AdamW's state starts its own, or why it cannot.
        batch_scaling: of the learning rate.
        element_state: state with one value per element, in ``state_dtype``; of a whole-matrix rule that of its blocks.
        non_negative: which of it is never below zero, in its order; kept in eight bits, that needs no sign.
    """

    summary: str
    memory: str
    learning_rate: str
    checks: Mapping[str, SettingCheck]
    contradictions: Callable[[Settings], list[str]]
    betas: Betas
    from_adam: FromAdam
    batch_scaling: BatchScaling
    element_state: tuple[str, ...]
    non_negative: tuple[str, ...]

    is_elementwise: ClassVar[bool] = False
    """Whether it needs no whole rows, heads or matrices."""

    @property
    def codes(self) -> tuple[Code, ...]:
        """Of what is kept per element, where that is kept in eight bits."""
        return tuple("unsigned" if name in self.non_negative else "signed" for name in self.element_state)


@dataclass(frozen=True, kw_only=True)
class _FusedRule(Rule):
    """What a fused kernel computes, over elements as they lie.

    Attributes:
        name: of the formula, among fused kernels; without one there it runs as written.
        update: the formula, a pure function on fp32 tensors, see `ds_optim.kernels`.
        scalars: its constants for a group at its ``step``-th step (from 1), in the order of its arguments.
    """

    name: str
    update: Callable[..., tuple[Tensor, ...]]
    scalars: Callable[[Settings, int], Scalars]

    @property
    def streams(self) -> int:
        """Tensors of the parameter's size that a step reads or writes: what its time is bound by."""
        return 3 + 2 * len(self.element_state)  # the parameter both ways, the gradient, state both ways


@dataclass(frozen=True, kw_only=True)
class Elementwise(_FusedRule):
    """Every element is updated by itself: ``(param, grad, *states, **scalars) -> (param, *states)``."""

    is_elementwise: ClassVar[bool] = True
    block_state: ClassVar[tuple[str, ...]] = ()

    @cached_property
    def formula(self) -> Formula:
        """As the kernels take it."""
        return Formula(self.name, self.update, len(self.element_state), 0)

    @cached_property
    def coded_formula(self) -> Formula:
        """The same over state in eight bits."""
        return replace(self.formula, codes=self.codes)


@dataclass(frozen=True, kw_only=True)
class Blockwise(_FusedRule):
    """Blocks of elements share a value; the formula takes their mean squared gradient after ``grad``.

    Attributes:
        block_state: state with one value per block, in fp32.
        blocks: the grid of a parameter of a role and a logical shape.
    """

    block_state: tuple[str, ...]
    blocks: Callable[[Role, tuple[int, ...]], BlockGrid]

    @cached_property
    def formula(self) -> Formula:
        """As the kernels take it."""
        return Formula(self.name, self.update, len(self.element_state), len(self.block_state))

    @cached_property
    def coded_formula(self) -> Formula:
        """The same over state in eight bits."""
        return replace(self.formula, codes=self.codes)


class Refresh(NamedTuple):
    """When the blocks of a whole-matrix rule are refreshed.

    Attributes:
        frequency: steps between two refreshes of a block; 1 for a rule without.
        is_staggered: whether blocks refresh in different steps; otherwise all together.
    """

    frequency: int
    is_staggered: bool

    def share(self, count: int) -> int:
        """How many of so many blocks the fullest step refreshes where they are evenly spread."""
        return -(-count // self.frequency) if self.is_staggered else count


@dataclass(frozen=True, kw_only=True)
class WholeMatrix(Rule):
    """Matrices, or tiles of a fixed grid over a parameter, are updated whole, each by its owner.

    ``settings`` are a whole optimizer's, ``group`` is a parameter group's.

    Attributes:
        structure: names of the settings that decide blocks, their state or their schedule: they hold for all groups and
            cannot change.
        tiles: the blocks of a parameter of a role and a logical shape; none if the other rule steps it. ValueError if
            the settings ask for what the role does not know.
        state_of_block: what is kept for a block of a shape, by key.
        work: what a block of a shape costs its owner.
        refresh: when blocks are refreshed.
        update: turns a `Stack`'s gradients into updates, in place, and advances its state. Returns flags (B,) of the
            blocks whose update must be withheld and that all ranks must hear of, by reason. What is best done for many
            stacks at a time it may hand out as jobs, see `ds_optim.linalg.workers`.
        step_size: what updates are multiplied by.
        first_step: of a parameter's steps, from 1, the first that moves its blocks, decay included; those before only
            look at gradients.
        workspace: bytes that the update of a stack takes at its fullest beside gradients and state, by settings, shape
            of a block, how many blocks, and device type. Of a steady step with its share of refreshes; on a CPU of one
            thread and one stack. Counted in tests/test_workspace.py.
        others: the rule of what is no matrix.
    """

    structure: tuple[str, ...]
    tiles: Callable[[Settings, Role, tuple[int, ...]], list[Tile]]
    state_of_block: Callable[[Settings, tuple[int, ...]], Mapping[str, StateSpec]]
    work: Callable[[Settings, tuple[int, ...]], Work]
    refresh: Callable[[Settings], Refresh]
    update: Callable[[Settings, Stack], Mapping[str, Tensor] | Stepwise[Mapping[str, Tensor]]]
    step_size: Callable[[Settings], Any]
    first_step: int
    workspace: Callable[[Settings, tuple[int, ...], int, str], int]
    others: Elementwise


AnyRule: TypeAlias = Elementwise | Blockwise | WholeMatrix


def bytes_of(spec: Mapping[str, StateSpec]) -> int:
    """What is kept, in bytes."""
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in spec.values())


def kept_whole(spec: Mapping[str, StateSpec]) -> dict[str, StateSpec]:
    """The same as versions up to 0.1.0 kept it: symmetric matrices with all of their elements."""
    return {
        key: ((one.order, one.order), one[1]) if isinstance(one, PackedSymmetric) else one for key, one in spec.items()
    }
