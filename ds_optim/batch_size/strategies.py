"""Where each strategy has the averaged gradient of a whole batch: after the reduction, before clipping.

A DeepSpeed wrapper has it in ``step()``, in flat partitions, right before it unscales and clips them; its own methods
are wrapped there (of this engine, not of DeepSpeed's classes). `ds_optim.deepspeed.reader` says which elements of a
partition are which parameter's, and which are padding or left over from an earlier step. torch's own strategies have
it in ``.grad`` when a backward pass has ended, and a user may clip right after that: it is measured in a callback of
the autograd engine, queued behind DDP's and FSDP2's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from ds_optim import known_torch
from ds_optim.deepspeed import reader, wrappers
from ds_optim.deepspeed.events import before_clipping
from ds_optim.deepspeed.gradient_window import GradientWindow, keeps_gradients
from ds_optim.listing import first_of
from ds_optim.roles import canonical_name
from ds_optim.sharding.binding import BoundTensor
from ds_optim.sharding.dtensor import group_of
from ds_optim.sharding.layout import Replicated
from ds_optim.stepping.sharded import ShardedOptimizer

GradientPiece = tuple[str, Tensor, float]
"""Parameter's name, elements of its averaged gradient, and the share of their squares that this rank contributes."""


class NoiseScaleError(ValueError):
    """The noise scale cannot be measured like this; the same on every rank."""


class Strategy(Protocol):
    """What `NoiseScale` asks of a strategy.

    Attributes:
        module: the model; its forward passes are counted.
        parameters: what is trained, by canonical name; tied weights once.
        group: the ranks whose micro-batches are averaged; None for one process.
    """

    module: nn.Module
    parameters: dict[str, Tensor]
    group: dist.ProcessGroup | None

    def loss_scale(self) -> float:
        """What the loss of the present step is multiplied by."""

    def starts_anew(self) -> bool:
        """Whether the gradients of this step that arrived so far were dropped: it was skipped, or they were zeroed."""

    def gradient_arrives(self) -> None:
        """Told of every gradient in a backward pass, before it is accumulated."""

    def detach(self) -> None:
        """Leave everything as it was."""


Measure = Callable[[int, Iterator[GradientPiece]], None]
"""Takes a part of the averaged gradient, by number; measured again, it counts as it was last."""


