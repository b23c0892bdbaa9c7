"""Tensor parallelism, alone and under FSDP2 and HSDP: the same bits as one process, whatever cuts the parameters.

Parameters are cut by hand as torch's styles cut them, and gradients are the constants of `expected`: what is left to
differ is the optimizer.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

import ds_optim
import test_meshes
from ds_optim import checkpoint
from ds_optim.optimizers.registry import optimizers
from ds_optim.roles import canonical_name
from ds_optim.roles.role import Part, Role
from ds_optim.sharding.binding import local_of
from engines import Case, build_model, constant_gradient, learning_rate
from expected import by_one_process, gradient
from meshes import groups, shard_of
from parallel import mixtral
from pool import Pools
from resumption import stored
from test_eight_bit_state import in_codes, with_small_ones
from test_invariance import OFTEN

CASES = {
    **test_meshes.CASES,
    "bf16 on the wire": Case("Muon", {"exchange_dtype": "bf16"}),
}
ALONE, FSDP, HSDP = (0,), (2, 2), (2, 1, 2)
RUNS = [
    *((2, name, ALONE) for name in ("AdamW", "AdamMini", "Shampoo", "SWAN", "Muon", "many blocks")),
    *((3, name, ALONE) for name in ("Lion", "AdamMini", "SOAP", "NorMuon", "SWAN small buckets")),
    *((4, name, FSDP) for name in ("Adan", "AdamMini", "Shampoo", "SWAN", "SOAP", "many blocks", "SWAN small buckets")),
    *((4, name, HSDP) for name in ("AdamMini", "many blocks", "bf16 on the wire")),
]


def cut_dimension(name: str, parameter: Tensor) -> int | None:
    """Along which dimension a parameter is cut: rows, columns of what comes back to the residual stream, or none."""
    if parameter.dim() < 2:
        return None
    return 1 if "o_proj" in name or "down_proj" in name else 0


def cut_by_hand(module: nn.Module, mesh: DeviceMesh, rows: bool, prefix: str = "") -> None:
    """Make DTensors of the parameters, as `parallelize_module` does; with ``rows`` all matrices are cut along these."""
    for name, child in module.named_children():
        cut_by_hand(child, mesh, rows, f"{prefix}{name}.")
    for name, parameter in list(module.named_parameters(recurse=False)):
        dim = cut_dimension(prefix + name, parameter)
        placement = Replicate() if dim is None else Shard(0 if rows else dim)
        made = distribute_tensor(parameter.detach(), mesh, [placement], src_data_rank=None)
        module.register_parameter(name, nn.Parameter(made))


def like(whole: Tensor, parameter: Tensor) -> Tensor:
    """A tensor laid out as a parameter is."""
    assert isinstance(parameter, DTensor)
    return DTensor.from_local(
        shard_of(whole, parameter).contiguous(),
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def made(case: Case, shape: tuple[int, ...], *, rows: bool = False, bf16: bool = False) -> tuple[nn.Module, Any]:
    """The model over a mesh of this shape (none: whole, on each rank), and the optimizer."""
    model = build_model(case)
    model = model.bfloat16() if bf16 else model
    if shape:
        axes = ("replicate", "shard", "tensor")[-len(shape) :]
        mesh = init_device_mesh("cpu", shape if len(shape) > 1 else (dist.get_world_size(),), mesh_dim_names=axes)
        cut_by_hand(model, mesh["tensor"], rows)
        if len(shape) > 1:
            for layer in model.llama.model.layers:
                fully_shard(layer, mesh=mesh[axes[:-1]])
            fully_shard(model, mesh=mesh[axes[:-1]])
    options = {key: value for key, value in case.options.items() if key != "weight_decay"}
    cls = getattr(ds_optim, case.optimizer.split(".")[-1])
    return model, cls(groups(model, case), roles=model, **options)


def train(case: Case, model: nn.Module, optimizer: Any, steps: range) -> None:
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        for name, parameter in model.named_parameters():
            constant = gradient(case, canonical_name(name), tuple(parameter.shape), step)
            grad = like(constant, parameter) if isinstance(parameter, DTensor) else constant
            parameter.grad = grad.to(parameter.dtype)
        optimizer.step()


def gaps(model: nn.Module, wanted: dict[str, Tensor]) -> dict[str, float]:
    """How far what this rank holds of each parameter is from what was wanted, at most, relatively."""
    found = {}
    for name, parameter in model.named_parameters():
        whole = wanted[canonical_name(name)].view(parameter.shape)
        here = shard_of(whole, parameter) if isinstance(parameter, DTensor) else whole
        gap = (local_of(parameter.detach()) - here).abs() / here.abs().clamp_min(0.1)
        found[canonical_name(name)] = float(gap.amax()) if gap.numel() else 0.0
    return found


def differences(
    case: Case, shape: tuple[int, ...], wanted: dict[str, Tensor], rows: bool = False, bf16: bool = False
) -> dict[str, float]:
    """What a run over a mesh ends with, against what was wanted."""
    model, optimizer = made(case, shape, rows=rows, bf16=bf16)
    train(case, model, optimizer, range(1, case.steps + 1))
    return gaps(model, wanted)


def ended(case: Case) -> dict[str, Tensor]:
    """What one process ends with, in bf16."""
    model, optimizer = made(case, (), bf16=True)
    train(case, model, optimizer, range(1, case.steps + 1))
    return {canonical_name(name): parameter.detach() for name, parameter in model.named_parameters()}


@cache
def wanted_of(name: str) -> dict[str, Tensor]:
    return by_one_process(CASES[name])


@pytest.mark.parametrize(("ranks", "name", "shape"), RUNS)
def test_every_rule_ends_with_the_bits_of_one_process(
    pool: Pools, ranks: int, name: str, shape: tuple[int, ...]
) -> None:
    reports = pool(ranks).run(differences, CASES[name], shape, wanted_of(name))
    limit = 1e-6 if CASES[name].optimizer == "AdamMini" else 0.0  # the sums of cut blocks in another order
    for rank, gaps in enumerate(reports):
        assert len(gaps) == len(wanted_of(name))
        assert {key: gap for key, gap in gaps.items() if not gap <= limit} == {}, rank


@pytest.mark.parametrize(("ranks", "shape"), [(3, ALONE), (4, FSDP)])
@pytest.mark.parametrize("name", ["ds_optim.AdamW", "AdamMini", "Shampoo"])
def test_state_in_eight_bits_of_cut_rows(pool: Pools, name: str, ranks: int, shape: tuple[int, ...]) -> None:
    case = in_codes(name)
    wanted = with_small_ones(by_one_process, case)
    for found in pool(ranks).run(with_small_ones, differences, case, shape, wanted, True):
        assert {key: gap for key, gap in found.items() if not gap <= (1e-6 if name == "AdamMini" else 0)} == {}


@pytest.mark.parametrize(("ranks", "shape"), [(3, ALONE), (4, FSDP)])
def test_state_in_eight_bits_of_matrices_that_are_cut_by_columns(
    pool: Pools, ranks: int, shape: tuple[int, ...]
) -> None:
    """It lies at their owners, whole."""
    case = in_codes("Shampoo")
    wanted = with_small_ones(by_one_process, case)
    for found in pool(ranks).run(with_small_ones, differences, case, shape, wanted):
        assert {key: gap for key, gap in found.items() if not gap <= 0} == {}


@pytest.mark.parametrize(("ranks", "shape"), [(3, ALONE), (4, FSDP)])
@pytest.mark.parametrize("name", ["ds_optim.Lion", "AdamMini", "Muon"])
def test_stochastic_rounding_of_cut_rows(pool: Pools, name: str, ranks: int, shape: tuple[int, ...]) -> None:
    case = Case(name, {**OFTEN[name if name in OFTEN else f"ds_optim.{name}"], "bf16_stochastic_round": True})
    (wanted,) = pool(1).run(ended, case)
    for found in pool(ranks).run(differences, case, shape, wanted, True, True):
        assert {key: gap for key, gap in found.items() if not gap <= 0} == {}


def handed_over(case: Case, shape: tuple[int, ...], wanted: dict[str, Tensor]) -> dict[str, float]:
    """A run that goes on in another optimizer, which is given the state by torch's own functions."""
    model, optimizer = made(case, shape)
    train(case, model, optimizer, range(1, HALF + 1))
    states = get_optimizer_state_dict(model, optimizer)
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model, optimizer = made(replace(case, seed=case.seed + 1), shape)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            local_of(parameter).copy_(local_of(weights[name]))
    set_optimizer_state_dict(model, optimizer, states)
    train(case, model, optimizer, range(HALF + 1, case.steps + 1))
    return gaps(model, wanted)


