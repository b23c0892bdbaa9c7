"""DeepSpeed's own checkpoints become canonical ones offline: the same bits as a save, or a refusal that says why."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from torch import nn
from typer.testing import CliRunner

from damage import flip, remove, truncate
from ds_optim import checkpoint
from ds_optim.checkpoint.command import checkpoint_app
from ds_optim.checkpoint.convert import convert
from ds_optim.checkpoint.directory import read_about
from ds_optim.errors import CheckpointError
from engines import VOCABULARY, WIDTH, Case, build_model, engine_for, train
from pool import Pools
from test_canonical_checkpoint import same_bits, stored

STEPS = 3
ADAM_MINI = {"optimizer": {"type": "AdamMini"}}
SHAMPOO = {"max_preconditioner_dim": 8, "precondition_frequency": 2}
OFFLOAD = {"offload_optimizer": {"device": "cpu", "pin_memory": False}}
ROUND_ROBIN = {"round_robin_gradients": True, "parameter_alignment": True}
if "parameter_alignment" not in DeepSpeedZeroConfig.model_fields:  # it came with 0.19.7
    del ROUND_ROBIN["parameter_alignment"]
SMALL = {"sub_group_size": 300}
SCHEDULE = {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 20, "warmup_max_lr": 0.01}}}


def save_both(case: Case, folder: str) -> None:
    """DeepSpeed's checkpoint and ours at the same moment."""
    with engine_for(case) as (engine, model, clock):
        model.register_buffer("seen", torch.arange(5.0))
        train(engine, case, clock, range(1, STEPS + 1))
        engine.save_checkpoint(f"{folder}/theirs", client_state={"epoch": 3})
        checkpoint.save(f"{folder}/ours", engine, client_state={"epoch": 3})


def load_and_save(case: Case, folder: str, again: str) -> None:
    """Into a fresh engine of other weights, and out of it."""
    with engine_for(replace(case, seed=1)) as (engine, model, _):
        model.register_buffer("seen", torch.zeros(5))
        assert checkpoint.load(folder, engine) == {"epoch": 3}
        assert engine.global_steps == STEPS
        checkpoint.save(again, engine)


def model_of(case: Case) -> nn.Module:
    """The case's model, without values."""
    with torch.device("meta"):
        model = build_model(case)
        model.register_buffer("seen", torch.zeros(5))
        return model


@dataclass(frozen=True)
class Conversion:
    case: Case
    ranks: int = 2
    other: Case | None = None  # what loads it, on three ranks
    needs_model: bool = True


CONVERSIONS = {
    "adamw-0-fp32": Conversion(Case("ds_optim.AdamW", {"weight_decay": 0.1}, stage=0, tied=True)),
    "adam-mini-0-bf16": Conversion(Case("AdamMini", stage=0, precision="bf16")),
    "shampoo-0-bf16": Conversion(
        Case("Shampoo", SHAMPOO, stage=0, precision="bf16"), other=Case("Shampoo", SHAMPOO, stage=2)
    ),
    "adamw-1-bf16-optimizer": Conversion(
        Case("ds_optim.AdamW", {"weight_decay": 0.1}, stage=1, precision="bf16_optimizer", frozen=("extra",)),
        needs_model=False,
    ),
    "adam-mini-1-round-robin": Conversion(
        Case("AdamMini", stage=1, tied=True, user_groups=True, zero=ROUND_ROBIN), ranks=3
    ),
    "lion-2-bf16-state": Conversion(
        Case("ds_optim.Lion", {"state_dtype": "bf16"}, stage=2, precision="bf16", frozen=("norm",)), needs_model=False
    ),
    "shampoo-2-bf16": Conversion(
        Case("Shampoo", SHAMPOO, stage=2, precision="bf16", zero=OFFLOAD, extra=SCHEDULE), ranks=3
    ),
    "adamw-2-fp16": Conversion(
        Case("ds_optim.AdamW", stage=2, precision="fp16"), other=Case("ds_optim.AdamW", stage=3), needs_model=False
    ),
    "adam-mini-3-bf16": Conversion(
        Case("AdamMini", stage=3, precision="bf16", zero=SMALL, frozen=("extra", "norm")),
        other=Case("AdamMini", stage=2, frozen=("extra", "norm")),
    ),
    "swan-3-fp32": Conversion(Case("SWAN", stage=3, zero=SMALL)),
}