class EngineStrategy:
    """A DeepSpeed engine at ZeRO 0, 1, 2 or 3.

    Args:
        engine: a `deepspeed.DeepSpeedEngine` with an optimizer, anybody's.
        measure: takes the pieces of one partition's gradient, before they are clipped.
        finish: called when all of a step were measured.

    Raises:
        NoiseScaleError: expert, tensor, sequence or pipeline parallelism; an engine or a wrapper that is not known.
    """

    def __init__(self, engine: Any, measure: Measure, finish: Callable[[], None]) -> None:
        unknown = wrappers.attributes_problem(engine, "configuration")
        unknown = unknown or wrappers.attributes_problem(engine, "measurement")
        if unknown:  # on every rank alike
            raise NoiseScaleError(unknown)
        self._engine, self._measure, self._finish = engine, measure, finish
        self._wrapper = engine.optimizer
        self._tensors = self._read()
        self._step = int(engine.global_steps)
        self._seen: set[Tensor] = set()  # in this step
        self._undo: list[Callable[[], None]] = []
        self._wrap()
        self._is_stale = self._stale_gradients()
        self.module: nn.Module = engine.module
        self.parameters = trained(engine.module)
        self.group: dist.ProcessGroup | None = engine.data_parallel_group

    def loss_scale(self) -> float:
        # Without ZeRO DeepSpeed's step() divides by a scale that it never applied to the loss.
        scaled = self._engine.fp16_enabled() and self._engine.zero_optimization_stage() > 0
        return float(self._wrapper.loss_scale) if scaled else 1.0

    def starts_anew(self) -> bool:
        if self._engine.global_steps == self._step:
            return False
        self._step = int(self._engine.global_steps)
        self._seen.clear()
        return True

    def gradient_arrives(self) -> None:
        pass

    def detach(self) -> None:
        for undo in self._undo:
            undo()
        self._undo.clear()

    def _read(self) -> Mapping[Tensor, BoundTensor]:
        engine = self._engine
        problems = [
            f"{name} is {getattr(engine, name)}: a rank's gradient is not one of whole sequences"
            for name in ("mp_world_size", "sequence_parallel_size")
            if getattr(engine, name) > 1
        ]
        if self._wrapper is None:
            problems.append("the engine has no optimizer: give deepspeed.initialize one, or name it in the JSON")
        if engine.has_moe_layers:
            problems.append("experts under DeepSpeed's expert parallelism each have a batch of their own")
        if engine.pipeline_parallelism:
            problems.append("a pipeline stage holds only a part of the model")
        if engine.torch_autocast_z0_gradscaler is not None:
            problems.append("torch_autocast with float16 and without ZeRO: use bfloat16")
        tensors: Mapping[Tensor, BoundTensor] = {}
        if not problems:
            binding = reader.read(engine)
            tensors = binding.tensors
            problems += binding.problems
            known = {spec.name for bound in tensors.values() for spec in bound.layout.parameters}
            problems += strays(name for name in trained(engine.module) if name not in known)
        found = reader.ranks_of(engine).everyones(problems).values()
        everyones = dict.fromkeys(reason for of_rank in found for reason in of_rank)
        if everyones:
            raise NoiseScaleError(f"the noise scale is for data parallelism and ZeRO: {'; '.join(everyones)}")
        return tensors

    def _stale_gradients(self) -> Callable[[Tensor], bool]:
        """Tells whose gradient is left over from an earlier step. Our own optimizers are handed none of those."""
        if isinstance(self._engine.basic_optimizer, ShardedOptimizer) or not keeps_gradients(self._wrapper):
            return lambda _: False
        window = GradientWindow(self._engine, clears=False)
        self._undo.append(window.remove)
        return window.is_stale

    def _wrap(self) -> None:
        """Methods that run between reduction and clipping; without ZeRO in fp32 the last moment is the step itself."""
        self._undo.append(before_clipping(self._engine, self._before_clipping))
        if self._wrapper is self._engine.basic_optimizer:
            self._undo.append(self._wrapper.register_step_pre_hook(lambda *_: self._before_step()).remove)

    def _before_clipping(self) -> None:
        if self._undo:  # otherwise we are done, and somebody else holds on to us
            self._measure_new()

    def _before_step(self) -> None:
        self._measure_new()
        if len(self._seen) < len(self._tensors):  # some have no gradient
            self._finish()

    def _measure_new(self) -> None:
        """DeepSpeed prepares its partitions one after the other, or all at once."""
        if len(self._seen) == len(self._tensors):
            return
        for part, (tensor, bound) in enumerate(self._tensors.items()):
            gradient = reader.unclipped_gradient(self._wrapper, tensor)
            if tensor not in self._seen and gradient is not None:
                self._seen.add(tensor)
                self._measure(part, self._pieces(bound, gradient.reshape(-1)))
        if len(self._seen) == len(self._tensors):
            self._finish()

    def _pieces(self, bound: BoundTensor, gradient: Tensor) -> Iterator[GradientPiece]:
        """The gradient of one partition without padding, and without what is left over from an earlier step."""
        is_replicated = isinstance(bound.layout, Replicated)
        share = 1 / bound.layout.world_size if is_replicated else 1.0
        for fragment in bound.layout.fragments(bound.rank):
            name = bound.layout.parameters[fragment.parameter].name
            if not self._is_stale(self.parameters[name]):
                yield name, gradient.narrow(0, fragment.offset, fragment.numel), share


