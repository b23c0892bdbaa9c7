"""SWAN and Shampoo on one process: the mathematics of their oracles, and what happens at the edges of it.

Sharding is tested elsewhere; here every parameter is whole.
"""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ds_optim.checkpoint
from ds_optim.linalg import inverse_roots as roots_module
from ds_optim.linalg import workers
from ds_optim.linalg.packed import unpack
from ds_optim.linalg.workers import Stepwise
from ds_optim.optimizers import shampoo as shampoo_module
from reference.shampoo import shampoo
from reference.swan import whitened

Grads = Mapping[str, Tensor]
LINEAR = {"*": "linear"}


def normal(shape: Sequence[int], seed: int, scale: float = 1.0) -> Tensor:
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed)) * scale


def gradients(shapes: Mapping[str, tuple[int, ...]], steps: int, seed: int) -> list[dict[str, Tensor]]:
    return [
        {name: normal(shape, seed + 1000 * step + index) for index, (name, shape) in enumerate(shapes.items())}
        for step in range(1, steps + 1)
    ]


def parameters(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(normal(shape, seed + index)) for index, (name, shape) in enumerate(shapes.items())}


def take(optimizer: torch.optim.Optimizer, params: Mapping[str, nn.Parameter], grads: Grads) -> None:
    """One step with these gradients; a name without one has none."""
    for name, parameter in params.items():
        parameter.grad = grads[name].clone() if name in grads else None
    optimizer.step()


def values(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in params.items()}


def same(one: Grads, two: Grads) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def rms(values: Tensor) -> float:
    return float(values.double().square().mean().sqrt())


# -- SWAN --------------------------------------------------------------------------------------------------------------


def swan_update(gradient: Tensor, role: Any, *, ns_beta: float = 0.5, **settings: Any) -> Tensor:
    """What one step at learning rate 1 subtracts from a parameter of zeros.

    With a step of the iteration that converges. SWAN's own, 0.8, never settles, and makes a rounding error in the
    smallest singular value thousands of times larger.
    """
    params = {"w": nn.Parameter(torch.zeros_like(gradient))}
    optimizer = ds_optim.SWAN(params.items(), lr=1.0, roles={"w": role}, ns_beta=ns_beta, **settings)
    take(optimizer, params, {"w": gradient})
    return -params["w"].detach()


def swan_close(found: Tensor, wanted: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(found.double(), wanted.double(), rtol=tolerance, atol=tolerance)


AXES = ["in", "out", "long"]


@pytest.mark.parametrize(("ns_beta", "tolerance"), [(0.5, 1e-4), (0.8, 1e-2)])
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (8, 8)])
def test_swan_is_its_oracle_on_out_in_weights(
    shape: tuple[int, int], axis: str, ns_beta: float, tolerance: float, seed: int
) -> None:
    gradient = normal(shape, seed)
    found = swan_update(gradient, "linear", norm_axis=axis, ns_beta=ns_beta)
    swan_close(found, whitened(gradient.double(), axis, ns_beta, 10), tolerance)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (8, 8)])
def test_swan_reads_in_out_weights_by_their_role(shape: tuple[int, int], axis: str, seed: int) -> None:
    gradient = normal(shape, seed)
    found = swan_update(gradient, {"kind": "linear", "output_dim": 1}, norm_axis=axis)
    swan_close(found, whitened(gradient.T.double(), axis, 0.5, 10).T)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("output_dim", [1, 2])
def test_swan_whitens_stacked_experts_one_by_one(axis: str, output_dim: int, seed: int) -> None:
    gradient = normal((3, 6, 9), seed)
    found = swan_update(gradient, {"kind": "mlp", "batch_dims": 1, "output_dim": output_dim}, norm_axis=axis)
    for expert, update in zip(gradient.double(), found, strict=True):
        matrix = expert if output_dim == 1 else expert.T
        wanted = whitened(matrix, axis, 0.5, 10)
        swan_close(update, wanted if output_dim == 1 else wanted.T)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("output_dim", [0, 1])
def test_swan_reads_a_convolution_as_outputs_by_all_inputs(axis: str, output_dim: int, seed: int) -> None:
    gradient = normal((6, 4, 3, 2), seed)
    found = swan_update(gradient, {"kind": "conv", "output_dim": output_dim}, norm_axis=axis)

    def matrix(tensor: Tensor) -> Tensor:
        return tensor.movedim(output_dim, 0).flatten(1)

    swan_close(matrix(found), whitened(matrix(gradient).double(), axis, 0.5, 10))


@pytest.mark.parametrize("axis", AXES)
def test_swan_whitens_the_parts_of_a_fused_weight_one_by_one(axis: str, seed: int) -> None:
    sizes = [8, 4, 4]
    gradient = normal((16, 6), seed)
    parts = [[kind, size] for kind, size in zip(["query", "key", "value"], sizes, strict=True)]
    found = swan_update(gradient, {"parts": parts}, norm_axis=axis)
    for update, part in zip(found.split(sizes), gradient.double().split(sizes), strict=True):
        swan_close(update, whitened(part, axis, 0.5, 10))
    as_one = swan_update(gradient, "linear", norm_axis=axis)
    swan_close(as_one, whitened(gradient.double(), axis, 0.5, 10))


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize(("alpha", "ns_beta"), [(1.0, 0.5), (1.0, 0.8), (0.3, 0.8)])
def test_swan_moves_by_a_root_mean_square_of_alpha(axis: str, alpha: float, ns_beta: float, seed: int) -> None:
    for shape in [(12, 40), (40, 12), (16, 16)]:
        update = swan_update(normal(shape, seed), "linear", norm_axis=axis, alpha=alpha, ns_beta=ns_beta)
        assert rms(update) == pytest.approx(alpha, rel=1e-5)


@pytest.mark.parametrize("scale", [1e-7, 1e-4, 1e4, 1e30])
@pytest.mark.parametrize("axis", AXES)
def test_swan_does_not_depend_on_the_scale_of_gradients(axis: str, scale: float, seed: int) -> None:
    gradient = normal((7, 12), seed)
    found = swan_update(gradient * scale, "linear", norm_axis=axis)
    swan_close(found, swan_update(gradient, "linear", norm_axis=axis))
    exact = 2.0 ** round(math.log2(scale))
    assert torch.equal(
        swan_update(gradient * exact, "linear", norm_axis=axis), swan_update(gradient, "linear", norm_axis=axis)
    )


