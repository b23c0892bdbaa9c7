"""Without any engine: the methods, hooks and habits of `torch.optim.Optimizer` that users and schedulers rely on."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ds_optim
from ds_optim.optimizers.registry import optimizers
from ds_optim.rule import WholeMatrix

CLASSES = list(optimizers().values())


def small_model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3))


def fill_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, numbers: range) -> None:
    for number in numbers:
        fill_gradients(model, number)
        optimizer.step()


def values(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def same(one: list[Tensor], two: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("cls", CLASSES)
def test_a_run_resumed_from_its_state_dict_is_bitwise_the_same(cls: Any, seed: int) -> None:
    whole = small_model(seed)
    optimizer = cls(whole.named_parameters(), roles=whole)
    steps(whole, optimizer, range(3))
    half, saved = copy.deepcopy(whole), io.BytesIO()
    torch.save(optimizer.state_dict(), saved)
    steps(whole, optimizer, range(3, 6))

    saved.seek(0)
    resumed = cls(half.named_parameters(), roles=half)
    resumed.load_state_dict(torch.load(saved, weights_only=True))
    steps(half, resumed, range(3, 6))
    assert same(values(whole), values(half))


@pytest.mark.parametrize("cls", CLASSES)
def test_a_load_changes_no_dtype_and_shares_no_memory(cls: Any, seed: int) -> None:
    model = small_model(seed).bfloat16()
    optimizer = cls(model.named_parameters(), roles=model, state_dtype="fp32")
    steps(model, optimizer, range(2))
    twin = cls(model.named_parameters(), roles=model)
    twin.load_state_dict(optimizer.state_dict())
    for parameter in model.parameters():
        for key, value in optimizer.state[parameter].items():
            loaded = twin.state[parameter][key]
            assert loaded.dtype == value.dtype
            assert loaded.dtype == torch.float32 or not value.is_floating_point()  # counts and identities
            assert torch.equal(loaded, value)
            assert loaded.data_ptr() != value.data_ptr() or not value.numel()


def test_half_precision_state_keeps_its_dtype_through_a_load(seed: int) -> None:
    model = small_model(seed)
    optimizer = ds_optim.Lion(model.parameters(), state_dtype=torch.bfloat16)
    steps(model, optimizer, range(2))
    twin = ds_optim.Lion(model.parameters(), state_dtype=torch.bfloat16)
    twin.load_state_dict(optimizer.state_dict())
    assert {state["exp_avg"].dtype for state in twin.state.values()} == {torch.bfloat16}


@pytest.mark.parametrize("cls", CLASSES)
def test_a_state_dict_taken_before_any_step_loads(cls: Any, seed: int) -> None:
    model = small_model(seed)
    optimizer = cls(model.parameters(), lr=0.25)
    fresh = cls(model.parameters())
    fresh.load_state_dict(optimizer.state_dict())
    assert fresh.param_groups[0]["lr"] == 0.25
    assert not fresh.state


def test_another_optimizers_state_is_refused(seed: int) -> None:
    model = small_model(seed)
    lion = ds_optim.Lion(model.parameters())
    steps(model, lion, range(1))
    with pytest.raises(ValueError, match="AdamW keeps"):
        ds_optim.AdamW(model.parameters()).load_state_dict(lion.state_dict())


def test_users_state_dict_hooks_see_plain_tensors(seed: int) -> None:
    model = small_model(seed)
    optimizer = ds_optim.AdamMini(model.named_parameters(), roles=model)
    steps(model, optimizer, range(1))
    seen: list[Any] = []

    def before(_: Any, state_dict: dict[str, Any]) -> None:
        seen.extend(type(v) for state in state_dict["state"].values() for v in state.values())

    def after(loaded: torch.optim.Optimizer) -> None:
        seen.extend(type(v) for state in loaded.state.values() for v in state.values())

    optimizer.register_load_state_dict_pre_hook(before)
    optimizer.register_load_state_dict_post_hook(after)
    optimizer.load_state_dict(optimizer.state_dict())
    assert len(seen) == 2 * 3 * len(list(model.parameters()))
    assert set(seen) == {Tensor}


@pytest.mark.parametrize("cls", CLASSES)
def test_gradients_are_never_written_to(cls: Any, seed: int) -> None:
    model = small_model(seed)
    optimizer = cls(model.named_parameters(), roles=model, weight_decay=0.1)
    fill_gradients(model, seed)
    before = [parameter.grad.clone() for parameter in model.parameters()]
    optimizer.step()
    assert same(before, [parameter.grad for parameter in model.parameters()])


@pytest.mark.parametrize("cls", CLASSES)
def test_a_tensor_learning_rate_and_a_scheduler_mean_what_floats_mean(cls: Any, seed: int) -> None:
    one, two = small_model(seed), small_model(seed)
    with_float = cls(one.named_parameters(), lr=0.125, roles=one)
    with_tensor = cls(two.named_parameters(), lr=torch.tensor(0.125), roles=two)
    schedulers = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step) for optimizer in (with_float, with_tensor)
    ]
    for number in range(3):
        steps(one, with_float, range(number, number + 1))
        steps(two, with_tensor, range(number, number + 1))
        for scheduler in schedulers:
            scheduler.step()
    for a, b in zip(values(one), values(two), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_a_closure_is_evaluated_with_gradients(seed: int) -> None:
    model = small_model(seed)
    optimizer = ds_optim.AdamW(model.parameters())

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(2, 5)).square().mean()
        loss.backward()
        return loss

    assert optimizer.step(closure) > optimizer.step(closure)


def test_a_group_added_later_starts_its_own_step_count(seed: int) -> None:
    model = small_model(seed)
    first, late = list(model[0].parameters()), list(model[2].parameters())
    optimizer = ds_optim.Adan(first)
    steps(model, optimizer, range(3))
    optimizer.add_param_group({"params": late, "lr": 0.5})
    steps(model, optimizer, range(3, 4))
    assert [int(optimizer.state[p]["step"]) for p in (*first, *late)] == [4, 4, 1, 1]


@pytest.mark.parametrize(
    "setting",
    [
        {"state_dtype": "int8"},
        {"matmul_precision": "bf16"},
        {"exchange_dtype": "bf16"},
        {"exchange_bucket_size": 1},
        {"seed": 0},
        {"int8_embeddings": False},
        {"bf16_stochastic_round": False},
    ],
    ids=str,
)
def test_a_group_cannot_have_what_is_the_whole_optimizers(setting: dict[str, Any], seed: int) -> None:
    """It would be ignored without a word."""
    model = small_model(seed)
    groups = [{"params": [model[0].weight]}, {"params": [model[2].weight], **setting}]
    with pytest.raises(ValueError, match=f"{next(iter(setting))} is a setting of the whole optimizer, not of one"):
        ds_optim.Muon(groups, roles=model)


@pytest.mark.parametrize("cls", CLASSES)
def test_a_parameter_without_gradient_is_left_alone(cls: Any, seed: int) -> None:
    model = small_model(seed)
    optimizer = cls(model.named_parameters(), roles=model, weight_decay=0.5)
    fill_gradients(model, seed)
    model[0].weight.grad = None
    before = model[0].weight.detach().clone()
    optimizer.step()
    assert torch.equal(model[0].weight, before)
    assert model[0].weight not in optimizer.state


def test_torchs_state_initialization_leaves_no_trace(seed: int) -> None:
    """`set_optimizer_state_dict` takes a step with learning rate 0 on zero gradients before it loads."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model = small_model(seed)
    optimizer = ds_optim.AdamW(model.parameters(), lr=0.5)
    before = values(model)
    get_optimizer_state_dict(model, optimizer)
    assert same(before, values(model))
    assert {int(state["step"]) for state in optimizer.state.values()} == {0}


