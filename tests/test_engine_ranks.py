"""An engine or a model on part of the job's ranks asks nothing of the others, which do something else or train another.

Actor and critic on halves of a job, an engine beside a server: DeepSpeed takes an mpu for that, torch a mesh.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import ds_optim
from ds_optim import checkpoint
from ds_optim.batch_size import NoiseScale, NoiseScaleError
from ds_optim.checkpoint.warm_start import warm_start
from ds_optim.memory.accountant import MemoryAccountant
from ds_optim.sharding.exchange import Ranks
from pool import Pools

STEPS = 3


@functools.cache
def groups(*members: tuple[int, ...]) -> list[Any]:
    """Process groups, made by all ranks of the job together and once for the life of a process."""
    return [dist.new_group(list(ranks)) for ranks in members]


def own(members: list[tuple[int, ...]]) -> tuple[Any, tuple[int, ...]]:
    """The group that this rank is in, and its ranks."""
    found = groups(*members)
    place = next(index for index, ranks in enumerate(members) if dist.get_rank() in ranks)
    return found[place], members[place]


class Mpu:
    """What DeepSpeed takes for one: each rank's data-parallel and model-parallel group."""

    def __init__(self, data: list[tuple[int, ...]], model: list[tuple[int, ...]]) -> None:
        (self._data, _), (self._model, _) = own(data), own(model)

    def get_data_parallel_group(self) -> Any:
        return self._data

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank(self._data)

    def get_data_parallel_world_size(self) -> int:
        return dist.get_world_size(self._data)

    def get_model_parallel_group(self) -> Any:
        return self._model

    def get_model_parallel_rank(self) -> int:
        return dist.get_rank(self._model)

    def get_model_parallel_world_size(self) -> int:
        return dist.get_world_size(self._model)


def halves() -> Mpu:
    """Ranks 0 and 1 apart from 2 and 3."""
    return Mpu([(0, 1), (2, 3)], [(0,), (1,), (2,), (3,)])


@contextmanager
def mpu_forgotten() -> Iterator[None]:
    """DeepSpeed keeps an mpu for the engines that come after."""
    import deepspeed.utils.groups

    try:
        yield
    finally:
        deepspeed.utils.groups.mpu = None


@dataclass(frozen=True)
class Training:
    optimizer: str
    stage: int
    width: int = 8

    def model(self, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(8, self.width), nn.LayerNorm(self.width), nn.Linear(self.width, 4))

    def engine(self, mpu: Mpu | None, seed: int = 0, **settings: Any) -> Any:
        import deepspeed

        config = {
            "train_micro_batch_size_per_gpu": 3,
            "zero_optimization": {"stage": self.stage},
            "optimizer": {"type": self.optimizer, "params": {"lr": 1e-2}},
            **settings,
        }
        engine, *_ = deepspeed.initialize(model=self.model(seed), mpu=mpu, config=config, dist_init_required=False)
        return engine

    def train(self, mpu: Mpu | None) -> Any:
        engine = self.engine(mpu)
        steps(engine, engine, STEPS)
        return engine


def batch(step: int) -> Tensor:
    """The same on every rank, so that the size of the batch does not matter."""
    return torch.randn(3, 8, generator=torch.Generator().manual_seed(step))


def steps(engine: Any, called: Any, count: int) -> None:
    for step in range(count):
        engine.backward(called(batch(step)).square().mean())
        engine.step()


def weights(engine: Any) -> list[Tensor]:
    import deepspeed

    parameters = list(engine.module.parameters())
    if engine.zero_optimization_stage() < 3:
        return [one.detach().clone() for one in parameters]
    found = []
    for parameter in parameters:
        with deepspeed.zero.GatheredParameters([parameter]):
            found.append(parameter.detach().clone())
    return found


def trained_alone(trainings: list[Training]) -> list[list[Tensor]]:
    """A job: each of them on all ranks, one after the other."""
    found = []
    for one in trainings:
        engine = one.train(None)
        found.append(weights(engine))
        engine.destroy()
    return found


