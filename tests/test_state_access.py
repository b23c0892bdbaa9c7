"""Looking at state inside an engine: DeepSpeed's accessors, our gathered one, and moving state off the device."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from deepspeed.utils import (
    safe_get_full_optimizer_state,
    safe_get_local_optimizer_state,
    safe_set_full_optimizer_state,
)
from torch import Tensor

import ds_optim
from ds_optim import checkpoint
from ds_optim.roles import canonical_name
from engines import WIDTH, Case, assembled, engine_for, masters, train
from pool import Pools

SMALL = {"sub_group_size": 300}
SHAMPOO = {"max_preconditioner_dim": 8, "precondition_frequency": 2}
Q_PROJ = "llama.model.layers.0.self_attn.q_proj.weight"
SHOWN = (Q_PROJ, "llama.model.embed_tokens.weight", "llama.model.norm.weight", "extra.bias", "gain")  # both groups
KEYS = {"ds_optim.AdamW": ["exp_avg", "exp_avg_sq"], "Adan": ["exp_avg", "exp_avg_diff"], "AdamMini": ["exp_avg"]}


def compared(case: Case, folder: str) -> list[str]:
    """Parameters whose state DeepSpeed's accessor and ours see differently; before and after a reload, and a write."""
    wrong = []

    def compare(engine: Any, keys: list[str]) -> None:
        for name, parameter in engine.module.named_parameters():
            if canonical_name(name) in SHOWN:
                ours = checkpoint.full_state(engine, canonical_name(name))
                wrong.extend(
                    f"{name} {key}"
                    for key in keys
                    if not torch.equal(safe_get_full_optimizer_state(parameter, key), ours[key].float())
                    or not ours[key].any()
                )

    with engine_for(case) as (engine, model, clock):
        keys = KEYS[case.optimizer]
        train(engine, case, clock, range(1, 3))
        compare(engine, keys)
        engine.save_checkpoint(folder)
        train(engine, case, clock, range(3, 5))
        compare(engine, keys)
        engine.load_checkpoint(folder)
        compare(engine, keys)
        value = torch.full((18, WIDTH), 0.5)
        safe_set_full_optimizer_state(model.llama.model.layers[0].self_attn.q_proj.weight, value, keys[0])
        compare(engine, keys)
        if not torch.equal(checkpoint.full_state(engine, Q_PROJ)[keys[0]].float(), value):
            wrong.append("what was set is not there")
    return wrong


@pytest.mark.parametrize(
    ("ranks", "case"),
    [
        (2, Case("ds_optim.AdamW", stage=1)),
        (3, Case("Adan", stage=2, precision="bf16")),
        (3, Case("AdamMini", stage=2)),
        (2, Case("AdamMini", stage=3, precision="bf16", zero=SMALL)),
        (3, Case("ds_optim.AdamW", stage=3)),
    ],
    ids=str,
)
def test_per_element_state_is_what_deepspeeds_accessor_says(pool: Pools, ranks: int, case: Case, tmp_path: Any) -> None:
    assert pool(ranks).run(compared, case, str(tmp_path)) == [[]] * ranks


def refusals(case: Case, keys: list[str]) -> list[str]:
    """What each rank is told when it asks for state that is not one value per element."""
    said = []
    with engine_for(case) as (engine, model, clock):
        train(engine, case, clock, range(1, 3))
        asked: list[Callable[[Tensor, str], Any]] = [safe_get_full_optimizer_state]
        if case.stage == 3:
            asked.append(safe_get_local_optimizer_state)
        weight = model.llama.model.layers[0].self_attn.q_proj.weight
        for key in keys:
            for ask in asked:
                try:
                    said.append(str(ask(weight, key)))
                except ValueError as error:
                    said.append(str(error))
    return said


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize(
    ("optimizer", "options", "keys"),
    [
        ("AdamMini", {}, ["exp_avg_sq"]),
        ("Shampoo", SHAMPOO, ["momentum", "exp_avg"]),
        ("SWAN", {}, ["exp_avg"]),
    ],
)
def test_block_state_is_refused_on_every_rank_with_a_pointer(
    pool: Pools, optimizer: str, options: dict[str, Any], keys: list[str], stage: int
) -> None:
    said = pool(3).run(refusals, Case(optimizer, options, stage=stage), keys)
    assert all(len(of_rank) == len(keys) * (stage - 1) for of_rank in said)
    for message in (one for of_rank in said for one in of_rank):
        assert re.search(r"full_state\(engine, parameter_name\)", message), message


def whole_states(case: Case) -> dict[str, Tensor]:
    with engine_for(case) as (engine, _, clock):
        train(engine, case, clock, range(1, 4))
        with contextlib.suppress(checkpoint.CheckpointError):
            checkpoint.full_state(engine, "no such parameter")
            return {}
        return checkpoint.full_state(engine, Q_PROJ)


@pytest.mark.parametrize("optimizer", ["AdamMini", "Shampoo"])
def test_gathered_state_does_not_depend_on_the_ranks(pool: Pools, optimizer: str) -> None:
    options = SHAMPOO if optimizer == "Shampoo" else {}
    alone = pool(1).run(whole_states, Case(optimizer, options, stage=0))[0]
    assert set(alone) > ({"momentum"} if optimizer == "Shampoo" else {"exp_avg"})
    for ranks, stage in ((2, 0), (3, 2), (4, 3)):
        for found in pool(ranks).run(whole_states, Case(optimizer, options, stage=stage)):
            assert found.keys() == alone.keys()
            for key, values in found.items():
                assert torch.allclose(values.double(), alone[key].double(), rtol=1e-6, atol=0), key


def test_state_without_an_engine() -> None:
    model = torch.nn.Linear(6, 4)
    optimizer = ds_optim.AdamMini(model.named_parameters(), roles=model)
    assert checkpoint.full_state(model, "weight", optimizer) == {}
    model(torch.ones(2, 6)).sum().backward()
    optimizer.step()
    found = checkpoint.full_state(model, "weight", optimizer)
    assert {key: tuple(values.shape) for key, values in found.items()} == {"exp_avg": (4, 6), "exp_avg_sq": (4,)}


def moved(case: Case) -> tuple[Any, Any, list[str]]:
    """Weights after moving everything off the device and back, those without, and DeepSpeed's refusals."""
    ends, refused = [], []
    for move in (False, True):
        with engine_for(case) as (engine, _, clock):
            for step in range(1, 5):
                train(engine, case, clock, range(step, step + 1))
                if move:
                    try:
                        engine.offload_states(pin_memory=False)
                        engine.reload_states()
                    except AssertionError as error:
                        refused.append(str(error))
            ends.append({"masters": masters(engine)})
    return ends[0], ends[1], refused


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("optimizer", ["ds_optim.Lion", "AdamMini", "Shampoo"])
def test_states_move_off_the_device_and_back_or_are_refused(pool: Pools, optimizer: str, stage: int) -> None:
    options = SHAMPOO if optimizer == "Shampoo" else {}
    reports = pool(2).run(moved, Case(optimizer, options, stage=stage, precision="bf16"))
    stayed, came_back = (assembled([report[which] for report in reports]) for which in (0, 1))
    assert stayed.keys() == came_back.keys()
    assert all(torch.equal(values, came_back[name]) for name, values in stayed.items())
    for _, _, refused in reports:
        assert len(refused) == (4 if stage == 3 else 0)
        assert all("DeepSpeed FusedAdam" in message for message in refused)
