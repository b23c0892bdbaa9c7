"""The predicted record: it equals what real engines measure, and what the papers saw."""

from __future__ import annotations

import itertools
import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from ds_optim.blueprint import BlueprintError
from ds_optim.cli import app
from ds_optim.memory import simulate
from ds_optim.memory.agreement import agreement
from ds_optim.memory.estimate import Request, highest, largest_micro_batch, predict, request_of
from ds_optim.memory.estimate_command import device_bytes, size_bytes
from ds_optim.memory.record import Category, Record
from ds_optim.releases import DEEPSPEED, TRANSFORMERS
from memory_cases import MODEL, OPTIMIZERS, MemoryCase, measured, request
from pool import Pools

MODELS = Path(__file__).parents[1] / "configs" / "models"
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}

INT8 = {"state_dtype": "int8"}
# Every optimizer, stage, precision and number of ranks at least once; all of it is in benchmarks/memory_accuracy.py.
CASES = [
    (1, MemoryCase("ds_optim.AdamW", 0, "fp32")),
    (2, MemoryCase("AdamMini", 0, "bf16")),
    (2, MemoryCase("ds_optim.Lion", 1, "fp32")),
    (2, MemoryCase("AdamMini", 2, "bf16")),
    (2, MemoryCase("AdamMini", 2, "bf16", zero={"overlap_comm": True})),
    (1, MemoryCase("Adan", 2, "fp32")),
    (2, MemoryCase("Shampoo", 2, "bf16")),
    (2, MemoryCase("ds_optim.AdamW", 3, "bf16")),
    (1, MemoryCase("SWAN", 3, "bf16")),
    (2, MemoryCase("SWAN", 0, "fp32")),
    (2, MemoryCase("ds_optim.Muon", 2, "bf16")),
    (1, MemoryCase("NorMuon", 1, "bf16")),
    (2, MemoryCase("SOAP", 3, "fp32")),
    (2, MemoryCase("AdamMini", 2, "bf16", zero=OFFLOAD)),
    (2, MemoryCase("AdamMini", 3, "fp32", zero=OFFLOAD)),
    (2, MemoryCase("AdamMini", 2, "bf16", checkpointing=True, micro_batch=4)),
    (1, MemoryCase("AdamMini", 2, "fp32", micro_batch=1, seq_length=1024)),
    (2, MemoryCase("AdamMini", 0, "bf16", passes=3)),
    (2, MemoryCase("AdamMini", 1, "bf16", passes=3)),
    (2, MemoryCase("AdamMini", 2, "bf16", passes=3)),
    (2, MemoryCase("AdamMini", 3, "bf16", passes=3)),
    (2, MemoryCase("ds_optim.AdamW", 2, "bf16", zero=OFFLOAD, passes=2 if DEEPSPEED.is_before("0.19.0") else 3)),
    (2, MemoryCase("ds_optim.AdamW", 2, "bf16", options=INT8)),
    (2, MemoryCase("AdamMini", 3, "fp32", options={**INT8, "int8_embeddings": True})),
    (2, MemoryCase("Shampoo", 1, "bf16", options={**INT8, "max_preconditioner_dim": 128})),
    (2, MemoryCase("AdamMini", 3, zero={"stage3_allgather_sequential": True})),
    (2, MemoryCase("AdamMini", 3, zero={"stage3_max_live_parameters": 1_000_000})),
    (2, MemoryCase("AdamMini", 3, zero={"stage3_max_reuse_distance": 1_000_000, "sub_group_size": 500_000})),
]


def read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((MODELS / f"{name}.json").read_text())
    return content


@pytest.mark.parametrize(
    ("ranks", "case"),
    CASES,
    ids=[
        f"{c.optimizer}-{c.stage}-{c.precision}-{ranks}-{'-'.join(c.zero)}-{c.seq_length}x{c.passes}"
        for ranks, c in CASES
    ],
)
def test_what_is_predicted_is_what_is_measured(pool: Pools, ranks: int, case: MemoryCase) -> None:
    found = Record.model_validate_json(pool(ranks).run(measured, case)[0])
    lines = agreement(found, predict(request(case, ranks)))
    assert {line.rank for line in lines} == set(range(ranks))
    kept = [line for line in lines if line.name == "activations after forward"]
    if not TRANSFORMERS.is_before("5"):  # which copies queries, keys and values for SDPA
        assert all(abs(line.difference) < 0.001 for line in kept)  # they are not just within the limit, they are exact
    wrong = [
        f"rank {x.rank} {x.name}: {x.measured:,} measured, {x.predicted:,} predicted" for x in lines if not x.passed
    ]
    assert wrong == []


