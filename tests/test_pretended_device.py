"""What a step would launch, copy and wait for on an accelerator: nothing waits, nothing is copied, launches are few."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ds_optim
import pretended
from ds_optim.linalg import triangle
from ds_optim.sharding import exchange
from ds_optim.sharding.binding import BoundTensor
from ds_optim.sharding.layout import ParameterSpec, SlicedParameters
from ds_optim.stepping import kernel_calls
from ds_optim.stepping.in_place import InPlace
from ds_optim.stepping.shards import Shards

NAMES = ["AdamW", "Lion", "Adan", "AdamMini", "Shampoo", "SWAN", "Muon", "NorMuon", "SOAP"]
BLOCKS = {"max_preconditioner_dim": 32, "precondition_frequency": 2}
OPTIONS: dict[str, dict[str, Any]] = {"Shampoo": BLOCKS, "SOAP": BLOCKS}
ELEMENTWISE = ("AdamW", "Lion", "Adan")


def model_of(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    layers = nn.Linear(32, 96), nn.LayerNorm(96), nn.Linear(96, 32), nn.Linear(32, 50, bias=False)
    return nn.Sequential(nn.Embedding(50, 32), *layers)


def on_device(model: nn.Module, dtype: torch.dtype) -> list[tuple[str, nn.Parameter]]:
    return [(name, nn.Parameter(pretended.moved(one.to(dtype)))) for name, one in model.named_parameters()]


def gradients(model: nn.Module, seed: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {name: torch.randn(one.shape, generator=random) for name, one in model.named_parameters()}


def made(name: str, model: nn.Module, params: Any, **options: Any) -> Any:
    return getattr(ds_optim, name)(params, roles=model, **{"lr": 1e-2, **OPTIONS.get(name, {}), **options})


def is_of_flags(copy: str) -> bool:
    """Whether it brings flags of failed blocks to the host, which looks at them in the next step."""
    return copy.startswith("to the host (pinned) ds_optim/sharding/exchange.py")


def of_bases(device: Any, step: int) -> None:
    """Take from the records what SOAP is allowed: its first bases, in the first step, and the QRs of the next ones.

    torch says of no QR whether it waits; the first bases are decomposed in fp64, one by one, which does.
    """
    if step == 0:
        assert any(line.startswith("_linalg_eigh") for line in device.waits)
        first = ("linalg/eigenbases.py", "linalg/packed.py", "sharding/exchange.py", "stepping/")
        assert all(any(where in line for where in first) for line in device.waits), device.waits
        device.waits.clear()
        device.copies.clear()
    for line in [line for line in device.waits if line.startswith("linalg_qr ds_optim/linalg/eigenbases.py")]:
        del device.waits[line]


DTYPES = torch.float32, torch.bfloat16
RATES = "number", "on the host", "on the device"


@pytest.mark.parametrize(
    ("name", "dtype", "lr"),  # each pair of values
    [(name, DTYPES[(i + j) % 2], lr) for i, name in enumerate(NAMES) for j, lr in enumerate(RATES)],
)
def test_a_step_copies_nothing_and_waits_for_nothing(
    name: str, dtype: torch.dtype, lr: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(seed)
    options: dict[str, Any] = {"bf16_stochastic_round": dtype == torch.bfloat16}
    plain = [(key, nn.Parameter(one.detach().to(dtype))) for key, one in model.named_parameters()]
    expected = made(name, model, plain, lr=torch.tensor(1e-2) if lr != "number" else 1e-2, **options)
    with pretended.entered(monkeypatch) as device:
        params = on_device(model, dtype)
        rate: Any = {"number": 1e-2, "on the host": torch.tensor(1e-2)}.get(lr)
        optimizer = made(
            name, model, params, lr=pretended.moved(torch.tensor(1e-2)) if rate is None else rate, **options
        )
        for _, one in params:
            one.grad = pretended.moved(torch.zeros(one.shape, dtype=dtype))
        for step in range(5):
            given = gradients(model, seed + step)
            for key, one in params:
                one.grad.values.copy_(given[key])  # where they were, as under ZeRO; those that move are the next test's
            with device.recording():
                optimizer.step()
            if name == "SOAP":
                of_bases(device, step)
    assert not device.waits, device.waits
    assert all(map(is_of_flags, device.copies)), device.copies
    monkeypatch.undo()
    for step in range(5):
        given = gradients(model, seed + step)
        for key, one in plain:
            one.grad = given[key].to(dtype)
        expected.step()
    tolerance = 2e-3 if dtype == torch.float32 else 1e-2  # iterated roots for decomposed ones, or roundings of bf16
    for (key, one), (_, other) in zip(params, plain, strict=True):
        far = (one.values.double() - other.detach().double()).abs().max()
        assert far <= tolerance * other.detach().double().abs().max(), key


def test_soap_waits_once_after_a_load_and_for_no_weight_without_a_gradient(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which blocks have bases is read in the first step after a start. One whose gradients begin late is decomposed in
    the step behind their first, which waits; it moves in the next."""
    model, unused = model_of(seed), "1.weight"
    begins, moves, waits = 6, [], []
    with pretended.entered(monkeypatch) as device:
        params = on_device(model, torch.float32)
        weight = dict(params)[unused]
        optimizer = made("SOAP", model, params, precondition_frequency=100, weight_decay=0.0)
        for step in range(1, begins + 4):
            given = gradients(model, seed + step)
            for key, one in params:
                one.grad = pretended.moved(given[key] * (key != unused or step >= begins))
            if step == 3:
                optimizer.stepper.forget_past()  # as every load ends
            before = weight.values.clone()
            with device.recording():
                optimizer.step()
            waits.append({line.partition(" ds_optim")[0] for line in device.waits})
            moves.append(not torch.equal(before, weight.values))
    assert "_linalg_eigh" in waits[0]
    assert waits[2] == {"an event of this step"}
    assert "_linalg_eigh" in waits[begins]
    assert not any(found for step, found in enumerate(waits) if step not in (0, 2, begins)), waits
    assert moves == [step > begins + 1 for step in range(1, begins + 4)]


