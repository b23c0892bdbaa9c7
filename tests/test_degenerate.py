"""Models with little to train: nothing, parameters without elements, empty and frozen groups, freezing and unfreezing.

What DeepSpeed trains is trained; where it fails, or does nothing without a word, one error says what to change.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ds_optim
from ds_optim import checkpoint
from ds_optim.releases import DEEPSPEED
from engines import FLAT_BF16, assembled, masters, weights
from pool import Pools

OFFLOAD = {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": False}}
BF16 = {"bf16": {"enabled": True}}
FROZEN_MASTERS = DEEPSPEED.is_before("0.19.1")  # at ZeRO-0 in bf16: refused
LAYS_EMPTY_OUT = DEEPSPEED.is_before("0.19.8")  # at ZeRO-1/2: refused


class Small(nn.Module):
    """A body without bias, a head, and on request parameters without elements, which are the only ones spared decay."""

    def __init__(self, *, empty: bool = False, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body, self.head = nn.Linear(8, 6, bias=False), nn.Linear(6, 4, bias=False)
        self.gain = nn.Parameter(torch.ones(1, 1))
        self.none = nn.Linear(8, 0) if empty else None

    def forward(self, x: Tensor) -> Tensor:
        loss = self.head(torch.relu(self.body(x))).float().square().mean() * self.gain.sum()
        return loss if self.none is None else loss + self.none(x).sum()


@contextlib.contextmanager
def engine_of(
    model: nn.Module, optimizer: Any, zero: dict[str, Any], extra: dict[str, Any] | None = None, **arguments: Any
) -> Iterator[Any]:
    """An engine for a named optimizer, one that was made, or (None) without."""
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": zero,
        **(extra or {}),
    }
    if isinstance(optimizer, str):
        config["optimizer"] = {"type": optimizer, "params": {"lr": 1e-2, "weight_decay": 0.1}}
    elif optimizer is not None:
        arguments["optimizer"] = optimizer
    if "bf16" in config:
        model.bfloat16()
    engine, *_ = deepspeed.initialize(model=model, config=config, **arguments)
    try:
        yield engine
    finally:
        engine.destroy()


def inputs(model: nn.Module) -> Tensor:
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(7))
    return x.to(next(model.parameters()).dtype)


def steps(engine: Any, number: int) -> list[float]:
    """The learning rates of the steps taken."""
    rates = []
    for _ in range(number):
        rates.append(engine.get_lr()[0])
        engine.backward(engine(inputs(engine.module)))
        engine.step()
    return rates


def error_of(make: Any) -> str:
    try:
        with make():
            return ""
    except Exception as error:  # which kind is what the test judges
        return f"{type(error).__name__}: {error}"


# -- nothing to train -------------------------------------------------------------------------------------------------


def reference_models() -> dict[str, Any]:
    """The loss of a frozen model's engine, less the model's own, or the error; by how the engine is made."""
    found: dict[str, Any] = {}
    for stage in (0, 1, 2, 3):
        for how in ("AdamMini", "object", "none given", "without"):
            model = Small().requires_grad_(False)
            wanted = model(inputs(model))
            optimizer = ds_optim.AdamMini(model.parameters()) if how == "object" else how
            arguments = {"model_parameters": []} if how == "none given" else {}
            optimizer = {"without": None, "none given": "AdamMini"}.get(how, optimizer)
            try:
                with engine_of(model, optimizer, {"stage": stage}, **arguments) as engine:
                    found[f"{how} {stage}"] = (engine(inputs(model)) - wanted).item()
            except Exception as error:
                found[f"{how} {stage}"] = str(error)
    model = Small().requires_grad_(FROZEN_MASTERS)
    with engine_of(model, "AdamMini", {"stage": 0}, BF16) as engine:
        found["bf16"] = (engine(inputs(model)) - model(inputs(model))).item()
    return found


def test_a_model_with_nothing_to_train_is_built_without_zero_and_told_what_to_leave_out_with_it(pool: Pools) -> None:
    for found in pool(2).run(reference_models):
        for how in ("AdamMini", "object"):
            assert found[f"{how} 0"] == 0
            for stage in (1, 2, 3):
                message = found[f"{how} {stage}"]
                assert (
                    'nothing here is trained (all 3 parameters are frozen or without elements): leave "opt' in message
                )
                assert message.count("\n- ") == 1
                assert ("set zero_optimization.stage to 0 or 3" in message) == (stage != 3)
        for stage in (0, 1, 2, 3):
            assert "nothing here is trained (there are no parameters)" in found[f"none given {stage}"]
        assert (found["without 0"], found["without 3"], found["bf16"]) == (0, 0, 0)  # the remedies


# -- no elements ------------------------------------------------------------------------------------------------------


def beside_nothing(optimizer: str, zero: dict[str, Any], extra: dict[str, Any], folder: str) -> list[dict[str, Any]]:
    """Three and four steps of the model without and with parameters without elements; four, three at another stage."""
    found = []
    for empty in (False, True):
        model = Small(empty=empty)
        with engine_of(model, optimizer, zero, extra) as engine:
            steps(engine, 3)
            found.append({"masters": masters(engine)})
            if empty:
                checkpoint.save(folder, engine)
            steps(engine, 1)
            found.append({"masters": masters(engine)})
    other = {"stage": 0 if zero["stage"] or LAYS_EMPTY_OUT else 2}
    with engine_of(
        Small(empty=True, seed=1), optimizer, other, {k: v for k, v in extra.items() if k == "bf16"}
    ) as engine:
        checkpoint.load(folder, engine)
        steps(engine, 1)
        found.append({"masters": masters(engine)})
    for report in found:
        for name in [name for name in report["masters"] if name.startswith("none.")]:
            assert not sum(values.numel() for *_, values in report["masters"].pop(name))
    return found


BESIDE_NOTHING: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("ds_optim.AdamW", {"stage": 1}, {}),
    ("ds_optim.Lion", OFFLOAD, {}),
    ("Adan", {"stage": 1}, FLAT_BF16),
    ("AdamMini", {"stage": 0}, {}),
    ("AdamMini", {"stage": 2}, {}),
    ("Shampoo", {"stage": 2}, {}),
    ("SWAN", {"stage": 0}, BF16),
    ("SWAN", {"stage": 1}, {}),
    ("ds_optim.Muon", {"stage": 1}, {}),
    ("SOAP", {"stage": 0}, {}),
]


@pytest.mark.parametrize(
    ("optimizer", "zero", "extra"), [case for case in BESIDE_NOTHING if not (case[1]["stage"] and LAYS_EMPTY_OUT)]
)
def test_parameters_without_elements_change_nothing(
    pool: Pools, optimizer: str, zero: dict[str, Any], extra: dict[str, Any], tmp_path: Any
) -> None:
    reports = pool(2).run(beside_nothing, optimizer, zero, extra, str(tmp_path))
    three, four, three_beside, four_beside, resumed = (assembled([*one]) for one in zip(*reports, strict=True))
    for name, values in three.items():
        assert torch.equal(values, three_beside[name]), name
        assert torch.equal(four[name], four_beside[name]), name
        assert torch.allclose(four[name], resumed[name], rtol=1e-6, atol=1e-7), name


# -- groups -----------------------------------------------------------------------------------------------------------


def by_group(zero: dict[str, Any]) -> dict[str, str]:
    """The error of engines whose groups are empty, frozen or without elements."""
    found = {}

    def groups(model: Small, of_the_body: dict[str, Any]) -> list[dict[str, Any]]:
        return [{"params": [model.head.weight, model.gain]}, of_the_body]

    model = Small()
    empty = ds_optim.AdamW([*groups(model, {"params": [], "lr": 1e-3}), {"params": [model.body.weight]}], lr=1e-2)
    found["empty"] = error_of(lambda: engine_of(model, empty, zero))
    model = Small()
    empty = ds_optim.AdamW([*groups(model, {"params": [], "lr": 1e-3}), {"params": [model.body.weight]}], lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(empty, [lambda _: 1.0] * 3)
    found["empty, scheduled"] = error_of(lambda: engine_of(model, empty, zero, lr_scheduler=scheduler))
    for kind in ("json", "object", "callable"):
        model = Small()
        model.body.requires_grad_(False)
        of_the_body = {"params": [model.body.weight], "lr": 1e-3}
        if kind == "json":
            made, given = "AdamMini", {"model_parameters": groups(model, of_the_body)}
        elif kind == "object":
            made, given = ds_optim.AdamMini(groups(model, of_the_body)), {}
        else:
            made, given = (lambda _, m=model, g=of_the_body: ds_optim.AdamMini(groups(m, g))), {}
        found[kind] = error_of(lambda made=made, given=given, m=model: engine_of(m, made, zero, **given))
    model = Small(empty=True)
    found["elements"] = error_of(lambda: engine_of(model, "AdamMini", zero))
    return found


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_groups_that_deepspeed_cannot_lay_out_are_named(pool: Pools, stage: int) -> None:
    for found in pool(2).run(by_group, {"stage": stage}):
        assert not found["empty"]
        assert "parameter group 1 is empty" in found["empty, scheduled"]
        for kind in ("json", "object", "callable"):
            if stage == 3 and DEEPSPEED.is_before("0.19.3"):
                assert "parameter group 1 is frozen, and at ZeRO stage 3 deepspeed before 0.19.3 gives" in found[kind]
                continue
            named = f"group 1 (body.weight) has nothing to train, which DeepSpeed cannot lay out at ZeRO stage {stage}"
            assert (named in found[kind]) if stage in (1, 2) else not found[kind]
        if stage == 3 or (stage and LAYS_EMPTY_OUT):
            assert "none.weight of shape (0, 8) has no elements" in found["elements"]
            assert "none.bias of shape (0,) has no elements" in found["elements"]
        else:
            assert not found["elements"]


# -- freezing and unfreezing ------------------------------------------------------------------------------------------


def unfrozen_alive(zero: dict[str, Any], extra: dict[str, Any]) -> tuple[str, bool, list[str], list[dict[str, Any]]]:
    """The error of unfreezing the body, whether it changed anything, then the warnings of freezing the head."""
    model = Small()
    model.body.requires_grad_(False)
    with engine_of(model, "AdamMini", zero, extra) as engine:
        steps(engine, 2)
        before = masters(engine)
        model.body.requires_grad_(True)
        with pytest.raises(RuntimeError) as error:
            steps(engine, 1)
        unchanged = assembled([{"masters": before}, {"masters": masters(engine)}]) is not None
    reports, told = [], list[str]()
    for freeze in (True, False):
        model = Small()
        with engine_of(model, "AdamMini", zero, extra) as engine, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            steps(engine, 2)
            if freeze:
                model.head.requires_grad_(False)
            else:
                model.head.weight.register_hook(torch.zeros_like)
            steps(engine, 2)
            reports.append({"masters": masters(engine)})
            told += [str(one.message) for one in caught if "frozen after the engine was built" in str(one.message)]
    return str(error.value), unchanged, told, reports


@pytest.mark.parametrize(
    ("zero", "extra"),
    [
        pytest.param({"stage": 0}, {}, id="0"),
        *([] if FROZEN_MASTERS else [pytest.param({"stage": 0}, BF16, id="0 bf16")]),
        pytest.param({"stage": 1}, FLAT_BF16, id="1 bf16"),
        pytest.param(OFFLOAD, {}, id="2 offload"),
        pytest.param({"stage": 3}, {}, id="3"),
    ],
)
def test_a_live_engine_refuses_what_is_unfrozen_and_warns_once_of_what_is_frozen(
    pool: Pools, zero: dict[str, Any], extra: dict[str, Any]
) -> None:
    found = pool(2).run(unfrozen_alive, zero, extra)
    for message, unchanged, told, _ in found:
        assert message.startswith("body.weight: frozen when the engine was built")
        assert "strict=False" in message
        assert unchanged
        assert len(told) == 1
        assert told[0].startswith("head.weight: frozen after")
    frozen, zeroed = (assembled([*one]) for one in zip(*(reports for *_, reports in found), strict=True))
    for name, values in zeroed.items():
        assert torch.equal(values, frozen[name]), name


def groups_of(model: Small, together: bool) -> dict[str, Any]:
    """For `engine_of`: the body's parameters in a group of their own, or all in one."""
    head, body = [model.head.weight, model.gain], [model.body.weight]
    listed = [head + body] if together else [head, body]
    trained = [[one for one in group if one.requires_grad] for group in listed]
    return {"model_parameters": [{"params": iter(group)} for group in trained if group]}


