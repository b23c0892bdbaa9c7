"""Where a rule meets a layout: everything that the optimizers share and that their formulas need not know.

`ShardedOptimizer` is a `torch.optim.Optimizer` whose ``step`` walks local tensors (a ZeRO partition, a plain parameter)
as spans and blocks of the model's parameters. Unbound, it treats each parameter as whole; a strategy's reader binds it
to partitions. The step count lives with the state of each tensor, since DeepSpeed steps groups and sub-groups one by
one.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ds_optim import kernels
from ds_optim.optimizers.launch import Call, Rule, Scalars, Tables, block_tables, idle_parameters, run, span_tables
from ds_optim.role import Role
from ds_optim.roles import canonical_name, logical_shape, resolve_roles, warn_unclaimed
from ds_optim.sharding.binding import Binding, BoundTensor, verify, whole
from ds_optim.sharding.blocks import BlockGrid
from ds_optim.sharding.runs import Runs, block_runs

_DTYPES = {"fp32": torch.float32, "float32": torch.float32, "bf16": torch.bfloat16, "bfloat16": torch.bfloat16}
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


class ShardedOptimizer(torch.optim.Optimizer):
    """Base of all optimizers here. Subclasses give `rule`, their defaults and `scalars`; blockwise rules also `blocks`.

    Args:
        params: parameters, ``(name, parameter)`` pairs, or groups of either, as `torch.optim` takes them.
        defaults: per-group settings.
        roles: what each parameter is: the result of `infer_roles`, the model, or ``{pattern: role}``.
        state_dtype: dtype of the state per element (fp32 or bf16); state per block is always fp32.

    Raises:
        ValueError: every setting out of range, all in one message.
    """

    rule: Rule
    num_betas = 2

    def __init__(self, params: Any, defaults: dict[str, Any], *, roles: Any, state_dtype: torch.dtype | str) -> None:
        raise_all(self.setting_problems({**defaults, "state_dtype": state_dtype}), type(self).__name__)
        self._start(roles, _dtype_of(state_dtype) or torch.float32)
        super().__init__(params, defaults)

    def _start(self, roles: Any, state_dtype: torch.dtype) -> None:
        self.state_dtype = state_dtype
        self._roles_given = roles
        self._names: dict[Tensor, str] = {}
        self._bound: dict[Tensor, BoundTensor] = {}
        self._roles: dict[str, Role] = {}
        self._runs: dict[Tensor, Runs] = {}
        self._tables: dict[tuple[int, ...], tuple[list[Tensor], Tables]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy. A bound optimizer belongs to its engine: save the engine's checkpoint instead."""
        if self.is_bound:
            raise TypeError(
                f"this {type(self).__name__} is bound to a DeepSpeed engine and cannot be copied or pickled"
            )
        names = [self._names[tensor] for group in self.param_groups for tensor in group["params"]]
        return {**super().__getstate__(), "_given": (names, self._roles_given, self.state_dtype)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        given = state.pop("_given", None)  # absent where torch's load_state_dict hands over what it loaded
        super().__setstate__(state)
        if given is not None:
            names, roles, state_dtype = given
            self._start(roles, state_dtype)
            tensors = [tensor for group in self.param_groups for tensor in group["params"]]
            self._names = dict(zip(tensors, names, strict=True))

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
        if _dtype_of(settings.get("state_dtype", torch.float32)) is None:
            problems.append(f"state_dtype must be fp32 or bf16, not {settings['state_dtype']!r}")
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
                for beta in betas:
                    if isinstance(beta, bool) or not isinstance(beta, Real) or not 0 <= float(beta) < 1:
                        problems.append(f"every beta must lie in [0, 1), not {beta!r}")
        return problems

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; ``(name, parameter)`` pairs are taken apart, names kept without wrapper prefixes."""
        group = dict(param_group)
        if isinstance(group["params"], set):
            raise TypeError("parameters must be in an order that is the same on every rank: give a list, not a set")
        listed = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        group["params"] = [entry[1] if isinstance(entry, tuple) else entry for entry in listed]
        raise_all(self.setting_problems(group), f"{type(self).__name__}: a parameter group")
        problems = []
        for entry in listed:
            name, parameter = entry if isinstance(entry, tuple) else (None, entry)
            if not isinstance(parameter, Tensor):
                continue  # torch says so better
            self._names[parameter] = canonical_name(name) if name else f"parameter {len(self._names)}"
            if parameter.is_sparse or parameter.dtype not in (torch.float32, torch.bfloat16, torch.float16):
                kind = "sparse" if parameter.is_sparse else str(parameter.dtype)
                problems.append(f"{self._names[parameter]} is {kind}, not a dense fp32, bf16 or fp16 tensor")
            if type(parameter.data).__name__ == "DTensor":
                problems.append(
                    f"{self._names[parameter]} is a DTensor: FSDP2 and tensor parallelism are not supported yet; "
                    "use DeepSpeed ZeRO, DDP or a single device"
                )
        raise_all(problems, f"{type(self).__name__}")
        super().add_param_group(group)
        self._roles = {}

    # -- binding ----------------------------------------------------------------------------------------------------

    def bind(self, binding: Binding, roles: Mapping[str, Role]) -> None:
        """Step the tensors of a strategy from now on. Called once by the strategy's reader, on all ranks together.

        Args:
            binding: the strategy's local tensors; their order must be the same on every rank.
            roles: the role of every parameter, by name.

        Raises:
            RuntimeError: the layout cannot be matched on some rank; every reason of every rank is listed.
        """
        try:
            chosen = sorted({kernels.backend_for(tensor.device) for tensor in binding.tensors})
        except Exception as error:  # whatever it is, the other ranks must hear of it
            chosen = []
            binding = replace(binding, problems=(*binding.problems, f"no kernels: {error}"))
        verify(binding, "+".join(chosen))
        self._bound = dict(binding.tensors)
        self._roles = dict(roles)
        self._runs.clear()
        self._tables.clear()
        if self.rule.block_state:
            bound = self._bound.values()
            shapes = {spec.name: spec.shape for one in bound for spec in one.layout.parameters}
            warn_unclaimed({name: roles[name] for name in shapes}, shapes)
            for tensor in self._bound:
                self._runs_of(tensor)

    @property
    def is_bound(self) -> bool:
        """Whether a strategy's tensors are stepped (`bind` was called), rather than whole parameters."""
        return bool(self._bound)

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
            return whole(self._names[tensor], tensor)
        return self._bound[tensor]

    def _runs_of(self, tensor: Tensor) -> Runs:
        if tensor not in self._runs:
            bound = self._bound_tensor(tensor)
            if not self._roles:
                shapes = {name: logical_shape(parameter) for parameter, name in self._names.items()}
                self._roles = resolve_roles(self._roles_given, shapes, dict(self._names))
                warn_unclaimed(self._roles, shapes)
            grids = {spec.name: self.blocks(self._roles[spec.name], spec.shape) for spec in bound.layout.parameters}
            self._runs[tensor] = block_runs(bound.layout, bound.rank, grids)
        return self._runs[tensor]

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
        active = [
            (group, tensor)
            for group in self.param_groups
            for tensor in group["params"]
            if tensor.grad is not None or tensor in self._bound  # inside an engine no gradient is a zero gradient
        ]
        if self._is_phantom(active):
            for _, tensor in active:
                self._state_of(tensor)
            return loss
        together: dict[Any, list[Tensor]] = {}
        scalars: dict[Any, Scalars] = {}
        for group, tensor in active:
            if tensor.grad is not None and tensor.grad.is_sparse:
                raise ValueError(f"sparse gradient in a parameter of shape {tuple(tensor.shape)}: not supported")
            if len(group["betas"]) != self.num_betas:
                raise ValueError(
                    f"{type(self).__name__} has {self.num_betas} betas, something set {group['betas']!r} in its groups "
                    '(DeepSpeed\'s OneCycle does, unless "cycle_momentum": false)'
                )
            step = int(self._state_of(tensor)["step"]) + 1  # on the host: nothing waits for a device
            key = (id(group), step, tensor.device, self._bound_tensor(tensor).group)
            together.setdefault(key, []).append(tensor)
            if key not in scalars:
                scalars[key] = self.scalars(group, step)
        calls = [self._call(tensors, scalars[key]) for key, tensors in together.items()]
        for _, tensor in active:  # nothing counts before everything that can be refused has passed
            self.state[tensor]["step"] += 1
        run(calls)
        return loss

    def _is_phantom(self, active: Sequence[tuple[dict[str, Any], Tensor]]) -> bool:
        """Whether this is torch's state initialization (`torch.distributed.checkpoint.state_dict._init_optim_state`).

        It steps an optimizer that has no state on zero gradients at learning rate 0; such a step must not count. The
        one look at the gradients that this costs happens only in that case.
        """
        if self.is_bound or self.state or not active or any(float(group["lr"]) != 0 for group, _ in active):
            return False
        return not any(bool(tensor.grad.any()) for _, tensor in active if tensor.grad is not None)

    def _state_of(self, tensor: Tensor) -> dict[str, Any]:
        state: dict[str, Any] = self.state[tensor]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            for name in self.rule.element_state:
                state[name] = torch.zeros_like(tensor, dtype=self.state_dtype, memory_format=torch.contiguous_format)
            for name in self.rule.block_state:
                slots = self._runs_of(tensor).num_slots
                state[name] = torch.zeros(slots, dtype=torch.float32, device=tensor.device)
        return state

    def _call(self, tensors: list[Tensor], scalars: Scalars) -> Call:
        bounds = [self._bound_tensor(tensor) for tensor in tensors]
        states = [self.state[tensor] for tensor in tensors]
        return Call(self.rule, tensors, states, self._tables_of(tensors, bounds), scalars, bounds[0].group)

    def _tables_of(self, tensors: list[Tensor], bounds: list[BoundTensor]) -> Tables:
        idle = [idle_parameters(bound) for bound in bounds]
        key = tuple(id(tensor) for tensor in tensors)
        if any(idle) or key not in self._tables:
            if self.rule.block_state:
                tables = block_tables([self._runs_of(tensor) for tensor in tensors], idle)
            else:
                tables = span_tables(bounds, idle)
            if any(idle):  # rare, and another set of parameters next time
                return tables
            if len(self._tables) >= _TABLES_KEPT:
                self._tables.clear()
            self._tables[key] = (tensors, tables)  # the tensors too, so that no other one gets their ids
        return self._tables[key][1]

    # -- checkpoints ------------------------------------------------------------------------------------------------

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As `torch.optim.Optimizer.load_state_dict`, but the state keeps the dtype and shape it was saved with.

        torch would cast every tensor to its parameter's dtype.

        Raises:
            ValueError: the state is not this optimizer's.
        """
        # Ours must be the last hook before torch's cast and the first after it, whatever hooks a user registered.
        keep = self.register_load_state_dict_pre_hook(_keep_dtypes)
        restore = self.register_load_state_dict_post_hook(_restore_dtypes, prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            keep.remove()
            restore.remove()

    def state_problems(self, state_dict: Mapping[str, Any]) -> list[str]:
        """What in a state dict cannot be this optimizer's, as sentences: other keys, other shapes, other blocks."""
        expected = {"step", *self.rule.element_state, *self.rule.block_state}
        tensors = [tensor for group in self.param_groups for tensor in group["params"]]
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        problems = []
        for key, tensor in zip(keys, tensors, strict=False):  # torch judges their number
            state = state_dict["state"].get(key)
            if not state:
                continue
            if set(state) != expected:
                problems.append(f"the state has {sorted(state)}, {type(self).__name__} keeps {sorted(expected)}")
                continue
            sizes = {name: tensor.numel() for name in self.rule.element_state}
            sizes.update({name: self._runs_of(tensor).num_slots for name in self.rule.block_state})
            problems += [
                f"{name} of a tensor of shape {tuple(tensor.shape)} has {state[name].numel()} values, not {size}"
                + (" (saved with other roles or another number of ranks)" if name in self.rule.block_state else "")
                for name, size in sizes.items()
                if state[name].numel() != size
            ]
            problems += [
                f"{name} has shape {tuple(state[name].shape)}, its parameter {tuple(tensor.shape)}"
                for name in self.rule.element_state
                if state[name].numel() == tensor.numel() and state[name].shape != tensor.shape
            ]
        return list(dict.fromkeys(problems))


class _Kept:
    """A tensor that torch's loader must leave alone: neither a tensor, nor a mapping, nor iterable."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _keep_dtypes(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    assert isinstance(optimizer, ShardedOptimizer)
    raise_all(optimizer.state_problems(state_dict), "this state dict was not saved by the same optimizer")
    kept = {
        key: {name: _Kept(value) if isinstance(value, Tensor) else value for name, value in state.items()}
        for key, state in state_dict["state"].items()
    }
    return {**state_dict, "state": kept}


def _restore_dtypes(optimizer: torch.optim.Optimizer) -> None:
    for tensor, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, _Kept):
                device = value.tensor.device if name == "step" else tensor.device
                state[name] = value.tensor.detach().to(device, copy=True)


def _dtype_of(value: Any) -> torch.dtype | None:
    """A dtype that state can be kept in, also from its name in a JSON (``"bf16"``, ``"torch.float32"``)."""
    return _DTYPES.get(str(value).removeprefix("torch."))


def raise_all(problems: Sequence[str], subject: str) -> None:
    """One error that lists every problem, if there are any."""
    if problems:
        raise ValueError(f"{subject}:\n- " + "\n- ".join(problems))