@pytest.mark.parametrize("name", NAMES)
def test_gradients_that_moved_cost_one_pinned_table(name: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(seed)
    with pretended.entered(monkeypatch) as device:
        params = on_device(model, torch.float32)
        optimizer = made(name, model, params)
        for step in range(3):
            optimizer.zero_grad()
            kept = [one.grad for _, one in params]
            for key, one in params:
                one.grad = pretended.moved(gradients(model, seed + step)[key])
            with device.recording():
                optimizer.step()
            if name == "SOAP":
                of_bases(device, step)
            del kept
    assert not device.waits, device.waits
    tables = [line for line in device.copies if not is_of_flags(line)]
    assert all(line.startswith("to the device (pinned) ds_optim/kernels/triton/launches.py") for line in tables), tables
    assert len(tables) <= 1, tables


OF_WHOLE_BLOCKS = dict.fromkeys(("update_wide_blocks", "update_narrow_blocks"), 1)
OF_CUT_BLOCKS = dict.fromkeys(("zeros", "sum_rows", "add_up", "all_reduce", "advance_known", "update_cut_rows"), 1)
"""Six programs with those of whole blocks; the collective, and what makes its sums zero where this rank has no part."""


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*ELEMENTWISE, "AdamMini"])
def test_three_hundred_tensors_are_a_few_launches(
    name: str, dtype: torch.dtype, ranks: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adam-mini's blocks are rows of two widths, one of them narrow, and whole vectors; AdamW's are elements. On the
    first of two ranks, which has half of each tensor, a boundary cuts rows, and vectors."""
    shapes = {"mlp": (9, 600), "attention": (16, 40), "norm": (24,)}
    specs = [ParameterSpec(f"{kind}.{index}", shape) for index in range(100) for kind, shape in shapes.items()]
    with pretended.entered(monkeypatch, does_run=False) as device:
        monkeypatch.setattr(kernel_calls, "PendingSum", functools.partial(Collective, device))
        params = [(spec.name, nn.Parameter(pretended.moved(torch.zeros(spec.shape, dtype=dtype)))) for spec in specs]
        roles = {"mlp.*": "linear", "attention.*": "linear", "norm.*": "norm"}
        options: dict[str, Any] = {"bf16_stochastic_round": dtype == torch.bfloat16}
        optimizer = getattr(ds_optim, name)(params, lr=1e-3, roles=roles, **options)
        if ranks > 1:
            layouts = [SlicedParameters((spec,), ranks) for spec in specs]
            tensors = [nn.Parameter(pretended.moved(torch.zeros(one.local_numel(0), dtype=dtype))) for one in layouts]
            group: Any = object()
            bounds = {one: BoundTensor(layout, 0, group) for one, layout in zip(tensors, layouts, strict=True)}
            shards = Shards(bounds, optimizer.shards.roles)
            optimizer = getattr(ds_optim, name)(tensors, lr=1e-3, **options)
            optimizer.take_over(InPlace(optimizer.rule, optimizer.options, shards, name))
        for one in optimizer.param_groups[0]["params"]:
            one.grad = pretended.moved(torch.zeros(one.shape, dtype=dtype))
        for _ in range(3):
            with device.recording():
                optimizer.step()
    of_blocks = OF_WHOLE_BLOCKS | OF_CUT_BLOCKS if ranks > 1 else OF_WHOLE_BLOCKS
    assert device.launches == ({"update_rows": 1} if name in ELEMENTWISE else of_blocks)
    assert not device.copies
    assert not device.waits


class Collective:
    """A sum over ranks that are not there: noted, and at once over."""

    def __init__(self, device: pretended.Device, *_: Any) -> None:
        device.note(device.launches, "all_reduce", with_line=False)

    def wait(self) -> None:
        """Nothing."""


def test_products_in_tf32_are_triangles_and_torchs_own_in_tf32(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(seed)
    settings: list[str] = []
    multiply = torch.bmm
    ends = []
    for precision in ("ieee", "tf32"):
        with monkeypatch.context() as patch, pretended.entered(patch) as device:
            patch.setattr(triangle, "SMALLEST", 32)
            patch.setattr(triangle, "triton_problem", lambda: "")
            patch.setattr(triangle, "has_tensor_cores", lambda _: True)
            patch.setattr(torch, "baddbmm", noting(torch.baddbmm, settings))
            params = on_device(model, torch.float32)
            optimizer = made("SWAN", model, params, matmul_precision=precision)
            for key, one in params:
                one.grad = pretended.moved(gradients(model, seed)[key])
            settings.clear()
            with device.recording():
                optimizer.step()
        assert device.launches["lower_triangle"] == (30 if precision == "tf32" else 0)  # three matrices, ten steps
        assert set(settings) == ({"tf32"} if precision == "tf32" else set())
        ends.append([one.values for _, one in params])
    assert torch.bmm is multiply
    assert torch.backends.cuda.matmul.fp32_precision != "tf32"
    for one, other in zip(*ends, strict=True):
        assert float((one - other).abs().max()) <= 1e-4 * float(other.abs().max())


def noting(function: Any, settings: list[str]) -> Any:
    """A product that notes in which precision a GPU would take it."""

    def noted(*given: Any, **named: Any) -> Any:
        settings.append(torch.backends.cuda.matmul.fp32_precision)
        return function(*given, **named)

    return noted


@pytest.mark.parametrize("state_dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["Shampoo", "SWAN"])
def test_offloaded_matrices_are_worked_on_by_the_accelerator_through_pinned_memory(
    name: str, state_dtype: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parameters, gradients and state on the host. What lands there is waited for: nothing else is."""
    ends = []
    for is_offloaded in (False, True):
        model = model_of(seed)
        options = {"exchange_bucket_size": 4000, "state_dtype": state_dtype}
        with monkeypatch.context() as patch, pretended.entered(patch) as device:
            if is_offloaded:
                patch.setattr(exchange, "accelerator_at_work", lambda: pretended.CUDA)
            else:
                patch.setenv("DS_OPTIM_ROOTS", "newton")
            patch.delenv("DS_OPTIM_KERNELS")
            optimizer = made(name, model, model.named_parameters(), **options)
            for step in range(5):
                for key, one in model.named_parameters():
                    one.grad = gradients(model, seed + step)[key]
                with device.recording():
                    optimizer.step()
        ends.append({key: one.detach() for key, one in model.named_parameters()})
        assert (device.launches["bmm"] > 0) == is_offloaded
        copies = {line.partition(" ds_optim")[0] for line in device.copies}
        assert copies == ({"to the device (pinned)", "to the host (pinned)"} if is_offloaded else set())
        assert {line.partition(" ds_optim")[0] for line in device.waits} <= {"an event of this step"}
        assert not device.order.races
        if is_offloaded:
            assert len(device.order.known) == 3  # two streams and the host
            assert not any(
                type(value) is pretended.OnDevice for kept in optimizer.state.values() for value in kept.values()
            )
    for key, one in ends[0].items():
        assert float((one - ends[1][key]).abs().max()) <= 1e-6 * float(one.abs().max()), key


@pytest.mark.parametrize("name", NAMES)
def test_parameters_of_one_optimizer_may_lie_on_two_devices(
    name: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(seed)
    plain = [(key, nn.Parameter(one.detach().clone())) for key, one in model.named_parameters()]
    expected = made(name, model, plain)
    with pretended.entered(monkeypatch) as device:
        mixed = [
            (key, nn.Parameter(pretended.moved(one) if index % 2 else one.detach().clone()))
            for index, (key, one) in enumerate(model.named_parameters())
        ]
        optimizer = made(name, model, mixed)
        for step in range(3):
            given = gradients(model, seed + step)
            for index, (key, one) in enumerate(mixed):
                one.grad = pretended.moved(given[key]) if index % 2 else given[key].clone()
            with device.recording():
                optimizer.step()
            assert device.launches
    monkeypatch.undo()
    for step in range(3):
        given = gradients(model, seed + step)
        for key, one in plain:
            one.grad = given[key]
        expected.step()
    for index, ((key, one), (_, other)) in enumerate(zip(mixed, plain, strict=True)):
        values: Any = one.values if index % 2 else one.detach()
        assert float((values - other.detach()).abs().max()) <= 2e-3 * float(other.detach().abs().max()), key


@pytest.mark.parametrize(("dtype", "of_an_update"), [(torch.float32, 2), (torch.bfloat16, 1)])
def test_a_matrix_of_shampoo_is_so_many_launches(
    dtype: torch.dtype, of_an_update: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One pass and one factor's product for each axis over the stack of its blocks, and what subtracts each of them."""

    def launches(matrices: int) -> Any:
        with monkeypatch.context() as patch, pretended.entered(patch, does_run=False) as device:
            weights = [(f"{i}", nn.Parameter(pretended.moved(torch.ones(64, 64).to(dtype)))) for i in range(matrices)]
            optimizer = ds_optim.Shampoo(weights, roles={"*": "linear"}, max_preconditioner_dim=32, weight_decay=0.1)
            for step in range(3):
                for _, one in weights:
                    one.grad = pretended.moved(torch.ones(64, 64).to(dtype))
                with device.recording() if step == 2 else contextlib.nullcontext():
                    optimizer.step()
            return device.launches

    few, many = launches(4), launches(16)
    assert (few["update_all"], many["update_all"]) == (4, 16)
    subtracted = {name: many[name] - few[name] for name in ("_foreach_mul_", "_foreach_sub_", "descend_rows")}
    assert sum(subtracted.values()) == of_an_update * 4 * 12  # of four blocks of 32 by 32 in each of twelve matrices
    assert (many.total() - few.total()) / 12 <= 50


@pytest.mark.parametrize("is_waited_for", [True, False])
@pytest.mark.parametrize("way", ["in", "out", "in again"])
def test_the_device_sees_what_is_used_too_early(way: str, is_waited_for: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    with pretended.entered(monkeypatch) as device:
        there = pretended.moved(torch.ones(3))
        if way == "out":
            copy = exchange.HostCopy(there)
            (copy.wait() if is_waited_for else copy.values).tolist()
            copy.values.add_(1)
        else:
            host = exchange.staged(torch.ones(3))
            if is_waited_for or way != "in again":
                host.fill_(2)
            coming = exchange.DeviceCopy(host, pretended.CUDA, torch.float32)
            (coming.arrived() if is_waited_for or way == "in again" else coming._copy).add_(1)
            if way == "in again" and not is_waited_for:
                host.fill_(3)  # the device may still be reading it
    assert bool(device.order.races) != is_waited_for


def test_the_device_sees_what_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    with pretended.entered(monkeypatch) as device:
        one = pretended.moved(torch.ones(3))
        with device.recording():
            float(one.sum())
            one.to("cpu")
            one.copy_(torch.ones(3))
            torch.ones(3).pin_memory().to(one.device, non_blocking=True)
            one[one > 0]
    assert device.launches["sum"] == 1
    assert device.copies.total() == 3
    assert sum("(pinned)" in line for line in device.copies) == 1
    assert device.waits.total() == 4
