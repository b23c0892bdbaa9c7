"""Canonical checkpoints: any number of ranks, any strategy, one device; whole or not there; refused with the reason."""

from __future__ import annotations

import errno
import json
import re
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import ds_optim
from ds_optim import checkpoint
from ds_optim.checkpoint import content, ranges
from ds_optim.releases import DEEPSPEED
from ds_optim.sharding.block_runs import block_runs
from ds_optim.sharding.blocks import BlockGrid
from ds_optim.sharding.layout import FlatPartition, Layout, ParameterSpec, SlicedParameters
from ds_optim.stepping.logical_tensors import block_ranges
from engines import Case, assembled, build_model, engine_for, learning_rate, masters, train, weights
from expected import gradient, weight_decays
from pool import Pools
from resumption import (
    STEPS,
    K,
    by_the_engine,
    engine_of_other_weights,
    relative_difference,
    resumed,
    same_bits,
    stored,
    uninterrupted,
    wrongly_loaded,
)

OFFLOAD = {"offload_optimizer": {"device": "cpu", "pin_memory": False}}
SMALL = {"sub_group_size": 300}
SHAMPOO = {"max_preconditioner_dim": 8, "precondition_frequency": 2}
LION = {"state_dtype": "bf16", "weight_decay": 0.1}
DECAY = {"weight_decay": 0.1}
FROZEN = () if DEEPSPEED.is_before("0.19.1") else ("extra",)  # refused at ZeRO-0 in bf16, see test_refusals
LINEAR = {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 20, "warmup_max_lr": 0.01}}}

CHANGES = [
    (2, Case("ds_optim.AdamW", DECAY, stage=2), 3, Case("ds_optim.AdamW", DECAY, stage=3, precision="bf16")),
    (
        1,
        Case("ds_optim.AdamW", DECAY, stage=0, precision="bf16", frozen=FROZEN),
        4,
        Case("ds_optim.AdamW", DECAY, stage=1, precision="bf16_optimizer", frozen=FROZEN),
    ),
    (4, Case("ds_optim.Lion", LION, stage=1, precision="bf16"), 2, Case("ds_optim.Lion", LION, stage=0)),
    (3, Case("ds_optim.Lion", LION, stage=3, zero=SMALL), 1, Case("ds_optim.Lion", LION, stage=2, precision="bf16")),
    (3, Case("Adan", DECAY, stage=2, precision="bf16", zero=OFFLOAD), 4, Case("Adan", DECAY, stage=3, frozen=())),
    (
        4,
        Case("AdamMini", DECAY, stage=3, precision="bf16", zero=SMALL, frozen=("extra", "norm")),
        3,
        Case("AdamMini", DECAY, stage=2, zero={"round_robin_gradients": True}, frozen=("extra", "norm")),
    ),
    (
        2,
        Case("AdamMini", DECAY, stage=0, tied=True, user_groups=True),
        4,
        Case("AdamMini", DECAY, stage=3, precision="bf16", tied=True, user_groups=True, zero_init=True),
    ),
    (1, Case("AdamMini", DECAY, stage=1, precision="bf16"), 4, Case("AdamMini", DECAY, stage=2, precision="bf16")),
    (1, Case("Shampoo", SHAMPOO, stage=0), 4, Case("Shampoo", SHAMPOO, stage=2, precision="bf16")),
    (3, Case("Shampoo", SHAMPOO, stage=3, precision="bf16", zero=SMALL), 2, Case("Shampoo", SHAMPOO, stage=0)),
    (2, Case("Shampoo", SHAMPOO, stage=1), 3, Case("Shampoo", SHAMPOO, stage=3, zero=OFFLOAD)),
    (3, Case("SWAN", {}, stage=1), 2, Case("SWAN", {}, stage=3, precision="bf16")),
    (2, Case("SWAN", {}, stage=3), 4, Case("SWAN", {}, stage=0, precision="bf16")),
    (2, Case("ds_optim.Muon", DECAY, stage=1), 3, Case("ds_optim.Muon", DECAY, stage=3, zero=OFFLOAD)),
    (3, Case("NorMuon", DECAY, stage=3, precision="bf16", zero=SMALL), 1, Case("NorMuon", DECAY, stage=2)),
    (2, Case("SOAP", SHAMPOO, stage=2, precision="bf16"), 4, Case("SOAP", SHAMPOO, stage=3)),
]


