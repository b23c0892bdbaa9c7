"""transformers' Trainer, Accelerate and PEFT drive the optimizers: every example runs, and what it computes is exact.

The examples run in the pool's ranks, through `examples/on_cpu.py`; the training script of the usual kind is started
as a user starts it, once with DeepSpeed's AdamW and once with nothing but the JSON changed.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import socket
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import SequentialSampler
from transformers import TrainerCallback

import ds_optim.checkpoint
import forked
from ds_optim.releases import ACCELERATE, DEEPSPEED, TRANSFORMERS
from ds_optim.roles import canonical_name

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
sys.path.insert(0, str(EXAMPLES))  # as `python examples/...` does

MOMENTS = {"step", "exp_avg", "exp_avg_sq"}
SHAMPOO = {*MOMENTS, "momentum", "graft", "factor_0", "factor_1", "root_0", "root_1"}


@contextmanager
def fresh_accelerate(environment: Mapping[str, str] | None = None) -> Iterator[None]:
    """A process as Accelerate finds it at its start, and left as it was found."""
    from accelerate.state import AcceleratorState, GradientState
    from on_cpu import counting_ranks
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    before, argv = dict(os.environ), list(sys.argv)
    for name in [name for name in before if name.startswith(("ACCELERATE_", "FSDP_"))]:
        del os.environ[name]  # what a Trainer of another test left in this worker
    os.environ.update(environment or {})
    try:
        with counting_ranks():
            yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        sys.argv = argv
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        unset_hf_deepspeed_config()
        torch._dynamo.reset()
        gc.collect()


def inner(optimizer: Any) -> Any:
    """What wrappers of Accelerate and DeepSpeed wrap."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def facts(model: nn.Module, optimizer: Any, losses: list[float]) -> dict[str, Any]:
    found = inner(optimizer)
    trained = [parameter for group in found.param_groups for parameter in group["params"]]
    return {
        "class": type(found).__name__,
        "is_ours": isinstance(found, ds_optim.stepping.sharded.ShardedOptimizer),
        "is_bound": found.is_bound,
        "keys": {key for state in found.state.values() for key in state},
        "state_bytes": {
            key: sum(_local(state[key]).nbytes for state in found.state.values() if key in state)
            for key in ("exp_avg", "exp_avg_sq", "previous_grad", "factor_0")
        },
        "is_sharded": all(isinstance(parameter, DTensor) for parameter in trained),
        "is_compiled": any(hasattr(module, "_orig_mod") for module in model.modules()),
        "trained": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        "betas": found.param_groups[0]["betas"],
        "lr": [float(group["lr"]) for group in optimizer.param_groups],
        "losses": losses,
    }


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def run_example(name: str, arguments: list[str], environment: Mapping[str, str]) -> dict[str, Any]:
    """A job: one example on this rank."""
    with fresh_accelerate(environment):
        sys.argv = [name, *arguments]
        made = runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        if "trainer" in made:
            trainer = made["trainer"]
            losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
            found = facts(trainer.model_wrapped, trainer.optimizer, losses)
            model = trainer.model_wrapped
        else:
            model = made["model"]
            found = facts(model, made["optimizer"], made["losses"])
        if hasattr(model, "destroy"):
            model.destroy()
        return found


def total(results: list[dict[str, Any]], key: str) -> int:
    return sum(result["state_bytes"][key] for result in results)


def check(results: list[dict[str, Any]], name: str, keys: set[str]) -> None:
    """Every rank trained with our optimizer of that name, and its loss fell."""
    for found in results:
        assert (found["class"], found["is_ours"]) == (name, True)
        assert keys <= found["keys"]
        assert found["losses"] == pytest.approx(results[0]["losses"], abs=1e-6)
        assert found["losses"][-1] < 0.93 * found["losses"][0]


# -- every example --------------------------------------------------------------------------------------------------


