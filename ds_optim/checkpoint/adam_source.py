"""Where an AdamW's moments can be read from, range by range: a canonical checkpoint, DeepSpeed's own directory (also of
its own AdamW), or torch's ``state_dict()``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ds_optim.checkpoint import ranges
from ds_optim.checkpoint.directory import ABOUT, read_about, whole_checkpoint
from ds_optim.deepspeed.checkpoint_files import DeepSpeedFiles
from ds_optim.errors import CheckpointError, on_every_rank
from ds_optim.kernels.codes import BLOCK, blocks_of, decode
from ds_optim.latest import newest
from ds_optim.roles import canonical_name
from ds_optim.sharding.exchange import Ranks
from ds_optim.stepping.eight_bits import coded_keys
from ds_optim.stepping.names import saved_names

FIRST, SECOND = "exp_avg", "exp_avg_sq"


class Entry(NamedTuple):
    """What a source says of one parameter: logical shape, AdamW's step count (None: never stepped) and betas."""

    shape: tuple[int, ...]
    step: int | None
    betas: tuple[float, float]


class Want(NamedTuple):
    """A range of one parameter's moment, from ``start`` on, to be copied into a flat fp32 tensor."""

    name: str
    key: str
    start: int
    into: Tensor


class AdamSource(Protocol):
    """Anything that has an AdamW's moments of every parameter."""

    @property
    def entries(self) -> Mapping[str, Entry]:
        """The parameters by name."""

    def read(self, wants: Iterable[Want]) -> None:
        """Fill what is wanted: all ranks call it together."""


@dataclass(frozen=True, slots=True)
class CanonicalSource:
    """A checkpoint of `ds_optim.AdamW`, as `ds_optim.checkpoint.save` stores it, for ranks that read it together.

    Attributes:
        coded: the parameters whose moments it has in eight bits.
    """

    ranks: Ranks
    folder: Path
    entries: dict[str, Entry]
    coded: frozenset[str]

    def read(self, wants: Iterable[Want]) -> None:
        parts: dict[tuple[str, int, torch.dtype], list[tuple[int, Tensor]]] = {}
        coded: list[tuple[Want, Tensor, Tensor]] = []
        for want in wants:
            numel = math.prod(self.entries[want.name].shape)
            if want.name not in self.coded:
                stored = f"state.{want.name}.{want.key}", numel, torch.float32
                parts.setdefault(stored, []).append((want.start, want.into))
                continue
            first, count = want.start // BLOCK, blocks_of(want.start % BLOCK + want.into.numel())
            codes = torch.empty(want.into.numel(), dtype=torch.uint8, device="cpu")
            scales = torch.empty(count, dtype=torch.float32, device="cpu")
            coded.append((want, codes, scales))
            names = coded_keys(want.key)
            of_codes = f"state.{want.name}.{names.codes}", numel, torch.uint8
            of_scales = f"state.{want.name}.{names.scales}", blocks_of(numel), torch.float32
            parts.setdefault(of_codes, []).append((want.start, codes))
            parts.setdefault(of_scales, []).append((first, scales))
        wanted = {name: ranges.Ranges(numel, dtype, held) for (name, numel, dtype), held in parts.items()}
        try:
            ranges.read(self.folder, wanted, self.ranks.group)
        except OSError as error:  # raised on every rank alike
            raise CheckpointError(f"reading {self.folder} failed half-way, start warm again:\n- {error}") from error
        for want, codes, scales in coded:
            of_elements = scales.repeat_interleave(BLOCK)[want.start % BLOCK :][: codes.numel()]
            want.into.copy_(decode(codes, of_elements, "signed" if want.key == FIRST else "unsigned"))


@dataclass(frozen=True, slots=True)
class StateDictSource:
    """The ``state_dict()`` of `torch.optim.AdamW` or `Adam`, in this process's memory."""

    entries: dict[str, Entry]
    moments: dict[str, Mapping[str, Tensor]]

    def read(self, wants: Iterable[Want]) -> None:
        for name, key, start, into in wants:
            into.copy_(self.moments[name][key].reshape(-1)[start : start + into.numel()])


@dataclass(frozen=True, slots=True)
class DeepSpeedSource:
    """What DeepSpeed's ``save_checkpoint`` wrote of a ZeRO run; its files are mapped, not read.

    Attributes:
        fragments: of every parameter, in order: ``(start, stop, its tensor's state, offset there)``.
    """

    entries: dict[str, Entry]
    fragments: dict[str, list[tuple[int, int, Mapping[str, Tensor], int]]]

    def read(self, wants: Iterable[Want]) -> None:
        for name, key, begin, into in wants:
            for start, stop, state, offset in self.fragments[name]:
                low, high = max(start, begin), min(stop, begin + into.numel())
                if low < high:
                    values = state[key].view(-1)[offset + low - start : offset + high - start]
                    into[low - begin : high - begin] = values


def source_in(ranks: Ranks, directory: Path, tag: str | None) -> AdamSource:
    """What a directory of checkpoints holds: a collective of ``ranks``.

    Raises:
        CheckpointError: on every rank; nothing there, damaged, or not AdamW's.
    """
    if any((directory / (tag or newest(directory) or "")).glob("*model_states.pt")):
        return on_every_rank(ranks, lambda: _deepspeed_source(directory, tag), f"cannot start from {directory}")
    return _canonical_source(ranks, directory, tag)


