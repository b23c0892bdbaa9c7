"""The predicted record: every category of memory at every moment, from a config, without allocating the model.

Model states are layout arithmetic and exact. Activations come from a simulated pass over three layers
(`ds_optim.memory.simulate`), what a strategy adds from `ds_optim.memory.strategies`. A peak is the highest sum of the
three along the pass (`ds_optim.memory.predicted_rank`).
"""

from __future__ import annotations

import datetime
import math
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from pydantic import ValidationError

from ds_optim.blueprint import Blueprint, BlueprintError, blueprint, meta_model
from ds_optim.deepspeed.facts import zero_settings
from ds_optim.deepspeed.refusals import judge
from ds_optim.memory.mesh import Mesh, RankShare, cut_dimensions, expert_stacks, stage_layouts, stages_of
from ds_optim.memory.predicted_rank import RankHoldings, rank_record
from ds_optim.memory.provenance import installed
from ds_optim.memory.record import Category, Provenance, Record, StateEntry
from ds_optim.memory.simulate import Timeline, simulate
from ds_optim.memory.strategies import Bytes, Partition, Terms, plain, zero_0, zero_1_and_2, zero_3
from ds_optim.memory.training import Precision, Training, in_words, without_auto
from ds_optim.stepping.in_place import InPlace
from ds_optim.stepping.owned_blocks import OwnedBlocks
from ds_optim.stepping.shards import Elsewhere
from ds_optim.stepping.stepper import Stepper

_RANKS_LOOKED_AT = 16
_RANKS_OF_MANY = 4  # and the last one


@dataclass(frozen=True, slots=True)
class Request:
    """What to predict.

    Attributes:
        model: a transformers ``config.json``.
        model_name: shown in the record.
        optimizer: a name of ours, with its defaults; None: the JSON's.
        settings: further options of the optimizer, which prevail.
        stage: ZeRO stage; None is plain PyTorch, everything on every rank.
        world_size: data-parallel ranks.
        precision: ``fp32``; ``bf16`` or ``fp16``: weights and gradients, with an fp32 master and fp32 state; ``pure
            bf16``: bf16 throughout, without a master, under plain PyTorch only.
        micro_batch: sequences per rank and pass.
        seq_length: tokens per sequence.
        checkpointing: every layer keeps its input only.
        deepspeed: a DeepSpeed JSON: its optimizer, ``ds_optim`` object and ``zero_optimization`` are used.
        passes: micro-batches per step.
        device_memory: bytes of one device, if known.
        reserve: of that, what context, communication library and fragmentation take: an assumption.
        accelerator: whether matrix algebra of whole-matrix rules runs in the large stacks of an accelerator.
        states_only: leave activations out, and with them forward and backward peaks.
        command: written into the record.
        mesh: of model parallelism; its dp is the same as ``world_size``.
    """

    model: Mapping[str, Any]
    model_name: str
    optimizer: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    stage: int | None = None
    world_size: int = 1
    precision: Precision = "bf16"
    micro_batch: int = 1
    seq_length: int = 2048
    checkpointing: bool = False
    deepspeed: Mapping[str, Any] = field(default_factory=dict)
    passes: int = 1
    device_memory: int | None = None
    reserve: int = 0
    accelerator: bool = False
    states_only: bool = False
    command: str = ""
    mesh: Mesh = field(default_factory=Mesh)

    @property
    def whole_mesh(self) -> Mesh:
        """All ranks of the job."""
        return replace(self.mesh, dp=self.world_size)


def request_of(
    model: Mapping[str, Any], model_name: str, deepspeed: Mapping[str, Any], world_size: int, seq_length: int
) -> Request:
    """What a DeepSpeed JSON says about a training, as a request.

    Raises:
        BlueprintError: a value of the JSON has the wrong type.
    """
    training = Training.of(deepspeed)
    return Request(
        model=model,
        model_name=model_name,
        deepspeed=deepspeed,
        stage=training.zero_optimization.stage,
        precision=training.precision,
        micro_batch=training.micro_batch(world_size),
        passes=training.passes(world_size),
        world_size=world_size,
        seq_length=seq_length,
    )


