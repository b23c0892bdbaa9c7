"""Reads the directory that DeepSpeed's own ``save_checkpoint`` writes: without an engine, and without DeepSpeed.

    mp_rank_00_model_states.pt                        weights, buffers, counters; ZeRO-0: the optimizer too
    zero_pp_rank_R_mp_rank_00_model_states.pt         the same at ZeRO-3: slices of what is not trained
    [bf16_]zero_pp_rank_R_mp_rank_00_optim_states.pt  ZeRO-1, 2, 3: rank R's fp32 partitions and optimizer state

Tensors are mapped, not read: however many ranks there were, they take memory only when they are used. Every file is
checked against the checksums that torch puts into it. Nothing in it is run unless the caller trusts it.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_optim.errors import CheckpointError, in_one
from ds_optim.latest import LATEST, newest
from ds_optim.roles import canonical_name
from ds_optim.sharding.layout import FlatPartition, Layout, ParameterSpec, Replicated, SlicedParameters
from ds_optim.stepping.logical_tensors import LogicalRange

_OWN_KEYS = (
    *("module", "buffer_names", "optimizer", "param_shapes", "shared_params", "frozen_param_shapes"),
    *("frozen_param_fragments", "lr_scheduler", "data_sampler", "random_ltd", "skipped_steps", "global_steps"),
    *("global_samples", "dp_world_size", "mp_world_size", "checkpoint_parallel_dimensions", "ds_config", "ds_version"),
    *("universal_checkpoint_info", "sparse_tensor_module_names", "csr_tensor_module_names"),
)

_UNIVERSAL = ("exp_avg", "exp_avg_sq")


class PartsOfModelsError(CheckpointError):
    """The files hold the parts of models that ranks had under model parallelism."""


class _Plain:
    """Stands for a class of DeepSpeed's: its attributes are kept, its code is not needed."""


class _Stage(int):
    """Stands for DeepSpeed's enumeration of ZeRO stages."""


def _member(kind: Any, name: str) -> str:
    """Stands for ``getattr``, by which early releases of Python 3.11 store members of enumerations.

    Raises:
        TypeError: it is asked of anything else.
    """
    if kind is not _Stage:
        raise TypeError(f"getattr({kind!r}, {name!r}) in a checkpoint")
    return name


