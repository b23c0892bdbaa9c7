"""State in eight bits in checkpoints of every form: it goes on elsewhere with the same bits, and is started from AdamW.

As in `test_eight_bit_state`, parameters of 300 elements are enough.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ds_optim
import resumption
import test_checkpoint_convert
import test_engine_checkpoints
import test_mesh_checkpoints
from ds_optim import checkpoint
from ds_optim.checkpoint.convert import convert
from ds_optim.checkpoint.warm_start import warm_start
from ds_optim.errors import CheckpointError
from ds_optim.kernels import codes
from ds_optim.optimizers.registry import optimizers
from ds_optim.stepping.eight_bits import coded_keys
from engines import Case, assembled
from expected import by_one_process
from meshes import MeshCase
from pool import Pools
from reference.eight_bits import kept
from resumption import K, relative_difference, same_bits, stored
from test_eight_bit_state import in_codes, with_small_ones

SMALL = {"sub_group_size": 300}
OFFLOAD = {"offload_optimizer": {"device": "cpu", "pin_memory": False}}


@pytest.mark.parametrize(
    ("ranks", "before", "other_ranks", "after"),
    [
        (2, in_codes("ds_optim.AdamW", stage=2), 3, in_codes("ds_optim.AdamW", stage=3, precision="bf16", zero=SMALL)),
        (3, in_codes("AdamMini", stage=3), 2, in_codes("AdamMini", stage=1, precision="bf16")),
        (3, in_codes("Adan", stage=1), 1, in_codes("Adan", stage=0, precision="bf16")),
        (1, in_codes("ds_optim.Lion", stage=0), 3, in_codes("ds_optim.Lion", stage=2, zero=OFFLOAD)),
        (2, in_codes("Shampoo", stage=2), 3, in_codes("Shampoo", stage=3)),
        (3, in_codes("ds_optim.Muon", stage=3), 2, in_codes("ds_optim.Muon", stage=1, precision="bf16")),
        (2, in_codes("SOAP", stage=1), 3, in_codes("SOAP", stage=2, zero=OFFLOAD)),
    ],
    ids=lambda one: f"{one.optimizer}-{one.stage}" if isinstance(one, Case) else str(one),
)
def test_a_run_goes_on_elsewhere_as_if_nothing_had_happened(
    pool: Pools, ranks: int, before: Case, other_ranks: int, after: Case, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    undisturbed = assembled(pool(ranks).run(with_small_ones, resumption.uninterrupted, before, str(first)))
    reports = pool(other_ranks).run(with_small_ones, resumption.resumed, after, str(first), str(second))
    tensors, again = stored(first / f"global_step{K}"), stored(second / f"global_step{K}")
    assert any(values.dtype == torch.uint8 for values in tensors.values())
    assert same_bits(tensors, again)
    found = assembled(reports)
    if before.optimizer == "AdamMini":  # the sums of cut blocks are added up in another order
        assert relative_difference(found, undisturbed) <= 1e-6
    else:
        assert same_bits(found, undisturbed)


@pytest.mark.parametrize(
    ("name", "ranks", "strategy", "other_ranks", "other"),
    [
        ("ds_optim.AdamW", 3, "fsdp", 2, "ddp"),
        ("AdamMini", 2, "fsdp", 3, "fsdp"),
        ("Shampoo", 3, "fsdp", 1, "single"),
        ("NorMuon", 2, "ddp", 3, "fsdp"),
        ("SOAP", 3, "fsdp", 2, "ddp"),
    ],
)
def test_meshes_go_on_under_another_strategy(
    pool: Pools, name: str, ranks: int, strategy: str, other_ranks: int, other: str, tmp_path: Path
) -> None:
    case, folder = in_codes(name, steps=test_mesh_checkpoints.STEPS), str(tmp_path / "first")
    pool(ranks).run(with_small_ones, test_mesh_checkpoints.first_part, MeshCase(case, strategy), folder)
    wanted = with_small_ones(by_one_process, case)
    for found in pool(other_ranks).run(
        with_small_ones, test_mesh_checkpoints.second_part, MeshCase(case, other), folder
    ):
        if name == "AdamMini":
            assert relative_difference(found, wanted) <= 1e-6
        else:
            assert same_bits(found, wanted)


@pytest.mark.parametrize("name", ["AdamMini", "ds_optim.Lion"])
def test_deepspeeds_own_directory_is_converted(pool: Pools, name: str, tmp_path: Path) -> None:
    case = in_codes(name, stage=2)
    pool(2).run(with_small_ones, test_checkpoint_convert.save_both, case, str(tmp_path))
    model = test_checkpoint_convert.model_of(case)
    made = with_small_ones(lambda: convert(tmp_path / "theirs", tmp_path / "converted", model=model))
    assert same_bits(stored(tmp_path / "ours" / made.name), stored(made))
    with pytest.raises(CheckpointError, match="give the model"):
        with_small_ones(convert, tmp_path / "theirs", tmp_path / "again")


@pytest.mark.parametrize(
    "case",
    [
        in_codes("ds_optim.AdamW", stage=2, precision="bf16"),
        in_codes("AdamMini", stage=3, zero=SMALL),
        in_codes("Adan", stage=0, precision="bf16"),
        in_codes("Shampoo", stage=1),
    ],
    ids=lambda case: f"{case.optimizer}-{case.stage}",
)
def test_deepspeeds_own_directory_goes_on_with_the_same_bits(pool: Pools, case: Case, tmp_path: Path) -> None:
    for same, dtypes, _, _ in pool(2).run(with_small_ones, test_engine_checkpoints.interrupted, case, str(tmp_path)):
        assert same
        assert any(one.endswith("_codes torch.uint8") for one in dtypes)


# -- one process ------------------------------------------------------------------------------------------------------


def model_of() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(90, 70), nn.LayerNorm(70), nn.Linear(70, 60))


def steps_of(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        for index, parameter in enumerate(model.parameters()):
            seeded = torch.Generator().manual_seed(100 * step + index)
            parameter.grad = torch.randn(parameter.shape, generator=seeded) * 1e-2
        optimizer.step()


def made(name: str, model: nn.Module, **options: Any) -> Any:
    return optimizers()[name](model.named_parameters(), lr=1e-3, roles=model, **options)


def values_of(state: dict[str, Tensor], key: str, code: codes.Code) -> Tensor:
    """State of one parameter as fp32, flat, where it is in eight bits: of one tile at most."""
    names = coded_keys(key)
    return codes.decode_rows(state[names.codes].view(1, -1), state[names.scales][None], code)[0]


@pytest.mark.parametrize("name", list(optimizers()))
def test_a_state_dict_goes_on_with_the_same_bits(name: str) -> None:
    model = model_of()
    optimizer = made(name, model, state_dtype="int8")
    steps_of(model, optimizer, range(3))
    twin = copy.deepcopy(model)
    other = made(name, twin, state_dtype="int8")
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, its in ((model, optimizer), (twin, other)):
        steps_of(one, its, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_state_of_another_dtype_is_refused_with_both_named(tmp_path: Path) -> None:
    model = model_of()
    plain, coded = made("Lion", model), made("Lion", model, state_dtype="int8")
    steps_of(model, plain, range(2))
    with pytest.raises(ValueError, match=r"exp_avg.*keeps \['exp_avg_codes', 'exp_avg_scales', 'step'\]"):
        coded.load_state_dict(plain.state_dict())
    checkpoint.save(tmp_path, model, plain)
    with pytest.raises(CheckpointError, match="state_dtype is 'float32' in the checkpoint, 'int8' here"):
        checkpoint.load(tmp_path, model, coded)


@pytest.mark.parametrize("name", list(optimizers()))
def test_a_warm_start_is_kept_in_eight_bits(name: str) -> None:
    model = model_of()
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-3)
    steps_of(model, adamw, range(4))
    exact, coded = made(name, model), made(name, model, state_dtype="int8")
    for optimizer in (exact, coded):
        warm_start(adamw.state_dict(), model, optimizer)
    rule, compared = optimizers()[name].rule, 0
    state_codes = dict(zip(rule.element_state, rule.codes, strict=True))
    for parameter in model.parameters():
        found, wanted = coded.state[parameter], exact.state[parameter]
        for key, code in state_codes.items():
            if coded_keys(key).codes in found:
                values = values_of(found, key, code)
                assert torch.equal(values, kept(wanted[key].view(-1), is_signed=code == "signed"))
                compared += 1
        plain = [key for key in wanted if key in found]
        assert all(torch.equal(found[key], wanted[key]) for key in plain)
    assert compared or name == "SWAN"


def test_adamw_in_eight_bits_starts_others(tmp_path: Path) -> None:
    model = model_of()
    adamw = made("AdamW", model, state_dtype="int8")
    steps_of(model, adamw, range(4))
    checkpoint.save(tmp_path, model, adamw)
    other = made("AdamW", model)
    warm_start(tmp_path, model, other)
    state, weight = adamw.state[model[0].weight], model[0].weight
    assert torch.equal(other.state[weight]["exp_avg"].view(-1), values_of(state, "exp_avg", "signed"))
    assert torch.equal(other.state[weight]["exp_avg_sq"].view(-1), values_of(state, "exp_avg_sq", "unsigned"))


def test_the_full_state_of_a_parameter_is_what_its_codes_say() -> None:
    model = model_of()
    optimizer = made("AdamMini", model, state_dtype="int8")
    steps_of(model, optimizer, range(2))
    found = checkpoint.full_state(model, "0.weight", optimizer)
    assert found.keys() == {"exp_avg", "exp_avg_sq"}
    assert found["exp_avg"].shape == (70, 90)
    state = optimizer.state[model[0].weight]
    assert torch.equal(found["exp_avg"].view(-1), values_of(state, "exp_avg", "signed"))


@pytest.mark.parametrize(
    ("name", "options", "steps", "blocks"),
    [
        ("Muon", {}, 1, [70 * 90]),
        ("NorMuon", {}, 1, [70 * 90]),
        ("Shampoo", {"max_preconditioner_dim": 64}, 1, [64 * 64, 64 * 26, 6 * 64, 6 * 26]),
        ("SOAP", {"max_preconditioner_dim": 64}, 2, [64 * 64, 64 * 26, 6 * 64, 6 * 26]),  # its first gives bases alone
    ],
)
def test_the_full_state_of_a_matrix_is_what_its_codes_say(
    name: str, options: dict[str, Any], steps: int, blocks: list[int]
) -> None:
    """Block behind block, as without codes, whether a block is large enough for them or not."""
    found, rule = {}, optimizers()[name].rule
    for state_dtype in ("fp32", "int8"):
        model = model_of()
        optimizer = made(name, model, state_dtype=state_dtype, **options)
        steps_of(model, optimizer, range(steps))
        found[state_dtype] = checkpoint.full_state(model, "0.weight", optimizer)
    assert any(key.endswith("_codes") for key in optimizer.state[model[0].weight])
    assert {key: values.shape for key, values in found["int8"].items()} == {
        key: values.shape for key, values in found["fp32"].items()
    }
    for key, values in found["fp32"].items():
        code, wanted = dict(zip(rule.element_state, rule.codes, strict=True)).get(key), values
        if code is not None:
            wanted = torch.cat([
                kept(one, is_signed=code == "signed") if one.numel() >= 4096 else one for one in values.split(blocks)
            ])  # fmt: skip
            assert not torch.equal(wanted, values)
        assert torch.equal(found["int8"][key], wanted)


def test_pickles_keep_the_option() -> None:
    model = model_of()
    optimizer = made("AdamW", model, state_dtype="int8")
    assert copy.deepcopy(optimizer).options == optimizer.options
    assert isinstance(optimizer, ds_optim.AdamW)