def predict(request: Request) -> Record:
    """The record of a steady training step.

    All ranks of a job of up to 16 are looked at, and five of a larger one, where they differ by a few per cent at most:
    a partition's fullest rank depends on where parameters are cut.

    Raises:
        BlueprintError: the model, the optimizer, the strategy or the number of ranks cannot be predicted.
        ValueError: options that the optimizer refuses.
    """
    return _record(request, _prepare(request))


def largest_micro_batch(request: Request, limit: int = 4096) -> int:
    """The largest micro-batch whose highest peak fits the device, reserve taken off; 0 if none does."""
    if request.device_memory is None:
        raise BlueprintError("how much fits depends on the device: give --device-memory")
    capacity = request.device_memory - request.reserve
    prepared = _prepare(request)  # nothing in it depends on the micro-batch

    def fits(micro_batch: int) -> bool:
        return highest(_record(replace(request, micro_batch=micro_batch), prepared)) <= capacity

    if not fits(1):
        return 0
    low, high = 1, 2
    while high <= limit and fits(high):
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def planned(request: Request) -> list[OwnedBlocks]:
    """The steps and plans that a prediction rests on, of every stage of a pipeline; none where no block travels."""
    return [made for made in _prepare(request).steppers if isinstance(made, OwnedBlocks)]


def highest(record: Record) -> int:
    """Bytes on the device at the highest peak of the fullest rank; what is offloaded does not count."""
    return max(moment.on_device for rank in record.ranks for moment in rank.moments)


@dataclass(frozen=True, slots=True)
class _Prepared:
    """What does not depend on the batch."""

    about: Blueprint
    steppers: Sequence[InPlace | OwnedBlocks]
    offloads: bool
    ranks: list[RankHoldings]


def _prepare(request: Request) -> _Prepared:
    _judge(request)
    fixed = {"micro_batch": 1, "seq_length": 1, "checkpointing": False, "states_only": True}
    return _prepared(_Asked(replace(request, **fixed, device_memory=None, reserve=0, command="")))  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class _Asked:
    """A request as the key of a cache."""

    request: Request

    def __hash__(self) -> int:
        return hash(repr(self.request))


@lru_cache(maxsize=4)
def _prepared(asked: _Asked) -> _Prepared:
    request = asked.request
    training = Training.of(request.deepspeed)
    settings = dict(request.settings)
    if request.precision == "pure bf16":
        settings.setdefault("state_dtype", torch.bfloat16)
    model = meta_model(request.model)
    about = blueprint(model, without_auto(request.deepspeed), request.optimizer, settings)
    config = _zero_config(request, training)
    stage = 0 if request.stage is None else request.stage
    sub_groups = int(config.sub_group_size) if stage == 3 else None
    offloads = stage > 0 and training.offloads
    mesh, found, steppers = request.whole_mesh, list[RankHoldings](), list[InPlace | OwnedBlocks]()
    cuts = cut_dimensions(model) if mesh.tp > 1 else {}
    everything = Elsewhere({spec.name: (spec.shape, about.roles[spec.name]) for spec in about.specs})
    for index, names in enumerate(stages_of(model, mesh.pp)):
        groups = [its for group in about.groups if (its := [spec for spec in group if spec.name in names])]
        made = stage_layouts(groups, cuts, expert_stacks(about.roles), mesh, stage, sub_groups)
        ranks = _ranks_to_look_at(mesh.of_stage)
        steppers.append(about.optimizer.predicted(made.layouts, ranks[0], elsewhere=everything))
        for rank in ranks:
            stepper, share = steppers[-1].at_rank(rank), made.at(rank)
            terms = _terms(request, share, config, offloads)
            elements = sum(layout.local_numel(rank) for layout in made.layouts)
            place = index * mesh.of_stage + rank
            found.append(RankHoldings(place, elements, terms, _entries(stepper), _workspaces(request, stepper)))
    return _Prepared(about, steppers, offloads, found)