def test_a_warm_up_from_zero_still_counts(seed: int) -> None:
    model = small_model(seed)
    optimizer = ds_optim.AdamW(model.parameters(), lr=0.0)
    steps(model, optimizer, range(1))
    assert {int(state["step"]) for state in optimizer.state.values()} == {1}


def test_zero_gradients_do_not_move_lion() -> None:
    parameter = nn.Parameter(torch.randn(64))
    optimizer = ds_optim.Lion([parameter], lr=0.5)
    before = parameter.detach().clone()
    for _ in range(5):
        parameter.grad = torch.zeros(64)
        parameter.grad[:32] = 1.0
        optimizer.step()
    assert torch.equal(parameter[32:], before[32:])
    assert not torch.equal(parameter[:32], before[:32])


@pytest.mark.parametrize("cls", CLASSES)
def test_channels_last_weights_are_the_same_parameters(cls: Any, seed: int) -> None:
    torch.manual_seed(seed)
    plain = nn.Conv2d(3, 4, 3)
    striped = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    for model in (plain, striped):
        steps(model, cls(model.named_parameters(), roles=model), range(3))
    assert not striped.weight.is_contiguous()
    assert same(values(plain), values(striped))


def test_names_may_be_left_out_when_the_model_is_given(seed: int) -> None:
    one, two = small_model(seed), small_model(seed)
    steps(one, ds_optim.AdamMini(one.parameters(), roles=one), range(3))
    steps(two, ds_optim.AdamMini(two.named_parameters(), roles=two), range(3))
    assert same(values(one), values(two))


