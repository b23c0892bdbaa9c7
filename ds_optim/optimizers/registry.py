"""The one list of optimizers: everything that names them all reads it, and others may add theirs.

An optimizer is registered when this module is imported; one that leaves something unsaid fails there, by name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from ds_optim.optimizers.adam_mini import AdamMini as AdamMini
from ds_optim.optimizers.adamw import AdamW as AdamW
from ds_optim.optimizers.adan import Adan as Adan
from ds_optim.optimizers.lion import Lion as Lion
from ds_optim.optimizers.muon import Muon as Muon
from ds_optim.optimizers.normuon import NorMuon as NorMuon
from ds_optim.optimizers.shampoo import Shampoo as Shampoo
from ds_optim.optimizers.soap import SOAP as SOAP
from ds_optim.optimizers.swan import SWAN as SWAN
from ds_optim.roles.role import Role
from ds_optim.rule import AdamMoments, Blockwise, Elementwise, Rule, WholeMatrix
from ds_optim.stepping.options import COMMON, EXCHANGE, PRODUCTS
from ds_optim.stepping.sharded import ShardedOptimizer

_BUILT_IN: tuple[type[ShardedOptimizer], ...] = (AdamW, Lion, Adan, AdamMini, Shampoo, SWAN, Muon, NorMuon, SOAP)

_JUDGED = ("params", "lr", "betas", "eps", "weight_decay")  # for every rule, see `ds_optim.stepping.options`

_registered: dict[str, type[ShardedOptimizer]] = {}
_listeners: list[Callable[[], None]] = []

C = TypeVar("C", bound=type[ShardedOptimizer])


def optimizers() -> dict[str, type[ShardedOptimizer]]:
    """Every optimizer by the name of its class, in the order of the documentation."""
    return dict(_registered)


def register(cls: C) -> C:
    """Add an optimizer, from this package or another; also as a decorator.

    DeepSpeed then finds it by its name, and the estimate, warm start, checkpoints and batch-size advice know it.

    Raises:
        TypeError: it leaves something unsaid, or another class has its name; every reason is listed.
    """
    problems = unstated(cls)
    if _registered.get(cls.__name__, cls) is not cls:
        problems.append(f"{_registered[cls.__name__].__module__} has an optimizer of that name")
    if problems:
        raise TypeError(f"{cls.__module__}.{cls.__name__} cannot be registered:\n- " + "\n- ".join(problems))
    _registered[cls.__name__] = cls
    for listener in _listeners:
        listener()
    return cls


def when_registered(listener: Callable[[], None]) -> None:
    """Call something now, and whenever an optimizer was added."""
    _listeners.append(listener)
    listener()


def unstated(cls: type[ShardedOptimizer]) -> list[str]:
    """What an optimizer's class leaves unsaid or says wrongly; its rule's own fields were checked when it was made."""
    rule = getattr(cls, "rule", None)
    if not isinstance(rule, Elementwise | Blockwise | WholeMatrix):
        return ["it has no `rule`: one of Elementwise, Blockwise or WholeMatrix of ds_optim.rule"]
    problems = _signature_problems(cls, rule)
    if inspect.getdoc(cls) is None or cls.__doc__ is None:
        problems.append("it has no docstring: state, arguments and source")
    fused = rule.others if isinstance(rule, WholeMatrix) else rule
    keys = (fused.element_state, fused.block_state)
    if not fused.element_state or not all(isinstance(listed, tuple) for listed in keys):
        problems.append("what its rule keeps is not stated: `element_state` is a tuple with a name at least")
    kernels = {one.rule.name: one.rule.update for one in _BUILT_IN if not isinstance(one.rule, WholeMatrix)}
    if kernels.get(fused.name, fused.update) is not fused.update:
        problems.append(f"its formula is called {fused.name!r}, as another one that has a kernel: give it another name")
    return problems or [*_formula_problems(cls, fused), *_start_problems(cls, rule)]


def _signature_problems(cls: type[ShardedOptimizer], rule: Rule) -> list[str]:
    """Where a constructor and the checks of its settings differ."""
    accepted = inspect.signature(cls).parameters
    common = (*COMMON, *(EXCHANGE if isinstance(rule, WholeMatrix) else ()))
    judged = (*_JUDGED, *common, *(PRODUCTS if isinstance(rule, WholeMatrix) else ()))
    needed = ("params", "lr", "betas", "weight_decay", *common)
    missing = [key for key in needed if key not in accepted]
    problems = [f"its constructor takes no {key!r}, which every rule of its kind has" for key in missing]
    for key, parameter in accepted.items():
        if key not in judged and key not in rule.checks:
            problems.append(f"its rule has no check for {key!r}, which its constructor takes")
        if key != "params" and parameter.default is parameter.empty:
            problems.append(f"its constructor has no default for {key!r}, which a JSON may leave out")
    unknown = [key for key in rule.checks if key not in accepted]
    problems += [f"its rule checks {key!r}, which its constructor does not take" for key in unknown]
    for key in rule.structure if isinstance(rule, WholeMatrix) else ():
        if key not in accepted:
            problems.append(f"its rule's structure names {key!r}, which is no setting")
    return problems


def _defaults(cls: type[ShardedOptimizer]) -> dict[str, Any]:
    return {name: one.default for name, one in inspect.signature(cls).parameters.items() if name != "params"}


def _formula_problems(cls: type[ShardedOptimizer], rule: Elementwise | Blockwise) -> list[str]:
    """Whether the formula takes what it will be given: parameter, gradient, (mean square,) state, constants."""
    given = [None] * (2 + bool(rule.block_state) + len(rule.element_state) + len(rule.block_state))
    try:
        inspect.signature(rule.update).bind(*given, **rule.scalars(_defaults(cls), 1))
    except (TypeError, KeyError) as error:
        return [f"its formula does not take {len(given)} tensors and the constants of `scalars`: {error}"]
    return []


def _start_problems(cls: type[ShardedOptimizer], rule: Elementwise | Blockwise | WholeMatrix) -> list[str]:
    """Whether a run of AdamW would start all of the state, and whether the other rule's is told apart from blocks'."""
    defaults = {**_defaults(cls), "state_dtype": torch.float32}
    shape: tuple[int, ...] = (2, 2)
    wanted, problems = set[str](), []
    if isinstance(rule, WholeMatrix):
        shape = rule.tiles(defaults, Role("linear"), shape)[0].shape
        wanted = set(rule.state_of_block(defaults, shape))
        problems = [
            f"{key!r} is kept for blocks and by the rule of what is no matrix: give the blocks' another name"
            for key in sorted(wanted & set(rule.others.element_state))
        ]
    else:
        wanted = {*rule.element_state, *rule.block_state}
    if not rule.from_adam.problem(defaults):
        moments = AdamMoments(torch.ones(shape, device="cpu"), torch.ones(shape, device="cpu"), (0.9, 0.999), 1)
        found = set(rule.from_adam.state(moments, defaults))
        if found != wanted:
            problems.append(f"its `from_adam` gives {sorted(found)}, its state is {sorted(wanted)}")
    return problems


for _cls in _BUILT_IN:
    register(_cls)
