"""What is known of DeepSpeed stands in one place each, and is what the installed one is."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch

from ds_optim.deepspeed import names, reader, wrappers
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
    bare = {"Adan", "AdamMini", "Shampoo", "SWAN", "NorMuon", "SOAP"}  # not AdamW, Lion and Muon, which it has itself
    assert set(names.names()) == {f"ds_optim.{name}" for name in optimizers()} | bare


def test_an_optimizer_that_is_registered_later_is_known_to_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

    import ds_optim.deepspeed.plugin  # noqa: F401

    class LaterLion(optimizers()["Lion"]):  # type: ignore[misc]
        """A Lion from elsewhere."""

    class Lamb(LaterLion):
        """One more, by a name that DeepSpeed keeps."""

    later = [LaterLion, Lamb]
    monkeypatch.setattr(registry, "_registered", optimizers())
    monkeypatch.setattr("deepspeed.runtime.zero.utils.ZERO_SUPPORTED_OPTIMIZERS", list(ZERO_SUPPORTED_OPTIMIZERS))
    try:
        for _ in range(2):
            for one in later:
                registry.register(one)
            assert torch.optim.LaterLion is LaterLion  # type: ignore[attr-defined]
            assert getattr(torch.optim, f"{__name__}.Lamb") is Lamb
            assert getattr(torch.optim, "Lamb", None) is not Lamb  # DeepSpeed keeps it
            from deepspeed.runtime.zero import utils

            assert utils.ZERO_SUPPORTED_OPTIMIZERS.count(LaterLion) == 1
    finally:
        for name in ("LaterLion", f"{__name__}.LaterLion", f"{__name__}.Lamb"):
            delattr(torch.optim, name)


def of_class(name: str, attributes: tuple[str, ...]) -> Any:
    return type(name, (), dict.fromkeys(attributes))()


def an_engine() -> Any:
    """With all that is read of one."""
    listed = {name for names in wrappers.ENGINE_ATTRIBUTES.values() for name in names}
    engine = of_class("DeepSpeedEngine", tuple(name for name in listed if "." not in name))
    engine._config = SimpleNamespace(**{name.partition(".")[2]: None for name in listed if "." in name})
    engine.basic_optimizer = object()
    return engine


def test_one_message_says_what_another_deepspeed_lacks_and_which_is_known() -> None:
    kind = wrappers.BF16
    assert kind.training is not None
    engine = an_engine()
    for use, expected in (("training", kind.training), ("checkpoint", kind.checkpoint)):
        engine.optimizer = of_class(kind.name, expected)
        assert not wrappers.engine_problem(engine, use)
        engine.optimizer = of_class(kind.name, expected[1:])
        problem = wrappers.engine_problem(engine, use)
        assert f": BF16_Optimizer has no {expected[0]}; {DEEPSPEED.known}" in problem
        assert problem.endswith(f"; pip install 'deepspeed=={DEEPSPEED.tested[-1]}'")
    engine.optimizer = of_class("FP16_Optimizer", ("fp16_groups_flat", "fp32_groups_flat"))
    assert "FP16_Optimizer is a DeepSpeed optimizer wrapper that is not known here" in wrappers.engine_problem(
        engine, "training"
    )
    del type(engine).global_steps
    for wrapper in (of_class(kind.name, ()), engine.basic_optimizer):
        engine.optimizer = wrapper
        assert ": DeepSpeedEngine has no global_steps; " in wrappers.engine_problem(engine, "checkpoint")
    with pytest.raises(MemoryAccountError, match=r"FP16_Optimizer has no fp32_groups_flat; deepspeed versions known"):
        wrapper_of(of_class("FP16_Optimizer", ("fp16_groups_flat",)))


@pytest.mark.parametrize("use", get_args(wrappers.Use))
def test_an_engine_without_its_optimizers_is_no_error_from_inside(use: wrappers.Use) -> None:
    engine = an_engine()
    del type(engine).optimizer
    assert "DeepSpeedEngine has no optimizer; " in wrappers.engine_problem(engine, use)
    binding = reader.read(of_class("DeepSpeedEngine", ()))
    assert (binding.tensors, binding.ranks.size) == ({}, 1)
    (problem,) = binding.problems
    assert "DeepSpeedEngine has no seq_data_parallel_group, " in problem


def test_every_attribute_that_is_read_of_an_engine_is_named() -> None:
    listed = {name.partition(".")[0] for names in wrappers.ENGINE_ATTRIBUTES.values() for name in names}
    of_config = {name.partition(".")[2] for names in wrappers.ENGINE_ATTRIBUTES.values() for name in names} - {""}
    for file in Path(wrappers.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("engine", "self.engine"):
                assert node.attr in listed, f"{file.name}:{node.lineno}"
            elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "engine._config":
                assert node.attr in of_config, f"{file.name}:{node.lineno}"


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
