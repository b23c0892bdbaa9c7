"""What of the whole model the ranks of an engine have: stages of a pipeline, experts, slices of tensor parallelism.

Each rank has some of the experts of a `deepspeed.moe` layer, which it calls by their numbers among its own. In the
whole model's names they have their numbers among all, as in DeepSpeed's checkpoints. AutoTP's layers say of their
parameters how they were cut; AutoEP's have a part of each stack of experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor, nn

from ds_optim.roles import canonical_name, infer_roles, logical_shape
from ds_optim.roles.role import Role
from ds_optim.sharding.boxes import Box, between

_LAYER = "MOELayer"  # of deepspeed.moe: a gate, and the experts of this rank
_EXPERTS = "experts.deepspeed_experts"


_SLICED = "ds_autotp_universal_checkpoint_meta"  # of a parameter: how AutoTP cut it
_EXPERT_LAYER = "AutoEPMoELayer"  # a router, and the stacks of this rank's experts
_SLICED_LAYERS = (
    *("LinearLayer", "LinearAllreduce", "LinearAllreduceWithReplicatedInput", "LmHeadLinearAllreduce"),
    *("VocabParallelLinear", "VocabParallelEmbedding", "HiddenParallelEmbedding"),
    *("SubParamLinearLayer", "fused_LinearLayer", "GateUpPack_LinearLayer"),
)
"""Layers of AutoTP that hold rows or columns of each weight, or rows of each of its parts, as they say. Others
interleave parts of it, or turn it round without a word."""
_DIVIDED = (
    *("n_heads", "inner_dim", "num_heads", "num_kv", "num_attention_heads", "num_attn_heads", "all_head_size"),
    *("embed_dim", "hidden_size", "num_key_value_heads", "num_kv_heads", "kv_n_heads", "d_model"),
)
"""What AutoTP divides in modules by its ranks; their configs keep the whole numbers."""


def is_apart(engine: Any) -> bool:
    """Whether ranks of an engine step different parameters."""
    return bool(engine.pipeline_parallelism or _renamed(engine.module))


def has_unknown_parts(engine: Any) -> bool:
    """Whether parameters may be cut in a way that nobody says: by AutoTP's rarer layers, under an mpu of the user's."""
    stages = engine.mpu.get_pipe_parallel_world_size() if engine.pipeline_parallelism else 1
    known = max(stages, tensor_parallel_size(engine))
    return bool(engine.mp_world_size > known or unknown_slices(engine.module))


def tensor_parallel_size(engine: Any) -> int:
    """Over how many ranks AutoTP has cut an engine's model."""
    return int(engine.autotp_size())


class Slices(NamedTuple):
    """How a parameter of the whole model is cut.

    Attributes:
        whole: its shape.
        boxes: what every rank of a group has of it, see `ds_optim.sharding.layout.Boxed`.
        rank: this process's in that group.
        experts: the name of DeepSpeed's group of ranks that share its experts; empty: tensor parallelism cuts it.
    """

    whole: tuple[int, ...]
    boxes: tuple[tuple[Box, ...], ...]
    rank: int
    experts: str = ""


def slices_in(model: nn.Module) -> dict[Tensor, Slices]:
    """The parameters that AutoTP or AutoEP has cut, as their layers say."""
    found = dict[Tensor, Slices]()
    rank = int(next((vars(module)["tp_index"] for module in model.modules() if "tp_index" in vars(module)), 0))
    for parameter in model.parameters():
        sliced = getattr(parameter, _SLICED, None) or {}
        sizes, dim, shape = sliced.get("partition_sizes"), sliced.get("partition_dim"), sliced.get("logical_shape")
        stripes = sliced.get("sub_param_shard_widths")
        if stripes and dim == 0 and shape:
            found[parameter] = Slices(tuple(shape), _striped(shape, stripes), rank)
        elif sizes and dim is not None and shape and not stripes:
            found[parameter] = Slices(tuple(shape), _boxes(shape, dim, sizes), rank)
    for module in model.modules():
        if type(module).__name__ == _EXPERT_LAYER:
            layer: Any = module
            sizes = [layer.num_local_experts] * layer.ep_size
            for parameter in layer.experts.parameters():
                shape = (layer.num_experts, *logical_shape(parameter)[1:])
                found[parameter] = Slices(
                    shape, _boxes(shape, 0, sizes), dist.get_rank(layer.ep_group), layer.ep_group_name
                )
    return found


def shapes_in(model: nn.Module) -> dict[Tensor, tuple[int, ...]]:
    """The shapes that an engine's parameters have in the whole model."""
    slices = slices_in(model)
    return {one: slices[one].whole if one in slices else logical_shape(one) for one in model.parameters()}


def _boxes(shape: Sequence[int], dim: int, sizes: Sequence[int]) -> tuple[tuple[Box, ...], ...]:
    """One box for each rank."""
    return tuple((between(shape, dim, low, high),) for low, high in pairwise([0, *accumulate(sizes)]))


def _striped(shape: Sequence[int], widths: Sequence[Sequence[int]]) -> tuple[tuple[Box, ...], ...]:
    """Rows of each of several parts, which stand one behind the other: ``widths[part][rank]`` of them."""
    edges = [0, *accumulate(width for part in widths for width in part)]
    ranks = len(widths[0])
    return tuple(
        tuple(between(shape, 0, *edges[part * ranks + rank :][:2]) for part in range(len(widths)))
        for rank in range(ranks)
    )