def test_a_wrong_prediction_is_noticed(pool: Pools) -> None:
    found = Record.model_validate_json(pool(2).run(measured, MemoryCase("AdamMini", 2))[0])
    other = agreement(found, predict(request(MemoryCase("ds_optim.AdamW", 2), 2)))
    assert "optimizer state, bytes" in {line.name for line in other if not line.passed}
    longer = agreement(found, predict(request(MemoryCase("AdamMini", 2, seq_length=128), 2)))
    assert "activations after forward" in {line.name for line in longer if not line.passed}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["llama_60m", "gpt2_xl"])
def test_three_layers_stand_for_all(monkeypatch: pytest.MonkeyPatch, name: str, checkpointing: bool) -> None:
    config = {**read(name), "use_cache": False}
    layers = config.get("num_hidden_layers") or config["n_layer"]
    key = "num_hidden_layers" if "num_hidden_layers" in config else "n_layer"
    config[key] = min(layers, 8)
    short = simulate.simulate(config, torch.bfloat16, 2, 128, checkpointing)
    monkeypatch.setattr(simulate, "_LAYERS", config[key])
    whole = simulate.simulate(config, torch.bfloat16, 2, 128, checkpointing)
    assert short.kept == whole.kept
    assert short.forward.max() == whole.forward.max()
    assert abs(int(short.backward.max()) - int(whole.backward.max())) <= 0.001 * whole.backward.max()
    assert [a.name for a in short.arrivals] == [a.name for a in whole.arrivals]
    assert [a.bytes for a in short.arrivals] == [a.bytes for a in whole.arrivals]
    assert len(short.backward) == len(whole.backward)


def test_checkpointing_keeps_a_tenth() -> None:
    plain, recomputed = (simulate.simulate(read("llama2_7b"), torch.bfloat16, 1, 2048, on) for on in (False, True))
    assert recomputed.kept < 0.1 * plain.kept
    # Each of 32 layers keeps its input, (2048, 4096) in bf16; the head keeps the rest.
    assert recomputed.kept > 32 * 2048 * 4096 * 2


def llama2_7b(optimizer: str, **changes: Any) -> Request:
    """The paper's case: two cards of 80 GB, ZeRO-2, bf16 with an fp32 master; 2 GiB per card are not for us."""
    memory = {"device_memory": device_bytes("80GB"), "reserve": size_bytes("2GiB")}
    fixed = {"stage": 2, "world_size": 2, "precision": "bf16", "seq_length": 2048, **memory}
    return Request(model=read("llama2_7b"), model_name="llama2_7b", optimizer=optimizer, **{**fixed, **changes})


def test_the_adam_mini_papers_case() -> None:
    adamw, mini = largest_micro_batch(llama2_7b("AdamW")), largest_micro_batch(llama2_7b("AdamMini"))
    assert adamw == 1
    assert mini > adamw
    asked = llama2_7b("AdamMini", micro_batch=mini)
    assert highest(predict(asked)) <= asked.device_memory - asked.reserve


