"""Warm start: AdamW's two moments become another optimizer's state, by arithmetic that is written out here again."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ds_optim
from ds_optim import checkpoint
from ds_optim.checkpoint.warm_start import block_means, block_range, box_runs, warm_start
from ds_optim.linalg.packed import pack, packed_size
from ds_optim.sharding.blocks import BlockGrid
from ds_optim.sharding.boxes import Box
from engines import WIDTH, Case, OddLlama, assembled, build_model, engine_for, learning_rate, masters, train
from expected import block_labels, gradient, is_matrix, weight_decays
from resumption import stored
from test_layout import block_of

K = 5
BETAS = (0.9, 0.95)
SHAMPOO = {"max_preconditioner_dim": 8, "precondition_frequency": 3}
CASE = Case("ds_optim.AdamW")


@cache
def adamw_run(cls: Any = torch.optim.AdamW, *, named: bool = True, betas: tuple[float, float] = BETAS) -> Any:
    """The model and AdamW after K steps; who steps them on takes a copy."""
    model = build_model(CASE)
    params = model.named_parameters() if named else model.parameters()
    optimizer = cls(params, lr=1e-3, betas=betas)
    steps_of(model, optimizer, range(1, K + 1))
    return model, optimizer


def steps_of(model: nn.Module, optimizer: Any, steps: range) -> None:
    for step in steps:
        for name, parameter in model.named_parameters():
            parameter.grad = gradient(CASE, name, tuple(parameter.shape), step)
        optimizer.step()


def moments(model: nn.Module, optimizer: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Bias-corrected, in fp64."""
    beta1, beta2 = optimizer.param_groups[0]["betas"]
    found = {}
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        found[name] = state["exp_avg"].double() / (1 - beta1**K), state["exp_avg_sq"].double() / (1 - beta2**K)
    return found


def started(name: str, source: Any, **options: Any) -> tuple[nn.Module, Any]:
    model = build_model(CASE)
    optimizer = getattr(ds_optim, name)(model.named_parameters(), roles=model, **options)
    warm_start(source, model, optimizer)
    return model, optimizer


def close(found: Tensor, wanted: Tensor) -> bool:
    return torch.allclose(found.double(), wanted.reshape(found.shape), rtol=1e-6, atol=1e-12)


# -- the mapping ------------------------------------------------------------------------------------------------------


def test_equal_betas_take_over_adamw_bit_for_bit() -> None:
    source, adamw = copy.deepcopy(adamw_run())
    for name in ("AdamW", "AdamMini", "SWAN", "Shampoo", "Muon", "NorMuon", "SOAP"):
        model, optimizer = started(name, adamw.state_dict(), betas=BETAS)
        for (parameter, mine), (_, its) in zip(
            ((p, optimizer.state[p]) for p in model.parameters()),
            ((p, adamw.state[p]) for p in source.parameters()),
            strict=True,
        ):
            assert mine["step"] == K
            if mine.get("exp_avg", torch.empty(0)).numel() == parameter.numel():
                assert torch.equal(mine["exp_avg"], its["exp_avg"])
                if name != "AdamMini":
                    assert torch.equal(mine["exp_avg_sq"], its["exp_avg_sq"])
    model, optimizer = started("AdamW", adamw.state_dict(), betas=BETAS, lr=1e-3)
    model.load_state_dict(source.state_dict())
    for one, its in ((source, adamw), (model, optimizer)):
        steps_of(one, its, range(K + 1, K + 3))
    for mine, its in zip(model.parameters(), source.parameters(), strict=True):
        assert torch.allclose(mine, its, rtol=1e-6, atol=1e-7)


def test_adam_mini_gets_the_mean_of_every_block() -> None:
    source, adamw = adamw_run()
    known = moments(source, adamw)
    model, mini = started("AdamMini", adamw.state_dict(), betas=(0.8, 0.99))
    for name, parameter in model.named_parameters():
        first, second = known[name]
        labels = block_labels(name, tuple(parameter.shape)).reshape(-1)
        blocks = [second.reshape(-1)[labels == label].mean() for label in labels.unique()]
        assert close(mini.state[parameter]["exp_avg"], first * (1 - 0.8**K))
        assert close(mini.state[parameter]["exp_avg_sq"], torch.stack(blocks) * (1 - 0.99**K))