class TorchStrategy:
    """A model on one device, under DDP, or under FSDP2 or HSDP.

    Args:
        module: the model as it is called in the training loop.
        optimizer: whose ``step()`` ends a batch.
        measure: takes the pieces of all gradients whenever a backward pass has ended; the last time counts.
        finish: called before the optimizer's step.

    Raises:
        NoiseScaleError: FSDP1, tensor parallelism, parameters on several meshes or that DDP ignores.
    """

    def __init__(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, measure: Measure, finish: Callable[[], None]
    ) -> None:
        self._measure = measure
        self.module, self.parameters = module, trained(module)
        self._ddp = module if isinstance(module, DistributedDataParallel) else None
        self._task = -1  # of the autograd engine
        self._optimizer = optimizer
        self._meshes = list({p.device_mesh for p in self.parameters.values() if isinstance(p, DTensor)})
        problems = list(self._problems())
        if problems:
            raise NoiseScaleError(f"the noise scale is for data parallelism, FSDP2 and HSDP: {'; '.join(problems)}")
        self.group: dist.ProcessGroup | None = None
        if self._meshes:
            self.group = group_of(self._meshes[0])
        elif self._ddp is not None:
            self.group = self._ddp.process_group
        self._hook = optimizer.register_step_pre_hook(lambda *_: finish())
        self._has_gradient = False

    def loss_scale(self) -> float:
        return 1.0

    def starts_anew(self) -> bool:
        """Under FSDP2 a gradient may be waiting in an unsharded parameter: nothing can be said there."""
        if not self._has_gradient or self._meshes:
            return False
        self._has_gradient = any(parameter.grad is not None for parameter in self.parameters.values())
        return not self._has_gradient

    def gradient_arrives(self) -> None:
        task = known_torch.graph_task()
        if task != self._task:
            self._task = task
            # Callbacks run in the order in which they were queued; DDP queues its own in the course of the pass.
            known_torch.when_backward_ends(partial(known_torch.when_backward_ends, self._backward_ended))

    def detach(self) -> None:
        self._hook.remove()

    def _backward_ended(self) -> None:
        self._has_gradient = True
        if self._ddp is None or self._ddp.require_backward_grad_sync:
            with torch.no_grad():
                self._measure(0, self._pieces())

    def _pieces(self) -> Iterator[GradientPiece]:
        for name, parameter in self.parameters.items():
            gradient = parameter.grad
            if isinstance(gradient, DTensor):
                mesh = zip(gradient.device_mesh.shape, gradient.placements, strict=True)
                yield name, gradient.to_local(), 1 / math.prod(size for size, one in mesh if one.is_replicate())
            elif gradient is not None:
                yield name, gradient, 1.0 if self.group is None else 1 / dist.get_world_size(self.group)

    def _problems(self) -> Iterator[str]:
        stepped = {parameter for group in self._optimizer.param_groups for parameter in group["params"]}
        yield from strays(name for name, parameter in self.parameters.items() if parameter not in stepped)
        sharded = {p for module in self.module.modules() if isinstance(module, FSDPModule) for p in module.parameters()}
        if len(self._meshes) > 1:
            yield "the parameters lie on several meshes"
        for name, parameter in self.parameters.items():
            if getattr(parameter, "_fsdp_flattened", False) or getattr(parameter, "_is_flat_param", False):
                yield f"{name} was flattened by FSDP1: use torch.distributed.fsdp.fully_shard"
            elif not isinstance(parameter, DTensor):
                if self._meshes:
                    yield f"{name} is not sharded, others are: wrap the whole model in fully_shard"
            elif parameter not in sharded or any(not one.is_replicate() for one in parameter.placements[:-1]):
                yield f"{name} lies as {parameter.placements}: tensor parallelism"
        if known_torch.backward_problem():
            yield known_torch.backward_problem()
        if self._ddp is not None and self._ddp.parameters_to_ignore:
            yield f"DDP does not average {', '.join(sorted(self._ddp.parameters_to_ignore))}"


def strays(names: Iterable[str]) -> list[str]:
    """The problem with parameters that get a gradient and are nobody's; nothing if there are none."""
    found = sorted(names)
    return [f"{first_of(found, 4)}: trained, but not the optimizer's: freeze them, or give them to it"] if found else []


def trained(module: nn.Module) -> dict[str, Tensor]:
    """The parameters that get a gradient, by canonical name; tied weights once."""
    return {canonical_name(name): p for name, p in module.named_parameters() if p.requires_grad}