@pytest.mark.parametrize("axis", AXES)
def test_zero_gradients_move_nothing_under_swan(axis: str) -> None:
    assert not swan_update(torch.zeros(5, 8), "linear", norm_axis=axis).any()
    params = parameters({"w": (5, 8)}, 0)
    before = values(params)
    optimizer = ds_optim.SWAN(params.items(), lr=0.1, weight_decay=0.5, roles=LINEAR)
    take(optimizer, params, {"w": torch.zeros(5, 8)})
    assert torch.equal(params["w"], before["w"] * (1 - 0.1 * 0.5))


@pytest.mark.parametrize("axis", AXES)
def test_zero_rows_and_columns_are_those_of_the_oracle(axis: str, seed: int) -> None:
    gradient = normal((6, 10), seed)
    gradient[2] = 0
    gradient[:, 7] = 0
    found = swan_update(gradient, "linear", norm_axis=axis)
    swan_close(found, whitened(gradient.double(), axis, 0.5, 10))
    assert found[2].abs().max() < 1e-4 or axis == "out"


@pytest.mark.parametrize("axis", AXES)
def test_rank_one_gradients_give_finite_updates_of_one(axis: str, seed: int) -> None:
    gradient = torch.outer(normal((6,), seed), normal((10,), seed + 1))
    found = swan_update(gradient, "linear", norm_axis=axis)
    assert found.isfinite().all()
    assert rms(found) == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize("axis", ["in", "out"])
def test_a_gradient_without_any_deviation_moves_nothing_under_swan(axis: str, seed: int) -> None:
    """Every row (column) is a constant: what rounding leaves of it is no direction."""
    constants = normal((6, 1), seed).expand(6, 10)
    gradient = constants if axis == "in" else constants.T
    assert rms(swan_update(gradient.clone(), "linear", norm_axis=axis)) == 0


def test_a_vanishing_row_is_not_blown_up_under_swan(seed: int) -> None:
    gradient = normal((6, 10), seed)
    gradient[3] *= 1e-9
    found = swan_update(gradient, "linear")
    assert found[3].abs().max() < 1e-4


# -- what Adam steps ---------------------------------------------------------------------------------------------------

FALLBACK: Mapping[str, tuple[tuple[int, ...], str]] = {
    "embed.weight": ((9, 4), "embedding"),
    "head.weight": ((9, 4), "head"),
    "norm.weight": ((4,), "norm"),
    "proj.bias": ((5,), "bias"),
}


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("cls", [ds_optim.SWAN, ds_optim.Shampoo])
def test_what_is_no_matrix_is_stepped_by_adamw_bitwise(cls: Any, weight_decay: float, seed: int) -> None:
    shapes = {name: shape for name, (shape, _) in FALLBACK.items()} | {"w": (6, 4)}
    roles = {name: kind for name, (_, kind) in FALLBACK.items()} | {"w": "linear"}
    ours, theirs = parameters(shapes, seed), parameters(shapes, seed)
    settings: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.97), "eps": 1e-6, "weight_decay": weight_decay}
    optimizer, adamw = cls(ours.items(), roles=roles, **settings), ds_optim.AdamW(theirs.items(), **settings)
    for grads in gradients(shapes, 4, seed):
        take(optimizer, ours, grads)
        take(adamw, theirs, grads)
    for name in FALLBACK:
        assert torch.equal(ours[name], theirs[name]), name
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(optimizer.state[ours[name]][key], adamw.state[theirs[name]][key])
    if cls is ds_optim.SWAN:
        assert not torch.equal(ours["w"], theirs["w"])


def test_shampoo_gives_its_adam_the_grafts_second_moment(seed: int) -> None:
    """Also in the paper's mode, whose factors never decay: an Adam of beta2 = 1 would not move."""
    for betas, graft_beta2, beta2 in [((0.9, 1.0), None, 0.999), ((0.9, 0.95), 0.99, 0.99), ((0.9, 0.95), None, 0.95)]:
        ours, theirs = parameters({"norm.weight": (7,)}, seed), parameters({"norm.weight": (7,)}, seed)
        optimizer = ds_optim.Shampoo(ours.items(), lr=0.1, betas=betas, graft_beta2=graft_beta2)
        adamw = ds_optim.AdamW(theirs.items(), lr=0.1, betas=(0.9, beta2), weight_decay=0.0)
        for grads in gradients({"norm.weight": (7,)}, 3, seed):
            take(optimizer, ours, grads)
            take(adamw, theirs, grads)
        assert same(values(ours), values(theirs))


def stored_bytes(state: Mapping[str, Any]) -> int:
    """Of the storages behind a parameter's state, the step count apart."""
    storages = {
        value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
        for key, value in state.items()
        if isinstance(value, Tensor) and key != "step"
    }
    return sum(storages.values())


def test_swan_keeps_no_state_for_matrices(seed: int) -> None:
    shapes = {"w": (6, 4), "experts": (3, 6, 4), "norm.weight": (4,)}
    roles = {"w": "linear", "experts": {"kind": "mlp", "batch_dims": 1, "output_dim": 1}}
    params = parameters(shapes, seed)
    optimizer = ds_optim.SWAN(params.items(), roles=roles)
    for grads in gradients(shapes, 2, seed):
        take(optimizer, params, grads)
    assert {name: stored_bytes(optimizer.state[one]) for name, one in params.items()} == {
        "w": 0,
        "experts": 0,
        "norm.weight": 2 * 4 * 4,
    }


def test_shampoo_keeps_the_state_that_its_plan_says(seed: int) -> None:
    shapes = {"w": (8, 8), "v": (5, 7)}
    params = parameters(shapes, seed)
    optimizer = ds_optim.Shampoo(params.items(), roles=LINEAR, max_preconditioner_dim=4)
    take(optimizer, params, gradients(shapes, 1, seed)[0])
    state = optimizer.state[params["w"]]
    numbers = {key: value.numel() for key, value in state.items() if key not in ("step", "blocks")}
    factors = {f"{kind}_{axis}": 4 * 10 for kind in ("factor", "root") for axis in (0, 1)}
    adam = {"exp_avg": 0, "exp_avg_sq": 0}
    assert numbers == {"momentum": 64, "graft": 64, "rooted": 4, "failures": 4, "waiting": 4, **factors, **adam}
    kept = sum(stored_bytes(optimizer.state[one]) - 16 * len(optimizer.state[one]["blocks"]) for one in params.values())
    assert kept == optimizer.plan.costs.state_bytes.sum()