def _called(change: Any) -> str:
    return f"{change.optimizer}-{change.stage}-{change.precision}" if isinstance(change, Case) else str(change)


@pytest.mark.parametrize(("ranks", "before", "other_ranks", "after"), CHANGES, ids=_called)
def test_a_run_goes_on_elsewhere_as_if_nothing_had_happened(
    pool: Pools, ranks: int, before: Case, other_ranks: int, after: Case, tmp_path: Path
) -> None:
    """From the canonical form, and by ``engine.load_checkpoint`` from DeepSpeed's own."""
    first, second, deepspeeds = tmp_path / "first", tmp_path / "second", tmp_path / "deepspeeds"
    undisturbed = assembled(pool(ranks).run(uninterrupted, before, str(first), str(deepspeeds)))
    reports = pool(other_ranks).run(resumed, after, str(first), str(second))
    goes_on_as_if_nothing_had_happened(before, reports, undisturbed, first, second)
    shutil.rmtree(second)
    reports = pool(other_ranks).run(resumed, after, str(deepspeeds), str(second), by_the_engine)
    goes_on_as_if_nothing_had_happened(before, reports, undisturbed, first, second)


def goes_on_as_if_nothing_had_happened(
    case: Case, reports: list[dict[str, Any]], undisturbed: dict[str, Tensor], first: Path, second: Path
) -> None:

    tensors = stored(first / f"global_step{K}")
    again = stored(second / f"global_step{K}")
    assert tensors.keys() == again.keys()
    for name in tensors:
        if name.startswith("module."):  # what is not trained has the model's precision
            tensors[name], again[name] = (values[name].bfloat16() for values in (tensors, again))
    assert same_bits(tensors, again)
    assert not wrongly_loaded(reports, tensors)
    found = assembled(reports)
    if case.optimizer == "AdamMini":  # the sums of cut blocks are added up in another order
        assert relative_difference(found, undisturbed) <= 1e-6
    else:
        assert same_bits(found, undisturbed)


# -- a single device --------------------------------------------------------------------------------------------------


def on_one_device(case: Case, seed: int) -> tuple[nn.Module, Any]:
    model = build_model(replace(case, seed=seed)).float()
    decays = weight_decays(model, case)
    groups: dict[float, list[Any]] = {}
    for name, parameter in model.named_parameters():
        groups.setdefault(decays[name], []).append(parameter)
    cls = getattr(ds_optim, case.optimizer.split(".")[-1])
    listed = [{"params": parameters, "weight_decay": decay} for decay, parameters in reversed(groups.items())]
    return model, cls(listed, roles=model, **{k: v for k, v in case.options.items() if k != "weight_decay"})


def step_alone(model: nn.Module, optimizer: Any, case: Case, steps: range) -> dict[str, Tensor]:
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        for name, parameter in model.named_parameters():
            parameter.grad = gradient(case, name, tuple(parameter.shape), step)
        optimizer.step()
    return {name: parameter.detach().reshape(-1).clone() for name, parameter in model.named_parameters()}


ALONE = [
    Case("ds_optim.Lion", DECAY, stage=2),
    Case("AdamMini", DECAY, stage=3, zero=SMALL),
    Case("Shampoo", {**SHAMPOO, **DECAY}, stage=2, precision="bf16"),
]


