"""``ds-optim checkpoint convert --state-dtype``: state in another precision is what the optimizer would keep of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import ds_optim
from ds_optim import checkpoint
from ds_optim.checkpoint.command import checkpoint_app
from ds_optim.checkpoint.restate import restate
from ds_optim.errors import CheckpointError
from ds_optim.optimizers.registry import optimizers
from ds_optim.rule import WholeMatrix
from reference.eight_bits import kept

BLOCKS = {"max_preconditioner_dim": 72}  # some of 5,184 elements and smaller ones, which stay fp32
WRITTEN = sorted(Path(__file__).with_name("written").glob("*/canonical/Shampoo"))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(80, 90), nn.Linear(90, 80), nn.LayerNorm(80))


def optimizer_for(name: str, model: nn.Module, **options: Any) -> Any:
    blocks = BLOCKS if name in ("Shampoo", "SOAP") else {}
    return optimizers()[name](model.named_parameters(), roles=model, **blocks, **options)


def train(model: nn.Module, optimizer: Any, steps: range, seed: int) -> None:
    for step in steps:
        optimizer.zero_grad()
        inputs = torch.randn(3, 80, generator=torch.Generator().manual_seed(seed + step))
        model(inputs).square().mean().backward()
        optimizer.step()


def saved(folder: Path, name: str, seed: int, **options: Any) -> tuple[nn.Module, Any]:
    """A checkpoint of three steps, and what was saved."""
    model = network()
    optimizer = optimizer_for(name, model, **options)
    train(model, optimizer, range(3), seed)
    checkpoint.save(folder, model, optimizer, tag="it", client_state={"epoch": 3})
    return model, optimizer


def loaded(folder: Path, name: str, **options: Any) -> tuple[nn.Module, Any]:
    model = network()
    optimizer = optimizer_for(name, model, **options)
    assert checkpoint.load(folder, model, optimizer) == {"epoch": 3}
    return model, optimizer


def everything(model: nn.Module, optimizer: Any) -> dict[str, dict[str, Tensor]]:
    return {name: checkpoint.full_state(model, name, optimizer) for name, _ in model.named_parameters()}


@pytest.mark.parametrize("name", optimizers())
def test_fp32_state_is_what_eight_bits_stood_for(name: str, tmp_path: Path, seed: int) -> None:
    before = everything(*(was := saved(tmp_path / "old", name, seed, state_dtype="int8")))
    restate(tmp_path / "old", tmp_path / "new", model=network().to("meta"), state_dtype="fp32")
    model, optimizer = loaded(tmp_path / "new", name)
    found = everything(model, optimizer)
    assert not any(key.endswith(("_codes", "_scales")) for state in optimizer.state.values() for key in state)
    for parameter, state in before.items():
        assert found[parameter].keys() == state.keys()
        assert all(torch.equal(found[parameter][key], values) for key, values in state.items()), parameter
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), was[0].parameters(), strict=True))
    assert {int(state["step"]) for state in optimizer.state.values()} == {3}
    train(model, optimizer, range(3, 5), seed)


@pytest.mark.parametrize("name", optimizers())
def test_eight_bits_keep_of_fp32_state_what_a_step_would(name: str, tmp_path: Path, seed: int) -> None:
    before = everything(*saved(tmp_path / "old", name, seed))
    restate(tmp_path / "old", tmp_path / "new", model=network(), state_dtype="int8")
    model, optimizer = loaded(tmp_path / "new", name, state_dtype="int8")
    found = everything(model, optimizer)
    rule = optimizer.rule
    per_element = {*rule.element_state, *(rule.others.element_state if isinstance(rule, WholeMatrix) else ())}
    signs = {"exp_avg_sq": False, "graft": False, "second_moment": False}
    in_codes = 0
    for parameter, state in before.items():
        for key, values in state.items():
            got = found[parameter][key]
            if key in per_element and not torch.equal(got, values):
                assert values.numel() >= 4096
                in_codes += 1
                for part, its in zip(parts(name, key, values), parts(name, key, got), strict=True):
                    wanted = kept(part, is_signed=signs.get(key, True)) if part.numel() >= 4096 else part
                    assert torch.equal(its + 0.0, wanted + 0.0), (parameter, key)
            else:
                assert torch.equal(got, values), (parameter, key)
    assert in_codes or name == "SWAN"
    train(model, optimizer, range(3, 5), seed)


def parts(name: str, key: str, values: Tensor) -> list[Tensor]:
    """What has scales of its own: blocks of a grid, which stand one behind the other, or all of a parameter."""
    flat = values.flatten()
    if name not in ("Shampoo", "SOAP") or key not in ("momentum", "graft", "second_moment"):
        return [flat]
    assert flat.numel() == 80 * 90
    return [*flat.split([72 * 72, 72 * 18, 8 * 72, 8 * 18])] if values is not None else []


def test_bf16_state_rounds_and_comes_back(tmp_path: Path, seed: int) -> None:
    before = everything(*saved(tmp_path / "old", "AdamW", seed))
    restate(tmp_path / "old", tmp_path / "new", model=network(), state_dtype="bf16")
    found = everything(*loaded(tmp_path / "new", "AdamW", state_dtype="bf16"))
    for parameter, state in before.items():
        assert all(torch.equal(found[parameter][key], values.bfloat16()) for key, values in state.items())


@pytest.mark.parametrize("folder", WRITTEN, ids=lambda path: path.parent.parent.name)
def test_checkpoints_of_former_versions_too(folder: Path, tmp_path: Path) -> None:
    """Whose symmetric matrices stood there whole."""
    from engines import WIDER, Case, build_model

    model = build_model(Case("Shampoo", sizes=WIDER))
    made = restate(folder, tmp_path, model=model, state_dtype="bf16")
    old, new = (json.loads((one / "about.json").read_text()) for one in (folder / "written", made))
    assert new["format"] == 2
    assert new["parameters"].keys() == old["parameters"].keys()
    named = dict(model.named_parameters())
    groups = [{"params": [(name, named[name]) for name in group["parameters"]]} for group in old["groups"]]
    small = {"max_preconditioner_dim": 8, "precondition_frequency": 4}
    optimizer = ds_optim.Shampoo(groups, roles=model, state_dtype="bf16", **small)
    checkpoint.load(tmp_path, model, optimizer)


def test_the_command_and_what_it_refuses(tmp_path: Path, seed: int) -> None:
    import transformers

    shape = {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "vocab_size": 80,
    }
    config = transformers.AutoConfig.for_model(**shape, num_attention_heads=2, num_key_value_heads=2)
    model = transformers.AutoModelForCausalLM.from_config(config)
    optimizer = ds_optim.AdamW(model.named_parameters(), roles=model)
    model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    optimizer.step()
    checkpoint.save(tmp_path / "old", model, optimizer)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    (tmp_path / "other.json").write_text(json.dumps({**config.to_dict(), "hidden_size": 32}))

    def command(*given: str) -> tuple[int, str]:
        listed = ["convert", str(tmp_path / "old"), *given]
        result = CliRunner(env={"COLUMNS": "200"}).invoke(checkpoint_app, listed)
        return result.exit_code, result.output

    model_option = ["--model", str(tmp_path / "config.json")]
    for options, said in (
        ([str(tmp_path / "new"), "--state-dtype", "int8"], "give --model"),
        ([str(tmp_path / "new"), "--int8-embeddings", *model_option], "give --state-dtype int8 too"),
        (
            [str(tmp_path / "new"), "--state-dtype", "fp32", "--int8-embeddings", *model_option],
            "int8_embeddings is of state in eight bits",
        ),
        ([str(tmp_path / "new"), "--state-dtype", "int4", *model_option], "state_dtype must be fp32, bf16 or int8"),
        ([str(tmp_path / "old"), "--state-dtype", "int8", *model_option], "give another directory"),
        (
            [str(tmp_path / "new"), "--state-dtype", "int8", "--model", str(tmp_path / "other.json")],
            "model.embed_tokens.weight has shape (80, 64) in the checkpoint, (80, 32) in the model",
        ),
    ):
        status, output = command(*options)
        assert (status, said in output) == (1, True), output
        assert not (tmp_path / "new").exists()
    status, output = command(str(tmp_path / "new"), "--state-dtype", "int8", *model_option, "--int8-embeddings")
    assert status == 0, output
    about = json.loads((tmp_path / "new" / "step1" / "about.json").read_text())
    assert about["structure"] == {"state_dtype": "int8", "int8_embeddings": True}
    assert "exp_avg_codes" in about["parameters"]["model.embed_tokens.weight"]["state"]
    assert "exp_avg" in about["parameters"]["model.norm.weight"]["state"]


def test_other_roles_and_weights_alone_are_refused(tmp_path: Path, seed: int) -> None:
    model, _ = saved(tmp_path / "old", "Shampoo", seed)
    with pytest.raises(CheckpointError, match=r"0\.weight is something else in this model: roles differ"):
        restate(tmp_path / "old", tmp_path / "new", model=model, state_dtype="int8", roles={"0.weight": "embedding"})
    checkpoint.save(tmp_path / "weights", model)
    with pytest.raises(CheckpointError, match="a model without optimizer"):
        restate(tmp_path / "weights", tmp_path / "new", model=model, state_dtype="int8")