def _canonical_source(ranks: Ranks, directory: Path, tag: str | None) -> CanonicalSource:
    """
    Raises:
        CheckpointError: on every rank; no checkpoint of this form, damaged, or not AdamW's.
    """
    folder = whole_checkpoint(ranks, directory, tag, fallback=False)
    about = on_every_rank(ranks, lambda: read_about(folder), f"cannot read {folder / ABOUT}")
    if about["optimizer"] != "AdamW":
        raise CheckpointError(
            f"{folder} is of {about['optimizer'] or 'a model without optimizer'}: only AdamW's two moments say what "
            "another optimizer's state should be; start cold"
        )
    betas = {name: tuple(group["settings"]["betas"]) for group in about["groups"] for name in group["parameters"]}
    entries = {
        name: Entry(tuple(entry["shape"]), entry["step"], betas[name]) for name, entry in about["parameters"].items()
    }
    coded = {name for name, entry in about["parameters"].items() if coded_keys(FIRST).codes in entry["state"]}
    return CanonicalSource(ranks, folder, entries, frozenset(coded))


def _deepspeed_source(directory: Path, tag: str | None) -> DeepSpeedSource:
    """
    Raises:
        CheckpointError: damaged, not of a ZeRO run, or not AdamW's.
    """
    files = DeepSpeedFiles(directory, tag)
    if not files.is_zero:
        raise CheckpointError(
            f"{files.folder} is of a run without ZeRO, whose state has no names: convert it (ds-optim checkpoint "
            "convert), or give its optimizer's state_dict() with names=[...]"
        )
    source = DeepSpeedSource({}, {})
    layouts = files.layouts([])
    for rank in range(files.world_size):
        saved = files.rank(rank, []).optimizer
        places = [(group, saved["state"].get(key, {})) for group in saved["param_groups"] for key in group["params"]]
        for layout, (group, state) in zip(layouts, places, strict=True):
            for spec in layout.parameters:
                step = int(state["step"]) if "step" in state else None
                source.entries.setdefault(spec.name, Entry(spec.shape, step, tuple(group.get("betas", ()))))
                source.fragments.setdefault(spec.name, [])
            needed = max((fragment.offset + fragment.numel for fragment in layout.fragments(rank)), default=0)
            problem = _no_adam(group.get("betas"), state)
            if not problem and state and min(state[FIRST].numel(), state[SECOND].numel()) < needed:
                problem = "moments of other sizes than the parameters"
            if problem:
                raise CheckpointError(f"{files.folder} has {problem}: not Adam's {FIRST} and {SECOND}")
            for fragment in layout.fragments(rank) if state else ():
                place = (fragment.start, fragment.stop, state, fragment.offset)
                source.fragments[layout.parameters[fragment.parameter].name].append(place)
    return source


def _no_adam(betas: Any, state: Mapping[str, Any]) -> str:
    """What keeps a parameter's state from being Adam's, in words."""
    if betas is None or len(betas) != 2 or (state and set(state) - {"max_exp_avg_sq"} != {"step", FIRST, SECOND}):
        return f"betas {betas} and state {sorted(state)}"
    return ""


def state_dict_source(
    state_dict: Mapping[str, Any], names: Sequence[str] | None, trained: Sequence[str]
) -> tuple[StateDictSource, list[str]]:
    """The source, and why it is none.

    Args:
        names: in the order of the state dict, if it has none of its own.
        trained: names of the model's trained parameters, in the model's order.
    """
    source, problems = StateDictSource({}, {}), list[str]()
    groups = state_dict.get("param_groups")
    if not isinstance(groups, Sequence) or not isinstance(state_dict.get("state"), Mapping):
        return source, ["it has no state and param_groups: give an optimizer's state_dict(), or a checkpoint directory"]
    keys = [key for group in groups for key in group["params"]]
    listed: Sequence[Any] | None = names
    if listed is None and all("param_names" in group for group in groups):
        listed = [name for group in groups for name in group["param_names"]]
    if listed is None and all(named := saved_names(state_dict)):
        listed = [name for names_of_group in named for name in names_of_group or ()]
    if listed is None:
        listed = keys if all(isinstance(key, str) for key in keys) else trained if len(groups) == 1 else None
    if listed is None:
        return source, ["its groups order the parameters otherwise than the model and name none: give names=[...]"]
    if len(listed) != len(keys):
        return source, [f"it has {len(keys)} parameters, and there are {len(listed)} names for them"]
    betas = [group.get("betas") for group in groups for _ in group["params"]]
    for key, name, its_betas in zip(keys, map(canonical_name, listed), betas, strict=True):
        state = state_dict["state"].get(key, {})
        if its_betas is None or len(its_betas) != 2 or (state and not {"step", FIRST, SECOND} <= set(state)):
            problems.append(
                f"{name} has betas {its_betas} and state {sorted(state)}: not Adam's exp_avg and exp_avg_sq"
            )
        elif name in source.entries:
            problems.append(f"two of its parameters are called {name}")
        else:
            shape = tuple(state[FIRST].shape) if state else ()
            source.entries[name] = Entry(shape, int(state["step"]) if state else None, tuple(its_betas))
            source.moments[name] = state
    return source, problems
