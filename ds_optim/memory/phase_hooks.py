"""Hooks that tell when the phases of a training step begin, where each framework lets them be seen.

Forward begins when the model is called with gradients on, the step when the engine or the optimizer steps. Backward has
no hook here: whoever follows storages sees autograd at work. The hooks change nothing of a step; each can be undone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ds_optim.deepspeed.events import around_step
from ds_optim.memory.record import Category
from ds_optim.memory.tracker import in_backward

Undo = Callable[[], object]


@dataclass(frozen=True, slots=True)
class PhaseCalls:
    """What is called when.

    Attributes:
        forward: a forward pass with gradients begins; recomputation in a backward pass is none.
        optimizer_step: the last micro-batch of a step is over, the optimizer steps.
        handed: the optimizer inside an engine is called with its gradients.
        step_done: the engine or the optimizer has stepped.
        passing: values with tensors in them, seen on their way: a batch, an output, a gradient; and what they are.
    """

    forward: Callable[[], None]
    optimizer_step: Callable[[], None]
    handed: Callable[[], None]
    step_done: Callable[[], None]
    passing: Callable[[Any, Category], None]


def hook_model(model: nn.Module, calls: PhaseCalls) -> Iterator[Undo]:
    """The model as it is called in the training loop, and its parameters: ``forward`` and ``passing``."""

    def before(_: nn.Module, args: Any, kwargs: Any) -> None:
        if torch.is_grad_enabled() and not in_backward():
            calls.forward()
            calls.passing((args, kwargs), Category.BUFFERS)

    def after(_: nn.Module, args: Any, output: Any) -> None:
        if not in_backward():
            calls.passing(output, Category.ACTIVATIONS)

    def arriving(gradient: Tensor) -> None:
        calls.passing(gradient, Category.GRADIENTS)

    # Before everyone else's: FSDP's hook gathers parameters already.
    yield model.register_forward_pre_hook(before, with_kwargs=True, prepend=True).remove
    yield model.register_forward_hook(after).remove
    for parameter in model.parameters():
        if parameter.requires_grad:
            yield parameter.register_hook(arriving).remove


def hook_engine(engine: Any, optimizer: torch.optim.Optimizer, calls: PhaseCalls) -> Iterator[Undo]:
    """A DeepSpeed engine's ``step``, and the optimizer inside all wrappers.

    Args:
        engine: whose ``step`` counts at the end of gradient accumulation only.
        optimizer: of the engine, unwrapped.
        calls: ``optimizer_step``, ``handed`` and ``step_done`` are used.
    """
    yield around_step(engine, calls.optimizer_step, calls.step_done)
    yield optimizer.register_step_pre_hook(lambda *_: calls.handed()).remove


def hook_optimizer(optimizer: torch.optim.Optimizer, calls: PhaseCalls) -> Iterator[Undo]:
    """An optimizer that is stepped by the training loop itself: ``optimizer_step`` and ``step_done``."""

    def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A closure holds the passes; the step itself begins each time that it returns."""
        named = "closure" in kwargs
        closure = kwargs.get("closure") if named else next(iter(args[1:]), None)
        if closure is None:
            calls.optimizer_step()
            return None

        def passes() -> Any:
            result = closure()
            calls.optimizer_step()
            return result

        if named:
            return args, {**kwargs, "closure": passes}
        return (args[0], passes, *args[2:]), kwargs

    yield optimizer.register_step_pre_hook(before).remove
    yield optimizer.register_step_post_hook(lambda *_: calls.step_done()).remove
