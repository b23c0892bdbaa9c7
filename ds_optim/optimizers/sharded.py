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
from typing import Any

import torch
from torch import Tensor

from ds_optim import kernels
from ds_optim.optimizers.launch import Call, Rule, Scalars, Tables, block_tables, idle_parameters, run, span_tables
from ds_optim.role import Role
from ds_optim.roles import canonical_name, logical_shape, resolve_roles, warn_unclaimed
from ds_optim.sharding.binding import Binding, BoundTensor, dtype_of, verify, whole
from ds_optim.sharding.blocks import BlockGrid
from ds_optim.sharding.runs import Runs, block_runs

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
        self._names: dict[Tensor, str] = {}
        self._bound: dict[Tensor, BoundTensor] = {}
        self._missing_is_zero = False
        self._roles_given = roles
        self._roles: dict[str, Role] = {}
        self._runs: dict[Tensor, Runs] = {}
        self._tables: dict[tuple[int, ...], tuple[list[Tensor], Tables]] = {}
        _raise_all(self.setting_problems({**defaults, "state_dtype": state_dtype}), f"{type(self).__name__}")
        self.state_dtype = dtype_of(state_dtype)
        super().__init__(params, defaults)
        self._keep = self.register_load_state_dict_pre_hook(_keep_dtypes)
        self._restore = self.register_load_state_dict_post_hook(_restore_dtypes)

    # -- settings ---------------------------------------------------------------------------------------------------

    @classmethod
    def setting_problems(cls, settings: Mapping[str, Any]) -> list[str]:
        """Everything that is wrong with a group's settings, as sentences; settings that are absent are not judged."""
        problems = []

        def number(key: str, good: Callable[[float], bool], wanted: str) -> None:
            value = settings.get(key, None)
            if value is None or (isinstance(value, Tensor) and value.numel() == 1):
                return
            if isinstance(value, bool) or not isinstance(value, int | float) or not good(value):
                problems.append(f"{key} must be {wanted}, not {value!r}")

        number("lr", lambda value: value >= 0, "a number >= 0")
        number("eps", lambda value: value >= 0, "a number >= 0")
        number("weight_decay", lambda value: value >= 0, "a number >= 0")
        try:
            dtype_of(settings.get("state_dtype", torch.float32))
        except ValueError as error:
            problems.append(str(error))
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
                    if isinstance(beta, bool) or not isinstance(beta, int | float) or not 0 <= beta < 1:
                        problems.append(f"every beta must lie in [0, 1), not {beta!r}")
        return problems

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; ``(name, parameter)`` pairs are taken apart, names kept without wrapper prefixes."""
        group = dict(param_group)
        listed = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        group["params"] = [entry[1] if isinstance(entry, tuple) else entry for entry in listed]
        _raise_all(self.setting_problems(group), f"{type(self).__name__}: a parameter group")
        problems = []
        for entry in listed:
            name, parameter = entry if isinstance(entry, tuple) else (None, entry)
            if not isinstance(parameter, Tensor):
                continue  # torch says so better
            self._names[parameter] = canonical_name(name) if name else f"parameter {len(self._names)}"
            if parameter.is_complex() or parameter.is_sparse:
                problems.append(f"{self._names[parameter]} is complex or sparse: give it to another optimizer")
            if type(parameter.data).__name__ == "DTensor":
                problems.append(
                    f"{self._names[parameter]} is a DTensor: FSDP2 and tensor parallelism are not supported yet; "
                    "use DeepSpeed ZeRO, DDP or a single device"
                )
        _raise_all(problems, f"{type(self).__name__}")
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
        devices = {tensor.device for tensor in binding.tensors}
        chosen = sorted({kernels.backend_for(device) for device in devices})
        verify(binding, "+".join(chosen))
        self._bound = dict(binding.tensors)
        self._missing_is_zero = binding.missing_is_zero
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
            if tensor.grad is not None or (self._missing_is_zero and tensor.requires_grad)
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
            state = self._state_of(tensor)
            state["step"] += 1
            step = int(state["step"])  # on the host: nothing waits for a device
            key = (id(group), step, tensor.device, self._bound_tensor(tensor).group)
            together.setdefault(key, []).append(tensor)
            if key not in scalars:
                scalars[key] = self.scalars(group, step)
        run([self._call(tensors, scalars[key]) for key, tensors in together.items()])
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
        self._keep.remove()
        self._restore.remove()
        self._keep = self.register_load_state_dict_pre_hook(_keep_dtypes)
        self._restore = self.register_load_state_dict_post_hook(_restore_dtypes, prepend=True)
        super().load_state_dict(state_dict)

    def state_problems(self, state_dict: Mapping[str, Any]) -> list[str]:
        """What in a state dict cannot be this optimizer's, as sentences."""
        expected = {"step", *self.rule.element_state, *self.rule.block_state}
        found = {frozenset(state) for state in state_dict["state"].values() if state}
        return [
            f"the state has {sorted(keys)}, {type(self).__name__} keeps {sorted(expected)}"
            for keys in sorted(found, key=sorted)
            if keys != expected
        ]


class _Kept:
    """A tensor that torch's loader must leave alone: neither a tensor, nor a mapping, nor iterable."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _keep_dtypes(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    assert isinstance(optimizer, ShardedOptimizer)
    _raise_all(optimizer.state_problems(state_dict), "this state dict was not saved by the same optimizer")
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


def _raise_all(problems: list[str], subject: str) -> None:
    if problems:
        raise ValueError(f"{subject}:\n- " + "\n- ".join(problems))
