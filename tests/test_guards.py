"""Where DeepSpeed loads, skips or drops without a word, we say it before weights are wrong. Its AdamW does the same."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor

from engines import Case, engine_for, learning_rate, masters, train, weights
from pool import Pools

TOKENS = torch.arange(12).view(1, 12)


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


# -- loads of weights alone -----------------------------------------------------------------------------------------


def weights_alone(case: Case, folder: Path, arguments: dict[str, Any]) -> str:
    """What becomes of a checkpoint's weights when they alone are loaded into a trained engine."""
    with engine_for(case) as (engine, model, clock):
        train(engine, case, clock, range(1, 3))
        wanted = weights(model)
        engine.save_checkpoint(folder, tag="wanted")
        train(engine, case, clock, range(3, 5))
        engine.save_checkpoint(folder, tag="later", save_latest=False)
        try:
            engine.load_checkpoint(folder, **arguments)
        except ValueError as error:
            return str(error)
        loaded = weights(model)
        for group in engine.optimizer.param_groups:
            group["lr"] = 0.0  # the step gives the model the masters, as they are
        engine.backward(engine(TOKENS))
        engine.step()
        return f"loaded: {same(loaded, wanted)}, kept by a step: {same(weights(model), wanted)}"


@pytest.mark.parametrize(
    ("stage", "precision", "arguments"),
    [
        (0, "bf16", {"load_optimizer_states": False}),  # with DeepSpeed's AdamW the step brings the old weights back
        (0, "bf16", {"load_module_only": True}),
        (2, "bf16", {"load_optimizer_states": False}),
        (3, "bf16", {"load_optimizer_states": False}),
        (3, "bf16", {"load_optimizer_states": False, "load_module_only": True, "tag": "wanted"}),
    ],
)
def test_weights_that_are_loaded_alone_are_those_that_the_next_step_starts_from(
    pool: Pools, tmp_path: Path, stage: int, precision: str, arguments: dict[str, Any]
) -> None:
    case = Case("ds_optim.AdamW", stage=stage, precision=precision)
    found = pool(2).run(weights_alone, case, tmp_path, arguments)
    assert found == ["loaded: True, kept by a step: True"] * 2


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        ({"load_module_only": True}, "give load_optimizer_states=False as well"),
        ({"load_optimizer_states": False, "tag": "later"}, "write 'later' into that file first"),
    ],
)
def test_a_load_at_zero_3_that_would_bring_other_weights_is_refused(
    pool: Pools, tmp_path: Path, arguments: dict[str, Any], remedy: str
) -> None:
    case = Case("AdamMini", stage=3)
    for message in pool(2).run(weights_alone, case, tmp_path, arguments):
        assert remedy in message
        assert "nothing was changed" in message


# -- skipped steps --------------------------------------------------------------------------------------------------


def skipped(case: Case) -> tuple[int, list[str]]:
    """The steps that were skipped out of three with a NaN and one without, and what was said."""
    with engine_for(case) as (engine, model, clock), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        bad = model.extra.weight.register_hook(lambda grad: grad * float("nan"))
        train(engine, case, clock, range(1, 4))
        bad.remove()
        train(engine, case, clock, range(4, 5))
        return engine.skipped_steps, [str(one.message) for one in caught if "skipped" in str(one.message)]


def test_the_first_skipped_step_at_zero_0_is_told(pool: Pools) -> None:
    ((count, said),) = pool(1).run(skipped, Case("ds_optim.Lion", stage=0, precision="bf16"))
    assert count == 3
    assert len(said) == 1
    assert "step 1 was skipped" in said[0]
    assert "engine.skipped_steps" in said[0]


# -- several backward passes in one step ----------------------------------------------------------------------------


def passes(engine: Any, how: str) -> None:
    """Two backward passes, then a step."""
    if how == "one after the other":
        for _ in range(2):
            engine.backward(engine(TOKENS))
    elif how == "both forward first":
        losses = [engine(TOKENS) for _ in range(2)]
        for loss in losses:
            engine.backward(loss)
    elif how == "both forward first, by torch":
        losses = [engine(TOKENS) for _ in range(2)]
        for loss in losses:
            loss.backward()
    elif how == "coalesced":
        with engine.coalesce_grad_reduction():
            for _ in range(2):
                engine.backward(engine(TOKENS))
    elif how == "by hand":
        engine.set_gradient_accumulation_boundary(False)
        engine.backward(engine(TOKENS))
        engine.set_gradient_accumulation_boundary(True)
        engine.backward(engine(TOKENS))
    elif how == "without reduction":
        with engine.no_sync():
            engine.backward(engine(TOKENS))
        engine.backward(engine(TOKENS))
    engine.step()


def outcomes(case: Case, ways: list[str]) -> dict[str, str]:
    """For each way to accumulate: what the step makes of twice the same gradient, or its error."""
    found = {}
    for how in ways:
        with engine_for(case) as (engine, _, clock):
            clock["step"] = 1
            for group in engine.optimizer.param_groups:
                group["lr"] = learning_rate(1)
            before = masters(engine)
            try:
                passes(engine, how)
            except RuntimeError as error:
                assert str(masters(engine)) == str(before)
                found[how] = str(error)
                continue
            key = "exp_avg"
            moments = [state[key].abs().max() for state in engine.basic_optimizer.state.values()]
            found[how] = f"{float(torch.stack(moments).max()):.6f}"
    return found


OVERWRITTEN = "a second backward pass without a forward pass before it replaced those of"
REPLACED = "several backward passes at a gradient accumulation boundary, and each replaced the one before"
LEFT = "those of the last loss.backward() were never reduced"


@pytest.mark.parametrize(
    ("stage", "zero", "managed", "ways"),
    [
        (3, {}, True, {"one after the other": "", "both forward first": OVERWRITTEN, "coalesced": "", "by hand": ""}),
        (3, {"offload_optimizer": {"device": "cpu", "pin_memory": False}}, False, {"both forward first": OVERWRITTEN}),
        (2, {}, True, {"one after the other": REPLACED, "coalesced": "", "by hand": ""}),
        (2, {}, False, {"one after the other": "", "both forward first": "", "both forward first, by torch": LEFT}),
        (1, {}, True, {"both forward first": REPLACED, "coalesced": "", "without reduction": ""}),
        (0, {}, True, {"one after the other": "", "both forward first": ""}),
    ],
)
def test_a_step_has_the_gradients_of_all_its_backward_passes_or_is_refused(
    pool: Pools, stage: int, zero: dict[str, Any], managed: bool, ways: dict[str, str]
) -> None:
    if not managed and not hasattr(DeepSpeedEngine, "managed_gradient_accumulation"):
        pytest.skip("managed_gradient_accumulation came with deepspeed 0.19.4")
    if not hasattr(DeepSpeedEngine, "coalesce_grad_reduction"):  # with 0.19.1
        ways = {how: reason for how, reason in ways.items() if how != "coalesced"}
    extra = {"managed_gradient_accumulation": managed}
    case = Case("ds_optim.AdamW", stage=stage, zero=zero, extra=extra)
    (found,) = pool(1).run(outcomes, case, list(ways))
    twice = f"{0.1 * 2 * 3 * 28 / 1024:.6f}"  # the first moment of twice the largest gradient
    for how, reason in ways.items():
        if reason:
            assert reason in found[how], how
            assert "No weight was changed" in found[how]
        else:
            assert found[how] == twice, how
