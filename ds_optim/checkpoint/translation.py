"""What lies in the directory that DeepSpeed's own ``save_checkpoint`` wrote, in the words of the canonical form.

What the optimizer keeps and where it lies is asked of the optimizer itself, over meta tensors laid out as the ranks'
were; this file only brings its answer and the files together. Nothing is read before somebody copies from it.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ds_optim.checkpoint import content
from ds_optim.checkpoint.directory import heading
from ds_optim.checkpoint.ranges import Ranges, copy
from ds_optim.deepspeed import engine_state
from ds_optim.deepspeed.checkpoint_files import DeepSpeedFiles, RankStates
from ds_optim.deepspeed.configuration import DsOptimObject
from ds_optim.errors import CheckpointError, in_one
from ds_optim.roles import canonical_name, decayed_then_exempt, exempt_names
from ds_optim.roles.role import Role
from ds_optim.rule import WholeMatrix
from ds_optim.sharding.layout import ParameterSpec, Replicated
from ds_optim.stepping.eight_bits import EIGHT_BITS, is_codes
from ds_optim.stepping.in_place import InPlace
from ds_optim.stepping.names import NAMES
from ds_optim.stepping.owned_blocks import OwnedBlocks
from ds_optim.stepping.sharded import ShardedOptimizer
from ds_optim.stepping.stepper import logical_of


@dataclass(frozen=True, slots=True)
class Origin:
    """What is known of the training that saved a checkpoint, besides its files.

    Attributes:
        cls: its optimizer.
        config: its DeepSpeed configuration, as far as it is known.
        model: its parameters' logical shapes, by name; None: which model it was is not known.
        roles: of the parameters.
        in_eight_bits: options that say which state is in eight bits.
        remedy: what to do where the files are another run's.
    """

    cls: type[ShardedOptimizer]
    config: Mapping[str, Any]
    model: Mapping[str, tuple[int, ...]] | None = None
    roles: Mapping[str, Role] = field(default_factory=dict)
    in_eight_bits: Mapping[str, Any] = field(default_factory=dict)
    remedy: str = ""

    def misfit(self, files: DeepSpeedFiles, problems: Sequence[str]) -> CheckpointError:
        """The error that says so."""
        subject = f"{files.folder} is not of this model and configuration"
        return CheckpointError(in_one(list(dict.fromkeys(problems)), subject, self.remedy))


class Translation:
    """A checkpoint of DeepSpeed's as the canonical one that `ds_optim.checkpoint.save` would have written then.

    Args:
        files: of the checkpoint.
        run: that saved it.
        groups: the parameters of each group, in order; needed at ZeRO-0 only.

    Attributes:
        about: what would stand in ``about.json``.
        names: of all parameters and buffers in it, trained or not.

    Raises:
        CheckpointError: the files are not those of this model, of this optimizer, or of no DeepSpeed that is known.
    """

    def __init__(self, files: DeepSpeedFiles, run: Origin, groups: Sequence[Sequence[ParameterSpec]]) -> None:
        self._files, self._run = files, run
        self._names = [[spec.name for spec in group] for group in groups]
        self._layouts = files.layouts(groups)
        self._refuse_other_shapes()
        first = files.rank(0, self._names)
        self._optimizer = self._made(first)
        self._stepper = self._optimizer.predicted(self._layouts, 0, run.roles)
        self._trained = {spec.name for layout in self._layouts for spec in layout.parameters}
        state = self._training_state(0, first)
        self._first = content.to_write(state)
        self.names = self._trained | set(state.untrained)
        self.about = {**self._heading(first), **content.described(state)}

    @property
    def ranks(self) -> range:
        """Those that have anything of their own."""
        return range(self._files.world_size if self._files.is_zero else 1)

    def of_rank(self, rank: int) -> dict[str, Ranges]:
        """What a rank would have stored, by name. Its files are mapped while the result is alive, and not read."""
        if rank == 0:
            return self._first
        return content.to_write(self._training_state(rank, self._files.rank(rank, self._names)))

    def read(self, wanted: Mapping[str, Ranges], where: float) -> None:
        """Fill tensors of this process, by name, one rank's files after the other, until nothing is missing.

        Args:
            where: the middle of this rank's share of a row of all ranks, between 0 and 1: those who were there come
                first. A thousand ranks that all open a thousand files are a burden on what they share.

        Raises:
            CheckpointError: not all that is wanted was saved.
        """
        numel, found = sum(values.numel() for one in wanted.values() for _, values in one.held()), 0
        place = where * len(self.ranks) - 0.5
        with torch.no_grad():
            for rank in sorted(self.ranks, key=lambda rank: (rank > 0, abs(rank - place))):  # rank 0's are open
                if found >= numel:
                    break
                found += copy(wanted, self.of_rank(rank))
        if found != numel:
            raise CheckpointError(f"{self._files.folder} has {found} of the {numel} values that are needed here")

    def _heading(self, states: RankStates) -> dict[str, Any]:
        files, window = self._files, self._run.config.get("gradient_accumulation_steps")
        steps = files.main["global_steps"]
        engine = SimpleNamespace(
            global_steps=steps,
            global_samples=files.main["global_samples"],
            skipped_steps=files.main["skipped_steps"],
            micro_steps=steps * (window if isinstance(window, int) else 1),  # DeepSpeed does not save it
            optimizer=SimpleNamespace(loss_scaler=states.scaler),
        )
        return heading(files.world_size, engine_state.counters(engine))

    def _refuse_other_shapes(self) -> None:
        shapes, found = self._run.model, []
        for spec in (spec for layout in self._layouts for spec in layout.parameters) if shapes is not None else ():
            assert shapes is not None
            if spec.name not in shapes:
                found.append(f"the model has no parameter {spec.name}")
            elif shapes[spec.name] != spec.shape:
                found.append(f"{spec.name} has shape {spec.shape} in the checkpoint, {shapes[spec.name]} in the model")
        if found:
            raise self._run.misfit(self._files, found)

    def _made(self, states: RankStates) -> ShardedOptimizer:
        """The optimizer that was saved, over tensors of no size that stand for those of any rank."""
        files, cls = self._files, self._run.cls
        saved = states.optimizer["param_groups"]
        sizes = [len(group["params"]) for group in saved]
        if sum(sizes) != len(self._layouts) or len(states.masters) != len(self._layouts):
            raise CheckpointError(
                f"{files.folder}: the optimizer stepped {sum(sizes)} tensors, {len(states.masters)} were saved, its "
                f"parameters make {len(self._layouts)}: no DeepSpeed that is known here wrote it"
            )
        options: dict[str, Any] = {
            key: saved[0][key] for key in inspect.signature(cls).parameters if key in saved[0] and key != "params"
        }
        elements = (cls.rule.others if isinstance(cls.rule, WholeMatrix) else cls.rule).element_state
        every = list(states.optimizer["state"].values())
        kept = [state[key].dtype for state in every for key in elements if key in state]
        if any(is_codes(key) for state in every for key in state):
            if self._run.model is None:
                raise CheckpointError(
                    "which state is in eight bits depends on what each parameter is, which DeepSpeed does not save: "
                    "give the model (--model config.json)"
                )
            kept = [EIGHT_BITS]
            options.update(self._run.in_eight_bits)
        groups = [{"params": [torch.empty(0, device="meta") for _ in range(size)]} for size in sizes]
        try:
            optimizer = cls(groups, state_dtype=kept[0] if kept else torch.float32, **options)
        except ValueError as error:
            raise CheckpointError(f"{files.folder} was not saved by {error}") from error
        for group, its in zip(optimizer.param_groups, saved, strict=True):
            group.update({key: value for key, value in its.items() if key != "params"})
        return optimizer

    def _training_state(self, rank: int, states: RankStates) -> content.TrainingState:
        """What a rank would have handed to `ds_optim.checkpoint.save`."""
        optimizer = self._optimizer
        stepper: InPlace | OwnedBlocks = self._stepper.at_rank(rank)
        optimizer.take_over(stepper)
        _step_over(optimizer, stepper.shards.tensors)
        problems = self._problems(rank, states)
        if problems:
            raise self._run.misfit(self._files, [f"rank {rank}: {problem}" for problem in problems])
        logical = logical_of(stepper)
        saved = optimizer.state_form.of_this_rank(states.optimizer)["state"]
        _step_over(optimizer, states.masters)
        optimizer.state = defaultdict(
            dict, {master: saved[key] for key, master in optimizer.state_form.keyed(states.optimizer) if key in saved}
        )
        its = zip(states.masters, stepper.shards.tensors, strict=True)
        return content.TrainingState(
            nn.Module(),
            optimizer,
            None,
            {master: logical[tensor] for master, tensor in its},
            self._files.untrained(rank, self._trained),
        )

    def _problems(self, rank: int, states: RankStates) -> list[str]:
        """Why what was saved cannot be what this rank's optimizer held."""
        problems, module = [], self._files.module
        for layout, master in zip(self._layouts, states.masters, strict=True):
            if isinstance(layout, Replicated) and not _holds(master, module[layout.parameter.name]):
                problems.append(
                    f"the fp32 weights in {layout.parameter.name}'s place are another's: its groups are others"
                )
            needed = max((fragment.offset + fragment.numel for fragment in layout.fragments(rank)), default=0)
            if not needed <= master.numel() <= layout.local_numel(rank):
                problems.append(
                    f"the tensor of {layout.parameters[0].name} ... has {master.numel()} elements, its shapes make "
                    f"{layout.local_numel(rank)}"
                )
        return problems + self._optimizer.state_form.problems(states.optimizer)


