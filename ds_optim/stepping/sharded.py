"""The class that users see: `torch.optim`'s surface, over a rule, the shards that it steps and the stepper of its kind.

Unbound, an optimizer treats each parameter as it lies; a strategy's reader binds it to partitions. The step count lives
with the state of each tensor, since DeepSpeed steps groups and sub-groups one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from ds_optim.errors import raise_all, raise_on_all_ranks
from ds_optim.roles.role import Role
from ds_optim.rule import AnyRule, WholeMatrix
from ds_optim.sharding import dtensor
from ds_optim.sharding.binding import Binding, BoundTensor, verify
from ds_optim.sharding.exchange import ALONE
from ds_optim.sharding.layout import Layout
from ds_optim.sharding.plan import Plan
from ds_optim.stepping.agreement import Agreement, Freezing, Joined, backends, is_phantom, refuse_other_betas
from ds_optim.stepping.deferred import is_deferred
from ds_optim.stepping.in_place import InPlace
from ds_optim.stepping.logical_tensors import LogicalParameter
from ds_optim.stepping.names import NAMES, ParameterNames
from ds_optim.stepping.options import COMMON, EXCHANGE, PRODUCTS, Options, setting_problems
from ds_optim.stepping.owned_blocks import OwnedBlocks
from ds_optim.stepping.shards import Elsewhere, ParameterShards, Shards
from ds_optim.stepping.state_dict import StateDictForm, release
from ds_optim.stepping.stepper import Together, fresh_state, logical_of, other_structure
from ds_optim.stepping.surroundings import refuse_capture, without_autocast

waiting: WeakSet[ShardedOptimizer] = WeakSet()
"""Those that no engine has taken: some strategies drop an optimizer without a word."""


class ShardedOptimizer(torch.optim.Optimizer):
    """Base of all optimizers here. Subclasses give `rule` and their constructor's signature.

    Args:
        params: parameters, ``(name, parameter)`` pairs, or groups of either, as `torch.optim` takes them.
        defaults: per-group settings; those in a whole-matrix rule's ``structure`` hold for all groups.
        roles: what each parameter is: the result of `infer_roles`, the model, or ``{pattern: role}``. Inside a
            DeepSpeed engine the model is known and patterns only override. Elementwise rules need them for state
            in eight bits alone.
        state_dtype: of the state per element: fp32, bf16 or "int8", see `ds_optim.stepping.eight_bits`; state per block
            is always fp32.
        int8_embeddings: whether embeddings' state is kept in eight bits too.
        bf16_stochastic_round: round parameters in bf16 up or down at random, so that on average no update is lost, see
            `ds_optim.kernels.rounding`: for training without an fp32 master copy. Parameters of other dtypes are
            rounded to nearest.
        seed: of that, a whole number >= 0. The same seed, steps and parameter names give the same bits.
        options: the last four, and of a whole-matrix rule ``exchange_bucket_size``: elements that travel at a time; no
            rank has more than four such buckets in flight or in work, unless a single block is larger;
            ``exchange_dtype``: of gradients and updates between holders and owners, fp32, or bf16 to halve what
            travels; it rounds what an owner holds itself as well, so that the result does not depend on who holds what;
            ``matmul_precision``: of its products, "ieee", "tf32" or "bf16", see `ds_optim.linalg.precision`.

    Raises:
        ValueError: every setting out of range, all in one message.

    Attributes:
        options: the settings of the whole optimizer.
        shards: the tensors that it steps and what they hold.
        stepper: how they are stepped.
    """

    rule: ClassVar[AnyRule]
    options: Options
    shards: Shards
    stepper: InPlace | OwnedBlocks

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        *,
        roles: Any,
        **options: Any,
    ) -> None:
        unknown = options.keys() - (*COMMON, *((*EXCHANGE, *PRODUCTS) if isinstance(self.rule, WholeMatrix) else ()))
        if unknown:
            raise TypeError(f"{type(self).__name__} has no option {', '.join(sorted(unknown))}")
        raise_all(self.setting_problems({**defaults, **options}), type(self).__name__)
        self._set_up(roles, Options.of(options), defaults)
        super().__init__(params, defaults)

    def _set_up(self, roles: Any, options: Options, defaults: dict[str, Any]) -> None:
        waiting.add(self)
        owner = type(self).__name__
        self.options = options
        self.roles_given = roles
        self.ranks = ALONE
        self._names = ParameterNames(roles)
        self._agreement = Agreement(owner, self.rule, options)
        self._freezing = Freezing({})
        self._settle_gradients: Callable[[], None] | None = None
        self._joined: Joined | None = None
        self.shards = ParameterShards(self, self._names, roles)
        self.stepper = self._stepper_over(self.shards, defaults)

    def _stepper_over(self, shards: Shards, defaults: dict[str, Any]) -> InPlace | OwnedBlocks:
        owner = type(self).__name__
        if isinstance(self.rule, WholeMatrix):
            return OwnedBlocks(self.rule, defaults, self.options, shards, owner)
        return InPlace(self.rule, self.options, shards, owner)

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy. A bound optimizer belongs to its engine: save the engine's checkpoint instead."""
        if self.is_bound:
            raise TypeError(
                f"this {type(self).__name__} is bound to a DeepSpeed engine and cannot be copied or pickled: save the "
                "engine (engine.save_checkpoint, ds_optim.checkpoint.save)"
            )
        given = self._names.saved(self.param_groups), self.roles_given, self.options
        return {**super().__getstate__(), "_given": given}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        given = state.pop("_given", None)  # absent where torch's load_state_dict hands over what it loaded
        super().__setstate__(state)
        if given is not None:
            names, roles, options = given
            self._set_up(roles, options, self.defaults)
            self._names.restore(names, self.param_groups)

    # -- settings ---------------------------------------------------------------------------------------------------

    @classmethod
    def setting_problems(cls, settings: Mapping[str, Any]) -> list[str]:
        """Everything that is wrong with settings, as sentences; those that are absent are not judged."""
        return setting_problems(cls.rule, settings)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; ``(name, parameter)`` pairs are taken apart, names kept without wrapper prefixes."""
        owner, group = type(self).__name__, dict(param_group)
        others = [
            f"{key} is a setting of the whole optimizer: {self.defaults[key]!r}, not {group[key]!r} for one group"
            for key in other_structure(self.stepper, group)
        ]
        raise_all(others, f"{owner}: a parameter group")
        if isinstance(group["params"], set):
            raise TypeError("parameters must be in an order that is the same on every rank: give a list, not a set")
        listed = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        names = group.pop(NAMES, ())  # of a group of another optimizer of torch's
        if len(names) == len(listed) and all(isinstance(entry, Tensor) for entry in listed):
            listed = list(zip(names, listed, strict=True))
        group["params"] = [entry[1] if isinstance(entry, tuple) else entry for entry in listed]
        raise_all(self.setting_problems(group), f"{owner}: a parameter group")
        problems = [*self.options.denied_by(group), *self._names.enter(listed)]
        for parameter in group["params"]:
            # What is frozen, a quantised base perhaps, is judged before its first step, if there is one.
            if isinstance(parameter, Tensor) and parameter.requires_grad:
                name = self._names[parameter]
                problems += self._agreement.problems_of(name, parameter, dtensor.read(name, parameter))
        raise_all(problems, owner)
        super().add_param_group(group)
        self._names.close_group(group["params"])
        if isinstance(self.shards, ParameterShards):
            self.shards.expect_others()

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
        self._freezing = Freezing(given or {})
        chosen, plans = "", dict[dist.ProcessGroup | None, str]()
        shards = Shards(binding.tensors, roles, Elsewhere.of(binding, roles))
        self.take_over(self._stepper_over(shards, self.defaults))
        self.ranks, self._settle_gradients = binding.ranks, binding.settle
        try:
            chosen = backends(self.stepper, list(binding.tensors))
        except Exception as error:  # whatever it is, the other ranks must hear of it
            binding = replace(binding, problems=(*binding.problems, f"no kernels: {error}"))
        try:
            if not binding.problems:
                plans = self.stepper.agreed()
        except Exception as error:  # likewise
            binding = replace(binding, problems=(*binding.problems, f"{type(error).__name__}: {error}"))
        verify(binding, chosen, plans)

    def take_over(self, stepper: InPlace | OwnedBlocks) -> None:
        """Step the tensors of other shards from now on. Nothing is compared over ranks, as `bind` does.

        Args:
            stepper: of this optimizer's rule.
        """
        self.shards, self.stepper, self._joined = stepper.shards, stepper, None

    @property
    def is_bound(self) -> bool:
        """Whether a strategy's tensors are stepped (`bind` was called), rather than parameters."""
        return self.shards.is_bound

    @property
    def bound_tensors(self) -> Mapping[Tensor, BoundTensor]:
        """The local tensors of the engine, none without one."""
        return {tensor: self.shards.of(tensor) for tensor in self.shards.tensors} if self.is_bound else {}

    def _join(self, tensors: Sequence[Tensor]) -> Joined:
        """Take up parameters that were not seen before; all ranks that they lie on must call it."""
        is_known = self._joined is not None and self._joined.key == Joined.key_of(tensors, self.shards)
        if isinstance(self.shards, ParameterShards):
            if not is_known:
                self.shards.follow_replaced()
                self._agreement.check(tensors, self.param_groups, self.stepper)
            self.stepper.kept.follow_plan(self.state)
        if self._joined is None or not is_known:
            self._joined = Joined.of(tensors, self.shards)
        return self._joined

    # -- the step ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step over all gradients at hand. Returns the closure's loss, if one is given.

        A NaN or infinity in a gradient reaches the elements (under Adam-mini: the blocks) that it belongs to, as in
        torch.optim; nothing waits for the device to find out. Autocast is off inside.

        Raises:
            RuntimeError: it would be captured in a CUDA graph.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not is_deferred():
            refuse_capture()
            with without_autocast():
                self._step_now()
        return loss

    def _step_now(self) -> None:
        self._freezing.check()
        always = self.shards.always_steps
        given = [
            (group, [tensor for tensor in group["params"] if tensor.grad is not None or always(tensor)])
            for group in self.param_groups
        ]
        active = [(group, tensors) for group, tensors in given if tensors]
        joined = self._join([tensor for _, tensors in active for tensor in tensors])
        if self._settle_gradients is not None:
            self._settle_gradients()
        if not (self.is_bound or self.state) and is_phantom(active, self.shards):
            for tensor in joined.tensors:
                self.state_of(tensor)
            return
        groups = {id(group): group for group, _ in active}
        refuse_other_betas(type(self).__name__, self.rule.betas.count, groups.values())
        joined.refuse_unfit(self.shards)
        together: dict[Together, list[Tensor]] = {}
        steps: list[Tensor] = []
        bounds = iter(joined.bounds)
        for group, tensors in active:
            last, here, group_id = None, list[Tensor](), id(group)
            for tensor, bound in zip(tensors, bounds, strict=False):
                steps.append(self.state_of(tensor)["step"])
                key = group_id, int(steps[-1]) + 1, tensor.device, bound.group  # on the host: nothing waits
                if key != last:  # neighbours mostly go together
                    last, here = key, together.setdefault(Together(*key), [])
                here.append(tensor)
        launches = self.stepper.prepare(together, groups, self.state)
        if steps:  # nothing counts before everything that can be refused has passed
            torch._foreach_add_(steps, torch.ones((), device="cpu"))  # a number becomes a tensor for each of them
        for launch in launches:
            launch()

    def state_of(self, tensor: Tensor) -> dict[str, Any]:
        """The state of a local tensor; made, all zero and before the first step, if there is none."""
        state: dict[str, Any] = self.state[tensor]
        if not state:
            state.update(fresh_state(self.stepper, tensor))
        elif not state["step"].is_cpu:  # DeepSpeed's reload_states moves every tensor
            state["step"] = state["step"].cpu()
        return state

    # -- plans and predictions --------------------------------------------------------------------------------------

    @property
    def plan(self) -> Plan:
        """Who owns which block; ``print(optimizer.plan.explain())``. Of the first shard group if there are several.

        Raises:
            AttributeError: no block travels under this rule.
        """
        if not isinstance(self.stepper, OwnedBlocks):
            raise AttributeError(f"{type(self).__name__} has no plan: every rank steps what it holds")
        return self.stepper.plans.listed[0]

    def predicted(
        self,
        layouts: Sequence[Layout],
        rank: int,
        roles: Mapping[str, Role] | None = None,
        elsewhere: Elsewhere | None = None,
    ) -> InPlace | OwnedBlocks:
        """How this optimizer would step one rank's tensors of a strategy: what it keeps, plans and needs there.

        Found from shapes alone, and it leaves no trace: nothing is allocated, and the optimizer stays as it is. For
        other ranks of the same layouts ask its ``at_rank``.

        Args:
            layouts: of the local tensors.
            rank: in the shard group.
            roles: of the parameters in them; None: they are those that this optimizer was given, by the same names.
            elsewhere: what other ranks step.
        """
        known = self.shards.roles if roles is None else roles
        return self._stepper_over(Shards.predicted(layouts, rank, known, elsewhere), self.defaults)

    # -- checkpoints ------------------------------------------------------------------------------------------------

    def logical(self) -> dict[Tensor, list[LogicalParameter]]:
        """What is kept for every parameter and which part of it lies on this rank, by local tensor.

        Found from layouts alone: state need not exist yet. Parameters that are not trained are left out.
        """
        if self.state:
            self._join(self.shards.tensors)
        return logical_of(self.stepper)

    @property
    def state_form(self) -> StateDictForm:
        """How its state looks in a state dict, and whether one is its."""
        groups = [group["params"] for group in self.param_groups]
        names = [
            self._names.in_group(index, tensors, self.shards.whole(tensors)) for index, tensors in enumerate(groups)
        ]
        replaced = frozenset(i for i, tensors in enumerate(groups) if any(one not in self._names for one in tensors))
        has_blocks = not self.rule.is_elementwise
        return StateDictForm(type(self).__name__, self.param_groups, names, replaced, self.stepper, has_blocks)

    def state_dict(self) -> dict[str, Any]:
        """As `torch.optim.Optimizer.state_dict`.

        State of blocks of DTensors is brought into the form of a DTensor: all ranks of their mesh must call it. Where
        parameters are replicated over ranks (ZeRO-0) and blocks have owners, every owner's are gathered, so that
        whichever rank saves has all of them: all ranks must call it, as DeepSpeed's ``save_checkpoint`` does. The names
        of parameters that have one, their own or the model's (``roles=model``), are in it under ``"param_names"``, a
        list for each group.
        """
        if self.state and isinstance(self.rule, WholeMatrix):
            self._join(self.shards.tensors)
        return self.state_form.complete(super().state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As `torch.optim.Optimizer.load_state_dict`, but the state keeps the dtype and shape it was saved with.

        torch would cast every tensor to its parameter's dtype. Where the state dict and the parameters both have names,
        state goes by name, not by position; settings belong to groups and go by the groups' position. Of a gathered
        state every owner takes its blocks.

        Raises:
            ValueError: the state is not this optimizer's, or of parameters of other names.
        """
        if isinstance(self.shards, ParameterShards) and (
            isinstance(self.rule, WholeMatrix) or any(isinstance(one, DTensor) for one in self.shards.tensors)
        ):
            self.shards.follow_replaced()
        form = self.state_form

        def keep(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
            subject = "this state dict was not saved by the same optimizer"
            raise_on_all_ranks(form.problems(state_dict), subject, self.ranks)  # without an engine it is alone
            return form.keeping_dtypes(state_dict)

        # Ours must be the last hook before torch's cast and the first after it, whatever hooks a user registered.
        before = self.register_load_state_dict_pre_hook(keep)
        behind = self.register_load_state_dict_post_hook(release, prepend=True)
        try:
            super().load_state_dict(form.from_mesh(form.of_this_rank(state_dict)))
        finally:
            before.remove()
            behind.remove()
        self.stepper.forget_past()