@pytest.mark.parametrize(
    ("cls", "settings", "reasons"),
    [
        (ds_optim.AdamW, {"lr": -1, "betas": (0.9, 1.0), "eps": -1e-8}, ["lr must", "lie in [0, 1)", "eps must"]),
        (ds_optim.Adan, {"betas": (0.9, 0.999), "weight_decay": -0.1}, ["3 numbers", '"auto"', "weight_decay must"]),
        (ds_optim.Lion, {"state_dtype": "int4"}, ["fp32, bf16 or int8"]),
        (ds_optim.AdamMini, {"lr": "fast"}, ["lr must be a finite number"]),
        (ds_optim.AdamMini, {"lr": torch.tensor(-1.0), "weight_decay": None}, ["lr must", "weight_decay must"]),
    ],
)
def test_bad_settings_are_listed_together(cls: Any, settings: dict[str, Any], reasons: list[str]) -> None:
    with pytest.raises(ValueError, match=r":\n- ") as caught:
        cls([nn.Parameter(torch.ones(2))], **settings)
    for reason in reasons:
        assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("dtype", "remedy"),
    [
        (torch.complex64, "two real parameters"),
        (torch.float64, "model.float()"),
        (torch.float8_e4m3fn, "convert it to fp32, bf16 or fp16, or freeze it"),
    ],
)
def test_parameters_of_other_dtypes_are_refused_with_what_to_do(dtype: torch.dtype, remedy: str) -> None:
    with pytest.raises(ValueError, match=f"weight is {dtype}") as caught:
        ds_optim.AdamW([("weight", nn.Parameter(torch.ones(2).to(dtype)))])
    assert remedy in str(caught.value)


def test_lion_ignores_eps_with_one_warning() -> None:
    with pytest.warns(UserWarning, match="Lion has no eps"):
        ds_optim.Lion([nn.Parameter(torch.ones(2))], eps=1e-6)


def test_roles_that_match_nothing_are_an_error(seed: int) -> None:
    model = small_model(seed)
    optimizer = ds_optim.AdamMini(model.named_parameters(), roles={"*.q_proj.*": "query", "*": "no such kind"})
    fill_gradients(model, seed)
    before = values(model)
    with pytest.raises(ValueError, match="role") as caught:
        optimizer.step()
    assert "q_proj" in str(caught.value)
    assert "no such kind" in str(caught.value)
    assert same(before, values(model))


