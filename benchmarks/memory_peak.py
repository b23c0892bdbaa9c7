"""Does the peak really fall? Adam-mini against fused AdamW on real engines, by the storages and by the operating system.

    python benchmarks/memory_peak.py [--markdown docs/results/memory_peak.md] [--quick]

A Llama of 58 M parameters on two gloo processes, ZeRO-2 and ZeRO-3. Every phase of a step is measured twice: by the
live tensor storages, and by the kernel's peak counter, which is reset when the phase begins; what stays after the step
is held against the memory that no other process shares. Exit status 1 if the two views differ by more than 2 % anywhere
on any rank, or if the peak does not fall by the state that Adam-mini saves.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch
from rich.progress import track

from ds_optim.memory.accountant import MemoryAccountant
from ds_optim.memory.cross_checks import ProcessView, reset_peak
from ds_optim.memory.provenance import machine, versions
from ds_optim.memory.record import Check, Method, MomentName, Phase, RankRecord
from ds_optim.memory.steps import PHASES
from pool import Pools

MODEL = Path(__file__).parents[1] / "configs" / "models" / "llama_60m.json"
SMALL = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 128, "vocab_size": 1000, "head_dim": 8}
RANKS = 2
TOKENS = 64
BUCKET = 2_000_000
TOLERANCE = 0.02
LEAST_STATES = 200_000_000
BASELINE = "torch AdamW (fused)"
OPTIMIZERS = (BASELINE, "ds_optim.AdamW", "AdamMini")
BEFORE: dict[Phase, MomentName] = {"forward": "after init", "backward": "after forward", "step": "after backward"}


@dataclass(frozen=True)
class Case:
    """One training.

    Attributes:
        optimizer: as in a JSON, or `BASELINE`, which is handed to DeepSpeed ready-made.
        stage: of ZeRO.
        precision: bf16 (with an fp32 master) or fp32.
    """

    optimizer: str
    stage: int
    precision: str

    def config(self) -> dict[str, Any]:
        """The DeepSpeed JSON; the buckets keep their share of the whole smaller than DeepSpeed's defaults would."""
        buckets = {"reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET}
        if self.stage == 3:
            buckets |= {"stage3_prefetch_bucket_size": BUCKET}
        return {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": self.stage, **buckets},
            **({"bf16": {"enabled": True}} if self.precision == "bf16" else {}),
            **(
                {"zero_allow_untested_optimizer": True}
                if self.optimizer == BASELINE
                else {"optimizer": {"type": self.optimizer, "params": {"lr": 1e-4}}}
            ),
        }


def measured(case: Case, model: dict[str, Any]) -> str:
    """The account of this rank's third step, as JSON; its checks hold every phase against the operating system."""
    import deepspeed
    from transformers import AutoConfig, AutoModelForCausalLM

    kernel: dict[Phase, int] = {}

    def peak_in(phase: Phase, action: Callable[[], Any]) -> Any:
        if not reset_peak():
            raise RuntimeError("this kernel does not let a process reset its peak counter (/proc/self/clear_refs)")
        result = action()
        kernel[phase] = ProcessView.now().peak or 0
        return result

    before = ProcessView.now()
    with MemoryAccountant(cross_check="process", os_tolerance=TOLERANCE) as account:
        network = AutoModelForCausalLM.from_config(AutoConfig.for_model(**model))
        fused = case.optimizer == BASELINE
        ready = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True) if fused else None
        engine, *_ = deepspeed.initialize(model=network, optimizer=ready, config=case.config())
        account.watch(engine)
        ids = torch.arange(TOKENS).view(1, TOKENS)
        for _ in range(2):  # the accountant's own checks are of the second step as a whole
            engine.backward(engine(input_ids=ids, labels=ids).loss)
            engine.step()
        account.cross_check = None
        loss = peak_in("forward", lambda: engine(input_ids=ids, labels=ids).loss)
        peak_in("backward", lambda: engine.backward(loss))
        peak_in("step", engine.step)
        after = ProcessView.now()
        rank = account.record().ranks[0]
    engine.destroy()
    phases = [check_of(rank, phase, kernel[phase] - before.resident) for phase in PHASES]
    steady = Check(
        name="after step",
        ours=rank.moments[-1].total,
        theirs=after.unique - before.unique,
        method=Method.PROCESS,
        tolerance=TOLERANCE,
    )
    return rank.model_copy(update={"checks": [*phases, steady, *rank.checks]}).model_dump_json()


def check_of(rank: RankRecord, phase: Phase, theirs: int) -> Check:
    """The highest point of a phase, its first moment included, against the kernel's."""
    found = (rank.peak_of(phase), rank.moment(BEFORE[phase]))
    ours = max(moment.total for moment in found if moment is not None)
    return Check(name=phase, ours=ours, theirs=theirs, method=Method.KERNEL, tolerance=TOLERANCE)