def test_lion_and_adan_get_averages_that_fit_their_memory() -> None:
    source, adamw = adamw_run()
    known = moments(source, adamw)
    model, lion = started("Lion", adamw.state_dict(), betas=(0.95, 0.98))
    for name, parameter in model.named_parameters():
        assert close(lion.state[parameter]["exp_avg"], known[name][0] * (1 - 0.98) / (1 - 0.9))
    model, adan = started("Adan", adamw.state_dict(), betas=(0.98, 0.92, 0.99))
    for name, parameter in model.named_parameters():
        (first, second), state = known[name], adan.state[parameter]
        assert close(state["exp_avg"], first * (1 - 0.98) / (1 - 0.9) * (1 - 0.98**K))
        assert close(state["exp_avg_sq"], second * (1.92**2 + 0.92**2) * (1 - 0.99**K))
        assert close(state["previous_grad"], first)
        assert not state["exp_avg_diff"].any()
    model, short = started("Lion", adamw.state_dict(), betas=(0.9, 0.8))  # no longer than AdamW's: nothing is missing
    assert all(close(short.state[p]["exp_avg"], known[name][0]) for name, p in model.named_parameters())


def test_swan_and_shampoo_keep_adam_where_there_is_no_matrix_and_shampoo_its_graft() -> None:
    source, adamw = adamw_run()
    known = moments(source, adamw)
    for optimizer_name, options in (("SWAN", {"betas": (0.9, 0.99)}), ("Shampoo", {"betas": (0.9, 0.99), **SHAMPOO})):
        model, optimizer = started(optimizer_name, adamw.state_dict(), **options)
        for name, parameter in model.named_parameters():
            first, second = known[name]
            state = optimizer.state[parameter]
            preconditioned = optimizer_name == "Shampoo" and name == "gain"  # a vector of one element
            if not is_matrix(name, tuple(parameter.shape)) and not preconditioned:
                assert close(state["exp_avg"], first * (1 - 0.9**K))
                assert close(state["exp_avg_sq"], second * (1 - 0.99**K))
                continue
            assert state["exp_avg"].numel() == 0
            if optimizer_name == "SWAN":
                continue
            begin, corner = 0, [0, 0]
            plan, tensor = optimizer.stepper.plans.place_of(parameter)
            for block in plan.of_tensor(tensor):
                box = plan.blocks[block].tile.box
                inside = tuple(slice(a, b) for a, b in zip(box.start, box.stop, strict=True))
                momentum, graft = first[inside] * (1 - 0.9**K), second[inside] * (1 - 0.99**K)
                assert close(state["momentum"][begin : begin + box.numel], momentum)
                assert close(state["graft"][begin : begin + box.numel], graft)
                for axis, size in enumerate(box.shape):
                    factor = torch.diag(graft.sum(1 - axis) if graft.dim() == 2 else graft)
                    at, corner[axis] = corner[axis], corner[axis] + packed_size(size)
                    assert close(state[f"factor_{axis}"][at : corner[axis]], pack(factor[None]))
                begin += box.numel
            assert not any(state[key].any() for key in state if key.startswith(("root", "failures", "waiting")))


def test_shampoo_goes_on_with_adams_step_until_a_block_has_its_root() -> None:
    source, adamw = copy.deepcopy(adamw_run())
    settings = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 1e-2}
    model, shampoo = started("Shampoo", adamw.state_dict(), **settings, max_preconditioner_dim=8)
    model.load_state_dict(source.state_dict())  # start 10, step 6 to 8: no root yet
    for one, its in ((source, adamw), (model, shampoo)):
        steps_of(one, its, range(K + 1, K + 4))
    for mine, its in zip(model.parameters(), source.parameters(), strict=True):
        assert torch.allclose(mine, its, rtol=1e-5, atol=1e-7)
    steps_of(model, shampoo, range(K + 4, K + 30))
    for parameter in model.parameters():
        rooted = shampoo.state[parameter].get("rooted")
        assert rooted is None or bool(rooted.all())
        assert bool(torch.isfinite(parameter).all())


