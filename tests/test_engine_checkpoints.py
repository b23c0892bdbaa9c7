"""DeepSpeed's own checkpoints: a resumed run is bitwise the uninterrupted one; on other terms loaded or refused."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ds_optim
from damage import flip, remove, truncate
from ds_optim.checkpoint.warm_start import warm_start
from ds_optim.deepspeed.checkpoint_files import DeepSpeedFiles
from ds_optim.errors import CheckpointError
from ds_optim.releases import DEEPSPEED
from engines import Case, assembled, build_model, engine_for, install_gradients, masters, train, weights
from pool import Pools

OFFLOAD = {"offload_optimizer": {"device": "cpu", "pin_memory": False}}
SHAMPOO = {"max_preconditioner_dim": 8, "precondition_frequency": 3}


def interrupted(case: Case, folder: str) -> tuple[bool, set[str], list[int], list[int]]:
    """Whether saving after half the steps and resuming in a new engine ends in the same bits; what was loaded."""
    half = case.steps // 2
    with engine_for(case) as (engine, _, clock):
        train(engine, case, clock, range(1, half + 1))
        engine.save_checkpoint(folder)
        train(engine, case, clock, range(half + 1, case.steps + 1))
        whole = masters(engine)
    # Other initial weights: everything must come from the checkpoint.
    with engine_for(replace(case, seed=case.seed + 1)) as (engine, _, clock):
        engine.load_checkpoint(folder)
        loaded = masters(engine)
        states = list(engine.basic_optimizer.state.values())
        dtypes = {f"{key} {value.dtype}" for state in states for key, value in state.items()}
        counts = [int(state["step"]) for state in states]
    with engine_for(case) as (engine, _, clock):
        engine.load_checkpoint(folder, load_optimizer_states=False)
        left_out = [int(state["step"]) for state in engine.basic_optimizer.state.values()]
    with engine_for(case) as (engine, _, clock):
        engine.load_checkpoint(folder)
        same = _same(loaded, masters(engine))
        train(engine, case, clock, range(half + 1, case.steps + 1))
        return same and _same(whole, masters(engine)), dtypes, counts, left_out


def _same(one: dict[str, Any], two: dict[str, Any]) -> bool:
    def tensors(found: dict[str, Any]) -> list[Tensor]:
        return [values for _, fragments in sorted(found.items()) for _, _, values in fragments]

    return one.keys() == two.keys() and all(torch.equal(a, b) for a, b in zip(tensors(one), tensors(two), strict=True))


CASES = [
    Case("ds_optim.AdamW", {"weight_decay": 0.1}, stage=0, precision="fp32"),
    Case("AdamMini", {"weight_decay": 0.1}, stage=0, precision="bf16"),
    Case("Adan", {"weight_decay": 0.1}, stage=1, precision="bf16_optimizer"),
    Case("AdamMini", {"weight_decay": 0.1}, stage=1, precision="bf16"),
    Case("ds_optim.Lion", {"state_dtype": "bf16"}, stage=2, precision="bf16"),
    Case("Adan", {}, stage=2, precision="bf16", zero=OFFLOAD),
    Case("AdamMini", {"weight_decay": 0.1}, stage=3, precision="bf16", zero={"sub_group_size": 300}),
    # An object beside a JSON that names another optimizer: DeepSpeed trains with the object.
    Case("ds_optim.Lion", {"weight_decay": 0.1}, stage=3, client=True, extra={"optimizer": {"type": "AdamW"}}),
    Case("Shampoo", SHAMPOO, stage=0, precision="fp32"),
    Case("Shampoo", SHAMPOO, stage=1, precision="bf16"),
    Case("Shampoo", SHAMPOO, stage=2, precision="fp32", zero=OFFLOAD),
    Case("Shampoo", SHAMPOO, stage=3, precision="bf16", zero={"sub_group_size": 300}),
    Case("SWAN", {}, stage=2, precision="bf16"),
    Case("SWAN", {}, stage=3, precision="fp32", zero=OFFLOAD),
    Case("ds_optim.Muon", {}, stage=3, precision="bf16"),
    Case("NorMuon", {}, stage=1, precision="fp32", zero=OFFLOAD),
    Case("SOAP", SHAMPOO, stage=2, precision="bf16"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.optimizer}-{case.stage}-{case.precision}")
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(pool: Pools, case: Case, tmp_path: Path) -> None:
    for same, dtypes, counts, left_out in pool(2).run(interrupted, case, str(tmp_path)):
        assert same
        for entry in dtypes:
            key, dtype = entry.split()
            bf16 = "state_dtype" in case.options and key != "step"
            whole = {
                "blocks": "torch.int64",
                **dict.fromkeys(("rooted", "failures", "waiting", "based"), "torch.int32"),
            }
            assert dtype == whole.get(key, "torch.bfloat16" if bf16 else "torch.float32"), entry
        assert set(counts) == {case.steps // 2}
        assert left_out == []


def save(case: Case, folder: str) -> dict[str, Any]:
    """DeepSpeed's checkpoint after two steps, and what it should hold."""
    with engine_for(case) as (engine, _, clock):
        train(engine, case, clock, range(1, 3))
        engine.save_checkpoint(folder)
        return {"masters": masters(engine)} if hasattr(engine.basic_optimizer, "bound_tensors") else {}


