"""Reads the layout out of a DeepSpeed engine: ZeRO 0, 1, 2, 3 and BF16_Optimizer.

Reads; only `guard_state_access` wraps methods. Every attribute of an engine and its wrapper is named in `wrappers`, and
guarded by a check; what DeepSpeed hangs on parameters at ZeRO-3 (``ds_id``, ``ds_tensor``) is not. What DeepSpeed
states is checked against two independent witnesses: where the model's weights really lie, and that the fp32
master holds the same values there.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from inspect import signature
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from ds_optim import known_torch
from ds_optim.deepspeed import differences, model_parts, wrappers
from ds_optim.deepspeed.gradient_window import keeps_gradients
from ds_optim.instance_methods import after, wrap
from ds_optim.roles import logical_shape
from ds_optim.sharding.binding import Binding, BoundTensor
from ds_optim.sharding.boxes import Box
from ds_optim.sharding.exchange import Ranks, from_all_ranks
from ds_optim.sharding.layout import (
    Boxed,
    FlatPartition,
    Layout,
    ParameterSpec,
    Replicated,
    SlicedParameters,
)
from ds_optim.sharding.tensor_parallel import TensorParallel

_COMPARE_ELEMENTS = 1 << 24  # values compared at a time: bounds the check's memory


def ranks_of(engine: Any) -> Ranks:
    """The processes of one engine: an mpu may give it a part of the job only.

    Those that have the same parameters (data parallelism, and sequence parallelism inside it), and under model or
    pipeline parallelism those that have the others. Known as soon as the engine has its module.
    """
    axes = [engine.seq_data_parallel_group]  # of an earlier engine's mpu, if this one has none: DeepSpeed keeps it
    if engine.mesh_device is not None:  # of data and sequence parallelism
        axes = engine.mesh_device.get_all_groups()
    if engine.mp_world_size > 1:
        axes.append(engine.mpu.get_model_parallel_group())
    return Ranks(tuple(axes))


def read(engine: Any) -> Binding:
    """The binding of a DeepSpeed engine's basic optimizer. What does not fit is listed in the binding's ``problems``.

    Args:
        engine: a `deepspeed.DeepSpeedEngine` whose optimizer has just been configured.
    """
    refused = wrappers.attributes_problem(engine, "configuration")
    if refused:
        return Binding({}, Ranks(), (refused,))  # it cannot be asked for its ranks, which all have this release
    refused = wrappers.engine_problem(engine, "training")
    if refused:
        return Binding({}, ranks_of(engine), (refused,))
    reader = EngineReader(engine, model_parts.names_in(engine.module))
    reader.read(engine.optimizer)
    if not model_parts.unknown_slices(engine.module):
        reader.join_slices()
    if keeps_gradients(engine.optimizer) and known_torch.backward_problem():
        reader.problems.append(known_torch.backward_problem())
    of_engine: Callable[[], Any] = weakref.ref(engine)  # what the optimizer keeps must not keep the engine
    return Binding(
        reader.tensors,
        ranks_of(engine),
        tuple(reader.problems),
        is_apart=model_parts.is_apart(engine),
        steps=lambda: int(of_engine().global_steps),
    )


def unclipped_gradient(wrapper: Any, tensor: Tensor) -> Tensor | None:
    """A stepped tensor's gradient before it is clipped; until then BF16_Optimizer keeps it apart."""
    if wrappers.kind_of(wrapper) is wrappers.BF16:
        masters, gradients = wrapper.fp32_groups_flat_partition, wrapper.fp32_groups_gradient_flat_partition
        for master, gradient in zip(masters, gradients, strict=True):
            if master is tensor:
                return cast(Tensor, gradient)
    return tensor.grad


