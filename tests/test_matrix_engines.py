"""Shampoo and SWAN in real engines, where inputs are hard and where something goes wrong on one rank."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ds_optim
from ds_optim.roles import canonical_name, logical_shape, override_roles
from engines import (
    Case,
    assembled,
    build_model,
    constant_gradient,
    engine_for,
    learning_rate,
    masters,
    state_bytes,
    train,
)
from pool import Pools
from test_invariance import OFTEN, OPTIONS

BROKEN = "llama.model.layers.0.mlp.up_proj.weight"


def hard(kind: str, name: str, grad: Tensor) -> Tensor:
    """A gradient as training sometimes has it, in place of an ordinary one."""
    if kind == "zero":
        return torch.zeros_like(grad)
    if kind == "tiny":
        return grad * 2.0**-23
    if kind == "huge":
        return grad * 2.0**20
    if kind == "zero row" and grad.dim() > 1:
        return torch.cat([torch.zeros_like(grad[:1]), grad[1:]])
    if kind == "rank one" and grad.dim() > 1:
        return grad[:1] * (1 + torch.arange(len(grad)).view(-1, *(1 for _ in grad.shape[1:])) % 4)
    if kind == "condition 1e12" and grad.dim() == 2:
        return grad * 2.0 ** -(40 * torch.arange(len(grad)).view(-1, 1) // len(grad))
    return grad


KINDS = ["zero", "tiny", "huge", "zero row", "rank one", "condition 1e12"]


def train_hard(case: Case, kind: str) -> dict[str, Any]:
    with engine_for(case) as (engine, model, clock):
        for name, parameter in model.named_parameters():
            key, shape = canonical_name(name), logical_shape(parameter)

            def replaced(grad: Tensor, key: str = key, shape: tuple[int, ...] = shape) -> Tensor:
                return hard(kind, key, constant_gradient(key, shape, clock["step"], case.seed))

            parameter.register_hook(replaced)
        train(engine, case, clock, range(1, case.steps + 1))
        return {"masters": masters(engine)}


def by_one_process(case: Case, kind: str) -> dict[str, Tensor]:
    model = build_model(case)
    optimizer = getattr(ds_optim, case.optimizer)(ds_optim.param_groups(model, 0.0), roles=model, **case.options)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    for step in range(1, case.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        for name, parameter in model.named_parameters():
            parameter.grad = hard(kind, name, constant_gradient(name, tuple(parameter.shape), step, case.seed))
        optimizer.step()
    return {name: p.detach().reshape(-1) for name, p in model.named_parameters()}


def plain(optimizer: str, options_of: dict[str, dict[str, Any]] = OPTIONS, **changes: Any) -> Case:
    options = {**options_of[optimizer], "weight_decay": 0.0}
    return Case(optimizer, options, precision="fp32", **changes)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("optimizer", ["Shampoo", "SWAN", "NorMuon", "SOAP"])
def test_hard_gradients_stay_finite_and_the_same_on_three_ranks(pool: Pools, optimizer: str, kind: str) -> None:
    case = plain(optimizer, OFTEN, stage=3 if KINDS.index(kind) % 2 else 2)
    found = assembled(pool(3).run(train_hard, case, kind))
    wanted = by_one_process(case, kind)
    for name, values in wanted.items():
        assert torch.isfinite(values).all(), name
        assert torch.equal(values, found[name]), name
    if kind == "zero":
        start = {name: p.detach().reshape(-1) for name, p in build_model(case).named_parameters()}
        assert all(torch.equal(start[name], values) for name, values in found.items())


def change_gradient(engine: Any, change: Callable[[Tensor], None]) -> None:
    """Let ``change`` edit this rank's part of the broken matrix's gradient in every step, behind DeepSpeed's back.

    DeepSpeed would skip a step in which any rank has a NaN (docs/limits.md).
    """
    optimizer = engine.basic_optimizer

    def edit(*_: Any) -> None:
        for group in optimizer.param_groups:
            for tensor in group["params"]:
                bound = optimizer.bound_tensors[tensor]
                for fragment in bound.layout.fragments(bound.rank):
                    if bound.layout.parameters[fragment.parameter].name == BROKEN and tensor.grad is not None:
                        change(tensor.grad.view(-1).narrow(0, fragment.offset, fragment.numel))

    optimizer.register_step_pre_hook(edit)


def train_broken(case: Case, broken_rank: int) -> tuple[str, int, dict[str, Any], dict[str, Any], dict[str, Any]]:
    """One rank gets a NaN for its last element of one matrix in step 6: the error, its step, the masters around it."""
    with engine_for(case) as (engine, _, clock):

        def breaks(grad: Tensor) -> None:
            if clock["step"] == 6 and torch.distributed.get_rank() == broken_rank:
                grad[-1] = float("nan")

        change_gradient(engine, breaks)
        train(engine, case, clock, range(1, 6))
        before = masters(engine)
        train(engine, case, clock, range(6, 7))
        after = masters(engine)
        message = "nothing was raised"
        try:
            train(engine, case, clock, range(7, 8))
        except RuntimeError as error:
            message = str(error)
        raised_at = clock["step"]
        if case.stage == 0:  # ZeRO's own wrappers do not survive an error in the middle of their step
            train(engine, case, clock, range(8, 13))
        return message, raised_at, before, after, masters(engine)


@pytest.mark.parametrize(
    ("optimizer", "stage", "ranks", "broken_rank"),
    [
        ("Shampoo", 0, 2, 1),
        ("Shampoo", 2, 3, 1),
        ("Shampoo", 3, 2, 0),
        ("SWAN", 3, 4, 1),
        ("SWAN", 1, 2, 1),
        ("NorMuon", 3, 3, 1),
    ],
)
def test_a_nan_on_one_rank_raises_on_all_one_step_later_and_its_block_stays(
    pool: Pools, optimizer: str, stage: int, ranks: int, broken_rank: int
) -> None:
    case = plain(optimizer, stage=stage)
    if stage == 0:  # the owner's copy counts, whoever it is
        reports = next(
            reports
            for reports in (pool(ranks).run(train_broken, case, rank) for rank in range(ranks))
            if reports[0][0] != "nothing was raised"
        )
    else:
        reports = pool(ranks).run(train_broken, case, broken_rank)
    messages = {report[0] for report in reports}
    assert len(messages) == 1, messages
    message = messages.pop()
    assert BROKEN in message
    assert "its gradient is not finite" in message
    assert message.count("\n- ") == 1, "one block, named once, by its owner"
    assert {report[1] for report in reports} == {7}
    before, after, end = (assembled([{"masters": report[which]} for report in reports]) for which in (2, 3, 4))
    shape = build_model(case).get_parameter(BROKEN).shape
    ranges = re.search(r"\[(\d+):(\d+), (\d+):(\d+)\]", message)
    assert ranges is not None
    top, bottom, left, right = map(int, ranges.groups())
    was, stayed, last = (found[BROKEN].view(shape) for found in (before, after, end))
    assert torch.equal(was[top:bottom, left:right], stayed[top:bottom, left:right]), "the update was withheld"
    assert (was != stayed).sum() == (0 if optimizer != "Shampoo" else was.numel() - (bottom - top) * (right - left))
    for values in end.values():
        assert torch.isfinite(values).all(), "nothing of the NaN was kept"
    if stage == 0:
        assert not torch.equal(last[top:bottom, left:right], stayed[top:bottom, left:right]), "training goes on"


def enlarge(grad: Tensor) -> None:
    grad.mul_(1e25)


def train_overflowing(case: Case) -> tuple[str, int]:
    """Gradients whose squares overflow: factors are infinite, so that roots of this block fail at every refresh."""
    with engine_for(case) as (engine, _, clock):
        change_gradient(engine, enlarge)
        for step in range(1, 30):
            try:
                train(engine, case, clock, range(step, step + 1))
            except RuntimeError as error:
                return str(error), step
        return "nothing was raised", 0


def test_three_failed_roots_in_a_row_are_an_error_on_all_ranks_that_names_the_blocks(pool: Pools) -> None:
    case = plain("Shampoo", stage=2)
    reports = pool(2).run(train_overflowing, case)
    assert len(set(reports)) == 1
    message, step = reports[0]
    assert "3 root computations in a row failed" in message
    assert f"{BROKEN}, block" in message
    assert 12 <= step <= 4 + 3 * 4 + 1, "after the third refresh, every four steps"


def train_failing(case: Case, decomposition: str, failing_rank: int) -> tuple[str, int]:
    """On one rank no such decomposition converges."""

    def fails(*_: Any, **__: Any) -> Any:
        raise torch.linalg.LinAlgError("The algorithm failed to converge")

    with engine_for(case) as (engine, _, clock), pytest.MonkeyPatch.context() as patch:
        if torch.distributed.get_rank() == failing_rank:
            patch.setattr(torch.linalg, decomposition, fails)
        for step in range(1, 9):
            try:
                train(engine, case, clock, range(step, step + 1))
            except RuntimeError as error:
                return str(error), step
        return "nothing was raised", 0


@pytest.mark.parametrize("decomposition", ["eigh", "qr"])
def test_a_decomposition_of_soap_that_fails_on_one_rank_is_an_error_on_all(pool: Pools, decomposition: str) -> None:
    case = plain("SOAP", stage=2)
    reports = pool(2).run(train_failing, case, decomposition, 1)
    assert len(set(reports)) == 1
    message, step = reports[0]
    assert "rank 1: " in message
    assert "rank 0: " not in message
    assert "no eigenvectors of its gradients' products were found" in message
    assert step == 2 if decomposition == "eigh" else 2 < step <= 2 + 3


def kept_state(case: Case) -> dict[str, Any]:
    with engine_for(case) as (engine, _, clock):
        train(engine, case, clock, range(1, 6))
        plan = engine.basic_optimizer.plan
        blocks = [
            (plan.layouts[tensor].parameters[parameter].name, index)
            for tensor, state in enumerate(engine.basic_optimizer.state.values())
            for parameter, index in state["blocks"].tolist()
        ]
        return {"blocks": blocks, "bytes": state_bytes(engine), "total": len(plan.blocks)}


@pytest.mark.parametrize(("stage", "ranks"), [(1, 2), (2, 4), (3, 3)])
def test_every_block_has_its_state_on_one_rank_and_nothing_is_kept_twice(pool: Pools, stage: int, ranks: int) -> None:
    case = plain("Shampoo", stage=stage)
    reports = pool(ranks).run(kept_state, case)
    alone = pool(1).run(kept_state, case)[0]
    listed = [block for report in reports for block in report["blocks"]]
    assert sorted(listed) == sorted(alone["blocks"])
    assert len(set(listed)) == len(listed) == alone["total"]
    keys = [key for key in alone["bytes"] if key not in ("step", "exp_avg", "exp_avg_sq")]
    for key in keys:
        assert sum(report["bytes"].get(key, 0) for report in reports) == alone["bytes"][key], key
    owned = [sum(report["bytes"].get(key, 0) for key in keys) for report in reports]
    assert max(owned) <= 1.10 * sum(owned) / ranks


def full_state(case: Case, folder: str) -> tuple[dict[str, Any], bool]:
    """The state dict of every rank at ZeRO-0, and whether a resumed run is the uninterrupted one."""
    with engine_for(case) as (engine, _, clock):
        train(engine, case, clock, range(1, 8))
        state = copy.deepcopy(engine.basic_optimizer.state_dict())
        engine.save_checkpoint(folder)
        train(engine, case, clock, range(8, 13))
        wanted = masters(engine)
    with engine_for(case) as (engine, _, clock):
        engine.load_checkpoint(folder)
        train(engine, case, clock, range(8, 13))
        found = masters(engine)
    same = all(torch.equal(a[2], b[2]) for name in wanted for a, b in zip(wanted[name], found[name], strict=True))
    return state["state"], same


def test_at_zero_0_a_state_dict_has_every_owners_blocks_as_one_process_would(pool: Pools, tmp_path: Path) -> None:
    case = plain("Shampoo", stage=0)
    for ranks in (1, 3):
        (tmp_path / str(ranks)).mkdir()
    reports = pool(3).run(full_state, case, str(tmp_path / "3"))
    alone = pool(1).run(full_state, case, str(tmp_path / "1"))[0][0]
    for state, same in reports:
        assert same, "resumed"
        assert state.keys() == alone.keys()
        for key, values in state.items():
            assert values.keys() == alone[key].keys()
            for name, value in values.items():
                assert torch.equal(value, alone[key][name]), (key, name)


def load_anothers(case: Case, folder: str) -> str:
    with engine_for(case) as (engine, _, clock):
        train(engine, case, clock, range(1, 3))
        optimizer = engine.basic_optimizer
        rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        torch.save(optimizer.state_dict(), Path(folder) / f"{rank}.pt")
        torch.distributed.barrier()
        other = torch.load(Path(folder) / f"{(rank + 1) % ranks}.pt", weights_only=False)
        try:
            optimizer.load_state_dict(other)
        except ValueError as error:
            return str(error)
        return "loaded"


def test_another_ranks_blocks_are_refused(pool: Pools, tmp_path: Path) -> None:
    case = plain("Shampoo", stage=1)
    for message in pool(2).run(load_anothers, case, str(tmp_path)):
        assert "another rank's blocks" in message or "another number of ranks" in message, message


class ConvAndExperts(nn.Module):
    """Blocks of four and three dimensions, none of whose sizes divides by anything, and a fused weight."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 13, (2, 3))
        self.experts = nn.Parameter(torch.randn(3, 7, 11) / 4)
        self.attention = nn.MultiheadAttention(14, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).square().mean() + torch.einsum("erc,c->er", self.experts, x.flatten()[:11]).square().mean()
        z = x.flatten()[:28].view(2, 1, 14)
        return y + self.attention(z, z, z)[0].square().mean()


