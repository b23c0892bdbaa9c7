"""Tensor, pipeline and expert parallelism in a prediction: what each rank of a mesh has of a model, from shapes alone.

A mesh is dp x tp x pp ranks. Stages of a pipeline share the layers out evenly, the embedding before the first and the
head behind the last. Tensor parallelism cuts what transformers' own plan for the model names, as DeepSpeed's AutoTP
does. Stacks of experts are spread over ep of a stage's dp x tp ranks, and over the others as ZeRO does.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

from torch import nn

from ds_optim.blueprint import BlueprintError
from ds_optim.deepspeed.predict import predicted_layouts
from ds_optim.known_transformers import tensor_parallel_plan
from ds_optim.roles import canonical_name, logical_shape
from ds_optim.roles.role import Role
from ds_optim.sharding.boxes import Box, between
from ds_optim.sharding.layout import Layout, ParameterSpec
from ds_optim.sharding.tensor_parallel import TensorParallel

Groups = Sequence[Sequence[ParameterSpec]]
Column = Sequence[tuple[Groups, list[Layout]]]
"""What is cut alike: groups and layouts on each of the ranks that it is cut over."""


@dataclass(frozen=True, slots=True)
class Mesh:
    """How many ranks share what.

    Attributes:
        dp: data-parallel ranks.
        tp: over how many ranks each of them is cut.
        pp: stages of a pipeline.
        ep: over how many ranks of a stage experts are spread.
    """

    dp: int = 1
    tp: int = 1
    pp: int = 1
    ep: int = 1

    @classmethod
    def parsed(cls, text: str) -> Mesh:
        """``dp=8,tp=4,pp=2,ep=4``; what is left out is 1.

        Raises:
            BlueprintError: it is written otherwise.
        """
        found = dict(re.findall(r"(\w+)=(\d+)", text))
        if set(found) - set(cls.__slots__) or re.sub(r"\w+=\d+|[,\s]", "", text) or not found:
            raise BlueprintError(f"{text!r} is no mesh: write dp=8,tp=4,pp=2,ep=4")
        return cls(**{name: int(size) for name, size in found.items()})

    def __str__(self) -> str:
        sizes = {name: getattr(self, name) for name in ("dp", "tp", "pp", "ep")}
        return ", ".join(f"{name}={size}" for name, size in sizes.items() if size > 1 or name == "dp")

    @property
    def of_stage(self) -> int:
        """Ranks of one stage."""
        return self.dp * self.tp

    @property
    def ranks(self) -> int:
        """Ranks of the job."""
        return self.of_stage * self.pp

    @property
    def is_plain(self) -> bool:
        """Whether there is data parallelism alone."""
        return self.tp == self.pp == self.ep == 1

    def problems(self, stage: int | None) -> list[str]:
        """Why no training can run over it, as sentences.

        Args:
            stage: of ZeRO.
        """
        found = []
        if min(self.dp, self.tp, self.pp, self.ep) < 1:
            found.append("every dimension of a mesh is at least 1")
        elif self.of_stage % self.ep:
            found.append(f"ep={self.ep} does not divide the {self.of_stage} ranks (dp x tp) of a stage")
        if (self.tp > 1 or self.ep > 1) and not stage:
            found.append("a mesh with tp or ep is predicted for ZeRO stages 1, 2 and 3: give --stage")
        if self.pp > 1 and (stage or 0) > 1:
            found.append("DeepSpeed's pipelines run at ZeRO stages 0 and 1: give --stage")
        return found


class RankShare(NamedTuple):
    """What one rank has: its parameters as if they were all, by group, its layouts over data-parallel ranks, and its
    rank in each."""

    groups: Groups
    layouts: list[Layout]
    ranks: list[int]


@dataclass(frozen=True, slots=True)
class StageLayouts:
    """The local tensors of one stage.

    Attributes:
        layouts: over all ranks of the stage.
        columns: what is cut alike.
    """

    layouts: list[Layout]
    columns: list[Column]

    def at(self, rank: int) -> RankShare:
        """What one of its ranks has."""
        share = RankShare([], [], [])
        for column in self.columns:
            groups, layouts = column[rank % len(column)]
            share = RankShare(
                [*share.groups, *groups],
                [*share.layouts, *layouts],
                [*share.ranks, *[rank // len(column)] * len(layouts)],
            )
        return share


def stage_layouts(
    groups: Groups, cuts: Mapping[str, int], experts: frozenset[str], mesh: Mesh, stage: int, sub_group_size: int | None
) -> StageLayouts:
    """The local tensors of one stage's parameters.

    Args:
        groups: its parameters, by parameter group.
        cuts: the dimension along which tensor parallelism cuts a parameter, by name.
        experts: the names of stacks of experts.
        mesh: over which.
        stage: of ZeRO.
        sub_group_size: of ZeRO-3.
    """
    spread = experts if mesh.ep > 1 else frozenset[str]()
    made = StageLayouts([], [])
    kinds: list[tuple[int, bool, Callable[[ParameterSpec], int | None]]] = [
        (mesh.tp, False, lambda spec: cuts.get(spec.name)),
        (mesh.ep, True, lambda spec: 0),
    ]
    for columns, of_experts, dim_of in kinds:
        chosen = [[spec for spec in group if (spec.name in spread) == of_experts] for group in groups]
        if not any(chosen):
            continue
        boxes = {spec.name: _boxes(spec.shape, dim_of(spec), columns) for group in chosen for spec in group}
        column = list[tuple[Groups, list[Layout]]]()
        for at in range(columns):
            its = [
                [ParameterSpec(s.name, boxes[s.name][at].shape if boxes[s.name] else s.shape) for s in g]
                for g in chosen
            ]
            column.append((its, predicted_layouts(its, stage, mesh.of_stage // columns, sub_group_size)))
        whole = {spec.name: spec for group in chosen for spec in group}
        made.columns.append(column)
        made.layouts.extend(_joined(column, whole, boxes, mesh.of_stage, "ep" if of_experts else "tp"))
    return made


def _joined(
    column: Column,
    whole: Mapping[str, ParameterSpec],
    boxes: Mapping[str, tuple[Box, ...]],
    ranks: int,
    axis: str,
) -> list[Layout]:
    if len(column) == 1:
        return column[0][1]
    places = tuple((rank % len(column), rank // len(column)) for rank in range(ranks))
    return [
        TensorParallel(
            tuple(whole[spec.name] for spec in layouts[0].parameters),
            tuple(tuple((box,) for box in boxes[spec.name]) for spec in layouts[0].parameters),
            layouts,
            places,
            axis,
        )
        for layouts in zip(*(layouts for _, layouts in column), strict=True)
    ]


def _boxes(shape: Sequence[int], dim: int | None, count: int) -> tuple[Box, ...]:
    """A parameter in nearly equal parts along a dimension; none if it is not cut."""
    if dim is None or count == 1:
        return ()
    edges = [0, *accumulate(shape[dim] // count + (part < shape[dim] % count) for part in range(count))]
    return tuple(between(shape, dim, low, high) for low, high in pairwise(edges))


def expert_stacks(roles: Mapping[str, Role]) -> frozenset[str]:
    """The names of stacks of experts."""
    return frozenset(name for name, role in roles.items() if role.batch_dims)


def cut_dimensions(model: Any) -> dict[str, int]:
    """Along which dimension AutoTP cuts a transformers model's parameters; an embedding only with a tied head."""
    styles = {re.escape(key).replace(r"\*", r"\d+"): style for key, style in tensor_parallel_plan(model).items()}
    embedding = model.get_input_embeddings().weight
    is_tied = embedding is model.get_output_embeddings().weight
    found = {}
    for name, parameter in model.named_parameters():
        module, _, leaf = name.rpartition(".")
        style = next((style for pattern, style in styles.items() if re.fullmatch(pattern, module)), "")
        dims = len(logical_shape(parameter))
        if (parameter is embedding and is_tied) or (style.startswith("colwise") and dims in (1, 2)):
            found[canonical_name(name)] = 0
        elif style.startswith("rowwise") and dims == 2 and leaf == "weight":
            found[canonical_name(name)] = 1
    return found


def stages_of(model: Any, count: int) -> list[frozenset[str]]:
    """The names of the parameters of each stage; what is tied to the head is on the last one too.

    Raises:
        BlueprintError: the model has no list of layers, or fewer than there are stages.
    """
    if count == 1:
        return [frozenset(canonical_name(name) for name, _ in model.named_parameters())]
    total = int(model.config.num_hidden_layers)
    lists = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == total and total >= count
    ]
    if not lists:
        raise BlueprintError(f"this model has no list of layers that {count} stages of a pipeline could share")
    prefix = f"{canonical_name(f'{lists[0]}.0.weight').removesuffix('0.weight')}"
    stages: list[set[str]] = [set() for _ in range(count)]
    has_begun = False
    for raw, _ in model.named_parameters():
        name = canonical_name(raw)
        if name.startswith(prefix):
            has_begun = True
            stages[int(name.removeprefix(prefix).split(".")[0]) * count // total].add(name)
        else:
            stages[-1 if has_begun else 0].add(name)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is not None and embedding.weight is head.weight:
        stages[-1] |= {canonical_name(name) for name, one in model.named_parameters() if one is head.weight}
    return [frozenset(stage) for stage in stages]