@pytest.mark.parametrize(("ranks", "shape"), [(2, ALONE), (4, FSDP)])
@pytest.mark.parametrize("name", ["AdamMini", "many blocks"])
def test_torchs_own_state_dict(pool: Pools, name: str, ranks: int, shape: tuple[int, ...]) -> None:
    for found in pool(ranks).run(handed_over, CASES[name], shape, wanted_of(name)):
        assert {key: gap for key, gap in found.items() if not gap <= (1e-6 if name == "AdamMini" else 0)} == {}


HALF = 3


def save(case: Case, shape: tuple[int, ...], directory: Path) -> None:
    """The first steps of a run, and a canonical checkpoint."""
    model, optimizer = made(case, shape)
    train(case, model, optimizer, range(1, HALF + 1))
    checkpoint.save(directory, model, optimizer, tag="half")


def resumed(
    case: Case, shape: tuple[int, ...], directory: Path, again: Path, wanted: dict[str, Tensor]
) -> dict[str, float]:
    """What the rest of that run ends with elsewhere, once it was loaded, and saved as it was loaded."""
    model, optimizer = made(replace(case, seed=case.seed + 1), shape)
    checkpoint.load(directory, model, optimizer)
    checkpoint.save(again, model, optimizer, tag="half")
    train(case, model, optimizer, range(HALF + 1, case.steps + 1))
    return gaps(model, wanted)