@pytest.mark.parametrize("cls", CLASSES)
def test_a_nan_stays_where_it_belongs(cls: Any) -> None:
    """Elementwise: in its element. Adam-mini: in its block, here a row. Whole matrices: the update is withheld."""
    model = nn.Linear(4, 3, bias=False)
    optimizer = cls(model.named_parameters(), roles=model)
    model.weight.grad = torch.ones(3, 4)
    model.weight.grad[1, 2] = float("nan")
    optimizer.step()
    hurt = model.weight.isnan()
    expected = torch.zeros(3, 4, dtype=torch.bool)
    if cls is ds_optim.AdamMini:
        expected[1] = True
    elif not isinstance(cls.rule, WholeMatrix):
        expected[1, 2] = True
    assert torch.equal(hurt, expected)


def test_state_of_other_blocks_is_refused_and_changes_nothing() -> None:
    weight = nn.Parameter(torch.ones(8, 6))
    by_element = ds_optim.AdamMini([("weight", weight)], roles={"weight": "bias"})
    by_row = ds_optim.AdamMini([("weight", weight)], roles={"weight": "mlp"})
    weight.grad = torch.ones(8, 6)
    by_element.step()
    with pytest.raises(ValueError, match=r"exp_avg_sq of a tensor of shape .* has 48 values, not 8"):
        by_row.load_state_dict(by_element.state_dict())
    assert not by_row.state


def test_state_of_another_shape_is_refused() -> None:
    tall, wide = nn.Parameter(torch.ones(8, 6)), nn.Parameter(torch.ones(6, 8))
    optimizer = ds_optim.AdamW([tall])
    tall.grad = torch.ones(8, 6)
    optimizer.step()
    with pytest.raises(ValueError, match="exp_avg has shape"):
        ds_optim.AdamW([wide]).load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("copier", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))], ids=["copy", "pickle"])
def test_a_copy_goes_on_where_the_original_was(cls: Any, copier: Any, seed: int) -> None:
    model = small_model(seed)
    optimizer = cls(model.named_parameters(), roles=model)
    steps(model, optimizer, range(2))
    twin_model, twin = copier((model, optimizer))
    steps(model, optimizer, range(2, 4))
    steps(twin_model, twin, range(2, 4))
    assert same(values(model), values(twin_model))


def test_a_refused_step_does_not_count(seed: int) -> None:
    dense, sparse = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, 2))
    optimizer = ds_optim.AdamW([("dense", dense), ("table", sparse)])
    dense.grad, sparse.grad = torch.ones(3), torch.ones(3, 2).to_sparse()
    with pytest.raises(ValueError, match=r"table has a sparse gradient.*sparse=False"):
        optimizer.step()
    assert torch.equal(dense, torch.ones(3))
    assert not optimizer.state


def test_tables_do_not_pile_up(seed: int) -> None:
    """Experts that get gradients now and then: every subset is another list of tensors."""
    parameters = [nn.Parameter(torch.ones(4)) for _ in range(8)]
    optimizer = ds_optim.AdamW(parameters)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(200):
        for parameter in parameters:
            parameter.grad = torch.ones(4) if torch.rand((), generator=generator) < 0.5 else None
        optimizer.step()
    assert len(optimizer.stepper.buffers()) <= 3 * 64


# -- names ------------------------------------------------------------------------------------------------------------


