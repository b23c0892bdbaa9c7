"""Where a rule meets a layout: everything that the optimizers share and that their formulas need not know.

`ShardedOptimizer` is a `torch.optim.Optimizer` whose ``step`` walks local tensors (a ZeRO partition, a plain parameter)
as spans and blocks of the model's parameters. Unbound, it treats each parameter as whole. A strategy's reader binds it to
partitions. The step count lives with the state of each tensor, since DeepSpeed steps groups and sub-groups one by one.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ds_optim import kernels
from ds_optim.role import Role
from ds_optim.roles import canonical_name, logical_shape, resolve_roles, warn_unclaimed
from ds_optim.sharding.binding import Binding, BoundTensor, dtype_of, verify, whole
from ds_optim.sharding.blocks import BlockGrid
from ds_optim.sharding.exchange import PendingSum
from ds_optim.sharding.runs import Runs, block_runs, merged, spans_of

Scalars = dict[str, Any]
"""A formula's constants for one call, by name: Python floats, or 0-dim tensors where the learning rate is one."""

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


@dataclass(frozen=True, slots=True)
class Rule:
    """The mathematics of an optimizer, as its formula and the state it keeps.

    Attributes:
        name: the formula's name among the native kernels.
        update: the formula, a pure function ``(param, grad, *states, **scalars) -> (param, *states)`` on fp32 tensors;
            a blockwise rule's takes its blocks' mean squared gradient after ``grad``.
        element_state: state with one value per element.
        block_state: state with one value per block; a rule that has any is blockwise.
    """

    name: str
    update: Callable[..., tuple[Tensor, ...]]
    element_state: tuple[str, ...]
    block_state: tuple[str, ...] = ()


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

    def __init__(
        self, params: Any, defaults: dict[str, Any], *, roles: Any, state_dtype: torch.dtype | str
    ) -> None:
        self._names: dict[Tensor, str] = {}
        self._bound: dict[Tensor, BoundTensor] = {}
        self._missing_is_zero = False
        self._roles_given = roles
        self._roles: dict[str, Role] = {}
        self._runs: dict[Tensor, Runs] = {}
        self._tables: dict[tuple[int, ...], _Tables] = {}
        self.state_dtype = dtype_of(state_dtype)
        _raise_all(self.setting_problems(defaults), f"{type(self).__name__}")
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
        launches: dict[tuple[int, int, torch.device], _Launch] = {}
        for group, tensor in active:
            state = self._state_of(tensor)
            state["step"] += 1
            step = int(state["step"])
            key = (id(group), step, tensor.device)
            if key not in launches:
                launches[key] = _Launch(self.scalars(group, step), [])
            launches[key].tensors.append(tensor)
        self._run(list(launches.values()))
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

    def _run(self, launches: list[_Launch]) -> None:
        if not self.rule.block_state:
            for launch in launches:
                call = self._call(launch)
                kernels.elementwise(
                    call.backend,
                    self.rule.name,
                    self.rule.update,
                    call.params,
                    call.grads,
                    call.states,
                    call.tables.spans,
                    launch.scalars,
                )
                call.finish()
            return
        self._run_blocks([self._call(launch) for launch in launches])

    def _run_blocks(self, calls: list[_Call]) -> None:
        """Sums of cut blocks travel while whole blocks are updated; then cut blocks follow."""
        for call in calls:
            call.cut_sums = call.new_cut_sums()
            if call.tables.num_cuts:
                kernels.partial_sums(
                    call.backend, call.grads, call.tables.row_runs, call.tables.column_runs, call.cut_sums
                )
        pending = [PendingSum(call.cut_sums, call.group) for call in calls if call.tables.num_cuts and call.group]
        for select in ("uncut", "cut"):
            if select == "cut":
                for sums in pending:
                    sums.wait()
            for call in calls:
                if select == "uncut" or call.tables.num_cuts:
                    kernels.blockwise(
                        call.backend,
                        self.rule.name,
                        self.rule.update,
                        call.params,
                        call.grads,
                        call.states,
                        call.block_states,
                        call.tables.row_runs,
                        call.tables.column_runs,
                        call.cut_sums,
                        call.scalars,
                        select,
                    )
        for call in calls:
            call.finish()

    def _call(self, launch: _Launch) -> _Call:
        params, grads, copied = [], [], []
        for tensor in launch.tensors:
            flat, grad = tensor.detach(), tensor.grad
            if not flat.is_contiguous():  # e.g. channels_last: rules see row-major elements
                flat = flat.contiguous()
                copied.append((tensor, flat))
            if grad is not None:
                if grad.is_sparse:
                    raise ValueError(f"sparse gradient in a parameter of shape {tuple(tensor.shape)}: not supported")
                grad = grad.detach().contiguous().view(-1)
            params.append(flat.view(-1))
            grads.append(grad)

        def states(names: tuple[str, ...]) -> list[list[Tensor]]:
            return [[self.state[tensor][name].view(-1) for tensor in launch.tensors] for name in names]

        return _Call(
            kernels.backend_for(params[0].device),
            params,
            grads,
            states(self.rule.element_state),
            states(self.rule.block_state),
            self._tables_of(launch.tensors),
            launch.scalars,
            self._bound_tensor(launch.tensors[0]).group,
            copied,
        )

    def _tables_of(self, tensors: list[Tensor]) -> _Tables:
        key = tuple(id(tensor) for tensor in tensors)
        idle = [
            {
                index
                for index, spec in enumerate(bound.layout.parameters)
                if bound.used is not None and not bound.used(spec.name)
            }
            for bound in map(self._bound_tensor, tensors)
        ]
        if any(idle):  # rare: some parameter was not used in this step
            return self._build_tables(tensors, idle)
        if key not in self._tables:
            self._tables[key] = self._build_tables(tensors, idle)
        return self._tables[key]

    def _build_tables(self, tensors: list[Tensor], idle: list[set[int]]) -> _Tables:
        if not self.rule.block_state:
            spans = []
            for index, tensor in enumerate(tensors):
                bound = self._bound_tensor(tensor)
                pieces = spans_of(bound.layout, bound.rank)
                if idle[index]:
                    spans += [(index, start, length, int(p not in idle[index])) for start, length, p in pieces]
                else:
                    spans += [(index, start, length, 1) for start, length in merged(pieces)]
            return _Tables(spans=torch.tensor(spans, dtype=torch.int64).reshape(-1, 4))
        rows, columns, cuts = [], [], 0
        for index, tensor in enumerate(tensors):
            runs = self._runs_of(tensor)
            for *head, first, last, parameter in runs.rows:
                shifted = (cut + cuts if cut >= 0 else -1 for cut in (first, last))
                rows.append((index, *head, *shifted, int(parameter not in idle[index])))
            for *head, cut, block_numel, parameter in runs.columns:
                shifted_cut = cut + cuts if cut >= 0 else -1
                columns.append((index, *head, shifted_cut, block_numel, int(parameter not in idle[index])))
            cuts += runs.num_cuts
        return _Tables(
            row_runs=torch.tensor(rows, dtype=torch.int64).reshape(-1, 9),
            column_runs=torch.tensor(columns, dtype=torch.int64).reshape(-1, 12),
            num_cuts=cuts,
        )

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


@dataclass(slots=True)
class _Tables:
    """The kernel tables of one list of tensors."""

    spans: Tensor | None = None
    row_runs: Tensor | None = None
    column_runs: Tensor | None = None
    num_cuts: int = 0


@dataclass(slots=True)
class _Launch:
    """Tensors that share their settings and their step count."""

    scalars: Scalars
    tensors: list[Tensor]


@dataclass(slots=True)
class _Call:
    """One kernel call: flat views of what it reads and writes."""

    backend: kernels.Backend
    params: list[Tensor]
    grads: list[Tensor | None]
    states: list[list[Tensor]]
    block_states: list[list[Tensor]]
    tables: _Tables
    scalars: Scalars
    group: dist.ProcessGroup | None
    copied: list[tuple[Tensor, Tensor]]
    cut_sums: Tensor | None = None

    def new_cut_sums(self) -> Tensor:
        device = self.params[0].device
        dtype = torch.float32 if device.type == "mps" else torch.float64
        return torch.zeros(self.tables.num_cuts, dtype=dtype, device=device)

    def finish(self) -> None:
        for tensor, flat in self.copied:
            tensor.copy_(flat.view(tensor.shape))


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

