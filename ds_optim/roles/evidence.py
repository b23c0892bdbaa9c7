"""Evidence for a role: the module that holds a parameter, its neighbours, and the modules around it.

Module types decide first. Within an attention or feed-forward module, which projection is which is a matter of
attribute names, compared whole. What is not recognised is answered with "other" and the source "fallback".
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.weight_norm import WeightNorm

from ds_optim.roles.attention_heads import (
    children,
    fused_parts,
    head_dim_of,
    is_attention,
    value_head_dim_of,
    width_of,
)
from ds_optim.roles.attribute_names import (
    FUSED,
    GAINS,
    HEAD,
    KEY,
    KEY_VALUE,
    MLP,
    OUTPUT,
    QUERY,
    ROUTER,
    VALUE,
    VECTORS,
    adapter_part,
    is_bias,
)
from ds_optim.roles.role import Kind, Part, Role, Source, contradictions, is_vector

_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer")

_MLP_CLASSES = ("MLP", "Mlp", "FeedForward", "FFN", "ActDense", "Intermediate", "Experts")
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase, nn.RMSNorm)
_TRANSPOSED_CONVS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ParameterPlace:
    """Where a parameter sits: its attribute name, and the modules from the model down to the one that holds it.

    Attributes:
        leaf: the parameter's attribute in its module, for instance "weight".
        modules: ``(attribute, module)`` from the model ("", model) to the holder; wrappers are left out, so that a
            projection under LoRA still is called "q_proj" and sits in its attention module.
        shapes: logical shape of a parameter of the model, by identity of the parameter.
    """

    leaf: str
    modules: tuple[tuple[str, nn.Module], ...]
    shapes: dict[int, Shape]

    @property
    def holder(self) -> nn.Module:
        return self.modules[-1][1]

    @property
    def holder_name(self) -> str:
        return self.modules[-1][0]

    @property
    def around(self) -> tuple[nn.Module, ...]:
        """The modules around the holder, nearest first."""
        return tuple(module for _, module in reversed(self.modules[:-1]))


def wrappers_of(path: Sequence[str]) -> list[bool]:
    """Which attributes on the way from a model to a parameter belong to a wrapper and not to the user's model.

    At the start ``module`` (DDP, DeepSpeed), then ``base_model.model`` (PEFT); anywhere those under which
    `torch.compile`, FSDP1, activation checkpointing and PEFT's layers put the module that they wrap.
    """
    start = 0
    while path[start : start + 1] == ["module"]:
        start += 1
    if path[start : start + 2] == ["base_model", "model"]:
        start += 2
    return [index < start or attribute in _WRAPPERS for index, attribute in enumerate(path)]


def place_of(model: nn.Module, name: str, shapes: dict[int, Shape]) -> ParameterPlace:
    """Walks a parameter's name as ``named_parameters`` spells it."""
    *path, leaf = name.split(".")
    modules = [("", model)]
    module = model
    for index, (attribute, is_wrapper) in enumerate(zip(path, wrappers_of(path), strict=True)):
        # A module that adds nothing but its own type to one linear map, such as MoshiLinear.
        is_box = attribute == "linear" and list(module._modules) == ["linear"] and not module._parameters
        module = module._modules[attribute]  # type: ignore[assignment]
        # PEFT's copy of a whole module that is trained: modules_to_save, and in it one per adapter.
        is_copy = attribute in ("original_module", "modules_to_save") or path[index - 1 : index] == ["modules_to_save"]
        if is_wrapper or is_copy or is_box:
            modules[-1] = (modules[-1][0], module)
        else:
            modules.append((attribute, module))
    return ParameterPlace(leaf, tuple(modules), shapes)


def unwrapped(module: nn.Module) -> nn.Module:
    """The module that wrappers around it wrap."""
    while inner := [one for key, one in module._modules.items() if key in _WRAPPERS and one is not None]:
        module = inner[0]
    return module


