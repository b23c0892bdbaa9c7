"""A step's gradient is what arrived since the last step or ``zero_grad()``, whatever DeepSpeed's buffers still hold.

ZeRO-3, and ZeRO-1/2 with CPU offload, keep gradients in buffers that outlive the step: of a parameter that the model
did not use they still hold an earlier gradient (stage3.py `partition_grads` copies what arrives), and so do the global
norm, the overflow check and the getters, which all read the buffers before the optimizer is called. ``zero_grad()``
does not reach them, nor what ZeRO-1/2 accumulate. Such a parameter counts as having zero gradient here. Under offload
the masters' gradients are written in the last backward pass of an accumulation window alone: those of parameters that
only earlier ones used are handed over when the step begins.

Hooks on the parameters see what arrives. What was left from an earlier window is cleared when a backward pass ends, so
that nothing is written where every parameter is used (with reentrant checkpointing the first of its inner passes ends
before most gradients have arrived: one more clearing of each buffer); all of it at once, before DeepSpeed adds to it,
where a window was dropped. Under these strategies all ranks use the same parameters: their reductions would not match
otherwise.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ds_optim import known_torch
from ds_optim.deepspeed import differences, wrappers
from ds_optim.deepspeed.events import after_zero_grad
from ds_optim.instance_methods import after, wrap
from ds_optim.releases import DEEPSPEED


def settle_gradients(engine: Any) -> Callable[[], None] | None:
    """Let an engine hand over what arrived since the last step or ``zero_grad()``, the engine's or its optimizer's.

    Returns:
        To be called when a step begins, before it reads gradients; None where there is nothing to do.
    """
    wrapper = engine.optimizer
    warn = _warning_of_accumulation(engine)
    kind = wrappers.kind_of(wrapper)
    if kind is wrappers.BF16:
        after(engine, "zero_grad", wrapper.clear_hp_grads)  # its own does so already
    elif kind is wrappers.ZERO_1_AND_2:
        after_zero_grad(engine, partial(_forget_accumulated, weakref.ref(wrapper), warn))
    if not keeps_gradients(wrapper):
        return None
    window = GradientWindow(engine, clears=True, warn=warn)
    if window.is_offloaded:
        wrap(wrapper, "step", window.complete)
    return window.settle


def keeps_gradients(wrapper: Any) -> bool:
    """Whether a wrapper's gradients lie in buffers that outlive the step."""
    kind = wrappers.kind_of(wrapper)
    return kind is wrappers.ZERO_3 or (kind is wrappers.ZERO_1_AND_2 and bool(wrapper.cpu_offload))


def _warning_of_accumulation(engine: Any) -> Callable[[], None]:
    """Says once that gradients were dropped which DeepSpeed's own optimizers would have kept."""
    of_engine = weakref.ref(engine)
    has_warned = False

    def warn() -> None:
        nonlocal has_warned
        engine = of_engine()
        if has_warned or engine is None or engine.gradient_accumulation_steps() == 1:
            return
        has_warned = True
        warnings.warn(
            "zero_grad() was called before a step had used the gradients: they are dropped, those of earlier backward "
            "passes of the same accumulation window too (DeepSpeed's own optimizers would keep them at ZeRO-2 and 3). "
            "Call it after engine.step() only, or leave it out: the engine does it",
            stacklevel=2,
        )

    return warn


def _forget_accumulated(reference: Callable[[], Any], warn: Callable[[], None]) -> None:
    """Drop the sums of earlier backward passes at ZeRO-1/2; after a step there are none."""
    wrapper = reference()
    if wrapper is None:
        return
    sums = chain(wrapper.averaged_gradients.values(), wrapper.all_grad_tensors.values())
    if not wrapper.overflow and any(one is not None for one in sums):  # else a skipped step drops them itself
        warn()
    for gradients in wrapper.averaged_gradients.values():
        for gradient in gradients or ():
            gradient.zero_()  # in place: where ZeRO accumulates in fp32 but reduces in bf16 it goes on adding to them
    wrapper.all_grad_tensors = dict.fromkeys(wrapper.all_grad_tensors)
    if wrapper.cpu_offload:
        wrapper.local_overflow = False


