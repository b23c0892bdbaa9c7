"""What a user of the installed package writes: a JSON, and no import of ours. Run by .ci/wheel."""

import os

import deepspeed
import torch

alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
os.environ.update(alone)
# DeepSpeed would build a shared-memory all-reduce, which only inference uses, for a minute.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

config = {
    "train_micro_batch_size_per_gpu": 4,
    "zero_optimization": {"stage": 2},
    "optimizer": {"type": "AdamMini", "params": {"lr": 1e-2}},
    "ds_optim": {"checkpoint": "canonical"},
}
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))
engine, *_ = deepspeed.initialize(model=model, config=config, model_parameters=model.parameters())
losses = []
for _ in range(20):
    loss = (engine(torch.ones(4, 8)) - 3).square().mean()  # far from where any start is: every step must lower it
    engine.backward(loss)
    engine.step()
    losses.append(loss.item())
engine.save_checkpoint("saved")
path, _ = engine.load_checkpoint("saved")
kind = type(engine.basic_optimizer)
assert losses[-1] < losses[0], losses
assert path is not None
assert "site-packages" in __import__(kind.__module__).__file__, "not the installed package"
print(f"{kind.__module__}.{kind.__name__}: loss {losses[0]:.4f} to {losses[-1]:.4f}, saved and loaded")
