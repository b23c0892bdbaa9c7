"""The one record of memory: bytes per rank, per moment of a training step, per category, with the method behind each.

A measured record and a predicted one have the same type, so that they can be compared line by line, judged by the same
claims and shown by the same report.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from enum import Enum
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

SCHEMA = 2
"""Number of this format; a file with a higher one is refused."""


class RecordError(ValueError):
    """A record cannot be read; the message names the file, what is wrong with it and what to do."""


class Category(str, Enum):
    """What bytes are for, in the order in which people stack them."""

    PARAMETERS = "parameters"
    """What the model computes with."""
    MASTER = "fp32 master"
    """The copy that the optimizer updates, where it is not the parameters themselves."""
    GRADIENTS = "gradients"
    BUCKETS = "gradient buckets"
    """Buffers in which a strategy reduces gradients."""
    OPTIMIZER = "optimizer state"
    ACTIVATIONS = "activations"
    """Everything that a forward or backward pass made and that is still alive, gradients apart."""
    WORKSPACE = "step workspace"
    """Everything that the strategy and the optimizer make inside a step and drop again, exchange buffers apart."""
    EXCHANGE = "exchange buffers"
    """Buckets in which whole-matrix optimizers send gradients and updates."""
    BUFFERS = "buffers"
    """The model's buffers, tables of the strategy and of the optimizer, batches of tokens: small, labelled, steady."""
    SLACK = "allocator slack"
    """Reserved by the device's allocator and not used."""
    UNACCOUNTED = "unaccounted"
    """Alive, and nobody's."""


MODEL_STATES = (Category.PARAMETERS, Category.MASTER, Category.GRADIENTS, Category.OPTIMIZER)


class CountedBy(str, Enum):
    """How a number was found."""

    STORAGES = "tensor storages"
    """Live storages, each counted once, found by their address."""
    EVENTS = "allocation events"
    """Sum of the profiler's memory events."""
    KERNEL = "kernel's peak counter"
    """VmHWM of the process, reset before."""
    PROCESS = "process memory"
    """Unique set size, by psutil."""
    ALLOCATOR = "device allocator"
    LAYOUT = "layout arithmetic"
    """Shapes, dtypes and the strategy's rules; exact."""
    SIMULATION = "simulated pass"
    """One or two layers run on fake tensors, extended to all of them."""
    FORMULA = "formula"


Phase = Literal["forward", "backward", "step"]
MomentName = Literal["after init", "after forward", "after backward", "after step"]


