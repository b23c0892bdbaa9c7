"""Checkpoints that an earlier version wrote load, and go on where that version would have gone.

What lies in ``tests/written/VERSION`` was written once, by that version on another machine, and is never written again;
``0.1.0-deepspeed-0.18.6`` by today's, with torch 2.8.0 and deepspeed 0.18.6.
A later format gets a folder of its own beside it:

    python tests/test_written_checkpoints.py tests/written/VERSION
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ds_optim
from ds_optim import checkpoint
from ds_optim.deepspeed.checkpoint_files import DeepSpeedFiles
from engines import WIDER, Case, assembled, build_model, engine_for, learning_rate, masters, train
from expected import by_one_process, distance, gradient
from pool import Pools

WRITTEN = Path(__file__).with_name("written")
VERSIONS = sorted(path.name for path in WRITTEN.glob("*")) if WRITTEN.is_dir() else []
SAVED_AT, STEPS = 5, 8
SMALL_BLOCKS = {"max_preconditioner_dim": 8, "precondition_frequency": 4, "exchange_bucket_size": 300}
CASES = {
    case.optimizer.removeprefix("ds_optim."): case
    for case in (
        Case("ds_optim.AdamW", {"weight_decay": 0.1}, sizes=WIDER, steps=STEPS),
        Case("ds_optim.Lion", {"weight_decay": 0.1}, sizes=WIDER, steps=STEPS),
        Case("Adan", {"weight_decay": 0.02}, sizes=WIDER, steps=STEPS),
        Case("AdamMini", {"weight_decay": 0.1}, sizes=WIDER, steps=STEPS),
        Case("Shampoo", {"weight_decay": 0.05, **SMALL_BLOCKS}, sizes=WIDER, steps=STEPS),
        Case("SWAN", {"weight_decay": 0.05}, sizes=WIDER, steps=STEPS),
    )
}
FORMS = {
    "canonical": list(CASES),  # written by two ranks at ZeRO-3, read by three at ZeRO-1
    "deepspeed": ["AdamW", "Adan", "AdamMini", "Shampoo"],  # two ranks at ZeRO-2
    "torch": ["AdamW", "AdamMini", "Shampoo", "SWAN"],  # state dicts of one process
}


def write(form: str, case: Case, folder: str) -> None:
    with engine_for(replace(case, stage=3 if form == "canonical" else 2)) as (engine, _, clock):
        train(engine, case, clock, range(1, SAVED_AT + 1))
        if form == "canonical":
            checkpoint.save(folder, engine, tag="written")
        else:
            engine.save_checkpoint(folder, tag="written")


def go_on(form: str, case: Case, folder: str) -> dict[str, Any]:
    with engine_for(replace(case, stage=1 if form == "canonical" else 2)) as (engine, _, clock):
        if form == "canonical":
            checkpoint.load(folder, engine)
        else:
            engine.load_checkpoint(folder)
        train(engine, case, clock, range(SAVED_AT + 1, STEPS + 1))
        return {"masters": masters(engine)}


class Alone:
    """The case's model and optimizer in plain torch, the decay of all parameters the same."""

    def __init__(self, case: Case) -> None:
        self.case, self.model = case, build_model(case)
        cls = getattr(ds_optim, case.optimizer.removeprefix("ds_optim."))
        self.optimizer = cls(self.model.parameters(), roles=self.model, **case.options)

    def train(self, steps: range) -> None:
        for step in steps:
            self.optimizer.param_groups[0]["lr"] = learning_rate(step)
            for name, parameter in self.model.named_parameters():
                parameter.grad = gradient(self.case, name, tuple(parameter.shape), step)
            self.optimizer.step()

    def weights(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone().reshape(-1) for name, parameter in self.model.named_parameters()}


def agree(version: str, form: str, name: str, found: dict[str, Tensor]) -> bool:
    """Whether this is where that version ended, on its machine: to the bit where no sum or product is made, which
    processors may make in another order."""
    wanted = torch.load(WRITTEN / version / "ends" / f"{name}.pt")["alone" if form == "torch" else "engine"]
    if name in ("AdamW", "Lion", "Adan"):
        return all(torch.equal(found[one], wanted[one]) for one in wanted)
    return distance(found, wanted) <= (3e-6 if name == "SWAN" else 1e-6)


def test_there_is_something_to_read() -> None:
    assert "0.1.0" in VERSIONS


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("form", "name"), [(form, name) for form in ("canonical", "deepspeed") for name in FORMS[form]]
)
def test_an_engine_goes_on_from_what_an_earlier_version_wrote(pool: Pools, version: str, form: str, name: str) -> None:
    case = CASES[name]
    reports = pool(3 if form == "canonical" else 2).run(go_on, form, case, str(WRITTEN / version / form / name))
    assert agree(version, form, name, assembled(reports))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", FORMS["torch"])
def test_an_optimizer_goes_on_from_a_state_dict_of_an_earlier_version(version: str, name: str) -> None:
    resumed = Alone(CASES[name])
    saved = torch.load(WRITTEN / version / "torch" / f"{name}.pt")
    resumed.model.load_state_dict(saved["model"])
    resumed.optimizer.load_state_dict(saved["optimizer"])
    resumed.train(range(SAVED_AT + 1, STEPS + 1))
    assert agree(version, "torch", name, resumed.weights())


def write_all(root: Path) -> None:
    with Pools() as pool:
        for form in ("canonical", "deepspeed"):
            for name in FORMS[form]:
                pool(2).run(write, form, CASES[name], str(root / form / name))
    for script in root.rglob("*.py"):  # DeepSpeed puts one of its own beside each
        script.unlink()
    for folder in ("torch", "ends"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for name, case in CASES.items():
        alone = Alone(case)
        alone.train(range(1, SAVED_AT + 1))
        states = {"model": alone.model.state_dict(), "optimizer": alone.optimizer.state_dict()}
        if name in FORMS["torch"]:
            torch.save(states, root / "torch" / f"{name}.pt")
        alone.train(range(SAVED_AT + 1, STEPS + 1))
        torch.save({"engine": by_one_process(case), "alone": alone.weights()}, root / "ends" / f"{name}.pt")


@pytest.mark.parametrize("version", VERSIONS)
def test_deepspeeds_own_entries_are_not_taken_for_the_users(version: str) -> None:
    for optimizer in FORMS["deepspeed"]:
        files = DeepSpeedFiles(WRITTEN / version / "deepspeed" / optimizer, None)
        assert files.client_state == {}


if __name__ == "__main__":
    write_all(Path(sys.argv[1]).absolute())
