"""A name in a DeepSpeed JSON becomes one of our optimizers, bound to its engine.

Where DeepSpeed itself is touched: the optimizers' names are made known to it (see `names`), before an engine looks
them up, and `DeepSpeedEngine._configure_optimizer` is wrapped. The wrapper judges the configuration before anything is
built, splits a flat parameter list into decayed and exempt parameters, and afterwards binds the optimizer to the
partitions that DeepSpeed made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib import import_module
from inspect import signature
from typing import Any

import torch
import wrapt
from torch import Tensor

from ds_optim.deepspeed import gradient_window, guards, reader, wrappers
from ds_optim.deepspeed.configuration import DsOptimObject, form_problems, option_problems, warn_of_trainers_betas
from ds_optim.deepspeed.model_parts import names_in, roles_in
from ds_optim.deepspeed.names import install_names, names
from ds_optim.deepspeed.overlooked import overlooked, watch_trainer
from ds_optim.deepspeed.parameters import anywhere, grouped, is_trained, listed, names_of, parameter_of, roles_of
from ds_optim.deepspeed.refusals import engine_problems, untrained
from ds_optim.errors import in_one, raise_on_all_ranks
from ds_optim.optimizers.registry import when_registered
from ds_optim.releases import DEEPSPEED, require, say_what_was_not_tried
from ds_optim.roles import decayed_then_exempt, exempt_names
from ds_optim.roles.role import Role
from ds_optim.stepping.deferred import deferred_steps
from ds_optim.stepping.sharded import ShardedOptimizer
from ds_optim_autoload import ENGINE

_ARGUMENTS = ("client_optimizer", "model_parameters")  # of what is wrapped
_REFUSED = "ds_optim cannot run under this configuration, nothing was changed"


_FOLLOWERS: list[Callable[[Any], None]] = []


def when_bound(follow: Callable[[Any], None]) -> None:
    """Have ``follow(engine)`` called whenever an optimizer of ours was bound to an engine."""
    _FOLLOWERS.append(follow)


def _install() -> None:
    """Make the optimizers' names known, and see to it that every engine does so and is given one of ours.

    Runs when this module is imported, whoever imports it, and so once per process.

    Raises:
        ImportError: this DeepSpeed is outside of the range that works.
    """
    require(DEEPSPEED)
    when_registered(install_names)
    engine = import_module(ENGINE)
    wrapt.wrap_function_wrapper(engine, "DeepSpeedEngine._configure_optimizer", _configure_optimizer)
    watch_trainer()


def _configure_optimizer(wrapped: Callable[..., Any], engine: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
    named = None
    unknown = wrappers.attributes_problem(engine, "configuration")
    try:
        given = signature(wrapped).bind(*args, **kwargs)
        client, parameters = (given.arguments[name] for name in _ARGUMENTS)
        named = names().get(engine.optimizer_name()) if client is None else None
    except Exception as error:  # of a release that is not known: engines with others' optimizers must not notice
        unknown = unknown or wrappers.unlike(f"what an optimizer is made of is said otherwise ({error!r})")
    if unknown:
        return _of_an_unknown_release(wrapped, engine, args, kwargs, unknown, named)
    if parameters is not None:
        parameters = [listed(entry) for entry in parameters]
    forgotten = overlooked(client, parameters)

    def make(client: Any, parameters: Any) -> Any:
        given.arguments.update(zip(_ARGUMENTS, (client, parameters), strict=True))
        return wrapped(*given.args, **given.kwargs)

    result = _configured(make, engine, client, parameters, named)
    if forgotten is not None and reader.ranks_of(engine).index == 0:
        forgotten.warn(engine)
    return result


def _of_an_unknown_release(
    wrapped: Callable[..., Any], engine: Any, args: tuple[Any, ...], kwargs: Any, unknown: str, named: Any
) -> Any:
    """An engine that is not what is known here: refused with an optimizer of ours, made as ever with any other.

    Args:
        unknown: what is not known.
        named: the class of ours that its JSON names, as far as could be seen.
    """
    if not any(map(_is_ours, (named, *args, *kwargs.values()))):
        result = wrapped(*args, **kwargs)
        if not _is_ours(getattr(engine, "basic_optimizer", None)):
            return result
    raise ValueError(in_one([unknown], _REFUSED))  # without asking other ranks, which have this release too


def _is_ours(optimizer: Any) -> bool:
    """Of an optimizer or a class."""
    return issubclass(optimizer if isinstance(optimizer, type) else type(optimizer), ShardedOptimizer)


def _configured(
    make: Callable[[Any, Any], Any], engine: Any, client: Any, parameters: Any, named: type[ShardedOptimizer] | None
) -> Any:
    is_foreign = isinstance(client, torch.optim.Optimizer) and not isinstance(client, ShardedOptimizer)
    if is_foreign or (client is None and named is None):
        return make(client, parameters)  # DeepSpeed's own optimizer, or somebody else's

    inferred: dict[str, Role] = {}
    given: list[Tensor] = []

    def accept(optimizer: ShardedOptimizer) -> None:
        inferred.update(roles_in(engine.module))
        given.extend(_accept_client(engine, optimizer, inferred))

    with deferred_steps():
        if named is not None:
            inferred.update(roles_in(engine.module))
            given.extend(parameter for group in grouped(parameters) for parameter in group)
            parameters = _prepare_from_json(engine, named, parameters, inferred)
        elif isinstance(client, ShardedOptimizer):
            accept(client)
        else:
            client = _accepting(client, accept)
        result = make(client, parameters)
    basic = engine.basic_optimizer
    if isinstance(basic, ShardedOptimizer):
        _refuse_uneven_stages(engine, len(basic.param_groups))
        binding = reader.read(engine)
        if not binding.problems:
            binding = replace(binding, settle=gradient_window.settle_gradients(engine))
        basic.bind(binding, roles_of(engine, basic.roles_given, inferred), names_of(engine, given))
        reader.guard_state_access(engine, type(basic).__name__, basic.stepper.element_keys)
        guards.watch(engine)
        for follow in _FOLLOWERS:
            follow(engine)
        if basic.ranks.index == 0:
            say_what_was_not_tried()
    return result


def _accepting(make: Callable[[Any], Any], accept: Callable[[ShardedOptimizer], None]) -> Callable[[Any], Any]:
    """What ``make`` makes, accepted first if it is an optimizer of ours; a callable may make any."""

    def client(parameters: Any) -> Any:
        made = make(parameters)
        if isinstance(made, ShardedOptimizer):
            accept(made)
        return made

    return client


def _accept_client(engine: Any, optimizer: ShardedOptimizer, inferred: Mapping[str, Role]) -> list[Tensor]:
    """Judge an engine for an optimizer that the user made; the parameters that it was given."""
    problems = engine_problems(engine, type(optimizer), optimizer.roles_given, inferred)
    groups = [list(group["params"]) for group in optimizer.param_groups]
    problems += untrained(engine, groups)
    if isinstance(engine.client_lr_scheduler, torch.optim.lr_scheduler.LRScheduler):
        problems += [
            f"parameter group {index} is empty: DeepSpeed takes it from the optimizer, but the learning-rate scheduler "
            "that was made over it still counts it: leave the group out"
            for index, group in enumerate(groups)
            if not group
        ]
    problems += form_problems(engine._config._param_dict)
    settings = DsOptimObject.of(engine._config._param_dict)
    if settings.options or settings.no_decay is not None:
        problems.append(
            'the "ds_optim" object is for an optimizer that the JSON names; give its contents, "checkpoint" aside, to '
            "the optimizer that you make yourself"
        )
    _raise_on_all_ranks(engine, problems)
    _allow_cpu_offload(engine)
    return [parameter for group in groups for parameter in group]


def _prepare_from_json(
    engine: Any, cls: type[ShardedOptimizer], parameters: list[Any], inferred: Mapping[str, Role]
) -> list[Any]:
    """Judge the configuration, merge the ``ds_optim`` object into the optimizer's options, make decay groups."""
    config = engine._config._param_dict
    problems = option_problems(cls, config)
    settings = DsOptimObject.of(config)
    options = settings.all_options(config)
    problems += engine_problems(engine, cls, options.get("roles"), inferred)
    is_grouped = any(isinstance(entry, dict) for entry in parameters)
    if is_grouped and settings.no_decay:
        problems.append('"no_decay" has no effect on parameter groups that you made: leave it out')
    patterns = settings.no_decay
    exempt, pattern_problems = _exempt(engine, patterns, inferred)
    _raise_on_all_ranks(engine, [*problems, *pattern_problems, *untrained(engine, grouped(parameters))])
    warn_of_trainers_betas(cls, config)
    if options.get("roles") is not None:  # they were judged
        exempt, _ = _exempt(engine, patterns, roles_of(engine, options["roles"], inferred))
    engine._config.optimizer_params = options
    _allow_cpu_offload(engine)
    if is_grouped:
        return _called(engine, parameters)

    decayed, spared = decayed_then_exempt(parameters, lambda entry: parameter_of(entry) in exempt)
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": spared, "weight_decay": 0.0}]
    kept, others = [], list[Any]()
    for group in groups:
        if any(is_trained(parameter_of(entry)) for entry in group["params"]):
            kept.append(group)
        else:
            others += group["params"]
    if not kept:  # ZeRO-0, else this was refused: an engine whose steps do nothing, as with DeepSpeed's own optimizers
        return [{"params": others}]
    # What has no elements does not decay either, and DeepSpeed cannot lay out a group of nothing else.
    kept[0]["params"] += [entry for entry in others if parameter_of(entry).requires_grad]
    return _called(engine, kept)