def guard_state_access(engine: Any, optimizer: str, keys: tuple[str, ...]) -> None:
    """Let DeepSpeed's ``safe_get_full_optimizer_state`` and its relatives read per-element state only.

    They slice whatever has that key by elements: of blocks that would be other values than the ones asked for at
    ZeRO-3, and at ZeRO-1/2 an error on some ranks for which the others wait. The methods of this engine's objects are
    wrapped, not DeepSpeed's classes. At ZeRO-1/2 DeepSpeed ties state to parameters once, after the first step of the
    first parameter group, and never again: state that was made or loaded later is tied here.

    Args:
        optimizer: its name, for the error.
        keys: of the state that has one value per element of every parameter.
    """

    def guard(wrapped: Any, _: Any, args: Any, kwargs: Any) -> Any:
        key = signature(wrapped).bind(*args, **kwargs).arguments.get("optim_state_key")
        if key is not None and key not in keys:
            known = f"only {' and '.join(keys)} is" if keys else "nothing that this optimizer keeps is"
            raise ValueError(
                f"{optimizer}: {known} one value per element in each rank's partition, {key!r} is not; "
                "ds_optim.checkpoint.full_state(engine, parameter_name) gathers everything that is kept for a parameter"
            )
        linking = reference()
        if key is not None and hasattr(linking, "_lazy_init_hp_params_optimizer_state"):
            linking._hp_optimizer_states_linked = False
            linking._lazy_init_hp_params_optimizer_state()
        return wrapped(*args, **kwargs)

    def guarded(one: Any) -> None:
        for name in wrappers.STATE_ACCESS:
            method = getattr(one, name, None)
            if method is not None and getattr(method, "_self_wrapper", None) is not guard:
                wrap(one, name, guard)

    def guarded_parameters() -> None:
        for parameter in engine.module.parameters():
            guarded(parameter)

    wrapper = engine.optimizer
    reference: Callable[[], Any] = weakref.ref(wrapper)  # parameters, which are guarded, may outlive the engine
    guarded(wrapper)
    guarded_parameters()
    if hasattr(wrapper, "_link_all_hp_params"):  # after a load and after `reload_states` parameters get new methods
        after(wrapper, "_link_all_hp_params", guarded_parameters)


