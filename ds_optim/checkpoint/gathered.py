"""`full_state`: what an optimizer keeps for one parameter, gathered from all ranks, for a look at it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ds_optim.checkpoint import content
from ds_optim.errors import raise_everywhere
from ds_optim.ranks import ranks_of


def full_state(model: Any, name: str, optimizer: Any = None) -> dict[str, Tensor]:
    """The whole state of one parameter, on every rank. All ranks of the engine or model call it, as for `save`.

    For debugging, not for every step.

    Args:
        model: a DeepSpeed engine whose optimizer is one of ours, or a model.
        name: of the parameter, without wrapper prefixes.
        optimizer: of a plain model.

    Returns:
        By key, on the CPU: state per element in the parameter's shape; state of blocks flat, block behind block in the
        order of their index. Empty before the first step.

    Raises:
        CheckpointError: on every rank: no such parameter is trained, or the optimizer is none of ours.
    """
    ranks = ranks_of(model, optimizer)
    subject, problems = content.subject_of(model, optimizer, ranks)
    found = [] if subject is None else [entry for entry in subject.listed() if entry[1].name == name]
    if subject is not None and not found:
        problems = [f"no parameter called {name!r} is trained here"]
    raise_everywhere(ranks, problems, "there is no state to gather")
    assert subject is not None
    assert subject.optimizer is not None
    tensor, one = found[0]
    state = subject.optimizer.state.get(tensor) or {}
    mine = {key: content.held_parts(of.written, state.get(key)) for key, of in one.state.items()} if state else {}
    on_host = {key: [(start, part.cpu()) for start, part in parts] for key, parts in mine.items()}
    everyones = ranks.everyones(on_host).values()
    gathered = {}
    for key, logical in one.state.items():
        parts = [part for of_rank in everyones for part in of_rank.get(key, [])]
        if not parts:
            continue
        whole = torch.zeros(logical.numel, dtype=logical.dtype)
        for start, values in parts:
            whole[start : start + len(values)] = values
        per_element = key in subject.optimizer.rule.element_state
        gathered[key] = whole.view(one.shape) if per_element else whole
    return gathered
