"""What ``engine.save_checkpoint`` writes under ``"ds_optim": {"checkpoint": ...}``, and that the engine loads it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_optim import AdamMini
from ds_optim.checkpoint.directory import read_about
from ds_optim.deepspeed.configuration import DsOptimObject, option_problems
from engines import Case, assembled, engine_for, masters, train, weights
from pool import Pools
from resumption import by_the_engine, engine_of_other_weights

SCHEDULE = {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 20, "warmup_max_lr": 0.01}}}


def asking(form: str, **more: Any) -> dict[str, Any]:
    return {"ds_optim": {"checkpoint": form}, **SCHEDULE, **more}


MINI = Case("AdamMini", stage=2, extra=asking("canonical"))
CLIENT = Case("ds_optim.Lion", stage=3, client=True, extra=asking("canonical"))


def saved(case: Case, folder: str, **how: Any) -> dict[str, Any]:
    with engine_for(case) as (engine, _, clock):
        train(engine, case, clock, range(1, 4))
        engine.save_checkpoint(folder, client_state={"epoch": 7}, **how)
        return {"masters": masters(engine)}


def gone_on(case: Case, folder: str) -> dict[str, Any]:
    with engine_of_other_weights(case) as (engine, _, _):
        client_state = by_the_engine(folder, engine)
        schedule = engine.lr_scheduler.state_dict()
        return {"masters": masters(engine), "told": (client_state["epoch"], engine.global_steps, schedule)}


@pytest.mark.parametrize(("ranks", "case", "others", "other"), [
    (2, MINI, 3, replace(MINI, stage=3, precision="bf16")),
    (2, CLIENT, 1, replace(CLIENT, stage=0)),
], ids=["named in the JSON", "made by hand"])  # fmt: skip
def test_the_canonical_form_instead(
    pool: Pools, ranks: int, case: Case, others: int, other: Case, tmp_path: Path
) -> None:
    before = assembled(pool(ranks).run(saved, case, str(tmp_path)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["global_step3", "latest"]
    assert read_about(tmp_path / "global_step3")["optimizer"] == case.optimizer.split(".")[-1]
    reports = pool(others).run(gone_on, other, str(tmp_path))
    after = assembled(reports)
    assert all(torch.equal(values, after[name]) for name, values in before.items())
    assert {report["told"][:2] for report in reports} == {(7, 3)}
    assert all(report["told"][2]["last_batch_iteration"] == 2 for report in reports)


def test_both_forms(pool: Pools, tmp_path: Path) -> None:
    case = replace(MINI, extra=asking("both"))
    before = assembled(pool(2).run(saved, case, str(tmp_path)))
    assert list(tmp_path.glob("global_step3/*optim_states.pt"))
    assert read_about(tmp_path / "canonical" / "global_step3")["optimizer"] == "AdamMini"
    for folder in (tmp_path, tmp_path / "canonical"):
        after = assembled(pool(1).run(gone_on, case, str(folder)))
        assert all(torch.equal(values, after[name]) for name, values in before.items())


def weights_alone(case: Case, folder: str, **how: Any) -> tuple[bool, bool, int, int]:
    """Whether the weights came, whether state did, the engine's steps, and the schedule's."""
    with engine_of_other_weights(case) as (engine, model, _):
        before = weights(model)
        engine.load_checkpoint(folder, **how)
        moved = any(not torch.equal(value, before[name]) for name, value in weights(model).items())
        counted = engine.lr_scheduler.state_dict()["last_batch_iteration"]
        return moved, any(engine.basic_optimizer.state.values()), engine.global_steps, counted


def alone(case: Case, folder: str) -> list[tuple[bool, bool, int, int]]:
    hows: list[dict[str, Any]] = [
        {"load_module_only": True},
        {"load_optimizer_states": False},
        {"load_lr_scheduler_states": False},
    ]
    return [weights_alone(case, folder, **how) for how in hows]


def test_of_the_canonical_form_as_little_as_is_asked_for(pool: Pools, tmp_path: Path) -> None:
    case = replace(MINI, stage=3)
    pool(2).run(saved, case, str(tmp_path))
    [found] = pool(1).run(alone, case, str(tmp_path))
    assert found == [(True, False, 0, -1), (True, False, 3, 2), (True, True, 3, -1)]


def saved_as_an_adapter_is(case: Case, folder: str) -> None:
    saved(case, folder, tag="mine", exclude_frozen_parameters=True, save_latest=False)


def loaded_over_its_base(case: Case, folder: str) -> tuple[bool, bool]:
    """Whether what is frozen stayed as it was, and whether what is trained came."""
    with engine_of_other_weights(case) as (engine, model, _):
        before = weights(model)
        engine.load_checkpoint(folder, tag="mine", load_module_strict=False)
        after = weights(model)
        same = {name: torch.equal(value, after[name]) for name, value in before.items()}
        frozen = {name for name, one in model.named_parameters() if not one.requires_grad}
        return all(same[name] for name in frozen), any(not same[name] for name in same.keys() - frozen)


@pytest.mark.parametrize("form", ["canonical", "deepspeed"])
def test_frozen_weights_are_left_out_and_left_alone(pool: Pools, form: str, tmp_path: Path) -> None:
    """As a Trainer saves and loads adapters, on other ranks."""
    case = replace(MINI, frozen=("self_attn", "embed", "lm_head"), extra=asking(form))
    pool(2).run(saved_as_an_adapter_is, case, str(tmp_path))
    assert not (tmp_path / "latest").exists()
    if form == "canonical":
        assert not any("self_attn" in name for name in read_about(tmp_path / "mine")["module"])
    assert pool(3).run(loaded_over_its_base, case, str(tmp_path)) == [(True, True)] * 3


def test_another_form_is_refused() -> None:
    config = {"optimizer": {"type": "AdamMini", "params": {}}, "ds_optim": {"checkpoint": "universal"}}
    [said] = option_problems(AdamMini, config)
    assert said == "\"ds_optim\": \"checkpoint\" is 'universal'; it is one of 'deepspeed', 'canonical', 'both'"
    assert DsOptimObject.of({}).checkpoint == "deepspeed"
