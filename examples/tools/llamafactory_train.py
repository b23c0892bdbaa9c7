"""What `llamafactory-cli train FILE` runs, for `deepspeed` and `examples/on_cpu.py` to start; says who trained.

deepspeed --num_gpus 2 examples/on_cpu.py examples/tools/llamafactory_train.py examples/tools/llamafactory_sft.yaml
"""

import json

from llamafactory.train.tuner import run_exp
from transformers import TrainerCallback


class Say(TrainerCallback):
    """Prints the optimizer, its steps and the losses at the end."""

    def on_train_end(self, args, state, control, optimizer=None, **_):
        while hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
        if state.is_world_process_zero:
            losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
            said = {"optimizer": type(optimizer).__name__, "steps": state.global_step, "loss": losses}
            print(f"\n{json.dumps(said)}", flush=True)


run_exp(callbacks=[Say()])
