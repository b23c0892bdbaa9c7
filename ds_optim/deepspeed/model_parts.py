"""What of the whole model the ranks of an engine have: stages of a pipeline, experts.

Each rank has some of the experts of a `deepspeed.moe` layer, which it calls by their numbers among its own. In the
whole model's names they have their numbers among all, as in DeepSpeed's checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from ds_optim.roles import canonical_name, infer_roles
from ds_optim.roles.role import Role

_LAYER = "MOELayer"  # of deepspeed.moe: a gate, and the experts of this rank
_EXPERTS = "experts.deepspeed_experts"


def is_apart(engine: Any) -> bool:
    """Whether ranks of an engine step different parameters."""
    return bool(engine.pipeline_parallelism or engine.has_moe_layers)


def has_unknown_parts(engine: Any) -> bool:
    """Whether an mpu of the user's may have cut parameters in a way that nobody says; a pipeline's stages cut none."""
    stages = engine.mpu.get_pipe_parallel_world_size() if engine.pipeline_parallelism else 1
    return bool(engine.mp_world_size > stages)


def names_in(model: nn.Module) -> dict[Tensor, str]:
    """What every parameter of an engine's model is called in the whole model."""
    renamed = _renamed(model)
    return {parameter: renamed.get(name, canonical_name(name)) for name, parameter in model.named_parameters()}


def roles_in(model: nn.Module) -> dict[str, Role]:
    """The role of every parameter of an engine's model, by its name in the whole model."""
    whole = {canonical_name(name): new for name, new in _renamed(model).items()}
    return {whole.get(name, name): role for name, role in infer_roles(model).items()}


def group_of(parameter: Tensor, groups: Mapping[str, dist.ProcessGroup]) -> dist.ProcessGroup | None:
    """The ranks that have the same expert; None for what is no expert's.

    Args:
        parameter: of a model, or its fp32 master.
        groups: an engine's expert data-parallel groups, by name.
    """
    marked: Any = parameter
    return None if getattr(marked, "allreduce", True) else groups[marked.group_name]


def _renamed(model: nn.Module) -> dict[str, str]:
    """Names of the whole model for the parameters of experts, by their raw names."""
    found = dict[str, str]()
    for prefix, module in model.named_modules():
        if type(module).__name__ == _LAYER:
            layer: Any = module
            first = dist.get_rank(layer.ep_group) * layer.num_local_experts if layer.ep_group is not None else 0
            head = f"{prefix}.{_EXPERTS}." if prefix else f"{_EXPERTS}."
            for name, _ in module.named_parameters():
                if name.startswith(f"{_EXPERTS}."):
                    number, _, rest = name.removeprefix(f"{_EXPERTS}.").partition(".")
                    found[f"{prefix}.{name}".lstrip(".")] = canonical_name(f"{head}{first + int(number)}.{rest}")
    return found