def claim(place: ParameterPlace, shape: Shape) -> Role:
    """The role of one parameter by what its place says; "other" with the source "fallback" if nothing speaks."""
    of_tensor = _reparametrized(place)
    if of_tensor is not None:
        tensor, is_length = of_tensor
        return Role("norm") if is_length else claim(tensor, shape)
    names = [attribute for attribute, _ in place.modules]
    part = None if is_bias(place.leaf) else adapter_part(names)
    claims = _claims(place, shape) if part is None else _adapter(place, names.index(part), part, shape)
    for role in claims:
        if not contradictions(role, shape):
            return role
    return Role("other", source="fallback")


def is_spared(place: ParameterPlace, parameter: Tensor) -> bool:
    """Whether the model says that weight decay should leave a parameter alone.

    By the mark that Mamba's authors put on it, ``_no_weight_decay``, or because it is what they put it on:
    transformers' state-space models have the same parameters without the mark. Decay would pull every time constant,
    -exp(A_log), towards -1.
    """
    is_state_space = place.leaf == "A_log" or (place.leaf == "D" and "A_log" in place.holder._parameters)
    return is_state_space or bool(getattr(parameter, "_no_weight_decay", False))


def _reparametrized(place: ParameterPlace) -> tuple[ParameterPlace, bool] | None:
    """The tensor that a parameter is made into, and whether the parameter is only its length (weight norm's g).

    None if the parameter is a tensor of the module itself, or one of several of which only the parametrization knows
    what they are. ``torch.nn.utils.weight_norm`` of old puts ``weight_g`` and ``weight_v`` where ``weight`` was.
    """
    leaf, holder = place.leaf, place.holder
    if isinstance(holder, ParametrizationList):
        is_weight_norm = type(holder[0]).__name__ == "_WeightNorm"
        if leaf == "original" or is_weight_norm:
            return replace(place, leaf=place.holder_name, modules=place.modules[:-2]), leaf == "original0"
    for hook in holder._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm) and leaf in (f"{hook.name}_g", f"{hook.name}_v"):
            return replace(place, leaf=hook.name), leaf.endswith("_g")
    return None


def _claims(place: ParameterPlace, shape: Shape) -> Iterator[Role]:
    leaf, holder = place.leaf, place.holder
    if is_bias(leaf):
        yield Role("bias")
    elif is_norm(holder):
        yield Role("norm")
    elif isinstance(holder, nn.Embedding | nn.EmbeddingBag):
        yield Role("embedding")
    elif isinstance(holder, nn.modules.conv._ConvNd):
        yield Role("conv", output_dim=int(isinstance(holder, _TRANSPOSED_CONVS)))
    elif isinstance(holder, nn.MultiheadAttention):
        yield from _projection(
            place, leaf.removesuffix("_weight") if leaf != "in_proj_weight" else leaf, shape, 0, holder
        )
    elif leaf == "weight" and (output_dim := _output_dim(holder, shape)) is not None:
        yield from _projection(place, place.holder_name, shape, output_dim, *place.around[:1])
    elif len(shape) == 3 and (stack := _expert_stack(place, shape)):
        yield stack
    elif leaf in VECTORS or "Embedding" in type(holder).__name__:
        yield Role("embedding", max(0, len(shape) - 2), max(0, len(shape) - 2), source="name")
    elif leaf in GAINS and is_vector(shape):
        yield Role("norm", source="name")
    elif isinstance(holder, nn.RNNBase | nn.RNNCellBase | nn.Bilinear):
        yield Role("linear")


