"""Checkpoints under torch's own strategies: ours in canonical form, and torch's own state dicts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

import engines
import meshes
from ds_optim import checkpoint
from ds_optim.checkpoint.warm_start import warm_start
from ds_optim.releases import TORCH
from engines import Case, assembled, engine_for, masters
from expected import by_one_process
from meshes import MeshCase, make, weights
from pool import Pools
from resumption import same_bits, stored

K, STEPS = 3, 8
MATRIX = {"max_preconditioner_dim": 8, "precondition_frequency": 3, "weight_decay": 0.1}
DECAY = {"weight_decay": 0.1}
CASES = {
    "AdamW": Case("ds_optim.AdamW", DECAY, steps=STEPS),
    "Lion": Case("ds_optim.Lion", {"state_dtype": "bf16"}, steps=STEPS),
    "Adan": Case("Adan", DECAY, steps=STEPS),
    "AdamMini": Case("AdamMini", DECAY, steps=STEPS),
    "Shampoo": Case("Shampoo", MATRIX, steps=STEPS),
    "SWAN": Case("SWAN", DECAY, steps=STEPS),
    "NorMuon": Case("NorMuon", DECAY, steps=STEPS),
    "SOAP": Case("SOAP", MATRIX, steps=STEPS),
}


def same(found: dict[str, Tensor], optimizer: str) -> None:
    """The weights are those of an undisturbed run."""
    wanted = by_one_process(CASES[optimizer])
    assert found.keys() == wanted.keys()
    for name, values in found.items():
        if optimizer == "AdamMini":
            assert torch.allclose(values, wanted[name], rtol=1e-6, atol=1e-7), name
        else:
            assert torch.equal(values, wanted[name]), name


# -- canonical --------------------------------------------------------------------------------------------------------


def first_part(mesh_case: MeshCase, folder: str) -> None:
    wrapped, model, optimizer = make(mesh_case)
    meshes.train(mesh_case, wrapped, model, optimizer, range(1, K + 1))
    checkpoint.save(folder, wrapped, optimizer, tag="middle", client_state=K)


def second_part(mesh_case: MeshCase, folder: str) -> dict[str, Tensor]:
    wrapped, model, optimizer = make(mesh_case, seed=1)  # other weights: what is right afterwards was loaded
    assert checkpoint.load(folder, wrapped, optimizer) == K
    checkpoint.save(f"{folder}-again", wrapped, optimizer, tag="middle", client_state=K)
    meshes.train(mesh_case, wrapped, model, optimizer, range(K + 1, STEPS + 1))
    return weights(model)


def first_part_in_an_engine(case: Case, folder: str) -> None:
    with engine_for(case) as (engine, _, clock):
        engines.train(engine, case, clock, range(1, K + 1))
        checkpoint.save(folder, engine, tag="middle", client_state=K)


def second_part_in_an_engine(case: Case, folder: str) -> dict[str, Any]:
    with engine_for(case) as (engine, _, clock):
        checkpoint.load(folder, engine)
        engines.train(engine, case, clock, range(K + 1, STEPS + 1))
        return {"masters": masters(engine)}


@pytest.mark.parametrize(
    ("optimizer", "ranks", "strategy", "other_ranks", "other"),
    [
        ("AdamW", 3, "fsdp", 2, "ddp"),
        ("Lion", 2, "hsdp", 3, "fsdp"),
        ("AdamMini", 2, "fsdp", 3, "fsdp"),
        ("AdamMini", 1, "single", 4, "hsdp"),
        ("Shampoo", 3, "fsdp", 4, "hsdp"),
        ("Shampoo", 4, "hsdp", 2, "fsdp"),
        ("SWAN", 3, "fsdp", 1, "single"),
        ("NorMuon", 2, "ddp", 3, "fsdp"),
        ("SOAP", 4, "hsdp", 2, "fsdp"),
    ],
)
def test_a_canonical_checkpoint_goes_on_under_another_strategy(
    pool: Pools, optimizer: str, ranks: int, strategy: str, other_ranks: int, other: str, tmp_path: Path
) -> None:
    case, folder = CASES[optimizer], str(tmp_path / "first")
    pool(ranks).run(first_part, MeshCase(case, strategy), folder)
    for found in pool(other_ranks).run(second_part, MeshCase(case, other), folder):
        same(found, optimizer)
    assert same_bits(*(stored(Path(f"{folder}{end}") / "middle") for end in ("", "-again")))


@pytest.mark.parametrize(("optimizer", "stage"), [("Adan", 2), ("AdamMini", 3), ("Shampoo", 1)])
def test_zero_and_fsdp2_take_over_from_each_other(pool: Pools, optimizer: str, stage: int, tmp_path: Path) -> None:
    case = CASES[optimizer]
    engine_case = Case(case.optimizer, case.options, stage=stage, steps=STEPS)
    pool(2).run(first_part_in_an_engine, engine_case, str(tmp_path / "zero"))
    for found in pool(3).run(second_part, MeshCase(case, "fsdp"), str(tmp_path / "zero")):
        same(found, optimizer)
    pool(3).run(first_part, MeshCase(case, "fsdp"), str(tmp_path / "fsdp"))
    same(assembled(pool(2).run(second_part_in_an_engine, engine_case, str(tmp_path / "fsdp"))), optimizer)


# -- torch's own ------------------------------------------------------------------------------------------------------


def saved_by_torch(mesh_case: MeshCase, folder: str, options: StateDictOptions) -> None:
    wrapped, model, optimizer = make(mesh_case)
    meshes.train(mesh_case, wrapped, model, optimizer, range(1, K + 1))
    states = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
    }
    dcp.save(states, checkpoint_id=folder)


def loaded_by_torch(mesh_case: MeshCase, folder: str, options: StateDictOptions) -> dict[str, Tensor]:
    wrapped, model, optimizer = make(mesh_case, seed=1)
    states = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
    }
    dcp.load(states, checkpoint_id=folder)
    set_model_state_dict(model, states["model"])
    set_optimizer_state_dict(model, optimizer, states["optimizer"], options=options)
    meshes.train(mesh_case, wrapped, model, optimizer, range(K + 1, STEPS + 1))
    return weights(model)


@pytest.mark.parametrize(
    ("optimizer", "ranks", "other_ranks", "strategy", "flat"),
    [
        ("AdamW", 2, 3, "fsdp", True),
        ("Lion", 3, 2, "fsdp", False),
        ("Adan", 2, 2, "fsdp", False),
        ("AdamMini", 2, 3, "fsdp", False),
        ("AdamMini", 3, 2, "fsdp", True),
        # torch before 2.10 cannot put flattened state together again where a rank holds none of it
        ("Shampoo", 2, 3, "fsdp", not TORCH.is_before("2.10")),
        ("Shampoo", 4, 2, "hsdp", False),
        ("SWAN", 3, 4, "fsdp", False),
    ],
)
def test_torchs_state_dicts_go_on_at_other_ranks(
    pool: Pools, optimizer: str, ranks: int, other_ranks: int, strategy: str, flat: bool, tmp_path: Path
) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    mesh_case = MeshCase(CASES[optimizer], strategy)
    pool(ranks).run(saved_by_torch, mesh_case, str(tmp_path), options)
    for found in pool(other_ranks).run(loaded_by_torch, mesh_case, str(tmp_path), options):
        same(found, optimizer)


def by_full_state_dict(mesh_case: MeshCase, folder: str) -> tuple[dict[str, Tensor], bool, list[str]]:
    """Through whole tensors on rank 0, as many scripts save; and a state dict before any step."""
    wrapped, model, optimizer = make(mesh_case)
    optimizer.load_state_dict(optimizer.state_dict())
    meshes.train(mesh_case, wrapped, model, optimizer, range(1, K + 1))
    full = StateDictOptions(full_state_dict=True, cpu_offload=True)
    states = get_optimizer_state_dict(model, optimizer, options=full)
    whole = get_model_state_dict(model, options=full)
    rank = torch.distributed.get_rank()
    if rank == 0:
        torch.save((states, whole), f"{folder}/full.pt")
    torch.distributed.barrier()
    wrapped, model, optimizer = make(mesh_case, seed=1)
    states, whole = torch.load(f"{folder}/full.pt", weights_only=False)
    set_model_state_dict(model, whole, options=StateDictOptions(full_state_dict=True))
    set_optimizer_state_dict(model, optimizer, states, options=StateDictOptions(full_state_dict=True))
    refused = []
    try:
        optimizer.load_state_dict(
            {"state": dict(enumerate(states["state"].values())), "param_groups": optimizer.state_dict()["param_groups"]}
        )
    except ValueError as error:
        refused.append(str(error))
    meshes.train(mesh_case, wrapped, model, optimizer, range(K + 1, STEPS + 1))
    sizes = [value.numel() for state in states["state"].values() for value in state.values()]
    return weights(model), all(sizes), refused


@pytest.mark.parametrize("optimizer", ["Lion", "AdamMini", "Shampoo"])
def test_a_full_state_dict_holds_every_block(pool: Pools, optimizer: str, tmp_path: Path) -> None:
    for found, complete, refused in pool(3).run(by_full_state_dict, MeshCase(CASES[optimizer], "fsdp"), str(tmp_path)):
        same(found, optimizer)
        assert complete
        assert refused
        assert "set_optimizer_state_dict" in refused[0]


def backwards(mesh_case: MeshCase, options: dict[str, Any] | None) -> dict[str, Tensor]:
    """A run whose second half has its parameters in another order; through torch's functions, or as it comes."""
    wrapped, model, optimizer = make(mesh_case)
    meshes.train(mesh_case, wrapped, model, optimizer, range(1, K + 1))
    given = StateDictOptions(**options) if options is not None else None
    states = get_optimizer_state_dict(model, optimizer, options=given) if given else optimizer.state_dict()
    if given and given.full_state_dict:
        states = of_rank_0(states)
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = [
        {**group, "params": [(names[one], one) for one in reversed(group["params"])]}
        for group in optimizer.param_groups
    ]
    settings = {key: value for key, value in mesh_case.case.options.items() if key != "weight_decay"}
    again = type(optimizer)(groups, roles=model, **settings)
    if given:
        set_optimizer_state_dict(model, again, states, options=given)
    else:
        again.load_state_dict(states)
    meshes.train(mesh_case, wrapped, model, again, range(K + 1, STEPS + 1))
    return weights(model)