class Twins(nn.Module):
    """Parameters of one shape, which a state dict tells apart by name or not at all."""

    def __init__(self, order: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name in order:
            self.register_module(name, nn.Linear(6, 6, bias=False))


def step_by_name(model: nn.Module, optimizer: torch.optim.Optimizer, numbers: range) -> dict[str, Tensor]:
    """Steps whose gradients depend on the parameters' names; the weights after them."""
    for number in numbers:
        for name, parameter in model.named_parameters():
            generator = torch.Generator().manual_seed(100 * ord(name.removeprefix("module.")[0]) + number)
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def resumed_by_name(make: Any, saved_order: str, order: str, edit: Any = lambda state_dict: state_dict) -> bool:
    """Whether a run that is resumed by a model of another order ends as if it had not been interrupted."""
    model = Twins(saved_order)
    optimizer = make(model)
    step_by_name(model, optimizer, range(2))
    state_dict, weights = edit(copy.deepcopy(optimizer.state_dict())), copy.deepcopy(model.state_dict())
    whole = step_by_name(model, optimizer, range(2, 5))
    other = Twins(order)
    other.load_state_dict(weights)
    resumed = make(other)
    resumed.load_state_dict(state_dict)
    assert all("param_names" not in group for group in resumed.param_groups)
    found = step_by_name(other, resumed, range(2, 5))
    return all(torch.equal(found[name], values) for name, values in whole.items())


@pytest.mark.parametrize("cls", CLASSES)
def test_state_goes_by_name_where_parameters_have_changed_places(cls: Any) -> None:
    def named(model: nn.Module) -> Any:
        return cls(model.named_parameters(), lr=0.1, roles=model)

    assert resumed_by_name(named, "abc", "cab")
    assert resumed_by_name(lambda model: cls(model.parameters(), lr=0.1, roles=model), "ab", "ba")
    of_wrapped = lambda model: cls(nn.ModuleDict({"module": model}).named_parameters(), lr=0.1, roles=model)  # noqa: E731
    assert of_wrapped(Twins("ab")).state_dict()["param_names"] == [["a.weight", "b.weight"]]


def test_state_without_names_goes_by_position() -> None:
    """As that of older versions does, and of optimizers that were told no names."""

    def unnamed(model: nn.Module) -> Any:
        return ds_optim.AdamW(model.parameters(), lr=0.1)

    def named(model: nn.Module) -> Any:
        return ds_optim.AdamW(model.named_parameters(), lr=0.1)

    def without(state_dict: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in state_dict.items() if key != "param_names"}

    model = Twins("ab")
    assert "param_names" not in unnamed(model).state_dict()
    assert "param_names" not in copy.deepcopy(unnamed(model)).state_dict()
    assert copy.deepcopy(named(model)).state_dict()["param_names"] == [["a.weight", "b.weight"]]
    assert resumed_by_name(unnamed, "ab", "ab")
    assert not resumed_by_name(unnamed, "ab", "ba")
    assert resumed_by_name(named, "ab", "ab", without)
    assert not resumed_by_name(named, "ab", "ba", without)


def test_torchs_names_are_understood() -> None:
    """torch lists names in the groups; it goes by position itself."""
    model, other = Twins("ab"), Twins("ba")
    theirs = torch.optim.AdamW(model.named_parameters())
    step_by_name(model, theirs, range(2))
    ours = ds_optim.AdamW(other.named_parameters())
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours.state[other.a.weight]["exp_avg"], theirs.state[model.a.weight]["exp_avg"])
    again = ds_optim.AdamW(theirs.param_groups)
    assert again.state_dict()["param_names"] == [["a.weight", "b.weight"]]
    theirs.load_state_dict(again.state_dict())


def test_names_without_a_counterpart_are_refused_and_change_nothing() -> None:
    model, other = Twins("abc"), Twins("abd")
    first, second = (ds_optim.Lion(one.named_parameters(), lr=0.1) for one in (model, other))
    step_by_name(model, first, range(1))
    with pytest.raises(ValueError, match=r"c\.weight is in its group 0, not in the optimizer's") as caught:
        second.load_state_dict(first.state_dict())
    assert "d.weight is not in its group 0, but in the optimizer's" in str(caught.value)
    assert "without 'param_names' it would go by position" in str(caught.value)
    assert not second.state


def test_groups_that_have_changed_places_are_refused() -> None:
    """Their settings, and the rates of a scheduler, go by position."""

    def make(model: nn.Module, order: str) -> tuple[Any, Any]:
        rates = {"a": 0.1, "b": 0.01}
        groups = [{"params": getattr(model, name).named_parameters(name), "lr": rates[name]} for name in order]
        optimizer = ds_optim.AdamMini(groups, roles=model)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)

    model = Twins("ab")
    optimizer, scheduler = make(model, "ab")
    step_by_name(model, optimizer, range(1))
    scheduler.step()
    again, its_scheduler = make(Twins("ba"), "ab")
    again.load_state_dict(optimizer.state_dict())
    its_scheduler.load_state_dict(scheduler.state_dict())
    assert [group["lr"] for group in again.param_groups] == [0.05, 0.005]
    with pytest.raises(ValueError, match=r"a\.weight is in its group 0, not in the optimizer's"):
        make(Twins("ab"), "ba")[0].load_state_dict(optimizer.state_dict())