def test_state_keeps_its_own_dtype() -> None:
    _, adamw = adamw_run()
    for name in ("Lion", "Adan", "AdamMini", "Shampoo"):
        _, optimizer = started(name, adamw.state_dict(), state_dtype="bf16")
        exact = started(name, adamw.state_dict())[1]
        for narrow, wide in zip(optimizer.state.values(), exact.state.values(), strict=True):
            per_element = {"exp_avg", "exp_avg_diff", "previous_grad", "momentum", "graft"}
            per_element |= set() if name == "AdamMini" else {"exp_avg_sq"}
            for key, value in narrow.items():
                assert value.dtype == (torch.bfloat16 if key in per_element else wide[key].dtype), key
                assert torch.equal(value, wide[key].to(value.dtype))


@pytest.mark.parametrize(
    "grid",
    [
        BlockGrid(2, 1, 6, 3, ((2, 2), (2, 1))),
        BlockGrid(2, 3, 5, 2, ((1, 3), (2, 1))),
        BlockGrid(1, 1, 1, 7, ((1, 1),)),
        BlockGrid(1, 4, 6, 1, ((6, 1),)),
    ],
    ids=str,
)
def test_block_means_of_any_part_of_any_grid(grid: BlockGrid) -> None:
    values = torch.rand(grid.numel)
    labels = torch.tensor([block_of(grid, element) for element in range(grid.numel)])
    wanted = torch.stack([values[labels == block].double().mean() for block in range(grid.num_blocks)])
    for first in range(grid.num_blocks):
        for stop in range(first + 1, grid.num_blocks + 1):
            start, end, begin = block_range(grid, first, stop)
            found = block_means(grid, begin, values[start:end])
            assert close(found[first - begin : stop - begin], wanted[first:stop])


@pytest.mark.parametrize(
    ("shape", "box"),
    [
        ((6, 5), Box((2, 0), (4, 5))),
        ((6, 5), Box((2, 1), (4, 3))),
        ((3, 4, 5), Box((1, 1, 0), (3, 3, 5))),
        ((3, 4, 5), Box((0, 0, 0), (3, 4, 5))),
        ((7,), Box((2,), (5,))),
    ],
)
def test_the_elements_of_a_box_in_order(shape: tuple[int, ...], box: Box) -> None:
    elements = torch.arange(int(torch.tensor(shape).prod()))
    inside = elements.view(shape)[tuple(slice(a, b) for a, b in zip(box.start, box.stop, strict=True))]
    assert torch.equal(torch.cat([elements[a:b] for a, b in box_runs(shape, box)]), inside.reshape(-1))


# -- sources ----------------------------------------------------------------------------------------------------------


def test_a_canonical_checkpoint_and_a_state_dict_give_the_same_and_weights_on_request(tmp_path: Path) -> None:
    source, adamw = adamw_run(ds_optim.AdamW)
    checkpoint.save(tmp_path, source, adamw)
    for name in ("Lion", "AdamMini", "Shampoo"):
        options = SHAMPOO if name == "Shampoo" else {}
        _, by_folder = started(name, tmp_path, **options)
        _, by_dict = started(name, adamw.state_dict(), **options)
        for mine, its in zip(by_folder.state.values(), by_dict.state.values(), strict=True):
            assert all(torch.equal(mine[key], its[key]) for key in its)
    target = OddLlama(layers=1)
    fresh = [parameter.detach().clone() for parameter in target.parameters()]
    optimizer = ds_optim.Lion(target.named_parameters())
    warm_start(tmp_path, target, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(target.parameters(), fresh, strict=True))
    warm_start(tmp_path, target, optimizer, weights=True)
    assert all(torch.equal(a, b) for a, b in zip(target.parameters(), source.parameters(), strict=True))
    assert all(state["step"] == K for state in optimizer.state.values())


def test_names_of_a_state_dict() -> None:
    source, unnamed = adamw_run(named=False)
    wanted = started("Lion", adamw_run()[1].state_dict())[1]
    found = started("Lion", unnamed.state_dict())[1]  # one group: the model's order
    for mine, its in zip(found.state.values(), wanted.state.values(), strict=True):
        assert torch.equal(mine["exp_avg"], its["exp_avg"])
    split = copy.deepcopy(unnamed.state_dict())
    group = split["param_groups"][0]
    split["param_groups"] = [{**group, "params": group["params"][3:]}, {**group, "params": group["params"][:3]}]
    with pytest.raises(checkpoint.CheckpointError, match=r"order the parameters otherwise .* give names="):
        started("Lion", split)
    names = [name for name, _ in source.named_parameters()]
    model = build_model(CASE)
    optimizer = ds_optim.Lion(model.named_parameters())
    warm_start(split, model, optimizer, names=[f"module.{name}" for name in (*names[3:], *names[:3])])
    for mine, its in zip(model.parameters(), wanted.state.values(), strict=True):
        assert torch.equal(optimizer.state[mine]["exp_avg"], its["exp_avg"])


