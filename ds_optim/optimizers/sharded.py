"""Where a rule meets a layout: everything that the optimizers share and that their formulas need not know.

`ShardedOptimizer` is a `torch.optim.Optimizer` whose ``step`` walks local tensors (a ZeRO partition, a plain parameter)
as spans and blocks of the model's parameters. Unbound, it treats each parameter as whole; a strategy's reader binds it
to partitions. The step count lives with the state of each tensor, since DeepSpeed steps groups and sub-groups one by
one.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from numbers import Real
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from ds_optim import kernels
from ds_optim.errors import raise_all, raise_on_all_ranks
from ds_optim.kernels.rounding import key_of
from ds_optim.listing import first_of
from ds_optim.optimizers.launch import (
    Call,
    Rule,
    Scalars,
    StateSpec,
    Tables,
    block_tables,
    places,
    run,
    span_tables,
)
from ds_optim.optimizers.logical import Logical, LogicalParameter, block_pieces, element_pieces
from ds_optim.optimizers.mesh_state import from_mesh, to_mesh
from ds_optim.roles import canonical_name, logical_shape, resolve_roles, warn_unclaimed
from ds_optim.roles.role import Role
from ds_optim.sharding import dtensor
from ds_optim.sharding.binding import Binding, BoundTensor, local_grad, local_of, verify
from ds_optim.sharding.blocks import BlockGrid
from ds_optim.sharding.exchange import ALONE, Ranks, from_all_ranks
from ds_optim.sharding.layout import Layout, Replicated
from ds_optim.sharding.runs import Runs, block_runs

_DTYPES = {"fp32": torch.float32, "float32": torch.float32, "bf16": torch.bfloat16, "bfloat16": torch.bfloat16}

BLOCKS_OF_GROUP = "blocks"
"""In a state dict's parameter groups: a hash of what their state is kept for, since sizes alone cannot tell roles."""

NAMES = "param_names"
"""In a state dict: the names of every group's parameters, a list or None for each group.

torch.optim puts them into the groups (and goes by position all the same). There
`torch.distributed.checkpoint.state_dict` repeats the list for every parameter of a flattened state dict, and cannot
load a full one into an optimizer without names, nor a flattened one that was saved without.
"""

_TABLES_KEPT = 64  # lists of tensors whose tables are remembered: a training run has a few

_deferred: ContextVar[bool] = ContextVar("ds_optim_deferred", default=False)


@contextmanager
def deferred_steps() -> Iterator[None]:
    """While an engine is being built, ``step()`` does nothing.

    DeepSpeed at ZeRO-0 takes a real step on zero gradients during initialization (`unfused_optimizer.py`,
    `initialize_optimizer_states`), which would count.
    """
    token = _deferred.set(True)
    try:
        yield
    finally:
        _deferred.reset(token)


waiting: WeakSet[ShardedOptimizer] = WeakSet()
"""Those that no engine has taken, see `ds_optim.overlooked`."""


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