def refused(case: Case, folder: str) -> str:
    """What a rank is told that loads a checkpoint of something else; all weights must be what they were."""
    with engine_for(replace(case, seed=case.seed + 1)) as (engine, model, _):
        before = weights(model), masters(engine)
        try:
            engine.load_checkpoint(folder)
        except (ValueError, CheckpointError) as error:
            said = str(error)
        else:
            return "nothing"
        after = weights(model), masters(engine)
        unchanged = all(torch.equal(value, after[0][name]) for name, value in before[0].items())
        return said if unchanged and _same(before[1], after[1]) else f"weights were changed: {said}"


Q_PROJ = {"ds_optim": {"roles": {"llama.model.layers.0.self_attn.q_proj.weight": "linear"}}}


@pytest.mark.parametrize(
    ("case", "other", "word"),
    [
        (Case("AdamMini", stage=2), Case("ds_optim.Lion", stage=2), "saved by AdamMini, whose state is not Lion's"),
        (Case("AdamMini", stage=3), Case("AdamMini", stage=3, extra=Q_PROJ), "other roles|other blocks"),
        (
            Case("Shampoo", SHAMPOO, stage=1),
            Case("Shampoo", {**SHAMPOO, "max_preconditioner_dim": 9}, stage=1),
            "was 8",
        ),
    ],
    ids=lambda case: case.optimizer if isinstance(case, Case) else str(case),
)
def test_a_checkpoint_of_something_else_is_refused(
    pool: Pools, case: Case, other: Case, word: str, tmp_path: Path
) -> None:
    pool(2).run(save, case, str(tmp_path))
    for said in pool(2).run(refused, other, str(tmp_path)):
        assert re.search(word, said), said
        assert "weights were changed" not in said


# ------------------------------------------------------------------------- where DeepSpeed's own error names no way out


def deepspeeds_own_word(case: Case, folder: str) -> tuple[str, bool]:
    """What DeepSpeed says without our judgement, and whether it had changed weights by then."""
    with engine_for(replace(case, seed=case.seed + 1)) as (engine, model, _):
        before = weights(model)
        try:
            type(engine).load_checkpoint(engine, folder)
        except Exception as error:
            after = weights(model)
            return str(error), not all(torch.equal(value, after[name]) for name, value in before.items())
    return "nothing", True


def loaded(case: Case, folder: str) -> dict[str, Any]:
    with engine_for(replace(case, seed=case.seed + 1)) as (engine, _, _):
        path, _ = engine.load_checkpoint(folder)
        assert path is not None
        return {"masters": masters(engine)}


MINI = Case("AdamMini", stage=2)


@pytest.mark.parametrize(
    ("ranks", "case", "others", "other", "control"),
    [
        (2, Case("ds_optim.Lion", stage=2), 3, Case("ds_optim.Lion", stage=2), "used a DP world size of 2"),
        (2, Case("ds_optim.Lion", stage=3), 3, Case("ds_optim.Lion", stage=3), "used a DP world size of 2"),
        (1, MINI, 1, replace(MINI, stage=3), ""),
        (1, replace(MINI, stage=0, user_groups=True), 1, replace(MINI, stage=1, user_groups=True), ""),
        (1, replace(MINI, stage=3), 1, replace(MINI, stage=3, precision="bf16"), ""),
        (1, replace(MINI, stage=3, zero={"sub_group_size": 300}), 1, replace(MINI, stage=3), ""),
    ],
    ids=["ranks", "ranks at 3", "stage", "groups of ZeRO-0", "precision", "sub-groups"],
)
def test_what_deepspeeds_own_loader_cannot_is_loaded_all_the_same(
    pool: Pools, ranks: int, case: Case, others: int, other: Case, control: str, tmp_path: Path
) -> None:
    """How such a run goes on: test_canonical_checkpoint.py."""
    saved = assembled(pool(ranks).run(save, case, str(tmp_path)))
    said, changed = pool(others).run(deepspeeds_own_word, other, str(tmp_path))[0]
    assert said != "nothing"
    assert control in said
    if control:
        assert changed == (case.stage == 2)  # at ZeRO-3 the masters hold the weights
    found = assembled(pool(others).run(loaded, other, str(tmp_path)))
    assert found.keys() == saved.keys()
    for name, values in found.items():
        assert torch.equal(values, saved[name]), name


