"""transformers' Trainer under DeepSpeed: the JSON names the optimizer, and nothing here knows about it.

    deepspeed --num_gpus 2 examples/trainer_deepspeed.py --deepspeed examples/adan_auto.json

Adan's three betas stand in the JSON's "ds_optim" object, since "auto" would fill in two.
"""

from tiny import tiny_llama, windows
from transformers import HfArgumentParser, Trainer, TrainingArguments

parser = HfArgumentParser(TrainingArguments)
parser.set_defaults(  # the JSON's "auto" values are taken from here
    output_dir="unused",
    learning_rate=5e-3,
    weight_decay=0.02,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=2,
    max_grad_norm=1.0,
    lr_scheduler_type="cosine",
    warmup_steps=2,
    max_steps=12,
    logging_steps=1,
    save_strategy="no",
    report_to="none",
)
(arguments,) = parser.parse_args_into_dataclasses()
trainer = Trainer(tiny_llama(), arguments, train_dataset=windows())
trainer.train()