ROLES = {
    "experts": {"kind": "mlp", "output_dim": 1, "batch_dims": 1},
    "attention.in_proj_weight": {"parts": [["query", 14], ["key", 14], ["value", 14]], "head_dim": 7},
}


ODD_STEPS = 8  # every block is refreshed twice


def odd_model() -> nn.Module:
    torch.manual_seed(7)
    return ConvAndExperts()


def ordinary_gradient(name: str, shape: tuple[int, ...], step: int) -> Tensor:
    """Numbers whose products round: sums of them in another order differ."""
    generator = torch.Generator().manual_seed(1000 * step + sum(map(ord, name)))
    return torch.randn(shape, generator=generator)


def train_odd(optimizer: str, options: dict[str, Any], stage: int) -> dict[str, Any]:
    import deepspeed

    model, clock = odd_model(), {"step": 0}
    for name, parameter in model.named_parameters():

        def replaced(_: Tensor, name: str = name, shape: tuple[int, ...] = tuple(parameter.shape)) -> Tensor:
            return ordinary_gradient(name, shape, clock["step"])

        parameter.register_hook(replaced)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": optimizer, "params": options},
        "ds_optim": {"roles": ROLES, "no_decay": []},
    }
    engine, *_ = deepspeed.initialize(model=model, config=config)
    x = torch.linspace(-1, 1, 3 * 5 * 6).view(1, 3, 5, 6)
    for step in range(1, ODD_STEPS + 1):
        clock["step"] = step
        engine.backward(engine(x))
        engine.step()
    report = {"masters": masters(engine)}
    engine.destroy()
    return report


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        ("Shampoo", {"max_preconditioner_dim": 5, "precondition_frequency": 3, "exchange_bucket_size": 80}),
        ("Shampoo", {"betas": [0, 1], "graft": None, "precondition_frequency": 1, "ridge": "absolute"}),
        (
            "Shampoo",
            {
                "exchange_dtype": "bf16",
                "max_preconditioner_dim": 8,
                "precondition_frequency": 2,
                "matmul_precision": "tf32",
            },
        ),
        ("SWAN", {"exchange_bucket_size": 80}),
        ("SWAN", {"exchange_dtype": "bf16", "norm_axis": "out", "matmul_precision": "bf16"}),
        ("NorMuon", {"exchange_bucket_size": 80, "ns_coefficients": "polar_express"}),
        ("ds_optim.Muon", {"exchange_dtype": "bf16", "matmul_precision": "bf16", "adjust_lr": "original"}),
        ("SOAP", {"max_preconditioner_dim": 4, "precondition_frequency": 3, "exchange_bucket_size": 80}),
    ],
    ids=["Shampoo", "Shampoo-paper", "Shampoo-bf16", "SWAN", "SWAN-bf16", "NorMuon", "Muon-bf16", "SOAP"],
)
@pytest.mark.parametrize(("stage", "ranks"), [(0, 2), (2, 4), (3, 2), (3, 4)])
def test_convolutions_experts_and_fused_weights_are_the_same_on_any_number_of_ranks(
    pool: Pools, optimizer: str, options: dict[str, Any], stage: int, ranks: int
) -> None:
    found = assembled(pool(ranks).run(train_odd, optimizer, options, stage))
    model = odd_model()
    alone = getattr(ds_optim, optimizer.split(".")[-1])(
        model.named_parameters(), roles=override_roles(ds_optim.infer_roles(model), ROLES, shapes(model)), **options
    )
    for step in range(1, ODD_STEPS + 1):
        for name, parameter in model.named_parameters():
            parameter.grad = ordinary_gradient(name, tuple(parameter.shape), step)
        alone.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.detach().reshape(-1), found[name]), name


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
