"""A training loop of one's own with Accelerate and FSDP2, a compiled model and a learning-rate schedule of torch's.

    accelerate launch --num_processes 2 examples/accelerate_fsdp2.py

The optimizer is made first; Accelerate then shards the model and hands it the shards.
"""

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from tiny import tiny_llama, windows

from ds_optim import AdamMini, param_groups

plugin = FullyShardedDataParallelPlugin(
    fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["LlamaDecoderLayer"]
)
accelerator = Accelerator(fsdp_plugin=plugin, dynamo_backend="aot_eager")  # "inductor" where speed matters
model = tiny_llama()
loader = torch.utils.data.DataLoader(windows(), batch_size=8, shuffle=True)
# Made before Accelerate shards the model, as it wants it; norms and biases are spared weight decay.
optimizer = AdamMini(param_groups(model, weight_decay=0.1), lr=5e-3, betas=(0.9, 0.95), roles=model)
scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.25, total_iters=4)
model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)

losses: list[float] = []
for step, batch in enumerate(loader):
    loss = model(**batch).loss
    accelerator.backward(loss)
    accelerator.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    losses.append(accelerator.reduce(loss.detach(), "mean").item())
    accelerator.print(f"step {step + 1}: loss {losses[-1]:.3f}")
    if step == 11:
        break
