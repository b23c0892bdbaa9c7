"""torchtitan's optimizer container with optimizers of ours, on FSDP2: three lines in the place of its table of names.

    torchrun --nproc_per_node 2 examples/tools/torchtitan_train.py

Of torchtitan 0.3, whose container knows Adam, AdamW and its own Muon by name.
"""

import json
from collections.abc import Callable
from typing import Any

import small
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig

from ds_optim import infer_roles
from ds_optim.optimizers.registry import optimizers


class Container(OptimizersContainer):
    """torchtitan's, which also knows ``ds_optim.AdamMini`` and its like."""

    @staticmethod
    def _resolve_optimizer_factory(name: str) -> Callable[..., torch.optim.Optimizer]:
        if not name.startswith("ds_optim."):
            return OptimizersContainer._resolve_optimizer_factory(name)

        def made(groups: list[dict[str, Any]], **options: Any) -> torch.optim.Optimizer:
            # Names go where ours look for them; "fused" and "foreach" choose among torch's own implementations.
            ours = [
                {
                    **{key: value for key, value in group.items() if key not in ("fused", "foreach", "param_names")},
                    "params": list(zip(group["param_names"], group["params"], strict=True)),
                }
                for group in groups
            ]
            return optimizers()[name.removeprefix("ds_optim.")](ours, **options)

        return made


def group(pattern: str, options: dict[str, Any]) -> ParamGroupConfig:
    return ParamGroupConfig(pattern=pattern, optimizer_name="ds_optim.AdamMini", optimizer_kwargs=options)


dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
mesh = init_device_mesh(device.type, (dist.get_world_size(),))
model = small.model().to(device)
roles = infer_roles(model)
for layer in model.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
container = Container(
    Container.Config(
        param_groups=[
            group(r"norm", {"lr": 5e-3, "weight_decay": 0.0}),
            group(r".*", {"lr": 5e-3, "weight_decay": 0.1}),
        ],
        optimizer_factory_kwargs_by_name={"ds_optim.AdamMini": {"roles": roles}},
    ),
    model_parts=[model],
)
tokens = torch.arange(dist.get_rank(), dist.get_rank() + 64, device=device).view(2, 32)
losses = []
for _ in range(6):
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    container.step()
    container.zero_grad()
    losses.append(loss.item())
if dist.get_rank() == 0:
    [optimizer] = container.optimizers
    print(json.dumps({"optimizer": type(optimizer).__name__, "steps": len(losses), "loss": losses}))
dist.destroy_process_group()
