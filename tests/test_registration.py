"""A script that never mentions ds_optim uses it through the JSON alone; and what is broken here breaks nothing else.

Tests run fresh interpreters: registration happens while torch is imported.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import forked
from ds_optim.cli import app
from pool import ALONE

SCRIPT = """
import deepspeed, torch
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.LayerNorm(16), torch.nn.Linear(16, 1))
config = {
    "train_micro_batch_size_per_gpu": 4,
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 2},
    "optimizer": {"type": "TYPE", "params": {"lr": 0.01, "weight_decay": 0.1}},
}
engine, optimizer, _, _ = deepspeed.initialize(model=model, config=config)
inputs = torch.randn(4, 8).bfloat16()
for _ in range(20):
    loss = (engine(inputs) - inputs.sum(1, keepdim=True)).square().mean()
    engine.backward(loss)
    engine.step()
    first = first if _ else loss.item()
kind = type(engine.basic_optimizer)
print("RESULT", kind.__module__, kind.__name__, loss.item() < first)
"""

TRAINER = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
torch.manual_seed(0)
data = [{"input_ids": torch.arange(16) + i % 4, "labels": torch.arange(16) + i % 4} for i in range(16)]
arguments = TrainingArguments(
    output_dir="OUT", deepspeed="JSON", max_steps=12, per_device_train_batch_size=2, learning_rate=1e-2,
    weight_decay=0.1, bf16=True, logging_steps=1, report_to=[], save_strategy="no", use_cpu=True, warmup_steps=2,
)
trainer = Trainer(model=LlamaForCausalLM(config), args=arguments, train_dataset=data)
trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
basic = trainer.model_wrapped.basic_optimizer
decays = sorted(group["weight_decay"] for group in basic.param_groups)
print("RESULT", type(basic).__name__, losses[-1] < losses[0], decays, tuple(basic.param_groups[0]["betas"]))
"""