# -- odd models -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", CLASSES)
def test_parameters_of_no_element_and_of_one_empty_and_frozen_groups_are_stepped_as_they_should(cls: Any) -> None:
    """Beside a model, under a schedule, with a layer that is unfrozen for one step in the middle."""

    def train(scalar: tuple[int, ...], empty: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = nn.ModuleDict({"body": nn.Linear(5, 5, bias=False), "head": nn.Linear(5, 3, bias=False)})
        model.register_parameter("logit_scale", nn.Parameter(torch.ones(scalar)))
        groups: list[dict[str, Any]] = [
            {"params": [("head.weight", model["head"].weight), ("logit_scale", model.logit_scale)]},
            {"params": [("body.weight", model["body"].weight)], "lr": 0.01},
        ]
        if empty:
            model["none"] = nn.Linear(5, 0)
            groups[0]["params"] += [(f"none.{name}", one) for name, one in model["none"].named_parameters()]
            groups.append({"params": []})
        optimizer = cls(groups, lr=0.1, weight_decay=0.1, roles=model)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda step: 0.9**step] * len(groups))
        for step in range(5):
            model["body"].requires_grad_(step == 2)
            optimizer.zero_grad()
            hidden = model["body"](torch.arange(10.0).reshape(2, 5) / 10)
            loss = model["head"](hidden).square().sum() * model.logit_scale.exp().sum()
            (loss + (model["none"](hidden).sum() if empty else 0)).backward()
            before = model["body"].weight.detach().clone()
            optimizer.step()
            scheduler.step()
            looks_on = cls is ds_optim.SOAP  # in a parameter's first step
            assert torch.equal(before, model["body"].weight) == (step != 2 or looks_on)
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        return {name: one.detach().reshape(-1) for name, one in model.named_parameters() if one.numel()}

    wanted = {shape: train(shape, empty=False) for shape in ((), (1,))}
    for shape, values in wanted.items():
        found = train(shape, empty=True)
        assert found.keys() == values.keys()
        assert all(torch.equal(found[name], value) for name, value in values.items())
    # A vector of one is a block of Shampoo's, whose graft takes Adam's step in another order; a number is none.
    for name, value in wanted[()].items():
        torch.testing.assert_close(value, wanted[1,][name], rtol=1e-6, atol=1e-6)


# -- what goes with an optimizer, and what stays ----------------------------------------------------------------------


@pytest.mark.parametrize("cls", CLASSES)
def test_an_optimizer_and_its_model_go_when_nobody_refers_to_them(cls: Any, seed: int) -> None:
    """By reference counting alone: a garbage collection may come late, and state is large."""
    model = small_model(seed)
    optimizer = cls(model.named_parameters(), roles=model)
    steps(model, optimizer, range(2))
    left = [weakref.ref(model), weakref.ref(optimizer), weakref.ref(next(iter(optimizer.state.values()))["step"])]
    gc.disable()
    try:
        del model, optimizer
        assert [one() for one in left] == [None, None, None]
    finally:
        gc.enable()


@pytest.mark.parametrize("cls", CLASSES)
def test_a_group_may_carry_what_is_no_setting_of_groups(cls: Any, seed: int) -> None:
    """As DeepSpeed's and others' groups do."""
    model = small_model(seed)
    optimizer = cls([{"params": [*model.parameters()], "state_dtype": torch.float32}], roles=model)
    steps(model, optimizer, range(2))
    assert int(optimizer.state[model[0].weight]["step"]) == 2  # type: ignore[index]