def _record(request: Request, prepared: _Prepared) -> Record:
    timeline = None
    if not request.states_only:
        dtype = {"fp32": torch.float32, "fp16": torch.float16}.get(request.precision, torch.bfloat16)
        model = _Frozen(request.model)
        timeline = _timeline(model, dtype, request.micro_batch, request.seq_length, request.checkpointing)
    ranks = [rank_record(rank, prepared.offloads, timeline) for rank in prepared.ranks]
    provenance = _provenance(request, prepared)
    return Record(kind="predicted", provenance=provenance, ranks=ranks)


# ------------------------------------------------------------------------------------------------------ the strategy


def _judge(request: Request) -> None:
    """Refuse a request with everything that is wrong with it, in one `BlueprintError`."""
    training = Training.of(request.deepspeed)
    problems = training.problems()
    if request.world_size < 1:
        problems.append(f"the number of ranks must be at least 1, not {request.world_size}")
    if request.micro_batch < 1 or request.seq_length < 1 or request.passes < 1:
        problems.append("micro-batch, sequence length and micro-batches per step must be at least 1")
    if request.stage not in (None, 0, 1, 2, 3):
        problems.append(f"there is no ZeRO stage {request.stage}: 0, 1, 2 or 3")
    if request.precision == "pure bf16" and request.stage is not None:
        problems.append("DeepSpeed keeps an fp32 master: pure bf16 is for plain PyTorch (no ZeRO stage)")
    problems += request.whole_mesh.problems(request.stage)
    if not request.mesh.is_plain and not request.states_only:
        problems.append("activations are not predicted under model parallelism: give --states-only")
    longest = positions_of(request.model)
    if longest and request.seq_length > longest and not request.states_only:
        problems.append(
            f"the model has {longest} positions, sequences of {request.seq_length} tokens do not fit: "
            f"--seq-length is {longest} at most"
        )
    if not problems and request.deepspeed and request.stage is not None:
        problems = judge(without_auto(request.deepspeed))[1]
    if problems:
        raise BlueprintError("; ".join(problems))


def positions_of(model: Mapping[str, Any]) -> int | None:
    """The longest sequence of a model, if its config says so."""
    found = model.get("max_position_embeddings") or model.get("n_positions")
    return found if isinstance(found, int) and not isinstance(found, bool) else None


def _zero_config(request: Request, training: Training) -> Any:
    """``zero_optimization`` with DeepSpeed's defaults; None for plain PyTorch, which has none."""
    if request.stage is None:
        return None
    try:
        return zero_settings({**training.zero_values, "stage": request.stage})
    except ValidationError as error:
        raise BlueprintError(f"DeepSpeed refuses zero_optimization: {in_words(error)}") from error


def _terms(request: Request, share: RankShare, config: Any, offloads: bool) -> Terms:
    width = 4 if request.precision == "fp32" else 2
    has_master = request.stage is not None and (request.stage > 0 or request.precision != "fp32")
    one = Partition(
        groups=share.groups,
        layouts=share.layouts,
        ranks=share.ranks,
        world_size=request.world_size,
        width=width,
        master=4 if has_master else 0,
        config=config,
        offload=offloads,
        accumulates=request.passes > 1,
    )
    if request.stage is None:
        return plain(one)
    if request.stage == 0:
        return zero_0(one)
    if request.stage == 3:
        return zero_3(one)
    return zero_1_and_2(one, partition_gradients=request.stage == 2)