def test_the_trainer_takes_adan_and_its_three_betas_from_the_json(pool: Any) -> None:
    results = pool(2).run(run_example, "trainer_deepspeed.py", ["--deepspeed", str(EXAMPLES / "adan_auto.json")], {})
    check(results, "Adan", {*MOMENTS, "exp_avg_diff", "previous_grad"})
    for found in results:
        assert found["is_bound"]
        assert tuple(found["betas"]) == (0.98, 0.92, 0.99)
        assert len(found["losses"]) == 12
        assert found["lr"] == [0.0, 0.0]  # the end of transformers' cosine, in both groups
    assert total(results, "exp_avg") == 4 * results[0]["trained"]  # each half once


def test_the_trainer_fills_in_every_auto_of_adam_mini(pool: Any) -> None:
    arguments = ["--deepspeed", str(ROOT / "configs" / "hf_trainer_auto.json"), "--adam_beta2", "0.95"]
    results = pool(2).run(run_example, "trainer_deepspeed.py", arguments, {})
    check(results, "AdamMini", MOMENTS)
    assert all(tuple(found["betas"]) == (0.9, 0.95) for found in results)
    assert total(results, "exp_avg") == 4 * results[0]["trained"]
    assert total(results, "exp_avg_sq") < 0.05 * total(results, "exp_avg")


def test_the_trainer_on_one_device_under_ddp_and_fsdp2_trains_the_same_model(pool: Any) -> None:
    replicated = pool(2).run(run_example, "trainer_torch.py", [], {})
    sharded = pool(2).run(run_example, "trainer_torch.py", ["--fsdp"], {})
    for results in (replicated, sharded):
        check(results, "Shampoo", SHAMPOO)
        assert all(found["lr"] == [0.0, 0.0] for found in results)
        # The clipped norm is summed in another order over shards.
        digits = 1.1e-4 if TRANSFORMERS.is_before("5") else 1e-5  # transformers 4 logs four
        assert results[0]["losses"] == pytest.approx(replicated[0]["losses"], abs=digits)
    assert [found["is_sharded"] for found in replicated + sharded] == [False, False, True, True]
    assert replicated[0]["state_bytes"] == replicated[1]["state_bytes"]
    for key in ("exp_avg", "factor_0"):
        assert total(sharded, key) == replicated[0]["state_bytes"][key]
    (alone,) = pool(1).run(run_example, "trainer_torch.py", [], {})
    check([alone], "Shampoo", SHAMPOO)
    assert alone["state_bytes"] == replicated[0]["state_bytes"]


def test_accelerate_under_deepspeed_with_deepspeeds_own_schedule(pool: Any) -> None:
    environment = {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(EXAMPLES / "swan_warmup.json"),
        "ACCELERATE_CONFIG_DS_FIELDS": "",
    }
    results = pool(2).run(run_example, "accelerate_deepspeed.py", [], environment)
    check(results, "SWAN", MOMENTS)
    for found in results:
        assert found["is_bound"]
        assert len(found["losses"]) == 24  # of 12 steps
        assert found["lr"] == pytest.approx([3e-3, 3e-3])  # the top of WarmupLR
        assert found["losses"][1] == pytest.approx(found["losses"][0], abs=0.02)  # no step between micro-batches


def test_accelerate_with_fsdp2_a_compiled_model_and_torchs_schedule(pool: Any) -> None:
    results = pool(2).run(run_example, "accelerate_fsdp2.py", [], {})
    check(results, "AdamMini", MOMENTS)
    for found in results:
        assert found["is_sharded"]
        assert found["is_compiled"]
        assert found["lr"] == pytest.approx([5e-3, 5e-3])
    assert total(results, "exp_avg") == 4 * 34_976
    assert total(results, "exp_avg_sq") < 0.05 * total(results, "exp_avg")


