"""FSDP2, HSDP, DDP and one device: the same bits everywhere, and what cannot be exact is refused."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

import ds_optim
from ds_optim.optimizers.registry import optimizers
from ds_optim.sharding.binding import local_of
from engines import VOCABULARY, Case, build_engine, build_model
from engines import weights as engine_weights
from expected import add_rounding, by_one_process, by_oracle, distance
from meshes import MeshCase, make, run, shard_of, train, weights
from pool import Pools
from test_invariance import OPTIONS, STEPS, TOLERANCE

MATRIX = {"max_preconditioner_dim": 8, "precondition_frequency": 3, "weight_decay": 0.1}
CASES = {
    **{name.split(".")[-1]: Case(name, options, steps=STEPS[name]) for name, options in OPTIONS.items()},
    "Lion16": Case("ds_optim.Lion", {"state_dtype": "bf16"}),
    "many blocks": Case("Shampoo", MATRIX, steps=8),
    "SWAN small buckets": Case("SWAN", {"exchange_bucket_size": 600}),
    "frozen": Case("AdamMini", {"weight_decay": 0.1}, frozen=("embed", "layers.1.mlp.up"), layers=2),
    "tied": Case("Shampoo", MATRIX, tied=True, steps=8),
}
RUNS = [
    (1, "AdamMini", "fsdp", ""),
    (1, "Shampoo", "ddp", ""),
    (2, "AdamW", "ddp", ""),
    (2, "Lion", "fsdp", "mixed"),
    (2, "Adan", "hsdp", ""),
    (2, "SWAN", "fsdp", "late"),
    (2, "many blocks", "hsdp", ""),
    (2, "frozen", "fsdp", "offload"),
    (2, "SWAN small buckets", "ddp", ""),
    (3, "AdamW", "fsdp", "offload"),
    (3, "AdamMini", "fsdp", "late"),
    (3, "AdamMini", "ddp", ""),
    (3, "Shampoo", "fsdp", ""),
    (3, "Lion16", "fsdp", ""),
    (3, "tied", "fsdp", ""),
    (4, "Adan", "fsdp", ""),
    (4, "Lion", "hsdp", "late"),
    (4, "AdamMini", "hsdp", "mixed"),
    (4, "many blocks", "hsdp", "late"),
    (4, "SWAN small buckets", "hsdp", ""),
    (4, "SWAN", "fsdp", ""),
    (4, "tied", "ddp", ""),
    (2, "Muon", "fsdp", "mixed"),
    (3, "NorMuon", "fsdp", ""),
    (4, "NorMuon", "hsdp", "late"),
    (2, "SOAP", "ddp", ""),
    (3, "SOAP", "fsdp", "late"),
]


@cache
def wanted(name: str) -> dict[str, Tensor]:
    """What one process computes without any strategy; it must be the textbook's, where that is computed in fp64."""
    case = CASES[name]
    alone = by_one_process(case)
    if case.optimizer in OPTIONS and case.options == OPTIONS[case.optimizer]:
        assert distance(alone, by_oracle(case)) <= TOLERANCE.get(case.optimizer, 1e-6)
    return alone


@pytest.mark.parametrize(("ranks", "name", "strategy", "flag"), RUNS)
def test_every_strategy_ends_with_the_same_bits(pool: Pools, ranks: int, name: str, strategy: str, flag: str) -> None:
    mesh_case = MeshCase(CASES[name], strategy, **({flag: True} if flag else {}))
    reports = pool(ranks).run(run, mesh_case)
    alone = wanted(name)
    for report in reports:
        assert report["weights"].keys() == alone.keys()
        for key, values in report["weights"].items():
            if mesh_case.case.optimizer == "AdamMini":  # the sums of cut blocks are added up in another order
                assert torch.allclose(values, alone[key], rtol=1e-6, atol=1e-7), key
            else:
                assert torch.equal(values, alone[key]), key
    if name == "Adan":  # state lies where the rows lie, fp32
        for report in reports:
            assert all(kept == 4 * report["held"] for key, kept in report["state_bytes"].items() if key != "step")
    if strategy in ("hsdp", "ddp") and name == "many blocks":
        owned = [report["state_bytes"]["momentum"] for report in reports]
        matrices = sum(v.numel() for k, v in alone.items() if k.endswith("weight") and "norm" not in k) * 4
        assert sum(owned) < matrices  # once in all, not once per replica