def same(found: list[Tensor], wanted: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


# -- one half trains, the other is not there ------------------------------------------------------------------------

APART = [Training("AdamMini", 1), Training("Shampoo", 2), Training("ds_optim.AdamW", 0)]


def apart(folder: Path) -> dict[str, Any] | None:
    """A job: ranks 2 and 3 do everything that is to be done with an engine, 0 and 1 do something else."""
    if dist.get_rank() < 2:
        halves()
        return None
    found: dict[str, Any] = {"trained": []}
    with mpu_forgotten():
        for training in APART:
            with MemoryAccountant(strict=False) as account:
                engine = training.engine(halves())
                account.watch(engine)
                steps(engine, engine, STEPS)
                record = account.gather()
            found["trained"].append(weights(engine))
            found["record"] = [rank.rank for rank in record.ranks], record.provenance.world_size
            with NoiseScale(engine) as noise:
                steps(engine, engine, 2)
                found["noise"] = noise.state_dict()["counts"]
            path = checkpoint.save(folder / training.optimizer, engine, client_state=training.stage, keep=1)
            whole = checkpoint.full_state(engine, "0.weight")
            kept = weights(engine)
            state = engine.basic_optimizer.state_dict()
            engine.destroy()

            again = training.engine(halves(), seed=1)
            assert checkpoint.load(folder / training.optimizer, again, tag=path.name) == training.stage
            assert same(weights(again), kept)
            assert all(torch.equal(checkpoint.full_state(again, "0.weight")[key], one) for key, one in whole.items())
            again.basic_optimizer.load_state_dict(state)
            again.destroy()
        warm = Training("AdamMini", 2).engine(halves(), seed=1)
        warm_start(folder / "ds_optim.AdamW", warm, weights=True)
        found["warm"] = sorted(checkpoint.full_state(warm, "0.weight"))
        warm.destroy()
    return found


def test_an_engine_on_part_of_the_ranks_waits_for_nobody_else(pool: Pools, tmp_path: Path) -> None:
    alone, _ = pool(2).run(trained_alone, APART)
    *others, second, first = pool(4).run(apart, tmp_path, timeout=150)
    assert others == [None, None]
    for found in (first, second):
        assert all(same(one, wanted) for one, wanted in zip(found["trained"], alone, strict=True))
        assert found["record"] == ([0, 1], 2)  # places in the engine, not in the job
        assert found["noise"][0] == 2
        assert found["warm"] == ["exp_avg", "exp_avg_sq"]


# -- each half trains its own ---------------------------------------------------------------------------------------

PAIRS = [
    (Training("Shampoo", 1), Training("AdamMini", 2, 12)),
    (Training("AdamMini", 3), Training("Shampoo", 3, 12)),
    (Training("Adan", 2), Training("ds_optim.Lion", 0, 12)),
]


def both(folder: Path) -> list[list[Tensor]]:
    """A job: two engines at a time; each half saves into a folder of its own at the same time, then only one does."""
    half, found = dist.get_rank() // 2, []
    with mpu_forgotten():
        for pair in PAIRS:
            training = pair[half]
            engine = training.train(halves())
            found.append(weights(engine))
            mine = folder / f"{training.optimizer} {half}"
            checkpoint.save(mine, engine)
            if half == 1:
                steps(engine, engine, 1)
                checkpoint.save(mine, engine)
                checkpoint.load(mine, engine, tag=f"global_step{STEPS}")
                assert same(weights(engine), found[-1])
            engine.destroy()
    return found


def test_two_engines_on_halves_of_the_job_train_and_save_at_the_same_time(pool: Pools, tmp_path: Path) -> None:
    alone = [pool(2).run(trained_alone, [pair[half] for pair in PAIRS])[0] for half in range(2)]
    for rank, found in enumerate(pool(4).run(both, tmp_path, timeout=150)):
        assert all(same(one, wanted) for one, wanted in zip(found, alone[rank // 2], strict=True))
    for pair in PAIRS:
        for half, saved in enumerate(({f"global_step{STEPS}"}, {f"global_step{STEPS}", f"global_step{STEPS + 1}"})):
            tags = (tmp_path / f"{pair[half].optimizer} {half}").glob("global_step*")
            assert {path.name for path in tags} == saved


def refused_on_one_half() -> str:
    """A job: one rank's JSON is wrong; the other half has nothing to do with it."""
    rank = dist.get_rank()
    wrong = {"ds_optim": {"no_decay": ["*.nothing"]}} if rank == 1 else {}
    with mpu_forgotten():
        try:
            engine = Training("AdamMini", 1).engine(halves(), **wrong)
            with NoiseScale(engine):
                steps(engine, engine, 1)
        except ValueError as error:
            return str(error)
        engine.destroy()
        return "trained"


def test_what_is_wrong_on_one_rank_is_said_on_all_of_its_engine_and_on_no_other(pool: Pools) -> None:
    first, second, *others = pool(4).run(refused_on_one_half, timeout=60)
    assert first == second
    assert "'*.nothing' matches no parameter" in first
    assert others == ["trained", "trained"]


# -- ranks that hold different parameters ---------------------------------------------------------------------------


def grid_of_two_by_two() -> dict[str, Any]:
    """A job: an engine with tensor parallelism by an mpu; what one rank says all four hear."""
    rank, found = dist.get_rank(), {}
    mpu = Mpu([(0, 2), (1, 3)], [(0, 1), (2, 3)])
    ranks = Ranks((mpu.get_data_parallel_group(), mpu.get_model_parallel_group()))
    found["places"], found["size"] = list(ranks.everyones(ranks.index).items()), ranks.size
    found["alone"] = Ranks().everyones("mine"), Ranks().size, Ranks().index
    with mpu_forgotten():
        for name, wrong in (("refused", {"ds_optim": {"no_decay": ["*.nothing"]}}), ("trained", {})):
            try:
                engine = Training("ds_optim.AdamW", 1).engine(mpu, **(wrong if rank == 2 else {}))
            except ValueError as error:
                found[name] = str(error)
                continue
            steps(engine, engine, 1)
            with pytest.raises(checkpoint.CheckpointError, match="model parallelism of an mpu"):
                checkpoint.save("nowhere", engine)
            with pytest.raises(NoiseScaleError, match="mp_world_size is 2"):
                NoiseScale(engine)
            state = engine.basic_optimizer.state_dict()
            if rank == 2:
                del state["state"][0]["exp_avg"]
            with pytest.raises(ValueError, match="was not saved by the same optimizer"):
                engine.basic_optimizer.load_state_dict(state)
            engine.destroy()
            found[name] = ""
    return found


def test_under_tensor_parallelism_all_ranks_of_the_engine_hear_of_a_refusal(pool: Pools) -> None:
    for found in pool(4).run(grid_of_two_by_two, timeout=60):
        assert found["places"] == [(0, 0), (2, 1), (1, 2), (3, 3)]
        assert found["size"] == 4
        assert found["alone"][1:] == (1, 0)
        assert "'*.nothing' matches no parameter" in found["refused"]
        assert found["trained"] == ""


def pipeline(pattern: str) -> str:
    """A job: two stages of two ranks each."""
    from deepspeed.pipe import LayerSpec, PipelineModule

    layers = [
        LayerSpec(nn.Linear, 8, 8),
        LayerSpec(nn.LayerNorm, 8),
        LayerSpec(nn.Linear, 8, 8),
        LayerSpec(nn.Linear, 8, 4),
    ]
    with mpu_forgotten():
        model = PipelineModule(layers, num_stages=2, loss_fn=nn.MSELoss(), partition_method="uniform")
        config = {
            "train_batch_size": 4,
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 2,
            "zero_optimization": {"stage": 1},
            "optimizer": {"type": "AdamMini", "params": {"lr": 1e-2}},
            "ds_optim": {"no_decay": [pattern]},
        }
        import deepspeed

        try:
            engine, *_ = deepspeed.initialize(model=model, config=config, model_parameters=list(model.parameters()))
        except ValueError as error:
            return str(error)
        loss = engine.train_batch(iter([(torch.ones(1, 8), torch.zeros(1, 4))] * 4))
        engine.destroy()
        return f"trained {bool(loss > 0)}"


def test_every_stage_of_a_pipeline_hears_of_a_refusal(pool: Pools) -> None:
    for said in pool(4).run(pipeline, "9.*", timeout=60):
        assert "'9.*' matches no parameter" in said
    assert pool(4).run(pipeline, "*.bias", timeout=60) == ["trained True"] * 4


# -- torch's own strategies -----------------------------------------------------------------------------------------


def on_a_half(folder: Path, strategy: str, name: str) -> dict[str, Any] | None:
    """A job: FSDP2 or DDP over ranks 2 and 3."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("half", "shard"))["shard"]
    if dist.get_rank() < 2:
        return None

    def made(seed: int) -> tuple[nn.Module, Any]:
        model = Training(name, 0).model(seed)
        if strategy == "ddp":
            model = DistributedDataParallel(model, process_group=mesh.get_group())
        else:
            model = fully_shard(model, mesh=mesh)
        return model, getattr(ds_optim, name)(model.named_parameters(), lr=1e-2, roles=model)

    def step(model: nn.Module, optimizer: Any, at: int) -> None:
        model(batch(at)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    with MemoryAccountant(strict=False) as account:
        model, optimizer = made(0)
        account.watch(model, optimizer)
        for at in range(STEPS):
            step(model, optimizer, at)
        record = account.gather()
    with NoiseScale(model, optimizer=optimizer, micro_batch_size=3) as noise:
        step(model, optimizer, STEPS)
        counts = noise.state_dict()["counts"]
    checkpoint.save(folder, model, optimizer)
    kept = checkpoint.full_state(model, "0.weight", optimizer)
    again = made(1)
    checkpoint.load(folder, *again)
    assert all(torch.equal(checkpoint.full_state(again[0], "0.weight", again[1])[key], kept[key]) for key in kept)

    def whole(model: nn.Module) -> list[Tensor]:
        return [(p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for p in model.parameters()]

    assert same(whole(again[0]), whole(model))
    warm_start(folder, *made(2)) if name == "AdamW" else None
    return {
        "record": ([rank.rank for rank in record.ranks], record.provenance.world_size),
        "good": counts[0],
        "keys": sorted(kept),
    }


@pytest.mark.parametrize(("strategy", "name"), [("fsdp", "Shampoo"), ("fsdp", "AdamW"), ("ddp", "Shampoo")])
def test_a_model_on_part_of_the_ranks_waits_for_nobody_else(
    pool: Pools, tmp_path: Path, strategy: str, name: str
) -> None:
    *others, first, second = pool(4).run(on_a_half, tmp_path, strategy, name, timeout=60)
    assert others == [None, None]
    assert first == second
    assert first["record"] == ([0, 1], 2)
    assert first["good"] == 1
    assert "momentum" in first["keys"] or "exp_avg" in first["keys"]
