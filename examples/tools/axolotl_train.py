"""What `axolotl train FILE` runs, for `deepspeed` and `examples/on_cpu.py` to start; says who trained.

deepspeed --num_gpus 2 examples/on_cpu.py examples/tools/axolotl_train.py examples/tools/axolotl_sft.yaml

axolotl knows accelerators only. Where there are none, DeepSpeed starts the ranks before axolotl does, which asks for
nccl on one rank; and the model is not put on the device of the rank's number.
"""

import json
import sys

import deepspeed
import torch
from axolotl.cli.config import load_cfg
from axolotl.common.datasets import load_datasets
from axolotl.train import train


def main() -> None:
    """Trains FILE, with the settings that follow it as KEY=VALUE."""
    without_a_device = not torch.accelerator.is_available()
    if without_a_device:
        deepspeed.init_distributed()
    settings = load_cfg(sys.argv[1], **dict(argument.split("=", 1) for argument in sys.argv[2:]))
    if without_a_device:
        settings.device_map = None
    _, _, trainer = train(cfg=settings, dataset_meta=load_datasets(cfg=settings))
    optimizer = trainer.optimizer
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    if trainer.is_world_process_zero():
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        said = {"optimizer": type(optimizer).__name__, "steps": trainer.state.global_step, "loss": losses}
        print(f"\n{json.dumps(said)}", flush=True)


if __name__ == "__main__":  # the processes that axolotl starts for the data run this file too
    main()
