"""Losses of DeepSpeed engines with one rank, under every stage of ZeRO: benchmarks/accelerator.py starts this.

    DS_ACCELERATOR=cuda python benchmarks/accelerator_engine.py

Prints JSON, {optimizer: {stage: losses}}: a process of its own, since DeepSpeed chooses its accelerator once.
"""

from __future__ import annotations

import json
import os
import socket
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator

from ds_optim.selftest import checks

STAGES: dict[str, dict[str, Any]] = {
    "0": {"stage": 0},
    "2": {"stage": 2},
    "3": {"stage": 3},
    "2 with offload": {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": True}},
}
STEPS = 4


def losses(name: str, zero: dict[str, Any]) -> list[float]:
    """Of a few steps in bf16."""
    model = checks.toy(torch.device(get_accelerator().current_device_name()))
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "bf16": {"enabled": True},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    optimizer = checks.made(name, model.named_parameters(), model)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    found = []
    for step in range(STEPS):
        ids = torch.randint(0, 97, (2, 8), generator=torch.Generator().manual_seed(step), device="cpu")
        loss = engine(ids.to(engine.device)).float().square().mean()
        engine.backward(loss)
        engine.step()
        found.append(float(loss))
    engine.destroy()
    return found


def main() -> None:
    """Print what was found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    # Which only inference needs, and takes a minute to build.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    on_cpu = get_accelerator().device_name() == "cpu"
    deepspeed.init_distributed("gloo" if on_cpu else get_accelerator().communication_backend_name())
    names = ("AdamW", "AdamMini", "SWAN", "Shampoo")
    found = {name: {label: losses(name, zero) for label, zero in STAGES.items()} for name in names}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