# -- Shampoo against its oracle ----------------------------------------------------------------------------------------

SHAPES = {"vector": (7,), "matrix": (5, 8), "order3": (3, 4, 5), "order4": (2, 3, 4, 3)}


def offsets_of(optimizer: ds_optim.Shampoo) -> dict[str, list[int]]:
    """Every block's refresh offset, by parameter, as the plan chose it."""
    found: dict[str, list[int]] = {}
    for block in optimizer.plan.blocks:
        name = optimizer.plan.layouts[block.tensor].parameters[block.parameter].name
        found.setdefault(name, []).append(block.offset)
        assert len(found[name]) == block.index + 1
    return found


def shampoo_paths(
    shapes: Mapping[str, tuple[int, ...]], steps: int, seed: int, **settings: Any
) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """The parameters of the product and of the fp64 oracle after every step."""
    params = parameters(shapes, seed)
    doubles = {name: value.double() for name, value in values(params).items()}
    settings = {"lr": 0.05, **settings}
    optimizer = ds_optim.Shampoo(params.items(), roles=LINEAR, **settings)
    state: dict[str, dict[str, Tensor]] = {}
    chosen = {"precondition_frequency": 10, "refresh": "staggered", "graft": "adam", **settings}
    if chosen["graft"] is None:
        chosen.setdefault("start_preconditioning_step", 1)
    else:
        chosen.setdefault("start_preconditioning_step", chosen["precondition_frequency"])
    found, wanted = [], []
    for step, grads in enumerate(gradients(shapes, steps, seed), start=1):
        take(optimizer, params, grads)
        shampoo(doubles, grads, state, step, offsets=offsets_of(optimizer), **chosen)
        found.append(values(params))
        wanted.append(dict(doubles))
    return found, wanted


def distance(found: Sequence[Grads], wanted: Sequence[Grads]) -> float:
    """Largest |difference| / (1 + |wanted|) over steps and parameters."""
    return max(
        float(((one[name].double() - two[name]).abs() / (1 + two[name].abs())).max())
        for one, two in zip(found, wanted, strict=True)
        for name in two
    )


GRAFTED = {"precondition_frequency": 4, "max_preconditioner_dim": 3, "weight_decay": 0.1}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"ridge": "absolute", "matrix_eps": 1e-4},
        {"ridge": "relative", "matrix_eps": 1e-3},
        {"refresh": "together", "start_preconditioning_step": 6},
        # A first gradient leaves null directions, whose root is all ridge: the default, 1e-6, is 17 roundings of fp32.
        {"start_preconditioning_step": 1, "matrix_eps": 1e-4},
        {"betas": (0.0, 0.9)},
        {"betas": (0.9, 1.0), "graft_beta2": 0.99},
        {"exponent": -0.5},
        {"exponent": -0.3},
        {"eps": 1e-3, "max_preconditioner_dim": 1024},
    ],
    ids=str,
)
def test_shampoo_is_its_oracle_over_thirty_steps(settings: dict[str, Any], seed: int) -> None:
    found, wanted = shampoo_paths(SHAPES, 30, seed, **{**GRAFTED, **settings})
    assert distance(found, wanted) < 1e-4


def test_thirty_steps_notice_another_refresh(seed: int) -> None:
    """The comparison would see it if offsets had no effect."""
    found, _ = shampoo_paths(SHAPES, 30, seed, **GRAFTED)
    _, wanted = shampoo_paths(SHAPES, 30, seed, **GRAFTED, refresh="together")
    assert distance(found, wanted) > 1e-2


PAPER = {"betas": (0.0, 1.0), "graft": None, "precondition_frequency": 1, "ridge": "absolute"}


@pytest.mark.parametrize("exponent", [None, -0.5])
def test_the_papers_shampoo_is_its_oracle(exponent: float | None, seed: int) -> None:
    settings = {**PAPER, "matrix_eps": 1e-2, "exponent": exponent, "max_preconditioner_dim": 4, "weight_decay": 0.1}
    found, wanted = shampoo_paths(SHAPES, 30, seed, **settings)
    assert distance(found, wanted) < 1e-4


def test_one_step_of_the_papers_shampoo_orthogonalizes_a_gradient(seed: int) -> None:
    """L^(-1/4) G R^(-1/4) = U V^T."""
    u, _, vh = torch.linalg.svd(normal((8, 8), seed))
    gradient = u * torch.linspace(1, 4, 8) @ vh  # what is squared in fp32 must not be lost there
    params = {"w": nn.Parameter(torch.zeros(8, 8))}
    optimizer = ds_optim.Shampoo(params.items(), lr=1.0, roles=LINEAR, matrix_eps=1e-12, **PAPER)
    take(optimizer, params, {"w": gradient})
    u, _, vh = torch.linalg.svd(gradient.double())
    torch.testing.assert_close(-params["w"].detach().double(), u @ vh, rtol=1e-3, atol=1e-3)


def test_dimensions_of_one_are_no_axes(seed: int) -> None:
    """A (6, 1, 4) weight has blocks of order 2, and is stepped as the (6, 4) one."""
    flat, deep = parameters({"w": (6, 4)}, seed), {"w": nn.Parameter(normal((6, 4), seed).view(6, 1, 4))}
    optimizers = [ds_optim.Shampoo(one.items(), roles=LINEAR, precondition_frequency=1) for one in (flat, deep)]
    for grads in gradients({"w": (6, 4)}, 3, seed):
        take(optimizers[0], flat, grads)
        take(optimizers[1], deep, {"w": grads["w"].view(6, 1, 4)})
    assert torch.equal(flat["w"], deep["w"].view(6, 4))


