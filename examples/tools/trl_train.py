"""TRL under DeepSpeed: the JSON names the optimizer, and nothing here knows about it.

    deepspeed --num_gpus 2 examples/on_cpu.py examples/tools/trl_train.py sft --deepspeed examples/tools/zero2.json
    deepspeed --num_gpus 2 examples/on_cpu.py examples/tools/trl_train.py dpo --deepspeed examples/tools/zero2.json
    deepspeed --num_gpus 2 examples/on_cpu.py examples/tools/trl_train.py grpo --deepspeed examples/tools/zero2.json

DPO and GRPO have a second model, the reference, which is an engine without an optimizer. `examples/on_cpu.py` is for
machines without accelerators.
"""

import argparse
import json
import tempfile

import small
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

parser = argparse.ArgumentParser()
parser.add_argument("method", choices=["sft", "dpo", "grpo"])
parser.add_argument("--deepspeed", required=True)
parser.add_argument("--output", default="unused")
parser.add_argument("--resume")
given, _ = parser.parse_known_args()

common = {
    "output_dir": given.output,
    "deepspeed": given.deepspeed,
    "per_device_train_batch_size": 4,
    "max_steps": 6,
    "learning_rate": 5e-3,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "save_strategy": "steps" if given.output != "unused" else "no",
    "save_steps": 3,
    "report_to": "none",
    "bf16": False,
    "use_cpu": False,
}
tokenizer = small.tokenizer()
if given.method == "sft":
    trainer = SFTTrainer(
        small.model(), SFTConfig(max_length=64, **common), train_dataset=small.texts(), processing_class=tokenizer
    )
elif given.method == "dpo":
    trainer = DPOTrainer(
        small.model(),
        ref_model=small.model(),
        args=DPOConfig(max_length=64, **common),
        train_dataset=small.preferences(),
        processing_class=tokenizer,
    )
else:
    folder = tempfile.mkdtemp()  # GRPO loads its reference by name
    small.model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    trainer = GRPOTrainer(
        folder,
        reward_funcs=lambda completions, **_: [float(len(set(one))) for one in completions],
        args=GRPOConfig(beta=0.1, num_generations=4, max_completion_length=8, **common),
        train_dataset=small.prompts(),
        processing_class=tokenizer,
    )
trainer.train(resume_from_checkpoint=given.resume)
engine = trainer.deepspeed
if trainer.accelerator.is_main_process:
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(
        json.dumps({"optimizer": type(engine.basic_optimizer).__name__, "steps": engine.global_steps, "loss": losses})
    )
