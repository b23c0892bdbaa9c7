"""Where DeepSpeed trains other weights, or skips steps, and says nothing: one engine is watched, and we say it.

Three kinds, each measured with DeepSpeed's own AdamW too, which does the same: weights that are loaded and then thrown
away by the fp32 master, steps that are skipped in silence, and a backward pass whose gradients replace an earlier
one's instead of adding to them. What DeepSpeed does right when it is asked otherwise is refused by name, before any
weight changes.

Methods of this engine's objects are wrapped, never DeepSpeed's classes, and nothing here keeps an engine or an
optimizer alive: what is hung on them refers to them weakly. Nothing looks at values on a device.
"""

from __future__ import annotations

import os
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch

from ds_optim.deepspeed import differences, wrappers
from ds_optim.deepspeed.events import after_zero_grad, around_load
from ds_optim.errors import raise_on_all_ranks
from ds_optim.instance_methods import after, wrap
from ds_optim.latest import LATEST, newest
from ds_optim.listing import first_of
from ds_optim.roles import canonical_name
from ds_optim.rule import WholeMatrix


def watch(engine: Any) -> None:
    """Hang all guards on an engine whose optimizer, one of ours, was just bound."""
    guard_loads(engine)
    warn_of_skipped_steps(engine)
    step_outside_of_autograd(engine)
    refuse_lost_gradients(engine)
    refuse_saves_of_some(engine)


def refuse_saves_of_some(engine: Any) -> None:
    """Let ``engine.save_checkpoint`` raise where DeepSpeed would ask some ranks alone for the optimizer's state.

    Without ZeRO, of a model with experts, those that write them ask; blocks of what all ranks have the same have
    different owners, of whom it is gathered, and the others would be waited for.
    """
    optimizer, has_experts = engine.basic_optimizer, bool(engine.has_moe_layers)
    if not isinstance(optimizer.rule, WholeMatrix) or engine.zero_optimization_stage() > 0:
        return
    if engine.pipeline_parallelism:  # whose stages may have none
        has_experts = any(optimizer.ranks.everyones(has_experts).values())
    if not has_experts:
        return

    name = type(optimizer).__name__

    def save(*_: Any) -> Any:
        raise RuntimeError(
            "DeepSpeed's save_checkpoint at ZeRO stage 0 asks only some ranks of a model with experts for the state of "
            f"{name}, which all of them have a part of: use "
            "ds_optim.checkpoint.save(directory, engine), or ZeRO stage 1"
        )

    wrap(engine, "save_checkpoint", save)


def guard_loads(engine: Any) -> None:
    """Let ``engine.load_checkpoint`` load weights alone only where the next step starts from them.

    At ZeRO-3 the weights lie in the optimizer's files: ``load_module_only`` alone reads none of them, and without
    optimizer states DeepSpeed reads those of the newest checkpoint, whatever the tag. At ZeRO-0 in bf16 the old fp32
    masters survive ``load_optimizer_states=False`` and overwrite what was loaded: they are refreshed here from the
    loaded weights, as DeepSpeed itself does at ZeRO-1 and 2.
    """

    def guarded(load: Callable[[], Any], engine: Any, asked: dict[str, Any]) -> Any:
        if wrappers.kind_of(engine.optimizer) is wrappers.ZERO_3:
            problems = _zero_3_load_problems(asked)  # of files that not every rank need see
            subject = "load_checkpoint would not load these weights, nothing was changed"
            raise_on_all_ranks(problems, subject, engine.basic_optimizer.ranks)
        loaded = load()
        weights_alone = not asked["load_optimizer_states"] and not asked["load_module_only"]
        if loaded[0] is not None and weights_alone and wrappers.kind_of(engine.optimizer) is wrappers.UNFUSED:
            engine.optimizer.refresh_fp32_params()
        return loaded

    around_load(engine, guarded)


def _zero_3_load_problems(asked: dict[str, Any]) -> list[str]:
    ours = "ds_optim.checkpoint.load(directory, engine, load_optimizer_states=False) loads what ds_optim saved"
    if asked["custom_load_fn"] is not None:
        return []  # it brings the weights itself
    if asked["load_module_only"] and asked["load_optimizer_states"]:
        return [
            "load_module_only=True at ZeRO-3 loads no weights (DeepSpeed keeps them in the optimizer's files, which it "
            f"then does not read): give load_optimizer_states=False as well; {ours}"
        ]
    if not asked["load_optimizer_states"] and asked["tag"] is not None:
        named = newest(asked["load_dir"])
        if named != str(asked["tag"]):
            latest = os.path.join(asked["load_dir"], LATEST)
            return [
                f"load_optimizer_states=False at ZeRO-3 loads the weights that {latest} names ({named or 'none'}), "
                f"not those of tag {asked['tag']!r}: write {asked['tag']!r} into that file first; {ours}"
            ]
    return []