def named_of(model: nn.Module | None) -> list[str] | None:
    """The names of a model's trained parameters, in its order."""
    if model is None:
        return None
    return [canonical_name(name) for name, parameter in model.named_parameters() if parameter.requires_grad]


def groups_at_zero_0(files: DeepSpeedFiles, run: Origin, named: list[str] | None) -> list[list[ParameterSpec]]:
    """The parameters of each group of a checkpoint of ZeRO stage 0; else none.

    DeepSpeed saves no names at this stage: they are those that stand beside the groups, or those of the groups that the
    plugin makes.

    Args:
        named: the model's trained parameters, in its order.
    """
    if files.is_zero:
        return []
    if run.model is None or named is None:
        raise CheckpointError(
            f"{files.folder} is of ZeRO stage 0, where DeepSpeed saves no names with the optimizer's state: "
            "give the model (--model config.json)"
        )
    exempt = set(exempt_names(named, run.roles, DsOptimObject.of(run.config).no_decay))
    split = decayed_then_exempt(named, exempt.__contains__)
    saved = files.main["optimizer"].get("optimizer_state_dict", files.main["optimizer"])
    told = saved.get(NAMES)  # by our optimizers, if the parameters had any
    candidates = [[group for group in split if group], [named]]
    if told and all(group and run.model.keys() >= set(group) for group in told):
        candidates.insert(0, told)
    sizes = [len(group["params"]) for group in saved["param_groups"]]
    for groups in candidates:
        if [len(group) for group in groups] == sizes:
            return [[ParameterSpec(name, run.model[name]) for name in group] for group in groups]
    raise run.misfit(
        files,
        [
            f"its parameter groups have {sizes} parameters, this model and configuration make "
            f"{' or '.join(str([len(group) for group in groups]) for groups in candidates)} "
            "(groups that you made yourself are not known at ZeRO stage 0; frozen parameters must be frozen here too)"
        ],
    )


def _holds(master: Tensor, weight: Tensor) -> bool:
    """Whether an fp32 master is that of a weight, a NaN included."""
    if master is weight:
        return True
    return master.shape == weight.shape and torch.allclose(master.to(weight.dtype), weight, 0, 0, equal_nan=True)


def _step_over(optimizer: ShardedOptimizer, tensors: Sequence[Tensor]) -> None:
    """Put other tensors into the optimizer's groups, in the order of those that are there."""
    waiting = iter(tensors)
    for group in optimizer.param_groups:
        group["params"] = [next(waiting) for _ in group["params"]]