def test_experts_and_fused_parts_never_share_a_block(seed: int) -> None:
    """A stack is stepped as its experts would be on their own, a fused weight as its parts."""
    settings: dict[str, Any] = {"precondition_frequency": 1, "max_preconditioner_dim": 8, "lr": 0.1}
    parts = [["query", 4], ["key", 2], ["value", 2]]
    whole = parameters({"experts": (3, 6, 4), "qkv": (8, 6)}, seed)
    pieces = {f"e{i}": nn.Parameter(one.clone()) for i, one in enumerate(whole["experts"].detach())}
    pieces |= {f"p{i}": nn.Parameter(one.clone()) for i, one in enumerate(whole["qkv"].detach().split([4, 2, 2]))}
    roles = {"experts": {"kind": "mlp", "batch_dims": 1, "output_dim": 1}, "qkv": {"parts": parts}}
    together = ds_optim.Shampoo(whole.items(), roles=roles, **settings)
    apart = ds_optim.Shampoo(pieces.items(), roles=LINEAR, **settings)
    for grads in gradients({"experts": (3, 6, 4), "qkv": (8, 6)}, 3, seed):
        take(together, whole, grads)
        split = {f"e{i}": one for i, one in enumerate(grads["experts"])}
        split |= {f"p{i}": one for i, one in enumerate(grads["qkv"].split([4, 2, 2]))}
        take(apart, pieces, split)
    assert torch.equal(whole["experts"], torch.stack([pieces[f"e{i}"] for i in range(3)]))
    assert torch.equal(whole["qkv"], torch.cat([pieces[f"p{i}"] for i in range(3)]))


def test_before_its_first_root_a_block_takes_adams_step(seed: int) -> None:
    shapes = {"w": (6, 8)}
    ours, theirs = parameters(shapes, seed), parameters(shapes, seed)
    settings: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    optimizer = ds_optim.Shampoo(
        ours.items(), roles=LINEAR, max_preconditioner_dim=4, precondition_frequency=5, **settings
    )
    adamw = torch.optim.AdamW(theirs.values(), **settings)
    first: dict[int, int] = {}
    blocks = {0: (slice(0, 4), slice(0, 4)), 1: (slice(0, 4), slice(4, 8)), 2: (slice(4, 6), slice(0, 4))}
    blocks[3] = (slice(4, 6), slice(4, 8))
    for step, grads in enumerate(gradients(shapes, 10, seed), start=1):
        before = ours["w"].detach().clone()
        take(optimizer, ours, grads)
        take(adamw, theirs, grads)
        for index, block in enumerate(optimizer.plan.blocks):
            where = blocks[index]
            assert not torch.equal(ours["w"][where], before[where]), "a block stood still"
            if index not in first and step >= 5 and (step + block.offset) % 5 == 0:
                first[index] = step
            close = torch.allclose(ours["w"][where], theirs["w"][where], rtol=1e-5, atol=1e-6)
            assert close == (index not in first)
    assert set(first) == set(blocks)
    assert len(set(first.values())) > 1  # staggered


