"""What a step of any kind of rule is made of: the terms that an optimizer and its stepper share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from ds_optim.rule import Settings, StateSpec
from ds_optim.stepping.eight_bits import CodedBlocks
from ds_optim.stepping.logical_tensors import Logical, LogicalParameter, element_ranges
from ds_optim.stepping.options import COMMON
from ds_optim.stepping.shards import Shards

States = Mapping[Tensor, dict[str, Any]]
"""The optimizer's state of its local tensors."""


ShapeRule = Literal["element", "block", "owned block"]
"""What state is kept for: an element, a block of a blockwise rule, or a block at its owner."""


class Together(NamedTuple):
    """What tensors that are stepped together share.

    Attributes:
        group_id: identity of the parameter group.
        step: count of this step, from 1.
        device: of the tensors.
        ranks: the shard group; None for a process on its own.
    """

    group_id: int
    step: int
    device: torch.device
    ranks: dist.ProcessGroup | None


class KeptState(Protocol):
    """How the state of a rule's blocks gets to where it belongs."""

    def fill(self, tensor: Tensor, state: Mapping[str, Tensor]) -> None:
        """Give state that was just made what is not zero at the start."""

    def follow_plan(self, states: States) -> None:
        """Bring state to where it belongs now that other tensors are stepped too: a collective where owners differ."""

    def gathered(self, tensor: Tensor, state: dict[str, Any]) -> dict[str, Any]:
        """A local tensor's state as whichever rank saves it must have it: a collective where owners differ."""

    def mine_of(self, tensor: Tensor, state: dict[str, Any]) -> dict[str, Any]:
        """What of saved state is this rank's, where everyone's was `gathered`, in today's form."""

    def is_anothers(self, tensor: Tensor, state: Mapping[str, Any]) -> bool:
        """Whether saved state is of other blocks than this rank's."""

    def values_of(self, tensor: Tensor, parameter: int, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The whole logical state of a parameter of a local tensor as values: fp32 where it is in eight bits."""


class HeldState:
    """State that lies where its elements do (`KeptState`): it begins at zero, and nobody else has it.

    Args:
        coded: which codes it has in eight bits.
    """

    def __init__(self, coded: CodedBlocks) -> None:
        self._coded = coded

    def fill(self, tensor: Tensor, state: Mapping[str, Tensor]) -> None:
        pass

    def follow_plan(self, states: States) -> None:
        pass

    def gathered(self, tensor: Tensor, state: dict[str, Any]) -> dict[str, Any]:
        return state

    def mine_of(self, tensor: Tensor, state: dict[str, Any]) -> dict[str, Any]:
        return state

    def is_anothers(self, tensor: Tensor, state: Mapping[str, Any]) -> bool:
        return False

    def values_of(self, tensor: Tensor, parameter: int, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = self._coded.decoded({key: values[None] for key, values in state.items()})
        return {key: values[0] for key, values in found.items()}


class Stepper(Protocol):
    """How one rule steps the tensors of some shards, and what it keeps for them. It has no state of its own.

    Attributes:
        shards: whose tensors it steps.
        kept: how its state gets to where it belongs.
        element_state: keys of the state that has one value per element, of all elements or of those in no block.
        element_keys: those of state that has the shape of every local tensor.
    """

    @property
    def shards(self) -> Shards: ...

    @property
    def kept(self) -> KeptState: ...

    @property
    def element_state(self) -> tuple[str, ...]: ...

    @property
    def element_keys(self) -> tuple[str, ...]: ...

    def agreed(self) -> dict[dist.ProcessGroup | None, str]:
        """What the ranks of each shard group must agree on beyond layouts, as a hash; makes what depends on them, on
        all ranks alike."""

    def backends(self, device: torch.device) -> set[str]:
        """The kernels that would be used on a device."""

    def spec(self, tensor: Tensor) -> dict[str, StateSpec]:
        """What is kept for a local tensor, the step count apart."""

    def shape_rule(self, key: str) -> ShapeRule:
        """What there is a value of ``key`` for."""

    def prepare(
        self, together: Mapping[Together, list[Tensor]], groups: Mapping[int, dict[str, Any]], states: States
    ) -> list[Callable[[], None]]:
        """Everything that can be refused is refused here; what is returned changes weights, in order."""

    def logical_state(self, tensor: Tensor) -> list[dict[str, Logical]]:
        """The state of every parameter of a local tensor, by key."""

    def blocks_in_words(self, tensor: Tensor) -> list[str]:
        """The blocks of every parameter of a local tensor; equal words mean equal blocks."""

    def structure(self) -> dict[str, Any]:
        """The settings that decide what state there is."""

    def forget_past(self) -> None:
        """Drop what is remembered of earlier steps: state was written, or loaded."""

    def workspace(self, device_type: str) -> list[tuple[int, int]]:
        """Bytes of exchange buffers and of temporaries at the fullest moments of a step; none where it works in place.

        Args:
            device_type: where matrix algebra runs.
        """

    def buffers(self) -> list[Tensor]:
        """The tensors that are kept from step to step beside state: tables and flags."""


def fresh_state(stepper: Stepper, tensor: Tensor) -> dict[str, Any]:
    """The state of a local tensor before its first step. State per element of a DTensor is a DTensor."""
    state: dict[str, Any] = {"step": torch.zeros((), dtype=torch.float32, device="cpu")}
    for name, (shape, dtype) in stepper.spec(tensor).items():
        if isinstance(tensor, DTensor) and name in stepper.element_state and shape == tuple(tensor.shape):
            state[name] = torch.zeros_like(tensor.detach(), dtype=dtype)
        else:
            state[name] = torch.zeros(shape, dtype=dtype, device=tensor.device)
    stepper.kept.fill(tensor, state)
    return state


def other_structure(stepper: Stepper, settings: Settings) -> list[str]:
    """The names of the settings that decide what state there is and that a group's settings state otherwise."""
    fixed = {key: value for key, value in stepper.structure().items() if key not in COMMON}  # no group's
    return [key for key, value in fixed.items() if settings.get(key, value) != value]


def logical_of(stepper: Stepper) -> dict[Tensor, list[LogicalParameter]]:
    """What is kept for every parameter and which part of it lies on this rank, by local tensor."""
    found = {}
    for tensor in stepper.shards.tensors:
        bound = stepper.shards.of(tensor)
        listed = found[tensor] = [
            LogicalParameter(spec.name, spec.shape, blocks, Logical(spec.numel, tensor.dtype, held, held), state)
            for spec, blocks, held, state in zip(
                bound.layout.parameters,
                stepper.blocks_in_words(tensor),
                element_ranges(bound.layout, bound.rank),
                stepper.logical_state(tensor),
                strict=True,
            )
        ]
        names = set[str]()
        for one in listed:
            if one.name in names:  # another copy of what tensor parallelism does not cut: the first is stored
                for logical in (one.weight, *one.state.values()):
                    logical.written = []
            names.add(one.name)
    return found