class GradientWindow:
    """Knows what an engine's wrapper still keeps from before the window at hand, and clears it.

    A window begins with the first gradient after a step or a ``zero_grad()``. What hangs on the engine, its wrapper and
    the parameters goes with DeepSpeed's own hooks in ``engine.destroy()``, and none of it keeps the engine or its
    optimizer alive.

    Args:
        engine: a `deepspeed.DeepSpeedEngine` whose wrapper `keeps_gradients`.
        clears: whether to clear anything; otherwise `is_stale` tells.
        warn: is called when gradients of an unfinished window are dropped.
    """

    def __init__(self, engine: Any, *, clears: bool, warn: Callable[[], None] = lambda: None) -> None:
        wrapper = engine.optimizer
        self._engine: Callable[[], Any] = weakref.ref(engine)
        self._wrapper: Callable[[], Any] = weakref.ref(wrapper)
        self._clears = clears
        self._is_zero_3 = wrappers.kind_of(wrapper) is wrappers.ZERO_3
        self._warn = warn
        self.is_offloaded = bool(wrapper.offload_optimizer if self._is_zero_3 else wrapper.cpu_offload)
        self._undelivered: set[Tensor] = set()  # that arrived in this window, but not in its last backward pass
        self._keeps_last_alone = self.is_offloaded and differences.loses_earlier_passes(engine)
        self._written: set[Tensor] = set()  # in this window
        self._stale: set[Tensor] = set()  # in earlier ones, and not cleared since
        self._ended = True  # by zero_grad(), which an engine calls after each step as well
        self._stepped = True
        self._task = -1  # of the autograd engine
        self._undo: list[Callable[[], None]] = [after_zero_grad(engine, self._end)]
        leaves: dict[torch.nn.Module, list[Tensor]] = {}
        groups = wrapper.fp16_groups if self._is_zero_3 else wrapper.bit16_groups
        for parameter in chain.from_iterable(groups):
            if parameter.requires_grad:  # this kind of hook comes before DeepSpeed's, which takes the gradient
                self._goes_with(wrapper._grad_acc_hooks, parameter.register_hook(partial(self._arrives, parameter)))
            if hasattr(parameter, "ds_z3_leaf_module"):
                leaves.setdefault(parameter.ds_z3_leaf_module, []).append(parameter)
        # A ZeRO-3 "leaf module" hands zeros to its own idle parameters, and other ranks may have used them.
        for module, inside in leaves.items():
            hook = module.register_full_backward_hook(partial(self._leaf_is_done, inside))
            self._goes_with(wrapper._leaf_module_hooks, hook)

    def settle(self) -> None:
        """A step begins to read gradients: those that are left from an earlier window are cleared.

        Usually they were when the backward pass ended. Under offload a step without any must not see the last one's.
        """
        if self._ended and self.is_offloaded:  # at ZeRO-3 DeepSpeed calls zero_grad() in its own step
            self._stale |= self._written
            self._written = set()
        self._clear()
        self._stepped = True

    def complete(self, step: Callable[..., Any], wrapper: Any, args: Any, kwargs: Any) -> Any:
        """A wrapper's step under offload: first the masters get what came before the last backward pass alone.

        DeepSpeed hands them over in the last one of an accumulation window, and of the parameters in it only.

        Raises:
            RuntimeError: this DeepSpeed cannot; no weight was changed.
        """
        engine = self._engine()
        undelivered, self._undelivered = self._undelivered, set()
        is_left = undelivered and not self._ended and engine is not None and differences.is_managed(engine)
        if is_left and not differences.hand_over(wrapper, undelivered):
            raise RuntimeError(
                f"deepspeed {DEEPSPEED.installed} lost gradients of this step, under CPU offload: those that "
                f"{len(undelivered)} parameters got in earlier backward passes than the last one. Use deepspeed 0.19.5 "
                "or later, or train without zero_optimization.offload_optimizer. No weight was changed"
            )
        return step(*args, **kwargs)

    def is_stale(self, parameter: Tensor) -> bool:
        """Whether the wrapper keeps a gradient from an earlier window for it, once a backward pass has ended."""
        return parameter in self._stale

    def remove(self) -> None:
        """Leave everything as it was."""
        for undo in self._undo:
            undo()
        self._undo.clear()

    def _goes_with(self, hooks: list[Any], hook: Any) -> None:
        """DeepSpeed's ``destroy()`` removes the hooks in its lists."""
        hooks.append(hook)
        self._undo.append(hook.remove)

    def _end(self) -> None:
        self._ended = True

    def _arrives(self, parameter: Tensor, _: Tensor) -> None:
        self._note((parameter,))

    def _leaf_is_done(self, inside: list[Tensor], *_: Any) -> None:
        self._note(inside)

    def _note(self, parameters: Iterable[Tensor]) -> None:
        """Gradients of these parameters arrive: a backward pass is running."""
        if self._ended or self._stepped:
            self._begin()
        self._written.update(parameters)
        self._stale.difference_update(parameters)
        if self.is_offloaded:
            wrapper = self._wrapper()
            if wrapper is not None and not differences.is_boundary(wrapper):
                self._undelivered.update(parameters)
            elif not self._keeps_last_alone:
                self._undelivered.difference_update(parameters)
        task = known_torch.graph_task()
        if self._stale and task != self._task:
            self._task = task
            known_torch.when_backward_ends(self._clear)

    def _begin(self) -> None:
        dropped = not self._stepped
        self._stale |= self._written
        self._written, self._undelivered = set(), set()
        self._ended = self._stepped = False
        if dropped and self._clears:  # DeepSpeed may be about to add to it
            wrapper = self._wrapper()
            if wrapper is not None and not wrapper.overflow:  # else the step was skipped
                self._warn()
            if wrapper is not None and self.is_offloaded:
                differences.forget_arrivals(wrapper)
            self._clear()

    @torch.no_grad()
    def _clear(self) -> None:
        wrapper = self._wrapper()
        if wrapper is None or not self._clears:
            return
        held = _held_at_zero_3 if self._is_zero_3 else _held_at_zero_1_and_2
        for parameter in self._stale:
            for kept in held(wrapper, parameter):
                kept.zero_()
        self._stale = set()


