"""Muon, NorMuon and SOAP on one process: the mathematics of their oracles, and what happens at the edges of it.

Sharding is tested elsewhere; here every parameter is whole.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ds_optim
from ds_optim.linalg import eigenbases
from ds_optim.optimizers.matrix_roles import matrix_tiles
from ds_optim.roles.role import Part, Role
from reference.muon import muon, orthogonal
from reference.soap import soap
from test_linalg import failing
from test_swan_and_shampoo import LINEAR, gradients, normal, parameters, same, steps_until_an_error, take, values

CLASSES = [ds_optim.Muon, ds_optim.NorMuon, ds_optim.SOAP]
SHAPES = {"wide": (6, 10), "tall": (11, 5), "square": (8, 8), "long": (4, 40)}


def oracle(cls: Any, params: dict[str, Tensor], grads: list[dict[str, Tensor]], **settings: Any) -> dict[str, Tensor]:
    """Parameters after these steps, by the textbook in fp64."""
    params = {name: one.detach().double() for name, one in params.items()}
    state: dict[str, dict[str, Tensor]] = {}
    for step, given in enumerate(grads, 1):
        if cls is ds_optim.SOAP:
            soap(params, given, state, step, **settings)
        else:
            beta2 = {"beta2": settings.get("beta2", 0.95)} if cls is ds_optim.NorMuon else {}
            muon(params, given, state, step, **{**settings, **beta2})
    return params


def moved(before: Mapping[str, Tensor], found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """The largest difference, in distances moved."""
    return max(
        float((found[name].detach().double() - one).norm() / (one - before[name].double()).norm())
        for name, one in wanted.items()
    )


@pytest.mark.parametrize(
    ("cls", "settings"),
    [
        (ds_optim.Muon, {}),
        (ds_optim.Muon, {"adjust_lr": "original", "nesterov": False, "momentum": 0.8, "weight_decay": 0.3}),
        (ds_optim.Muon, {"ns_steps": 3}),
        (ds_optim.NorMuon, {}),
        (ds_optim.NorMuon, {"beta2": 0.5, "momentum": 0.0, "adjust_lr": "original"}),
        (ds_optim.SOAP, {"precondition_frequency": 3}),
        (ds_optim.SOAP, {"betas": (0.9, 0.99), "weight_decay": 0.3, "precondition_frequency": 1}),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else str(value),
)
def test_thirty_steps_are_the_oracles(cls: Any, settings: dict[str, Any], seed: int) -> None:
    shapes = {"square": (8, 8), "other": (9, 9)} if cls is ds_optim.SOAP else SHAPES
    params = parameters(shapes, seed)
    before, grads = values(params), gradients(shapes, 30, seed)
    together = {"refresh": "together"} if cls is ds_optim.SOAP else {}
    optimizer = cls(params.items(), lr=0.03, roles=LINEAR, **settings, **together)
    for given in grads:
        take(optimizer, params, given)
    wanted = oracle(cls, before, grads, lr=0.03, **settings)
    assert moved(before, params, wanted) <= (1e-3 if cls is ds_optim.SOAP else 1e-4)


def test_polar_express_ends_nearer_to_the_polar_factor(seed: int) -> None:
    """Singular values of one update: within Muon's band, within a narrower one, and after two more steps at one."""
    away = {}
    for name, steps in (("quintic", 5), ("polar_express", 5), ("polar_express", 7)):
        weight = nn.Parameter(torch.zeros(24, 60))
        optimizer = ds_optim.Muon(
            [("w", weight)], lr=1.0, roles=LINEAR, weight_decay=0.0, ns_coefficients=name, ns_steps=steps
        )
        take(optimizer, {"w": weight}, {"w": normal((24, 60), seed)})
        found = torch.linalg.svdvals(weight.detach().double()) / (0.2 * math.sqrt(60))
        away[name, steps] = float((found - 1).abs().max())
    assert away["polar_express", 7] < 0.02 < away["polar_express", 5] < 0.2 < away["quintic", 5] < 0.4