def test_seventy_billion_parameters_on_1024_ranks_in_seconds() -> None:
    started = time.monotonic()
    record = predict(
        Request(
            model=read("llama2_70b"), model_name="70b", optimizer="AdamMini", stage=3, world_size=1024, seq_length=4096
        )
    )
    assert time.monotonic() - started < 60
    fair = 4 * record.provenance.parameters / 1024
    assert fair <= record.fullest.state_bytes <= 1.01 * fair


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("optimizer", [name.removeprefix("ds_optim.") for name in OPTIMIZERS])
def test_the_ranks_together_keep_what_one_process_keeps(optimizer: str, stage: int) -> None:
    def sizes(ranks: int) -> dict[str, int]:
        found = predict(
            Request(
                model=MODEL, model_name="small", optimizer=optimizer, stage=stage, world_size=ranks, states_only=True
            )
        )
        assert [rank.rank for rank in found.ranks] == list(range(ranks))
        keys = {entry.key for rank in found.ranks for entry in rank.state}
        return {key: sum(e.elements for rank in found.ranks for e in rank.state if e.key == key) for key in keys}

    alone, split = sizes(1), sizes(4)
    for key in alone.keys() - {"step", "exp_avg_sq"}:
        padding = 4 * 64 * 4 if key.startswith("exp_avg") else 0  # ZeRO pads every slice of a small parameter
        assert alone[key] <= split[key] <= alone[key] + padding, key


def test_plain_pytorch_in_pure_bf16_keeps_no_fp32() -> None:
    asked = Request(
        model=MODEL, model_name="small", optimizer="AdamW", stage=None, precision="pure bf16", seq_length=64
    )
    record = predict(asked)
    elements = record.provenance.parameters
    states = record.fullest.model_states
    assert states[Category.MASTER] == 0
    assert states[Category.PARAMETERS] == states[Category.GRADIENTS] == 2 * elements
    assert 4 * elements <= states[Category.OPTIMIZER] <= 4 * elements + 4 * 64


def test_offloaded_state_does_not_count_on_the_device() -> None:
    config = MemoryCase("AdamMini", 2, zero=OFFLOAD).config()
    asked = Request(model=MODEL, model_name="small", stage=2, world_size=2, seq_length=64, deepspeed=config)
    record = predict(asked)
    for rank in record.ranks:
        for moment in rank.moments:
            assert moment.on_host >= moment.bytes_of(Category.MASTER, Category.OPTIMIZER)
            assert moment.on_device + moment.on_host == moment.total


ZERO = "zero_optimization"
BAD = [
    ({"model": {"model_type": "lama"}}, "lama"),
    ({"model": {"vocab_size": 3}}, "model_type"),
    ({"model": {**MODEL, "num_attention_heads": 5}}, "transformers cannot make|cannot be run"),
    ({"model": {**MODEL, "hidden_size": "64"}}, "transformers cannot make"),
    ({"world_size": 0}, "at least 1"),
    ({"stage": 4}, "no ZeRO stage 4"),
    ({"stage": 2, "precision": "pure bf16"}, "fp32 master"),
    ({"optimizer": "Adamax"}, "Adamax"),
    ({"optimizer": None}, "no optimizer was named"),
    ({"seq_length": 100_000}, "positions"),
    ({"settings": {"lr": -1}}, "lr"),
    *[
        ({"deepspeed": deepspeed}, said)
        for deepspeed, said in [
            ({ZERO: {"stage": 2, "offload_optimizer": {"device": "nvme"}}}, "NVMe"),
            ({ZERO: {"stage": 2, "offload_optimizer": {"device": "cpu", "ratio": 0.3}}}, "ratio"),
            ({ZERO: {"stage": 2, "offload_param": {"device": "cpu"}}}, "offload_param"),
            ({ZERO: {"reduce_bucket_size": "big"}}, "reduce_bucket_size"),
            ({ZERO: {"contiguous_gradients": False, "stage": 2}}, "contiguous_gradients"),
            ({ZERO: {"zero_hpz_partition_size": 2}}, "ZeRO\\+\\+"),
            ({ZERO: True}, "zero_optimization"),
            ({"bf16": True}, "bf16"),
            ({"optimizer": "AdamMini"}, "optimizer"),
            ({"torch_autocast": {"enabled": True}}, "torch_autocast"),
            ({"train_micro_batch_size_per_gpu": "four"}, "train_micro_batch_size_per_gpu"),
        ]
    ],
]


@pytest.mark.parametrize(("changes", "said"), BAD, ids=[said for _, said in BAD])
def test_what_cannot_be_predicted_is_refused(changes: dict[str, Any], said: str) -> None:
    fixed: dict[str, Any] = {"model": MODEL, "model_name": "small", "optimizer": "AdamW", "stage": 2, "seq_length": 64}
    with pytest.raises(ValueError, match=said):
        predict(Request(**{**fixed, **changes}))