def _called(engine: Any, groups: list[Any]) -> list[Any]:
    """Groups as DeepSpeed divides them into experts' and others: each with a name, of parameters alone."""
    if not engine.has_moe_layers:
        return groups
    return [
        {"name": f"group {index}", **group, "params": its}
        for index, (group, its) in enumerate(zip(groups, grouped(groups), strict=True))
    ]


def _exempt(engine: Any, no_decay: tuple[str, ...] | None, roles: Mapping[str, Role]) -> tuple[set[Tensor], list[str]]:
    """The parameters without weight decay, and patterns that match none."""
    named = {name: parameter for parameter, name in names_in(engine.module).items()}
    everywhere = anywhere(engine, dict.fromkeys(named, True))
    problems = [
        f'"no_decay": {pattern!r} matches no parameter'
        for pattern in no_decay or ()
        if not exempt_names(everywhere, {}, [pattern])
    ]
    return {named[name] for name in exempt_names(named, roles, no_decay)}, problems


def _allow_cpu_offload(engine: Any) -> None:
    """DeepSpeed refuses client optimizers under CPU offload unless the user says otherwise: ours run natively there."""
    engine._config.zero_force_ds_cpu_optimizer = False


def _refuse_uneven_stages(engine: Any, groups: int) -> None:
    """Refuse stages of a pipeline that have different numbers of parameter groups, where DeepSpeed would wait for more.

    At ZeRO-1 it adds gradients' norms up group by group over the stages, whatever the optimizer.

    Args:
        groups: of this rank, experts' own among them.
    """
    if not (engine.pipeline_parallelism and engine.zero_optimization_stage()):
        return
    counts = sorted(set(reader.ranks_of(engine).everyones(groups).values()))
    if len(counts) > 1:
        raise ValueError(
            in_one(
                [
                    f"stages of the pipeline have {' and '.join(map(str, counts))} parameter groups (weight decay "
                    "divides them), and DeepSpeed with ZeRO adds norms up group by group over the stages: give every "
                    'stage layers of each kind, set "ds_optim": {"no_decay": []}, or use ZeRO stage 0'
                ],
                _REFUSED,
            )
        )


def _raise_on_all_ranks(engine: Any, problems: list[str]) -> None:
    """On all ranks of an engine: its stages have different layers, and none of them may wait for another."""
    raise_on_all_ranks(problems, _REFUSED, reader.ranks_of(engine))


_install()