@pytest.mark.parametrize("name", ["AdamMini", "Shampoo"])
def test_lora(name: str, pool: Any) -> None:
    (found,) = pool(1).run(run_example, "lora.py", [name], {})
    check([found], name, MOMENTS if name == "AdamMini" else SHAMPOO)
    assert found["trained"] == 2048 + 256 * 32  # the adapters, and the head that is trained whole
    if name == "AdamMini":
        # Per layer: 4 directions of each A; of B 4 heads of q, 2 of k, 16 rows of v, 32 of down_proj. 256 of the head.
        assert found["state_bytes"]["exp_avg_sq"] == 4 * (2 * (4 * 4 + 4 + 2 + 16 + 32) + 256)
    else:  # Adam's for the head only
        assert found["state_bytes"]["exp_avg"] == 4 * 256 * 32


# -- a script of the usual kind -------------------------------------------------------------------------------------


def launch(config: dict[str, Any], folder: Path, text: Path, steps: int) -> tuple[list[float], dict[str, int]]:
    """Start the script as a user does; its losses, and how many values of each state the first rank saved."""
    file, output = folder / "ds.json", folder / "output"
    folder.mkdir()
    file.write_text(json.dumps(config))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = ["-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", port, "examples/on_cpu.py"]
    given = ["--deepspeed", str(file), "--output_dir", str(output), "--train_files", str(text)]
    arguments = f"""
        --config_name configs/models/llama_small.json --hidden_size 64 --block_size 32 --per_device_train_batch_size 8
        --learning_rate 3e-3 --weight_decay 0.1 --adam_beta2 0.95 --lr_scheduler_type cosine --warmup_steps 2
        --max_steps {steps} --logging_steps 1 --save_steps {steps} --report_to none
    """.split()
    finished = subprocess.run(
        [forked.python(), *command, "examples/run_clm.py", *arguments, *given],
        cwd=ROOT,
        env=forked.environment(PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-3000:]
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    (saved,) = output.glob(f"checkpoint-{steps}/global_step{steps}/*rank_0_mp_rank_00_optim_states.pt")
    state = torch.load(saved, weights_only=False)["optimizer_state_dict"]["base_optimizer_state"]["state"]
    sizes: dict[str, int] = {}
    for tensors in state.values():
        for key, tensor in tensors.items():
            sizes[key] = sizes.get(key, 0) + tensor.numel()
    return [entry["loss"] for entry in history if "loss" in entry], sizes


def test_a_script_of_the_usual_kind_with_nothing_but_its_json_changed(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(topics[name] for name in sorted(topics))[:60_000])
    ours = json.loads((ROOT / "configs" / "hf_trainer_auto.json").read_text())
    # `torch_adam`: DeepSpeed's fused AdamW needs a GPU. Before 0.19 DeepSpeed cannot step that over several CPU ranks.
    kind, options = ("ds_optim.AdamW", {}) if DEEPSPEED.is_before("0.19") else ("AdamW", {"torch_adam": True})
    theirs = {**ours, "optimizer": {"type": kind, "params": {**ours["optimizer"]["params"], **options}}}
    adamw, sizes = launch(theirs, tmp_path / "adamw", text, 8)
    assert sizes["exp_avg_sq"] == sizes["exp_avg"]
    adam_mini, sizes = launch(ours, tmp_path / "adam_mini", text, 8)
    assert sizes["exp_avg_sq"] < 0.05 * sizes["exp_avg"]  # one value per block
    assert adam_mini[:2] == pytest.approx(adamw[:2], abs=1e-6)  # the same model and text; warm-up starts with lr 0
    assert adam_mini[2:] != pytest.approx(adamw[2:], abs=1e-6)
    assert adam_mini[-1] < 0.95 * adam_mini[0]
    assert adam_mini[-1] < adamw[-1] + 0.1


# -- exactness ------------------------------------------------------------------------------------------------------

ROWS, STEPS = 4, 6  # sequences of a rank per micro-batch


def trainer_of(output: Path, cls: str, arguments: dict[str, Any]) -> Any:
    """A Trainer that reads the text in its order; ``cls`` is empty under DeepSpeed."""
    from tiny import tiny_llama, windows
    from transformers import Trainer, TrainingArguments

    class InOrder(Trainer):  # type: ignore[misc]
        """Asked for by ``train_sampling_strategy="sequential"`` in newer releases."""

        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)

    model = tiny_llama()
    given: dict[str, Any] = {
        "per_device_train_batch_size": ROWS,
        "max_steps": STEPS,
        "save_strategy": "no",
        "report_to": "none",
        "learning_rate": 4e-3,
        "lr_scheduler_type": "constant",
        **arguments,
    }
    chosen = (getattr(ds_optim, cls), {"lr": 4e-3, "roles": model}) if cls else None
    return InOrder(
        model,
        TrainingArguments(output_dir=str(output), **given),
        train_dataset=windows(),
        optimizer_cls_and_kwargs=chosen,
    )


