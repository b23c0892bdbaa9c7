"""What a DeepSpeed JSON says about an optimizer: its options, what is wrong with them, and what they seem to say.

Judged from the file alone, without an engine and its model.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ds_optim.deepspeed.names import names
from ds_optim.stepping.sharded import ShardedOptimizer

CHECKPOINT_FORMS = ("deepspeed", "canonical", "both")
"""What the object's ``"checkpoint"`` may say."""


@dataclass(frozen=True, slots=True)
class DsOptimObject:
    """The JSON's top-level ``"ds_optim"`` object: what must not meet the Trainer's "auto" matching.

    Attributes:
        options: options of the optimizer, which take precedence over ``optimizer.params`` (three-element ``betas``).
        no_decay: name patterns of the parameters that are spared weight decay; None: by role, see `is_decay_exempt`.
        checkpoint: what ``engine.save_checkpoint`` writes, one of `CHECKPOINT_FORMS`.
    """

    options: dict[str, Any]
    no_decay: tuple[str, ...] | None
    checkpoint: str = CHECKPOINT_FORMS[0]

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> DsOptimObject:
        """From a whole DeepSpeed configuration."""
        given = dict(config.get("ds_optim") or {})
        no_decay, form = given.pop("no_decay", None), given.pop("checkpoint", CHECKPOINT_FORMS[0])
        return cls(given, tuple(no_decay) if isinstance(no_decay, list) else None, form)

    def all_options(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """What the optimizer is made with."""
        return {**(config.get("optimizer", {}).get("params") or {}), **self.options}


def form_problems(config: Mapping[str, Any]) -> list[str]:
    """What is wrong with the form of checkpoints that a whole DeepSpeed configuration asks for."""
    form = DsOptimObject.of(config).checkpoint
    if form in CHECKPOINT_FORMS:
        return []
    return [f'"ds_optim": "checkpoint" is {form!r}; it is one of {", ".join(map(repr, CHECKPOINT_FORMS))}']


def option_problems(cls: type[ShardedOptimizer], config: Mapping[str, Any]) -> list[str]:
    """Everything that is wrong with the options that a whole DeepSpeed configuration gives to ``cls``."""
    no_decay = (config.get("ds_optim") or {}).get("no_decay")
    if no_decay is not None and not (isinstance(no_decay, list) and all(isinstance(p, str) for p in no_decay)):
        return [f'"no_decay" must be a list of name patterns, not {no_decay!r}']
    options = DsOptimObject.of(config).all_options(config)
    accepted = list(inspect.signature(cls).parameters)[1:]
    problems = [
        f"{cls.__name__} has no option {key!r}; its options: {', '.join(accepted)}"
        for key in options
        if key not in accepted
    ]
    auto = [key for key, value in options.items() if value == "auto"]
    if auto:
        problems.append(f'"auto" for {", ".join(auto)} is filled in by a Hugging Face Trainer only; give numbers')
    problems += [*form_problems(config), *_schedule_problems(cls, config)]
    return problems + cls.setting_problems({key: value for key, value in options.items() if value != "auto"})


_TRAINERS_BETAS = (0.9, 0.999)  # the defaults of adam_beta1 and adam_beta2 in TrainingArguments


def _has_other_betas(cls: type[ShardedOptimizer], config: Mapping[str, Any]) -> bool:
    """Whether two betas that a Trainer fills in could displace the optimizer's own unseen."""
    own = inspect.signature(cls).parameters["betas"].default
    return (
        cls.rule.betas.count == 2 and tuple(own) != _TRAINERS_BETAS and "betas" not in DsOptimObject.of(config).options
    )


def _own_betas(cls: type[ShardedOptimizer]) -> str:
    own = list(inspect.signature(cls).parameters["betas"].default)
    return (
        f'leave "betas" out of "optimizer.params" for its default {own}, or put "ds_optim": {{"betas": {own}}} into it'
    )


def warn_of_trainers_betas(cls: type[ShardedOptimizer], config: Mapping[str, Any]) -> None:
    """By now "auto" is a number, and numbers must equal the Trainer's arguments: only equality with a default shows."""
    integration = sys.modules.get("transformers.integrations.deepspeed")
    trainers = integration.deepspeed_config() if integration is not None else None
    betas = (config["optimizer"].get("params") or {}).get("betas")
    if trainers is None or betas is None or tuple(betas) != _TRAINERS_BETAS or not _has_other_betas(cls, config):
        return
    warnings.warn(
        f'{cls.__name__} trains with betas {list(betas)}, the TrainingArguments\' defaults, which "auto" fills in: if '
        f"they are not meant, {_own_betas(cls)} in the JSON",
        stacklevel=2,
    )


_TRAINER_FILLS = ("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "total_num_steps")  # of a schedule


def _schedule(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    scheduler = config.get("scheduler") or {}
    return str(scheduler.get("type", "")), dict(scheduler.get("params") or {})


def _schedule_problems(cls: type[ShardedOptimizer], config: Mapping[str, Any]) -> list[str]:
    """Why a JSON's ``scheduler`` cannot work with ``cls``."""
    name, params = _schedule(config)
    if name == "OneCycle" and params.get("cycle_momentum", True) and cls.rule.betas.count != 2:
        return [
            f"OneCycle writes two betas into the groups, {cls.__name__} has {cls.rule.betas.count}: "
            'set "cycle_momentum": false in "scheduler.params"'
        ]
    return []


def trainer_problems(cls: type[ShardedOptimizer], config: Mapping[str, Any]) -> list[str]:
    """What a Hugging Face Trainer's "auto" would make wrong in a whole DeepSpeed configuration."""
    problems = []
    betas = (config["optimizer"].get("params") or {}).get("betas")
    if betas == "auto" and cls.rule.betas.count != 2 and "betas" not in DsOptimObject.of(config).options:
        own = list(inspect.signature(cls).parameters["betas"].default)
        problems.append(
            f'"betas": "auto": a Trainer fills in two, {cls.__name__} has {cls.rule.betas.count}: '
            f'leave it out and write "ds_optim": {{"betas": {own}}}'
        )
    from deepspeed.runtime import lr_schedules

    name, params = _schedule(config)
    made = getattr(lr_schedules, name, None) if name in lr_schedules.VALID_LR_SCHEDULES else None
    accepted = list(inspect.signature(made).parameters)[1:] if made is not None else list(params)
    problems += [
        f'{name} has no option {key!r} ("scheduler.params"); its options: {", ".join(accepted)}'
        for key in params
        if key not in accepted
    ]
    left = [key for key, value in params.items() if value == "auto" and key in accepted and key not in _TRAINER_FILLS]
    if left:
        problems.append(
            f'"auto" for {", ".join(left)} of {name}: a Trainer fills in {", ".join(_TRAINER_FILLS)} only; give values'
        )
    return problems


def notes(config: Mapping[str, Any]) -> list[str]:
    """What is no error in a whole DeepSpeed configuration, but trains with other numbers than it seems to."""
    optimizer = config.get("optimizer")
    cls = names().get(str(optimizer.get("type"))) if isinstance(optimizer, Mapping) else None
    if cls is None or not isinstance(optimizer, Mapping):
        return []
    found = []
    given = optimizer.get("params") or {}
    if given.get("betas") == "auto" and _has_other_betas(cls, config):
        found.append(
            f'"betas": "auto" gives {cls.__name__} the TrainingArguments\' adam_beta1 and adam_beta2, by default '
            f"{list(_TRAINERS_BETAS)}: {_own_betas(cls)}"
        )
    name, params = _schedule(config)
    lr = DsOptimObject.of(config).all_options(config).get("lr")
    if name in ("WarmupLR", "WarmupDecayLR"):
        highest = params.get("warmup_max_lr", 0.001 if name == "WarmupDecayLR" else lr)
        stated = "" if "warmup_max_lr" in params else ", its default"
        if highest not in ("auto", lr):
            found.append(
                f"{name} trains with its warmup_max_lr, {highest}{stated}, and not with the optimizer's lr"
                + (f", {lr}" if lr is not None else "")
                + ': set "warmup_max_lr" to the learning rate'
            )
    if name == "OneCycle" and params.get("cycle_momentum", True) and cls.rule.betas.count == 2:
        found.append(
            f"OneCycle cycles the first beta between {params.get('cycle_min_mom', 0.8)} and "
            f"{params.get('cycle_max_mom', 0.9)} and sets the second to 0.99, whatever the optimizer was given: "
            '"cycle_momentum": false in "scheduler.params" keeps its betas'
        )
    return found
