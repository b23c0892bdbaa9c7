"""The accountant inside other loops: transformers' Trainer, DeepSpeed's monitors, the launcher's --memory-report."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_optim.memory.accountant import MemoryAccountant
from ds_optim.memory.callback import MemoryReportCallback, append_to_monitor
from ds_optim.memory.record import Category, Record
from engines import Case
from pool import Pools
from test_accountant import TOKENS, zero_case
from test_memory import medium_model

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "launcher"))

import settings
from memory_report import BARE_STEPS, MEASURED_STEP, MemoryReport

ELEMENTS = 982_144


def train(folder: str, deepspeed: dict[str, Any] | None, step: int = 2) -> Record | None:
    """Three steps of a real Trainer, one of them measured."""
    from transformers import Trainer, TrainingArguments

    data = [{"input_ids": TOKENS[0], "labels": TOKENS[0]} for _ in range(64)]
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=3,
        per_device_train_batch_size=2,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        deepspeed=deepspeed,
        optim="adamw_torch",
    )
    trainer = Trainer(model=medium_model(), args=arguments, train_dataset=data)
    callback = MemoryReportCallback(trainer, Path(folder) / "report", step=step, strict=True, seq_length=16)
    trainer.add_callback(callback)
    trainer.train()
    return callback.record


def train_deepspeed(folder: str) -> str:
    config = {
        "train_micro_batch_size_per_gpu": "auto",
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 200_000},
        "optimizer": {"type": "AdamMini", "params": {"lr": "auto"}},
    }
    record = train(folder, config)
    assert record is not None
    return record.model_dump_json()


def test_a_trainer_is_measured(tmp_path: Path) -> None:
    record = train(str(tmp_path), None)
    assert record == Record.load(tmp_path / "report" / "measured.json")
    rank, about = record.ranks[0], record.provenance
    assert (about.strategy, about.optimizer, about.micro_batch) == ("plain PyTorch", "torch.AdamW", 2)
    assert (about.seq_length, about.model) == (16, "llama")
    assert rank.elements == ELEMENTS
    assert rank.model_states[Category.GRADIENTS] == rank.model_states[Category.PARAMETERS] == 4 * ELEMENTS
    assert {entry.key: entry.bytes for entry in rank.state if entry.key != "step"} == {
        "exp_avg": 4 * ELEMENTS,
        "exp_avg_sq": 4 * ELEMENTS,
    }


def test_a_trainer_under_deepspeed_is_measured(pool: Pools, tmp_path: Path) -> None:
    records = [Record.model_validate_json(text) for text in pool(2).run(train_deepspeed, str(tmp_path))]
    assert records[0].ranks == records[1].ranks
    assert records[0] == Record.load(tmp_path / "report" / "measured.json")
    about = records[0].provenance
    assert (about.strategy, about.optimizer, about.world_size) == ("DeepSpeed ZeRO-2", "ds_optim.AdamMini", 2)
    for rank in records[0].ranks:
        after = rank.moment("after step")
        assert after is not None
        assert after.bytes_of(Category.MASTER) == 4 * rank.elements == 4 * ELEMENTS // 2


def test_a_run_that_ends_early_writes_nothing(tmp_path: Path) -> None:
    assert train(str(tmp_path), None, step=9) is None
    assert not (tmp_path / "report").exists()
    with pytest.raises(ValueError, match="steps are counted from 1"):
        MemoryReportCallback(None, tmp_path, step=0)


def monitored(folder: str) -> tuple[int, int]:
    import deepspeed

    case = zero_case("AdamMini", 2, "bf16")
    config = case.config() | {"csv_monitor": {"enabled": True, "output_path": folder, "job_name": "run"}}
    with MemoryAccountant() as account:
        engine, *_ = deepspeed.initialize(model=medium_model().to(torch.bfloat16), config=config)
        account.watch(engine)
        for _ in range(2):
            engine.backward(engine(input_ids=TOKENS, labels=TOKENS).loss)
            engine.step()
            record = account.record()
            append_to_monitor(record, engine.monitor, engine.global_samples)
    engine.destroy()
    rank = record.ranks[0]
    assert rank.peak is not None
    return rank.state_bytes, rank.peak.total


def test_a_running_record_is_appended_to_the_monitors(pool: Pools, tmp_path: Path) -> None:
    [(state, peak)] = pool(1).run(monitored, str(tmp_path))

    def column(name: str) -> list[tuple[int, int]]:
        [path] = tmp_path.rglob(f"Memory_{name}.csv")
        rows = list(csv.reader(path.open()))[1:]
        return [(int(step), int(float(value))) for step, value in rows]

    assert column("optimizer_state") == [(1, state), (2, state)]
    assert column("peak")[-1] == (2, peak)


def launched(case: Case, folder: str, steps: int) -> list[bool]:
    """A training loop as the launcher's; after which steps the operators ran bare."""
    import deepspeed
    from torch.utils._python_dispatch import _get_current_dispatch_mode

    bare = []
    with MemoryReport(Path(folder) / str(steps), {}, "medium", case.config(), 16) as memory:
        engine, *_ = deepspeed.initialize(model=medium_model().to(torch.bfloat16), config=case.config())
        memory.watch(engine)
        for _ in range(steps):
            engine.backward(engine(input_ids=TOKENS, labels=TOKENS).loss)
            engine.step()
            memory.step_done()
            bare.append(_get_current_dispatch_mode() is None)
    engine.destroy()
    return bare


@pytest.mark.parametrize("steps", [1, MEASURED_STEP + 1, MEASURED_STEP + BARE_STEPS + 2])
def test_the_launcher_follows_a_few_steps_and_writes_one_record(pool: Pools, tmp_path: Path, steps: int) -> None:
    for bare in pool(2).run(launched, zero_case("AdamMini", 2, "bf16"), str(tmp_path), steps):
        assert bare == [done >= MEASURED_STEP for done in range(1, steps + 1)]
    record = Record.load(tmp_path / str(steps) / "measured.json")
    assert [rank.rank for rank in record.ranks] == [0, 1]
    assert (record.provenance.model, record.provenance.seq_length) == ("medium", 16)
    assert (record.provenance.overhead is not None) == (steps > MEASURED_STEP)
    assert record.ranks[0].state_bytes > 0


def test_without_the_option_nothing_is_followed(tmp_path: Path) -> None:
    with MemoryReport(None, {}, "medium", {}, 16) as memory:
        memory.watch(None)
        memory.step_done()
    assert settings.read([]).memory_report is None
    assert settings.read(["--memory-report", str(tmp_path)]).memory_report == tmp_path
    (tmp_path / "file").write_text("")
    with pytest.raises(settings.SettingsError, match=r"--memory-report .*file; give a directory"):
        settings.read(["--memory-report", str(tmp_path / "file")])