def whole_weights(trainer: Any) -> dict[str, Tensor]:
    """Every trained parameter, whole: a collective."""
    return {
        canonical_name(name): (one.full_tensor() if isinstance(one, DTensor) else one).detach().clone()
        for name, one in trainer.model.named_parameters()
        if one.requires_grad
    }


def train(output: Path, cls: str, resume: str | None, arguments: dict[str, Any]) -> tuple[dict[str, Tensor], int]:
    """A job: train with the Trainer; the weights afterwards, and how many steps it took here."""
    with fresh_accelerate():
        trainer = trainer_of(output, cls, arguments)
        steps: list[int] = []
        trainer.add_callback(type("Count", (TrainerCallback,), {"on_step_end": lambda *_, **__: steps.append(1)}))
        trainer.train(resume_from_checkpoint=resume)
        weights = whole_weights(trainer)
        if hasattr(trainer.model_wrapped, "destroy"):
            trainer.model_wrapped.destroy()
        return weights, len(steps)


def zero2(**optimizer: Any) -> dict[str, Any]:
    return {
        "optimizer": optimizer,
        "train_micro_batch_size_per_gpu": ROWS,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 2},
    }


ADAN = {"lr": 4e-3, "weight_decay": 0.1}
BETAS = [0.9, 0.8, 0.95]


def betas_of(output: Path, config: dict[str, Any]) -> tuple[list[float], list[str]]:
    """A job: the betas that a Trainer's optimizer got, and what was said about them."""
    with fresh_accelerate(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = trainer_of(output, "", {"deepspeed": config, "max_steps": 1})
        trainer.train()
        betas = list(trainer.model_wrapped.basic_optimizer.param_groups[0]["betas"])
        trainer.model_wrapped.destroy()
        return betas, [str(one.message) for one in caught if "betas" in str(one.message)]


def test_a_trainers_betas_do_not_displace_shampoos_without_a_word(pool: Any, tmp_path: Path) -> None:
    config = zero2(type="Shampoo", params={"lr": "auto", "betas": "auto"})
    ((betas, said),) = pool(1).run(betas_of, tmp_path, config)
    assert betas == [0.9, 0.999]
    assert len(said) == 1
    assert 'leave "betas" out of "optimizer.params" for its default [0.9, 0.95]' in said[0]
    stated = {**config, "ds_optim": {"betas": [0.9, 0.95]}}
    assert pool(1).run(betas_of, tmp_path, stated) == [([0.9, 0.95], [])]


def plain_engine_loop() -> dict[str, Tensor]:
    """A job: what the Trainer does under DeepSpeed, written out."""
    import deepspeed
    from tiny import tiny_llama, windows

    data, rank, ranks = windows(), dist.get_rank(), dist.get_world_size()
    config = zero2(type="Adan", params={**ADAN, "betas": BETAS})
    model = tiny_llama()
    engine, *_ = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=config)
    for step in range(STEPS):
        start = (step * ranks + rank) * ROWS
        tokens = torch.stack([data[index]["input_ids"] for index in range(start, start + ROWS)])
        engine.backward(engine(input_ids=tokens, labels=tokens).loss)
        engine.step()
    weights = {name: one.detach().clone() for name, one in model.named_parameters()}
    engine.destroy()
    return weights


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    assert list(found) == list(wanted)
    for name, one in wanted.items():
        torch.testing.assert_close(found[name], one, rtol=tolerance, atol=tolerance, msg=partial("{}: {}".format, name))