def statistics(optimizer: ds_optim.Shampoo, params: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    kinds = ("factor", "momentum", "graft")
    return {
        f"{name} {key}": value.clone()
        for name, one in params.items()
        for key, value in optimizer.state[one].items()
        if key.startswith(kinds)
    }


@pytest.mark.parametrize("method", ["eigh", "eigh32", "newton"])
def test_a_root_leaves_the_statistics_bitwise_as_they_are(
    method: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DS_OPTIM_ROOTS", method)
    kept = []
    for frequency in (1, 100):  # roots at every step, and none
        params = parameters(SHAPES, seed)
        settings: dict[str, Any] = {"max_preconditioner_dim": 4, "refresh": "together"}
        optimizer = ds_optim.Shampoo(params.items(), roles=LINEAR, precondition_frequency=frequency, **settings)
        for grads in gradients(SHAPES, 4, seed):
            take(optimizer, params, grads)
        assert bool(optimizer.state[params["matrix"]]["rooted"].all()) == (frequency == 1)
        kept.append(statistics(optimizer, params))
    assert same(*kept)


def test_factors_accumulate_for_ever_if_their_beta_is_one(seed: int) -> None:
    params = parameters({"w": (4, 6)}, seed)
    optimizer = ds_optim.Shampoo(params.items(), roles=LINEAR, **PAPER)
    left, right = torch.zeros(4, 4, dtype=torch.float64), torch.zeros(6, 6, dtype=torch.float64)
    for grads in gradients({"w": (4, 6)}, 5, seed):
        take(optimizer, params, grads)
        gradient = grads["w"].double()
        left, right = left + gradient @ gradient.T, right + gradient.T @ gradient
    state = optimizer.state[params["w"]]
    for key, wanted in (("factor_0", left), ("factor_1", right)):
        torch.testing.assert_close(unpack(state[key][None])[0].double(), wanted, rtol=1e-6, atol=1e-5)
    assert "graft" not in state


def conditioned(size: int, condition: float, seed: int) -> Tensor:
    """A square gradient whose factors have this condition number, in fp64."""
    q, _ = torch.linalg.qr(normal((size, size), seed).double())
    p, _ = torch.linalg.qr(normal((size, size), seed + 1).double())
    singular = torch.logspace(0, -math.log10(condition) / 2, size, dtype=torch.float64)
    return q @ torch.diag(singular) @ p.T


def test_a_diagonal_gradient_of_condition_1e12_is_made_the_identity() -> None:
    """Where fp32 factors can hold it, a condition number of 1e12 is no obstacle to a root."""
    gradient = torch.diag(torch.logspace(0, -6, 8))
    params = {"w": nn.Parameter(torch.zeros(8, 8))}
    optimizer = ds_optim.Shampoo(params.items(), lr=1.0, roles=LINEAR, matrix_eps=1e-20, **PAPER)
    take(optimizer, params, {"w": gradient})
    torch.testing.assert_close(-params["w"].detach(), torch.eye(8), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["eigh", "eigh32", "newton"])
def test_gradients_of_condition_1e12_give_the_oracles_step(
    method: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ridge of 1e-6 drowns what fp32 lost."""
    monkeypatch.setenv("DS_OPTIM_ROOTS", method)
    gradient = conditioned(12, 1e12, seed)
    params = {"w": nn.Parameter(torch.zeros(12, 12))}
    settings: dict[str, Any] = {"lr": 1.0, "precondition_frequency": 1, "matrix_eps": 1e-6, "ridge": "relative"}
    take(ds_optim.Shampoo(params.items(), roles=LINEAR, **settings), params, {"w": gradient.float()})
    wanted = {"w": torch.zeros(12, 12, dtype=torch.float64)}
    shampoo(wanted, {"w": gradient}, {}, 1, **settings)
    error = (params["w"].detach().double() - wanted["w"]).norm() / wanted["w"].norm()
    assert error < (0.1 if method == "newton" else 0.02)


@pytest.mark.parametrize(("state_dtype", "together"), [("fp32", 6), ("bf16", 2)])
def test_decompositions_of_many_stacks_run_together_where_state_is_not_copied(
    state_dtype: str, together: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[int] = []
    run = workers.on_one_thread_each

    def watched(jobs: list[workers.Job]) -> None:
        batches.append(len(jobs))
        run(jobs)

    monkeypatch.setattr(workers, "on_one_thread_each", watched)
    shapes = {"a": (4, 5), "b": (5, 4), "c": (3, 3)}
    params = parameters(shapes, seed)
    settings: dict[str, Any] = {"refresh": "together", "precondition_frequency": 1, "state_dtype": state_dtype}
    take(ds_optim.Shampoo(params.items(), roles=LINEAR, **settings), params, gradients(shapes, 1, seed)[0])
    assert batches == [together] * (6 // together)


# -- Newton ------------------------------------------------------------------------------------------------------------


def test_newton_gives_eighs_steps_to_one_in_a_thousand(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def path(method: str) -> list[dict[str, Tensor]]:
        monkeypatch.setenv("DS_OPTIM_ROOTS", method)
        return shampoo_paths(SHAPES, 10, seed, precondition_frequency=2, max_preconditioner_dim=4)[0]

    found, wanted = path("newton"), path("eigh")
    assert 0 < distance(found, [{name: one.double() for name, one in step.items()} for step in wanted]) < 1e-3


def test_newton_leaves_other_exponents_to_eigh(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = []
    for method in ("newton", "eigh"):
        monkeypatch.setenv("DS_OPTIM_ROOTS", method)
        paths.append(shampoo_paths({"w": (5, 6)}, 4, seed, precondition_frequency=1, exponent=-0.3)[0])
    assert all(same(one, two) for one, two in zip(*paths, strict=True))


def test_a_block_that_newton_cannot_do_is_done_by_eigh_one_step_later(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only then is it known on the host, without waiting. Meanwhile the block keeps its last root."""
    monkeypatch.setenv("DS_OPTIM_ROOTS", "newton")
    calls: list[tuple[str, int]] = []

    def flagging(stack: Tensor, *args: Any, method: Any, **settings: Any) -> Stepwise[tuple[Tensor, Tensor]]:
        calls.append((method, len(stack)))
        roots, failed = yield from roots_module.inverse_roots_stepwise(stack, *args, method=method, **settings)
        if method == "newton" and len(calls) == 1:
            failed = failed.clone()
            failed[1] = True
        return roots, failed

    monkeypatch.setattr(shampoo_module, "inverse_roots_stepwise", flagging)
    params = parameters({"w": (8, 4)}, seed)
    settings: dict[str, Any] = {"max_preconditioner_dim": 4, "precondition_frequency": 3, "refresh": "together"}
    optimizer = ds_optim.Shampoo(params.items(), roles=LINEAR, start_preconditioning_step=1, **settings)
    many = gradients({"w": (8, 4)}, 4, seed)
    take(optimizer, params, many[0])
    state = optimizer.state[params["w"]]
    assert calls == [("newton", 2), ("newton", 2)]  # block by block, since the workspace is bounded: two axes each
    assert state["rooted"].tolist() == [0, 1]
    take(optimizer, params, many[1])
    assert calls[2:] == [("eigh", 2)]
    assert state["rooted"].tolist() == [1, 1]
    factor = unpack(state["factor_0"].view(2, -1))[0] / (1 - 0.95**2)
    wanted, _ = roots_module.inverse_roots(factor[None], -0.25, eps=1e-6, relative=True, method="eigh")
    torch.testing.assert_close(unpack(state["root_0"].view(2, -1))[0], wanted[0], rtol=1e-4, atol=1e-4)
    take(optimizer, params, many[2])
    assert calls[3:] == [("newton", 2), ("newton", 2)]  # step 3
    take(optimizer, params, many[3])
    assert len(calls) == 5
    assert state["failures"].tolist() == [0, 0]


# -- what goes wrong ---------------------------------------------------------------------------------------------------


def steps_until_an_error(
    optimizer: torch.optim.Optimizer, params: Mapping[str, nn.Parameter], grads: Grads
) -> tuple[int, str]:
    for step in range(1, 10):
        try:
            take(optimizer, params, grads)
        except RuntimeError as error:
            return step, str(error)
    raise AssertionError("no error in nine steps")


@pytest.mark.parametrize(("method", "expected"), [("eigh", 4), ("eigh32", 4), ("newton", 5)])
def test_three_failed_roots_in_a_row_are_an_error_that_names_the_block(
    method: str, expected: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients of 1e25 are finite, their squares are not. It is said in the step after; Newton is one step behind."""
    monkeypatch.setenv("DS_OPTIM_ROOTS", method)
    shapes = {"first": (4, 4), "second": (8, 4)}
    params = parameters(shapes, seed)
    settings: dict[str, Any] = {"max_preconditioner_dim": 4, "precondition_frequency": 1}
    optimizer = ds_optim.Shampoo(params.items(), roles=LINEAR, **settings)
    grads = gradients(shapes, 1, seed)[0]
    grads["second"][4:] *= 1e25
    step, message = steps_until_an_error(optimizer, params, grads)
    assert step == expected
    assert "second, block 1 [4:8, 0:4]: 3 root computations in a row failed" in message
    assert "first" not in message
    assert "block 0" not in message
    assert all(one.isfinite().all() for one in params.values())
    before = values(params)
    take(optimizer, params, grads)  # goes on
    assert not torch.equal(params["first"], before["first"])


@pytest.mark.parametrize("method", ["eigh", "eigh32", "newton"])
def test_failures_that_are_not_in_a_row_are_no_error(method: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every other root fails, with Newton also when it is tried again a step later."""
    monkeypatch.setenv("DS_OPTIM_ROOTS", method)
    steps: list[int] = []

    def failing(stack: Tensor, *args: Any, **settings: Any) -> Stepwise[tuple[Tensor, Tensor]]:
        roots, failed = yield from roots_module.inverse_roots_stepwise(stack, *args, **settings)
        return roots, torch.ones_like(failed) if steps[-1] % 6 in (3, 4) else failed

    monkeypatch.setattr(shampoo_module, "inverse_roots_stepwise", failing)
    params = parameters({"w": (4, 4)}, seed)
    optimizer = ds_optim.Shampoo(params.items(), roles=LINEAR, precondition_frequency=3, refresh="together")
    for step, grads in enumerate(gradients({"w": (4, 4)}, 30, seed), start=1):
        steps.append(step)
        take(optimizer, params, grads)


def block_state(optimizer: ds_optim.Shampoo, parameter: nn.Parameter) -> dict[str, Tensor]:
    """Of a parameter of equal blocks: every kind of state, one row per block, in the order of the blocks."""
    state = optimizer.state[parameter]
    order = state["blocks"][:, 1].argsort()
    kinds = ("momentum", "graft", "factor_0", "factor_1", "root_0", "root_1", "rooted", "failures", "waiting")
    return {kind: state[kind].view(len(order), -1)[order].clone() for kind in kinds}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("first", [True, False])
def test_a_gradient_that_is_not_finite_is_withheld_from_its_block_alone(bad: float, first: bool, seed: int) -> None:
    params = parameters({"w": (8, 4)}, seed)
    settings: dict[str, Any] = {
        "lr": 0.1,
        "weight_decay": 0.5,
        "max_preconditioner_dim": 4,
        "precondition_frequency": 1,
    }
    optimizer = ds_optim.Shampoo(params.items(), roles=LINEAR, **settings)
    many = gradients({"w": (8, 4)}, 5, seed)
    if not first:
        take(optimizer, params, many[0])
        kept = block_state(optimizer, params["w"])
    before = params["w"].detach().clone()
    spoilt = many[1]["w"].clone()
    spoilt[5, 2] = bad
    take(optimizer, params, {"w": spoilt})
    assert torch.equal(params["w"][4:], before[4:] * (1 - 0.1 * 0.5))
    assert not torch.equal(params["w"][:4], before[:4] * (1 - 0.1 * 0.5))
    after = block_state(optimizer, params["w"])
    if not first:
        for kind in ("momentum", "graft", "factor_0", "factor_1"):
            assert torch.equal(after[kind][1], kept[kind][1])
            assert not torch.equal(after[kind][0], kept[kind][0])

    before = params["w"].detach().clone()
    with pytest.raises(RuntimeError, match=r"w, block 1 \[4:8, 0:4\]: its gradient is not finite") as caught:
        take(optimizer, params, many[2])
    assert "block 0" not in str(caught.value)
    assert torch.equal(params["w"], before)
    assert int(optimizer.state[params["w"]]["step"]) == (1 if first else 2)
    for grads in many[3:]:
        take(optimizer, params, grads)
    assert params["w"].isfinite().all()
    assert not torch.equal(params["w"][4:], before[4:])


def test_withheld_swan_updates_are_told_too(seed: int) -> None:
    params = parameters({"experts": (3, 4, 5)}, seed)
    role = {"kind": "mlp", "batch_dims": 1, "output_dim": 1}
    optimizer = ds_optim.SWAN(params.items(), lr=0.1, roles={"experts": role})
    grads = gradients({"experts": (3, 4, 5)}, 1, seed)[0]
    spoilt = {"experts": grads["experts"].clone()}
    spoilt["experts"][1, 0, 0] = math.nan
    before = values(params)
    take(optimizer, params, spoilt)
    moved = [not torch.equal(a, b) for a, b in zip(params["experts"], before["experts"], strict=True)]
    assert moved == [True, False, True]
    with pytest.raises(RuntimeError, match=r"experts, block 1 \[1:2, 0:4, 0:5\]"):
        take(optimizer, params, grads)
    take(optimizer, params, grads)


def test_one_error_names_the_blocks_of_all_groups_and_the_next_call_goes_on(seed: int) -> None:
    params = parameters({"a": (4, 4), "b": (4, 4)}, seed)
    groups = [{"params": [("a", params["a"])], "weight_decay": 0.1}, {"params": [("b", params["b"])]}]
    optimizer = ds_optim.Shampoo(groups, roles=LINEAR)
    grads = gradients({"a": (4, 4), "b": (4, 4)}, 1, seed)[0]
    take(optimizer, params, {name: one * math.nan for name, one in grads.items()})
    with pytest.raises(RuntimeError, match="a, block 0") as caught:
        take(optimizer, params, grads)
    assert "b, block 0" in str(caught.value)
    take(optimizer, params, grads)


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "settings", "reasons"),
    [
        (
            ds_optim.Shampoo,
            {
                "lr": -1.0,
                "betas": (0.9, 1.5),
                "matrix_eps": 0.0,
                "ridge": "round",
                "max_preconditioner_dim": 0,
                "precondition_frequency": 2.5,
                "start_preconditioning_step": 0,
                "graft": "sgd",
                "graft_beta2": 1.0,
                "exponent": 0.25,
                "refresh": "never",
                "exchange_bucket_size": 0,
                "exchange_dtype": "fp8",
                "matmul_precision": "fp16",
                "state_dtype": "fp8",
            },
            "lr|every beta|matrix_eps|ridge|max_preconditioner_dim|precondition_frequency|start_preconditioning_step|"
            "graft must|graft_beta2|exponent|refresh|exchange_bucket_size|exchange_dtype|matmul_precision|state_dtype",
        ),
        (
            ds_optim.Shampoo,
            {"ridge": None, "max_preconditioner_dim": None, "precondition_frequency": None, "refresh": None},
            "ridge must be given|max_preconditioner_dim must be given|precondition_frequency must be given|"
            "refresh must be given",
        ),
        (ds_optim.Shampoo, {"graft": None, "start_preconditioning_step": 2}, "without a graft"),
        (ds_optim.Shampoo, {"betas": (1.0, 0.9), "precondition_frequency": True}, "not 1.0|not True"),
        (
            ds_optim.SWAN,
            {"alpha": -1, "ns_steps": 0, "ns_beta": 1.0, "norm_axis": "both", "exchange_bucket_size": 1.5, "eps": -1},
            "alpha|ns_steps|ns_beta|norm_axis|exchange_bucket_size|eps",
        ),
        (ds_optim.SWAN, {"betas": (0.9, 1.0), "alpha": math.inf, "ns_steps": 2.0}, "beta|alpha|ns_steps"),
    ],
)
def test_bad_settings_are_listed_together(cls: Any, settings: dict[str, Any], reasons: str) -> None:
    with pytest.raises(ValueError, match=cls.__name__) as caught:
        cls([nn.Parameter(torch.ones(2, 2))], **settings)
    listed = str(caught.value).split("\n- ")[1:]
    assert len(listed) == len(reasons.split("|"))
    for reason in reasons.split("|"):
        assert any(reason in problem for problem in listed), reason


@pytest.mark.parametrize(
    ("cls", "key", "value"),
    [
        (ds_optim.Shampoo, "max_preconditioner_dim", 7),
        (ds_optim.Shampoo, "precondition_frequency", 3),
        (ds_optim.Shampoo, "start_preconditioning_step", 3),
        (ds_optim.Shampoo, "graft", None),
        (ds_optim.Shampoo, "refresh", "together"),
        (ds_optim.SWAN, "norm_axis", "out"),
    ],
)
def test_a_group_cannot_change_what_decides_the_blocks(cls: Any, key: str, value: Any) -> None:
    groups = [{"params": [nn.Parameter(torch.ones(2, 2))], key: value}]
    with pytest.raises(ValueError, match=f"{key} is a setting of the whole optimizer"):
        cls(groups)
    cls([nn.Parameter(torch.ones(2, 2))], **{key: value})  # but the optimizer can


def test_groups_may_differ_in_everything_else(seed: int) -> None:
    """Each group is stepped as an optimizer of its own would."""
    settings = [
        {"lr": 0.1, "exponent": -0.5, "betas": (0.5, 0.9)},
        {"lr": 0.2, "matrix_eps": 1e-2, "weight_decay": 0.1},
    ]
    together, apart = parameters({"a": (4, 5), "b": (4, 5)}, seed), parameters({"a": (4, 5), "b": (4, 5)}, seed)
    groups = [{"params": [pair], **one} for pair, one in zip(together.items(), settings, strict=True)]
    shared: dict[str, Any] = {"roles": LINEAR, "precondition_frequency": 1}
    optimizer = ds_optim.Shampoo(groups, **shared)
    singles = {
        name: ds_optim.Shampoo([(name, one)], **shared, **extra)  # type: ignore[arg-type]
        for (name, one), extra in zip(apart.items(), settings, strict=True)
    }
    for grads in gradients({"a": (4, 5), "b": (4, 5)}, 3, seed):
        take(optimizer, together, grads)
        for name, single in singles.items():
            take(single, {name: apart[name]}, grads)
    assert same(values(together), values(apart))


# -- state -------------------------------------------------------------------------------------------------------------

MIXED = {"w": (9, 6), "v": (7,), "deep": (3, 4, 5), "norm.weight": (6,)}
MIXED_ROLES = {"norm.weight": "norm", "*": "linear"}
MAKERS: Mapping[str, Callable[[Any], Any]] = {
    "Shampoo": lambda params: ds_optim.Shampoo(
        params, roles=MIXED_ROLES, max_preconditioner_dim=4, precondition_frequency=3, exchange_bucket_size=100
    ),
    "paper": lambda params: ds_optim.Shampoo(params, roles=MIXED_ROLES, **PAPER),
    "bf16 state": lambda params: ds_optim.Shampoo(
        params, roles=MIXED_ROLES, precondition_frequency=2, state_dtype="bf16", exchange_dtype="bf16"
    ),
    "SWAN": lambda params: ds_optim.SWAN(params, roles=MIXED_ROLES, exchange_dtype="bf16"),
}


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("at", [1, 4])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(kind: str, at: int, seed: int) -> None:
    params = parameters(MIXED, seed)
    optimizer = MAKERS[kind](params.items())
    many = gradients(MIXED, 9, seed)
    for grads in many[:at]:
        take(optimizer, params, grads)
    saved = io.BytesIO()
    torch.save(optimizer.state_dict(), saved)
    resumed = {name: nn.Parameter(value) for name, value in values(params).items()}
    for grads in many[at:]:
        take(optimizer, params, grads)
    saved.seek(0)
    loaded = MAKERS[kind](resumed.items())
    loaded.load_state_dict(torch.load(saved, weights_only=True))
    for grads in many[at:]:
        take(loaded, resumed, grads)
    assert same(values(params), values(resumed))


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))], ids=["copy", "pickle"])
@pytest.mark.parametrize("kind", MAKERS)
def test_a_copy_goes_on_where_the_original_was(kind: str, copier: Any, seed: int) -> None:
    params = parameters(MIXED, seed)
    optimizer = MAKERS[kind](params.items())
    many = gradients(MIXED, 5, seed)
    for grads in many[:2]:
        take(optimizer, params, grads)
    copied, twin = copier((params, optimizer))
    for grads in many[2:]:
        take(optimizer, params, grads)
        take(twin, copied, grads)
    assert same(values(params), values(copied))


