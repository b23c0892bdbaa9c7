"""What one parameter can be: the data that every rule about parameters is stated in.

Only data and arithmetic on shapes. How a role is found is ``__init__.py`` (and the evidence in ``evidence.py``); what
an optimizer makes of it, such as Adam-mini's blocks, is the optimizer's business.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

Kind = Literal[
    "embedding",
    "head",
    "query",
    "key",
    "value",
    "attention_output",
    "mlp",
    "router",
    "norm",
    "bias",
    "conv",
    "fused",
    "linear",
    "other",
]
KINDS: tuple[str, ...] = get_args(Kind)
PER_HEAD: tuple[str, ...] = ("query", "key")
"""Kinds whose output dimension is made of attention heads, each of which the loss sees by itself."""
WITH_HEADS: tuple[str, ...] = (*PER_HEAD, "value")
"""All kinds whose output dimension is made of attention heads."""

Source = Literal["module", "config", "name", "override", "fallback"]


@dataclass(frozen=True, slots=True)
class Part:
    """A slice along the output dimension of a fused weight.

    Attributes:
        kind: what the slice would be as a weight of its own.
        size: positions along the output dimension.
    """

    kind: Kind
    size: int


@dataclass(frozen=True, slots=True)
class Role:
    """What a parameter is, and how its dimensions are to be read.

    Attributes:
        kind: see ``Kind``. "linear" is a matrix of known orientation but no special place; "other" is not understood.
        output_dim: the dimension that indexes output neurons (tokens, for an embedding): 0 for ``nn.Linear`` (out, in),
            1 for GPT-2's Conv1D (in, out), 1 for stacked experts (E, out, in), 2 for (E, in, out).
        batch_dims: leading dimensions that stack independent matrices (experts).
        head_dim: output positions per attention head, where the weight or some of its parts is a query, a key or a
            value.
        parts: for "fused": the slices in order; their sizes add up to the output dimension.
        source: the evidence: the "module" itself, the model's "config", an attribute "name", the user's "override",
            or "fallback" where there was none.
        decays: False where the model says that weight decay should leave the parameter alone, whatever its kind.
    """

    kind: Kind
    output_dim: int = 0
    batch_dims: int = 0
    head_dim: int | None = None
    parts: tuple[Part, ...] = ()
    source: Source = "module"
    decays: bool = True

    @property
    def is_understood(self) -> bool:
        """Whether the blocks of a blockwise rule follow from this role (of a matrix; 1-D tensors need nothing more)."""
        if self.kind in PER_HEAD:
            return self.head_dim is not None
        if self.kind == "fused":
            return bool(self.parts)
        return self.kind != "other"


def is_decay_exempt(role: Role) -> bool:
    """Whether weight decay should leave the parameter alone: norms, biases, and what the model says."""
    return role.kind in ("norm", "bias") or not role.decays


def contradictions(role: Role, shape: tuple[int, ...]) -> list[str]:
    """Every reason why a parameter of this shape cannot have this role; empty if it can.

    A bias, a norm and a tensor of fewer than two dimensions have no output dimension to contradict.
    """
    if role.kind in ("bias", "norm") or len(shape) < 2:
        return []
    if not 0 <= role.output_dim < len(shape):
        return [f"output_dim {role.output_dim} does not exist in shape {shape}"]
    found = []
    if not 0 <= role.batch_dims <= role.output_dim:
        found.append(f"batch_dims {role.batch_dims} must lie between 0 and output_dim {role.output_dim}")
    rows = shape[role.output_dim]
    sizes = [part.size for part in role.parts]
    if role.parts and role.kind != "fused":
        found.append(f'parts need kind "fused", not "{role.kind}"')
    if any(size <= 0 for size in sizes):
        found.append(f"parts must have positive sizes, got {sizes}")
    if role.kind == "fused" and role.parts and sum(sizes) != rows:
        found.append(f"parts add up to {sum(sizes)}, the output dimension has {rows}")
    if role.head_dim is not None:
        if role.head_dim <= 0:
            found.append(f"head_dim {role.head_dim} is not positive")
        else:
            split = {part.size for part in role.parts if part.kind in PER_HEAD}
            whole = {rows} if role.kind in WITH_HEADS else set()
            found += [
                f"head_dim {role.head_dim} does not divide the {size} output rows"
                for size in sorted(split | whole)
                if size % role.head_dim
            ]
    return found


def is_vector(shape: tuple[int, ...]) -> bool:
    """Whether at most one dimension is longer than one: a vector or a number, however it is shaped."""
    return sum(size != 1 for size in shape) <= 1


def matrix_view(role: Role, shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    """The parameter as ``(batch, reduce, axis, inner)``, read without moving an element.

    ``axis`` is the output dimension, ``batch`` counts independent matrices, ``reduce`` and ``inner`` are the inputs.
    """
    batch, output = role.batch_dims, role.output_dim
    return math.prod(shape[:batch]), math.prod(shape[batch:output]), shape[output], math.prod(shape[output + 1 :])