@pytest.mark.parametrize("case", ALONE, ids=_called)
def test_a_single_device_and_an_engine_take_over_from_each_other(pool: Pools, case: Case, tmp_path: Path) -> None:
    model, optimizer = on_one_device(case, seed=5)
    step_alone(model, optimizer, case, range(1, K + 1))
    checkpoint.save(tmp_path / "alone", model, optimizer, tag=f"global_step{K}", client_state=[1])
    undisturbed = step_alone(model, optimizer, case, range(K + 1, STEPS + 1))
    reports = pool(3).run(_resumed_from_a_device, case, str(tmp_path / "alone"), str(tmp_path / "engine"))

    other, second = on_one_device(case, seed=6)
    assert checkpoint.load(tmp_path / "engine", other, second) == {"from": "engine"}
    for group in second.param_groups:
        assert group["lr"] == learning_rate(K)
    step_alone(other, second, case, range(K + 1, STEPS + 1))
    checkpoint.save(tmp_path / "end", model, optimizer)
    checkpoint.save(tmp_path / "other", other, second)
    assert same_bits(stored(tmp_path / "end" / f"step{STEPS}"), stored(tmp_path / "other" / f"step{STEPS}"))
    for name, values in assembled(reports).items():
        assert torch.allclose(values, undisturbed[name], rtol=1e-6, atol=1e-6)
        assert case.optimizer == "AdamMini" or torch.equal(values, undisturbed[name])


def _resumed_from_a_device(case: Case, folder: str, again: str) -> dict[str, Any]:
    with engine_of_other_weights(case) as (engine, _, clock):
        checkpoint.load(folder, engine)
        checkpoint.save(again, engine, tag="by hand", client_state={"from": "engine"})
        train(engine, case, clock, range(K + 1, STEPS + 1))
        return {"masters": masters(engine)}


