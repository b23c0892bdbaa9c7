"""Bad input: one error that lists every reason and the remedy, on every rank, before any weight changes."""

from __future__ import annotations

import os
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch

from ds_optim.deepspeed import differences, wrappers
from ds_optim.releases import DEEPSPEED
from engines import Case, build_engine, build_model, engine_for, masters, train
from pool import Pools


def attempt(case: Case) -> str:
    """The error of building the case's engine."""
    try:
        engine, _ = build_engine(case)
    except Exception as error:  # which kind is what the test judges
        return f"{type(error).__name__}: {error}"
    engine.destroy()
    return "no error"


def refused(pool: Pools, case: Case, *reasons: str, ranks: int = 2) -> None:
    for message in pool(ranks).run(attempt, case):
        for reason in reasons:
            assert reason in message, message


def test_every_reason_is_listed_at_once(pool: Pools) -> None:
    refused(
        pool,
        Case(
            "AdamMini",
            {"lr": -1, "betas": [0.9, 1.5], "momentum": 0.9, "roles": {"*.no_such.*": "mlp"}},
            stage=3,
            zero={"offload_optimizer": {"device": "cpu", "ratio": 0.5}, "elastic_checkpoint": True},
            extra={"checkpoint": {"load_universal": True}},
        ),
        "ValueError: ds_optim cannot run under this configuration, nothing was changed",
        "has no option 'momentum'",
        "lr must be a finite number >= 0",
        "every beta must lie in [0, 1), not 1.5",
        "no_such",
        "ratio below 1",
        "elastic_checkpoint",
        "load_universal",
    )


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (Case("Adan", zero={"offload_optimizer": {"device": "nvme", "nvme_path": "/nowhere"}}, stage=3), "nvme"),
        (
            Case("Adan", zero={"offload_optimizer": {"device": "cpu", "super_offload": True}}, stage=3),
            "super_offload updates with its own Adam",
        ),
        (Case("Adan", precision="bf16", extra={"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}), ""),
        (Case("Adan", {"betas": [0.9, 0.999]}), "betas must be 3 numbers"),
        (Case("Adan", {"lr": "auto"}), '"auto" for lr'),
        (Case("Adan", precision="fp16", stage=0), "fp16 without ZeRO"),
        (Case("Adan", extra={"ds_optim": {"no_decay": ["*.nothing"]}}), "'*.nothing' matches no parameter"),
        (Case("Adan", extra={"ds_optim": {"warmup": 3}}), "has no option 'warmup'"),
        (Case("Adan", extra={"ds_optim": {"no_decay": "*.bias"}}), "must be a list of name patterns"),
        (Case("Adan", client=True, extra={"ds_optim": {"betas": [0.9, 0.9, 0.9]}}), "that the JSON names"),
        (
            Case("AdamMini", {"roles": {"*.q_proj.weight": {"kind": "query", "head_dim": 5}}}),
            "head_dim 5 does not divide",
        ),
        (Case("ds_optim.AdamW", {"lr": 0.1}, client=True, stage=3, zero={"elastic_checkpoint": True}), "elastic"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_exact_is_refused(pool: Pools, case: Case, reason: str) -> None:
    if "bf16_master_weights_and_grads" in str(case.extra):
        case = Case(case.optimizer, stage=2, precision="fp32", extra=case.extra)  # the case's own bf16 section counts
        reason = "bf16_master_weights_and_grads drops the fp32 master weights"
    refused(pool, case, reason)


def test_zenflow_is_refused(pool: Pools) -> None:
    zenflow = {
        "stage": 2,
        "offload_optimizer": {"device": "cpu", "pin_memory": False},
        "zenflow": {"topk_ratio": 0.1, "select_strategy": "step", "select_interval": 1, "update_interval": 1},
    }
    refused(pool, Case("AdamMini", zero=zenflow), "zenflow updates with its own Adam")


def test_an_unknown_name_is_deepspeeds_own_error(pool: Pools) -> None:
    refused(pool, Case("AdamMinus"), "AdamMinus")


def one_rank_disagrees(kind: str) -> str:
    """Build an engine whose layout is spoiled on rank 1 only, between DeepSpeed's set-up and ours."""
    import deepspeed.runtime.zero.stage_1_and_2 as stage

    original = stage.DeepSpeedZeroOptimizer.__init__

    def spoiled(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if torch.distributed.get_rank() == 1:
            if kind == "offset":
                stated = [differences.offsets(self, index) for index in range(len(self.round_robin_bit16_groups))]
                self.round_robin_bit16_offsets = [[stated[0][0], stated[0][1] + 1, *stated[0][2:]], *stated[1:]]
            elif kind == "master":
                self.single_partition_of_fp32_groups[0].data[0] += 1
            elif kind == "attribute":
                del self.partition_size

    stage.DeepSpeedZeroOptimizer.__init__ = spoiled
    try:
        return attempt(Case("AdamMini", stage=2))
    finally:
        stage.DeepSpeedZeroOptimizer.__init__ = original


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("offset", "DeepSpeed's offsets say"),
        ("master", "the fp32 master at 0 does not hold the weight's elements"),
        ("attribute", "has no partition_size; deepspeed versions known to work: 0.18.6 and later"),
    ],
)
def test_a_layout_that_cannot_be_matched_on_one_rank_fails_on_all(pool: Pools, kind: str, reason: str) -> None:
    for message in pool(2).run(one_rank_disagrees, kind):
        assert "nothing was changed" in message
        assert "rank 1: " in message
        assert reason in message


def attempt_without(attribute: str, case: Case) -> str:
    """The error of building the case's engine if it calls an attribute otherwise when it gets its optimizer."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    configure, listed = DeepSpeedEngine._configure_optimizer, DeepSpeedEngine.__dir__

    def hidden(engine: Any, name: str) -> Any:
        if name == attribute:
            raise AttributeError(name)
        return object.__getattribute__(engine, name)

    def configured(engine: Any, *arguments: Any) -> None:
        if attribute.startswith("_config."):
            delattr(engine._config, attribute.removeprefix("_config."))
        without = {
            "__getattribute__": hidden,
            "__dir__": lambda self: [one for one in listed(self) if one != attribute],
        }
        with patch.multiple(DeepSpeedEngine, create=True, **without):
            configure(engine, *arguments)

    with patch.object(DeepSpeedEngine, "_configure_optimizer", configured):
        return attempt(case)


def attempts_without(attributes: list[str], case: Case) -> dict[str, str]:
    return {attribute: attempt_without(attribute, case) for attribute in attributes}


EARLY = [
    name for name in wrappers.ENGINE_ATTRIBUTES["configuration"] if name != "module"
]  # which torch finds elsewhere
LATE = ["skipped_steps", "inside_no_sync_ctxt", "use_node_local_storage"]


@pytest.mark.parametrize(
    ("attributes", "is_made_by_hand", "said"),
    [
        # of an optimizer that the JSON names nothing is known without the method that says so
        ([name for name in EARLY if name != "optimizer_name"], False, "cannot run under this configuration"),
        (EARLY, True, "cannot run under this configuration"),
        (LATE, True, "cannot match the optimizer's tensors"),
    ],
)
def test_an_engine_that_calls_an_attribute_otherwise_is_refused_with_the_releases_that_work(
    pool: Pools, attributes: list[str], is_made_by_hand: bool, said: str
) -> None:
    for found in pool(2).run(attempts_without, attributes, Case("AdamMini", client=is_made_by_hand)):
        for attribute, message in found.items():
            assert said in message, message
            assert f"DeepSpeedEngine has no {attribute}" in message or f", {attribute}" in message, message
            assert f"; {DEEPSPEED.known}; pip install 'deepspeed==" in message
            assert "nothing was changed" in message


def spare_the_mlp(case: Case) -> dict[str, Any]:
    """Two steps of zero gradients: only weight decay moves anything. The weights before and after."""
    with engine_for(case) as (engine, model, clock):
        for parameter in model.parameters():
            parameter.register_hook(torch.zeros_like)
        before = masters(engine)
        train(engine, case, clock, range(1, 3))
        after = masters(engine)
        return {
            name: all(torch.equal(a[2], b[2]) for a, b in zip(before[name], after[name], strict=True)) for name in after
        }


@pytest.mark.parametrize(
    ("settings", "still"),
    [
        ({}, ("norm", "bias")),
        ({"ds_optim": {"no_decay": []}}, ()),
        ({"ds_optim": {"no_decay": ["*.mlp.*"]}}, (".mlp.",)),
    ],
)
def test_a_flat_parameter_list_gets_decay_exempt_groups(
    pool: Pools, settings: dict[str, Any], still: tuple[str, ...]
) -> None:
    case = Case("ds_optim.AdamW", {"weight_decay": 0.5}, stage=2, extra=settings)
    for report in pool(2).run(spare_the_mlp, case):
        for name, unmoved in report.items():
            assert unmoved == any(part in name for part in still), name


def options_of(case: Case) -> dict[str, Any]:
    engine, _ = build_engine(case)
    group = {key: value for key, value in engine.basic_optimizer.param_groups[0].items() if key != "params"}
    engine.destroy()
    return group


def test_the_ds_optim_object_takes_precedence(pool: Pools) -> None:
    """A Trainer fills betas with two numbers; Adan's three come from the top-level object."""
    case = Case("Adan", {"betas": [0.9, 0.999]}, extra={"ds_optim": {"betas": [0.9, 0.8, 0.7], "no_prox": True}})
    for group in pool(1).run(options_of, case):
        assert group["betas"] == [0.9, 0.8, 0.7]
        assert group["no_prox"] is True


def by_callable(case: Case) -> str:
    """An engine whose optimizer is made by a callable; or its error."""
    import deepspeed

    import ds_optim

    try:
        engine, *_ = deepspeed.initialize(
            model=build_model(case), config=case.config(), optimizer=lambda parameters: ds_optim.AdamMini(parameters)
        )
    except ValueError as error:
        return str(error)
    kind = f"{type(engine.basic_optimizer).__name__}, bound: {engine.basic_optimizer.is_bound}"
    engine.destroy()
    return kind


def test_a_callable_may_make_the_optimizer_under_offload_too(pool: Pools) -> None:
    offload = {"offload_optimizer": {"device": "cpu", "pin_memory": False}}
    good = Case("AdamMini", client=True, zero=offload)
    assert pool(2).run(by_callable, good) == ["AdamMini, bound: True"] * 2
    bad = Case("AdamMini", client=True, stage=3, zero={"offload_optimizer": {"device": "cpu", "ratio": 0.5}})
    assert all("ratio below 1" in message for message in pool(2).run(by_callable, bad))


def pairs(case: Case) -> list[float]:
    """The groups' weight decays when model_parameters are (name, parameter) pairs."""
    import deepspeed

    model = build_model(case)
    engine, *_ = deepspeed.initialize(
        model=model, config=case.config(), model_parameters=list(model.named_parameters())
    )
    decays = [group["weight_decay"] for group in engine.basic_optimizer.param_groups]
    engine.destroy()
    return decays


def test_model_parameters_may_be_pairs(pool: Pools) -> None:
    assert pool(1).run(pairs, Case("AdamMini", {"weight_decay": 0.25})) == [[0.25, 0.0]]


def other_kernels_on_one_rank(value: str) -> str:
    if torch.distributed.get_rank() == 1:
        os.environ["DS_OPTIM_KERNELS"] = value
    try:
        return attempt(Case("AdamMini"))
    finally:
        os.environ.pop("DS_OPTIM_KERNELS", None)


@pytest.mark.parametrize(
    ("value", "reason"), [("eager", "ranks would use different kernels"), ("nonsense", "rank 1: no kernels")]
)
def test_ranks_must_agree_on_their_kernels(pool: Pools, value: str, reason: str) -> None:
    for message in pool(2).run(other_kernels_on_one_rank, value):
        assert reason in message


def with_a_sparse_embedding(stage: int, *, is_frozen: bool) -> str:
    """An engine over a model with such an embedding; its error, if there is one."""
    import deepspeed

    model = torch.nn.Sequential(torch.nn.Embedding(10, 4, sparse=True), torch.nn.Linear(4, 1))
    model[0].weight.requires_grad_(not is_frozen)
    config = Case("ds_optim.AdamW", stage=stage).config()
    try:
        engine, *_ = deepspeed.initialize(model=model, config=config, model_parameters=list(model.parameters()))
    except ValueError as error:
        return str(error)
    engine.backward(engine(torch.tensor([[1, 2]])).square().mean())
    engine.step()
    engine.destroy()
    return "no error"


def test_sparse_embeddings_are_refused_when_the_engine_is_built(pool: Pools) -> None:
    """DeepSpeed would fail in the first backward pass; at ZeRO-0 in the first step."""
    for message in pool(2).run(partial(with_a_sparse_embedding, is_frozen=False), 0):
        assert "0.weight: Embedding(sparse=True) makes a sparse gradient" in message
        assert "sparse=False" in message
    assert pool(1).run(partial(with_a_sparse_embedding, is_frozen=True), 2) == ["no error"]


def test_onecycle_would_write_two_betas_into_an_optimizer_with_three(pool: Pools) -> None:
    scheduler = {"type": "OneCycle", "params": {"cycle_min_lr": 1e-4, "cycle_max_lr": 1e-3}}
    refused(pool, Case("Adan", extra={"scheduler": scheduler}), '"cycle_momentum": false', ranks=1)