class EngineReader:
    """Collects bound tensors and problems, one method per kind of wrapper."""

    def __init__(self, engine: Any, names: Mapping[Tensor, str]) -> None:
        self.engine = engine
        self.names = names
        self.tensors: dict[Tensor, BoundTensor] = {}
        self.problems: list[str] = []
        self._slices = {names[one]: its for one, its in model_parts.slices_in(engine.module).items()}

    def read(self, wrapper: Any) -> None:
        """Everything that an engine's wrapper, or the optimizer itself, steps."""
        kind = wrappers.kind_of(wrapper)
        if kind is None:
            self.replicated([group["params"] for group in wrapper.param_groups], None)
        elif kind is wrappers.UNFUSED:
            self.replicated(wrapper.fp16_groups, wrapper.fp32_groups)
        elif kind is wrappers.ZERO_1_AND_2:
            self.zero_1_and_2(wrapper)
        elif kind is wrappers.ZERO_3:
            self.zero_3(wrapper)
        elif kind is wrappers.BF16:
            self.bf16_optimizer(wrapper)

    def replicated(self, model_groups: list[list[Tensor]], stepped_groups: list[list[Tensor]] | None) -> None:
        """ZeRO-0: whole parameters, or whole fp32 clones of them, the same on every data-parallel rank."""
        of_experts = self.engine.expert_data_parallel_group if self.engine.has_moe_layers else {}
        for model, stepped in zip(model_groups, stepped_groups or model_groups, strict=True):
            for parameter, tensor in zip(model, stepped, strict=True):
                group = model_parts.group_of(parameter, of_experts) or self.engine.seq_data_parallel_group
                if parameter.requires_grad:
                    if tensor.dtype != torch.float32:
                        self.problems.append(
                            f"{self.names.get(parameter)} is {tensor.dtype} and would be stepped without an fp32 "
                            'master: set "bf16": {"enabled": true}'
                        )
                    layout = Replicated(self._spec(parameter), dist.get_world_size(group))
                    self._add(tensor, layout, 0, group, {0: parameter.data.reshape(-1)})
                elif stepped_groups is not None:  # newer releases leave it out
                    self.problems.append(
                        f"{self.names.get(parameter)} is frozen, and this DeepSpeed has an fp32 master of it stepped "
                        "all the same at ZeRO-0 in bf16: leave frozen parameters out of model_parameters, or use ZeRO "
                        "stage 1"
                    )

    def zero_1_and_2(self, wrapper: Any) -> None:
        """One flat partition per parameter group, round-robin order and alignment padding included."""
        for index, parameters in enumerate(wrapper.round_robin_bit16_groups):
            self._flat(
                parameters,
                differences.offsets(wrapper, index),
                wrapper.bit16_groups_flat[index],
                int(wrapper.partition_size[index]),
                wrapper.single_partition_of_fp32_groups[index],
                wrapper.real_dp_process_group[index],
            )

    def bf16_optimizer(self, wrapper: Any) -> None:
        """ZeRO-1 in bf16 with fp32 gradient accumulation: a flat partition per group, in the group's own order."""
        if differences.reduces_before_it_adds(wrapper) and self.engine.seq_dp_world_size > 1:
            self.problems.append(
                "with fp32 gradient accumulation in bf16 deepspeed before 0.19.0 steps every rank with its own "
                'gradients: set "bf16": {"enabled": true, "immediate_grad_update": true}, or use ZeRO stage 2'
            )
        for index, parameters in enumerate(wrapper.bf16_groups):
            offsets, total = [], 0
            for parameter in parameters:
                offsets.append(total)
                total += parameter.numel()
            group = wrapper.real_dp_process_group[index]
            flat = wrapper.bf16_groups_flat[index]
            size = flat.numel() // dist.get_world_size(group)
            self._flat(parameters, offsets, flat, size, wrapper.fp32_groups_flat_partition[index], group)

    def zero_3(self, wrapper: Any) -> None:
        """One flat tensor per sub-group: this rank's slice of each of its parameters, one behind the other."""
        for index, parameters in enumerate(wrapper.fp16_groups):
            group = differences.sub_group_ranks(wrapper, index)
            rank = dist.get_rank(group)
            layout = SlicedParameters(tuple(map(self._spec, parameters)), dist.get_world_size(group))
            offset = 0
            for position, parameter in enumerate(parameters):
                width = layout.slice_numel(position)
                stated = [int(value) for value in wrapper.grad_position[parameter.ds_id]]
                if stated != [index, offset, width]:
                    self.problems.append(
                        f"{layout.parameters[position].name}: DeepSpeed puts its slice at "
                        f"(sub-group, offset, elements) {stated}, its shape says {[index, offset, width]}"
                    )
                offset += width
            # A parameter whose weights are offloaded to NVMe has no local slice to compare with.
            slices = {
                position: parameter.ds_tensor.data.reshape(-1)
                for position, parameter in enumerate(parameters)
                if parameter.ds_tensor.numel() == layout.slice_numel(position)
            }
            self._add(wrapper.fp32_partitioned_groups_flat[index], layout, rank, group, slices, local=True)

    def join_slices(self) -> None:
        """Make of what this rank's tensors hold of slices what all ranks' hold of whole parameters."""
        engine, is_sliced = self.engine, model_parts.tensor_parallel_size(self.engine) > 1
        by_column: dict[dist.ProcessGroup, list[Tensor]] = {}
        for tensor, bound in self.tensors.items():
            if is_sliced:
                by_column.setdefault(engine.mpu.get_tensor_model_parallel_group(), []).append(tensor)
                continue
            known = [self._slices[spec.name].experts for spec in bound.layout.parameters if spec.name in self._slices]
            if len(known) == len(bound.layout.parameters) and len(set(known)) == 1:
                by_column.setdefault(engine.expert_parallel_group[known[0]], []).append(tensor)
            elif known:
                self.problems.append(f"{bound.layout.parameters[0].name} ... is flattened with stacks of experts")
        ranks = ranks_of(engine) if is_sliced else Ranks((engine.seq_data_parallel_group,))
        for column, tensors in by_column.items():
            self._join(column, ranks, tensors)

    def _join(self, column: dist.ProcessGroup, ranks: Ranks, tensors: list[Tensor]) -> None:
        """The same of some tensors.

        Args:
            column: the ranks that have the slices of one whole.
            ranks: all that have any, this rank's column among them.
        """
        rows = {self.tensors[tensor].group for tensor in tensors}
        place = dist.get_rank(column), dist.get_rank(next(iter(rows)))
        columns = from_all_ranks([self.tensors[tensor].layout for tensor in tensors], column)
        everyone, places = ranks.group, ranks.everyones(place)
        assert everyone is not None
        members = dist.get_process_group_ranks(everyone)
        if len(rows) > 1 or len({len(one) for one in columns}) > 1:
            self.problems.append("ranks that have slices of the same parameters have other parameter groups")
            return
        for index, tensor in enumerate(tensors):
            layouts = tuple(one[index] for one in columns)
            first, *others = (tuple(spec.name for spec in layout.parameters) for layout in layouts)
            if any(other != first for other in others):
                self.problems.append(f"ranks that have slices of {first[:3]} ... have them in different orders")
                continue
            slices = [self._slices.get(name) for name in first]
            specs = zip(first, slices, layouts[0].parameters, strict=True)
            whole = tuple(ParameterSpec(name, its.whole if its else spec.shape) for name, its, spec in specs)
            boxes = tuple(its.boxes if its else () for its in slices)
            if isinstance(layouts[0], Replicated):
                self.tensors[tensor] = _replicated_slices(whole[0], boxes[0], column, everyone)
            else:
                axis = "ep" if any(its and its.experts for its in slices) else "tp"
                layout = TensorParallel(whole, boxes, layouts, tuple(places[rank] for rank in members), axis)
                self.tensors[tensor] = BoundTensor(layout, dist.get_rank(everyone), everyone)

    def _flat(
        self,
        parameters: list[Tensor],
        offsets: list[int],
        flat: Tensor,
        size: int,
        master: Tensor,
        group: dist.ProcessGroup,
    ) -> None:
        specs = tuple(map(self._spec, parameters))
        for spec, parameter, offset in zip(specs, parameters, offsets, strict=True):
            lies_at = parameter.data.storage_offset() - flat.storage_offset()
            same_storage = parameter.data.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr()
            if not same_storage or lies_at != offset:
                self.problems.append(
                    f"{spec.name}: its weight lies at element {lies_at} of its group's flat tensor, "
                    f"DeepSpeed's offsets say {offset}"
                )
        layout = FlatPartition(specs, tuple(offsets), size, dist.get_world_size(group))
        whole = {index: parameter.data.reshape(-1) for index, parameter in enumerate(parameters)}
        self._add(master, layout, dist.get_rank(group), group, whole)

    def _add(
        self,
        tensor: Tensor,
        layout: Layout,
        rank: int,
        group: dist.ProcessGroup | None,
        weights: Mapping[int, Tensor],
        *,
        local: bool = False,
    ) -> None:
        """Bind a tensor, after comparing it with the model's weights (whole, or with ``local`` this rank's slices)."""
        self.tensors[tensor] = BoundTensor(layout, rank, group)
        master = tensor.detach().reshape(-1)
        for fragment in layout.fragments(rank):
            weight = weights.get(fragment.parameter)
            if weight is None or fragment.offset + fragment.numel > master.numel():
                continue  # sizes are judged elsewhere
            begin = 0 if local else fragment.start
            mine = master.narrow(0, fragment.offset, fragment.numel)
            if not _same_values(mine, weight.narrow(0, begin, fragment.numel)):
                self.problems.append(
                    f"{layout.parameters[fragment.parameter].name}: the fp32 master at {fragment.offset} does not hold "
                    f"the weight's elements [{fragment.start}, {fragment.stop})"
                )

    def _spec(self, parameter: Tensor) -> ParameterSpec:
        if parameter not in self.names:
            self.problems.append(
                f"a parameter of shape {logical_shape(parameter)} in the optimizer is not a parameter of the "
                "model: make the optimizer from the parameters of the model that the engine is given"
            )
        return ParameterSpec(self.names.get(parameter, "unknown"), logical_shape(parameter))


def _replicated_slices(
    spec: ParameterSpec, boxes: tuple[tuple[Box, ...], ...], group: dist.ProcessGroup, everyone: dist.ProcessGroup
) -> BoundTensor:
    """A parameter at ZeRO-0 of which all ranks of a group have a box, or the whole; the same in each such group.

    Owners are spread over all ranks where those of one group come behind those of another.
    """
    members = dist.get_process_group_ranks(everyone)
    if not boxes:
        return BoundTensor(Replicated(spec, len(members)), 0, everyone)
    at = members.index(dist.get_process_group_ranks(group)[0])
    stands = dist.get_process_group_ranks(group) == members[at : at + len(boxes)] and at % len(boxes) == 0
    return BoundTensor(Boxed(spec, boxes), dist.get_rank(group), group, owners=everyone if stands else None)


def _same_values(master: Tensor, weight: Tensor) -> bool:
    pieces: Iterator[tuple[Tensor, Tensor]] = zip(
        master.split(_COMPARE_ELEMENTS), weight.split(_COMPARE_ELEMENTS), strict=True
    )
    return all(
        torch.allclose(one.to(two.dtype), two.to(one.device), rtol=0, atol=0, equal_nan=True) for one, two in pieces
    )