class Odd(nn.Module):
    """Buffers, a channels_last weight, an empty parameter and one that is never used."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(3, 5, 2).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm1d(4)
        self.norm.running_mean.normal_()
        self.norm.num_batches_tracked.fill_(seed)
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.unused = nn.Linear(3, 4)
        self.register_buffer("scratch", torch.randn(3), persistent=False)

    def fill(self, seed: int) -> None:
        torch.manual_seed(seed)
        for parameter in (*self.conv.parameters(), *self.norm.parameters()):
            parameter.grad = torch.randn_like(parameter)


@pytest.mark.parametrize("cls", [ds_optim.Adan, ds_optim.AdamMini, ds_optim.Shampoo])
def test_odd_modules_without_names_come_back(cls: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content, "CHUNK_ELEMENTS", 7)
    monkeypatch.setattr(ranges, "FILE_BYTES", 100)
    model, other = Odd(1), Odd(2)
    optimizer, second = (cls([*one.parameters()], roles=one, lr=torch.tensor(0.5)) for one in (model, other))
    for step in range(3):
        model.fill(step)
        optimizer.step()
    folder = checkpoint.save(tmp_path, model, optimizer)
    assert len([*folder.glob("*.distcp")]) > 5
    rate = second.param_groups[0]["lr"].fill_(0.1)
    checkpoint.load(tmp_path, other, second)
    assert rate.item() == 0.5
    assert other.norm.num_batches_tracked.item() == 1
    assert torch.equal(model.norm.running_mean, other.norm.running_mean)
    assert not torch.equal(model.scratch, other.scratch)
    assert other.unused.weight not in second.state or not second.state[other.unused.weight]
    for one, its in ((model, optimizer), (other, second)):
        one.fill(9)
        its.step()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_weights_alone_and_a_fresh_optimizer(tmp_path: Path) -> None:
    model, other, third = Odd(1), Odd(2), Odd(3)
    optimizer, second = ds_optim.Lion(model.named_parameters()), ds_optim.AdamW(other.named_parameters(), lr=0.3)
    model.fill(0)
    optimizer.step()
    checkpoint.save(tmp_path, model, optimizer)
    checkpoint.load(tmp_path, other, second, load_optimizer_states=False)
    checkpoint.load(tmp_path, third)
    assert not second.state
    assert second.param_groups[0]["lr"] == 0.3
    for loaded in (other, third):
        assert same_bits(dict(model.state_dict()), dict(loaded.state_dict()))


# -- counters ---------------------------------------------------------------------------------------------------------


def counted(case: Case, folder: str, load: bool) -> dict[str, Any]:
    with engine_of_other_weights(case) as (engine, _, clock):
        if load:
            checkpoint.load(folder, engine)
        else:
            train(engine, case, clock, range(1, K + 1))
            scaler = engine.optimizer.loss_scaler
            scaler.cur_scale, scaler.cur_hysteresis, scaler.last_overflow_iter = 4.0, 1, 2
            engine.skipped_steps = 1
            for _ in range(3):
                engine.lr_scheduler.step()
            checkpoint.save(folder, engine)
        names = ("global_steps", "global_samples", "micro_steps", "skipped_steps")
        scaler = engine.optimizer.loss_scaler
        return {
            **{name: getattr(engine, name) for name in names},
            "scheduler": engine.lr_scheduler.state_dict(),
            "lr": [group["lr"] for group in engine.optimizer.param_groups],
            "scale": (scaler.cur_scale, scaler.cur_iter, scaler.last_overflow_iter, scaler.cur_hysteresis),
        }


def test_the_schedule_the_loss_scale_and_the_counters_go_on(pool: Pools, tmp_path: Path) -> None:
    case = Case("ds_optim.AdamW", stage=2, precision="fp16", extra=LINEAR)
    saved = pool(2).run(counted, case, str(tmp_path), False)[0]
    for loaded in pool(3).run(counted, replace(case, stage=3), str(tmp_path), True):
        assert loaded == saved
    assert (saved["global_steps"], saved["skipped_steps"], saved["scale"][0]) == (K, 1, 4.0)


# -- damage -----------------------------------------------------------------------------------------------------------


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _newer(path: Path) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))


DAMAGES: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "flipped": ("__1_0.distcp", _flip, "__1_0.distcp was changed: its checksum differs"),
    "truncated": ("__0_0.distcp", lambda path: path.write_bytes(path.read_bytes()[:-9]), r"__0_0.distcp has \d+ bytes"),
    "missing": ("__1_0.distcp", Path.unlink, "__1_0.distcp is missing"),
    "no metadata": (".metadata", Path.unlink, ".metadata is missing"),
    "about": ("about.json", _flip, "about.json was changed"),
    "objects": ("objects.pt", Path.unlink, "objects.pt is missing"),
    "cut manifest": ("manifest.json", lambda path: path.write_text("{"), "manifest.json cannot be read"),
    "flipped manifest": ("manifest.json", _flip, "manifest.json"),
    "no manifest": ("manifest.json", Path.unlink, "manifest.json is missing: it was not saved to its end"),
}


def twice_saved(case: Case, folder: str) -> None:
    with engine_for(case) as (engine, _, clock):
        train(engine, case, clock, range(1, 2))
        checkpoint.save(folder, engine, client_state="older")
        train(engine, case, clock, range(2, 3))
        checkpoint.save(folder, engine, client_state="newer")


def refused(case: Case, folder: str, options: dict[str, Any]) -> tuple[str, bool]:
    """The message of a load that is refused, and whether it left everything as it was."""
    with engine_of_other_weights(case) as (engine, model, clock):
        train(engine, case, clock, range(1, 2))
        before, counters = {**weights(model), **_flat(engine)}, engine.global_steps
        with pytest.raises(checkpoint.CheckpointError) as error:
            checkpoint.load(folder, engine, **options)
        after = {**weights(model), **_flat(engine)}
        return str(error.value), same_bits(before, after) and counters == engine.global_steps


def _flat(engine: Any) -> dict[str, Tensor]:
    """Masters and state of this rank."""
    optimizer = engine.basic_optimizer
    found = {f"master {index}": tensor.detach().clone() for index, tensor in enumerate(optimizer.bound_tensors)}
    for index, tensor in enumerate(optimizer.bound_tensors):
        found.update({f"{key} {index}": value.clone() for key, value in optimizer.state[tensor].items()})
    return {name: value.reshape(-1) for name, value in found.items()}


def damaged(case: Case, folder: str) -> list[tuple[str, str, bool, Any, int]]:
    """Every damage in turn: (which, the refusal, whether nothing was changed, what was loaded instead, warnings)."""
    reports = []
    with engine_of_other_weights(case) as (engine, model, clock):
        train(engine, case, clock, range(1, 2))
        for label, (name, damage, _) in DAMAGES.items():
            path = Path(folder) / "global_step2" / name
            original = path.read_bytes()
            torch.distributed.barrier()
            if torch.distributed.get_rank() == 0:
                damage(path)
            torch.distributed.barrier()
            before = {**weights(model), **_flat(engine)}
            with pytest.raises(checkpoint.CheckpointError) as error:
                checkpoint.load(folder, engine)
            unchanged = same_bits(before, {**weights(model), **_flat(engine)})
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                loaded = checkpoint.load(folder, engine, fallback=True)
            told = sum("Loading the older checkpoint 'global_step1' instead" in str(w.message) for w in caught)
            reports.append((label, str(error.value), unchanged, loaded, told))
            torch.distributed.barrier()
            if torch.distributed.get_rank() == 0:
                path.write_bytes(original)
            train(engine, case, clock, range(2, 3))
        assert checkpoint.load(folder, engine, fallback=True) == "newer"
    return reports


def test_damage_is_named_on_every_rank_and_the_older_one_is_taken_if_asked(pool: Pools, tmp_path: Path) -> None:
    case = Case("ds_optim.AdamW", stage=2)
    pool(2).run(twice_saved, case, str(tmp_path))
    for rank, reports in enumerate(pool(3).run(damaged, case, str(tmp_path))):
        assert [label for label, *_ in reports] == list(DAMAGES)
        for label, message, unchanged, loaded, told in reports:
            assert re.search(DAMAGES[label][2], message), (label, message)
            assert "fallback=True" in message
            assert unchanged
            assert (loaded, told) == ("older", int(rank == 0)), label


def test_a_newer_format_is_refused(pool: Pools, tmp_path: Path) -> None:
    case = Case("ds_optim.AdamW", stage=2)
    pool(2).run(twice_saved, case, str(tmp_path))
    _newer(tmp_path / "global_step2" / "manifest.json")
    for message, unchanged in pool(2).run(refused, case, str(tmp_path), {"fallback": True}):
        assert "has format 99, this version of ds_optim knows 2" in message
        assert unchanged


def test_what_does_not_fit_is_refused_with_every_difference(pool: Pools, tmp_path: Path) -> None:
    saved = Case("Shampoo", SHAMPOO, stage=2)
    pool(2).run(twice_saved, saved, str(tmp_path))
    others = {
        "it is of Shampoo, not of Adan": Case("Adan", {}, stage=2),
        "max_preconditioner_dim is 8 in the checkpoint, 16 here": Case(
            "Shampoo", {**SHAMPOO, "max_preconditioner_dim": 16}, stage=3
        ),
        "state_dtype is 'float32' in the checkpoint, 'bfloat16' here": Case(
            "Shampoo", {**SHAMPOO, "state_dtype": "bf16"}, stage=2
        ),
        "extra.weight: blocks are 2 of at most": Case(
            "Shampoo", {**SHAMPOO, "roles": {"extra.weight": "embedding"}}, stage=1
        ),
        "extra.weight was trained and is not trained here": Case("Shampoo", SHAMPOO, stage=2, frozen=("extra",)),
        "llama.lm_head.weight, which is not here": Case("Shampoo", SHAMPOO, stage=2, tied=True),
    }
    for wanted, case in others.items():
        reports = pool(2).run(refused, case, str(tmp_path), {})
        assert len({message for message, _ in reports}) == 1
        for message, unchanged in reports:
            assert wanted in message, message
            assert "load_optimizer_states=False" in message
            assert unchanged


# -- saving fails -----------------------------------------------------------------------------------------------------


def disk_full_on_one_rank(case: Case, folder: str) -> list[str]:
    def full(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    messages = []
    with engine_of_other_weights(case) as (engine, _, clock):
        train(engine, case, clock, range(1, 2))
        checkpoint.save(folder, engine)
        train(engine, case, clock, range(2, 3))
        original = ranges.Writer.write_data
        if torch.distributed.get_rank() == 1:
            ranges.Writer.write_data = full  # type: ignore[method-assign]
        try:
            with pytest.raises(checkpoint.CheckpointError) as error:
                checkpoint.save(folder, engine)
            messages.append(str(error.value))
        finally:
            ranges.Writer.write_data = original  # type: ignore[method-assign]
        with pytest.raises(checkpoint.CheckpointError) as error:
            checkpoint.save("/proc/checkpoints", engine)
        messages.append(str(error.value))
        with pytest.raises(checkpoint.CheckpointError) as error:
            checkpoint.save(folder, engine, tag=f"rank{torch.distributed.get_rank()}")
        messages.append(str(error.value))
        checkpoint.save(folder, engine, tag="global_step1")  # again, under the same name
        assert checkpoint.load(folder, engine) is None
    return messages


def test_a_save_that_fails_leaves_the_last_checkpoint_and_nothing_else(pool: Pools, tmp_path: Path) -> None:
    for messages in pool(3).run(disk_full_on_one_rank, Case("ds_optim.AdamW", stage=2), str(tmp_path)):
        full, read_only, tags = messages
        assert "nothing there was changed:\n- rank 1: OSError: [Errno 28] No space left on device" in full
        assert "cannot save checkpoint 'global_step2' in /proc/checkpoints" in read_only
        assert "ranks would save under different tags: rank0, rank1, rank2" in tags
    assert sorted(path.name for path in tmp_path.iterdir()) == ["global_step1", "latest"]


def test_a_folder_that_is_no_checkpoint_of_ours_is_left_alone(tmp_path: Path) -> None:
    model = Odd(0)
    (tmp_path / "step0").mkdir()
    with pytest.raises(checkpoint.CheckpointError, match="is no checkpoint of this form"):
        checkpoint.save(tmp_path, model, ds_optim.AdamW(model.parameters()))
    with pytest.raises(checkpoint.CheckpointError, match="nothing was ever saved there"):
        checkpoint.load(tmp_path / "nowhere", model)
    with pytest.raises(checkpoint.CheckpointError, match="SGD is not an optimizer of ds_optim"):
        checkpoint.save(tmp_path, model, torch.optim.SGD(model.parameters()))


# -- blocks -----------------------------------------------------------------------------------------------------------

GRIDS = st.builds(
    lambda batch, reduce, inner, runs: BlockGrid(
        batch, reduce, sum(count * width for count, width in runs), inner, tuple(runs)
    ),
    st.integers(1, 3),
    st.sampled_from([1, 1, 2, 3]),
    st.integers(1, 3),
    st.lists(st.tuples(st.integers(1, 3), st.integers(1, 4)), min_size=1, max_size=3),
)


@given(st.lists(GRIDS, min_size=1, max_size=4), st.integers(1, 5), st.booleans())
def test_every_block_is_stored_once_and_read_by_all_its_holders(grids: list[BlockGrid], ranks: int, flat: bool) -> None:
    specs = tuple(ParameterSpec(str(index), (grid.numel,)) for index, grid in enumerate(grids))
    by_name = {spec.name: grid for spec, grid in zip(specs, grids, strict=True)}
    layout: Layout = SlicedParameters(specs, ranks)
    if flat:
        offsets = [sum(spec.numel for spec in specs[:index]) for index in range(len(specs))]
        size = -(-sum(spec.numel for spec in specs) // ranks)
        layout = FlatPartition(specs, tuple(offsets), size, ranks)
    stored_blocks: list[list[int]] = [[] for _ in specs]
    for rank in range(ranks):
        runs = block_runs(layout, rank, by_name)
        found = block_ranges(layout, rank, by_name, runs)
        slots = []
        for blocks, logical in zip(stored_blocks, found, strict=True):
            for piece in logical.written:
                blocks.extend(range(piece.start, piece.stop))
            for piece in logical.read:
                slots.extend(range(piece.offset, piece.offset + piece.stop - piece.start))
        assert sorted(slots) == list(range(runs.num_slots))
    for grid, blocks in zip(grids, stored_blocks, strict=True):
        assert sorted(blocks) == list(range(grid.num_blocks))
