"""Before the first step over tensors, or when an engine's are bound: do all ranks see the same, can it be exact?"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from ds_optim.errors import raise_all
from ds_optim.listing import first_of
from ds_optim.rule import AnyRule, WholeMatrix
from ds_optim.sharding import dtensor
from ds_optim.sharding.binding import Binding, BoundTensor, local_grad, locals_of, verify
from ds_optim.sharding.exchange import Ranks, from_all_ranks
from ds_optim.sharding.layout import Replicated
from ds_optim.stepping.eight_bits import EIGHT_BITS
from ds_optim.stepping.options import Options, kind_problems
from ds_optim.stepping.shards import Shards
from ds_optim.stepping.stepper import Stepper


class Agreement:
    """What was compared over the ranks already.

    Args:
        owner: the optimizer's name, for messages.
        rule: its rule, which needs whole rows, heads or matrices unless it is elementwise.
        options: its options.
    """

    def __init__(self, owner: str, rule: AnyRule, options: Options) -> None:
        self._owner, self._rule, self._options = owner, rule, options
        self._seen: set[Tensor] = set()

    def problems_of(self, name: str, tensor: Tensor, bound: BoundTensor) -> list[str]:
        """Why a parameter cannot be stepped exactly."""
        kind = kind_problems(name, tensor)
        is_coded = self._options.state_dtype == EIGHT_BITS
        return kind + dtensor.problems(
            tensor,
            bound,
            is_elementwise=self._rule.is_elementwise,
            stochastic=self._options.bf16_stochastic_round,
            in_codes=is_coded and not isinstance(self._rule, WholeMatrix),  # of matrices it is at their owners
        )

    def check(self, tensors: Sequence[Tensor], groups: Sequence[Mapping[str, Any]], stepper: Stepper) -> None:
        """Compare the layouts of parameters that were not seen before over the ranks that they lie on.

        Raises:
            ValueError: what cannot be exact here, every reason at once, where no other rank is concerned.
            RuntimeError: that, on all ranks concerned, or that ranks lay them out differently.
        """
        new = [tensor for tensor in tensors if tensor not in self._seen]
        if not new:
            return
        problems, used, plans = list[str](), "", dict[dist.ProcessGroup | None, str]()
        by_group: dict[dist.ProcessGroup, dict[Tensor, BoundTensor]] = {}
        for index, group in enumerate(groups):
            meshes = {one.device_mesh for one in group["params"] if isinstance(one, DTensor)}
            if len(meshes) > 1:
                problems.append(
                    f"parameter group {index} has parameters of {len(meshes)} meshes: make one group for each mesh"
                )
        for tensor in new:
            bound = stepper.shards.of(tensor)
            problems += self.problems_of(stepper.shards.describe(tensor), tensor, bound)
            if bound.owner_group is not None:
                by_group.setdefault(bound.owner_group, {})[tensor] = bound
        if not problems and not by_group:
            backends(stepper, new)  # whatever is to be said about them is said before anything counts
            stepper.agreed()  # and what follows from new tensors is made before their state
        elif not problems:
            try:
                used, plans = backends(stepper, new), stepper.agreed()
            except Exception as error:  # whatever it is, the other ranks must hear of it
                problems.append(f"{type(error).__name__}: {error}")
        refused: RuntimeError | None = None
        for group_of_ranks, bounds in by_group.items():  # of which some overlap: who is refused in one tells the next
            told = [*problems, *([str(refused)] if refused else [])]
            try:
                verify(Binding(bounds, Ranks((group_of_ranks,)), tuple(told)), used, plans)
            except RuntimeError as error:
                refused = refused or error
        if refused is not None:
            raise refused
        raise_all(problems, self._owner)
        self._seen.update(new)


def backends(stepper: Stepper, tensors: Sequence[Tensor]) -> str:
    """The kernels that would step tensors, for a comparison over ranks."""
    devices: dict[torch.device, None] = dict.fromkeys(tensor.device for tensor in tensors)
    return "+".join(sorted({name for device in devices for name in stepper.backends(device)}))


class Freezing:
    """Parameters that are frozen or unfrozen after an engine was built, which DeepSpeed does not notice.

    Args:
        given: the parameters that the engine's optimizer was made with, and their names.
    """

    def __init__(self, given: Mapping[Tensor, str]) -> None:
        self._given = {parameter: (name, parameter.requires_grad) for parameter, name in given.items()}
        self._has_warned = False

    def check(self) -> None:
        """Warn once of what was frozen.

        Raises:
            RuntimeError: a parameter that was frozen is to be trained now; it has no place in the engine's tensors.
        """
        changed = [(name, was) for one, (name, was) in self._given.items() if one.requires_grad != was]
        unfrozen = [name for name, was in changed if not was]
        if unfrozen:
            raise RuntimeError(
                f"{first_of(unfrozen)}: frozen when the engine was built, which cannot train it now that it requires a "
                "gradient. Build a new engine after unfreezing; ds_optim.checkpoint.save before it and load(..., "
                "strict=False) after it keep the state of what was trained. Or freeze it again"
            )
        if changed and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"{first_of([name for name, _ in changed])}: frozen after the engine was built, which counts as having "
                "zero gradient: momentum and weight decay go on moving it. To keep it as it is, build a new engine "
                "after freezing",
                stacklevel=3,
            )


def is_phantom(active: Sequence[tuple[Mapping[str, Any], Sequence[Tensor]]], shards: Shards) -> bool:
    """Whether the step of an optimizer without state is torch's ``state_dict._init_optim_state``, which must not count.

    It takes zero gradients at learning rate 0. The one look at the gradients that this costs happens only at that rate.

    Args:
        active: groups, and the tensors in them that would be stepped.
        shards: whose they are.
    """
    if not active or any(float(group["lr"]) != 0 for group, _ in active):
        return False
    tensors = [tensor for _, of_group in active for tensor in of_group]
    mine = any(bool(grad.any()) for tensor in tensors if (grad := local_grad(tensor)) is not None)
    groups = dict.fromkeys(shards.of(tensor).owner_group for tensor in tensors)
    return not any([mine, *(any(from_all_ranks(mine, group)) for group in groups)])


def refuse_other_betas(owner: str, wanted: int, groups: Iterable[Mapping[str, Any]]) -> None:
    """Refuse groups that have been given another number of betas.

    Raises:
        ValueError: they have.
    """
    for group in groups:
        if len(group["betas"]) != wanted:
            raise ValueError(
                f"{owner} has {wanted} betas, something set {group['betas']!r} in its groups "
                '(DeepSpeed\'s OneCycle does, unless "cycle_momentum": false)'
            )


class Joined(NamedTuple):
    """Tensors that step together, and what was found of them when they first did.

    Attributes:
        key: the shards' generation, and the identities of the tensors.
        tensors: in their order; they are kept, or others would get their identities.
        bounds: what each holds.
        whole: those that are held whole, and the elements that they must have.
    """

    key: tuple[int, tuple[int, ...]]
    tensors: Sequence[Tensor]
    bounds: Sequence[BoundTensor]
    whole: tuple[Sequence[Tensor], Sequence[int]]

    @classmethod
    def of(cls, tensors: Sequence[Tensor], shards: Shards) -> Joined:
        """As they are now."""
        bounds = [shards.of(tensor) for tensor in tensors]
        whole: tuple[list[Tensor], list[int]] = [], []
        for tensor, bound in zip(tensors, bounds, strict=True):
            if isinstance(bound.layout, Replicated):
                whole[0].append(tensor)
                whole[1].append(bound.layout.parameter.numel)
        return cls(cls.key_of(tensors, shards), tensors, bounds, whole)

    @staticmethod
    def key_of(tensors: Sequence[Tensor], shards: Shards) -> tuple[int, tuple[int, ...]]:
        """Equal where nothing need be found again."""
        return shards.generation, tuple(map(id, tensors))

    def refuse_unfit(self, shards: Shards) -> None:
        """Refuse what cannot be stepped, though it could when the optimizer was made.

        Raises:
            ValueError: a sparse gradient.
            RuntimeError: a parameter has another size.
        """
        for tensor in self.tensors:
            grad = tensor.grad
            if grad is not None and grad.is_sparse:
                raise ValueError(
                    f"{shards.describe(tensor)} has a sparse gradient, which no optimizer here can take: make its "
                    "nn.Embedding with sparse=False, or give it to an optimizer of its own (torch.optim.SparseAdam)"
                )
        whole, wanted = self.whole
        sizes = [local.numel() for local in locals_of(whole)]
        if sizes != wanted:
            wrong = next(index for index, size in enumerate(sizes) if size != wanted[index])
            raise RuntimeError(
                f"{shards.describe(whole[wrong])} has {sizes[wrong]} elements and had {wanted[wrong]} when it was "
                "first seen: change sizes (resize_token_embeddings) before the engine or optimizer is made"
            )
