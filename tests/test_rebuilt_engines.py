"""What the plugin hangs on an engine, a model or a parameter goes when the engine goes: searches build hundreds."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from ds_optim.releases import DEEPSPEED
from engines import able_to_gather
from pool import Pools

OFFLOAD = {"offload_optimizer": {"device": "cpu", "pin_memory": False}}
STRATEGIES: dict[str, dict[str, Any]] = {
    "0": {"stage": 0},
    "1": {"stage": 1},
    "2 offload": {"stage": 2, **OFFLOAD},
    "3": {"stage": 3},
    "3 offload": {"stage": 3, **OFFLOAD},
}
if DEEPSPEED.is_before("0.19"):  # it keeps offloading engines of stage 2 itself, with its own AdamW too
    del STRATEGIES["2 offload"]


def small_model() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4)).bfloat16()


def hooks_on(model: nn.Module) -> int:
    """Hooks on parameters, and the backward hooks of modules."""
    kinds = ("_backward_hooks", "_post_accumulate_grad_hooks")
    on_parameters = sum(len(getattr(parameter, kind) or ()) for parameter in model.parameters() for kind in kinds)
    return on_parameters + sum(len(module._backward_hooks) for module in model.modules())


def forget_what_deepspeed_forgets(model: nn.Module) -> None:
    """The forward hooks of ZeRO-3, which ``destroy()`` leaves behind; they hold the engine of any optimizer."""
    for module in model.modules():
        for kind in ("_forward_hooks", "_forward_pre_hooks"):
            getattr(module, kind).clear()
            getattr(module, f"{kind}_with_kwargs").clear()


def build(model: nn.Module, optimizer: str, zero: dict[str, Any]) -> Any:
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "optimizer": {"type": optimizer, "params": {"torch_adam": True} if optimizer == "AdamW" else {}},
    }
    engine, *_ = deepspeed.initialize(model=model, config=config)
    return able_to_gather(engine)


def used_up(engine: Any) -> dict[str, weakref.ref[Any]]:
    """References to what an engine is made of, after two steps under a noise scale, destroyed."""
    from ds_optim.batch_size import NoiseScale

    noise = NoiseScale(engine)
    for _ in range(2):
        engine.backward(engine(torch.ones(1, 8, dtype=torch.bfloat16)).float().square().mean())
        engine.step()
    state = next(iter(engine.basic_optimizer.state.values()))
    parts = {"engine": engine, "optimizer": engine.basic_optimizer, "step": state["step"], "noise scale": noise}
    engine.destroy()
    return {name: weakref.ref(part) for name, part in parts.items()}


def rebuild(optimizer: str, zero: dict[str, Any], fresh: bool) -> list[tuple[int, list[str]]]:
    """After each of three engines: hooks left on its model; what is left of earlier ones when the next one is built."""
    model, found, parts = small_model(), [], dict[str, weakref.ref[Any]]()
    for _ in range(3):
        if fresh:
            model = small_model()
        engine = build(model, optimizer, zero)
        gc.collect()
        alive = [name for name, part in parts.items() if part() is not None]
        parts = used_up(engine)
        del engine
        found.append((hooks_on(model), alive))
        forget_what_deepspeed_forgets(model)
    return found


@pytest.mark.parametrize("optimizer", ["AdamW", "AdamMini", "Shampoo"])  # the first is DeepSpeed's own
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_engine_that_is_destroyed_leaves_nothing_behind(pool: Pools, optimizer: str, strategy: str) -> None:
    # At ZeRO-3 a list of DeepSpeed's keeps every model that it ever saw, and the model the wrapper of its last engine.
    for fresh in (False,) if strategy.startswith("3") else (False, True):
        for report in pool(2).run(rebuild, optimizer, STRATEGIES[strategy], fresh):
            assert report == [(0, [])] * 3
