"""State is split across the ranks and kept once; a step takes no memory of the partition's size."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import ds_optim
from ds_optim.memory.tracker import StorageTracker
from engines import Case, state_bytes
from pool import Pools

STREAMS = {"ds_optim.AdamW": 2, "ds_optim.Lion": 1, "Adan": 4, "AdamMini": 1}  # fp32 values of state per element


def medium_model() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=1000,
            hidden_size=128,
            intermediate_size=344,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )


class ByAllocations:
    """Follows every allocation, inside of operators too; but not what a thread of a communication library frees."""

    def __enter__(self) -> ByAllocations:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def growth(self, call: Callable[[], Any]) -> int:
        """The most bytes that a call took at once."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
            call()
        events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
        return highest(event.nbytes() for event in events if event.name() == "[memory]")


class ByStorages(StorageTracker):
    """Follows every tensor that it saw made, whoever lets go of it last; but nothing inside of an operator.

    A thread of a communication library may let go of an earlier call's buffers during this one: what is released of
    what was there before is not taken off.
    """

    def growth(self, call: Callable[[], Any]) -> int:
        """The most bytes that a call took at once."""
        self.log.clear()
        before = set(self.live)
        self.recording = True
        call()
        self.recording = False
        return highest(change for storage, change, _ in self.log if change > 0 or storage not in before)


def highest(changes: Iterable[int]) -> int:
    """The largest sum of the first so many changes; none is 0."""
    return max(itertools.accumulate(changes, initial=0))


def measure(case: Case, witness: type[ByAllocations] | type[ByStorages] = ByAllocations) -> dict[str, Any]:
    """Bytes of state after a step, and the largest growth of memory inside the optimizer's second step."""
    with witness() as growing:
        return _measured(case, growing)


def _measured(case: Case, growing: ByAllocations | ByStorages) -> dict[str, Any]:
    import deepspeed

    model = medium_model()
    total = sum(p.numel() for p in model.parameters())
    engine, *_ = deepspeed.initialize(model=model, config=case.config())
    basic = engine.basic_optimizer
    tokens = torch.arange(16).view(1, 16)
    peaks = []

    def watched(*args: Any, **kwargs: Any) -> None:
        """One call of the basic optimizer's step (DeepSpeed makes one per group), its allocations followed."""
        peaks.append(growing.growth(lambda: type(basic).step(basic, *args, **kwargs)))

    for last in (False, True):
        engine.backward(engine(input_ids=tokens, labels=tokens).loss)
        if last:
            basic.step = watched
        engine.step()
    del basic.step
    partition = sum(tensor.numel() * 4 for tensor in basic.bound_tensors)
    report = {"state": state_bytes(engine), "total": total, "peak": max(peaks), "partition": partition}
    engine.destroy()
    return report


@pytest.mark.parametrize("optimizer", list(STREAMS))
@pytest.mark.parametrize(("stage", "ranks"), [(1, 2), (2, 3), (3, 4)])
def test_state_is_split_across_the_ranks(pool: Pools, optimizer: str, stage: int, ranks: int) -> None:
    reports = pool(ranks).run(measure, Case(optimizer, stage=stage, precision="bf16"))
    for report in reports:
        share = 4 * report["total"] / ranks
        state = report["state"]
        elementwise = sum(
            size for key, size in state.items() if key not in ("step",) + ("exp_avg_sq",) * (optimizer == "AdamMini")
        )
        assert elementwise <= 1.01 * STREAMS[optimizer] * share
        if optimizer == "AdamMini":
            assert state["exp_avg_sq"] <= 0.02 * share  # a value per row of 128 or 344, per head, per norm
        assert report["peak"] <= 0.01 * report["partition"]


def test_adam_mini_halves_adamws_state(pool: Pools) -> None:
    mini, adamw = (
        [sum(report["state"].values()) for report in pool(2).run(measure, Case(name, stage=2, precision="bf16"))]
        for name in ("AdamMini", "ds_optim.AdamW")
    )
    assert sum(mini) / sum(adamw) == pytest.approx(0.5, abs=0.005)


def measure_eager(case: Case, witness: type[ByAllocations] | type[ByStorages]) -> dict[str, Any]:
    os.environ["DS_OPTIM_KERNELS"] = "eager"
    try:
        return measure(case, witness)
    finally:
        del os.environ["DS_OPTIM_KERNELS"]


@pytest.mark.parametrize("witness", [ByAllocations, ByStorages])
def test_the_measurement_sees_temporaries(pool: Pools, witness: type[ByAllocations] | type[ByStorages]) -> None:
    """Plain torch operations allocate a piece at a time: the same measurement must notice."""
    for report in pool(1).run(measure_eager, Case("ds_optim.AdamW", stage=2, precision="bf16"), witness):
        assert report["peak"] > 0.01 * report["partition"]


def test_what_an_earlier_call_releases_late_hides_nothing() -> None:
    with ByStorages() as growing:
        earlier = [torch.ones(1_000_000)]

        def call() -> None:
            earlier.clear()
            torch.ones(1000).sum()

        assert growing.growth(call) == 4 * 1001


MATRICES: dict[str, dict[str, Any]] = {
    "Shampoo": {"max_preconditioner_dim": 64, "exchange_bucket_size": 40_000},
    "SWAN": {"exchange_bucket_size": 60_000},
}


def measure_matrices(case: Case) -> dict[str, Any]:
    """As `measure`, with the elements of the largest stack and block that this rank computed."""
    cls = getattr(ds_optim, case.optimizer)
    largest = [0]
    rule = cls.rule

    def watched(group: Any, stack: Any) -> Any:
        largest.append(len(stack) * max(math.prod(stack.shape), max(stack.shape) ** 2))
        return rule.update(group, stack)

    cls.rule = replace(rule, update=watched)
    try:
        report = measure(case, ByStorages)
    finally:
        cls.rule = rule
    return {**report, "stack": max(largest)}


@pytest.mark.parametrize("optimizer", list(MATRICES))
@pytest.mark.parametrize(("stage", "ranks"), [(2, 2), (3, 4), (0, 3)])
def test_a_matrix_step_takes_four_buckets_and_four_stacks(pool: Pools, optimizer: str, stage: int, ranks: int) -> None:
    case = Case(optimizer, MATRICES[optimizer], stage=stage, precision="fp32")
    largest_block = 64 * 64 if optimizer == "Shampoo" else 128 * 344
    for report in pool(ranks).run(measure_matrices, case):
        bucket = max(MATRICES[optimizer]["exchange_bucket_size"], largest_block)
        allowed = 4 * 4 * bucket + 4 * 4 * report["stack"]
        assert 0 < report["peak"] <= allowed
        assert allowed < 4 * report["total"], "the bound must be able to fail"


def test_swan_keeps_nothing_for_matrices(pool: Pools) -> None:
    reports = pool(2).run(measure, Case("SWAN", stage=2, precision="bf16"))
    kept = sum(size for report in reports for key, size in report["state"].items() if key != "step")
    assert kept == 8 * (2 * 1000 * 128 + (2 * 4 + 1) * 128), "Adam's two values for each element that is no matrix"