def unknown_slices(model: nn.Module) -> list[str]:
    """The names of parameters that tensor parallelism has cut in a way that is not known here."""
    unknown, slices = set[Tensor](), slices_in(model)
    for module in model.modules():
        names = {kind.__name__ for kind in type(module).__mro__}
        if type(module).__name__ not in _SLICED_LAYERS and names & {"TensorParallel_Layer", "TensorParallelConv2d"}:
            unknown.update(module.parameters(recurse=False))
    for parameter in model.parameters():
        marked = bool(getattr(parameter, "tensor_model_parallel", False))
        boxes = slices[parameter].boxes if parameter in slices else ()
        if marked and not any(_held(its) == logical_shape(parameter) for its in boxes):
            unknown.add(parameter)
    return [name for parameter, name in names_in(model).items() if parameter in unknown]


def partial_gradients(model: nn.Module) -> list[str]:
    """The names of norms that AutoTP left whole behind projections that it cut, and whose gradients nobody adds up."""
    slices, names, found = slices_in(model), names_in(model), list[str]()
    for module in model.modules():
        projection = module._modules.get("q_proj")
        if projection is None or not any(one in slices for one in projection.parameters()):
            continue
        for leaf in ("q_norm", "k_norm", "q_layernorm", "k_layernorm"):
            norm = module._modules.get(leaf)
            for one in norm.parameters() if norm is not None else ():
                if one.requires_grad and one not in slices and not getattr(one, "_ds_grad_allreduce_registered", False):
                    found.append(names[one])
    return found


def _held(boxes: Sequence[Box]) -> tuple[int, ...]:
    """The shape of a local tensor that consists of boxes."""
    first = boxes[0].shape
    return first if len(boxes) == 1 else (sum(box.shape[0] for box in boxes), *first[1:])


def names_in(model: nn.Module) -> dict[Tensor, str]:
    """What every parameter of an engine's model is called in the whole model."""
    name_of = naming(model)
    return {parameter: name_of(name) for name, parameter in model.named_parameters()}


def naming(model: nn.Module) -> Callable[[str], str]:
    """What a parameter or buffer of an engine's model is called in the whole model, by its raw name."""
    renamed = _renamed(model)

    def name_of(name: str) -> str:
        head = next((head for head in renamed if name.startswith(head)), "")
        return canonical_name(renamed.get(head, "") + name.removeprefix(head))

    return name_of


def roles_in(model: nn.Module) -> dict[str, Role]:
    """The role of every parameter of an engine's model, by its name in the whole model."""
    name_of = naming(model)
    whole = {canonical_name(name): name_of(name) for name, _ in model.named_parameters()}
    shapes = shapes_in(model)
    with _as_a_whole(model, shapes):
        return {whole.get(name, name): role for name, role in infer_roles(model, shapes.__getitem__).items()}


@contextmanager
def _as_a_whole(model: nn.Module, shapes: Mapping[Tensor, tuple[int, ...]]) -> Iterator[None]:
    """Let AutoTP's layers say the sizes of the whole, and modules whose numbers it divided say nothing of them; and let
    AutoEP's stacks say that they are (experts, out, in)."""
    changed: list[tuple[nn.Module, str, Any]] = []
    for module in model.modules():
        weight = module._parameters.get("weight")
        if weight is not None and hasattr(weight, _SLICED) and "Embedding" not in type(module).__name__:
            changed += [(module, name, vars(module).get(name)) for name in ("out_features", "in_features")]
            vars(module).update(zip(("out_features", "in_features"), shapes[weight], strict=False))
        if type(module).__name__ == _EXPERT_LAYER:
            stacks: Any = module._modules["experts"]
            changed.append((stacks, "is_transposed", vars(stacks).get("is_transposed")))
            stacks.is_transposed = False
        if vars(module).get("replaced") and any(hasattr(one, _SLICED) for one in module.parameters()):
            changed += [(module, name, vars(module).pop(name)) for name in _DIVIDED if name in vars(module)]
    try:
        yield
    finally:
        for module, name, value in reversed(changed):
            if value is None:
                vars(module).pop(name, None)
            else:
                vars(module)[name] = value


def group_of(parameter: Tensor, groups: Mapping[str, dist.ProcessGroup]) -> dist.ProcessGroup | None:
    """The ranks that have the same expert; None for what is no expert's.

    Args:
        parameter: of a model, or its fp32 master.
        groups: an engine's expert data-parallel groups, by name.
    """
    marked: Any = parameter
    return None if getattr(marked, "allreduce", True) else groups[marked.group_name]


def _renamed(model: nn.Module) -> dict[str, str]:
    """What the names of this rank's experts begin with, and what they do in the whole model."""
    found = dict[str, str]()
    for prefix, module in model.named_modules():
        if type(module).__name__ == _LAYER:
            layer: Any = module
            first = dist.get_rank(layer.ep_group) * layer.num_local_experts if layer.ep_group is not None else 0
            head = f"{prefix}.{_EXPERTS}" if prefix else _EXPERTS
            for number in range(layer.num_local_experts):
                found[f"{head}.{number}."] = f"{head}.{first + number}."
    return found