class StrictModel(BaseModel):
    """What is written as JSON and read again: it cannot be changed, and has no fields but its own."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Amount(StrictModel):
    """Bytes, and how they were counted."""

    bytes: int
    method: CountedBy


class Moment(StrictModel):
    """What is alive at one moment.

    Attributes:
        name: a moment between two phases, or None for a peak.
        peak_of: the phase whose highest point this is, or None.
        amounts: every category that is not empty.
        on_host: bytes of these that CPU offload keeps in host memory while the model is on an accelerator; 0 where
            both are one memory.
    """

    name: MomentName | None = None
    peak_of: Phase | None = None
    amounts: dict[Category, Amount]
    on_host: int = 0

    @property
    def total(self) -> int:
        return sum(amount.bytes for amount in self.amounts.values())

    @property
    def on_device(self) -> int:
        """What the device must hold."""
        return self.total - self.on_host

    def bytes_of(self, *categories: Category) -> int:
        """Bytes of these categories together."""
        return sum(self.amounts[category].bytes for category in categories if category in self.amounts)


class StateEntry(StrictModel):
    """One kind of optimizer state.

    Attributes:
        key: as in ``optimizer.state`` (``exp_avg``).
        dtype: without ``torch.`` (``float32``).
        shape_rule: one of ``element`` (a value per parameter element), ``block`` (a value per Adam-mini block, or
            per block of codes), ``owned block`` (per block at its owner), ``count``.
        elements: values on this rank.
        bytes: on this rank.
    """

    key: str
    dtype: str
    shape_rule: Literal["element", "block", "owned block", "count"]
    elements: int
    bytes: int


class Check(StrictModel):
    """One number held against another that was found independently.

    Attributes:
        name: what was compared, in words.
        ours: bytes, by the record's own method.
        theirs: bytes, by ``method``.
        tolerance: largest allowed difference, relative to ``theirs``; None where the two are only shown.
        allowance: bytes that only ``theirs`` counts, as is known; ``theirs`` may be larger by so much beyond that.
    """

    name: str
    ours: int
    theirs: int
    method: CountedBy
    tolerance: float | None = None
    allowance: int = 0

    @property
    def difference(self) -> float:
        """Relative to ``theirs``; 0 where both are 0."""
        return (self.ours - self.theirs) / self.theirs if self.theirs else float(self.ours != 0)

    @property
    def passed(self) -> bool | None:
        """Whether they agree; None where they are only shown."""
        if self.tolerance is None:
            return None
        missing = self.theirs - self.ours
        unexplained = max(missing - self.allowance, 0) if missing > 0 else -missing
        return unexplained <= self.tolerance * abs(self.theirs)


class Sample(StrictModel):
    """A point of a step's timeline.

    Attributes:
        at: position in the step, 0 to 1, by count of allocations, not by time.
        phase: in which it lies.
        bytes: per category.
    """

    at: float
    phase: Phase
    bytes: dict[Category, int]


class RankRecord(StrictModel):
    """The account of one rank.

    Attributes:
        rank: its place among the ranks of the engine or model.
        host: name of the machine that it ran on; None in a prediction.
        elements: parameter elements that its optimizer updates, padding included.
        moments: in the order of time; the peak of a phase stands before the moment that ends it.
        state: per key and dtype.
        checks: against independent methods; none in a prediction.
        timeline: of one step; empty if none was kept.
    """

    rank: int
    host: str | None = None
    elements: int
    moments: list[Moment]
    state: list[StateEntry]
    checks: list[Check] = Field(default_factory=list)
    timeline: list[Sample] = Field(default_factory=list)

    def moment(self, name: MomentName) -> Moment | None:
        """The last moment of that name."""
        return next((moment for moment in reversed(self.moments) if moment.name == name), None)

    def peak_of(self, phase: Phase) -> Moment | None:
        """The highest point of a phase."""
        return next((moment for moment in reversed(self.moments) if moment.peak_of == phase), None)

    @property
    def peak(self) -> Moment | None:
        """The highest of all peaks and moments, by what the device must hold."""
        return max(self.moments, key=lambda moment: moment.on_device, default=None)

    @property
    def state_bytes(self) -> int:
        """Optimizer state after the last step, as the claims count it."""
        return sum(entry.bytes for entry in self.state)

    @property
    def model_states(self) -> dict[Category, int]:
        """Parameters, master and optimizer state after the step, and the gradients that the step was handed."""
        after_step, after_backward = self.moment("after step"), self.moment("after backward")
        return {
            category: moment.bytes_of(category) if moment else 0
            for category in MODEL_STATES
            for moment in [after_backward if category is Category.GRADIENTS else after_step]
        }


class Provenance(StrictModel):
    """Where a record comes from.

    Attributes:
        date: ISO 8601, UTC.
        machine: processor, cores, operating system; accelerator if there is one.
        versions: of the packages that matter.
        model: name or path.
        parameters: of the whole model.
        optimizer: class name with its package (``ds_optim.AdamMini``, ``torch.AdamW (fused)``).
        settings: of the optimizer.
        strategy: ``DeepSpeed ZeRO-2``, ``FSDP2``, ``plain PyTorch``.
        stage: ZeRO stage, or None.
        world_size: data-parallel ranks.
        precision: ``fp32``, ``bf16`` (bf16 weights with an fp32 master) or ``pure bf16`` (bf16 throughout).
        offload: ``none`` or ``cpu``.
        micro_batch: sequences per rank and pass; None if unknown.
        seq_length: tokens; None if unknown.
        checkpointing: whether activations are recomputed.
        command: that makes this record again.
        device_memory: bytes of the device, if given.
        notes: assumptions and formulas, one sentence each.
        overhead: measuring time over bare time of a step; None in a prediction.
    """

    date: str
    machine: str
    versions: dict[str, str]
    model: str
    parameters: int
    optimizer: str
    settings: dict[str, str] = Field(default_factory=dict)
    strategy: str
    stage: int | None = None
    world_size: int
    precision: str
    offload: str = "none"
    micro_batch: int | None = None
    seq_length: int | None = None
    checkpointing: bool = False
    command: str = ""
    device_memory: int | None = None
    notes: list[str] = Field(default_factory=list)
    overhead: float | None = None


class Record(StrictModel):
    """A whole account.

    Attributes:
        kind: measured or predicted.
        ranks: those that were recorded; a prediction for many ranks may hold the fullest only.
    """

    schema_version: int = SCHEMA
    kind: Literal["measured", "predicted"]
    provenance: Provenance
    ranks: list[RankRecord] = Field(min_length=1)

    @property
    def fullest(self) -> RankRecord:
        """The rank with the highest peak."""
        return max(self.ranks, key=lambda rank: rank.peak.on_device if rank.peak else 0)

    def save(self, path: str | Path) -> None:
        """Write JSON: whole, or not at all."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_name(f".{target.name}.{os.getpid()}")
        unfinished.write_text(self.model_dump_json(indent=1, exclude_none=True), encoding="utf-8")
        unfinished.replace(target)

    @classmethod
    def load(cls, path: str | Path) -> Record:
        """Read JSON.

        Raises:
            RecordError: the file is not there, truncated, of a newer format, or no record.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise RecordError(f"{path}: {error.strerror or error}") from error
        newer = _written_by_a_newer(text)
        if newer is not None:
            raise RecordError(f"{path} was written in format {newer}, this ds-optim reads up to {SCHEMA}: update it")
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "the file as a whole"
            raise RecordError(
                f"{path} is no whole memory record: {where}: {first['msg']}. Measure again "
                "(launcher/train.py --memory-report DIR), or give another file"
            ) from error


def _written_by_a_newer(text: str) -> int | None:
    """The format of a record that this version cannot know, if it is one."""
    try:
        found = json.loads(text).get("schema_version")
    except (ValueError, AttributeError):
        return None  # not a record at all, which is said better elsewhere
    return found if isinstance(found, int) and found > SCHEMA else None


def sized(amounts: Mapping[Category, int], method: CountedBy) -> dict[Category, Amount]:
    """Amounts of one method, without the empty ones."""
    return {category: Amount(bytes=count, method=method) for category, count in amounts.items() if count}


def human(count: float) -> str:
    """``1.23 GB (1.15 GiB)``: 1 GB is 1e9 bytes, 1 GiB 2**30."""
    for unit, size, binary in (("GB", 1e9, 2**30), ("MB", 1e6, 2**20), ("kB", 1e3, 2**10)):
        if abs(count) >= size:
            return f"{count / size:.2f} {unit} ({count / binary:.2f} {unit[0].upper()}iB)"
    return f"{count:.0f} B"


def merge(records: Iterable[Record]) -> Record:
    """One record of several ranks' records, sorted by rank; the provenance is that of the lowest."""
    ordered = sorted(records, key=lambda record: record.ranks[0].rank)
    ranks = [rank for record in ordered for rank in record.ranks]
    return ordered[0].model_copy(update={"ranks": ranks})
