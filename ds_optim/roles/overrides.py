"""Roles that a user states by pattern, and roles by name for when there is nothing else.

Both see names and shapes only, never a module.
"""

from collections.abc import Mapping
from dataclasses import fields, replace
from fnmatch import fnmatchcase
from typing import Any

from ds_optim.roles.attribute_names import (
    FUSED,
    GAINS,
    HEAD,
    KEY,
    MLP,
    OUTPUT,
    QUERY,
    ROUTER,
    TOKENS,
    VALUE,
    VECTORS,
    adapter_part,
    is_bias,
)
from ds_optim.roles.role import KINDS, Kind, Part, Role, contradictions

_KEYS = tuple(field.name for field in fields(Role) if field.name not in ("source", "decays"))
_AMBIGUOUS = frozenset({"c_attn", "c_proj", "c_fc"})
"""Names that GPT-2 uses for (in, out) weights and others for (out, in) ones."""

Shapes = Mapping[str, tuple[int, ...]]


def override_roles(base: Mapping[str, Role], patterns: Mapping[str, Any], shapes: Shapes) -> dict[str, Role]:
    """Roles with a user's corrections, in the order that they are written: the first pattern that matches a name wins.

    Args:
        base: the role of every parameter, by canonical name.
        patterns: shell-style patterns on whole names, such as ``"*.wq.weight"``, each with a kind (``"mlp"``), a
            `Role`, or an object with any of the keys kind, output_dim, batch_dims, head_dim and parts (a list of
            ``[kind, size]``). A kind or an object changes what it states and keeps the rest, except that a stated kind
            drops the parts.
        shapes: logical shape of every parameter, by the same names.

    Raises:
        ValueError: every pattern that matches nothing or is shadowed by earlier ones, every unknown kind or key, every
            contradiction with a shape, in one message.
    """
    problems: list[str] = []
    roles = dict(base)
    claimed: dict[str, str] = {}
    for pattern, value in patterns.items():
        # A plain name needs no search: with the result of infer_roles as patterns, there is one per parameter.
        matches = [pattern] if pattern in roles else [name for name in roles if fnmatchcase(name, pattern)]
        fresh = [name for name in matches if name not in claimed]
        if not matches:
            problems.append(f'"{pattern}" matches no parameter (names look like "{next(iter(roles), "")}")')
        elif not fresh:
            earlier = sorted({claimed[name] for name in matches})
            problems.append(f'"{pattern}" matches only what earlier patterns claim: {earlier}; put it before them')
        claimed.update(dict.fromkeys(fresh, pattern))
        faults, changes = _changes(value)
        problems += [f'"{pattern}": {fault}' for fault in faults]
        if faults:
            continue
        for name in fresh:
            roles[name] = replace(roles[name], **changes, source="override")
            problems += [f'"{pattern}" on {name}: {fault}' for fault in contradictions(roles[name], shapes[name])]
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise ValueError(
            f"the roles cannot be used:\n{listed}\n"
            "Patterns are matched against whole names (* stands for anything), the first that matches wins; a role is "
            f"one of {', '.join(KINDS)}, or an object with keys from {', '.join(_KEYS)}."
        )
    return roles


def _changes(value: Any) -> tuple[list[str], dict[str, Any]]:
    """What is wrong with a user's role, and the attributes that it sets."""
    if isinstance(value, Role):
        return [], {key: getattr(value, key) for key in (*_KEYS, "decays")}
    if isinstance(value, str):
        value = {"kind": value}
    if not isinstance(value, Mapping):
        return [f"a role is a kind or an object, not {value!r}"], {}
    faults = [f'unknown key "{key}"' for key in value if key not in _KEYS]
    changes = {key: item for key, item in value.items() if key in _KEYS}
    if "kind" in changes:
        changes.setdefault("parts", ())
        if changes["kind"] not in KINDS:
            faults.append(f"unknown kind {changes['kind']!r}")
    for key in ("output_dim", "batch_dims", "head_dim"):
        if key in changes and (isinstance(changes[key], bool) or not isinstance(changes[key], int)):
            faults.append(f"{key} must be an integer, not {changes[key]!r}")
    if changes.get("parts"):
        changes.setdefault("kind", "fused")
        try:
            parts = tuple(Part(kind, int(size)) for kind, size in changes["parts"])
        except (TypeError, ValueError):
            return [*faults, f"parts must be a list of [kind, size], not {changes['parts']!r}"], {}
        faults += [f"unknown kind {part.kind!r} of a part" for part in parts if part.kind not in KINDS]
        changes["parts"] = parts
    return faults, changes


def roles_from_names(shapes: Shapes) -> dict[str, Role]:
    """What names and shapes alone can tell: enough for most blocks, but not how many rows a head has."""
    return {name: _role_by_name(name, shape) for name, shape in shapes.items()}


def _role_by_name(name: str, shape: tuple[int, ...]) -> Role:
    *path, leaf = name.split(".")
    part = None if is_bias(leaf) else adapter_part(path)
    if part == "lora_embedding_A":
        return Role("embedding", output_dim=1, source="name")
    if part == "trainable_tokens_delta":
        return Role("embedding", source="name")
    if part == "lora_magnitude_vector":
        return Role("norm", source="name")
    if part == "lora_B":  # it has the output rows of the weight that it adapts
        kind = _kind_by_name(".".join([*path[: path.index(part)], "weight"]), shape)
        return Role("linear" if kind == "other" and len(shape) == 2 else kind, source="name")
    if part is not None:
        return Role("linear" if len(shape) == 2 else "other", source="name")
    return Role(_kind_by_name(name, shape), source="name")


def _kind_by_name(name: str, shape: tuple[int, ...]) -> Kind:
    *path, leaf = name.split(".")
    known = path[-1] if path and leaf == "weight" else leaf
    if is_bias(leaf):
        return "bias"
    if len(shape) < 2:
        return "norm" if leaf == "weight" or leaf in GAINS else "other"
    if len(shape) > 2 or known in _AMBIGUOUS:
        return "other"
    kinds: tuple[tuple[frozenset[str], Kind], ...] = (
        (QUERY, "query"),
        (KEY, "key"),
        (VALUE, "value"),
        (FUSED, "fused"),
        (TOKENS | VECTORS, "embedding"),
        (HEAD, "head"),
        (MLP, "mlp"),
        (ROUTER, "router"),
        (OUTPUT, "attention_output"),
    )
    return next((kind for names, kind in kinds if known in names), "other")
