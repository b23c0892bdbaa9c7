"""The papers' memory tables, computed again from the optimizers themselves.

Every number asks the real optimizer class what it would keep for a model on the meta device, so the tables follow the
code and cannot drift from it. Nothing is allocated. 1 GB is 1e9 bytes, as in the papers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn

from ds_optim.blueprint import meta_model
from ds_optim.memory.paper_models import PAPER_MODELS
from ds_optim.optimizers.adam_mini import AdamMini, adam_mini_blocks
from ds_optim.optimizers.adamw import AdamW
from ds_optim.optimizers.swan import SWAN
from ds_optim.roles import canonical_name, infer_roles, logical_shape
from ds_optim.roles.role import PER_HEAD, Role
from ds_optim.sharding.block_runs import block_runs
from ds_optim.sharding.layout import ParameterSpec, SlicedParameters
from ds_optim.stepping.sharded import ShardedOptimizer

CLOSE_RELATIVE, CLOSE_GB = 0.002, 0.006
"""How far rounding takes the published values: of parameters to hundredths of a billion, of bytes to hundredths of a GB
(some upwards)."""

Roles = Mapping[str, Role]


class PaperRow(BaseModel):
    """One number of a paper's table, beside the same one computed here.

    Attributes:
        table: title.
        row: model and optimizer.
        published: what the paper says; None where it says nothing and the number is ours alone.
        exact: what the optimizer's own state comes to.
        unit: of both.
        off_by: the computed number less the published one, in per cent of the published one.
        standing: how surely the published number is known.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    table: str
    row: str
    published: float | None
    exact: float
    unit: str
    off_by: float | None
    standing: str

    @property
    def agrees(self) -> bool:
        """Whether the published number differs by no more than its rounding."""
        if self.published is None:
            return True
        return abs(self.exact - self.published) <= max(CLOSE_GB, CLOSE_RELATIVE * self.published)


def paper_tables() -> list[PaperRow]:
    """Adam-mini's table, SWAN's table and Adam-mini under FSDP2, row by row; under five seconds."""
    return [*_adam_mini_rows(), *_swan_rows(), *_fsdp2_rows()]


def _row(table: str, row: str, published: float | None, exact: float, standing: str, unit: str = "GB") -> PaperRow:
    off_by = None if published is None else 100 * (exact - published) / published
    return PaperRow(table=table, row=row, published=published, exact=exact, unit=unit, off_by=off_by, standing=standing)


# -- Adam-mini ---------------------------------------------------------------------------------------------------------


class _AdamMiniLine(NamedTuple):
    label: str
    model: str
    adamw: float
    adam_mini: float
    standing: str


_ADAM_MINI = (
    _AdamMiniLine("Llama2-7B", "llama2_7b", 53.92, 26.96, "read in figure 1"),
    _AdamMiniLine("GPT-2 XL", "gpt2_xl", 12.48, 6.24, "recalled"),
    _AdamMiniLine("1.1B (TinyLlama)", "tinyllama_1.1b", 8.80, 4.40, "recalled"),
    _AdamMiniLine("Llama3-8B", "llama3_8b", 64.24, 32.12, "recalled"),
    _AdamMiniLine("Llama2-13B", "llama2_13b", 104.16, 52.08, "recalled"),
)


def _adam_mini_rows() -> Iterator[PaperRow]:
    table = "Adam-mini: optimizer state, fp32"
    for line in _ADAM_MINI:
        yield _row(table, f"{line.label}, AdamW", line.adamw, _state_gb(line.model, AdamW), line.standing)
        yield _row(table, f"{line.label}, Adam-mini", line.adam_mini, _state_gb(line.model, AdamMini), line.standing)
        if line.model == "llama2_7b":
            older = _state_gb(line.model, AdamMini, first_partition)
            yield _row(table, f"{line.label}, Adam-mini, partition of v1.0", 28.04, older, "read")


