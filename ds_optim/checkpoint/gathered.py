"""`full_state`: what an optimizer keeps for one parameter, gathered from all ranks, for a look at it."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ds_optim.checkpoint import content
from ds_optim.errors import raise_everywhere
from ds_optim.ranks import ranks_of
from ds_optim.sharding.exchange import from_all_ranks
from ds_optim.stepping.logical_tensors import LogicalParameter
from ds_optim.stepping.state_moves import StateMoves


def full_state(model: Any, name: str, optimizer: Any = None) -> dict[str, Tensor]:
    """The whole state of one parameter, on every rank. All ranks of the engine or model call it, as for `save`.

    For debugging, not for every step.

    Args:
        model: a DeepSpeed engine whose optimizer is one of ours, or a model.
        name: of the parameter, without wrapper prefixes.
        optimizer: of a plain model.

    Returns:
        By key, on the CPU: state per element in the parameter's shape, fp32 where it is kept in eight bits; state of
        blocks flat, block behind block in the order of their index. Empty before the first step.

    Raises:
        CheckpointError: on every rank: no such parameter is trained, or the optimizer is none of ours.
    """
    ranks = ranks_of(model, optimizer)
    training, problems = content.training_state_of(model, optimizer, ranks)
    raise_everywhere(ranks, problems, "there is no state to gather")
    assert training is not None
    content.ask_others(training)
    found = [
        (tensor, index, one)
        for tensor, its in training.parameters.items()
        for index, one in enumerate(its)
        if one.name == name
    ]
    missing = [] if found or name in training.elsewhere else [f"no parameter called {name!r} is trained here"]
    raise_everywhere(ranks, missing, "there is no state to gather")
    values = _gathered(training, *found[0]) if found else {}
    if training.elsewhere:  # one rank has it for all
        is_first = bool(found) and name not in training.of_others and _is_first(training, found[0][0])
        values = next((its for its in ranks.everyones(values if is_first else {}).values() if its), {})
    return values


def _is_first(training: content.TrainingState, tensor: Tensor) -> bool:
    """Whether this rank is the first of those that step a local tensor."""
    assert training.optimizer is not None
    group = training.optimizer.shards.of(tensor).owner_group
    return group is None or dist.get_rank(group) == 0


def _gathered(training: content.TrainingState, tensor: Tensor, index: int, one: LogicalParameter) -> dict[str, Tensor]:
    """The state of a parameter on all ranks that step a local tensor."""
    assert training.optimizer is not None
    group = training.optimizer.shards.of(tensor).owner_group if training.elsewhere else training.ranks.group
    state = training.optimizer.state.get(tensor)
    if not any(from_all_ranks(bool(state), group)):
        return {}
    moves, gathered = StateMoves(), dict[str, Tensor]()
    for key, logical in one.state.items():
        if logical.numel:
            gathered[key] = torch.zeros(logical.numel, dtype=logical.dtype, device="cpu")
            have = content.held_parts(logical.written, state.get(key)) if state else []
            moves.add([(start, part.to("cpu", logical.dtype)) for start, part in have], [(0, gathered[key])])
    moves.run(group, torch.device("cpu"))
    stepper = training.optimizer.stepper
    values = stepper.kept.values_of(tensor, index, gathered)
    return {key: its.view(one.shape) if key in stepper.element_state else its for key, its in values.items()}
