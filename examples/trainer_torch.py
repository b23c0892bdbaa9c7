"""transformers' Trainer without DeepSpeed: one device, DDP or FSDP2, with the same two words about the optimizer.

    python examples/trainer_torch.py
    torchrun --nproc_per_node 2 examples/trainer_torch.py
    torchrun --nproc_per_node 2 examples/trainer_torch.py --fsdp

FSDP2 splits the optimizer's state over the ranks; under DDP every rank has all of it.
"""

import sys

from tiny import tiny_llama, windows
from transformers import Trainer, TrainingArguments

from ds_optim import Shampoo

fsdp = "--fsdp" in sys.argv
SHARDED = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
arguments = TrainingArguments(
    output_dir="unused",
    **({"fsdp": True, "fsdp_config": SHARDED} if fsdp else {}),
    weight_decay=0.1,
    max_grad_norm=1.0,
    per_device_train_batch_size=8,
    lr_scheduler_type="linear",
    max_steps=12,
    logging_steps=1,
    save_strategy="no",
    report_to="none",
)
model = tiny_llama()
trainer = Trainer(
    model,
    arguments,
    train_dataset=windows(),
    # roles=model: the Trainer hands over parameters without their names.
    optimizer_cls_and_kwargs=(Shampoo, {"lr": 3e-3, "max_preconditioner_dim": 32, "roles": model}),
)
trainer.train()