def test_coefficients_may_be_three_numbers(seed: int) -> None:
    weights = [nn.Parameter(normal((6, 10), seed)) for _ in range(2)]
    for weight, named in zip(weights, ("quintic", [3.4445, -4.7750, 2.0315]), strict=True):
        take(ds_optim.Muon([("w", weight)], roles=LINEAR, ns_coefficients=named), {"w": weight}, {"w": weight.detach()})
    assert torch.equal(*weights)


@pytest.mark.parametrize(
    ("cls", "scale"),
    [
        (ds_optim.Muon, 1e-5),
        (ds_optim.Muon, 1e30),
        (ds_optim.NorMuon, 1e-5),
        (ds_optim.NorMuon, 1e30),
        (ds_optim.SOAP, 1e-8),
        (ds_optim.SOAP, 1e8),
    ],
)
def test_updates_do_not_depend_on_the_scale_of_gradients(cls: Any, scale: float, seed: int) -> None:
    """As far as Muon's least norm of 1e-7, which is published, and the squares of squares of SOAP reach."""
    ends = []
    for factor in (1.0, scale):
        params = parameters({"w": (6, 10)}, seed)
        optimizer = cls(params.items(), lr=0.1, roles=LINEAR, **({"eps": 0.0} if cls is ds_optim.SOAP else {}))
        for given in gradients({"w": (6, 10)}, 4, seed):
            take(optimizer, params, {"w": given["w"] * factor})
        ends.append(params["w"].detach())
    assert not torch.equal(ends[0], parameters({"w": (6, 10)}, seed)["w"])
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("cls", CLASSES)
def test_zero_gradients_move_nothing(cls: Any) -> None:
    weight = nn.Parameter(torch.ones(5, 7))
    optimizer = cls([("w", weight)], lr=0.1, weight_decay=0.0, roles=LINEAR)
    for _ in range(3):
        take(optimizer, {"w": weight}, {"w": torch.zeros(5, 7)})
    assert torch.equal(weight.detach(), torch.ones(5, 7))
    for step in range(12):  # and what follows is as good as after no such steps
        take(optimizer, {"w": weight}, {"w": normal((5, 7), step)})
    assert weight.isfinite().all()
    assert not torch.equal(weight.detach(), torch.ones(5, 7))


# -- which matrices ----------------------------------------------------------------------------------------------------


def one_step(cls: Any, value: Tensor, gradient: Tensor, role: Any, **settings: Any) -> Tensor:
    weight = nn.Parameter(value.clone())
    optimizer = cls([("w", weight)], lr=0.1, weight_decay=0.0, momentum=0.0, roles={"w": role}, **settings)
    take(optimizer, {"w": weight}, {"w": gradient})
    return (value - weight.detach()).double() / 0.1