def warn_of_skipped_steps(engine: Any) -> None:
    """At ZeRO-0 in half precision DeepSpeed skips a step without a line in the log (1 to 3 write one): say it once."""
    wrapper = engine.optimizer
    if wrappers.kind_of(wrapper) is not wrappers.UNFUSED:
        return
    at, of_wrapper = weakref.ref(engine), weakref.ref(wrapper)
    told = False

    def say() -> None:
        nonlocal told
        engine = at()
        if not told and engine is not None and getattr(of_wrapper(), "overflow", False):
            told = True
            warnings.warn(
                f"step {engine.global_steps + 1} was skipped: a gradient was not finite. At ZeRO-0 DeepSpeed says "
                "nothing when it skips, and this is said once: watch engine.skipped_steps. If it goes up step after "
                "step, nothing is trained any more: lower the learning rate, set gradient_clipping, look at the data, "
                "or load an earlier checkpoint if weights are not finite",
                stacklevel=2,
            )

    after(wrapper, "step", say)


def step_outside_of_autograd(engine: Any) -> None:
    """Where a release of DeepSpeed would gather stepped weights inside autograd, which torch may refuse."""
    wrapper = engine.optimizer
    if wrappers.kind_of(wrapper) is not wrappers.ZERO_1_AND_2 or not differences.gathers_in_a_graph(wrapper):
        return

    def step(wrapped: Callable[..., Any], _: Any, args: Any, kwargs: Any) -> Any:
        with torch.no_grad():
            return wrapped(*args, **kwargs)

    wrap(wrapper, "step", step)


def refuse_lost_gradients(engine: Any) -> None:
    """Before weights change, refuse a step whose gradients lack those of one of its backward passes.

    At ZeRO-3 DeepSpeed tells backward passes apart by the forward passes between them: after two forward passes the
    second backward pass's gradients are copied over the first one's. At ZeRO-1 and 2 every pass at a gradient
    accumulation boundary replaces the one before, and after ``loss.backward()`` (in the place of
    ``engine.backward(loss)``) without a forward pass in between, gradients are left in the bucket.
    """
    wrapper = engine.optimizer
    if engine.pipeline_parallelism:
        return  # runs its passes itself
    if wrappers.kind_of(wrapper) is wrappers.ZERO_3:
        lost = _overwritten_at_3(engine)
    elif wrappers.kind_of(wrapper) is wrappers.ZERO_1_AND_2:
        lost = _replaced_at_1_and_2(engine)
    else:
        return

    def step(wrapped: Callable[..., Any], _: Any, args: Any, kwargs: Any) -> Any:
        reason = lost()
        if reason:
            raise RuntimeError(f"DeepSpeed lost gradients of this step: {reason}. No weight was changed")
        return wrapped(*args, **kwargs)

    wrap(wrapper, "step", step)


def _overwritten_at_3(engine: Any) -> Callable[[], str]:
    """Notes, on every rank alike, the parameters whose gradients were copied over others of the same step."""
    names = {p.ds_id: canonical_name(name) for name, p in engine.module.named_parameters()}
    arrived: set[int] = set()
    again: set[int] = set()

    def partition(wrapped: Callable[..., Any], wrapper: Any, args: Any, kwargs: Any) -> Any:
        if wrapper.micro_step_id == 0:  # in later passes they are added
            for parameter in args[0] if args else kwargs["params_to_release"]:
                (again if parameter.ds_id in arrived else arrived).add(parameter.ds_id)
        return wrapped(*args, **kwargs)

    def forget() -> None:
        arrived.clear()
        again.clear()

    def reason() -> str:
        if not again:
            return ""
        some = first_of(sorted(names[ds_id] for ds_id in again), 3)
        return (
            f"a second backward pass without a forward pass before it replaced those of {some}. Take each loss's "
            "forward and backward pass before the next one's forward pass, or use ZeRO stage 1 or 2 with "
            '"managed_gradient_accumulation": false (deepspeed 0.19.4 and later)'
        )

    wrap(engine.optimizer, "partition_grads", partition)
    after_zero_grad(engine, forget)
    return reason


def _replaced_at_1_and_2(engine: Any) -> Callable[[], str]:
    """Notes whether DeepSpeed took more than one whole backward pass of a step for its last one."""
    of_engine, of_wrapper = weakref.ref(engine), weakref.ref(engine.optimizer)
    is_complete = is_replaced = False

    def at_boundary() -> bool:
        engine = of_engine()
        return engine is not None and not engine.inside_no_sync_ctxt and engine.is_gradient_accumulation_boundary()

    def begin() -> None:
        nonlocal is_replaced
        is_replaced = is_replaced or (is_complete and at_boundary())

    def end() -> None:
        nonlocal is_complete
        is_complete = is_complete or at_boundary()

    def forget() -> None:
        nonlocal is_complete, is_replaced
        is_complete = is_replaced = False

    def reason() -> str:
        if is_replaced:
            return (
                "it has several backward passes at a gradient accumulation boundary, and each replaced the one before. "
                'Set "managed_gradient_accumulation": false in the JSON (deepspeed 0.19.4 and later, 0.19.5 under '
                'offload), or "gradient_accumulation_steps" to the number of passes, with engine.step() behind each; '
                "if the last one is to count alone, call engine.zero_grad() before it"
            )
        if getattr(of_wrapper(), "ready_for_gradients", False):
            return (
                "those of the last loss.backward() were never reduced, since no forward pass lay between it and the "
                "backward pass before. Use engine.backward(loss)"
            )
        return ""

    after(engine.optimizer, "backward_prologue", begin)
    after(engine.optimizer, "independent_gradient_partition_epilogue", end)
    after_zero_grad(engine, forget)
    return reason