def _held_at_zero_3(wrapper: Any, parameter: Tensor) -> Iterator[Tensor]:
    """Everything in which a ZeRO-3 wrapper keeps a parameter's gradient, or what it derived from it."""
    key = wrapper.get_param_id(parameter)
    kept = getattr(wrapper, wrappers.BUFFERS_OF_ZERO_3).get(key)
    if kept is not None:  # `offload_states` takes them away
        yield kept
    if wrapper.offload_optimizer:
        index, offset, numel = (int(value) for value in wrapper.grad_position[key])
        gradient = wrapper.fp32_partitioned_groups_flat[index].grad
        if gradient is not None:
            yield gradient.narrow(0, offset, numel)
        yield from _norm_of(wrapper, key)


def _held_at_zero_1_and_2(wrapper: Any, parameter: Tensor) -> Iterator[Tensor]:
    """Likewise under ZeRO-1/2 with CPU offload."""
    key = wrapper.get_param_id(parameter)
    if key in wrapper.grad_position:  # this rank's partition has a part of it
        index, _, offset, numel = (int(value) for value in wrapper.grad_position[key])
        gradient = wrapper.single_partition_of_fp32_groups[index].grad
        if gradient is not None:
            yield gradient.view(-1).narrow(0, offset, numel)
    kept = wrapper.accumulated_grads_in_cpu.get(key)
    if kept is not None:
        yield kept
    yield from _norm_of(wrapper, key)


def _norm_of(wrapper: Any, key: int) -> Iterator[Tensor]:
    norm = wrapper.norm_for_param_grads.get(key)
    if norm is not None:
        yield norm
