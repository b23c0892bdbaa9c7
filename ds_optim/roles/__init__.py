"""Roles: what each parameter of a model is, by module types and the model's own config, by name only as a last resort.

The public functions. They need shapes only, so they work on the meta device and under ``deepspeed.zero.Init``, whose
parameters are empty until they are gathered.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, TypeVar

from torch import Tensor, nn

from ds_optim.roles.evidence import claim, is_spared, place_of, wrappers_of
from ds_optim.roles.overrides import override_roles, roles_from_names
from ds_optim.roles.role import Kind, Part, Role, contradictions, is_decay_exempt, is_vector

T = TypeVar("T")

__all__ = [
    "Kind",
    "Part",
    "Role",
    "canonical_name",
    "decayed_then_exempt",
    "exempt_names",
    "infer_roles",
    "is_decay_exempt",
    "logical_shape",
    "override_roles",
    "param_groups",
    "resolve_roles",
    "shapes_and_roles",
    "warn_unclaimed",
]


def canonical_name(name: str) -> str:
    """A parameter's name without wrapper prefixes: what it is called in the model that the user wrote.

    Stripped are ``module.`` (DDP, DeepSpeed) and ``base_model.model.`` (PEFT) at the start, and anywhere ``_orig_mod``
    (`torch.compile`), ``_fsdp_wrapped_module``, ``_checkpoint_wrapped_module`` and ``base_layer`` (PEFT).
    """
    *path, leaf = name.split(".")
    kept = [attribute for attribute, is_wrapper in zip(path, wrappers_of(path), strict=True) if not is_wrapper]
    return ".".join([*kept, leaf])


def logical_shape(parameter: Tensor) -> tuple[int, ...]:
    """The shape of the whole parameter, also where ZeRO-3 left an empty tensor in its place."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def infer_roles(model: nn.Module, shape_of: Callable[[Tensor], tuple[int, ...]] = logical_shape) -> dict[str, Role]:
    """The role of every parameter of a model.

    Args:
        model: any module, wrapped or not; roles of transformers models are exact, others go by the same evidence.
        shape_of: the shape of a whole parameter.

    Returns:
        ``{name: role}``, names as ``canonical_name`` gives them; tied weights once, under their first name.
    """
    by_name, _ = _inferred(model, shape_of)
    return by_name


def _inferred(
    model: nn.Module, shape_of: Callable[[Tensor], tuple[int, ...]] = logical_shape
) -> tuple[dict[str, Role], dict[int, Role]]:
    """Roles by name and by identity. A weight that embeds anywhere is an embedding, whatever it is tied to."""
    heads = {id(weight) for weight in _output_embeddings(model)}
    # Listed once: PEFT's MultiheadAttention makes its frozen weights anew whenever somebody lists modules.
    uses = list(model.named_parameters(remove_duplicate=False))
    shapes = {id(parameter): shape_of(parameter) for _, parameter in uses}
    first = {id(parameter): canonical_name(name) for name, parameter in reversed(uses)}
    roles: dict[int, Role] = {}
    for name, parameter in uses:
        key = id(parameter)
        place = place_of(model, name, shapes)
        role = claim(place, shapes[key])
        if is_spared(place, parameter):
            role = replace(role, decays=False)
        if key in heads and role.kind in ("head", "linear"):
            role = replace(role, kind="head", source="module")
        if key not in roles or (role.kind == "embedding" and roles[key].kind != "embedding"):
            roles[key] = role
    return {first[key]: role for key, role in roles.items()}, roles


def _output_embeddings(model: nn.Module) -> Iterator[Tensor]:
    """The weights that transformers models, also inside wrappers, call their output embeddings."""
    for module in model.modules():
        method = getattr(module, "get_output_embeddings", None)
        if not callable(method):
            continue
        try:
            layer = method()
        except (AttributeError, NotImplementedError, TypeError):
            continue  # a model that has none may say so by any of these
        weight = getattr(layer, "weight", None)
        if isinstance(layer, nn.Module) and isinstance(weight, Tensor):
            yield weight