@pytest.mark.parametrize("name", ["AdamW", "AdamMini", "many blocks", "SOAP", "NorMuon"])
@pytest.mark.parametrize(
    ("before", "after"),
    [((2, ALONE), (1, ())), ((1, ()), (4, FSDP)), ((4, FSDP), (3, ALONE))],
    ids=["parallel to one", "one to both", "both to parallel"],
)
def test_a_checkpoint_goes_on_over_another_mesh(
    pool: Pools, tmp_path: Path, name: str, before: tuple[int, tuple[int, ...]], after: tuple[int, tuple[int, ...]]
) -> None:
    case = CASES[name]
    (ranks, shape), (others, other_shape) = before, after
    pool(ranks).run(save, case, shape, tmp_path / "first")
    reports = pool(others).run(resumed, case, other_shape, tmp_path / "first", tmp_path / "second", wanted_of(name))
    limit = 1e-6 if case.optimizer == "AdamMini" else 0.0
    for found in reports:
        assert {key: gap for key, gap in found.items() if not gap <= limit} == {}
    first, second = (stored(tmp_path / one / "half") for one in ("first", "second"))
    assert first.keys() == second.keys()
    assert [key for key, values in first.items() if not torch.equal(values, second[key])] == []


STRIPES: dict[str, tuple[tuple[int, ...], int, Any]] = {
    "rows": ((8, 6), 0, {"*": "linear"}),
    "rows of two parts": ((8, 6), 0, {"gate_up": Role("fused", parts=(Part("mlp", 4), Part("mlp", 4)))}),
    "experts": ((3, 8, 6), 1, {"*": {"kind": "mlp", "batch_dims": 1, "output_dim": 1}}),
}


def in_stripes(directory: Path, kind: str) -> dict[str, Any]:
    """A weight of which each rank has two stripes, as transformers' packed styles cut it: how far each optimizer is
    from one process, and whether a checkpoint goes on there."""
    world, rank = dist.get_world_size(), dist.get_rank()
    mesh, (shape, dim, roles) = init_device_mesh("cpu", (world,)), STRIPES[kind]

    def striped(whole: Tensor) -> Tensor:
        return torch.cat([half.chunk(world, dim)[rank] for half in whole.chunk(2, dim)], dim).contiguous()

    def placed(whole: Tensor) -> DTensor:
        placements = [_StridedShard(dim, split_factor=2)]
        return DTensor.from_local(striped(whole), mesh, placements, run_check=False, shape=shape, stride=whole.stride())

    found = {}
    for cls in optimizers().values():
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        model, alone = nn.Module(), nn.Module()
        model.gate_up, alone.gate_up = nn.Parameter(placed(weight)), nn.Parameter(weight.clone())
        made = [cls([("gate_up", one.gate_up)], lr=1e-2, roles=roles) for one in (model, alone)]
        for step in range(6):
            grad = torch.randn(shape, generator=torch.Generator().manual_seed(1 + step))
            model.gate_up.grad, alone.gate_up.grad = placed(grad), grad
            for optimizer in made:
                optimizer.step()
        found[cls.__name__] = float((local_of(model.gate_up.detach()) - striped(alone.gate_up.detach())).abs().max())
        checkpoint.save(directory / cls.__name__, model, made[0], tag="half")
    return found