@pytest.mark.parametrize("conversion", CONVERSIONS.values(), ids=CONVERSIONS)
def test_a_converted_checkpoint_is_the_one_that_a_save_would_have_written(
    pool: Pools, conversion: Conversion, tmp_path: Path
) -> None:
    pool(conversion.ranks).run(save_both, conversion.case, str(tmp_path))
    made = convert(
        tmp_path / "theirs",
        tmp_path / "converted",
        model=model_of(conversion.case) if conversion.needs_model else None,
    )
    ours = tmp_path / "ours" / f"global_step{STEPS}"
    assert made.name == ours.name
    assert same_bits(stored(ours), stored(made))
    about, converted = read_about(ours), read_about(made)
    assert about.pop("saved") <= converted.pop("saved")
    assert about == converted
    objects = [torch.load(folder / "objects.pt", weights_only=False) for folder in (ours, made)]
    assert objects[0] == objects[1]
    if conversion.other is not None:
        pool(3).run(load_and_save, conversion.other, str(tmp_path / "converted"), str(tmp_path / "again"))
        loaded, again = stored(made), stored(tmp_path / "again" / made.name)
        for name in loaded:
            if name.startswith("module."):  # what is not trained has the model's precision
                loaded[name], again[name] = loaded[name].bfloat16(), again[name].bfloat16()
        assert same_bits(loaded, again)


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(pool: Pools, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One checkpoint of each kind, of two ranks."""
    found = {}
    for name, case in {
        "adamw": Case("ds_optim.AdamW", stage=2, precision="bf16"),
        "shampoo": Case("Shampoo", SHAMPOO, stage=3),
        "mini": Case("AdamMini", stage=0, precision="bf16"),
        "grouped": Case("AdamMini", stage=0, user_groups=True),
        "by hand": Case("AdamMini", stage=2, client=True),
    }.items():
        found[name] = tmp_path_factory.mktemp("theirs")
        pool(2).run(save_both, case, str(found[name]))
    return found


def copied(saved: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A copy of DeepSpeed's directory, to be damaged, and the checkpoint's folder in it."""
    shutil.copytree(saved / "theirs", tmp_path / "theirs")
    return tmp_path / "theirs", tmp_path / "theirs" / f"global_step{STEPS}"


OPTIMIZER_1 = "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
DAMAGES = [
    ("adamw", OPTIMIZER_1, remove, "missing"),
    ("adamw", OPTIMIZER_1, truncate, "damaged"),
    ("adamw", OPTIMIZER_1, flip, "checksum"),
    ("adamw", "mp_rank_00_model_states.pt", flip, "checksum"),
    ("adamw", "mp_rank_00_model_states.pt", remove, "no DeepSpeed checkpoint, or damaged"),
    ("shampoo", "zero_pp_rank_1_mp_rank_00_model_states.pt", remove, "missing"),
    ("shampoo", "zero_pp_rank_0_mp_rank_00_optim_states.pt", truncate, "damaged"),
]


@pytest.mark.parametrize(("which", "file", "damage", "word"), DAMAGES)
def test_a_damaged_file_is_named(
    saved: dict[str, Path], tmp_path: Path, which: str, file: str, damage: Callable[[Path], None], word: str
) -> None:
    theirs, folder = copied(saved[which], tmp_path)
    damage(folder / file)
    with pytest.raises(CheckpointError, match=word) as refusal:
        convert(theirs, tmp_path / "out", model=model_of(Case("")))
    assert file in str(refusal.value) or "*_model_states.pt" in str(refusal.value)
    assert not (tmp_path / "out").exists()


class Wide(nn.Module):
    """Not the model that was trained."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Linear(22, 5)


def test_what_is_needed_is_asked_for(saved: dict[str, Path], tmp_path: Path) -> None:
    def refused(which: str, **given: Any) -> str:
        with pytest.raises(CheckpointError) as refusal:
            convert(saved[which] / "theirs", tmp_path / "out", **given)
        assert not (tmp_path / "out").exists()
        return str(refusal.value)

    model = model_of(Case(""))
    for which, reason in (("shampoo", "blocks of Shampoo"), ("mini", "ZeRO stage 0")):
        message = refused(which)
        assert reason in message
        assert "--model" in message
    assert "--deepspeed" in refused("by hand", model=model)
    assert "global_step7" in refused("adamw", tag="global_step7")
    message = refused("shampoo", model=Wide())
    assert f"extra.weight has shape (5, {WIDTH}) in the checkpoint, (5, 22) in the model" in message
    assert "the model has no parameter gain" in message
    assert "not saved by Adan" in refused("adamw", deepspeed_config={"optimizer": {"type": "Adan"}})
    with pytest.warns(UserWarning, match="Lion has no eps"):
        assert "the state has" in refused("adamw", deepspeed_config={"optimizer": {"type": "ds_optim.Lion"}})
    roles = {"ds_optim": {"roles": {"*q_proj.weight": "mlp"}}, **ADAM_MINI}
    assert "other roles" in refused("by hand", model=model, deepspeed_config=roles)
    assert "none of" in refused("adamw", deepspeed_config={"optimizer": {"type": "AdamW"}})

    made = convert(saved["by hand"] / "theirs", tmp_path / "made", model=model, deepspeed_config=ADAM_MINI)
    assert same_bits(stored(saved["by hand"] / "ours" / made.name), stored(made))


def without_names(saved: Path, folder: Path) -> Path:
    """DeepSpeed's directory of ZeRO-0, as optimizers without names of their parameters would have left it."""
    shutil.copytree(saved / "theirs", folder)
    main = folder / f"global_step{STEPS}" / "mp_rank_00_model_states.pt"
    state = torch.load(main, weights_only=False)
    states = state["optimizer"].get("optimizer_state_dict", state["optimizer"])
    assert states.pop("param_names")
    torch.save(state, main)
    return folder


def test_groups_of_zero_0_are_told_by_names_or_made_again(saved: dict[str, Path], tmp_path: Path) -> None:
    model = model_of(Case(""))
    made = convert(saved["grouped"] / "theirs", tmp_path / "made", model=model, deepspeed_config=ADAM_MINI)
    assert same_bits(stored(saved["grouped"] / "ours" / made.name), stored(made))
    grouped = without_names(saved["grouped"], tmp_path / "grouped")
    with pytest.raises(CheckpointError, match=r"parameter groups have \["):
        convert(grouped, tmp_path / "out", model=model)
    mini = without_names(saved["mini"], tmp_path / "mini")
    others = {"ds_optim": {"no_decay": ["*layers.0.mlp*", "extra.weight"]}, **ADAM_MINI}
    with pytest.raises(CheckpointError, match="weights in"):
        convert(mini, tmp_path / "out", model=model, deepspeed_config=others)
    made = convert(mini, tmp_path / "again", model=model)
    assert same_bits(stored(saved["mini"] / "ours" / made.name), stored(made))


class Executed:
    """Unpickling it leaves a trace."""

    def __reduce__(self) -> Any:
        return Path.touch, (self.trace,)

    def __init__(self, trace: Path) -> None:
        self.trace = trace


def test_code_in_a_checkpoint_is_not_run_unasked(saved: dict[str, Path], tmp_path: Path) -> None:
    theirs, folder = copied(saved["adamw"], tmp_path)
    main = folder / "mp_rank_00_model_states.pt"
    state = torch.load(main, weights_only=True)
    torch.save({**state, "note": Executed(tmp_path / "trace")}, main)
    with pytest.raises(CheckpointError, match=r"mp_rank_00_model_states.pt cannot be read.*--trust"):
        convert(theirs, tmp_path / "out")
    assert not (tmp_path / "trace").exists()
    convert(theirs, tmp_path / "out", trust=True)
    assert (tmp_path / "trace").exists()


# -- commands ---------------------------------------------------------------------------------------------------------


def run(*arguments: Any, status: int = 0) -> str:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(checkpoint_app, [str(one) for one in arguments])
    assert result.exit_code == status, result.output
    return result.output


def test_the_commands_convert_list_and_check(saved: dict[str, Path], tmp_path: Path) -> None:
    theirs = saved["adamw"] / "theirs"
    assert "convert" in run("inspect", theirs, status=1)
    assert "convert" in run("verify", theirs, status=1)
    run("convert", theirs, tmp_path / "out")
    folder = tmp_path / "out" / f"global_step{STEPS}"
    tensors = stored(folder)

    found = json.loads(run("inspect", tmp_path / "out", "--json"))
    assert found["optimizer"] == "AdamW"
    assert found["engine"]["global_steps"] == STEPS
    assert set(found["parameters"]) == {name.removeprefix("weights.") for name in tensors if name.startswith("weights")}
    embedding = found["parameters"]["llama.model.embed_tokens.weight"]
    assert [embedding[key] for key in ("shape", "dtype", "step")] == [[VOCABULARY, WIDTH], "float32", STEPS]
    assert embedding["bytes"] == {"weights": VOCABULARY * WIDTH * 4, "state": 2 * VOCABULARY * WIDTH * 4}
    sizes = found["bytes"]
    assert sizes["weights"] + sizes["state"] + sizes["module"] == sum(t.numel() * t.itemsize for t in tensors.values())
    assert sizes["files"] == sum(path.stat().st_size for path in folder.iterdir() if path.name != "manifest.json")

    table = run("inspect", folder)
    for text in (
        "AdamW",
        "llama.model.embed_tokens.weight",
        f"{VOCABULARY}x{WIDTH}",
        f"exp_avg_sq float32 x {VOCABULARY * WIDTH}",
        "seen",
        "not trained",
    ):
        assert text in table
    assert "is whole" in run("verify", tmp_path / "out")
    shard = next(folder.glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(bytes(content))
    assert f"{shard.name} was changed" in run("verify", tmp_path / "out", status=1)
    shard.unlink()
    assert f"{shard.name} is missing" in run("verify", folder, status=1)
    (folder / "about.json").unlink()
    assert "about.json" in run("inspect", folder, status=1)
    assert "nothing" in run("verify", tmp_path / "out", "--tag", "nothing", status=1)


def test_the_commands_take_a_model_config(pool: Pools, tmp_path: Path) -> None:
    pool(2).run(save_llama, str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "other.json").write_text(json.dumps({**LLAMA, "hidden_size": 32}))
    (tmp_path / "broken.json").write_text("{")
    arguments = ("convert", tmp_path / "theirs", tmp_path / "out", "--model")
    assert "has shape" in run(*arguments, tmp_path / "other.json", status=1)
    assert "is not JSON" in run(*arguments, tmp_path / "broken.json", status=1)
    assert "written" in run(*arguments, tmp_path / "config.json")
    assert same_bits(stored(tmp_path / "ours" / "global_step1"), stored(tmp_path / "out" / "global_step1"))


LLAMA = {
    "model_type": "llama",
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def save_llama(folder: str) -> None:
    """A model as transformers makes it, by AdamMini at ZeRO-2."""
    import deepspeed
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**LLAMA))
    config = {**Case("AdamMini", stage=2).config(), "ds_optim": {"roles": {"*o_proj.weight": "mlp"}}}
    engine, *_ = deepspeed.initialize(model=model, config=config)
    tokens = torch.arange(8).view(1, 8)
    engine.backward(engine(input_ids=tokens, labels=tokens).loss)
    engine.step()
    engine.save_checkpoint(f"{folder}/theirs")
    checkpoint.save(f"{folder}/ours", engine)
    engine.destroy()


# -- what DeepSpeed's own conversion would do -------------------------------------------------------------------------


@dataclass(frozen=True)
class Universal:
    """What becomes of an optimizer's checkpoint.

    Attributes:
        outcome: how `deepspeed.checkpoint.ds_to_universal` ends: "whole", "drops" or "breaks".
        said: by `inspect`.
    """

    optimizer: str
    stage: int
    outcome: str
    said: str


BREAKS = "breaks half-way: it needs exp_avg and exp_avg_sq of every element"
UNIVERSAL = [
    Universal("ds_optim.AdamW", 2, "whole", "takes over exp_avg and exp_avg_sq, which is all there is"),
    Universal("Adan", 3, "drops", "drops exp_avg_diff, previous_grad without a word"),
    Universal("ds_optim.Lion", 3, "breaks", BREAKS),
    Universal("AdamMini", 2, "breaks", BREAKS),
    Universal("Shampoo", 2, "breaks", BREAKS),
    Universal("SWAN", 3, "breaks", BREAKS),
]


def save_theirs(folder: str) -> None:
    for number, one in enumerate(UNIVERSAL):
        case = Case(one.optimizer, SHAMPOO if one.optimizer == "Shampoo" else {}, stage=one.stage)
        with engine_for(case) as (engine, _, clock):
            train(engine, case, clock, range(1, 2))
            engine.save_checkpoint(f"{folder}/{number}")


def test_inspect_says_what_deepspeeds_universal_conversion_really_does(pool: Pools, tmp_path: Path) -> None:
    from deepspeed.checkpoint import ds_to_universal

    pool(2).run(save_theirs, str(tmp_path))
    for number, one in enumerate(UNIVERSAL):
        theirs, universal = tmp_path / str(number), tmp_path / f"{number} universal"
        said = run("inspect", theirs, status=1)
        stage = "3" if one.stage == 3 else "1 or 2"
        assert f"of {one.optimizer} at ZeRO stage {stage} on 2 ranks." in said
        assert "goes on from it with the same optimizer on any ranks and at any ZeRO stage" in said
        assert f"deepspeed.checkpoint.ds_to_universal {one.said}" in said
        arguments = {"input_folder": str(theirs / "global_step1"), "output_folder": str(universal)}
        workers = {"num_extract_workers": 1, "num_merge_workers": 1}
        options = {"inject_missing_state": True, "keep_temp_folder": False, "strict": True}
        try:
            ds_to_universal.main(SimpleNamespace(**arguments, **workers, **options))
        except (KeyError, RuntimeError):
            assert one.outcome == "breaks"
        else:
            assert one.outcome != "breaks"
            kept = {path.stem for path in (universal / "zero" / "llama.model.norm.weight").iterdir()}
            assert {"exp_avg", "exp_avg_sq", "fp32"} <= kept <= {"exp_avg", "exp_avg_sq", "fp32", "step"}