def first_partition(roles: Roles) -> Roles:
    """Adam-mini's blocks before v1.1, as roles: embedding and head a value per element (Adam), query and key per head,
    every other tensor a single value."""

    def older(role: Role) -> Role:
        if role.kind in ("embedding", "head"):
            return replace(role, kind="bias")
        return role if role.kind in PER_HEAD else replace(role, kind="norm", head_dim=None, parts=())

    return {name: older(role) for name, role in roles.items()}


# -- SWAN --------------------------------------------------------------------------------------------------------------


class _SwanLine(NamedTuple):
    label: str
    model: str
    adam: float | None
    swan: float


_SWAN = (
    _SwanLine("Llama 60M", "llama_60m", 0.35, 0.25),
    _SwanLine("Llama 130M", "llama_130m", 0.81, 0.46),
    _SwanLine("Llama 350M", "llama_350m", 2.21, 1.00),
    _SwanLine("Llama 1.3B", "llama_1.3b", 8.04, 3.20),
    _SwanLine("Llama 7B", "llama2_7b", None, 14.53),
)


def _swan_rows() -> Iterator[PaperRow]:
    table = "SWAN: weights and optimizer state, both bf16"
    for line in _SWAN:
        weights = 2 * _parameters(line.model) / 1e9
        adam = weights + _state_gb(line.model, AdamW, state_dtype=torch.bfloat16)
        swan = weights + _state_gb(line.model, SWAN, state_dtype=torch.bfloat16)
        stated = "published by the SCALE repository"
        yield _row(table, f"{line.label}, Adam", line.adam, adam, stated if line.adam else "not published")
        yield _row(table, f"{line.label}, SWAN", line.swan, swan, stated)
        saved = 100 * (adam - swan) / (adam + weights)
        yield _row(table, f"{line.label}, saved with bf16 gradients", None, saved, "follows from the two above", "%")


# -- FSDP2 -------------------------------------------------------------------------------------------------------------


def _fsdp2_rows(model: str = "llama2_7b", ranks: int = 8) -> Iterator[PaperRow]:
    """Rows of every weight of the model divide by the ranks, so that FSDP2's shards are equal slices."""
    table = f"FSDP2, {ranks} ranks, fp32: weights, gradients and optimizer state of one rank between steps"
    roles = infer_roles(_meta_model(model))
    adamw = mini = 0
    for name, parameter in _named(model):
        shape = logical_shape(parameter)
        assert shape[0] % ranks == 0, f"FSDP2 pads {name}"
        shard = SlicedParameters((ParameterSpec(name, shape),), ranks)
        elements, grid = shard.local_numel(0), adam_mini_blocks(roles[name], shape)
        adamw += 16 * elements
        mini += 12 * elements + 4 * block_runs(shard, 0, {name: grid}).num_slots
    standing = "not published; shapes alone"
    yield _row(table, "Llama2-7B, AdamW", None, adamw / 1e9, standing)
    yield _row(table, "Llama2-7B, Adam-mini", None, mini / 1e9, standing)
    yield _row(table, "Llama2-7B, saved", None, 100 * (adamw - mini) / adamw, "follows from the two above", "%")


# -- counting ----------------------------------------------------------------------------------------------------------


@cache
def _meta_model(name: str) -> nn.Module:
    return meta_model(PAPER_MODELS[name])


def _named(model: str) -> list[tuple[str, nn.Parameter]]:
    return [(canonical_name(name), parameter) for name, parameter in _meta_model(model).named_parameters()]


def _parameters(model: str) -> int:
    return sum(parameter.numel() for _, parameter in _named(model))


def _state_gb(
    model: str,
    cls: Callable[..., ShardedOptimizer],
    partition: Callable[[Roles], Roles] | None = None,
    **settings: Any,
) -> float:
    """GB of state that an optimizer keeps for a whole model, step counts apart."""
    roles = infer_roles(_meta_model(model))
    optimizer = cls(_named(model), roles=partition(roles) if partition else roles, **settings)
    return (
        sum(
            math.prod(shape) * dtype.itemsize
            for _, parameter in _named(model)
            for shape, dtype in optimizer.stepper.spec(parameter).values()
        )
        / 1e9
    )