class ShardedOptimizer(torch.optim.Optimizer):
    """Base of all optimizers here. Subclasses give `rule`, their defaults and `scalars`; blockwise rules also `blocks`.

    Args:
        params: parameters, ``(name, parameter)`` pairs, or groups of either, as `torch.optim` takes them.
        defaults: per-group settings.
        roles: what each parameter is: the result of `infer_roles`, the model, or ``{pattern: role}``.
        state_dtype: dtype of the state per element (fp32 or bf16); state per block is always fp32.
        bf16_stochastic_round: round parameters in bf16 up or down at random, so that on average no update is lost, see
            `ds_optim.kernels.rounding`. Parameters of other dtypes are rounded to nearest.
        seed: of that, a whole number >= 0. The same seed, steps and parameter names give the same bits.
        others: settings of the whole optimizer that a subclass keeps; they are judged along with the rest.

    Raises:
        ValueError: every setting out of range, all in one message.
    """

    rule: Rule
    is_elementwise = True  # otherwise it needs whole rows, heads or matrices
    num_betas = 2
    accumulates = False  # whether the last beta may be 1

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        *,
        roles: Any,
        state_dtype: torch.dtype | str,
        bf16_stochastic_round: bool,
        seed: int,
        **others: Any,
    ) -> None:
        common = {"state_dtype": state_dtype, "bf16_stochastic_round": bf16_stochastic_round, "seed": seed}
        raise_all(self.setting_problems({**defaults, **common, **others}), type(self).__name__)
        self.bf16_stochastic_round, self.seed = bf16_stochastic_round, seed
        self._start(roles, dtype_of(state_dtype) or torch.float32)
        super().__init__(params, defaults)

    def _start(self, roles: Any, state_dtype: torch.dtype) -> None:
        waiting.add(self)
        self.state_dtype = state_dtype
        self._roles_given = roles
        self._names: dict[Tensor, str] = {}
        self._made_up: set[str] = set()
        self._listed: list[list[str]] = []
        self._bound: dict[Tensor, BoundTensor] = {}
        self._settle_gradients: Callable[[], None] | None = None
        self._ranks = ALONE
        self._given: dict[Tensor, tuple[str, bool]] = {}
        self._warned_of_freezing = False
        self._read: dict[Tensor, BoundTensor] = {}
        self._replicas: dict[Tensor, dist.ProcessGroup] | None = None
        self._checked: set[Tensor] = set()
        self._roles: dict[str, Role] = {}
        self._runs: dict[Tensor, Runs] = {}
        self._tables: dict[tuple[int, ...], tuple[list[Tensor], Tables]] = {}
        self._places: dict[tuple[int, ...], tuple[list[Tensor], kernels.Places]] = {}
        self._warned_of_bf16 = False

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy. A bound optimizer belongs to its engine: save the engine's checkpoint instead."""
        if self.is_bound:
            raise TypeError(
                f"this {type(self).__name__} is bound to a DeepSpeed engine and cannot be copied or pickled: save the "
                "engine (engine.save_checkpoint, ds_optim.checkpoint.save)"
            )
        names = [self._names[tensor] for group in self.param_groups for tensor in group["params"]]
        given = names, self._roles_given, self.state_dtype, self.bf16_stochastic_round, self.seed
        return {**super().__getstate__(), "_given": given, "_made_up": self._made_up}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        given = state.pop("_given", None)  # absent where torch's load_state_dict hands over what it loaded
        made_up = state.pop("_made_up", ())
        super().__setstate__(state)
        if given is not None:
            names, roles, state_dtype, self.bf16_stochastic_round, self.seed = given
            self._start(roles, state_dtype)
            tensors = [tensor for group in self.param_groups for tensor in group["params"]]
            self._names, self._made_up = dict(zip(tensors, names, strict=True)), set(made_up)
            self._listed = [[self._names[tensor] for tensor in group["params"]] for group in self.param_groups]

    # -- settings ---------------------------------------------------------------------------------------------------

    @classmethod
    def setting_problems(cls, settings: Mapping[str, Any]) -> list[str]:
        """Everything that is wrong with a group's settings, as sentences; settings that are absent are not judged."""
        problems = []

        def number(key: str, good: Callable[[float], bool], wanted: str) -> None:
            if key not in settings:
                return
            value = settings[key]
            if isinstance(value, Tensor) and value.numel() == 1:
                if value.device.type != "cpu":
                    return  # looking would wait for the device
                value = float(value)
            if isinstance(value, bool) or not isinstance(value, Real) or not good(float(value)):
                problems.append(f"{key} must be {wanted}, not {value!r}")

        for key in ("lr", "eps", "weight_decay"):
            number(key, lambda value: 0 <= value < float("inf"), "a finite number >= 0")
        if dtype_of(settings.get("state_dtype", torch.float32)) is None:
            problems.append(f"state_dtype must be fp32 or bf16, not {settings['state_dtype']!r}")
        if not isinstance(settings.get("bf16_stochastic_round", False), bool):
            problems.append(f"bf16_stochastic_round must be true or false, not {settings['bf16_stochastic_round']!r}")
        seed = settings.get("seed", 0)
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            problems.append(f"seed must be a whole number >= 0, not {seed!r}")
        betas = settings.get("betas", None)
        if betas is not None:
            if not isinstance(betas, Sequence) or isinstance(betas, str) or len(betas) != cls.num_betas:
                problems.append(
                    f"betas must be {cls.num_betas} numbers, not {betas!r}"
                    + (
                        ' (a Trainer fills "auto" with two; put all three in the JSON\'s top-level '
                        '"ds_optim": {"betas": [...]} instead)'
                        if cls.num_betas == 3
                        else ""
                    )
                )
            else:
                for position, beta in enumerate(betas):
                    highest = cls.accumulates and position == cls.num_betas - 1 and beta == 1
                    if isinstance(beta, bool) or not isinstance(beta, Real) or not (0 <= float(beta) < 1 or highest):
                        last = ", the last in [0, 1]" if cls.accumulates else ""
                        problems.append(f"every beta must lie in [0, 1){last}, not {beta!r}")
        return problems

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; ``(name, parameter)`` pairs are taken apart, names kept without wrapper prefixes."""
        group = dict(param_group)
        if isinstance(group["params"], set):
            raise TypeError("parameters must be in an order that is the same on every rank: give a list, not a set")
        listed = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        names = group.pop(NAMES, ())  # of a group of another optimizer of torch's
        if len(names) == len(listed) and all(isinstance(entry, Tensor) for entry in listed):
            listed = list(zip(names, listed, strict=True))
        group["params"] = [entry[1] if isinstance(entry, tuple) else entry for entry in listed]
        raise_all(self.setting_problems(group), f"{type(self).__name__}: a parameter group")
        problems = [
            f"{key} is a setting of the whole optimizer, not of one group"
            for key in ("bf16_stochastic_round", "seed")
            if key in group
        ]
        known_names = self._names_in_model()
        for entry in listed:
            name, parameter = entry if isinstance(entry, tuple) else (None, entry)
            if not isinstance(parameter, Tensor):
                continue  # torch says so better
            known = canonical_name(name) if name else known_names.get(parameter, "")
            if not known:
                known = f"parameter {len(self._names)}"
                self._made_up.add(known)
            if known in self._names.values() and parameter not in self._names:
                problems.append(f"two parameters are called {known}: give them different names")
            self._names[parameter] = known
            if not parameter.requires_grad:
                continue  # whatever it is, a quantised base perhaps: judged before its first step, if there is one
            kind = self._kind_problems(parameter)
            problems += kind
            if not kind:
                bound = dtensor.read(known, parameter)
                problems += dtensor.problems(
                    parameter, bound, is_elementwise=self.is_elementwise, stochastic=self.bf16_stochastic_round
                )
        raise_all(problems, f"{type(self).__name__}")
        super().add_param_group(group)
        self._listed.append([self._names[parameter] for parameter in group["params"]])
        self._roles = {}

    def _kind_problems(self, parameter: Tensor) -> list[str]:
        if not parameter.is_sparse and parameter.dtype in (torch.float32, torch.bfloat16, torch.float16):
            return []
        return [f"{self._names[parameter]} is {_kind_and_remedy(parameter)}"]

    def _name_of(self, tensor: Tensor) -> str:
        """A parameter's name, or those of the first that a local tensor holds, for a message."""
        if tensor in self._bound:
            return ", ".join(spec.name for spec in self._bound[tensor].layout.parameters[:3])
        return self._names.get(tensor, f"a parameter of shape {tuple(tensor.shape)}")

    def _names_in_model(self) -> dict[Tensor, str]:
        """What parameters without a name are called: as in the model, if that was given as ``roles``."""
        if not isinstance(self._roles_given, torch.nn.Module):
            return {}
        named = self._roles_given.named_parameters(remove_duplicate=False)
        return {parameter: canonical_name(name) for name, parameter in reversed(list(named))}

    # -- binding ----------------------------------------------------------------------------------------------------

    def bind(self, binding: Binding, roles: Mapping[str, Role], given: Mapping[Tensor, str] | None = None) -> None:
        """Step the tensors of a strategy from now on. Called once by the strategy's reader, on all its ranks together.

        Args:
            binding: the strategy's local tensors; their order must be the same on every rank of a shard group.
            roles: the role of every parameter, by name.
            given: the model's parameters that this optimizer was made with, and their names; what is frozen of them by
                now has no tensor here and cannot get one.

        Raises:
            RuntimeError: the layout cannot be matched on some rank; every reason of every rank is listed.
        """
        waiting.discard(self)
        self._given = {parameter: (name, parameter.requires_grad) for parameter, name in (given or {}).items()}
        plan, chosen = "", list[str]()
        try:
            chosen = sorted({kernels.backend_for(tensor.device) for tensor in binding.tensors})
        except Exception as error:  # whatever it is, the other ranks must hear of it
            binding = replace(binding, problems=(*binding.problems, f"no kernels: {error}"))
        try:
            self._bound, self._ranks = dict(binding.tensors), binding.ranks
            self._settle_gradients = binding.settle
            self._roles = dict(roles)
            self._forget_layouts()
            if not binding.problems:
                plan = self._on_bind()
        except Exception as error:  # likewise
            binding = replace(binding, problems=(*binding.problems, f"{type(error).__name__}: {error}"))
        verify(binding, "+".join(chosen), plan)

    def _check_freezing(self) -> None:
        """Notice parameters that were frozen or unfrozen since the engine was built, which DeepSpeed does not.

        Raises:
            RuntimeError: one that was frozen is to be trained now; it has no place in the engine's tensors.
        """
        changed = [(name, was) for one, (name, was) in self._given.items() if one.requires_grad != was]
        unfrozen = [name for name, was in changed if not was]
        if unfrozen:
            raise RuntimeError(
                f"{first_of(unfrozen)}: frozen when the engine was built, which cannot train it now that it requires a "
                "gradient. Build a new engine after unfreezing; ds_optim.checkpoint.save before it and load(..., "
                "strict=False) after it keep the state of what was trained. Or freeze it again"
            )
        if changed and not self._warned_of_freezing:
            self._warned_of_freezing = True
            warnings.warn(
                f"{first_of([name for name, _ in changed])}: frozen after the engine was built, which counts as having "
                "zero gradient: momentum and weight decay go on moving it. To keep it as it is, build a new engine "
                "after freezing",
                stacklevel=3,
            )

    def _agreed(self) -> str:
        """What the ranks of a shard group must agree on beyond layouts, as a hash."""
        return ""

    def _on_bind(self) -> str:
        """Make what depends on the binding, on all ranks alike; what they must agree on beyond layouts, as a hash."""
        if self.rule.block_state:
            shapes = {spec.name: spec.shape for one in self._bound.values() for spec in one.layout.parameters}
            self._warn_unclaimed({name: self._roles[name] for name in shapes}, shapes)
            for tensor in self._bound:
                self._runs_of(tensor)
        return ""

    def _warn_unclaimed(self, roles: Mapping[str, Role], shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Warn of parameters whose blocks are a guess."""
        warn_unclaimed(roles, shapes, lambda role: role.is_understood, "makes every output row of them a block")

    @property
    def is_bound(self) -> bool:
        """Whether a strategy's tensors are stepped (`bind` was called), rather than whole parameters."""
        return bool(self._bound)

    @property
    def ranks(self) -> Ranks:
        """Of the engine that it is bound to."""
        return self._ranks

    @property
    def element_keys(self) -> tuple[str, ...]:
        """State of the shape of the local tensor, one value per element."""
        return self.rule.element_state

    def blocks(self, role: Role, shape: tuple[int, ...]) -> BlockGrid:
        """The block grid of a parameter; only blockwise rules have one."""
        raise NotImplementedError(f"{type(self).__name__} has no blocks")

    @abstractmethod
    def scalars(self, group: dict[str, Any], step: int) -> Scalars:
        """The formula's constants for a group at its ``step``-th step (from 1), in the order of its arguments."""

    def _bound_tensor(self, tensor: Tensor) -> BoundTensor:
        if tensor not in self._bound:
            if self.is_bound:
                raise RuntimeError(
                    "the engine stepped a tensor that was not there when the optimizer was bound; "
                    "build a new engine after changing the model or its parameter groups"
                )
            if tensor not in self._read:
                self._resolve_names()
                if self._replicas is None:
                    self._replicas = dtensor.replicas_of(self._roles_given)
                self._read[tensor] = dtensor.read(self._names[tensor], tensor, self._replicas.get(tensor))
            return self._read[tensor]
        return self._bound[tensor]

    def _resolve_names(self) -> None:
        """Parameters that took the places of others since the groups were made have their names.

        Accelerate builds the optimizer before `fully_shard` and then replaces the parameters in its groups.

        Raises:
            RuntimeError: they cannot be told apart, or state belongs to the parameters that were replaced.
        """
        if all(tensor in self._names for group in self.param_groups for tensor in group["params"]):
            return
        names: dict[Tensor, str] = {}
        for group, listed in zip(self.param_groups, self._listed, strict=False):
            if len(group["params"]) == len(listed):
                names.update(zip(group["params"], listed, strict=True))
        given = {tensor for group in self.param_groups for tensor in group["params"]}
        lost = [tensor for tensor in self.state if tensor not in given]
        if names.keys() != given or lost:
            raise RuntimeError(
                f"{type(self).__name__}: parameters in its groups were replaced "
                + ("after it had state for them" if lost else "by another number of parameters")
                + ": wrap the model (fully_shard, Accelerate) before the first step or load, or make a new optimizer"
            )
        self._names = names
        self._roles = {}
        self._read.clear()
        self._replicas = None
        self._forget_layouts()

    def _trained(self) -> list[Tensor]:
        """The parameters of the groups that are not frozen, or were not when they got state."""
        given = [tensor for group in self.param_groups for tensor in group["params"]]
        return [t for t in given if t.requires_grad or t.grad is not None or t in self.state]

    def _check_layouts(self, tensors: Sequence[Tensor]) -> bool:
        """Before the first step over parameters, compare their layouts over the ranks that they lie on.

        Returns:
            Whether there were any that had not been seen before.

        Raises:
            ValueError: what cannot be exact here, every reason at once, where no other rank is concerned.
            RuntimeError: that, on all ranks concerned, or that ranks lay them out differently.
        """
        self._resolve_names()
        new = [tensor for tensor in tensors if tensor not in self._checked]
        if not new:
            return False
        problems, used, plan = [], "", ""
        by_group: dict[dist.ProcessGroup, dict[Tensor, BoundTensor]] = {}
        for index, group in enumerate(self.param_groups):
            meshes = {one.device_mesh for one in group["params"] if isinstance(one, DTensor)}
            if len(meshes) > 1:
                problems.append(
                    f"parameter group {index} has parameters of {len(meshes)} meshes: make one group for each mesh"
                )
        for tensor in new:
            problems += self._kind_problems(tensor)
            bound = self._bound_tensor(tensor)
            problems += dtensor.problems(
                tensor, bound, is_elementwise=self.is_elementwise, stochastic=self.bf16_stochastic_round
            )
            if bound.owner_group is not None:
                by_group.setdefault(bound.owner_group, {})[tensor] = bound
        if by_group and not problems:
            try:
                used = "+".join(sorted({kernels.backend_for(tensor.device) for tensor in new}))
                plan = self._agreed()
            except Exception as error:  # whatever it is, the other ranks must hear of it
                problems.append(f"{type(error).__name__}: {error}")
        for group_of_ranks, bounds in by_group.items():
            verify(Binding(bounds, Ranks((group_of_ranks,)), tuple(problems)), used, plan)
        raise_all(problems, f"{type(self).__name__}")
        self._checked.update(new)
        return True

    def _roles_of_parameters(self) -> dict[str, Role]:
        """The role of every parameter, by name; of whole parameters they are found at the first need."""
        if not self._roles:
            shapes = {name: logical_shape(parameter) for parameter, name in self._names.items()}
            self._roles = resolve_roles(self._roles_given, shapes, dict(self._names))
            self._warn_unclaimed(self._roles, shapes)
        return self._roles

    def _runs_of(self, tensor: Tensor) -> Runs:
        if tensor not in self._runs:
            bound = self._bound_tensor(tensor)
            self._runs[tensor] = block_runs(bound.layout, bound.rank, self._grids(bound.layout))
        return self._runs[tensor]

    def _grids(self, layout: Layout) -> dict[str, BlockGrid]:
        """The block grid of every parameter of a layout, by name."""
        roles = self._roles_of_parameters()
        return {spec.name: self.blocks(roles[spec.name], spec.shape) for spec in layout.parameters}

    # -- the step ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step over all gradients at hand. Returns the closure's loss, if one is given.

        A NaN or infinity in a gradient reaches the elements (under Adam-mini: the blocks) that it belongs to, as in
        torch.optim; nothing waits for the device to find out.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if _deferred.get():
            return loss
        self._check_freezing()
        active = [
            (group, tensor)
            for group in self.param_groups
            for tensor in group["params"]
            if tensor.grad is not None or tensor in self._bound  # inside an engine no gradient is a zero gradient
        ]
        if not self.is_bound:
            self._check_layouts([tensor for _, tensor in active])
        if self._settle_gradients is not None:
            self._settle_gradients()
        if self._is_phantom(active):
            for _, tensor in active:
                self._state_of(tensor)
            return loss
        together: dict[Together, list[Tensor]] = {}
        groups: dict[int, dict[str, Any]] = {}
        for group, tensor in active:
            if tensor.grad is not None and tensor.grad.is_sparse:
                raise ValueError(
                    f"{self._name_of(tensor)} has a sparse gradient, which no optimizer here can take: make its "
                    "nn.Embedding with sparse=False, or give it to an optimizer of its own (torch.optim.SparseAdam)"
                )
            if len(group["betas"]) != self.num_betas:
                raise ValueError(
                    f"{type(self).__name__} has {self.num_betas} betas, something set {group['betas']!r} in its groups "
                    '(DeepSpeed\'s OneCycle does, unless "cycle_momentum": false)'
                )
            layout, numel = self._bound_tensor(tensor).layout, local_of(tensor).numel()
            if isinstance(layout, Replicated) and numel != layout.parameter.numel:
                raise RuntimeError(
                    f"{layout.parameter.name} has {numel} elements and had {layout.parameter.numel} when it was first "
                    "seen: change sizes (resize_token_embeddings) before the engine or optimizer is made"
                )
            step = int(self._state_of(tensor)["step"]) + 1  # on the host: nothing waits for a device
            groups[id(group)] = group
            key = Together(id(group), step, tensor.device, self._bound_tensor(tensor).group)
            together.setdefault(key, []).append(tensor)
        launches = self._prepare(together, groups)
        for _, tensor in active:  # nothing counts before everything that can be refused has passed
            self.state[tensor]["step"] += 1
        for launch in launches:
            launch()
        return loss

    def _prepare(
        self, together: Mapping[Together, list[Tensor]], groups: Mapping[int, dict[str, Any]]
    ) -> list[Callable[[], None]]:
        """Everything that can be refused is refused here; what is returned changes weights, in order."""
        calls = [
            self._call(tensors, self.scalars(groups[key.group_id], key.step), self._rounding(tensors, key.step))
            for key, tensors in together.items()
        ]
        return [partial(run, calls)]

    def _is_phantom(self, active: Sequence[tuple[dict[str, Any], Tensor]]) -> bool:
        """Whether this is torch's state initialization (`torch.distributed.checkpoint.state_dict._init_optim_state`).

        It steps an optimizer that has no state on zero gradients at learning rate 0; such a step must not count. The
        one look at the gradients that this costs happens only in that case.
        """
        if self.is_bound or self.state or not active or any(float(group["lr"]) != 0 for group, _ in active):
            return False
        mine = any(bool(grad.any()) for _, tensor in active if (grad := local_grad(tensor)) is not None)
        groups = dict.fromkeys(self._bound_tensor(tensor).owner_group for _, tensor in active)
        return not any([mine, *(any(from_all_ranks(mine, group)) for group in groups)])

    def _state_of(self, tensor: Tensor) -> dict[str, Any]:
        state: dict[str, Any] = self.state[tensor]
        if state:
            if state["step"].device.type != "cpu":  # DeepSpeed's reload_states moves every tensor
                state["step"] = state["step"].cpu()
        else:
            state.update(self.fresh_state(tensor))
        return state

    def fresh_state(self, tensor: Tensor) -> dict[str, Any]:
        """The state of a local tensor before its first step. State per element of a DTensor is a DTensor."""
        state: dict[str, Any] = {"step": torch.zeros((), dtype=torch.float32)}
        for name, (shape, dtype) in self._state_spec(tensor).items():
            if isinstance(tensor, DTensor) and name in self.rule.element_state and shape == tuple(tensor.shape):
                state[name] = torch.zeros_like(tensor.detach(), dtype=dtype)
            else:
                state[name] = torch.zeros(shape, dtype=dtype, device=tensor.device)
        return state

    def _state_spec(self, tensor: Tensor) -> dict[str, StateSpec]:
        """What is kept for a local tensor, the step count apart."""
        spec: dict[str, StateSpec] = {name: (tuple(tensor.shape), self.state_dtype) for name in self.rule.element_state}
        for name in self.rule.block_state:
            spec[name] = ((self._runs_of(tensor).num_slots,), torch.float32)
        return spec

    def predicted_state(self, layouts: Sequence[Layout], ranks: Sequence[int]) -> Iterator[list[dict[str, StateSpec]]]:
        """What each of ``ranks`` would keep for every local tensor of a strategy (the step count apart).

        Found from shapes alone; the optimizer is of no other use afterwards.

        Args:
            layouts: of the parameters that this optimizer was given, by the names that it was given, see
                `ds_optim.sharding.predict`.
            ranks: in the shard group.
        """
        self._roles_of_parameters()
        tensors = [torch.empty(layout.local_numel(0), device="meta") for layout in layouts]
        self._forget_layouts()
        for rank in ranks:
            self._runs.clear()
            self._bound = {tensor: BoundTensor(layout, rank) for tensor, layout in zip(tensors, layouts, strict=True)}
            yield [self._state_spec(tensor) for tensor in tensors]

    def _forget_layouts(self) -> None:
        """Drop what was derived from the tensors that were bound before."""
        self._runs.clear()
        self._tables.clear()
        self._places.clear()

    def _rounding(self, tensors: list[Tensor], step: int) -> kernels.Rounding | None:
        """How the bf16 ones among tensors are rounded at a step; None if all are rounded to nearest."""
        if not any(tensor.dtype == torch.bfloat16 for tensor in tensors):
            return None
        if not self.bf16_stochastic_round:
            if not self._warned_of_bf16:
                self._warned_of_bf16 = True
                warnings.warn(
                    f"{type(self).__name__} steps parameters in bf16 that have no fp32 master copy: rounding to "
                    "nearest loses every update below 1/512 of a weight; set bf16_stochastic_round=True",
                    stacklevel=2,
                )
            return None
        together = tuple(id(tensor) for tensor in tensors)
        if together not in self._places:
            if len(self._places) >= _TABLES_KEPT + len(self._names):  # whole-matrix rules ask for each tensor as well
                self._places.clear()
            self._places[together] = tensors, places(tensors, [self._bound_tensor(tensor) for tensor in tensors])
        return kernels.Rounding(key_of(self.seed, step), self._places[together][1])

    def _call(self, tensors: list[Tensor], scalars: Scalars, rounding: kernels.Rounding | None) -> Call:
        bounds = [self._bound_tensor(tensor) for tensor in tensors]
        states = [self.state[tensor] for tensor in tensors]
        return Call(self.rule, tensors, states, self._tables_of(tensors, bounds), scalars, bounds[0].group, rounding)

    def _tables_of(self, tensors: list[Tensor], bounds: list[BoundTensor]) -> Tables:
        key = tuple(id(tensor) for tensor in tensors)
        if key not in self._tables:
            if self.rule.block_state:
                tables = block_tables([self._runs_of(tensor) for tensor in tensors])
            else:
                tables = span_tables(bounds)
            if len(self._tables) >= _TABLES_KEPT:
                self._tables.clear()
            self._tables[key] = (tensors, tables)  # the tensors too, so that no other one gets their ids
        return self._tables[key][1]

    # -- checkpoints ------------------------------------------------------------------------------------------------

    def logical(self) -> dict[Tensor, list[LogicalParameter]]:
        """What is kept for every parameter and which part of it lies on this rank, by local tensor.

        Found from layouts alone: state need not exist yet. Parameters that are not trained are left out.
        """
        if not self.is_bound and self.state:
            self._check_layouts(self._trained())
        found = {}
        for tensor in list(self._bound) or self._trained():
            bound = self._bound_tensor(tensor)
            pieces = element_pieces(bound.layout, bound.rank)
            found[tensor] = [
                LogicalParameter(spec.name, spec.shape, blocks, Logical(spec.numel, tensor.dtype, held, held), state)
                for spec, blocks, held, state in zip(
                    bound.layout.parameters,
                    self._blocks_in_words(tensor),
                    pieces,
                    self.logical_state(tensor),
                    strict=True,
                )
            ]
        return found

    def logical_state(self, tensor: Tensor) -> list[dict[str, Logical]]:
        """The state of every parameter of a local tensor, by key."""
        bound = self._bound_tensor(tensor)
        found: list[dict[str, Logical]] = [
            {key: Logical(spec.numel, self.state_dtype, held, held) for key in self.rule.element_state}
            for spec, held in zip(bound.layout.parameters, element_pieces(bound.layout, bound.rank), strict=True)
        ]
        if self.rule.block_state:
            blocks = block_pieces(bound.layout, bound.rank, self._grids(bound.layout), self._runs_of(tensor))
            for state, of_blocks in zip(found, blocks, strict=True):
                state.update(dict.fromkeys(self.rule.block_state, of_blocks))
        return found

    def _blocks_in_words(self, tensor: Tensor) -> list[str]:
        """The blocks of every parameter of a local tensor; equal words mean equal blocks."""
        layout = self._bound_tensor(tensor).layout
        if not self.rule.block_state:
            return [""] * len(layout.parameters)
        return [str(grid) for grid in self._grids(layout).values()]

    def structural_settings(self) -> dict[str, Any]:
        """The settings that decide what state there is: a checkpoint belongs to an optimizer with the same ones."""
        return {"state_dtype": str(self.state_dtype).removeprefix("torch.")}

    def state_of(self, tensor: Tensor) -> dict[str, Any]:
        """The state of a local tensor; made, all zero and before the first step, if there is none."""
        return self._state_of(tensor)

    @property
    def bound_tensors(self) -> Mapping[Tensor, BoundTensor]:
        """The local tensors of the engine, none without one."""
        return self._bound

    def forget_past(self) -> None:
        """Drop what was remembered of earlier steps outside the state: call it after the state was written."""

    def state_dict(self) -> dict[str, Any]:
        """As `torch.optim.Optimizer.state_dict`.

        State of blocks of DTensors is brought into the form of a DTensor: all ranks of their mesh must call it. The
        names of parameters that have one, their own or the model's (``roles=model``), are in it under
        ``"param_names"``, a list for each group.
        """
        found: dict[str, Any] = super().state_dict()
        to_mesh(self, found)
        names = [self._names_in(index) for index in range(len(self.param_groups))]
        if any(names):
            found[NAMES] = names
        if not self.is_elementwise:
            for group, kept in zip(found["param_groups"], self._kept_blocks(found), strict=True):
                group[BLOCKS_OF_GROUP] = kept
        return found

    def _kept_blocks(self, state_dict: Mapping[str, Any]) -> list[str]:
        """For every parameter group a hash of the blocks of those of its parameters that have state in a state dict."""
        found = []
        tensors = dict(self.keyed(state_dict))
        for group in state_dict["param_groups"]:
            words = [
                (spec.name, text)
                for key in group["params"]
                if key in tensors and state_dict["state"].get(key)
                for spec, text in zip(
                    self._bound_tensor(tensors[key]).layout.parameters, self._blocks_in_words(tensors[key]), strict=True
                )
            ]
            found.append(hashlib.sha256(repr(sorted(words)).encode()).hexdigest()[:16])
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As `torch.optim.Optimizer.load_state_dict`, but the state keeps the dtype and shape it was saved with.

        torch would cast every tensor to its parameter's dtype. Where the state dict and the parameters both have names,
        state goes by name, not by position; settings belong to groups and go by the groups' position.

        Raises:
            ValueError: the state is not this optimizer's, or of parameters of other names.
        """
        # Ours must be the last hook before torch's cast and the first after it, whatever hooks a user registered.
        keep = self.register_load_state_dict_pre_hook(_keep_dtypes)
        restore = self.register_load_state_dict_post_hook(_restore_dtypes, prepend=True)
        try:
            super().load_state_dict(from_mesh(self, state_dict))
        finally:
            keep.remove()
            restore.remove()

    def keyed(self, state_dict: Mapping[str, Any]) -> list[tuple[Any, Tensor]]:
        """The tensors of the groups, each with its key in a state dict; torch judges whether their numbers agree."""
        tensors = [tensor for group in self.param_groups for tensor in group["params"]]
        keys = [key for group in self._ordered(state_dict) for key in group]
        return list(zip(keys, tensors, strict=False))

    def _ordered(self, state_dict: Mapping[str, Any]) -> list[list[Any]]:
        """The keys of every saved group in the order of the group here: by name if both have names, else as saved."""
        found = []
        for index, (saved, there) in enumerate(zip(state_dict["param_groups"], saved_names(state_dict), strict=True)):
            here = self._names_in(index) if index < len(self.param_groups) else None
            keys: list[Any] = saved["params"]
            if here is not None and there is not None and set(here) == set(there):
                by_name = dict(zip(there, keys, strict=True))
                keys = [by_name[name] for name in here]
            found.append(keys)
        return found

    def _names_in(self, index: int) -> list[str] | None:
        """What the parameters of a group are called in the model; None if not all of them have such a name."""
        tensors: list[Tensor] = self.param_groups[index]["params"]
        if self.is_bound:
            layouts = [self._bound[tensor].layout for tensor in tensors if tensor in self._bound]
            names = [layout.parameter.name for layout in layouts if isinstance(layout, Replicated)]  # others hold many
        elif all(tensor in self._names for tensor in tensors):
            names = [self._names[tensor] for tensor in tensors]
        else:  # others have taken their places, see `_resolve_names`
            names = list(self._listed[index]) if index < len(self._listed) else []
        return names if names and len(names) == len(tensors) and not self._made_up.intersection(names) else None

    def _name_problems(self, state_dict: Mapping[str, Any]) -> list[str]:
        """Parameters that a state dict has and its group here has not, or the other way round; none without names."""
        problems: list[str] = []
        groups = state_dict["param_groups"]
        if len(groups) != len(self.param_groups):
            return problems  # torch says so
        for index, (group, there) in enumerate(zip(self.param_groups, saved_names(state_dict), strict=True)):
            here = self._names_in(index)
            if here is None or there is None:
                continue
            known, saved = set(here), set(there)
            problems += [
                f"{name} is in its group {index}, not in the optimizer's" for name in there if name not in known
            ]
            problems += [
                f"{name} is not in its group {index}, but in the optimizer's" for name in here if name not in saved
            ]
            if not problems and here != there and any(tensor not in self._names for tensor in group["params"]):
                problems.append(
                    f"the parameters of group {index} are in another order, by which DeepSpeed loads its fp32 masters: "
                    "make the model as it was, or use ds_optim.checkpoint, which goes by name"
                )
        return problems

    def state_problems(self, state_dict: Mapping[str, Any]) -> list[str]:
        """What in a state dict cannot be this optimizer's, as sentences: other keys, other shapes, other blocks."""
        problems = self._name_problems(state_dict)
        if problems:
            return [
                *problems,
                f"(state goes by name; without {NAMES!r} it would go by position)",
            ]
        for key, tensor in self.keyed(state_dict):
            state = state_dict["state"].get(key)
            if not state:
                continue
            spec = self._state_spec(tensor)
            if set(state) != {"step", *spec}:
                expected = sorted({"step", *spec})
                problems.append(f"the state has {sorted(state)}, {type(self).__name__} keeps {expected}")
                continue
            for name, (shape, _) in spec.items():
                found = tuple(state[name].shape)
                if isinstance(tensor, DTensor) and name in self.rule.element_state and found == tuple(tensor.shape):
                    if not isinstance(state[name], DTensor):
                        problems.append(
                            f"{name} of {self._names[tensor]} is whole, its parameter is sharded: load it by "
                            "torch.distributed.checkpoint.state_dict.set_optimizer_state_dict with "
                            "StateDictOptions(full_state_dict=True)"
                        )
                    continue
                if math.prod(found) != math.prod(shape):
                    problems.append(
                        f"{name} of a tensor of shape {tuple(tensor.shape)} has {math.prod(found)} values, not "
                        f"{math.prod(shape)}"
                        + (
                            ""
                            if shape == tuple(tensor.shape)
                            else " (saved with other roles or another number of ranks)"
                        )
                    )
                elif found != shape:
                    problems.append(f"{name} has shape {found}, its parameter {tuple(tensor.shape)}")
        if not problems and not self.is_elementwise:
            pairs = zip(state_dict["param_groups"], self._kept_blocks(state_dict), strict=True)
            for index, (group, here) in enumerate(pairs):
                saved = group.get(BLOCKS_OF_GROUP, here)
                if saved != here:
                    problems.append(
                        f"the parameters of group {index} were cut into other blocks (hash {saved}, {here} here): "
                        "other roles, another block size, or other names"
                    )
        return list(dict.fromkeys(problems))


def saved_names(state_dict: Mapping[str, Any]) -> list[list[str] | None]:
    """For every group of a state dict, ours or torch's, its parameters' names; None where none can be compared.

    Where parameters have names for keys, `torch.distributed.checkpoint.state_dict` has put the keys in order already,
    and other lists as they were saved.
    """
    groups, ours = state_dict["param_groups"], state_dict.get(NAMES) or ()
    found: list[list[str] | None] = []
    for index, group in enumerate(groups):
        listed = group.get(NAMES) or (ours[index] if len(ours) == len(groups) else None) or ()
        names = [canonical_name(name) for name in listed if isinstance(name, str)]
        unique = len(set(names)) == len(listed) == len(group["params"])
        known = unique and names and not any(isinstance(key, str) for key in group["params"])
        found.append(names if known else None)
    return found


class _Kept:
    """A tensor that torch's loader must leave alone: neither a tensor, nor a mapping, nor iterable."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _keep_dtypes(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    assert isinstance(optimizer, ShardedOptimizer)
    subject = "this state dict was not saved by the same optimizer"
    raise_on_all_ranks(optimizer.state_problems(state_dict), subject, optimizer.ranks)  # without an engine it is alone
    kept = {
        key: {name: _Kept(value) if isinstance(value, Tensor) else value for name, value in state.items()}
        for key, state in state_dict["state"].items()
    }
    groups = [
        {**{k: v for k, v in saved.items() if k not in (BLOCKS_OF_GROUP, NAMES)}, "params": keys}
        for saved, keys in zip(state_dict["param_groups"], optimizer._ordered(state_dict), strict=True)
    ]
    return {**state_dict, "state": kept, "param_groups": groups}


def _restore_dtypes(optimizer: torch.optim.Optimizer) -> None:
    for tensor, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, _Kept):
                device = value.tensor.device if name == "step" else tensor.device
                state[name] = value.tensor.detach().to(device, copy=True)


def dtype_of(value: Any) -> torch.dtype | None:
    """A dtype that state can be kept in, also from its name in a JSON (``"bf16"``, ``"torch.float32"``)."""
    return _DTYPES.get(str(value).removeprefix("torch."))


def _kind_and_remedy(parameter: Tensor) -> str:
    """What a parameter is that is no dense fp32, bf16 or fp16 tensor, and what to do about it."""
    if parameter.is_sparse:
        return "sparse: give the optimizer a dense one (to_dense())"
    if parameter.is_complex():
        return (
            f"{parameter.dtype}, and moments of complex numbers are not defined here: keep it as two real parameters, "
            "or as torch.view_as_real(...) of it in fp32"
        )
    if parameter.dtype == torch.float64:
        return "torch.float64, which no kernel here steps: convert it with model.float()"
    return f"{parameter.dtype}: convert it to fp32, bf16 or fp16, or freeze it and leave it out of the optimizer"