def test_an_empty_latest_is_not_called_missing(tmp_path: Path) -> None:
    (tmp_path / "latest").write_text("\n")
    with pytest.raises(CheckpointError, match="an empty file latest"):
        DeepSpeedFiles(tmp_path, None)


def opened(case: Case, folder: str) -> list[int]:
    """The ranks whose files this rank looks into."""
    seen = set()
    rank_of = DeepSpeedFiles.rank

    def noted(files: DeepSpeedFiles, rank: int, groups: Any) -> Any:
        seen.add(rank)
        return rank_of(files, rank, groups)

    with pytest.MonkeyPatch.context() as patched, engine_for(case) as (engine, _, _):
        patched.setattr(DeepSpeedFiles, "rank", noted)
        engine.load_checkpoint(folder)
    return sorted(seen)


def test_a_rank_opens_the_files_of_those_that_were_in_its_place(pool: Pools, tmp_path: Path) -> None:
    case = Case("ds_optim.Lion", stage=2)
    pool(4).run(save, case, str(tmp_path))
    assert pool(3).run(opened, case, str(tmp_path)) == [[0, 1], [0, 1, 2], [0, 2, 3]]  # rank 0's say what there is


@pytest.mark.parametrize(
    ("case", "other", "word"),
    [
        (replace(MINI, stage=1), replace(MINI, stage=1, frozen=("norm",)), "llama.model.norm.weight, not trained"),
        (replace(MINI, layers=2), replace(MINI, stage=3), "llama.model.layers.1"),
        (MINI, replace(MINI, stage=3, extra=Q_PROJ), "saved with other roles"),
        (MINI, Case("ds_optim.Lion", stage=3), "saved by AdamMini, whose state is not Lion's"),
        (
            Case("Shampoo", SHAMPOO, stage=1),
            Case("Shampoo", {**SHAMPOO, "max_preconditioner_dim": 9}, stage=2),
            "max_preconditioner_dim|blocks",
        ),
    ],
    ids=["frozen", "another model", "other roles", "another optimizer", "other blocks"],
)
def test_on_other_ranks_something_else_is_refused_too(
    pool: Pools, case: Case, other: Case, word: str, tmp_path: Path
) -> None:
    pool(1).run(save, case, str(tmp_path))
    first, *others = pool(2).run(refused, other, str(tmp_path))
    assert re.search(word, first), first
    assert "nothing was changed" in first
    assert "weights were changed" not in first
    assert all(said == first for said in others)


def started_warm(case: Case, folder: str) -> bool:
    """Whether the error's advice goes on from the weights that were saved, with moments."""
    with engine_for(replace(case, seed=case.seed + 1)) as (engine, model, clock):
        before = weights(model)
        engine.load_checkpoint(folder, load_optimizer_states=False)
        warm_start(folder, engine)
        train(engine, case, clock, range(3, 4))
        moved = any(not torch.equal(value, before[name]) for name, value in weights(model).items())
        return moved and {int(state["step"]) for state in engine.basic_optimizer.state.values()} == {3}


@pytest.mark.parametrize("stage", [2, 3])
def test_going_on_from_deepspeeds_adamw_names_the_second_group_and_the_warm_start(
    pool: Pools, stage: int, tmp_path: Path
) -> None:
    """Only "type" was changed in the JSON."""
    folder = str(tmp_path)
    pool(2).run(save, Case("AdamW", {"torch_adam": True}, stage=stage), folder)
    ours = Case("ds_optim.AdamW", stage=stage)
    for control, changed in pool(2).run(deepspeeds_own_word, ours, folder):
        # DeepSpeed's own word since 0.19.7, which is about something else
        said = "parameter-alignment" if stage == 2 and not DEEPSPEED.is_before("0.19.7") else "same optimizer"
        assert said in control
        assert "no_decay" not in control
        assert changed == (stage == 2)
    for case in (ours, Case("AdamMini", stage=stage)):
        for said in pool(2).run(refused, case, folder):
            assert "its parameters are in 1 group, here in 2 groups" in said
            assert '"ds_optim": {"no_decay": []}' in said
            assert f"warm_start({folder!r}, engine), see docs/warm_start.md" in said
            assert ("saved by AdamW, whose state is not AdamMini's" in said) == (case.optimizer == "AdamMini")
            assert "weights were changed" not in said
        assert pool(2).run(started_warm, case, folder) == [True, True]
    one_group = replace(ours, extra={"ds_optim": {"no_decay": []}})
    assert all(found["masters"] for found in pool(2).run(loaded, one_group, folder))


