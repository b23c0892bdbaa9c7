"""`full_state`: what an optimizer keeps for one parameter, gathered from all ranks, for a look at it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ds_optim.checkpoint import content
from ds_optim.errors import raise_everywhere
from ds_optim.kernels.codes import decode_rows
from ds_optim.ranks import ranks_of
from ds_optim.rule import WholeMatrix
from ds_optim.stepping.eight_bits import coded_keys
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
    found = [] if training is None else [entry for entry in training.listed() if entry[1].name == name]
    if training is not None and not found:
        problems = [f"no parameter called {name!r} is trained here"]
    raise_everywhere(ranks, problems, "there is no state to gather")
    assert training is not None
    assert training.optimizer is not None
    tensor, one = found[0]
    state = training.optimizer.state.get(tensor)
    if not any(ranks.everyones(bool(state)).values()):
        return {}
    moves, gathered = StateMoves(), dict[str, Tensor]()
    for key, logical in one.state.items():
        if logical.numel:
            gathered[key] = torch.zeros(logical.numel, dtype=logical.dtype, device="cpu")
            have = content.held_parts(logical.written, state.get(key)) if state else []
            moves.add([(start, part.to("cpu", logical.dtype)) for start, part in have], [(0, gathered[key])])
    moves.run(ranks.group, torch.device("cpu"))
    rule = training.optimizer.rule
    fused = rule.others if isinstance(rule, WholeMatrix) else rule
    for key, code in zip(fused.element_state, fused.codes, strict=True):
        names = coded_keys(key)
        if names.codes in gathered:
            codes, scales = gathered.pop(names.codes), gathered.pop(names.scales)
            gathered[key] = decode_rows(codes[None], scales[None], code)[0]
    per_element = training.optimizer.stepper.element_state
    return {key: values.view(one.shape) if key in per_element else values for key, values in gathered.items()}
