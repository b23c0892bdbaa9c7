"""What is known of DeepSpeed stands in one place each, and is what the installed one is."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from ds_optim.deepspeed import names, wrappers
from ds_optim.memory.errors import MemoryAccountError
from ds_optim.memory.labels import wrapper_of
from ds_optim.memory.record import Category
from ds_optim.optimizers import registry
from ds_optim.optimizers.registry import optimizers
from ds_optim.releases import DEEPSPEED


def test_every_wrapper_in_the_table_is_a_class_of_deepspeeds() -> None:
    from deepspeed.runtime import bf16_optimizer
    from deepspeed.runtime.fp16 import fused_optimizer, unfused_optimizer
    from deepspeed.runtime.zero import stage3, stage_1_and_2

    modules = (stage_1_and_2, stage3, bf16_optimizer, unfused_optimizer, fused_optimizer)
    for module, name in zip(modules, wrappers.WRAPPERS, strict=True):
        assert isinstance(getattr(module, name), type)


def test_tensors_are_kept_for_what_memory_accounts_know() -> None:
    for wrapper in wrappers.WRAPPERS.values():
        for purpose in (*wrapper.tensors.values(), *wrapper.at_times.values()):
            assert purpose in {category.value for category in Category}
        assert not set(wrapper.tensors) & set(wrapper.at_times)
        assert list(wrapper.tensors.values()).count("fp32 master") == 1


def test_the_stage_and_the_offload_of_a_wrapper_are_told() -> None:
    made = of_class("DeepSpeedZeroOptimizer", ("partition_gradients", "cpu_offload"))
    assert (wrappers.stage_of(made), wrappers.is_offloaded(made)) == (1, False)
    made.partition_gradients = made.cpu_offload = True
    assert (wrappers.stage_of(made), wrappers.is_offloaded(made)) == (2, True)
    assert not wrappers.is_offloaded(of_class("BF16_Optimizer", ()))
    assert not wrappers.is_offloaded(None)


def test_deepspeeds_own_names_stay_deepspeeds() -> None:
    assert set(names.names()) == {f"ds_optim.{name}" for name in optimizers()} | {"Adan", "AdamMini", "Shampoo", "SWAN"}


def test_an_optimizer_that_is_registered_later_is_known_to_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

    import ds_optim.deepspeed.plugin  # noqa: F401

    class LaterLion(optimizers()["Lion"]):  # type: ignore[misc]
        """A Lion from elsewhere."""

    class Muon(LaterLion):
        """One more, by a name that DeepSpeed keeps."""

    later = [LaterLion, Muon]
    monkeypatch.setattr(registry, "_registered", optimizers())
    monkeypatch.setattr("deepspeed.runtime.zero.utils.ZERO_SUPPORTED_OPTIMIZERS", list(ZERO_SUPPORTED_OPTIMIZERS))
    try:
        for _ in range(2):
            for one in later:
                registry.register(one)
            assert torch.optim.LaterLion is LaterLion  # type: ignore[attr-defined]
            assert getattr(torch.optim, f"{__name__}.Muon") is Muon
            assert getattr(torch.optim, "Muon", None) is not Muon  # DeepSpeed's own, and torch's
            from deepspeed.runtime.zero import utils

            assert utils.ZERO_SUPPORTED_OPTIMIZERS.count(LaterLion) == 1
    finally:
        for name in ("LaterLion", f"{__name__}.LaterLion", f"{__name__}.Muon"):
            delattr(torch.optim, name)


def of_class(name: str, attributes: tuple[str, ...]) -> Any:
    return type(name, (), dict.fromkeys(attributes))()


def test_one_message_says_what_another_deepspeed_lacks_and_which_is_known() -> None:
    kind = wrappers.BF16
    assert kind.training is not None
    basic = object()
    engine = of_class(
        "DeepSpeedEngine", (*wrappers.ENGINE_ATTRIBUTES["training"], *wrappers.ENGINE_ATTRIBUTES["checkpoint"])
    )
    engine.basic_optimizer = basic
    for use, expected in (("training", kind.training), ("checkpoint", kind.checkpoint)):
        engine.optimizer = of_class(kind.name, expected)
        assert not wrappers.engine_problem(engine, use)
        engine.optimizer = of_class(kind.name, expected[1:])
        problem = wrappers.engine_problem(engine, use)
        assert f": BF16_Optimizer has no {expected[0]}; {DEEPSPEED.known}" in problem
    del type(engine).global_steps
    assert "DeepSpeedEngine has no global_steps, BF16_Optimizer has no" in wrappers.engine_problem(engine, "checkpoint")
    engine.optimizer = of_class("FP16_Optimizer", ("fp16_groups_flat", "fp32_groups_flat"))
    assert "FP16_Optimizer is a DeepSpeed optimizer wrapper that is not known here" in wrappers.engine_problem(
        engine, "training"
    )
    engine.optimizer = basic
    assert "global_steps" in wrappers.engine_problem(engine, "training")
    with pytest.raises(MemoryAccountError, match=r"FP16_Optimizer has no fp32_groups_flat; deepspeed versions known"):
        wrapper_of(of_class("FP16_Optimizer", ("fp16_groups_flat",)))


def test_what_need_not_import_deepspeed_does_not() -> None:
    code = """
import sys
from importlib import import_module
for name in "wrappers differences facts predict engine_state checkpoint_files reader gradient_window".split():
    import_module(f"ds_optim.deepspeed.{name}")
import ds_optim.memory.accountant, ds_optim.memory.estimate, ds_optim.checkpoint.convert, ds_optim.batch_size.estimator
print([name for name in sys.modules if name.split(".")[0] == "deepspeed"])
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert ran.stdout.strip() == "[]"