@pytest.mark.parametrize(
    ("case", "words"),
    [
        (Case("AdamW", {"torch_adam": True}, stage=0), "give warm_start the optimizer's state_dict() and names=[...]"),
        (
            Case("ds_optim.AdamW", stage=0),
            "ds_optim.checkpoint.warm_start.warm_start('OUT', engine, weights=True)",
        ),
        (
            Case("Adan", stage=2),
            "ds_optim.checkpoint.load('OUT', engine, load_optimizer_states=False) takes over weights alone",
        ),
        (Case("SGD", stage=0), "weights alone can be taken over: load_checkpoint(..., load_optimizer_states=False)"),
    ],
    ids=lambda value: value.optimizer if isinstance(value, Case) else "",
)
def test_what_goes_on_depends_on_what_was_saved(pool: Pools, case: Case, words: str, tmp_path: Path) -> None:
    pool(1).run(save, case, str(tmp_path))
    [said] = pool(1).run(refused, Case("AdamMini", stage=case.stage), str(tmp_path))
    assert f"saved by {case.optimizer}, whose state is not AdamMini's" in said
    assert words in said
    assert "weights were changed" not in said


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("damage", [remove, truncate, flip])
@pytest.mark.parametrize("file", ["*rank_1_*optim_states.pt", "mp_rank_00_model_states.pt"])
def test_damage_of_any_file_stops_all_ranks_before_anything_changes(
    pool: Pools, ranks: int, damage: Any, file: str, tmp_path: Path
) -> None:
    case = Case("ds_optim.Lion", stage=2)
    pool(2).run(save, case, str(tmp_path))
    [found] = tmp_path.glob(f"*/{file}")
    damage(found)
    first, *others = pool(ranks).run(refused, case, str(tmp_path))
    assert found.name in first or "no *_model_states.pt" in first
    assert "nothing was changed" in first
    assert "weights were changed" not in first
    assert all(said == first for said in others)


# ---------------------------------------------------------------------------------------------------- without an engine


@pytest.mark.parametrize("cls", [ds_optim.AdamMini, ds_optim.Shampoo])
def test_other_roles_are_told_from_equal_sizes(cls: Any) -> None:
    linears: list[dict[str, Any]] = [{"*": {"kind": "linear", "output_dim": dim}} for dim in (0, 1)]
    if cls is ds_optim.Shampoo:
        linears = [{"*.0": "linear", "*.1": "embedding"}, {"*.0": "embedding", "*.1": "linear"}]
    optimizers = []
    for roles in linears:
        parameters = [torch.nn.Parameter(torch.ones(8, 8)) for _ in range(2)]
        optimizers.append(cls([(f"layer.{index}", p) for index, p in enumerate(parameters)], roles=roles))
        for parameter in parameters:
            parameter.grad = torch.ones(8, 8)
        optimizers[-1].step()
    optimizers[0].load_state_dict(optimizers[0].state_dict())
    assert all("blocks" not in group for group in optimizers[0].param_groups)
    with pytest.raises(ValueError, match=r"other blocks|keeps"):
        optimizers[1].load_state_dict(optimizers[0].state_dict())


def given_backwards(case: Case, folder: str, forget_names: bool) -> str:
    """A run that is saved and resumed by an engine that was given its parameters in another order; or its error."""
    import deepspeed

    with engine_for(case) as (engine, _, clock):
        train(engine, case, clock, range(1, 4))
        if forget_names:  # as older versions saved
            engine.basic_optimizer._names_in = lambda index: None
        engine.save_checkpoint(folder)
        train(engine, case, clock, range(4, 7))
        whole = masters(engine)
    model = build_model(replace(case, seed=case.seed + 1))
    given = [*model.parameters()] if forget_names else [*reversed([*model.parameters()])]
    engine, *_ = deepspeed.initialize(model=model, config=case.config(), model_parameters=given)
    try:
        install_gradients(model, case, clock)
        engine.load_checkpoint(folder)
        train(engine, case, clock, range(4, 7))
        return "the same" if _same(whole, masters(engine)) else "something else"
    except ValueError as error:
        return str(error)
    finally:
        engine.destroy()


@pytest.mark.parametrize(
    ("case", "forget_names", "outcome"),
    [
        (Case("ds_optim.AdamW", stage=0), False, "the same"),
        (Case("Shampoo", SHAMPOO, stage=0), False, "the same"),
        (Case("AdamMini", stage=0), True, "the same"),
        (
            Case("AdamMini", stage=0, precision="bf16"),
            False,
            "in another order, by which DeepSpeed loads its fp32 masters",
        ),
    ],
    ids=["AdamW", "Shampoo", "without names", "bf16 masters"],
)
def test_without_zero_state_goes_by_name(
    pool: Pools, case: Case, forget_names: bool, outcome: str, tmp_path: Path
) -> None:
    for found in pool(2).run(given_backwards, case, str(tmp_path), forget_names):
        assert outcome in found
