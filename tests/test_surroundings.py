"""What a script has set around a step changes no weight: autocast, the default device, a capture of the stream."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ds_optim
from ds_optim import checkpoint

NAMES = ["AdamW", "Lion", "Adan", "AdamMini", "Shampoo", "SWAN"]
OPTIONS: dict[str, dict[str, Any]] = {"Shampoo": {"max_preconditioner_dim": 8, "precondition_frequency": 2}}


def model_of(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    with torch.device("cpu"):
        return nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 12), nn.LayerNorm(12), nn.Linear(12, 5))


def made(name: str, model: nn.Module, **options: Any) -> Any:
    settings = {"lr": 1e-2, "roles": model, **OPTIONS.get(name, {}), **options}
    return getattr(ds_optim, name)(model.named_parameters(), **settings)


def steps(model: nn.Module, optimizer: Any, around: Any, count: int = 4) -> dict[str, Tensor]:
    """Some steps, each inside of what ``around()`` gives; backward passes are outside."""
    for index in range(count):
        tokens = torch.arange(11, device="cpu") * (index + 3) % 11
        model(tokens).square().mean().backward()
        with around():
            optimizer.step()
        optimizer.zero_grad()
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def far(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max(float((values - other[name]).abs().max()) for name, values in one.items())


def autocast() -> Any:
    return torch.autocast("cpu", dtype=torch.bfloat16)


def elsewhere() -> Any:
    """A default device on which nothing has a value: what is made there by mistake cannot be computed with."""
    return torch.device("meta")  # what torch.set_default_device enters, which torch 2.8 cannot leave cleanly


@pytest.mark.parametrize("name", NAMES)
def test_autocast_around_a_step_changes_nothing(name: str, seed: int) -> None:
    ends = []
    for around in (contextlib.nullcontext, autocast):
        model = model_of(seed)
        ends.append(steps(model, made(name, model), around))
    assert far(*ends) == 0


def test_autocast_is_off_inside_of_a_step(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(seed)
    optimizer = made("Shampoo", model)
    prepare, found = optimizer.stepper.prepare, []

    def watched(*arguments: Any) -> Any:
        found.append(torch.is_autocast_enabled("cpu"))
        return prepare(*arguments)

    monkeypatch.setattr(optimizer.stepper, "prepare", watched)
    steps(model, optimizer, autocast, 1)
    assert found == [False]


def test_a_closure_keeps_its_autocast(seed: int) -> None:
    model = model_of(seed)
    optimizer = made("AdamMini", model)
    found = []

    def closure() -> Tensor:
        loss: Tensor = model[1](model[0](torch.arange(11))).sum()
        found.append(loss.dtype)
        loss.backward()
        return loss

    with autocast():
        optimizer.step(closure)
    assert found == [torch.bfloat16]


@pytest.mark.parametrize("backend", ["native", "triton"])
@pytest.mark.parametrize("name", NAMES)
def test_the_default_device_changes_nothing(
    name: str, backend: str, seed: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DS_OPTIM_KERNELS", backend)
    ends = []
    for around in (contextlib.nullcontext, elsewhere):
        model = model_of(seed)
        with around():
            optimizer = made(name, model)
        found = steps(model, optimizer, around)
        fresh = model_of(seed + 1)
        with around():
            checkpoint.save(tmp_path / around.__name__, model, optimizer)
            other = made(name, fresh)
            checkpoint.load(tmp_path / around.__name__, fresh, other)
        again = steps(fresh, other, around, 1)
        ends.append({**found, **{f"{key} again": values for key, values in again.items()}})
    assert far(*ends) == 0


@pytest.mark.parametrize("name", NAMES)
def test_a_capture_is_refused_before_anything_moves(name: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(seed)
    optimizer = made(name, model)
    before = {key: values.detach().clone() for key, values in model.named_parameters()}
    model(torch.arange(11)).square().mean().backward()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"cannot be captured in a CUDA graph: step count.*no weight was changed"):
        optimizer.step()
    assert not optimizer.state
    assert far(before, {key: values.detach() for key, values in model.named_parameters()}) == 0