@pytest.mark.parametrize("cls", [ds_optim.Muon, ds_optim.NorMuon])
def test_in_out_weights_experts_and_convolutions_are_read_by_their_role(cls: Any, seed: int) -> None:
    gradient = normal((3, 6, 10), seed)
    plain = [one_step(cls, torch.zeros(6, 10), one, "linear") for one in gradient]
    turned = one_step(cls, torch.zeros(10, 6), gradient[0].mT.contiguous(), {"kind": "linear", "output_dim": 1})
    torch.testing.assert_close(turned.mT, plain[0], rtol=1e-4, atol=1e-5)
    experts = one_step(cls, torch.zeros(3, 6, 10), gradient, {"kind": "mlp", "output_dim": 1, "batch_dims": 1})
    assert torch.equal(experts, torch.stack(plain))
    conv = one_step(cls, torch.zeros(6, 5, 1, 2), gradient[0].view(6, 5, 1, 2), "conv")
    assert torch.equal(conv, plain[0].view(6, 5, 1, 2))
    transposed = gradient[0].view(6, 5, 2).movedim(0, 1).contiguous()  # (in, out, k)
    found = one_step(cls, torch.zeros(5, 6, 2), transposed, {"kind": "conv", "output_dim": 1})
    torch.testing.assert_close(found.movedim(1, 0).reshape(6, 10), plain[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cls", [ds_optim.Muon, ds_optim.NorMuon])
def test_parts_and_heads_are_orthogonalised_by_themselves(cls: Any, seed: int) -> None:
    gradient, zeros = normal((24, 7), seed), torch.zeros(24, 7)
    fused = {"kind": "fused", "head_dim": 4, "parts": [["query", 12], ["key", 4], ["value", 8]]}
    cut = [one_step(cls, torch.zeros_like(part), part, "linear") for part in gradient.split((12, 4, 8))]
    assert torch.equal(one_step(cls, zeros, gradient, fused), torch.cat(cut))
    heads = torch.cat([one_step(cls, zeros[:4], part, "linear") for part in gradient.split(4)])
    assert torch.equal(one_step(cls, zeros, gradient, fused, per_head=True), heads)
    for kind in ("query", "key", "value"):
        role = {"kind": kind, "head_dim": 4}
        assert torch.equal(one_step(cls, zeros, gradient, role, per_head=True), heads)
        assert not torch.equal(one_step(cls, zeros, gradient, role), heads)
    assert torch.equal(one_step(cls, zeros, gradient, "mlp", per_head=True), one_step(cls, zeros, gradient, "mlp"))


def test_heads_are_known_from_the_model() -> None:
    """Of queries, keys and values: grouped, fused, and of latent attention, whose values are narrower."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 16}
    llama = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
    roles, shapes = ds_optim.infer_roles(llama), {name: tuple(one.shape) for name, one in llama.named_parameters()}
    for part, count in (("q", 4), ("k", 2), ("v", 2), ("o", 1)):
        name = f"model.layers.0.self_attn.{part}_proj.weight"
        assert len(matrix_tiles(roles[name], shapes[name], per_head=True)) == count, name
    neox = GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, num_attention_heads=4))
    name = "gpt_neox.layers.0.attention.query_key_value.weight"
    tiles = matrix_tiles(ds_optim.infer_roles(neox)[name], (72, 24), per_head=True)
    assert [tile.shape for tile in tiles] == [(1, 6, 24)] * 12
    latent = Role("fused", head_dim=4, parts=(Part("key", 4), Part("value", 3)) * 2)
    assert [tile.shape[1] for tile in matrix_tiles(latent, (14, 5), per_head=True)] == [4, 3, 4, 3]


@pytest.mark.parametrize("cls", [ds_optim.Muon, ds_optim.NorMuon])
def test_heads_that_nobody_knows_are_one_error_that_names_them_all(cls: Any) -> None:
    params = {f"{part}_proj.weight": nn.Parameter(torch.ones(6, 6)) for part in "qkvo"}
    before = values(params)
    optimizer = cls(params.items(), per_head=True)
    with pytest.raises(ValueError, match="per_head") as caught:
        take(optimizer, params, before)
    assert all(f"{part}_proj.weight: per_head, and nothing says" in str(caught.value) for part in "qkv")
    assert "o_proj" not in str(caught.value)
    assert "roles=model" in str(caught.value)
    assert same(before, values(params))


@pytest.mark.parametrize("named", [True, False])
def test_heads_of_matrices_that_nobody_knows_at_all_are_an_error_too(named: bool) -> None:
    weight = nn.Parameter(torch.ones(6, 6))
    optimizer = ds_optim.Muon([("layers.0.weight", weight)] if named else [weight], per_head=True)
    with pytest.raises(ValueError, match="per_head, and nothing says what this matrix is") as caught:
        take(optimizer, {"w": weight}, {"w": torch.ones(6, 6)})
    assert "roles=model" in str(caught.value)
    assert torch.equal(weight, torch.ones(6, 6))


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "settings", "reasons"),
    [
        (ds_optim.Muon, {"ns_steps": 0, "momentum": 1}, ["ns_steps must be a whole number >= 1", "momentum must be"]),
        (ds_optim.Muon, {"adjust_lr": "match", "nesterov": 1}, ["adjust_lr must be one of", "nesterov must be true"]),
        (ds_optim.Muon, {"ns_coefficients": [1.0, 2.0]}, ['"polar_express" or three numbers a, b, c, not [1.0, 2.0]']),
        (ds_optim.Muon, {"ns_coefficients": np.ones(3)}, ['"polar_express" or three numbers a, b, c, not array(']),
        (ds_optim.Muon, {"ns_coefficients": "cubic", "per_head": "yes"}, ["'cubic'", "per_head must be true or false"]),
        (ds_optim.NorMuon, {"beta2": 1.0, "momentum": -0.1}, ["beta2 must be in [0, 1)", "momentum must be in"]),
        (ds_optim.SOAP, {"precondition_frequency": 0, "refresh": "no"}, ["precondition_frequency", "refresh must"]),
        (ds_optim.SOAP, {"max_preconditioner_dim": None, "betas": (0.9, 1.0)}, ["max_preconditioner_dim", "beta must"]),
    ],
)
def test_bad_settings_are_listed_together(cls: Any, settings: dict[str, Any], reasons: list[str]) -> None:
    with pytest.raises(ValueError, match=r":\n- ") as caught:
        cls([nn.Parameter(torch.ones(2, 2))], **settings)
    for reason in reasons:
        assert reason in str(caught.value)


@pytest.mark.parametrize(("cls", "key"), [(ds_optim.Muon, "per_head"), (ds_optim.SOAP, "precondition_frequency")])
def test_what_decides_the_blocks_cannot_change(cls: Any, key: str) -> None:
    weight = nn.Parameter(torch.ones(6, 6))
    optimizer = cls([("w", weight)], roles=LINEAR)
    optimizer.param_groups[0][key] = 7
    with pytest.raises(ValueError, match=f"{key} is 7 in a group"):
        take(optimizer, {"w": weight}, {"w": torch.ones(6, 6)})


@pytest.mark.parametrize("cls", [ds_optim.Muon, ds_optim.NorMuon])
def test_a_group_that_was_edited_is_judged_before_anything_moves(cls: Any) -> None:
    params = {"w": nn.Parameter(torch.ones(6, 6)), "gain": nn.Parameter(torch.ones(6))}
    before = values(params)
    optimizer = cls(params.items(), roles={"w": "linear", "gain": "norm"})
    optimizer.param_groups[0] |= {"ns_coefficients": "foo", "ns_steps": 0}
    with pytest.raises(ValueError, match=r"three numbers a, b, c, not 'foo'") as caught:
        take(optimizer, params, before)
    assert "ns_steps must be a whole number >= 1, not 0" in str(caught.value)
    assert same(before, values(params))


# -- SOAP's first step and its bases -----------------------------------------------------------------------------------


def test_soaps_first_step_moves_no_matrix_and_does_not_decay_it(seed: int) -> None:
    weight, gain = nn.Parameter(normal((6, 9), seed)), nn.Parameter(torch.ones(9))
    params = {"w": weight, "gain": gain}
    before = values(params)
    optimizer = ds_optim.SOAP(params.items(), lr=0.1, weight_decay=0.5, roles={"w": "linear", "gain": "norm"})
    take(optimizer, params, {"w": normal((6, 9), seed + 1), "gain": torch.ones(9)})
    assert torch.equal(weight, before["w"])
    assert not torch.equal(gain, before["gain"])  # Adam's
    take(optimizer, params, {"w": normal((6, 9), seed + 2), "gain": torch.ones(9)})
    assert not torch.equal(weight, before["w"])


@pytest.mark.parametrize("late", [3, 12])
def test_a_block_without_a_gradient_at_first_gets_its_basis_later(late: int, seed: int) -> None:
    """Nothing of it moves before, and the step that gives its basis moves nothing of it either."""
    weight = nn.Parameter(normal((8, 4), seed))
    before = weight.detach().clone()
    optimizer = ds_optim.SOAP(
        [("w", weight)], lr=0.01, weight_decay=0.0, roles=LINEAR, max_preconditioner_dim=4, precondition_frequency=2
    )
    for step in range(1, late + 2):
        gradient = normal((8, 4), seed + step)
        gradient[4:] = 0 if step < late else gradient[4:]
        take(optimizer, {"w": weight}, {"w": gradient})
        assert torch.equal(weight[4:], before[4:]) == (step <= late)
        assert torch.equal(weight[:4], before[:4]) == (step == 1)
    assert weight.isfinite().all()


def test_a_gradient_that_is_not_finite_leaves_a_blocks_bases_as_they_are(seed: int) -> None:
    shape, settings = (8, 4), {"max_preconditioner_dim": 4, "precondition_frequency": 1, "weight_decay": 0.0}
    ends = []
    for is_spoiled in (False, True):
        weight = nn.Parameter(normal(shape, seed))
        optimizer = ds_optim.SOAP([("w", weight)], roles=LINEAR, **settings)
        for step in range(3):
            take(optimizer, {"w": weight}, {"w": normal(shape, seed + step)})
        kept = {key: one.clone() for key, one in optimizer.state[weight].items() if isinstance(one, Tensor)}
        gradient = normal(shape, seed + 9)
        if is_spoiled:
            gradient[5, 2] = math.nan
        take(optimizer, {"w": weight}, {"w": gradient})
        state = optimizer.state[weight]
        half = {key: len(state[key]) // 2 for key in kept if key != "step"}
        unchanged = {key: torch.equal(state[key][at:], kept[key][at:]) for key, at in half.items()}
        assert all(unchanged.values()) == is_spoiled, unchanged
        ends.append(weight.detach().clone())
    assert torch.equal(ends[0][:4], ends[1][:4])


@pytest.mark.parametrize("unused", [[0], [2], [0, 2]])
def test_only_blocks_that_have_no_basis_and_a_gradient_are_decomposed(
    unused: list[int], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of an expert that nothing is routed to cost nothing, nor do their neighbours."""
    decomposed: list[int] = []

    def noting(rows: Tensor) -> Tensor:
        decomposed.append(int(optimizer.state[weight]["step"]))
        return first_basis(rows)

    first_basis = eigenbases.first_basis
    monkeypatch.setattr(eigenbases, "first_basis", noting)
    weight = nn.Parameter(normal((3, 4, 4), seed))
    role = {"w": {"kind": "mlp", "batch_dims": 1, "output_dim": 1}}
    optimizer = ds_optim.SOAP([("w", weight)], roles=role, precondition_frequency=100)
    for step in range(1, 6):
        gradient = normal((3, 4, 4), seed + step)
        gradient[unused] = 0 if step < 4 else gradient[unused]
        take(optimizer, {"w": weight}, {"w": gradient})
    assert Counter(decomposed) == {1: 2 * (3 - len(unused)), 4: 2 * len(unused)}


@pytest.mark.parametrize(("decomposition", "at", "call"), [("eigh", 1, 3), ("qr", 3, 2)])
def test_a_decomposition_that_fails_withholds_one_blocks_update_and_leaves_it_as_it_was(
    decomposition: str, at: int, call: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of block 1 along its first axis: of first bases in the first step, of the next ones in the third."""
    weight = nn.Parameter(normal((8, 4), seed))
    settings: dict[str, Any] = {"max_preconditioner_dim": 4, "precondition_frequency": 2, "weight_decay": 0.0}
    optimizer = ds_optim.SOAP([("w", weight)], roles=LINEAR, refresh="together", **settings)
    for step in range(1, at):
        take(optimizer, {"w": weight}, {"w": normal((8, 4), seed + step)})
    before = weight.detach().clone()
    kept = {} if at == 1 else {f"basis_{axis}": optimizer.state[weight][f"basis_{axis}"].clone() for axis in (0, 1)}
    with monkeypatch.context() as patch:
        original = getattr(torch.linalg, decomposition)
        patch.setattr(torch.linalg, decomposition, failing(original, call))
        take(optimizer, {"w": weight}, {"w": normal((8, 4), seed + at)})
    state = optimizer.state[weight]
    assert torch.equal(weight[4:], before[4:])
    assert all(torch.equal(state[key][16:], one[16:]) for key, one in kept.items())
    assert not any(torch.equal(state[key][:16], one[:16]) for key, one in kept.items())
    assert (state["based"] > 0).tolist() == [True, at > 1]
    with pytest.raises(RuntimeError, match=r"w, block 1 \[4:8, 0:4\]: no eigenvectors of its gradients") as caught:
        take(optimizer, {"w": weight}, {"w": normal((8, 4), seed)})
    assert "block 0" not in str(caught.value)
    for step in range(4):
        take(optimizer, {"w": weight}, {"w": normal((8, 4), seed + step)})
    assert (state["based"] > 0).all()
    assert weight.isfinite().all()
    assert not torch.equal(weight[4:], before[4:])


@pytest.mark.parametrize("scale", [1e20, 3e38])
def test_gradients_too_large_for_their_products_are_an_error_and_reach_no_weight(scale: float, seed: int) -> None:
    weight = nn.Parameter(normal((8, 6), seed))
    optimizer = ds_optim.SOAP([("w", weight)], roles=LINEAR, precondition_frequency=2)
    gradient = {"w": normal((8, 6), seed).clamp(-1, 1) * scale}
    _, message = steps_until_an_error(optimizer, {"w": weight}, gradient)
    assert ("too large to be rotated" if scale > 1e30 else "no eigenvectors") in message
    assert weight.isfinite().all()


def test_soap_from_adamw_is_adamw_until_its_first_refresh(seed: int) -> None:
    """In the basis in which Adam was: its moments go on element by element."""
    from ds_optim.rule import AdamMoments

    betas, step = (0.9, 0.95), 500
    first, second = normal((6, 6), seed), normal((6, 6), seed + 1).square()
    start = ds_optim.SOAP.rule.from_adam.state(
        AdamMoments(first, second, betas, step), {"betas": betas, "state_dtype": torch.float32}
    )
    weight, twin = nn.Parameter(normal((6, 6), seed)), nn.Parameter(normal((6, 6), seed))
    one = ds_optim.SOAP([("w", weight)], lr=0.01, betas=betas, weight_decay=0.0, roles=LINEAR, refresh="together")
    two = ds_optim.AdamW([("w", twin)], lr=0.01, betas=betas, weight_decay=0.0)
    for optimizer, parameter, state in (
        (one, weight, start),
        (two, twin, {"exp_avg": first.clone(), "exp_avg_sq": second.clone()}),
    ):
        take(optimizer, {"w": parameter}, {"w": torch.zeros(6, 6)})
        parameter.data.copy_(normal((6, 6), seed))
        for key, value in state.items():
            optimizer.state[parameter][key].copy_(value.reshape(optimizer.state[parameter][key].shape))
        optimizer.state[parameter]["step"].fill_(step)
        take(optimizer, {"w": parameter}, {"w": normal((6, 6), seed + 3)})
    torch.testing.assert_close(weight, twin, rtol=1e-5, atol=1e-6)


# -- state -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", CLASSES)
def test_the_state_is_what_the_page_says(cls: Any, seed: int) -> None:
    params = parameters({"w": (16, 16), "gain": (5,)}, seed)
    optimizer = cls(params.items(), roles={"w": "linear", "gain": "norm"})
    take(optimizer, params, {name: torch.ones_like(one) for name, one in params.items()})
    state = optimizer.state[params["w"]]
    others = ("step", "blocks", "exp_avg", "exp_avg_sq")
    elements = {key: one.numel() for key, one in state.items() if key not in others}
    assert state["exp_avg"].numel() == 0
    wanted = {
        ds_optim.Muon: {"momentum": 256},
        ds_optim.NorMuon: {"momentum": 256, "neuron_square": 16},
        ds_optim.SOAP: {"momentum": 256, "second_moment": 256, "based": 1}
        | {f"{kind}_{axis}": size for kind, size in (("factor", 136), ("basis", 256)) for axis in (0, 1)},
    }[cls]
    assert elements == wanted
    assert {key for key, one in optimizer.state[params["gain"]].items() if one.numel() == 5} == {
        "exp_avg",
        "exp_avg_sq",
    }


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("at", [1, 5])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(cls: Any, at: int, seed: int) -> None:
    settings = {"max_preconditioner_dim": 4, "precondition_frequency": 3} if cls is ds_optim.SOAP else {}
    shapes = {"w": (8, 6), "v": (5, 12)}
    params, grads = parameters(shapes, seed), gradients(shapes, 10, seed)
    optimizer = cls(params.items(), lr=0.01, roles=LINEAR, **settings)
    for given in grads[:at]:
        take(optimizer, params, given)
    twins = {name: nn.Parameter(one.detach().clone()) for name, one in params.items()}
    twin = cls(twins.items(), lr=0.01, roles=LINEAR, **settings)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for given in grads[at:]:
        take(optimizer, params, given)
        take(twin, twins, given)
    assert same(values(params), values(twins))


@pytest.mark.parametrize("cls", CLASSES)
def test_what_is_no_matrix_is_adamw(cls: Any, seed: int) -> None:
    names = {"embedding": (12, 5), "head": (12, 5), "norm": (7,), "bias": (3,)}
    params, twins = parameters(names, seed), parameters(names, seed)
    settings = {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.1}
    optimizer = cls(params.items(), roles={name: name for name in names}, **settings)
    twin = ds_optim.AdamW(twins.items(), **settings)
    for given in gradients(names, 5, seed):
        take(optimizer, params, given)
        take(twin, twins, given)
    assert same(values(params), values(twins))


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_fewer_bits_lose_what_they_lose(precision: str, seed: int) -> None:
    ends = {}
    for name in ("ieee", precision):
        weight = nn.Parameter(torch.zeros(24, 40))
        optimizer = ds_optim.Muon([("w", weight)], lr=1.0, weight_decay=0.0, roles=LINEAR, matmul_precision=name)
        take(optimizer, {"w": weight}, {"w": normal((24, 40), seed)})
        ends[name] = weight.detach().double()
    away = float((ends[precision] - ends["ieee"]).norm() / ends["ieee"].norm())
    low, high = {"tf32": (1e-5, 3e-3), "bf16": (1e-3, 3e-2)}[precision]
    assert low < away < high


def test_in_bf16_it_is_as_near_to_torchs_as_two_such_runs_are_to_each_other(seed: int) -> None:
    """torch casts to bf16 and multiplies there; ours rounds operands and iterates. Both are as far from fp32.

    torch's own runs differ by gradients that the cast to bf16 cannot tell apart: moved by up to half of its last place.
    """
    torch_muon = getattr(torch.optim, "Muon", None)
    if torch_muon is None or not torch_muon.__module__.startswith("torch"):
        pytest.skip("torch has a Muon since 2.9")
    shape = (24, 40)
    start, grads = normal(shape, seed), [given["w"] for given in gradients({"w": shape}, 10, seed)]
    random = torch.Generator().manual_seed(seed)
    nudged = [one * (1 + 2**-9 * (2 * torch.rand(shape, generator=random) - 1)) for one in grads]
    ends = []
    for precision, given in (("bf16", grads), ("ieee", grads), ("torch", grads), ("torch", nudged)):
        weight = nn.Parameter(start.clone())
        settings = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.95}
        if precision == "torch":
            optimizer = torch_muon([weight], adjust_lr_fn="match_rms_adamw", **settings)
        else:
            optimizer = ds_optim.Muon([("w", weight)], roles=LINEAR, matmul_precision=precision, **settings)
        for one in given:
            take(optimizer, {"w": weight}, {"w": one})
        ends.append(weight.detach().double())
    ours, exact, theirs, another = ends
    way = (exact - start.double()).norm()
    assert (ours - theirs).norm() <= 1.5 * (another - theirs).norm()
    assert (ours - exact).norm() / way < 2e-2
    assert 0.2 < float((ours - exact).norm() / (theirs - exact).norm()) < 5


def test_the_oracle_orthogonalizes(seed: int) -> None:
    found = orthogonal(normal((6, 9), seed).double(), [(3.4445, -4.7750, 2.0315)] * 5)
    assert 0.5 < float(torch.linalg.svdvals(found).min()) <= float(torch.linalg.svdvals(found).max()) < 1.25