def _adapter(place: ParameterPlace, index: int, part: str, shape: Shape) -> Iterator[Role]:
    """Claims on what PEFT puts beside the weight of the module before ``index`` in a place's modules.

    A weight of (out, in) gets an update B A. A, (rank, in), is a linear map to a few directions. B, (out, rank), has
    the output rows of the weight, and so its heads, parts and kind. An embedding's A is (rank, tokens).
    """
    if part == "lora_magnitude_vector":
        yield Role("norm", source="name")
    elif part == "trainable_tokens_delta":
        yield Role("embedding", source="name")
    elif part == "lora_embedding_A":
        yield Role("embedding", output_dim=1, source="name")
    elif isinstance(place.holder, nn.modules.conv._ConvNd):
        yield Role("conv")
    else:
        if part == "lora_B":
            yield from _rows_of_adapted(place, index, shape)
        yield Role("linear", source="name")


def _rows_of_adapted(place: ParameterPlace, index: int, shape: Shape) -> Iterator[Role]:
    """The role of the adapted weight, for a matrix (out, rank) that has its output rows."""
    name, module = place.modules[index - 1]
    adapted = unwrapped(module)
    for leaf in ("weight", "in_proj_weight"):  # the latter of nn.MultiheadAttention
        weight = _weight_shape(place, adapted, leaf)
        if len(weight) == 2:
            base = claim(ParameterPlace(leaf, (*place.modules[: index - 1], (name, adapted)), place.shapes), weight)
            if weight[base.output_dim] == shape[0]:
                yield replace(base, output_dim=0)


def _weight_shape(place: ParameterPlace, module: nn.Module, leaf: str = "weight") -> Shape:
    """The logical shape of a module's weight. A quantised one is packed into integers or buffers: its sizes tell."""
    weight = module._parameters.get(leaf)
    sizes: tuple[Any, Any] = (getattr(module, "out_features", None), getattr(module, "in_features", None))
    is_packed = weight is None or not weight.is_floating_point()
    if leaf == "weight" and is_packed and all(isinstance(size, int) for size in sizes):
        return sizes
    return place.shapes.get(id(weight), ())


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalises: torch's classes, and by the names that models give to their own."""
    name = type(module).__name__
    return isinstance(module, _NORMS) or name.endswith("Norm") or "RMSNorm" in name or "LayerNorm" in name


def _output_dim(module: nn.Module, shape: Shape) -> int | None:
    """The output dimension of a module's matrix, or None if the module is no known kind of linear map."""
    name = type(module).__name__
    if len(shape) != 2:
        return None
    if isinstance(module, nn.Linear) or "Router" in name:
        return 0
    if name == "Conv1D" and hasattr(module, "nf"):  # transformers', as in GPT-2: (in, out)
        return 1
    sizes = (getattr(module, "out_features", None), getattr(module, "in_features", None))
    return 0 if sizes == shape else None


def _projection(
    place: ParameterPlace, name: str, shape: Shape, output_dim: int, parent: nn.Module | None = None
) -> Iterator[Role]:
    """Claims on the matrix that ``parent`` knows by ``name``, the best first."""
    linear = Role("linear", output_dim)
    if parent is None:
        yield linear
        return
    siblings = children(parent)
    ancestors = [parent, *(module for module in place.around if module is not parent)]
    if is_attention(parent):
        yield from _attention(place, name, shape, linear, ancestors)
    if _is_router(name, place, siblings):
        yield replace(linear, kind="router")
    if name == "gate_up_proj":
        yield _halves(linear, shape)
    if name in MLP or siblings & MLP or any(part in type(parent).__name__ for part in _MLP_CLASSES):
        yield replace(linear, kind="mlp")
    outer = ancestors[1] if len(ancestors) > 1 else None
    if name in OUTPUT and outer is not None:  # BERT keeps the last projection of each half in a module of its own
        if "Attention" in type(outer).__name__:
            yield replace(linear, kind="attention_output")
        if "intermediate" in children(outer):
            yield replace(linear, kind="mlp")
    if name in HEAD and parent is place.modules[0][1]:
        yield replace(linear, kind="head", source="name")
    yield linear