def unfrozen_by_a_load(zero: dict[str, Any], together: bool, optimizer: str, folder: str) -> dict[str, Any]:
    """The head alone for three steps; then an engine that trains the body as well; then one with the body frozen."""
    schedule = {"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-2, "warmup_num_steps": 9}}}
    found: dict[str, Any] = {"rates": []}

    def engine_with(body: bool, seed: int) -> Any:
        model = Small(seed=seed)
        model.body.requires_grad_(body)
        return engine_of(model, optimizer, zero, schedule, **groups_of(model, together))

    with engine_with(False, seed=0) as engine:
        found["rates"] += steps(engine, 3)
        checkpoint.save(folder, engine, tag="head")
    with engine_with(True, seed=1) as engine:
        before = weights(engine.module)
        for strict in (True, False):
            try:
                checkpoint.load(folder, engine, tag="head", strict=strict)
            except checkpoint.CheckpointError as error:
                found["strict" if strict else "not strict"] = str(error)
                assert all(torch.equal(before[name], one) for name, one in weights(engine.module).items())
        if "not strict" in found:
            return found
        found["rates"] += steps(engine, 2)
        checkpoint.save(folder, engine, tag="all")
    with engine_with(False, seed=1) as engine:
        with pytest.raises(checkpoint.CheckpointError, match=r"body\.weight was trained and is not trained here"):
            checkpoint.load(folder, engine, tag="all")
        checkpoint.load(folder, engine, tag="all", strict=False)
        found["rates"] += steps(engine, 1)
        found["weights"] = weights(engine.module)
    return found


def by_hand(cls: Any, rates: list[float]) -> dict[str, Tensor]:
    """The same on one device: the head for three steps, all for two, the head again for one."""
    model = Small()
    groups = [{"params": [model.head.weight, model.gain]}, {"params": [model.body.weight]}]
    optimizer = cls(groups, roles=model, weight_decay=0.1)
    for step, rate in enumerate(rates):
        model.body.requires_grad_(step in (3, 4))
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        model(inputs(model)).backward()
        optimizer.step()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    ("zero", "optimizer", "together"),
    [
        ({"stage": 0}, "AdamMini", True),
        ({"stage": 2}, "ds_optim.AdamW", False),
        (OFFLOAD, "Shampoo", False),
        ({"stage": 3}, "AdamMini", False),
    ],
    ids=["0 AdamMini", "2 AdamW", "2 offload Shampoo", "3 AdamMini"],
)
def test_a_canonical_load_keeps_the_heads_state_when_the_body_is_unfrozen_and_frozen_again(
    pool: Pools, zero: dict[str, Any], optimizer: str, together: bool, tmp_path: Any
) -> None:
    for found in pool(2).run(unfrozen_by_a_load, zero, together, optimizer, str(tmp_path)):
        assert "body.weight was not trained when the checkpoint was saved" in found["strict"]
        assert "strict=False" in found["strict"]
        assert found["rates"] == sorted(found["rates"])  # the schedule went on: a new one begins at 0
        assert len(set(found["rates"])) == 5
        expected = by_hand(getattr(ds_optim, optimizer.split(".")[-1]), found["rates"])
        for name, values in expected.items():
            assert torch.allclose(values, found["weights"][name], rtol=1e-5, atol=1e-7), name