def python(code: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code as a script of one rank in a fresh interpreter."""
    script = folder / "script.py"
    script.write_text(code, encoding="utf-8")
    plain = {
        key: value for key, value in os.environ.items() if key not in ("TORCH_DEVICE_BACKEND_AUTOLOAD", "PYTHONPATH")
    }
    return subprocess.run(
        [sys.executable, str(script)],
        env={**plain, **ALONE, "DS_ACCELERATOR": "cpu", **environment},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )


def result(finished: subprocess.CompletedProcess[str]) -> str:
    found = re.search(r"^RESULT (.*)$", finished.stdout, re.MULTILINE)
    assert found, finished.stdout[-2000:] + finished.stderr[-4000:]
    return found[1]


def test_a_script_that_does_not_know_us_trains_through_its_json(tmp_path: Path) -> None:
    code = SCRIPT.replace("TYPE", "AdamMini")
    assert result(python(code, tmp_path)) == "ds_optim.optimizers.adam_mini AdamMini True"


def test_with_autoload_off_an_import_by_hand_does_the_same(tmp_path: Path) -> None:
    code = SCRIPT.replace("TYPE", "Adan")
    off = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    assert "Adan is not a supported DeepSpeed Optimizer" in python(code, tmp_path, **off).stderr
    assert result(python("import ds_optim\n" + code, tmp_path, **off)) == "ds_optim.optimizers.adan Adan True"


def test_an_import_by_hand_may_come_after_deepspeed(tmp_path: Path) -> None:
    code = SCRIPT.replace("TYPE", "Adan").replace("model =", "import ds_optim\nmodel =", 1)
    off = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    assert result(python(code, tmp_path, **off)) == "ds_optim.optimizers.adan Adan True"


def test_the_plugin_may_be_imported_before_deepspeed(tmp_path: Path) -> None:
    code = "import ds_optim.deepspeed.plugin\n" + SCRIPT.replace("TYPE", "ds_optim.Lion")
    assert result(python(code, tmp_path)) == "ds_optim.optimizers.lion Lion True"


@pytest.mark.parametrize("broken", ["ds_optim/__init__.py", "wrapt/__init__.py"])
def test_a_broken_installation_breaks_neither_torch_nor_deepspeed(tmp_path: Path, broken: str) -> None:
    spoiled = tmp_path / "site" / broken
    spoiled.parent.mkdir(parents=True)
    spoiled.write_text("raise ImportError('broken on purpose')", encoding="utf-8")
    code = "import torch, deepspeed\nprint('RESULT', torch.ones(2).sum().item(), hasattr(torch.optim, 'AdamMini'))"
    finished = python(code, tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert result(finished) == "2.0 False"
    if broken.startswith("ds_optim"):
        assert "could not register its optimizers" in finished.stderr
        assert "broken on purpose" in finished.stderr


def test_import_torch_gets_no_slower(tmp_path: Path) -> None:
    """The entry point's share of `import torch`, by the interpreter's own clock."""

    def cumulative(code: str) -> dict[str, int]:
        timed = subprocess.run(
            [sys.executable, "-X", "importtime", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
        ).stderr
        lines = re.finditer(r"import time: +\d+ \| +(\d+) \|(.*)", timed)
        return {match[2].strip(): int(match[1]) for match in lines}

    shares = []
    for _ in range(3):
        # torch loads entry points in a way that -X importtime does not show: their own module is timed apart.
        inside, alone = cumulative("import torch"), cumulative("import ds_optim_autoload")
        shares.append((inside["wrapt"] + alone["ds_optim_autoload"]) / inside["torch"])
    print(f"share of ds_optim_autoload and wrapt in `import torch`: {sorted(shares)[1]:.2%}")
    assert sorted(shares)[1] < 0.02


def test_importing_the_package_imports_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys, ds_optim\nprint('RESULT', [m for m in ('torch', 'deepspeed', 'transformers') if m in sys.modules])"
    )
    assert result(python(code, tmp_path)) == "[]"


def test_the_package_works_without_deepspeed(tmp_path: Path) -> None:
    hidden = tmp_path / "site" / "deepspeed"
    hidden.mkdir(parents=True)
    (hidden / "__init__.py").write_text("raise ImportError('not installed')", encoding="utf-8")
    code = """
import sys, torch, ds_optim
model = torch.nn.Linear(4, 4)
model(torch.ones(1, 4)).sum().backward()
ds_optim.AdamMini(model.named_parameters(), roles=model).step()
print("RESULT", "deepspeed" in sys.modules)
"""
    assert result(python(code, tmp_path, PYTHONPATH=str(hidden.parent))) == "False"


def test_a_trainer_needs_only_the_json(tmp_path: Path) -> None:
    """Every "auto" is filled in; norms are spared from weight decay although the Trainer's own groups are lost."""
    config = Path(__file__).parents[1] / "configs" / "hf_trainer_auto.json"
    code = TRAINER.replace("JSON", str(config)).replace("OUT", str(tmp_path))
    assert result(python(code, tmp_path)) == "AdamMini True [0.0, 0.1] (0.9, 0.999)"


def test_the_doctor_says_what_resolves_to_what(tmp_path: Path) -> None:
    command, environment = ["ds-optim", "doctor"], forked.environment(COLUMNS="200")
    itself = str(Path(sys.executable).with_name("ds-optim"))
    healthy = subprocess.run([itself, "doctor"], capture_output=True, text=True, env=environment, timeout=300)
    assert healthy.returncode == 0, healthy.stdout + healthy.stderr
    for wanted in (
        "ds_optim.optimizers.adam_mini.AdamMini",
        "hook on deepspeed.runtime.engine installed: yes",
        "zenflow",
    ):
        assert wanted in healthy.stdout
    bad = tmp_path / "bad.json"
    bad.write_text(
        json.dumps(
            {
                "optimizer": {"type": "AdamMini", "params": {"momentum": 1}},
                "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}},
            }
        ),
        encoding="utf-8",
    )
    judged = subprocess.run(
        [*command, "--deepspeed", str(bad)], capture_output=True, text=True, env=environment, timeout=300
    )
    assert judged.returncode == 1, judged.stdout + judged.stderr
    assert "ratio below 1" in judged.stdout
    assert "has no option 'momentum'" in judged.stdout


# "scheduler" and the optimizer's "params", what the doctor says about them, and whether it calls that an error.
SAID = [
    ("Shampoo", {"betas": "auto"}, None, "adam_beta1 and adam_beta2, by default [0.9, 0.999]", False),
    ("ds_optim.Lion", {"betas": "auto"}, None, "for its default [0.9, 0.99]", False),
    ("Adan", {"betas": "auto"}, None, "a Trainer fills in two, Adan has 3", True),
    ("AdamMini", {"betas": "auto"}, None, "", False),
    (
        "AdamMini",
        {"lr": 3e-4},
        {"type": "WarmupDecayLR", "params": {"total_num_steps": 9}},
        "0.001, its default",
        False,
    ),
    (
        "AdamMini",
        {"lr": 3e-4},
        {"type": "WarmupLR", "params": {"warmup_max_lr": 0.1}},
        "not with the optimizer's lr",
        False,
    ),
    ("AdamMini", {"lr": 3e-4}, {"type": "WarmupLR", "params": {"warmup_num_steps": 9}}, "", False),
    ("AdamMini", {"lr": "auto"}, {"type": "WarmupDecayLR", "params": {"warmup_max_lr": "auto"}}, "", False),
    ("SWAN", {}, {"type": "WarmupCosineLR", "params": {"warmup_max_lr": "auto"}}, "no option 'warmup_max_lr'", True),
    ("SWAN", {}, {"type": "WarmupCosineLR", "params": {"cos_min_ratio": "auto"}}, '"auto" for cos_min_ratio', True),
    ("SWAN", {}, {"type": "WarmupCosineLR", "params": {"total_num_steps": "auto"}}, "", False),
    ("AdamMini", {}, {"type": "OneCycle", "params": {}}, "sets the second to 0.99", False),
    ("AdamMini", {}, {"type": "OneCycle", "params": {"cycle_momentum": False}}, "", False),
    ("Adan", {}, {"type": "OneCycle", "params": {}}, 'set "cycle_momentum": false', True),
]


@pytest.mark.parametrize(("name", "params", "scheduler", "wanted", "is_error"), SAID)
def test_the_doctor_says_which_numbers_a_file_really_trains_with(
    tmp_path: Path, name: str, params: dict[str, Any], scheduler: Any, wanted: str, is_error: bool
) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"optimizer": {"type": name, "params": params}, "scheduler": scheduler or {}}))
    judged = CliRunner().invoke(app, ["doctor", "--deepspeed", str(file)], env={"COLUMNS": "400"})
    assert judged.exit_code == (1 if is_error else 0), judged.output
    said = " ".join(judged.output.split("judged")[-1].split(str(file))[-1].split())
    assert wanted in said
    assert ("note:" in said) == bool(wanted and not is_error)


def test_the_doctor_reports_what_deepspeed_itself_refuses(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"optimizer": {"type": "AdamMini"}, "zero_optimization": {"stage": 4}}))
    judged = CliRunner().invoke(app, ["doctor", "--deepspeed", str(file)], env={"COLUMNS": "400"})
    assert judged.exit_code == 1
    assert "DeepSpeed refuses it" in judged.output