def on_real_data(case: Case, strategy: str) -> dict[str, Tensor]:
    """Weights after a few steps under ZeRO-2 or FSDP2, with the gradients of batches that differ by rank."""
    model = build_model(case)
    generator = torch.Generator().manual_seed(dist.get_rank())
    batches = [torch.randint(VOCABULARY, (2, 12), generator=generator) for _ in range(case.steps)]
    if strategy == "zero":
        engine, model = build_engine(case)
        for tokens in batches:
            engine.backward(engine(tokens))
            engine.step()
        found = {name: values.reshape(-1) for name, values in engine_weights(model).items()}
        engine.destroy()
        return found
    wrapped, model, optimizer = make(MeshCase(case, "fsdp"))
    for tokens in batches:
        wrapped(tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
    return weights(model)


@pytest.mark.parametrize(
    "case",
    [
        Case("AdamMini", {"lr": 1e-2, "weight_decay": 0.1}, steps=6),
        Case("SWAN", {"lr": 1e-2, "weight_decay": 0.1}, steps=4),
        # An eps that is not small: AdamW's step depends on the scale of gradients.
        Case("ds_optim.AdamW", {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-4}, steps=6),
    ],
    ids=lambda case: case.optimizer,
)
def test_a_zero_2_run_and_an_fsdp2_run_agree(pool: Pools, case: Case) -> None:
    start = {name: values.reshape(-1) for name, values in build_model(case).state_dict().items()}
    by_zero, by_fsdp = pool(2).run(on_real_data, case, "zero"), pool(2).run(on_real_data, case, "fsdp")
    for one, two in zip(by_zero, by_fsdp, strict=True):
        assert one.keys() == two.keys()
        for name, values in one.items():
            moved = (values - start[name]).norm()
            assert moved > 0
            assert (values - two[name]).norm() <= 1e-3 * moved, name  # gradients are added up in another order


EVERY = list(optimizers().values())


# -- what is refused --------------------------------------------------------------------------------------------------


class TensorParallel(nn.Module):
    """A norm under sequence parallelism, whose gradient is a sum that is still to be made, and sharded matrices."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.up = nn.Linear(6, hidden, bias=False)
        self.down = nn.Linear(hidden, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(self.norm(x)).tanh())  # type: ignore[no-any-return]


def same(hidden: int) -> list[TensorParallel]:
    """Models of the same weights: one to spread, one for one device, and one for there with rounding added."""
    torch.manual_seed(0)
    models = [TensorParallel(hidden) for _ in range(3)]
    for other in models[1:]:
        other.load_state_dict(models[0].state_dict())
    return models


def beyond_rounding(models: list[TensorParallel]) -> float:
    """The largest difference of this rank's part from one device, less twice of what rounding alone makes there.

    Parameter by parameter; rounding must not make so much that anything would pass.
    """
    found = [torch.zeros(())]
    for spread, alone, rounded in zip(*(model.parameters() for model in models), strict=True):
        drift = (rounded - alone).detach().abs().max()
        assert drift < 1e-3
        gap = (local_of(spread.detach()) - shard_of(alone, spread)).abs()
        found += [gap.max() - 2 * drift] if gap.numel() else []
    return float(torch.stack(found).max())  # a NaN stays one


def tensor_parallel(cls: Any, hidden: int) -> float | str:
    """Steps over a model under tensor parallelism: `beyond_rounding`, or the refusal."""
    models = same(hidden)
    model = models[0]
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    styles = {
        "norm": SequenceParallel(sequence_dim=0),
        "up": ColwiseParallel(input_layouts=Shard(0)),
        "down": RowwiseParallel(output_layouts=Replicate()),
    }
    parallelize_module(model, mesh, styles)
    weights_of_rows = torch.arange(1.0, 5.0).view(4, 1)
    try:
        optimizers = [cls(one.named_parameters(), lr=1e-2, weight_decay=0.1) for one in models]
        for step in range(4):
            tokens = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
            for one, optimizer in zip(models, optimizers, strict=True):
                mine = tokens.chunk(dist.get_world_size())[dist.get_rank()] if one is model else tokens
                (one(mine) * weights_of_rows).square().sum().backward()
                if one is models[2]:
                    add_rounding(one, torch.Generator().manual_seed(step))
                optimizer.step()
                optimizer.zero_grad()
    except (ValueError, RuntimeError) as error:
        return str(error)
    return beyond_rounding(models)


@pytest.mark.parametrize("hidden", [10, 8])
@pytest.mark.parametrize("cls", EVERY, ids=lambda cls: cls.__name__)
def test_tensor_parallel_layers_train_as_one_device(pool: Pools, cls: Any, hidden: int) -> None:
    for gap in pool(2).run(tensor_parallel, cls, hidden):
        assert isinstance(gap, float), gap
        assert gap < 2e-5  # a fifth of a step of Lion would be 2e-3


def two_dimensional(cls: Any) -> float:
    """FSDP2 over tensor parallelism, two ranks each: `beyond_rounding`."""
    models = same(10)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    parallelize_module(models[0], mesh["tensor"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    fully_shard(models[0], mesh=mesh["data"])
    optimizers = []
    for model in models:
        parts = [[], []]  # the norm lies in the mesh of the data alone
        for name, parameter in model.named_parameters():
            parts["norm" in name].append((name, parameter))
        optimizers.append(cls([{"params": part} for part in parts], lr=1e-2, weight_decay=0.1))
    for step in range(4):
        tokens = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
        for one, optimizer in zip(models, optimizers, strict=True):
            one(tokens).square().sum().backward()
            if one is models[2]:
                add_rounding(one, torch.Generator().manual_seed(step))
            optimizer.step()
            optimizer.zero_grad()
    return beyond_rounding(models)


@pytest.mark.parametrize("cls", EVERY, ids=lambda cls: cls.__name__)
def test_fsdp2_over_tensor_parallel_layers_trains_as_one_device(pool: Pools, cls: Any) -> None:
    for gap in pool(4).run(two_dimensional, cls):
        assert gap < 2e-5


def drifting(strategy: str, cls: Any) -> float:
    """Parameters that join later, and some that DDP leaves to every rank: the largest difference from one device."""
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 10), nn.Linear(10, 8)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        model[0].requires_grad_(False)
    wrapped = models[0]
    if strategy == "ddp":
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(wrapped, ["2.weight"])
        wrapped = DistributedDataParallel(wrapped)
    else:
        fully_shard(wrapped)
    optimizers = [
        cls(one.named_parameters(), lr=1e-2, roles=roles)
        for one, roles in zip(models, (wrapped, models[1]), strict=True)
    ]
    for step in range(8):
        if step == 4:
            for model in models:
                model[0].requires_grad_(True)
        for model, optimizer in zip(models, optimizers, strict=True):
            for index, (name, parameter) in enumerate(model.named_parameters()):
                if parameter.requires_grad and (name != "1.bias" or step % 2):  # not used in every step
                    seed = (
                        10 * step + index + (100 * dist.get_rank() if strategy == "ddp" and name == "2.weight" else 0)
                    )
                    grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
                    if isinstance(parameter, DTensor):
                        grad = distribute_tensor(grad, parameter.device_mesh, parameter.placements, src_data_rank=None)
                    parameter.grad = grad
            optimizer.step()
            optimizer.zero_grad()
    pairs = zip(models[0].parameters(), models[1].parameters(), strict=True)
    return max(((o.full_tensor() if isinstance(o, DTensor) else o) - t).abs().max().item() for o, t in pairs)


@pytest.mark.parametrize("strategy", ["fsdp", "ddp"])
@pytest.mark.parametrize("cls", [ds_optim.AdamMini, ds_optim.Shampoo, ds_optim.SWAN])
def test_parameters_may_join_and_stay_away(pool: Pools, strategy: str, cls: Any) -> None:
    assert max(pool(3).run(drifting, strategy, cls)) < 1e-6


def no_kernels_on_one_rank() -> str:
    if dist.get_rank() == 1:
        os.environ["DS_OPTIM_KERNELS"] = "no such kind"
    try:
        model = fully_shard(nn.Linear(6, 4))
        optimizer = ds_optim.Lion(model.named_parameters())
        model(torch.ones(1, 6)).sum().backward()
        try:
            optimizer.step()
        except RuntimeError as error:
            return str(error)
        return "nothing"
    finally:
        os.environ.pop("DS_OPTIM_KERNELS", None)


def test_every_rank_hears_of_one_that_cannot_step(pool: Pools) -> None:
    for said in pool(2).run(no_kernels_on_one_rank):
        assert "rank 1" in said
        assert "no such kind" in said


def test_state_of_a_frozen_matrix_is_refused() -> None:
    models = [nn.Linear(6, 4), nn.Linear(6, 4).requires_grad_(False)]
    models[1].bias.requires_grad_(True)
    optimizers = [ds_optim.Shampoo(one.named_parameters(), roles={"*": "linear"}) for one in models]
    models[0](torch.ones(1, 6)).sum().backward()
    optimizers[0].step()
    with pytest.raises(ValueError, match="weight is frozen"):
        optimizers[1].load_state_dict(optimizers[0].state_dict())


def refusals() -> dict[str, str]:
    """What is said to each kind of bad input."""
    said: dict[str, str] = {}

    def refused(name: str, action: Callable[[], Any]) -> None:
        try:
            action()
            said[name] = "nothing"
        except (ValueError, RuntimeError) as error:
            said[name] = str(error)

    def linear() -> nn.Module:
        torch.manual_seed(0)
        return nn.Linear(6, 4)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        flattened = FullyShardedDataParallel(linear(), use_orig_params=False, device_id=torch.device("cpu"))
        original = FullyShardedDataParallel(linear(), use_orig_params=True, device_id=torch.device("cpu"))
    refused("fsdp1", lambda: ds_optim.AdamMini(flattened.named_parameters()))
    refused("fsdp1 with original parameters", lambda: ds_optim.AdamW(original.named_parameters()))

    def one_group() -> None:
        meshes = [init_device_mesh("cpu", (2,)), init_device_mesh("cpu", (2, 1), mesh_dim_names=("a", "b"))]
        shards = [[Shard(0)], [Shard(0), Replicate()]]
        parameters = [
            nn.Parameter(distribute_tensor(torch.ones(4, 2), mesh, places))
            for mesh, places in zip(meshes, shards, strict=True)
        ]
        optimizer = ds_optim.AdamW([("a", parameters[0]), ("b", parameters[1])])
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()

    refused("two meshes in a group", one_group)

    def replaced() -> None:
        model = fully_shard(linear())
        optimizer = ds_optim.AdamMini(model.named_parameters())
        model(torch.ones(1, 6)).sum().backward()
        optimizer.step()
        fresh = [*fully_shard(linear()).parameters()]
        optimizer.param_groups[0]["params"] = fresh
        for parameter in fresh:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()

    refused("replaced after state", replaced)

    def fewer() -> None:
        model = linear()
        optimizer = ds_optim.Lion(model.named_parameters())
        optimizer.param_groups[0]["params"] = [nn.Parameter(torch.ones(2, 2))]
        optimizer.param_groups[0]["params"][0].grad = torch.ones(2, 2)
        optimizer.step()

    refused("another number", fewer)

    def complex_numbers() -> None:
        mesh = init_device_mesh("cpu", (2,))
        whole = distribute_tensor(torch.ones(4, 2, dtype=torch.complex64), mesh, [Shard(0)])
        ds_optim.AdamW([("a", nn.Parameter(whole))])

    refused("complex", complex_numbers)
    return said


def test_bad_input_is_refused_with_a_remedy(pool: Pools) -> None:
    for said in pool(2).run(refusals):
        assert "FSDP1" in said["fsdp1"]
        assert "fully_shard" in said["fsdp1"]
        assert "FSDP1" in said["fsdp1 with original parameters"]
        assert "2 meshes: make one group for each mesh" in said["two meshes in a group"]
        assert "replaced after it had state" in said["replaced after state"]
        assert "another number of parameters" in said["another number"]
        assert "keep it as two real parameters" in said["complex"]


def several_meshes() -> float:
    """A group per mesh and plain parameters beside them; the largest difference from one device."""
    torch.manual_seed(0)
    sizes = {"a": (5, 3), "b": (6, 4), "c": (7, 2), "d": (3,)}
    whole = {name: torch.randn(shape) for name, shape in sizes.items()}
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    half = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("outer", "inner"))
    placed: dict[str, nn.Parameter] = {
        "a": nn.Parameter(distribute_tensor(whole["a"], mesh, [Shard(0)])),
        "b": nn.Parameter(distribute_tensor(whole["b"], half["inner"], [Shard(0)], src_data_rank=None)),
        "c": nn.Parameter(distribute_tensor(whole["c"], mesh, [Replicate()])),
        "d": nn.Parameter(whole["d"].clone()),
    }
    plain = {name: nn.Parameter(values.clone()) for name, values in whole.items()}
    groups = [["a", "d"], ["b"], ["c"]]
    gap = 0.0
    for cls in (ds_optim.AdamMini, ds_optim.Shampoo):
        optimizers = [
            cls([{"params": [(name, one[name]) for name in group]} for group in groups], roles={"*": "linear"})
            for one in (placed, plain)
        ]
        for step in range(4):
            for one in (placed, plain):
                for index, (name, parameter) in enumerate(one.items()):
                    grad = torch.randn(sizes[name], generator=torch.Generator().manual_seed(10 * step + index))
                    if isinstance(parameter.data, DTensor):
                        grad = distribute_tensor(grad, parameter.device_mesh, parameter.placements, src_data_rank=None)
                    parameter.grad = grad
            for optimizer in optimizers:
                optimizer.step()
    for name, parameter in placed.items():
        full = parameter.full_tensor() if isinstance(parameter.data, DTensor) else parameter
        gap = max(gap, (full - plain[name]).abs().max().item())
    return gap


def test_several_meshes_and_plain_parameters_in_one_optimizer(pool: Pools) -> None:
    assert max(pool(4).run(several_meshes)) < 1e-6


def without_names(late: bool) -> list[str]:
    """Names that an optimizer finds by itself, made after or before the model was wrapped."""
    case = CASES["AdamMini"]
    model = build_model(case)
    before = [*model.parameters()]
    optimizer = ds_optim.AdamMini(before, roles=model, lr=1e-3) if late else None
    fully_shard(model)
    if optimizer is None:
        optimizer = ds_optim.AdamMini([*model.parameters()], roles=model, lr=1e-3)
    else:
        optimizer.param_groups[0]["params"] = [*model.parameters()]
    train(MeshCase(case), model, model, optimizer, range(1, 3))
    assert sorted(optimizer.state_dict()["param_names"][0]) == sorted(name for name, _ in model.named_parameters())
    return sorted(one.name for of_one in optimizer.logical().values() for one in of_one)


def loaded_in_another_order(cls: Any) -> bool:
    """State of parameters that were replaced behind the optimizer, as Accelerate does, and are in another order."""
    models = [build_model(CASES["AdamMini"]) for _ in range(2)]
    fully_shard(models[0])
    saved = cls(models[0].named_parameters(), roles=models[0], lr=1e-3)
    train(MeshCase(CASES["AdamMini"]), models[0], models[0], saved, range(1, 3))
    names = [name for name, _ in models[1].named_parameters()][::-1]
    late = cls([(name, models[1].get_parameter(name)) for name in names], roles=models[1], lr=1e-3)
    fully_shard(models[1])
    late.param_groups[0]["params"] = [models[1].get_parameter(name) for name in names]
    late.load_state_dict(saved.state_dict())
    first, second = (one.logical() for one in (saved, late))
    found = {one.name: saved.state[tensor] for tensor, listed in first.items() for one in listed}
    return all(
        torch.equal(local_of(value), local_of(late.state[tensor][key]))
        for tensor, listed in second.items()
        for one in listed
        for key, value in found[one.name].items()
    )


@pytest.mark.parametrize("cls", [ds_optim.AdamW, ds_optim.AdamMini, ds_optim.Shampoo])
def test_replaced_parameters_load_by_name(pool: Pools, cls: Any) -> None:
    assert pool(1).run(loaded_in_another_order, cls) == [True]


def looked_at(cls: Any) -> list[str]:
    """The keys of a state dict where somebody looked at the state of a parameter that has none."""
    model = build_model(CASES["AdamMini"])
    fully_shard(model)
    optimizer = cls(model.named_parameters(), roles=model, lr=1e-3)
    assert not optimizer.state[next(model.parameters())]
    return sorted(map(str, optimizer.state_dict()["state"]))


@pytest.mark.parametrize("cls", [ds_optim.AdamMini, ds_optim.Shampoo])
def test_an_empty_state_is_saved_as_one(pool: Pools, cls: Any) -> None:
    assert pool(1).run(looked_at, cls) == [["0"]]


def test_parameters_without_names_get_the_models(pool: Pools) -> None:
    assert pool(2).run(without_names, False) == pool(2).run(without_names, True)


# -- kernels ----------------------------------------------------------------------------------------------------------


def graphs_compiled(cls: Any, backend: str) -> list[int]:
    """How many graphs torch has compiled after each step, under a schedule that changes every setting it can."""
    from torch._dynamo.utils import counters

    os.environ["DS_OPTIM_KERNELS"] = backend
    try:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(11, 6), *[nn.Linear(6, 6) for _ in range(4)], nn.LayerNorm(6))
        for layer in model:
            fully_shard(layer)
        fully_shard(model)
        optimizer = cls(model.named_parameters(), lr=1e-2, roles=model)
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=8)
        found = []
        for step in range(6):
            model(torch.arange(11)).square().mean().backward()
            optimizer.param_groups[0]["weight_decay"] = 0.01 * step
            optimizer.step()
            optimizer.zero_grad()
            cycle.step()
            found.append(int(counters["stats"]["unique_graphs"]))
        return found
    finally:
        del os.environ["DS_OPTIM_KERNELS"]


@pytest.mark.parametrize("backend", ["native", "triton"])
@pytest.mark.parametrize("cls", [ds_optim.AdamMini, ds_optim.AdamW], ids=lambda cls: cls.__name__)
def test_torch_compiles_nothing_for_a_step(pool: Pools, cls: Any, backend: str) -> None:
    (compiled,) = pool(1).run(graphs_compiled, cls, backend)
    assert len(set(compiled)) == 1  # what an earlier test left
