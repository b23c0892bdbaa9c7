"""Logical tensors for `torch.distributed.checkpoint`: what a rank holds of them, and how that is written and read.

DCP's own planner decides who writes which chunk, and which parts of which chunks a rank reads. What is added here: a
tensor of which a rank holds any ranges (`Ranges`), a bound on the memory of writing (`Writer`), and reading every
chunk once, however many of its parts are wanted (`Reader`).
"""

from __future__ import annotations

import bisect
import operator
import queue
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

CHUNK_ELEMENTS = 1 << 24  # no chunk is larger: what writing and reading need beside the shards
FILE_BYTES = 1 << 28  # a file is closed before it grows larger; DCP keeps the chunks of an open file in memory


class Ranges(torch.Tensor):
    """A logical 1-D tensor of which this rank holds some ranges. It describes; no arithmetic works on it.

    Args:
        numel: of the whole tensor.
        dtype: that it is stored in.
        parts: ``(start, values)``, values being flat views of local tensors; they are written from, or read into.
        chunk_elements: for writing, neighbouring parts are joined and long ones cut into chunks of this many elements.
            None for reading, where every part is filled by itself.
    """

    _size: int
    _chunks: dict[int, list[Tensor]]

    @staticmethod
    def __new__(
        cls, numel: int, dtype: torch.dtype, parts: Iterable[tuple[int, Tensor]], chunk_elements: int | None = None
    ) -> Ranges:
        made: Ranges = torch.Tensor._make_wrapper_subclass(cls, (numel,), dtype=dtype)
        made._size = numel
        ordered = sorted(parts, key=operator.itemgetter(0))
        made._chunks = _joined(ordered, chunk_elements) if chunk_elements else {at: [part] for at, part in ordered}
        return made

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def held(self) -> Iterator[tuple[int, Tensor]]:
        """The ranges that are here: where each begins, and its values."""
        for begin, values in self._chunks.items():
            start = begin
            for part in values:
                yield start, part
                start += part.numel()

    def joined_with(self, others: Iterable[Ranges]) -> Ranges:
        """The same tensor with what others hold of it, for writing."""
        return Ranges(self._size, self.dtype, [part for one in (self, *others) for part in one.held()], CHUNK_ELEMENTS)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Ranges({self._size}, {self.dtype}, {len(self._chunks)} chunks here)"

    @classmethod
    def __torch_dispatch__(cls, func: Any, *_: Any, **__: Any) -> NoReturn:  # type: ignore[override]
        raise TypeError(f"{func} on a description of ranges, which holds no values of its own")

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [
            ChunkStorageMetadata(torch.Size((start,)), torch.Size((sum(map(len, values)),)))
            for start, values in self._chunks.items()
        ]

    def __create_write_items__(self, name: str, _: Any) -> list[WriteItem]:
        properties = TensorProperties(dtype=self.dtype)
        return [
            WriteItem(
                index=MetadataIndex(name, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=torch.Size((self._size,))),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        values = self._chunks[index.offset[0]]
        return values[0] if len(values) == 1 else torch.cat(values)


def _joined(ordered: list[tuple[int, Tensor]], most: int) -> dict[int, list[Tensor]]:
    """Chunks of at most ``most`` elements, by where they start."""
    chunks: dict[int, list[Tensor]] = {}
    begin = end = room = -1
    for start, values in ordered:
        for piece in values.split(most) if values.numel() else ():
            if start != end or piece.numel() > room:
                begin, room = start, most
                chunks[begin] = []
            chunks[begin].append(piece)
            start = end = start + piece.numel()
            room -= piece.numel()
    return chunks


def copy(wanted: Mapping[str, Ranges], there: Mapping[str, Ranges]) -> int:
    """Fill what is wanted from what somebody else holds of the same tensors; how many elements that were."""
    copied = 0
    for name in wanted.keys() & there.keys():
        held = list(there[name].held())
        begins = [start for start, _ in held]
        for start, values in wanted[name].held():
            at = max(bisect.bisect_right(begins, start) - 1, 0)
            while at < len(held) and begins[at] < start + values.numel():
                begin, source = held[at]
                low, high = max(start, begin), min(start + values.numel(), begin + source.numel())
                if low < high:
                    values[low - start : high - start].copy_(source[low - begin : high - begin])
                    copied += high - low
                at += 1
    return copied


class Writer(FileSystemWriter):
    """DCP's writer, files bounded: it keeps what it has copied to the host until the file is closed."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        files: queue.Queue[Any] = queue.Queue()
        prefix, held = plan.storage_data.prefix, 0
        batch: list[WriteItem] = []

        def close() -> None:
            if batch:
                name = f"{prefix}{files.qsize()}{DEFAULT_SUFFIX}"
                files.put((self.fs.concat_path(self.path, name), name, list(batch)))
                batch.clear()

        for item in plan.items:
            assert item.tensor_data is not None, "everything here is a tensor"
            size = item.tensor_data.chunk.sizes.numel() * item.tensor_data.properties.dtype.itemsize
            if held + size > FILE_BYTES:
                close()
                held = 0
            batch.append(item)
            held += size
        close()
        return self._write_data(planner, files)


class Reader(FileSystemReader):
    """DCP's reader, each chunk read once: a rank may want thousands of small parts of one."""

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        wanted: dict[MetadataIndex, list[ReadItem]] = {}
        for item in plan.items:
            wanted.setdefault(item.storage_index, []).append(item)
        places = sorted(
            wanted, key=lambda index: (self.storage_data[index].relative_path, self.storage_data[index].offset)
        )
        for index in places:
            info = self.storage_data[index]
            with open(Path(self.path) / info.relative_path, "rb") as stream:
                chunk = torch.load(self._slice_file(stream, info), map_location="cpu", weights_only=True)
            for item in wanted[index]:
                part = chunk.narrow(0, item.storage_offsets[0], item.lengths[0])
                planner.resolve_tensor(item).detach().copy_(part)
        done: Future[None] = Future()
        done.set_result(None)
        return done


def write(folder: Path, tensors: Mapping[str, Ranges], group: dist.ProcessGroup | None = None) -> None:
    """Write what the ranks of a group hold, each value once: a collective. None: what this process holds.

    Raises:
        OSError: on every rank, with the reasons of the ranks that failed.
    """
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    _quietly(save, dict(tensors), group, storage_writer=Writer(folder), planner=planner)


def read(folder: Path, tensors: Mapping[str, Ranges], group: dist.ProcessGroup | None = None) -> None:
    """Read into what this rank holds: a collective of a group. None: of this process on its own.

    Raises:
        OSError: on every rank, with the reasons of the ranks that failed.
    """
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    _quietly(load, dict(tensors), group, storage_reader=Reader(folder), planner=planner)


def lengths(folder: Path) -> dict[str, tuple[int, torch.dtype]]:
    """Elements and dtype of every stored tensor."""
    found: Metadata = FileSystemReader(folder).read_metadata()
    return {
        name: (entry.size.numel(), entry.properties.dtype)
        for name, entry in found.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def _quietly(function: Any, tensors: dict[str, Ranges], group: dist.ProcessGroup | None, **kwargs: Any) -> None:
    ranks = [0] if group is None else dist.get_process_group_ranks(group)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is as good as many
        try:
            function(tensors, process_group=group, no_dist=group is None, **kwargs)
        except CheckpointException as error:  # no subclass of Exception
            listed = [
                f"rank {ranks[at]}: {type(one).__name__}: {one}" for at, (one, _) in sorted(error.failures.items())
            ]
            raise OSError("\n- ".join(listed)) from error
