"""What an engine is watched at: one place that knows on which of DeepSpeed's objects an event can be seen."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

from ds_optim.deepspeed import wrappers
from ds_optim.instance_methods import after, wrap


def after_zero_grad(engine: Any, action: Callable[[], object]) -> Callable[[], None]:
    """Let ``action()`` follow every ``zero_grad()``: the engine's, and its wrapper's, which follows every step.

    Returns:
        What takes it back.
    """
    undo = [after(owner, "zero_grad", action) for owner in (engine, engine.optimizer)]

    def leave() -> None:
        for one in undo:
            one()

    return leave


def before_clipping(engine: Any, action: Callable[[], object]) -> Callable[[], None]:
    """Let ``action()`` come when gradients were reduced, and before they are unscaled and clipped.

    Without ZeRO in fp32 that need not happen: the last moment is the optimizer's own step.

    Returns:
        What takes it back.
    """

    def clipping(wrapped: Callable[..., Any], _: Any, args: Any, kwargs: Any) -> Any:
        action()
        return wrapped(*args, **kwargs)

    wrapper = engine.optimizer
    if wrapper is engine.basic_optimizer:
        return wrap(engine, "clip_fp32_gradients", clipping)
    is_bf16 = wrappers.kind_of(wrapper) is wrappers.BF16
    return wrap(wrapper, "get_grads_for_norm" if is_bf16 else "unscale_and_clip_grads", clipping)


def around_step(engine: Any, begins: Callable[[], object], done: Callable[[], object]) -> Callable[[], None]:
    """Let ``begins()`` come before the step behind the last micro-batch, and ``done()`` after it.

    A pipeline runs its passes and the step in one call.

    Returns:
        What takes it back.
    """
    is_pipeline = bool(getattr(engine, "pipeline_parallelism", False))

    def step(wrapped: Callable[..., Any], engine: Any, args: Any, kwargs: Any) -> Any:
        is_last = is_pipeline or engine.is_gradient_accumulation_boundary()
        if is_last:
            begins()
        result = wrapped(*args, **kwargs)
        if is_last:
            done()
        return result

    return wrap(engine, "_take_model_step" if is_pipeline else "step", step)


def called_in_training(engine: Any) -> Any:
    """What the forward pass of a step calls: the engine, or a pipeline's module."""
    return engine.module if getattr(engine, "pipeline_parallelism", False) else engine


Around = Callable[[Callable[[], Any], Any, dict[str, Any]], Any]
"""Takes the place of a call: is given what makes it, the engine, and all arguments by name, defaults filled in."""


def around_load(engine: Any, around: Around) -> None:
    """Let ``around(load, engine, asked)`` take the place of this engine's ``load_checkpoint``."""
    _around(engine, "load_checkpoint", around)


def around_save(engine: Any, around: Around) -> None:
    """Let ``around(save, engine, asked)`` take the place of this engine's ``save_checkpoint``."""
    _around(engine, "save_checkpoint", around)


def _around(engine: Any, method: str, around: Around) -> None:
    def calling(wrapped: Callable[..., Any], engine: Any, args: Any, kwargs: Any) -> Any:
        given = signature(wrapped).bind(*args, **kwargs)
        given.apply_defaults()
        return around(lambda: wrapped(*args, **kwargs), engine, given.arguments)

    wrap(engine, method, calling)