@pytest.mark.parametrize(
    "changed",
    [
        {"max_preconditioner_dim": 5},
        {"precondition_frequency": 2},
        {"start_preconditioning_step": 2},
        {"graft": None},
        {"refresh": "together"},
    ],
    ids=str,
)
def test_the_state_of_another_structure_is_refused_and_changes_nothing(changed: dict[str, Any], seed: int) -> None:
    settings: dict[str, Any] = {"roles": LINEAR, "max_preconditioner_dim": 4, "precondition_frequency": 3}
    params = parameters({"w": (8, 8)}, seed)
    optimizer = ds_optim.Shampoo(params.items(), **settings)
    take(optimizer, params, gradients({"w": (8, 8)}, 1, seed)[0])
    other = ds_optim.Shampoo(params.items(), **{**settings, **changed})
    with pytest.raises(ValueError, match=f"{next(iter(changed))} was"):
        other.load_state_dict(optimizer.state_dict())
    assert not other.state


def test_the_state_of_other_roles_is_refused(seed: int) -> None:
    params = parameters({"w": (8, 8)}, seed)
    optimizer = ds_optim.Shampoo(params.items(), roles=LINEAR)
    take(optimizer, params, gradients({"w": (8, 8)}, 1, seed)[0])
    for role in ("embedding", {"parts": [["query", 4], ["key", 4]]}):
        with pytest.raises(ValueError, match="the same optimizer"):
            ds_optim.Shampoo(params.items(), roles={"w": role}).load_state_dict(optimizer.state_dict())


