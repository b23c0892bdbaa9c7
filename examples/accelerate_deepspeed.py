"""A training loop of one's own with Accelerate, under DeepSpeed: the JSON names the optimizer and the schedule.

    accelerate launch --num_processes 2 --use_deepspeed \
        --deepspeed_config_file examples/swan_warmup.json examples/accelerate_deepspeed.py
"""

import torch
from accelerate import Accelerator
from accelerate.utils import DummyOptim, DummyScheduler
from tiny import tiny_llama, windows

accelerator = Accelerator()
model = tiny_llama()
loader = torch.utils.data.DataLoader(windows(), batch_size=4, shuffle=True)
# They stand for what the JSON says.
optimizer = DummyOptim(model.parameters())
scheduler = DummyScheduler(optimizer)
model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)

losses: list[float] = []
for step, batch in enumerate(loader):
    with accelerator.accumulate(model):
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    losses.append(accelerator.reduce(loss.detach(), "mean").item())
    accelerator.print(f"micro-batch {step + 1}: loss {losses[-1]:.3f}")
    if step == 23:
        break