def _ranks_to_look_at(world_size: int) -> list[int]:
    if world_size <= _RANKS_LOOKED_AT:
        return list(range(world_size))
    return sorted({world_size - 1, *(world_size * part // _RANKS_OF_MANY for part in range(_RANKS_OF_MANY))})


# --------------------------------------------------------------------------------------------------------- the record


def _entries(stepper: Stepper) -> list[StateEntry]:
    sizes: Counter[tuple[str, torch.dtype]] = Counter()
    for spec in map(stepper.spec, stepper.shards.tensors):
        sizes[("step", torch.float32)] += 1
        for key, (shape, dtype) in spec.items():
            sizes[(key, dtype)] += math.prod(shape)
    entries = []
    for (key, dtype), elements in sorted(sizes.items(), key=lambda item: item[0][0]):
        is_count = key == "step" or dtype in (torch.int32, torch.int64)
        kept_for = "count" if is_count else stepper.shape_rule(key)
        name = str(dtype).removeprefix("torch.")
        entry = StateEntry(key=key, dtype=name, shape_rule=kept_for, elements=elements, bytes=elements * dtype.itemsize)
        if entry.bytes:
            entries.append(entry)
    return entries


def _workspaces(request: Request, stepper: Stepper) -> list[Bytes]:
    """What the optimizer itself makes at the fullest moments of its step.

    Elementwise and blockwise rules work in place; whole-matrix rules have exchange buffers (exact) and temporaries
    (what the rule states, of the dearest stack).
    """
    found = stepper.workspace("cuda" if request.accelerator else "cpu")
    return [{Category.EXCHANGE: exchange, Category.WORKSPACE: scratch} for exchange, scratch in found] or [{}]


class _Frozen(dict[str, Any]):
    """A config as a key of a cache."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(repr(sorted(self.items())))


@lru_cache(maxsize=32)
def _timeline(model: _Frozen, dtype: torch.dtype, micro_batch: int, seq_length: int, checkpointing: bool) -> Timeline:
    return simulate(model, dtype, micro_batch, seq_length, checkpointing)


def _provenance(request: Request, prepared: _Prepared) -> Provenance:
    about = prepared.about
    cls = type(about.optimizer)
    return Provenance(
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        machine=f"none: predicted on {platform.machine()}, {platform.system()}",
        versions=installed(),
        model=request.model_name,
        parameters=about.numel,
        optimizer=f"{cls.__module__.partition('.')[0]}.{cls.__name__}",
        settings={key: str(value) for key, value in about.options.items()},
        strategy=_strategy(request),
        stage=request.stage,
        world_size=request.whole_mesh.ranks,
        precision=request.precision,
        offload="cpu" if prepared.offloads else "none",
        micro_batch=request.micro_batch,
        seq_length=request.seq_length,
        checkpointing=request.checkpointing,
        command=request.command,
        device_memory=request.device_memory,
        notes=_notes(request),
    )


def _strategy(request: Request) -> str:
    found = "plain PyTorch" if request.stage is None else f"DeepSpeed ZeRO-{request.stage}"
    return found if request.mesh.is_plain else f"{found} over a mesh ({request.whole_mesh})"


def _notes(request: Request) -> list[str]:
    passes = "one micro-batch" if request.passes == 1 else f"{request.passes} micro-batches, the last one shown"
    notes = [f"A steady step (not the first), {passes} per step."]
    mesh = request.whole_mesh
    if mesh.of_stage > _RANKS_LOOKED_AT:
        looked_at = len(_ranks_to_look_at(mesh.of_stage)) * mesh.pp
        notes.append(f"{looked_at} of {mesh.ranks} ranks were looked at; another may hold one or two per cent more.")
    if not mesh.is_plain:
        notes.append("Stages share the layers out evenly; slices are those of transformers' own plan for the model.")
    if mesh.tp > 1 and (mesh.pp > 1 or mesh.ep > 1):
        notes.append("DeepSpeed runs AutoTP neither in a PipelineModule nor with AutoEP: a mesh of other frameworks.")
    if request.device_memory is not None and request.reserve:
        notes.append(
            f"{request.reserve:,} bytes of the device are set aside for its context, the communication library and "
            "fragmentation: an assumption."
        )
    if request.states_only:
        return [*notes, "Activations are left out, and with them the peaks of forward and backward."]
    kept = "its input only (checkpointing)" if request.checkpointing else "what its backward pass needs"
    return [
        *notes,
        f"Activations: three layers run on fake tensors over {request.micro_batch} x {request.seq_length} tokens, "
        f"every layer keeping {kept}; the middle layer's allocations repeated for the others. Flash attention: no "
        "matrix of scores is kept. Kernels' inner scratch, communication libraries and the CUDA context are not in it.",
    ]