def of_rank_0(states: Any) -> Any:
    """Rank 0's on every rank: a full state dict is empty elsewhere."""
    held = [states]
    torch.distributed.broadcast_object_list(held)
    return held[0]


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        ("AdamMini", None),
        ("AdamMini", {}),
        ("AdamMini", {"flatten_optimizer_state_dict": True}),
        ("Shampoo", None),
        ("Shampoo", {"full_state_dict": True}),
    ],
    ids=["as it comes", "by name", "flat", "Shampoo as it comes", "Shampoo full"],
)
def test_parameters_that_have_changed_places_keep_their_state(
    pool: Pools, optimizer: str, options: dict[str, Any] | None
) -> None:
    late = options is None and optimizer == "AdamMini"  # as Accelerate makes optimizers
    for found in pool(2).run(backwards, MeshCase(CASES[optimizer], "fsdp", late=late), options):
        same(found, optimizer)


def from_one_device(optimizer: str) -> dict[str, Tensor]:
    """A full state dict of a plain model, which lists names, goes to FSDP2."""
    full = StateDictOptions(full_state_dict=True)
    _, model, made = make(MeshCase(CASES[optimizer], "single"))
    meshes.train(MeshCase(CASES[optimizer], "single"), model, model, made, range(1, K + 1))
    assert made.state_dict()["param_names"]
    states, values = get_optimizer_state_dict(model, made, options=full), get_model_state_dict(model, options=full)
    mesh_case = MeshCase(CASES[optimizer], "fsdp")
    wrapped, model, made = make(mesh_case, seed=1)
    set_model_state_dict(model, values, options=full)
    set_optimizer_state_dict(model, made, states, options=full)
    meshes.train(mesh_case, wrapped, model, made, range(K + 1, STEPS + 1))
    return weights(model)


def test_a_full_state_dict_goes_from_one_device_to_fsdp2(pool: Pools) -> None:
    for found in pool(2).run(from_one_device, "AdamMini"):
        same(found, "AdamMini")


def warm_started(folder: str, optimizer: str, strategy: str) -> dict[str, Tensor]:
    wrapped, model, made = make(MeshCase(CASES[optimizer], strategy), seed=1)
    warm_start(folder, wrapped, made)
    meshes.train(MeshCase(CASES[optimizer], strategy), wrapped, model, made, range(K + 1, STEPS + 1))
    return weights(model)


@pytest.mark.parametrize("optimizer", ["Lion", "AdamMini", "Shampoo"])
def test_a_warm_start_is_the_same_under_fsdp2(pool: Pools, optimizer: str, tmp_path: Path) -> None:
    pool(2).run(first_part, MeshCase(CASES["AdamW"], "fsdp"), str(tmp_path))
    (alone,) = pool(1).run(warm_started, str(tmp_path), optimizer, "single")
    for found in pool(3).run(warm_started, str(tmp_path), optimizer, "fsdp"):
        for name, values in found.items():
            assert torch.allclose(values, alone[name], rtol=1e-6, atol=1e-7), name
