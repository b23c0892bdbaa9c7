"""An optimizer that was given and is not the one that trains: others drop or replace it without a word.

transformers' Trainer drops its ``optimizers`` when it sets DeepSpeed up, Accelerate replaces any optimizer by one of
DeepSpeed's under CPU offload, and `deepspeed.initialize` makes the JSON's own if it is handed none. When an engine gets
its optimizer, one of ours is looked for that no engine has taken and whose parameters that optimizer will train.
Nothing here keeps an optimizer or a parameter alive; one that has state was of use elsewhere and is none of these.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch
import wrapt
from torch import Tensor

from ds_optim.deepspeed.parameters import parameter_of
from ds_optim.stepping.sharded import ShardedOptimizer, waiting

TRAINER = "transformers.trainer"


class _Dropped(NamedTuple):
    """What is remembered of an optimizer that may be gone: the name of its class, and what it was to train."""

    name: str
    parameters: list[weakref.ref[Tensor]]


_dropped: list[_Dropped] = []  # by the Trainer that is about to build its engine


def watch_trainer() -> None:
    """See what transformers drops: the one function that does it is wrapped where the Trainer finds it."""

    def watch(trainer: ModuleType) -> None:
        if hasattr(trainer, "deepspeed_init"):
            wrapt.wrap_function_wrapper(trainer, "deepspeed_init", _deepspeed_init)

    wrapt.register_post_import_hook(watch, TRAINER)


def _deepspeed_init(wrapped: Callable[..., Any], _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    trainer = kwargs.get("trainer", args[0] if args else None)
    given = getattr(trainer, "optimizer", None)
    result = wrapped(*args, **kwargs)
    if isinstance(given, ShardedOptimizer) and given in waiting and getattr(trainer, "optimizer", None) is not given:
        waiting.discard(given)
        _dropped[:] = [_Dropped(type(given).__name__, [weakref.ref(one) for one in _to_train(given)])]
    return result


@dataclass(frozen=True, slots=True)
class Overlooked:
    """Optimizers of ours that are not the one that will train their parameters.

    Attributes:
        names: of their classes.
        is_dropped: by a Trainer.
        is_replaced: by Accelerate.
        is_the_jsons: whether the one that trains is.
    """

    names: list[str]
    is_dropped: bool
    is_replaced: bool
    is_the_jsons: bool

    def warn(self, engine: Any) -> None:
        """Say what trains instead, and what helps.

        Args:
            engine: it has its optimizer now.
        """
        name, basic = self.names[0], type(engine.basic_optimizer)
        made = f"{' and '.join(self.names)} {'was' if len(self.names) == 1 else 'were'} made for these parameters"
        instead = "another" if basic.__name__ in self.names else f"{basic.__name__} of {basic.__module__.split('.')[0]}"
        in_json = f'name it in the DeepSpeed JSON: "optimizer": {{"type": "ds_optim.{name}", "params": {{...}}}}'
        unforced = '"zero_force_ds_cpu_optimizer": false in the JSON'
        if self.is_dropped:
            why = "transformers' Trainer drops what it is given as optimizers=... under DeepSpeed"
            remedy = in_json
            if not self.is_the_jsons:  # which would prevail
                remedy += f"; or give the Trainer optimizer_cls_and_kwargs=({name}, {{...}})"
                remedy += f" (and {unforced})" if engine.zero_use_cpu_optimizer() else ""
        elif self.is_replaced:
            why = "Accelerate replaces every optimizer under CPU offload"
            remedy = f"{in_json}; or put {unforced}"
        else:
            why = "DeepSpeed was not handed it"
            remedy = f"deepspeed.initialize(..., optimizer=...); or {in_json}"
        warnings.warn(f"{made}, but {instead} trains them: {why}. Remedy: {remedy}", stacklevel=2)


def overlooked(client: Any, parameters: Iterable[Any] | None) -> Overlooked | None:
    """Who is overlooked when an engine gets its optimizer; each only once.

    To be asked before, since DeepSpeed puts partitions in the place of parameters, in groups that Accelerate shares.

    Args:
        client: the optimizer that the engine is handed, if any.
        parameters: what it is to be made over otherwise: parameters, ``(name, parameter)`` pairs, or groups of either.
    """
    trained = _parameters_of(client, parameters)
    dropped = [one.name for one in _dropped if {ref() for ref in one.parameters} <= trained]
    _dropped.clear()
    is_replaced = type(client).__module__.startswith("deepspeed.ops.")  # what Accelerate hands over
    left = []
    if client is None or is_replaced:  # whoever hands over anything else means it
        left = [one for one in waiting if not one.state and _to_train(one) and _to_train(one) <= trained]
    for one in left:
        waiting.discard(one)
    names = sorted({*dropped, *(type(one).__name__ for one in left)})
    return Overlooked(names, bool(dropped), is_replaced, client is None) if names else None


def _parameters_of(client: Any, parameters: Iterable[Any] | None) -> set[Tensor]:
    listed = client.param_groups if isinstance(client, torch.optim.Optimizer) else parameters or ()
    entries = [one for entry in listed for one in (entry["params"] if isinstance(entry, dict) else [entry])]
    return {parameter_of(one) for one in entries}


def _to_train(optimizer: ShardedOptimizer) -> set[Tensor]:
    return {one for group in optimizer.param_groups for one in group["params"] if one.requires_grad}
