"""Another optimizer trains than the one that was given: one warning says which, why and what helps; else silence."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, patch

import pytest
import torch
from torch import Tensor, nn

import ds_optim
from ds_optim import AdamMini
from ds_optim.stepping.sharded import waiting
from pool import Pools
from test_integrations import fresh_accelerate

OFFLOAD = {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": False}}


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": torch.full((8,), float(index)), "labels": torch.zeros(1)}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 1)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": (self.a(x) - labels).square().mean()}


def config(zero: dict[str, Any], optimizer: str | None = None, **more: Any) -> dict[str, Any]:
    named = {"optimizer": {"type": optimizer, "params": {"lr": 1e-3}}} if optimizer else {}
    if optimizer == "AdamW":
        named["optimizer"]["params"]["torch_adam"] = True  # its own builds an operator
    return {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero, **named, **more}


def ours_said(caught: list[warnings.WarningMessage]) -> list[str]:
    return [str(one.message) for one in caught if "made for these parameters" in str(one.message)]


@contextmanager
def without_building_deepspeeds_adam() -> Iterator[None]:
    """DeepSpeed compiles an operator for its Adam on the CPU, for minutes; here it is made, and need not compute."""
    from deepspeed.ops.op_builder import CPUAdamBuilder

    with patch.object(CPUAdamBuilder, "load", lambda _: MagicMock()):
        yield


# -- transformers and Accelerate ------------------------------------------------------------------------------------


def with_the_trainer(folder: Path, settings: dict[str, Any], how: str) -> tuple[str, list[str]]:
    """A job: what trains, and what was said about it."""
    from transformers import Trainer, TrainingArguments

    with fresh_accelerate(), without_building_deepspeeds_adam():
        arguments = TrainingArguments(
            output_dir=str(folder),
            deepspeed={**settings, "fp16": {"enabled": False}},  # transformers 4 halves inputs unless told
            max_steps=1,
            per_device_train_batch_size=1,
            learning_rate=1e-3,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        model = Model()
        given: dict[str, Any] = {"optimizer_cls_and_kwargs": (AdamMini, {"lr": 1e-3})}
        if how != "class":
            given = {"optimizers": (AdamMini(model.named_parameters(), lr=1e-3), None)}
        kept = given["optimizers"] if how == "kept" else None
        trainer = Trainer(model, arguments, train_dataset=Rows(), **given)
        del given
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.train()
        del kept
        found = type(trainer.deepspeed.basic_optimizer).__name__
        trainer.deepspeed.destroy()
        return found, ours_said(caught)


IN_JSON = 'name it in the DeepSpeed JSON: "optimizer": {"type": "ds_optim.AdamMini", "params": {...}}'
DROPPED = (
    "AdamMini was made for these parameters, but %s trains them: transformers' Trainer drops what it is given as "
    f"optimizers=... under DeepSpeed. Remedy: {IN_JSON}"
)
BY_CLASS = "; or give the Trainer optimizer_cls_and_kwargs=(AdamMini, {...})"
UNFORCED = '"zero_force_ds_cpu_optimizer": false in the JSON'


@pytest.mark.parametrize("how", ["inline", "kept"])
def test_a_trainer_that_drops_our_optimizer_is_noticed_though_nobody_holds_it(
    pool: Pools, tmp_path: Path, how: str
) -> None:
    ((found, said),) = pool(1).run(with_the_trainer, tmp_path, config({"stage": 2}), how)
    assert (found, said) == ("AdamW", [DROPPED % "AdamW of torch" + BY_CLASS])


def test_the_jsons_optimizer_in_a_trainer_prevails_aloud(pool: Pools, tmp_path: Path) -> None:
    ((found, said),) = pool(1).run(with_the_trainer, tmp_path, config({"stage": 1}, "Adan"), "inline")
    assert (found, said) == ("Adan", [DROPPED % "Adan of ds_optim"])


def test_under_offload_the_remedy_for_a_trainer_has_two_parts(pool: Pools, tmp_path: Path) -> None:
    ((found, said),) = pool(1).run(with_the_trainer, tmp_path, config(OFFLOAD), "inline")
    assert found == "DeepSpeedCPUAdam"
    assert said == [DROPPED % "DeepSpeedCPUAdam of deepspeed" + BY_CLASS + f" (and {UNFORCED})"]


@pytest.mark.parametrize("zero", [{"stage": 2}, {**OFFLOAD, "stage": 3}], ids=["zero2", "offload"])
def test_the_remedies_for_a_trainer_help(pool: Pools, tmp_path: Path, zero: dict[str, Any]) -> None:
    by_class = config(zero, **({"zero_force_ds_cpu_optimizer": False} if "offload_optimizer" in zero else {}))
    assert pool(1).run(with_the_trainer, tmp_path, by_class, "class") == [("AdamMini", [])]
    in_json = config(zero, "ds_optim.AdamMini")
    assert pool(1).run(with_the_trainer, tmp_path, in_json, "none") == [("AdamMini", [DROPPED % "another"])]


def with_accelerate(settings: dict[str, Any]) -> tuple[str, list[str]]:
    """A job: what trains, and what was said about it."""
    from accelerate import Accelerator, DeepSpeedPlugin

    with (
        fresh_accelerate(),
        without_building_deepspeeds_adam(),
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=settings))
        model = Model()
        engine, _ = accelerator.prepare(model, AdamMini(model.named_parameters(), lr=1e-3))
        engine(torch.ones(1, 8), torch.zeros(1))
        found = type(engine.basic_optimizer).__name__
        engine.destroy()
        return found, ours_said(caught)


def test_accelerate_that_replaces_our_optimizer_is_noticed(pool: Pools) -> None:
    ((found, said),) = pool(1).run(with_accelerate, config(OFFLOAD))
    assert found == "DeepSpeedCPUAdam"
    assert said == [
        "AdamMini was made for these parameters, but DeepSpeedCPUAdam of deepspeed trains them: Accelerate replaces "
        f"every optimizer under CPU offload. Remedy: {IN_JSON}; or put {UNFORCED}"
    ]
    assert pool(1).run(with_accelerate, config(OFFLOAD, zero_force_ds_cpu_optimizer=False)) == [("AdamMini", [])]
    assert pool(1).run(with_accelerate, config({"stage": 2})) == [("AdamMini", [])]


# -- DeepSpeed alone ------------------------------------------------------------------------------------------------


def said_while(model: nn.Module, settings: dict[str, Any], **given: Any) -> list[str]:
    """What is said of our optimizers while an engine is built for a model."""
    import deepspeed

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        engine, *_ = deepspeed.initialize(model=model, config=settings, **given)
    engine.destroy()
    return ours_said(caught)


def deepspeed_alone() -> dict[str, list[str]]:
    """A job: one engine after another, and what was said of each."""
    theirs, found = config({"stage": 2}, "AdamW", zero_allow_untested_optimizer=True), {}
    no_optimizer = config({"stage": 2}, zero_allow_untested_optimizer=True)

    model = Model()
    forgotten = AdamMini(model.parameters())
    found["not handed over"] = said_while(model, theirs)
    found["once"] = said_while(Model(), theirs) + said_while(model, theirs)

    model = Model()
    parts = [ds_optim.AdamW([model.a.weight]), AdamMini([model.a.bias])]
    found["two parts"] = said_while(model, theirs)

    # Silence: nobody was overlooked.
    model = Model()
    handed = AdamMini(model.named_parameters())
    found["handed over"] = said_while(model, no_optimizer, optimizer=handed)
    found["bound to an earlier engine"] = said_while(model, theirs)
    model = Model()
    candidates = [AdamMini(model.parameters()), ds_optim.Lion(model.parameters())]
    found["one of two"] = said_while(model, no_optimizer, optimizer=candidates[0])
    model = Model()
    compared = AdamMini(model.parameters())
    found["another on purpose"] = said_while(model, no_optimizer, optimizer=torch.optim.AdamW(model.parameters()))
    found["made by a callable"] = said_while(model, no_optimizer, optimizer=lambda p: torch.optim.AdamW(p))
    model = Model()
    used = AdamMini(model.parameters())
    model(torch.ones(1, 8), torch.ones(1))["loss"].backward()
    used.step()
    found["was of use before"] = said_while(model, theirs)
    model = Model()
    gone = AdamMini(model.parameters())
    del gone
    found["was dropped by its owner"] = said_while(model, theirs)
    model, other = Model(), Model()
    elsewhere = AdamMini(other.parameters())
    copied = copy.deepcopy(elsewhere)
    found["of another model"] = said_while(model, theirs)
    frozen = AdamMini(Model().requires_grad_(False).parameters())
    found["of a frozen model"] = said_while(model, theirs)
    model = nn.Sequential(Model(), Model())
    rest = AdamMini(model[1].parameters())
    found["of the rest"] = said_while(model, theirs, model_parameters=list(model[0].parameters()))
    both = AdamMini(model.parameters())
    found["of more than this engine"] = said_while(model, theirs, model_parameters=list(model[0].parameters()))
    del forgotten, parts, handed, candidates, compared, used, elsewhere, copied, frozen, rest, both
    return found


def test_an_engine_that_was_not_handed_our_optimizer_says_so_and_others_are_silent(pool: Pools) -> None:
    first, second = pool(2).run(deepspeed_alone)
    assert first.pop("not handed over") == [
        "AdamMini was made for these parameters, but AdamW of torch trains them: DeepSpeed was not handed it. Remedy: "
        f"deepspeed.initialize(..., optimizer=...); or {IN_JSON}"
    ]
    (two_parts,) = first.pop("two parts")
    assert "AdamMini and AdamW were made" in two_parts
    assert set(first) == set(second) - {"not handed over", "two parts"}
    assert not any(first.values())
    assert not any(second.values())  # the first rank speaks for all


def groups_read_once(kind: str, zero: dict[str, Any]) -> bool:
    """Whether a group that can be read only once is trained."""
    import deepspeed

    model = Model()
    before = model.a.weight.detach().clone()
    groups = [{"params": (parameter for parameter in model.parameters())}]
    engine, *_ = deepspeed.initialize(model=model, config=config(zero, kind), model_parameters=groups)
    engine.backward(engine(torch.ones(1, 8), torch.zeros(1))["loss"])
    engine.step()
    engine.destroy()
    return not torch.equal(model.a.weight, before)


def test_looking_takes_nothing_from_groups_that_are_generators(pool: Pools) -> None:
    for kind in ("AdamW", "AdamMini"):
        assert pool(1).run(groups_read_once, kind, {"stage": 2}) == [True]


def test_nothing_is_kept_alive() -> None:
    model = Model()
    optimizer = AdamMini(model.parameters())
    assert optimizer in waiting
    refs = weakref.ref(optimizer), weakref.ref(model.a.weight)
    del optimizer, model
    gc.collect()
    assert [ref() for ref in refs] == [None, None]