def test_a_group_added_later_does_not_disturb_the_others_state(seed: int) -> None:
    """No root is taken here, so that another refresh schedule cannot show: only a wrong state can."""
    finals = []
    for added in (False, True):
        params = parameters({"m": (8, 8)}, seed)
        settings: dict[str, Any] = {"max_preconditioner_dim": 4, "start_preconditioning_step": 1000}
        optimizer = ds_optim.Shampoo(params.items(), roles=LINEAR, precondition_frequency=3, **settings)
        many = gradients({"m": (8, 8)}, 6, seed)
        for grads in many[:3]:
            take(optimizer, params, grads)
        if added:
            optimizer.add_param_group({"params": [("a", nn.Parameter(torch.ones(8, 4)))]})
        for grads in many[3:]:
            take(optimizer, params, grads)
        finals.append(values(params))
    assert same(*finals)


def test_schedules_do_not_pile_up(seed: int) -> None:
    """Experts that get gradients now and then: every subset is another list of tensors."""
    shapes = {f"w{index}": (2, 2) for index in range(8)}
    params = parameters(shapes, seed)
    optimizer = ds_optim.SWAN(params.items(), roles=LINEAR)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(200):
        chosen = [name for name in shapes if torch.rand((), generator=generator) < 0.5]
        take(optimizer, params, {name: torch.ones(2, 2) for name in chosen})
    assert len(optimizer.stepper.buffers()) <= 4 * 65