def test_what_does_not_match_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    source, adamw = copy.deepcopy(adamw_run())
    state_dict = adamw.state_dict()
    model = build_model(CASE)
    lion = ds_optim.Lion(model.named_parameters())

    def refusal(given: Any, target: Any = lion, **options: Any) -> str:
        with pytest.raises(checkpoint.CheckpointError) as error:
            warm_start(given, model, target, **options)
        assert not lion.state
        return str(error.value)

    renamed = copy.deepcopy(state_dict)
    names = renamed["param_groups"][0]["param_names"]
    names[names.index("gain")] = "loss"
    assert {"gain is not in the source", "the source has loss, which is not here"} <= set(
        refusal(renamed).split("\n- ")
    )
    shaped = copy.deepcopy(state_dict)
    key = shaped["param_groups"][0]["param_names"].index("extra.weight")
    shaped["state"][key]["exp_avg"] = torch.zeros(WIDTH, 5)
    assert f"extra.weight has shape ({WIDTH}, 5) in the source, (5, {WIDTH}) here" in refusal(shaped)
    sgd = torch.optim.SGD(source.named_parameters(), lr=0.1, momentum=0.9)
    steps_of(source, sgd, range(1, 2))
    assert "has betas None and state ['momentum_buffer']: not Adam's exp_avg and exp_avg_sq" in refusal(
        sgd.state_dict()
    )
    adan = ds_optim.Adan(source.named_parameters())
    assert "has betas (0.98, 0.92, 0.99)" in refusal(adan.state_dict())
    assert "it has no state and param_groups" in refusal(source.state_dict())
    assert "and there are 1 names for them" in refusal(state_dict, names=["gain"])
    assert "give the optimizer too" in refusal(state_dict, None)
    assert "AdamW is not an optimizer of ds_optim" in refusal(state_dict, adamw)
    assert "weights=True needs a directory of ds_optim.checkpoint.save" in refusal(state_dict, weights=True)
    graftless = ds_optim.Shampoo(model.named_parameters(), roles=model, graft=None)
    assert "Shampoo without a graft has no AdamW step to go on with" in refusal(state_dict, graftless)
    checkpoint.save(tmp_path, source, adan)
    assert "is of Adan: only AdamW's two moments" in refusal(tmp_path)
    assert "nothing was ever saved there" in refusal(tmp_path / "nowhere")


# -- engines ----------------------------------------------------------------------------------------------------------


def saved_by_adamw(case: Case, folder: str) -> None:
    with engine_for(case) as (engine, _, clock):
        train(engine, case, clock, range(1, K + 1))
        checkpoint.save(folder, engine)


def saved_by_deepspeed(case: Case, folder: str) -> None:
    with engine_for(case) as (engine, _, clock):
        train(engine, case, clock, range(1, K + 1))
        engine.save_checkpoint(folder)


def warm_engine(case: Case, source: Any, folder: str) -> dict[str, Any]:
    """Start warm, save, and make three more steps."""
    with engine_for(case) as (engine, _, clock):
        warm_start(source, engine, weights=not isinstance(source, dict))
        checkpoint.save(folder, engine, tag="warm")
        loaded = {"masters": masters(engine)}
        train(engine, case, clock, range(K + 1, K + 4))
        return {"loaded": loaded, "masters": masters(engine)}


def refused_by_engine(case: Case, folder: str) -> str:
    with engine_for(case) as (engine, _, _):
        with pytest.raises(checkpoint.CheckpointError) as error:
            warm_start({"state": {}, "param_groups": []}, engine)
        assert not engine.basic_optimizer.state
        return str(error.value)


ENGINES = [
    Case("ds_optim.Lion", stage=2),
    Case("Adan", stage=3, precision="bf16"),
    Case("AdamMini", stage=2, precision="bf16"),
    Case("AdamMini", stage=3),
    Case("SWAN", stage=2),
    Case("Shampoo", SHAMPOO, stage=2),
    Case("Shampoo", SHAMPOO, stage=0),
]