def test_what_a_json_leaves_out_is_not_an_error() -> None:
    empty = {ZERO: {"stage": 2, "offload_optimizer": None, "reduce_bucket_size": "auto"}, "bf16": {"enabled": "auto"}}
    assert predict(Request(MODEL, "small", "AdamW", deepspeed=empty, stage=2, seq_length=64)).ranks
    trainer = json.loads((MODELS.parent / "hf_trainer_auto.json").read_text())
    assert predict(request_of(MODEL, "small", trainer, 2, 64)).provenance.optimizer == "ds_optim.AdamMini"


def test_the_batch_size_of_a_json_is_understood() -> None:
    def of(**values: int) -> tuple[int, int]:
        found = request_of(MODEL, "small", values, 4, 64)
        return found.micro_batch, found.passes

    assert of(train_batch_size=256) == (64, 1)
    assert of(train_batch_size=256, gradient_accumulation_steps=8) == (8, 8)
    assert of(train_batch_size=256, train_micro_batch_size_per_gpu=16) == (16, 4)
    assert of(train_micro_batch_size_per_gpu=3) == (3, 1)


def test_how_much_fits_needs_a_device() -> None:
    with pytest.raises(BlueprintError, match="--device-memory"):
        largest_micro_batch(llama2_7b("AdamW", device_memory=None))


# ----------------------------------------------------------------------------------------------------- the command line


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["estimate", *arguments], env={"COLUMNS": "200"})


def test_the_command_prints_what_is_saved_and_what_fits() -> None:
    config = MODELS.parent / "adam_mini_zero2.json"
    result = run(
        "--model", str(MODELS / "llama2_7b.json"), "--deepspeed", str(config), "--world-size", "2",
        "--device-memory", "80GB", "--compare", "adamw", "--micro-batch", "1",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "50.0 %" in result.output
    assert "AdamW: highest peak" in result.output
    assert "largest micro-batch 1, with checkpointing" in result.output


def test_the_command_writes_records_that_can_be_read(tmp_path: Path) -> None:
    result = run(
        "--model", str(MODELS / "llama_60m.json"), "--optimizer", "swan", "--stage", "3", "--seq-length", "64",
        "--ranks", "2", "--compare", "AdamW", "--output", str(tmp_path),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert Record.load(tmp_path / "predicted.json").provenance.optimizer == "ds_optim.SWAN"
    assert Record.load(tmp_path / "baseline.json").provenance.optimizer == "ds_optim.AdamW"
    assert "imbalance" in result.output  # SWAN's plan


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--world-size", "0"], "at least 1"),
        (["--optimizer", "sgd"], "none of"),
        (["--seq-length", "0"], "at least 1"),
        (["--device-memory", "1GB", "--reserve", "2GB"], "leaves nothing"),
        (["--device-memory", "eighty"], "no size"),
        (["--precision", "fp8"], "fp32 or bf16"),
    ],
)
def test_bad_arguments_give_one_clear_error(arguments: list[str], said: str) -> None:
    result = run("--model", str(MODELS / "llama_60m.json"), "--optimizer", "AdamW", *arguments)
    assert result.exit_code != 0
    assert said in " ".join(result.output.split())
    assert "Traceback" not in result.output


def test_a_model_that_is_no_json_gives_one_clear_error(tmp_path: Path) -> None:
    broken = tmp_path / "config.json"
    broken.write_text('{"model_type": ')
    result = run("--model", str(broken), "--optimizer", "AdamW")
    assert result.exit_code == 1
    assert "is not JSON" in result.output


def test_a_card_sold_as_80_gb_has_80_gib() -> None:
    assert device_bytes("80GB") == device_bytes("80 GiB") == 80 * 2**30
    assert size_bytes("1.5GB") == 1.5e9
    for first, second in itertools.pairwise(["1kB", "1KiB", "1MB", "1MiB", "1GB", "1GiB"]):
        assert size_bytes(first) < size_bytes(second)
    assert math.isclose(size_bytes("0.5GiB"), 2**29)
