"""fp16 with skipped steps, and what a NaN gradient does under each precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ds_optim.releases import DEEPSPEED
from engines import WIDTH, Case, assembled, build_model, constant_gradient, engine_for, learning_rate, masters, train
from expected import block_labels, distance, weight_decays
from pool import Pools
from reference.adam_mini import adam_mini
from reference.adan import adan

BAD_STEP = 4


def poisoned(case: Case, value: float) -> dict[str, Any]:
    """Train with ``value`` in one gradient element of one rank at `BAD_STEP`; what is left, and the step counts."""
    with engine_for(case) as (engine, model, clock):
        parameter = dict(model.named_parameters())["llama.model.layers.0.mlp.up_proj.weight"]

        def poison(grad: Tensor) -> Tensor:
            grad = grad.clone()
            if clock["step"] == BAD_STEP and torch.distributed.get_rank() == 0:
                grad.view(-1)[5] = value
            return grad

        parameter.register_hook(poison)
        train(engine, case, clock, range(1, case.steps + 1))
        counts = [int(state["step"]) for state in engine.basic_optimizer.state.values()]
        return {"masters": masters(engine), "counts": counts, "skipped": engine.skipped_steps}


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("optimizer", ["Adan", "AdamMini"])
def test_a_step_skipped_for_overflow_leaves_no_trace(pool: Pools, optimizer: str, stage: int) -> None:
    """Neither moments, nor the previous gradient, nor the step count know of it; the loss scale halves."""
    case = Case(optimizer, {"weight_decay": 0.1}, stage=stage, precision="fp16", steps=8)
    reports = pool(2).run(poisoned, case, float("inf"))
    assert [report["skipped"] for report in reports] == [1, 1]
    assert {count for report in reports for count in report["counts"]} == {case.steps - 1}

    model = build_model(case)
    params = {name: p.detach().double() for name, p in model.named_parameters()}
    state: dict[str, Any] = {}
    options: dict[str, Any] = {"weight_decay": weight_decays(model, case)}
    if optimizer == "AdamMini":
        options["labels"] = {name: block_labels(name, tuple(p.shape)) for name, p in params.items()}
    taken = 0
    for step in range(1, case.steps + 1):
        if step == BAD_STEP:
            continue
        taken += 1
        scale = 16.0 if step < BAD_STEP else 8.0
        grads = {n: constant_gradient(n, tuple(p.shape), step, 0).double() / scale for n, p in params.items()}
        oracle: Any = adam_mini if optimizer == "AdamMini" else adan
        oracle(params, grads, state, taken, lr=learning_rate(step), **options)
    wanted = {name: p.reshape(-1) for name, p in params.items()}
    assert distance(assembled(reports), wanted) <= 1e-6


# What a NaN in one gradient element does (docs/limits.md): DeepSpeed skips the step wherever it judges a norm.
NAN = {
    (0, "fp32"): "spreads",
    (0, "bf16"): "skipped",
    (1, "bf16"): "skipped",
    (1, "fp16"): "skipped",
    (2, "fp16"): "skipped",
    (3, "fp16"): "skipped",
    (1, "bf16_optimizer"): "skipped",
    (1, "fp32"): "skipped",
    (2, "fp32"): "skipped",
    (2, "bf16"): "skipped",
    (3, "fp32"): "skipped",
    (3, "bf16"): "skipped",
}
if DEEPSPEED.is_before("0.19.8"):  # which fails an assertion in BF16_Optimizer, and does not look everywhere
    del NAN[1, "bf16_optimizer"]
    NAN.update({(stage, "fp32"): "stepped" for stage in (1, 2, 3)})
    NAN[3, "bf16"] = "stepped"
if DEEPSPEED.is_before("0.19.3"):
    NAN[1, "bf16"] = NAN[2, "bf16"] = "stepped"


@pytest.mark.parametrize(("stage", "precision"), NAN)
def test_what_a_nan_gradient_does(pool: Pools, stage: int, precision: str) -> None:
    case = Case("AdamMini", stage=stage, precision=precision, steps=5)
    reports = pool(2).run(poisoned, case, float("nan"))
    hurt = {name: int(values.isnan().sum()) for name, values in assembled(reports).items() if values.isnan().any()}
    if NAN[stage, precision] == "skipped":
        assert not hurt
        assert [report["skipped"] for report in reports] == [1, 1]
    else:
        assert hurt == {"llama.model.layers.0.mlp.up_proj.weight": WIDTH}  # one row: one block