def test_what_is_stepped_together_with_older_state_is_refused_by_name(pool: Pools, tmp_path: Any) -> None:
    for found in pool(2).run(unfrozen_by_a_load, {"stage": 2}, True, "AdamMini", str(tmp_path)):
        assert (
            "body.weight has no state in the checkpoint and is stepped together here with head.weight, which took 3"
            in (found["not strict"])
        )
        assert "give it a parameter group of its own" in found["not strict"]


def with_a_frozen_one(kind: str, by_hand: bool) -> tuple[bool, bool]:
    """At ZeRO-0, whose groups keep frozen parameters: whether a frozen weight stayed, and the others moved."""
    model = Small()
    model.body.weight.requires_grad_(False)
    before = [one.detach().clone() for one in (model.body.weight, model.head.weight)]
    made = getattr(ds_optim, kind)(model.named_parameters(), lr=1e-2) if by_hand else f"ds_optim.{kind}"
    with engine_of(model, made, {"stage": 0}) as engine:
        for _ in range(2):
            engine.backward(engine(torch.ones(1, 8)))
            engine.step()
    after = [one.detach() for one in (model.body.weight, model.head.weight)]
    return torch.equal(before[0], after[0]), not torch.equal(before[1], after[1])


@pytest.mark.parametrize("kind", ["AdamW", "AdamMini", "Shampoo"])
def test_a_frozen_parameter_in_a_group_is_left_alone_at_stage_0(pool: Pools, kind: str) -> None:
    for by_hand in (True, False):
        assert pool(1).run(with_a_frozen_one, kind, by_hand) == [(True, True)]
