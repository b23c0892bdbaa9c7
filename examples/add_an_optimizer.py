"""The optimizers of my_optimizers.py under ZeRO-2 and FSDP2: started from AdamW, checkpointed, taken up by other ranks.

    torchrun --nproc_per_node 2 examples/add_an_optimizer.py --save runs/added
    torchrun --nproc_per_node 1 examples/add_an_optimizer.py --resume runs/added

No accelerator is needed. Both print the losses of the same steps.
"""

import argparse
import json
import os
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import my_optimizers  # registers Signum and Spectral
import torch
import torch.distributed as dist
from tiny import tiny_llama, windows
from torch.distributed.fsdp import fully_shard

import ds_optim.checkpoint
from ds_optim.checkpoint.warm_start import warm_start
from ds_optim.memory.estimate import Request, predict

SETTINGS = {"lr": 1e-3, "weight_decay": 0.1}


def zero_2(cls: type[Any]) -> tuple[Any, Any]:
    """An engine whose JSON names the optimizer."""
    config = {
        "train_batch_size": 8,
        "zero_optimization": {"stage": 2},
        "optimizer": {"type": cls.__name__, "params": SETTINGS},
    }
    engine, *_ = deepspeed.initialize(model=tiny_llama(), config=config)
    return engine, None


def fsdp2(cls: type[Any]) -> tuple[Any, Any]:
    """A model that is sharded by torch, and the optimizer over it."""
    model = tiny_llama()
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    return model, cls(model.named_parameters(), roles=model, **SETTINGS)


def losses(model: Any, optimizer: Any, steps: range) -> list[float]:
    """Train on the same sequences whatever the number of ranks; the mean loss of each step."""
    found = []
    for step in steps:
        mine = windows(64)[8 * step :][:8][dist.get_rank() :: dist.get_world_size()]
        batch = {key: torch.stack([one[key] for one in mine]) for key in mine[0]}
        loss = model(**batch).loss
        if optimizer is None:
            model.backward(loss)
            model.step()
        else:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        mean = loss.detach().clone()
        dist.all_reduce(mean, dist.ReduceOp.AVG if dist.get_backend() == "nccl" else dist.ReduceOp.SUM)
        found.append(round(mean.item() / dist.get_world_size(), 3))
    return found


def adamw_state() -> tuple[dict[str, Any], list[str]]:
    """The state of an AdamW of torch's after two steps of the same model, and the names in its order."""
    model = tiny_llama()
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(2):
        batch = {key: torch.stack([one[key] for one in windows(8)]) for key in windows(1)[0]}
        model(**batch).loss.backward()
        adamw.step()
        adamw.zero_grad()
    return adamw.state_dict(), [name for name, _ in model.named_parameters()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", help="start from AdamW, take two steps, save here, and take two more")
    parser.add_argument("--resume", help="take the last two steps from what was saved here")
    arguments = parser.parse_args()
    deepspeed.init_distributed("gloo")
    report: dict[str, Any] = {}
    for cls in (my_optimizers.Signum, my_optimizers.Spectral):
        for strategy in (zero_2, fsdp2):
            model, optimizer = strategy(cls)
            tag = f"{cls.__name__}_{strategy.__name__}"
            if arguments.save:
                state, names = adamw_state()
                warm_start(state, model, optimizer, names=names)
                losses(model, optimizer, range(2))
                ds_optim.checkpoint.save(arguments.save, model, optimizer, tag=tag)
            else:
                ds_optim.checkpoint.load(arguments.resume, model, optimizer, tag=tag)
            report[tag] = losses(model, optimizer, range(2, 4))
        config = tiny_llama().config.to_dict()
        predicted = predict(Request(config, "tiny", cls.__name__, stage=2, world_size=8, states_only=True))
        state = sum(one.bytes for rank in predicted.ranks for one in rank.state)
        report[f"{cls.__name__}, bytes of state over 8 ranks"] = state
    if dist.get_rank() == 0:
        print(json.dumps(report))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