def _attention(
    place: ParameterPlace, name: str, shape: Shape, linear: Role, ancestors: Sequence[nn.Module]
) -> Iterator[Role]:
    rows = shape[linear.output_dim]
    if name in FUSED | KEY_VALUE:
        found = fused_parts(ancestors, name, rows)
        if found is None:
            yield replace(linear, kind="fused", source="fallback")
        else:
            yield replace(linear, kind="fused", parts=found[0], head_dim=found[1], source=found[2])
    elif name in QUERY or name in KEY:
        kind: Kind = "query" if name in QUERY else "key"
        head_dim = head_dim_of(ancestors, rows, _query_rows(place, ancestors[0]))
        if head_dim is None:
            yield replace(linear, kind=kind, source="fallback")
        else:
            yield replace(linear, kind=kind, head_dim=head_dim[0], source=head_dim[1])
    elif name in VALUE:
        head_rows = value_head_dim_of(ancestors, rows, _query_rows(place, ancestors[0]))
        yield replace(linear, kind="value", head_dim=head_rows)
    elif name in OUTPUT:
        yield replace(linear, kind="attention_output")


def _query_rows(place: ParameterPlace, attention: nn.Module) -> int | None:
    """Output rows of the query's weight in an attention module, where it has one of its own."""
    for name in children(attention) & QUERY:
        module = attention._modules.get(name)
        if module is None:
            continue
        module = unwrapped(module)
        shape = _weight_shape(place, module)
        output_dim = _output_dim(module, shape)
        if output_dim is not None:
            return shape[output_dim]
    return None


def _is_router(name: str, place: ParameterPlace, siblings: set[str]) -> bool:
    classes = (type(place.holder).__name__, *(type(module).__name__ for module in place.around[:1]))
    return any("Router" in name for name in classes) or (
        name in ROUTER and any(sibling in siblings for sibling in ("experts", "shared_expert"))
    )


def _halves(linear: Role, shape: Shape) -> Role:
    """A gate and an up projection one after the other."""
    half, odd = divmod(shape[linear.output_dim], 2)
    if odd:
        return replace(linear, kind="mlp")
    return replace(linear, kind="fused", parts=(Part("mlp", half), Part("mlp", half)))


def _expert_stack(place: ParameterPlace, shape: Shape) -> Role | None:
    """A stack of experts, (E, out, in) or (E, in, out), if the module says which; None if it does not."""
    holder = place.holder
    if "Experts" not in type(holder).__name__ and getattr(holder, "num_experts", None) != shape[0]:
        return None
    transposed, source = _is_transposed(place, shape)
    if transposed is None:
        return None
    stack = Role("mlp", output_dim=2 if transposed else 1, batch_dims=1, source=source)
    # GPT-OSS takes gate and up from alternate rows: nothing to cut in two.
    if place.leaf == "gate_up_proj" and getattr(holder, "is_concatenated", True):
        return _halves(stack, shape)
    return stack


def _is_transposed(place: ParameterPlace, shape: Shape) -> tuple[bool | None, Source]:
    """Whether a stack is (E, in, out), by what the module states, else by how sizes and stacks fit together."""
    holder = place.holder
    stated = getattr(holder, "is_transposed", None)  # transformers' experts say so
    if isinstance(stated, bool):
        return stated, "module"
    if type(holder).__name__.endswith("ParallelExperts"):  # Granite's and JetMoE's: (E, out, in)
        return False, "module"
    stacks = {name: place.shapes.get(id(p), ()) for name, p in holder._parameters.items() if p is not None}
    up, down = stacks.get("gate_up_proj", ()), stacks.get("down_proj", ())
    if len(up) == 3 and len(down) == 3:
        plain = up[2] == down[1] and up[1] == 2 * down[2]
        transposed = up[1] == down[2] and up[2] == 2 * down[1]
        if plain != transposed:
            return transposed, "module"
    hidden = width_of((holder, *place.around))
    if shape.count(hidden or 0) == 1 and place.leaf in MLP:
        is_down = place.leaf in ("down_proj", "w2")
        return (shape[1] == hidden) != is_down, "config"
    return None, "fallback"