@pytest.mark.parametrize("bucket_size", [1, 50])
@pytest.mark.parametrize("cls", [ds_optim.Shampoo, ds_optim.SWAN])
def test_the_size_of_buckets_changes_no_bit(cls: Any, bucket_size: int, seed: int) -> None:
    finals = []
    for size in (bucket_size, 1 << 24):
        params = parameters(MIXED, seed)
        settings = {"max_preconditioner_dim": 4, "precondition_frequency": 2} if cls is ds_optim.Shampoo else {}
        optimizer = cls(params.items(), roles=MIXED_ROLES, exchange_bucket_size=size, **settings)
        for grads in gradients(MIXED, 4, seed):
            take(optimizer, params, grads)
        finals.append(values(params))
    assert same(*finals)


@pytest.mark.parametrize("kind", MAKERS)
def test_gradients_are_never_written_to(kind: str, seed: int) -> None:
    params = parameters(MIXED, seed)
    optimizer = MAKERS[kind](params.items())
    for grads in gradients(MIXED, 3, seed):
        take(optimizer, params, grads)
        for name, one in params.items():
            assert one.grad is not None
            assert torch.equal(one.grad, grads[name])


# -- parameters that are trained later, or no more --------------------------------------------------------------------

JOINING = {"a": (6, 4), "m": (8, 8), "z": (5, 7)}


def kept_for(params: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, name: str) -> Grads:
    model = nn.ParameterDict(params)
    return ds_optim.checkpoint.full_state(model, name, optimizer)


def joined(seed: int, frozen: str, *, is_trained: bool = False) -> tuple[dict[str, nn.Parameter], ds_optim.Shampoo]:
    """After three steps of all parameters but one, which is frozen or gets no gradient."""
    params = parameters(JOINING, seed)
    params[frozen].requires_grad_(is_trained)
    settings = {"max_preconditioner_dim": 4, "precondition_frequency": 3, "start_preconditioning_step": 1}
    optimizer = ds_optim.Shampoo(params.items(), roles=LINEAR, **settings)
    for grads in gradients(JOINING, 3, seed):
        take(optimizer, params, {name: grad for name, grad in grads.items() if name != frozen})
    return params, optimizer


@pytest.mark.parametrize("frozen", JOINING)
def test_blocks_keep_their_own_state_when_a_parameter_joins_that_was_frozen(frozen: str, seed: int) -> None:
    params, optimizer = joined(seed, frozen)
    others = [name for name in JOINING if name != frozen]
    before = {name: kept_for(params, optimizer, name) for name in others}
    params[frozen].requires_grad_(True)
    for step in range(2):
        take(optimizer, params, {frozen: normal(JOINING[frozen], seed + step)})
        for name in others:
            assert same(kept_for(params, optimizer, name), before[name]), (step, name)


def in_order(optimizer: ds_optim.Shampoo, parameter: nn.Parameter) -> bool:
    """Whether every block of a parameter has its state where the plan looks for it."""
    return not optimizer.stepper.kept.is_anothers(parameter, optimizer.state[parameter])


@pytest.mark.parametrize("frozen", JOINING)
def test_blocks_have_their_own_state_in_the_step_in_which_another_parameter_joins(frozen: str, seed: int) -> None:
    params, optimizer = joined(seed, frozen)
    params[frozen].requires_grad_(True)
    take(optimizer, params, gradients(JOINING, 1, seed + 1)[0])
    assert all(in_order(optimizer, params[name]) for name in JOINING)


@pytest.mark.parametrize("frozen", JOINING)
def test_a_copy_in_which_another_set_is_trained_has_the_same_state_for_every_block(frozen: str, seed: int) -> None:
    params, optimizer = joined(seed, frozen, is_trained=True)
    params[frozen].requires_grad_(False)  # it has a place in the plan, and no state
    twins, twin = copy.deepcopy((params, optimizer))
    for name in JOINING:
        if name != frozen:
            assert same(kept_for(twins, twin, name), kept_for(params, optimizer, name)), name

    twins, twin = copy.deepcopy((params, optimizer))
    grads = gradients(JOINING, 1, seed + 1)[0]
    take(twin, twins, {name: grads[name] for name in JOINING if name != frozen})
    assert all(in_order(twin, twins[name]) for name in JOINING if name != frozen)
