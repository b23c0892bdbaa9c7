"""Memory records written by hand, for tests of what reads them: a Llama of 58 million parameters under ZeRO-2, bf16."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from ds_optim.memory.record import (
    Category,
    Check,
    CountedBy,
    Moment,
    MomentName,
    Phase,
    Provenance,
    RankRecord,
    Record,
    Sample,
    StateEntry,
    sized,
)

PARAMETERS = 58_073_600
ACTIVATIONS = 61_734_912
BUCKET = 8_000_000
VALUES = {"torch.AdamW (fused)": 2.0, "ds_optim.AdamMini": 1.0, "ds_optim.Lion": 1.0, "Adan": 4.0}
"""fp32 values of state per element."""


def record(
    optimizer: str = "ds_optim.AdamMini",
    *,
    kind: Literal["measured", "predicted"] = "measured",
    ranks: int = 2,
    parameters: int = PARAMETERS,
    timeline: bool = True,
    unaccounted: int = 41_872,
    **provenance: Any,
) -> Record:
    """A whole record; ranks differ by some activations, a prediction is off by one per cent of them."""
    known: dict[str, Any] = {
        "date": "2026-11-22T08:00:00Z",
        "machine": "x86_64, 2 cores, Linux",
        "versions": {"torch": "2.13.0", "deepspeed": "0.19.8", "ds-optim": "0.1.0"},
        "model": "configs/models/llama_60m.json",
        "parameters": parameters,
        "optimizer": optimizer,
        "settings": {"lr": "0.001", "betas": "(0.9, 0.999)"},
        "strategy": "DeepSpeed ZeRO-2",
        "stage": 2,
        "world_size": ranks,
        "precision": "bf16",
        "micro_batch": 2,
        "seq_length": 256,
        "command": "deepspeed launcher/train.py --deepspeed configs/adam_mini_zero2.json --memory-report out",
        "notes": ["Activations without recomputation.", "Batches of random tokens."],
        "overhead": 1.62 if kind == "measured" else None,
    }
    return Record(
        kind=kind,
        provenance=Provenance(**(known | provenance)),
        ranks=[_rank(optimizer, kind, number, ranks, parameters, timeline, unaccounted) for number in range(ranks)],
    )


def _rank(
    optimizer: str, kind: str, number: int, ranks: int, parameters: int, timeline: bool, unaccounted: int
) -> RankRecord:
    shard = parameters // ranks
    method = CountedBy.STORAGES if kind == "measured" else CountedBy.LAYOUT
    activations = int(ACTIVATIONS * (1 if kind == "measured" else 0.99)) + 1_500_000 * number
    state = _state(optimizer, shard)
    steady = {
        Category.PARAMETERS: 2 * parameters,
        Category.MASTER: 4 * shard,
        Category.OPTIMIZER: sum(entry.bytes for entry in state),
        Category.BUFFERS: 1_048_576,
        Category.UNACCOUNTED: unaccounted if kind == "measured" else 0,
    }
    after_backward = {**steady, Category.GRADIENTS: 2 * shard}
    forward = {**steady, Category.ACTIVATIONS: activations}
    backward = {**after_backward, Category.ACTIVATIONS: int(activations * 0.8), Category.BUCKETS: BUCKET}
    step = {**after_backward, Category.WORKSPACE: 4 * shard if "AdamW" in optimizer else 2 * shard}

    def moment(amounts: Mapping[Category, int], name: MomentName | None = None, of: Phase | None = None) -> Moment:
        return Moment(name=name, peak_of=of, amounts=sized(amounts, method))

    return RankRecord(
        rank=number,
        elements=shard,
        moments=[
            moment({**steady, Category.OPTIMIZER: 0}, "after init"),
            moment(forward, of="forward"),
            moment(forward, "after forward"),
            moment(backward, of="backward"),
            moment(after_backward, "after backward"),
            moment(step, of="step"),
            moment(steady, "after step"),
        ],
        state=state,
        checks=_checks(sum(step.values())) if kind == "measured" else [],
        timeline=_timeline(steady, activations, 2 * shard, backward, step) if timeline else [],
    )


def _state(optimizer: str, shard: int) -> list[StateEntry]:
    entries = [StateEntry(key="exp_avg", dtype="float32", shape_rule="element", elements=shard, bytes=4 * shard)]
    if optimizer.endswith("AdamMini"):
        entries.append(StateEntry(key="exp_avg_sq", dtype="float32", shape_rule="block", elements=4813, bytes=19252))
    else:
        entries += [
            StateEntry(key=key, dtype="float32", shape_rule="element", elements=shard, bytes=4 * shard)
            for key in ("exp_avg_sq", "exp_avg_diff", "previous_grad")[: int(VALUES[optimizer]) - 1]
        ]
    return [*entries, StateEntry(key="step", dtype="float32", shape_rule="count", elements=2, bytes=8)]


def _checks(peak: int) -> list[Check]:
    return [
        Check(name="alive after the step", ours=peak, theirs=peak - 12, method=CountedBy.EVENTS, tolerance=0.005),
        Check(name="peak of the step", ours=peak, theirs=int(peak * 1.009), method=CountedBy.KERNEL, tolerance=0.02),
        Check(name="growth of the process", ours=peak, theirs=int(peak * 1.003), method=CountedBy.PROCESS),
    ]


def _timeline(
    steady: Mapping[Category, int],
    activations: int,
    gradients: int,
    backward: Mapping[Category, int],
    step: Mapping[Category, int],
) -> list[Sample]:
    """Activations climb layer by layer and fall again while gradients grow; then the step."""
    samples = []
    for index in range(300):
        done = index / 299
        swing = 2_500_000 * (index % 7 == 3)
        samples.append(
            Sample(
                at=0.42 * done, phase="forward", bytes={**steady, Category.ACTIVATIONS: int(activations * done) + swing}
            )
        )
    for index in range(400):
        done = index / 399
        falling = {
            **steady,
            Category.ACTIVATIONS: int(activations * (1 - done)) + 2_000_000 * (index % 5 == 2),
            Category.GRADIENTS: int(gradients * done),
            Category.BUCKETS: BUCKET if index % 60 > 8 else 0,
        }
        samples.append(Sample(at=0.42 + 0.48 * done, phase="backward", bytes=falling))
    samples.append(Sample(at=0.9, phase="backward", bytes=backward))
    workspace = step[Category.WORKSPACE]
    for index, share in enumerate((0.0, 0.5, 1.0, 1.0, 0.5, 0.5, 0.0, 0.0)):
        held = {**step, Category.WORKSPACE: int(workspace * share), Category.GRADIENTS: gradients if index < 6 else 0}
        samples.append(Sample(at=0.905 + 0.01 * index, phase="step", bytes=held))
    return samples