TRAINERS_OWN = 5e-6 if TRANSFORMERS.is_before("5.10") else 1e-6  # older ones add the loss up otherwise


def test_the_trainer_under_zero_2_is_a_plain_engine_loop(pool: Any, tmp_path: Path) -> None:
    config = {**zero2(type="Adan", params={"lr": "auto", "weight_decay": "auto"}), "ds_optim": {"betas": BETAS}}
    given = {"deepspeed": config, "weight_decay": 0.1}
    by_trainer = pool(2).run(train, tmp_path, "", None, given)
    by_hand = pool(2).run(plain_engine_loop)
    for (found, _), wanted in zip(by_trainer, by_hand, strict=True):
        assert_close(found, wanted, TRAINERS_OWN)


def fsdp2(**config: Any) -> dict[str, Any]:
    return {
        "fsdp": True,
        "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], **config},
    }


@pytest.mark.parametrize("cls", ["AdamMini", "Shampoo"])
def test_fsdp2_through_the_trainer_is_one_device(cls: str, pool: Any, tmp_path: Path) -> None:
    ((alone, _),) = pool(1).run(train, tmp_path, cls, None, {"per_device_train_batch_size": 2 * ROWS})
    for sharded, _ in pool(2).run(train, tmp_path, cls, None, fsdp2()):
        assert_close(sharded, alone, 1e-4)


# Before 1.13, accelerate asks for none of the state that it saved of an FSDP2 optimizer in shards: with torch's own it
# goes on from zero moments, with ours it fails.
KINDS = ["SHARDED_STATE_DICT", "FULL_STATE_DICT"]
FROM_SHARDS = [
    pytest.param("AdamMini", fsdp2(), id="fsdp2-AdamMini"),
    pytest.param("Shampoo", fsdp2(state_dict_type="SHARDED_STATE_DICT"), id="fsdp2-sharded-Shampoo"),
]
if ACCELERATE.is_before("1.13"):
    KINDS, FROM_SHARDS = ["FULL_STATE_DICT"], []
# On CPUs the Trainer before 5.18 asks torch to restore to a device that torch does not know, "cpu:0".
ALONE = [] if TRANSFORMERS.is_before("5.18") else [pytest.param("SWAN", {}, id="ddp-SWAN")]