_STANDING_FOR: list[Any] = [
    (_Stage, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    *((_member, name) for name in ("getattr", "builtins.getattr", "__builtin__.getattr")),
    (type("LossScaler", (_Plain,), {}), "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (type("DynamicLossScaler", (_Plain,), {}), "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (type("Fragment", (_Plain,), {}), "deepspeed.utils.tensor_fragment.fragment_address"),
]


@dataclass(frozen=True, slots=True)
class RankStates:
    """What one rank's optimizer held.

    Attributes:
        masters: the tensors that it stepped, in the order of its groups; at ZeRO-1/2 without padding at their end.
        optimizer: its torch state dict (``state``, ``param_groups``).
        scaler: the fp16 loss scaler, if there was one.
    """

    masters: list[Tensor]
    optimizer: dict[str, Any]
    scaler: Any


class DeepSpeedFiles:
    """One checkpoint of DeepSpeed's, opened.

    Args:
        source: the directory that was given to ``save_checkpoint``, or a checkpoint's folder in it.
        tag: of the checkpoint; unset, the one that ``latest`` names.
        trust: also accept files that hold objects of unknown classes, which runs code of theirs.
        verify: whether all files must be there and whole; otherwise only what is asked for is opened.

    Raises:
        CheckpointError: files that are missing, damaged or not safe to read, all of them.
        PartsOfModelsError: model parallelism.
    """

    def __init__(self, source: Path, tag: str | None, *, trust: bool = False, verify: bool = True) -> None:
        self.folder = _folder(source, tag)
        self.tag = self.folder.resolve().name
        names = [path.name for path in self.folder.glob("*.pt")]
        self._trust = trust
        self._bf16 = "bf16_" if any(name.startswith("bf16_") for name in names) else ""
        self._slices = any(name.startswith("zero_pp_rank") and name.endswith("_model_states.pt") for name in names)
        main = self._model_file(0)
        if verify:
            self._refuse(_damage(self.folder / main))
        self.main: dict[str, Any] = self._load(main)
        if "module" not in self.main or "dp_world_size" not in self.main:
            raise CheckpointError(f"{self.folder / main} was not written by DeepSpeed's save_checkpoint")
        self.world_size = int(self.main["dp_world_size"])
        unknown = [name for name in names if name.startswith(("expert_", "expp_", "layer_"))]
        if int(self.main.get("mp_world_size", 1)) > 1 or unknown or self.main.get("ds_autoep_layers"):
            raise PartsOfModelsError(
                f"{self.folder} is of a model- or pipeline-parallel run or has experts of their own: not supported"
            )
        if verify:
            self._refuse(self.damages([name for name in self.files if name != main]))
        self.shapes = [
            {canonical_name(name): tuple(shape) for name, shape in group.items()}
            for group in self.main["param_shapes"] or []
        ]

    @property
    def is_zero(self) -> bool:
        """Whether the optimizer's tensors are shards (ZeRO-1, 2, 3); they bring their parameters' names."""
        return self.main["optimizer"] is None

    @property
    def stage(self) -> str:
        """The ZeRO stage in words; stages 1 and 2 write the same."""
        return "3" if self._slices else "1 or 2" if self.is_zero else "0"

    @property
    def optimizer_name(self) -> str:
        """What the configuration called the optimizer; empty where that was not saved, or it was made by hand."""
        return str(((self.config or {}).get("optimizer") or {}).get("type") or "")

    @property
    def is_half(self) -> bool:
        """Whether the files are those of a model in bf16; at ZeRO-0 of one with fp32 masters beside it."""
        return bool(self._bf16) if self.is_zero else "fp32_groups" in self.main["optimizer"]

    @property
    def config(self) -> dict[str, Any] | None:
        """The DeepSpeed configuration of the run; None if it was given as a file, whose path alone was saved."""
        found = self.main.get("ds_config")
        return found if isinstance(found, dict) else None

    @property
    def client_state(self) -> dict[str, Any]:
        """What the user added to the checkpoint."""
        return {key: value for key, value in self.main.items() if key not in _OWN_KEYS}

    @property
    def module(self) -> dict[str, Tensor]:
        """Weights and buffers by name; at ZeRO-3 the weights are empty."""
        return {canonical_name(name): value for name, value in self.main["module"].items() if torch.is_tensor(value)}

    def rank(self, rank: int, groups: Sequence[Sequence[str]]) -> RankStates:
        """What a rank's optimizer held; at ZeRO-0 all ranks' alike.

        Args:
            groups: names of the parameters of each group, needed at ZeRO-0 only.
        """
        if not self.is_zero:
            saved = self.main["optimizer"]
            if "fp32_groups" in saved:
                masters = [tensor for group in saved["fp32_groups"] for tensor in group]
                return RankStates(masters, saved["optimizer_state_dict"], None)
            module = self.module
            return RankStates([module[name] for group in groups for name in group], saved, None)
        saved = self._sharded(rank)
        masters = saved["fp32_flat_groups" if self._slices else "single_partition_of_fp32_groups"]
        optimizer = saved["optimizer_state_dict" if self._slices else "base_optimizer_state"]
        return RankStates(list(masters), optimizer, saved.get("loss_scaler"))

    def _sharded(self, rank: int) -> dict[str, Any]:
        """What a ZeRO wrapper saved."""
        name = self._optimizer_file(rank)
        saved: dict[str, Any] = self._load(name).get("optimizer_state_dict", {})
        expected = (
            ("fp32_flat_groups", "optimizer_state_dict")
            if self._slices
            else ("single_partition_of_fp32_groups", "base_optimizer_state", "group_paddings")
        )
        missing = [key for key in expected if key not in saved]
        if missing:
            raise CheckpointError(
                f"{self.folder / name} has no {', '.join(missing)}: no DeepSpeed that is known here wrote it"
            )
        return saved

    def layouts(self, groups: Sequence[Sequence[ParameterSpec]]) -> list[Layout]:
        """Who held what, for every tensor that the optimizer stepped.

        Args:
            groups: the parameters of each group, needed at ZeRO-0 only.
        """
        if not self.is_zero:
            return [Replicated(spec) for group in groups for spec in group]
        listed = [tuple(ParameterSpec(name, shape) for name, shape in group.items()) for group in self.shapes]
        if self._slices:
            return [SlicedParameters(specs, self.world_size) for specs in listed]
        saved = self._sharded(0)
        layouts: list[Layout] = []
        for index, specs in enumerate(listed):
            gaps = saved["param_alignment_paddings"][index] if "param_alignment_paddings" in saved else [0] * len(specs)
            offsets, end = [], 0
            for spec, gap in zip(specs, gaps, strict=True):
                offsets.append(end)
                end += spec.numel + gap
            # stage_1_and_2.py leaves the tail's padding out, bf16_optimizer.py saves it
            left_out = saved["group_paddings"][index] if "zero_stage" in saved else 0
            size = saved["single_partition_of_fp32_groups"][index].numel() + left_out
            layouts.append(FlatPartition(specs, tuple(offsets), size, self.world_size))
        return layouts

    def untrained(
        self, rank: int, trained: Container[str]
    ) -> dict[str, tuple[tuple[int, ...], list[LogicalRange], Tensor]]:
        """Buffers and parameters that the optimizer did not step: shape, which elements are here, and these.

        What all ranks have alike is rank 0's.
        """
        buffers = {canonical_name(name) for name in self.main["buffer_names"]}
        found: dict[str, tuple[tuple[int, ...], list[LogicalRange], Tensor]] = {}
        if self._slices:
            own = self.main if rank == 0 else self._load(self._model_file(rank))
            for name, shape in (own["frozen_param_shapes"] or {}).items():
                values = own["frozen_param_fragments"][name].view(-1)
                begin = min(values.numel() * rank, shape.numel())
                held = LogicalRange(begin, min(begin + values.numel(), shape.numel()), 0)
                found[canonical_name(name)] = (tuple(shape), [held], values[: shape.numel() - begin])
        if rank == 0:
            module = self.module
            seen = {_place(values) for name, values in module.items() if name in trained}
            for name, values in module.items():
                if name in buffers or not (self._slices or name in trained or _place(values) in seen):
                    found[name] = (tuple(values.shape), [LogicalRange(0, values.numel(), 0)], values)
                    seen.add(_place(values))
        return found

    def _model_file(self, rank: int) -> str:
        return f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" if self._slices else "mp_rank_00_model_states.pt"

    def _optimizer_file(self, rank: int) -> str:
        return f"{self._bf16}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"

    @property
    def files(self) -> list[str]:
        """The names of all files that must be there, without doubles."""
        ranks = range(self.world_size if self.is_zero else 0)
        return list(dict.fromkeys([self._model_file(0), *(name for rank in ranks for name in self.files_of(rank))]))

    def files_of(self, rank: int) -> list[str]:
        """The names of those that hold what one rank had."""
        return [self._model_file(rank), *([self._optimizer_file(rank)] if self.is_zero else [])]

    def damages(self, names: Sequence[str]) -> list[str]:
        """What is wrong with some of the files: they are read once, for their checksums."""
        return [problem for name in names for problem in _damage(self.folder / name)]

    def _refuse(self, problems: Sequence[str]) -> None:
        if problems:
            raise CheckpointError(in_one(problems, f"DeepSpeed checkpoint {self.folder} is not whole"))

    def _load(self, name: str) -> Any:
        path = self.folder / name
        try:
            if self._trust:
                return torch.load(path, map_location="cpu", mmap=True, weights_only=False)
            with torch.serialization.safe_globals(_STANDING_FOR):
                return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except Exception as error:  # torch's pickle readers raise anything
            said = str(error)
            unsafe = [line.split("GLOBAL ")[1].split(" was ")[0] for line in said.splitlines() if "GLOBAL " in line]
            reason = (
                f"it holds a {unsafe[0]}, reading which would run code; if you trust it, say so (--trust, trust=True)"
                if unsafe and not self._trust
                else " ".join(said.split())[:300]
            )
            raise CheckpointError(f"{path} cannot be read: {reason}") from error


def universal_conversion(files: DeepSpeedFiles) -> str:
    """What DeepSpeed's ``ds_to_universal`` would make of a checkpoint, in words; empty at ZeRO-0, which it refuses.

    It knows two kinds of state, Adam's, and slices them as if every element had a value (`ds_to_universal.py`,
    `extract_zero_shards` and `extract_zero_shards_stage3`).
    """
    if not files.is_zero:
        return ""
    dropped: set[str] = set()
    for rank in range(files.world_size):
        its = files.rank(rank, [])
        keys = [key for group in its.optimizer["param_groups"] for key in group["params"]]
        for key, master in zip(keys, its.masters, strict=True):
            state = its.optimizer["state"].get(key, {})
            if any(name not in state or state[name].numel() < master.numel() for name in _UNIVERSAL):
                return (
                    f"deepspeed.checkpoint.ds_to_universal breaks half-way: it needs {' and '.join(_UNIVERSAL)} of "
                    "every element"
                )
            dropped |= set(state) - {"step", *_UNIVERSAL}
    if dropped:
        return f"deepspeed.checkpoint.ds_to_universal drops {', '.join(sorted(dropped))} without a word"
    return f"deepspeed.checkpoint.ds_to_universal takes over {' and '.join(_UNIVERSAL)}, which is all there is"


def _place(values: Tensor) -> object:
    """The same for two names of one tied weight, and for nothing else."""
    return (values.data_ptr(), values.shape) if values.numel() else object()


def _folder(source: Path, tag: str | None) -> Path:
    if tag is None and any(source.glob("*_model_states.pt")):
        return source
    tag = tag or newest(source)
    if not tag:
        latest = f"neither a file {LATEST} nor" if tag is None else f"an empty file {LATEST} and no"
        raise CheckpointError(f"{source} has {latest} *_model_states.pt: it is no DeepSpeed checkpoint")
    folder = source / tag
    if not any(folder.glob("*_model_states.pt")):
        raise CheckpointError(f"there is no *_model_states.pt in {folder}: it is no DeepSpeed checkpoint, or damaged")
    return folder


def _damage(path: Path) -> list[str]:
    """Whether a file is there and is what torch wrote: its format is a zip file, with a CRC-32 of each record."""
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        return [f"{path.name} is damaged: the checksum of its record {broken} differs"] if broken else []
    except FileNotFoundError:
        return [f"{path.name} is missing"]
    except (OSError, zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError) as error:
        return [f"{path.name} is damaged ({error})"]