@pytest.mark.parametrize("kind", list(STRIPES))
def test_stripes_end_with_the_bits_of_one_process(pool: Pools, tmp_path: Path, kind: str) -> None:
    for gaps in pool(2).run(in_stripes, tmp_path, kind):
        for name, gap in gaps.items():
            assert gap <= (1e-6 if name == "AdamMini" else 0), name
    shape, _, roles = STRIPES[kind]
    for cls in optimizers().values():
        alone = nn.Module()
        alone.gate_up = nn.Parameter(torch.zeros(shape))
        optimizer = cls([("gate_up", alone.gate_up)], lr=1e-2, roles=roles)
        checkpoint.load(tmp_path / cls.__name__, alone, optimizer)
        assert alone.gate_up.abs().sum() > 0


def packed_columns(directory: Path) -> dict[str, str]:
    """Stripes of columns, of which there would be a part for every row: what is said to each."""
    world, rank = dist.get_world_size(), dist.get_rank()
    mesh = init_device_mesh("cpu", (world,))
    rows = 4000
    whole = torch.randn(rows, 8, generator=torch.Generator().manual_seed(0))
    stripes = torch.cat([half.chunk(world, 1)[rank] for half in whole.chunk(2, 1)], 1)
    said = {}
    for cls in optimizers().values():
        placed = DTensor.from_local(
            stripes.clone(), mesh, [_StridedShard(1, split_factor=2)], run_check=False, shape=(rows, 8), stride=(8, 1)
        )
        model = nn.Module()
        model.gate_up = nn.Parameter(placed)
        try:
            optimizer = cls([("gate_up", model.gate_up)], lr=1e-2, roles={"*": "linear"})
        except ValueError as error:
            said[cls.__name__] = str(error)
            continue
        alone = nn.Parameter(stripes.clone())
        other = cls([("gate_up", alone)], lr=1e-2, roles={"*": "linear"})
        for _ in range(3):
            model.gate_up.grad, alone.grad = model.gate_up.detach().clone(), alone.detach().clone()
            optimizer.step()
            other.step()
        said[cls.__name__] = "the same" if torch.equal(local_of(model.gate_up), alone) else "something else"
        try:
            checkpoint.save(directory, model, optimizer)
        except checkpoint.CheckpointError as error:
            said[f"{cls.__name__} saved"] = str(error)
    return said


def test_stripes_of_columns_are_stepped_by_element_or_refused_by_name(pool: Pools, tmp_path: Path) -> None:
    for said in pool(2).run(packed_columns, tmp_path):
        for name, cls in optimizers().items():
            if cls.rule.is_elementwise:
                assert said[name] == "the same"
                assert "gate_up" in said[f"{name} saved"]
            else:
                assert "gate_up lies as" in said[name]
                assert "use AdamW, Lion or Adan" in said[name]


def descending(cls: Any) -> float:
    """Parameters over a mesh whose ranks do not ascend: the largest difference from one device."""
    world = dist.get_world_size()
    mesh = DeviceMesh("cpu", list(range(world))[::-1])
    gap = 0.0
    for dim in (0, 1):
        whole = torch.randn(9, 7, generator=torch.Generator().manual_seed(dim))
        placed = nn.Parameter(distribute_tensor(whole, mesh, [Shard(dim)], src_data_rank=None))
        alone = nn.Parameter(whole.clone())
        made = [cls([("w", one)], lr=1e-2, roles={"*": "linear"}) for one in (placed, alone)]
        for step in range(12):
            grad = torch.randn(9, 7, generator=torch.Generator().manual_seed(100 + step))
            placed.grad, alone.grad = like(grad, placed), grad
            for optimizer in made:
                optimizer.step()
        gap = max(gap, float((local_of(placed) - shard_of(alone, placed)).abs().max()))
    return gap