@pytest.mark.parametrize(
    ("cls", "given"),
    [
        pytest.param("", {"deepspeed": zero2(type="AdamMini", params={"lr": "auto"})}, id="zero2-AdamMini"),
        pytest.param("", {"deepspeed": zero2(type="Shampoo", params={"lr": "auto"})}, id="zero2-Shampoo"),
        *FROM_SHARDS,
        *ALONE,
    ],
)
def test_the_trainer_goes_on_from_its_own_checkpoint(
    cls: str, given: dict[str, Any], pool: Any, tmp_path: Path
) -> None:
    saving = {**given, "save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "linear"}
    through = pool(2).run(train, tmp_path, cls, None, saving)
    checkpoint = tmp_path / "checkpoint-3"
    resumed = pool(2).run(train, tmp_path, cls, str(checkpoint), {**saving, "save_strategy": "no"})
    for (found, steps), (wanted, _) in zip(resumed, through, strict=True):
        assert steps == STEPS - 3
        assert_close(found, wanted, 1e-6)


def going_on(
    saved: Path, stage: int, rows: int, window: int, optimizer: dict[str, Any], given: dict[str, Any]
) -> dict[str, Any]:
    """A job: the Trainer goes on from a checkpoint as it would at the ranks that saved it; what it then counts."""
    config = zero2(**optimizer) | {
        "zero_optimization": {"stage": stage},
        "train_micro_batch_size_per_gpu": rows,
        "gradient_accumulation_steps": window,
    }
    batch = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": window}
    with fresh_accelerate():
        trainer = trainer_of(saved.parent, "", {**given, **batch, "deepspeed": config, "save_strategy": "no"})
        rates: list[float] = []
        note = {"on_step_end": lambda *_, **__: rates.append(trainer.deepspeed.get_lr()[0])}
        trainer.add_callback(type("Rates", (TrainerCallback,), note))
        trainer.train(resume_from_checkpoint=str(saved))
        engine, state = trainer.deepspeed, trainer.state
        with deepspeed_gathered(trainer.model):
            weights = whole_weights(trainer)
        steps = {int(one["step"]) for one in engine.basic_optimizer.state.values() if "step" in one}
        found = {
            "weights": weights,
            "rates": rates,
            "counted": (engine.global_steps, state.global_step, *steps),
            "epoch": state.epoch,
            "losses": [entry["loss"] for entry in state.log_history if "loss" in entry],
        }
        engine.destroy()
        return found


@contextmanager
def deepspeed_gathered(model: nn.Module) -> Iterator[None]:
    import deepspeed

    cut = [parameter for parameter in model.parameters() if hasattr(parameter, "ds_id")]
    with deepspeed.zero.GatheredParameters(cut):
        yield


SAVING = {"save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "linear", "logging_steps": 1}


@pytest.mark.parametrize(
    ("optimizer", "ranks", "others", "stage", "rows", "window"),
    [
        ("AdamMini", 2, 1, 3, ROWS, 2),
        ("Shampoo", 2, 4, 2, ROWS // 2, 1),
        ("ds_optim.Lion", 3, 2, 3, ROWS // 2, 3),
    ],
)
def test_the_trainer_goes_on_on_other_ranks(
    pool: Any, tmp_path: Path, optimizer: str, ranks: int, others: int, stage: int, rows: int, window: int
) -> None:
    """Nothing is said but ``resume_from_checkpoint``. The same global batch: the same sequences, step for step."""
    named = {"type": optimizer, "params": {"lr": "auto"}}
    through = pool(ranks).run(train, tmp_path, "", None, {**SAVING, "deepspeed": zero2(**named)})[0][0]
    for found in pool(others).run(going_on, tmp_path / "checkpoint-3", stage, rows, window, named, SAVING):
        assert found["counted"] == (STEPS, STEPS, STEPS)
        assert found["rates"] == pytest.approx([4e-3 * (1 - step / STEPS) for step in range(4, STEPS + 1)])
        assert_close(found["weights"], through, 2e-4)


def test_with_another_global_batch_the_trainer_counts_in_its_steps(pool: Any, tmp_path: Path) -> None:
    """docs/transformers.md says so: 512 sequences, 3 steps of 8 taken; at 16 a step the Trainer leaves 48 out."""
    named = {"type": "AdamMini", "params": {"lr": "auto"}}
    pool(1).run(train, tmp_path, "", None, {**SAVING, "deepspeed": zero2(**named)})  # 4 sequences a step
    for found in pool(2).run(going_on, tmp_path / "checkpoint-3", 2, ROWS, 1, named, SAVING):
        assert found["counted"] == (STEPS, STEPS, STEPS)
        assert found["epoch"] == pytest.approx(STEPS * 2 * ROWS / 512)  # as if all six had been of 8


@pytest.mark.parametrize("kind", KINDS)
def test_fsdp2_through_the_trainer_goes_on_on_other_ranks(kind: str, pool: Any, tmp_path: Path) -> None:
    given = {**SAVING, **fsdp2(state_dict_type=kind)}
    through = pool(2).run(train, tmp_path, "AdamMini", None, given)[0][0]
    small = {**given, "per_device_train_batch_size": ROWS // 2, "save_strategy": "no"}
    for found, steps in pool(4).run(train, tmp_path, "AdamMini", str(tmp_path / "checkpoint-3"), small):
        assert steps == STEPS - 3
        assert_close(found, through, 2e-4)


def engine_of_accelerate(folder: Path, stage: int, rows: int, *, saves: bool) -> tuple[list[float], int, float]:
    """A job: three steps and a save, or a load; then the losses of three steps on the next sequences."""
    from accelerate import Accelerator, DeepSpeedPlugin
    from accelerate.utils import DummyOptim, DummyScheduler
    from tiny import tiny_llama, windows
    from torch.utils.data import DataLoader

    config = zero2(type="SWAN", params={"lr": 1e-3}) | {"zero_optimization": {"stage": stage}}
    config |= {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10, "warmup_max_lr": 1e-3}}}
    config["train_micro_batch_size_per_gpu"] = rows
    with fresh_accelerate():
        accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config))
        model = tiny_llama(0 if saves else 1)
        optimizer = DummyOptim(model.parameters())
        loader = DataLoader(windows(), batch_size=rows)
        model, optimizer, loader, _ = accelerator.prepare(model, optimizer, loader, DummyScheduler(optimizer))

        def steps(batches: Iterator[Any], count: int) -> list[float]:
            losses = []
            for _, batch in zip(range(count), batches, strict=False):
                loss = model(**batch).loss
                losses.append(float(accelerator.reduce(loss.detach(), "mean")))
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            return losses

        if saves:
            batches = iter(loader)
            steps(batches, 3)
            accelerator.save_state(str(folder))
        else:
            accelerator.load_state(str(folder))
            batches = iter(accelerator.skip_first_batches(loader, 3))
        found = steps(batches, 3), model.global_steps, model.get_lr()[0]
        model.destroy()
        return found


@pytest.mark.parametrize(("ranks", "others", "stage", "rows"), [(2, 1, 3, 2 * ROWS), (2, 4, 2, ROWS // 2)])
def test_accelerate_goes_on_on_other_ranks(
    pool: Any, tmp_path: Path, ranks: int, others: int, stage: int, rows: int
) -> None:
    (losses, counted, rate), *_ = pool(ranks).run(partial(engine_of_accelerate, saves=True), tmp_path, 2, ROWS)
    for found in pool(others).run(partial(engine_of_accelerate, saves=False), tmp_path, stage, rows):
        assert found[0] == pytest.approx(losses, abs=2e-5)
        assert found[1:] == (counted, rate) == (6, rate)


def accelerated(folder: Path, kind: str) -> list[float]:
    """A job: losses after three steps of Accelerate under FSDP2 that follow a save, and again after loading it."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from tiny import tiny_llama, windows

    tokens = torch.stack([row["input_ids"] for row in windows(8)[dist.get_rank() :: dist.get_world_size()]])

    def make() -> tuple[Any, nn.Module, Any]:
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type=kind)
        accelerator, model = Accelerator(fsdp_plugin=plugin), tiny_llama()
        optimizer = ds_optim.Shampoo(ds_optim.param_groups(model, 0.1), lr=3e-3, roles=model)
        return accelerator, *accelerator.prepare(model, optimizer)

    def steps(accelerator: Any, model: nn.Module, optimizer: Any) -> float:
        for _ in range(3):
            loss = model(input_ids=tokens, labels=tokens).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        return float(loss)

    with fresh_accelerate():
        made = make()
        steps(*made)
        made[0].save_state(str(folder))
        losses = [steps(*made)]
    with fresh_accelerate():
        made = make()
        made[0].load_state(str(folder))
        return [*losses, steps(*made)]


@pytest.mark.parametrize("kind", KINDS)
def test_accelerate_goes_on_from_its_own_checkpoint(kind: str, pool: Any, tmp_path: Path) -> None:
    for before, after in pool(2).run(accelerated, tmp_path, kind):
        assert after == before