@pytest.fixture(scope="module")
def adamw_folder(pool: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adamw")
    pool(2).run(saved_by_adamw, Case("ds_optim.AdamW", stage=2), str(folder))
    return folder


@pytest.mark.parametrize("case", ENGINES, ids=lambda case: f"{case.optimizer}-{case.stage}-{case.precision}")
def test_an_engine_on_two_ranks_starts_as_one_process_does(
    pool: Any, case: Case, adamw_folder: Path, tmp_path: Path
) -> None:
    pool(2).run(warm_engine, case, str(adamw_folder), str(tmp_path / "engine"))
    model = build_model(CASE)
    optimizer = getattr(ds_optim, case.optimizer.split(".")[-1])(model.named_parameters(), roles=model, **case.options)
    warm_start(adamw_folder, model, optimizer, weights=True)
    checkpoint.save(tmp_path / "alone", model, optimizer, tag="warm")
    engine, alone = (stored(tmp_path / one / "warm") for one in ("engine", "alone"))
    states = {name for name in alone if name.startswith(("state", "weights"))}
    assert states == {name for name in engine if name.startswith(("state", "weights"))}
    assert case.optimizer == "SWAN" or len(states) > 30
    for name in states:
        assert torch.equal(engine[name], alone[name]), name


def test_an_engine_takes_torchs_state_dict_and_goes_on_as_one_process_does(pool: Any, tmp_path: Path) -> None:
    case = Case("AdamMini", {"weight_decay": 0.1}, stage=2)  # so that its groups order parameters otherwise
    state_dict = adamw_run(named=False)[1].state_dict()
    reports = pool(2).run(warm_engine, case, state_dict, str(tmp_path))
    model = build_model(CASE)
    decays = weight_decays(model, case)
    groups: list[dict[str, Any]] = [{"params": [], "weight_decay": decay} for decay in (0.1, 0.0)]
    for name, parameter in model.named_parameters():
        groups[decays[name] == 0]["params"].append((name, parameter))
    mini = ds_optim.AdamMini(groups, roles=model)
    warm_start(state_dict, model, mini)
    weights = assembled([report["loaded"] for report in reports])
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.detach().reshape(-1), weights[name])
    for step in range(K + 1, K + 4):
        for group in mini.param_groups:
            group["lr"] = learning_rate(step)
        steps_of(model, mini, range(step, step + 1))
    for name, values in assembled(reports).items():
        assert torch.allclose(values, model.get_parameter(name).detach().reshape(-1), rtol=1e-6, atol=1e-6), name


@pytest.mark.parametrize(
    "case",
    [
        Case("AdamW", {"torch_adam": True, "betas": BETAS}, stage=2),
        Case("ds_optim.AdamW", {"betas": BETAS}, stage=3, precision="bf16"),
    ],
    ids=["torch-2", "ours-3"],
)
def test_a_directory_of_deepspeeds_will_do(pool: Any, case: Case, tmp_path: Path) -> None:
    pool(2).run(saved_by_deepspeed, case, str(tmp_path))
    wanted = started("Lion", adamw_run()[1].state_dict())[1]
    found = started("Lion", tmp_path)[1]
    for mine, its in zip(found.state.values(), wanted.state.values(), strict=True):
        assert mine["step"] == K
        assert torch.allclose(mine["exp_avg"], its["exp_avg"], rtol=1e-5, atol=1e-9)
    model = build_model(CASE)
    lion = ds_optim.Lion(model.named_parameters())
    with pytest.raises(checkpoint.CheckpointError, match="load others as usual before"):
        warm_start(tmp_path, model, lion, weights=True)


def test_another_optimizers_directory_of_deepspeeds_will_not(pool: Any, tmp_path: Path) -> None:
    pool(2).run(saved_by_deepspeed, Case("AdamMini", stage=2), str(tmp_path))
    with pytest.raises(checkpoint.CheckpointError, match="moments of other sizes than the parameters"):
        started("Lion", tmp_path)


def test_ranks_refuse_together(pool: Any, tmp_path: Path) -> None:
    for message in pool(2).run(refused_by_engine, Case("ds_optim.Lion", stage=2), str(tmp_path)):
        assert "gain is not in the source" in message
