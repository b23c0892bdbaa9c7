"""A run that is saved in canonical form and one that takes it over: jobs for the pool, and what to compare of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ds_optim import checkpoint
from ds_optim.checkpoint import ranges
from engines import Case, assembled, build_engine, engine_for, install_gradients, masters, train, weights

K, STEPS = 4, 8  # saved after K steps; four more on either side: blocks are refreshed twice
CLIENT_STATE = {"epoch": 3}


@contextmanager
def engine_of_other_weights(case: Case) -> Iterator[tuple[Any, nn.Module, dict[str, int]]]:
    """An engine with the case's gradients but other initial weights: what is right afterwards was loaded."""
    clock = {"step": 0}
    engine, model = build_engine(replace(case, seed=case.seed + 1))
    install_gradients(model, case, clock)
    try:
        yield engine, model, clock
    finally:
        engine.destroy()


def uninterrupted(case: Case, folder: str, deepspeeds: str = "", steps: int = STEPS) -> dict[str, Any]:
    """Save after K steps, in DeepSpeed's own form too if it has a folder; go on to the end."""
    with engine_for(case) as (engine, _, clock):
        train(engine, case, clock, range(1, K + 1))
        checkpoint.save(folder, engine, client_state=CLIENT_STATE)
        if deepspeeds:
            engine.save_checkpoint(deepspeeds, client_state=CLIENT_STATE)
        train(engine, case, clock, range(K + 1, steps + 1))
        return {"masters": masters(engine)}


def resumed(
    case: Case, folder: str, again: str, load: Callable[[str, Any], Any] = checkpoint.load, steps: int = STEPS
) -> dict[str, Any]:
    """Load into a fresh engine, save again, go on to the end."""
    with engine_of_other_weights(case) as (engine, model, clock):
        client_state = load(folder, engine)
        loaded = {"masters": masters(engine), "weights": weights(model)}
        checkpoint.save(again, engine, client_state=client_state)
        counted = engine.global_steps
        train(engine, case, clock, range(K + 1, steps + 1))
        return {"loaded": loaded, "masters": masters(engine), "client_state": client_state, "steps": counted}


def by_the_engine(folder: str, engine: Any) -> Any:
    """As DeepSpeed's users and every framework load; the client state, to which DeepSpeed's own loader adds much."""
    path, client_state = engine.load_checkpoint(folder)
    assert path is not None
    return {key: client_state.get(key) for key in CLIENT_STATE}


def wrongly_loaded(reports: list[dict[str, Any]], tensors: dict[str, Tensor]) -> list[str]:
    """What does not hold what a checkpoint has: masters of ``resumed``, weights of the model, counters."""
    found = []
    loaded = assembled([report["loaded"] for report in reports])
    for rank, report in enumerate(reports):
        if (report["client_state"], report["steps"]) != (CLIENT_STATE, K):
            found.append(f"rank {rank}: client_state {report['client_state']}, {report['steps']} steps")
        for name, weight in report["loaded"]["weights"].items():  # the model computes with what was loaded
            saved = tensors[f"{'weights' if name in loaded else 'module'}.{name}"]
            if not torch.equal(saved.to(weight.dtype), weight.reshape(-1)):
                found.append(f"rank {rank}: the model's {name}")
    return found + [name for name, master in loaded.items() if not torch.equal(master, tensors[f"weights.{name}"])]


def stored(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, whole."""
    whole = {name: torch.zeros(numel, dtype=dtype) for name, (numel, dtype) in ranges.lengths(folder).items()}
    ranges.read(folder, {name: ranges.Ranges(len(t), t.dtype, [(0, t)]) for name, t in whole.items()})
    return whole


def same_bits(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    """Whether both have the same names, dtypes and bytes."""
    return one.keys() == two.keys() and all(
        value.dtype == two[name].dtype and torch.equal(_bits(value), _bits(two[name])) for name, value in one.items()
    )


def _bits(values: Tensor) -> Tensor:
    return values.reshape(-1).view(torch.uint8)


def relative_difference(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest difference in any parameter, relative to the largest element of that parameter."""
    assert found.keys() == wanted.keys(), found.keys() ^ wanted.keys()
    gaps = []
    for name, values in wanted.items():
        scale = values.double().abs().max().clamp_min(torch.finfo(torch.float32).tiny)
        gaps.append(((found[name].double() - values.double()).abs().max() / scale).item())
    return max(gaps)