def resolve_roles(
    roles: Any, shapes: Mapping[str, tuple[int, ...]], names: Mapping[Tensor, str] | None = None
) -> dict[str, Role]:
    """One role for every name, from whatever an optimizer was given.

    Args:
        roles: a model; the result of `infer_roles`; ``{pattern: role}`` as in `override_roles`, upon roles by name; or
            None, for roles by name alone.
        shapes: logical shape of every parameter that needs a role.
        names: the name in ``shapes`` of each parameter. With a model, parameters are then found by identity, whatever
            they are called.

    Raises:
        ValueError: every reason why these roles cannot be those of these parameters, in one message.
    """
    if isinstance(roles, nn.Module):
        found, by_parameter = _inferred(roles)
        found.update({name: by_parameter[id(p)] for p, name in (names or {}).items() if id(p) in by_parameter})
        return _by_name(found, shapes, "the model given as `roles` has no such parameter")
    if roles is None:
        return roles_from_names(shapes)
    if not isinstance(roles, Mapping):
        raise ValueError(f"roles must be a model, the result of infer_roles(model) or {{pattern: role}}, not {roles!r}")
    if shapes.keys() <= roles.keys() and all(isinstance(role, Role) for role in roles.values()):
        return _by_name(roles, shapes, "no role is given for it")  # the result of infer_roles
    return override_roles(roles_from_names(shapes), roles, shapes)


def _by_name(roles: Mapping[str, Role], shapes: Mapping[str, tuple[int, ...]], reason: str) -> dict[str, Role]:
    problems, found = [], {}
    for name, shape in shapes.items():
        role = roles.get(name) or roles.get(canonical_name(name))
        if role is None:
            problems.append(f"{name}: {reason}")
            continue
        found[name] = role
        problems += [f"{name}: {contradiction}" for contradiction in contradictions(role, shape)]
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise ValueError(
            f"the roles do not fit the parameters:\n{listed}\n"
            "Give the optimizer the model that its parameters come from: params=model.named_parameters(), roles=model."
        )
    return found


def warn_unclaimed(
    roles: Mapping[str, Role],
    shapes: Mapping[str, tuple[int, ...]],
    is_understood: Callable[[Role], bool],
    consequence: str,
    *,
    vectors: bool = False,
) -> list[str]:
    """One warning that names every matrix which an optimizer can only guess about; returns the names.

    For optimizers whose result depends on roles to call once per model.

    Args:
        is_understood: whether a role says what the optimizer needs.
        consequence: what it does with the others.
        vectors: whether it matters what vectors are, too; to rows it does not.
    """
    unclaimed = [
        name for name, role in roles.items() if not is_understood(role) and (vectors or not is_vector(shapes[name]))
    ]
    if unclaimed:
        listed = ", ".join(f"{name} {'x'.join(map(str, shapes[name]))} ({roles[name].kind})" for name in unclaimed)
        warnings.warn(
            f"ds_optim does not know what {len(unclaimed)} parameter(s) are and {consequence}: {listed}. Pass "
            "roles=model (or infer_roles(model)) if you have not, or say what they are: "
            'roles={"*.q_proj.weight": {"kind": "query", "head_dim": 64}, "*.my_matrix": "linear"}.',
            stacklevel=3,
        )
    return unclaimed


def shapes_and_roles(model: nn.Module, given: Any) -> tuple[dict[str, tuple[int, ...]], Mapping[str, Role]]:
    """Logical shape and role of every parameter of a model, by name.

    Args:
        given: overrides, as in `override_roles`; None for none.
    """
    shapes = {canonical_name(name): logical_shape(parameter) for name, parameter in model.named_parameters()}
    inferred = infer_roles(model)
    return shapes, inferred if given is None else override_roles(inferred, given, shapes)


def exempt_names(names: Iterable[str], roles: Mapping[str, Role], patterns: Sequence[str] | None) -> list[str]:
    """Those parameters that are spared weight decay.

    Args:
        names: to choose from.
        roles: norms, biases and what the model marks are spared if there are no patterns.
        patterns: name patterns that prevail; an empty list spares nobody.
    """
    if patterns is None:
        return [name for name in names if is_decay_exempt(roles[name])]
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def decayed_then_exempt(entries: Iterable[T], is_exempt: Callable[[T], bool]) -> tuple[list[T], list[T]]:
    """The two groups that weight decay makes of parameters, in the order in which they stand everywhere.

    Args:
        entries: parameters, their names, or whatever stands for them; the order is kept in each group.
    """
    groups: tuple[list[T], list[T]] = [], []
    for entry in entries:
        groups[bool(is_exempt(entry))].append(entry)
    return groups


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups that spare norms, biases and what the model marks from weight decay, for any optimizer.

    Args:
        model: frozen parameters are left out, tied ones come once.
        weight_decay: of the first group; the second has 0.

    Returns:
        ``[decayed, exempt]`` as ``{"params": [...], "weight_decay": ...}``; a group without parameters is left out.
    """
    _, by_parameter = _inferred(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decayed, exempt = decayed_then_exempt(trained, lambda parameter: is_decay_exempt(by_parameter[id(parameter)]))
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": exempt, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