@pytest.mark.parametrize("cls", [ds_optim.AdamMini, ds_optim.Shampoo, ds_optim.Muon], ids=lambda cls: cls.__name__)
def test_the_ranks_of_a_mesh_need_not_ascend(pool: Pools, cls: Any) -> None:
    for gap in pool(2).run(descending, cls):
        assert gap <= (1e-6 if cls is ds_optim.AdamMini else 0)


EXPERT_MESHES = {  # ranks, and the mesh of the experts: what replicates, what FSDP2 shards, over which experts lie
    "FSDP2, experts over both ranks": (2, (1, 1, 2)),
    "FSDP2 for both": (4, (1, 2, 2)),
    "FSDP2, experts over all ranks": (4, (1, 1, 4)),
    "HSDP for both": (4, (2, 1, 2)),
    "FSDP2 over tensor parallelism, experts over all ranks": (4, (1, 1, 4)),
}


def cut_experts(model: nn.Module, shape: tuple[int, int, int]) -> None:
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard", "expert"))
    for layer in model.model.layers:
        experts = layer.mlp.experts
        for key, parameter in list(experts.named_parameters()):
            placed = distribute_tensor(parameter.detach(), mesh["expert"], [Shard(0)], src_data_rank=None)
            experts.register_parameter(key, nn.Parameter(placed))
        if shape[0] > 1:
            fully_shard(experts, mesh=mesh["replicate", "shard"])
        elif shape[1] > 1:
            fully_shard(experts, mesh=mesh["shard"])


def cut_the_rest(model: nn.Module, kind: str) -> None:
    world, apart = dist.get_world_size(), of_experts(model)
    if kind.startswith("HSDP"):
        mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
    elif "tensor" in kind:
        whole = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("shard", "tensor"))
        for layer in model.model.layers:
            for child in ("self_attn", "input_layernorm", "post_attention_layernorm"):
                cut_by_hand(getattr(layer, child), whole["tensor"], False)
            cut_by_hand(layer.mlp.gate, whole["tensor"], False)
        for child in (model.model.embed_tokens, model.model.norm, model.lm_head):
            cut_by_hand(child, whole["tensor"], False)
        mesh = whole["shard"]
    else:
        mesh = init_device_mesh("cpu", (world,))
    has_own = any(isinstance(layer.mlp.experts, FSDPModule) for layer in model.model.layers)
    fully_shard(model, mesh=mesh, ignored_params=set() if has_own else apart)


def over_expert_meshes(name: str, kind: str) -> float:
    """A Mixtral whose experts lie on another mesh than the rest, in one optimizer: the largest difference from one
    device."""
    torch.manual_seed(0)
    alone = mixtral()
    model = copy.deepcopy(alone)
    cut_experts(model, EXPERT_MESHES[kind][1])
    cut_the_rest(model, kind)
    cls, options = getattr(ds_optim, name.split(".")[-1]), OFTEN[name]
    made = []
    for one in (alone, model):
        named = list(one.named_parameters())
        groups = [[(key, p) for key, p in named if (".experts." in key) == experts] for experts in (False, True)]
        made.append(cls([{"params": pairs} for pairs in groups], roles=one, **options))
    for step in range(1, Case.steps + 1):
        for (key, whole), (_, parameter) in zip(alone.named_parameters(), model.named_parameters(), strict=True):
            whole.grad = constant_gradient(key, tuple(whole.shape), step, 0)
            parameter.grad = like(whole.grad, parameter)
        for optimizer in made:
            optimizer.step()
    pairs = zip(alone.parameters(), model.parameters(), strict=True)
    gaps = [local_of(one.detach()) - shard_of(whole.detach(), one) for whole, one in pairs]
    return max(float(gap.abs().amax()) for gap in gaps if gap.numel())


def of_experts(model: nn.Module) -> set[nn.Parameter]:
    return {parameter for name, parameter in model.named_parameters() if ".experts." in name}


@pytest.mark.parametrize("kind", list(EXPERT_MESHES))
@pytest.mark.parametrize("name", ["ds_optim.AdamW", "AdamMini", "Shampoo", "ds_optim.Muon"])
def test_experts_on_another_mesh_than_the_rest(pool: Pools, name: str, kind: str) -> None:
    for gap in pool(EXPERT_MESHES[kind][0]).run(over_expert_meshes, name, kind):
        assert gap <= (1e-6 if name == "AdamMini" else 0)
