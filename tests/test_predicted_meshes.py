"""Predictions over meshes of tensor, pipeline and expert parallelism: what real engines keep, and what adds up."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from ds_optim.cli import app
from ds_optim.memory.estimate import Request, planned, predict
from ds_optim.memory.mesh import Mesh
from engines import state_bytes
from parallel import Parallel, engine_of, llama, mixtral, train
from pool import Pools

LLAMA_7B = str(Path(__file__).parents[1] / "configs" / "models" / "llama2_7b.json")


def kept_by(run: Parallel) -> tuple[dict[str, int], int, str]:
    """A job: what an engine really keeps on this rank: bytes of state by key, elements stepped, and its plan."""
    with engine_of(run) as (engine, clock):
        train(run, engine, clock, range(1, 2))
        optimizer = engine.basic_optimizer
        plan = optimizer.plan.explain() if hasattr(optimizer.stepper, "plans") else ""
        return state_bytes(engine), sum(one.numel() for one in optimizer.bound_tensors), plan


@pytest.mark.parametrize("optimizer", ["AdamMini", "Shampoo", "Muon"])
@pytest.mark.parametrize(("stage", "tied"), [(1, False), (2, True), (3, False)])
def test_slices_keep_what_is_predicted(pool: Pools, optimizer: str, stage: int, tied: bool) -> None:
    """AutoTP over two ranks, ZeRO over two more: state of every rank to the byte, and who owns what."""
    name = optimizer if optimizer != "Muon" else "ds_optim.Muon"
    run = Parallel(name, stage=stage, slices=2, tied=tied)
    request = Request(
        model=llama(tied).config.to_dict(),
        model_name="llama",
        optimizer=optimizer,
        stage=stage,
        world_size=2,
        precision="fp32",
        states_only=True,
        mesh=Mesh(tp=2),
    )
    record, plans = predict(request), [one.plans.listed[0].explain() for one in planned(request)]
    for rank, (kept, elements, plan) in enumerate(pool(4).run(kept_by, run)):
        predicted = {entry.key: entry.bytes for entry in record.ranks[rank].state}
        assert {key: size for key, size in kept.items() if size} == predicted
        assert elements == record.ranks[rank].elements
        assert plans == [plan] * bool(plan)
        assert ("3 tp1" in plan) == bool(plan)


MIXTRAL = {**mixtral().config.to_dict(), "num_hidden_layers": 2}  # for two stages


@pytest.mark.parametrize("mesh", ["dp=4,tp=2,pp=2,ep=4", "dp=2,ep=2", "dp=2,tp=2", "dp=1,pp=2", "dp=8,tp=1,ep=4"])
@pytest.mark.parametrize("optimizer", ["AdamW", "AdamMini", "SWAN", "SOAP"])
def test_the_ranks_of_a_mesh_together_keep_what_one_process_keeps(optimizer: str, mesh: str) -> None:
    """State of matrices once; of what tensor parallelism has whole, once on each of its ranks."""
    shared = Mesh.parsed(mesh)
    stage = 1 if shared.pp > 1 or shared.tp > 1 or shared.ep > 1 else 2
    known = {
        "model": MIXTRAL,
        "model_name": "mixtral",
        "optimizer": optimizer,
        "precision": "fp32",
        "states_only": True,
    }
    alone = predict(Request(**known, stage=1))
    spread = predict(Request(**known, stage=stage, world_size=shared.dp, mesh=shared))
    assert len(spread.ranks) == shared.ranks
    state = [sum(entry.bytes for rank in one.ranks for entry in rank.state) for one in (alone, spread)]
    elements = [sum(rank.elements for rank in one.ranks) for one in (alone, spread)]
    # Copies of what is not cut (a stack of experts is not), once more at most; padding, and a count on each rank.
    assert elements[0] <= elements[1] <= elements[0] * shared.tp * 1.1
    assert state[0] * 0.999 <= state[1] <= state[0] * shared.tp * 1.1 + 64 * shared.ranks


@pytest.mark.parametrize(
    ("mesh", "stage", "said"),
    [
        ("dp=2,xp=2", 1, "is no mesh"),
        ("dp=0", 1, "at least 1"),
        ("dp=2,ep=3", 1, "ep=3 does not divide"),
        ("dp=2,tp=2", 0, "give --stage"),
        ("dp=2,pp=2", 2, "stages 0 and 1"),
        ("dp=1,pp=5", 1, "no list of layers"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused(mesh: str, stage: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        predict(
            Request(
                model=MIXTRAL,
                model_name="mixtral",
                optimizer="AdamW",
                stage=stage,
                world_size=Mesh.parsed(mesh).dp,
                states_only=True,
                mesh=Mesh.parsed(mesh),
            )
        )


def test_the_command_takes_a_mesh() -> None:
    arguments = ["--model", LLAMA_7B, "--optimizer", "Muon", "--stage", "1", "--mesh", "dp=2,tp=2,pp=2"]
    result = CliRunner().invoke(app, ["estimate", *arguments])
    assert result.exit_code == 0, result.output
    assert "over a mesh (dp=2, tp=2, pp=2), 8 ranks" in " ".join(result.output.split())
    assert "4 ranks, stage 1 of 2" in result.output
    assert "3 tp1" in result.output
