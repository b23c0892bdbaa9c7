"""LoRA with PEFT: Adam-mini takes the heads of queries and keys from the model under the adapters.

    python examples/lora.py
    python examples/lora.py Shampoo

The head is trained whole (``modules_to_save``), since this base model knows nothing yet.
"""

import sys

from peft import LoraConfig, get_peft_model
from tiny import tiny_llama, windows
from transformers import Trainer, TrainingArguments

import ds_optim

cls = getattr(ds_optim, sys.argv[1] if len(sys.argv) > 1 else "AdamMini")
adapters = LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "down_proj"], modules_to_save=["lm_head"])
model = get_peft_model(tiny_llama(), adapters)
arguments = TrainingArguments(
    output_dir="unused",
    per_device_train_batch_size=8,
    max_steps=15,
    logging_steps=1,
    save_strategy="no",
    report_to="none",
)
trainer = Trainer(
    model, arguments, train_dataset=windows(), optimizer_cls_and_kwargs=(cls, {"lr": 1e-2, "roles": model})
)
trainer.train()
