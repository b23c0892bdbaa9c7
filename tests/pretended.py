"""A pretended accelerator on a build without one: its tensors say cuda:0, their values lie on the CPU.

The current device is another one, cuda:1: who launches on it, or asks for its stream, is wrong.

What would reach the device is written down while `Device.recording` is on: launches (of torch's operations, and of our
Triton programs, which really run, in Triton's interpreter), copies between host and device, and what would make the
host wait. Nothing here knows what a GPU computes or how long it takes.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ds_optim.linalg import triangle
from ds_optim.sharding import exchange
from machine_code import PROGRAMS

CUDA, OTHER = torch.device("cuda", 0), torch.device("cuda", 1)

# Operations whose result, or the size of it, the host needs.
READS = frozenset(
    [
        "_local_scalar_dense",
        "item",
        "is_nonzero",
        "nonzero",
        "nonzero_static",
        "equal",
        "masked_select",
        "_unique2",
        "unique_dim",
        "bincount",
        "unique_consecutive",
        "allclose",
        "_linalg_eigh",
        "_linalg_svd",
        "linalg_qr",
        "repeat_interleave",
    ]
)
# What starts nothing: views, room, and questions.
FREE = frozenset(
    [
        "view",
        "_unsafe_view",
        "_reshape_alias",
        "as_strided",
        "narrow",
        "slice",
        "select",
        "split",
        "split_with_sizes",
        "unbind",
        "t",
        "transpose",
        "permute",
        "expand",
        "detach",
        "unsqueeze",
        "squeeze",
        "alias",
        "diagonal",
        "lift_fresh",
        "set_",
        "empty",
        "empty_like",
        "empty_strided",
        "new_empty",
        "new_empty_strided",
        "is_pinned",
    ]
)


class Guardless(TorchFunctionMode):
    """The bindings of a build without CUDA that ask for its device guard, by operations that do not."""

    INSTEAD: ClassVar[dict[Any, Callable[..., Any]]] = {
        Tensor.__invert__: torch.bitwise_not,
        Tensor.__float__: lambda one: torch.ops.aten._local_scalar_dense(one),
        Tensor.__int__: lambda one: int(torch.ops.aten._local_scalar_dense(one)),
        Tensor.__bool__: lambda one: bool(torch.ops.aten._local_scalar_dense(one)),
        Tensor.pin_memory: lambda one: torch.ops.aten._pin_memory(one),
        Tensor.__getitem__: lambda one, places: _part(one, places),
        Tensor.__setitem__: lambda one, places, value: _set(_part(one, places), value),
    }

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is Tensor.to:
            return _to(*args, **(kwargs or {}))
        if function is Tensor.copy_:
            return _copy(*args, **(kwargs or {}))
        return self.INSTEAD.get(function, function)(*args, **(kwargs or {}))


def _to(one: Tensor, *places: Any, non_blocking: bool = False, copy: bool = False, **named: Any) -> Tensor:
    places = (*places, *named.values())
    device = next((torch.device(place) for place in places if isinstance(place, torch.device | str)), one.device)
    dtype = next((place for place in places if isinstance(place, torch.dtype)), one.dtype)
    device = CUDA if device.type == "cuda" else device
    if (device, dtype, copy) == (one.device, one.dtype, False):
        return one
    moved: Tensor = torch.ops.aten._to_copy(one, dtype=dtype, device=device, non_blocking=non_blocking)
    return moved


def _copy(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    copy = torch.ops.aten.copy_.default
    found: Tensor = copy._op_dk(torch._C.DispatchKey.Python, target, source, non_blocking=non_blocking)
    return found


def _set(part: Tensor, value: Any) -> None:
    _copy(part, value) if isinstance(value, Tensor) else part.fill_(value)


def _part(one: Tensor, places: Any) -> Tensor:
    axis = 0
    for place in places if isinstance(places, tuple) else (places,):
        if place is None:
            one = one.unsqueeze(axis)
        elif isinstance(place, slice):
            one = torch.ops.aten.slice(one, axis, place.start, place.stop, place.step or 1)
        elif isinstance(place, Tensor):
            one = torch.ops.aten.index(one, [None] * axis + [place])
        else:
            one = one.select(axis, place)
            axis -= 1
        axis += 1
    return one


class OnDevice(Tensor):
    """A tensor of the pretended device.

    Attributes:
        values: where they really are.
    """

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> OnDevice:
        made: OnDevice = Tensor._make_wrapper_subclass(
            cls,
            values.size(),
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=CUDA,
        )
        made.values = values
        return made

    def __repr__(self, **_: Any) -> str:
        return f"OnDevice({self.values})"

    def data_ptr(self) -> int:
        return self.values.data_ptr()

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{function} outside of the device")


class Device(TorchDispatchMode):
    """The device, while it is entered.

    Attributes:
        launches: by name, and how often.
        copies: between host and device, by direction and line; "(pinned)" ones wait for nothing.
        waits: of the host, by reason and line.
        order: of what touches memory.
        stream: the current one.
        current: the current device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches, self.copies, self.waits = Counter[str](), Counter[str](), Counter[str]()
        self.is_recording = False
        self.recordings = 0
        self.order = Order()
        self.current = OTHER
        self.main = self.stream = type("Stream", (Stream,), {"device": self})("first stream")
        self._pinned: set[int] = set()
        self._is_waited_for = False
        self._alive: list[Tensor] = []  # in a step no memory is used twice: what allocators do is not asked here

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Forget what was written down, and write down what follows."""
        for book in (self.launches, self.copies, self.waits):
            book.clear()
        self.order.forget()
        self._alive.clear()
        self.is_recording = True
        self.recordings += 1
        try:
            yield
        finally:
            self.is_recording = False

    def note(self, book: Counter[str], what: str, *, with_line: bool = True) -> None:
        if self.is_recording:
            book[f"{what} {_line()}" if with_line else what] += 1

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = function._schema.name.partition("::")[2]
        given = list(_leaves((args, kwargs)))
        ours = [one for one in given if isinstance(one, OnDevice)]
        asked = kwargs.get("device")
        if name in ("_pin_memory", "pin_memory"):
            return self._pin(args[0].clone())
        if name == "is_pinned":
            return self._is_pinned(args[0])
        does_pin = kwargs.pop("pin_memory", None)
        self._is_waited_for = False
        lands_here = bool(ours) if asked is None else torch.device(asked).type == "cuda"
        if name in ("_to_copy", "copy_"):
            target_here = isinstance(args[0], OnDevice) if name == "copy_" else lands_here
            source = args[1] if name == "copy_" else args[0]
            lands_here = target_here
            if target_here != isinstance(source, OnDevice):
                host = source if target_here else args[0] if name == "copy_" else None
                self._copy(target_here, host, bool(kwargs.get("non_blocking") or (args[2:] and args[2])))
        elif name in READS and ours:
            self._is_waited_for = True
            self.note(self.waits, name)
        elif name in ("index", "index_put_", "index_put") and any(
            one is not None and one.dtype in (torch.bool, torch.uint8) for one in args[1]
        ):
            self.note(self.waits, f"{name} by a mask")
        elif ours and any(isinstance(one, Tensor) and not isinstance(one, OnDevice) and one.dim() > 0 for one in given):
            raise RuntimeError(f"{name}: expected all tensors to be on the same device")
        if lands_here and name not in FREE:
            self.note(self.launches, name, with_line=False)
        if asked is not None:
            kwargs["device"] = torch.device("cpu")
        found = function(*_mapped(_values, args), **_mapped(_values, kwargs))
        changed = kwargs.get("out", args[0]) if function._schema.is_mutable else None
        made = _mapped(_placed, found) if lands_here and changed is None else found
        if name not in FREE:
            self._order(name, given, list(_leaves(made if changed is None else changed)))
        if changed is not None:
            return None if not function._schema.returns else changed
        return self._pin(found) if does_pin else made

    def _order(self, name: str, given: list[Any], written: list[Any]) -> None:
        """Who touches which memory: the stream that is current, or the host; a copy between them is the stream's."""
        tensors = [[one for one in those if isinstance(one, Tensor)] for those in (given, written)]
        touched, changed = ({_address(one) for one in those} for those in tensors)
        everything = [*tensors[0], *tensors[1]]
        self._alive += map(_values, everything)
        where = self.stream.name if any(isinstance(one, OnDevice) for one in everything) else "host"
        if where != "host":
            self.order.learns(where, self.order.of("host"))  # it was enqueued behind what the host has done
        self.order.use(where, touched - changed, changed, f"{name} {_line()}")
        if self._is_waited_for:
            self.order.learns("host", self.order.of(where))

    def touched_by_program(self, args: Any, what: str) -> None:
        """All tensors that a program is given count as written to."""
        addresses = {_address(one) for one in _leaves(args) if isinstance(one, OnDevice)}
        self.order.learns(self.stream.name, self.order.of("host"))
        self.order.use(self.stream.name, set(), addresses, what)

    def _pin(self, tensor: Tensor) -> Tensor:
        self._pinned.add(tensor.untyped_storage().data_ptr())
        return tensor

    def _is_pinned(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._pinned

    def _copy(self, to_device: bool, host: Tensor | None, non_blocking: bool) -> None:
        """``host``: the tensor of the host, if it is there already."""
        free = non_blocking and host is not None and self._is_pinned(host)
        direction = "to the device" if to_device else "to the host"
        self.note(self.copies, f"{direction}{' (pinned)' if free else ''}")
        if not free:
            self._is_waited_for = True
            self.note(self.waits, f"copy {direction}")


class Order:
    """What comes after what, on the streams of a device and on the host: vector clocks.

    Attributes:
        races: uses of memory that another stream, or the host, has written, or is still reading where it is written to,
            without having waited.
    """

    def __init__(self) -> None:
        self.known: dict[str, Counter[str]] = {}
        self.races = Counter[str]()
        self._written: dict[int, tuple[str, int]] = {}
        self._read: dict[int, dict[str, int]] = {}

    def of(self, where: str) -> Counter[str]:
        """How far all others are, as far as this one has waited for them."""
        return self.known.setdefault(where, Counter())

    def learns(self, where: str, known: Counter[str]) -> None:
        self.of(where).update({one: max(0, time - self.of(where)[one]) for one, time in known.items()})

    def use(self, where: str, read: set[int], written: set[int], what: str) -> None:
        """Something happens on a stream, or on the host, to memory at these addresses."""
        known = self.of(where)
        known[where] += 1
        for address in read | written:
            writer, time = self._written.get(address, (where, 0))
            readers = self._read.get(address, {}) if address in written else {}
            for other, then in ((writer, time), *readers.items()):
                if other != where and known[other] < then:
                    self.races[f"{what} on {where}, behind the {other}'s back"] += 1
        for address in read:
            self._read.setdefault(address, {})[where] = known[where]
        for address in written:
            self._written[address] = where, known[where]
            self._read.pop(address, None)

    def forget(self) -> None:
        """Which memory is whose."""
        self._written.clear()
        self._read.clear()


class Event:
    """Of a stream: the host waits for it if it was recorded in the step that asks."""

    def __init__(self, device: Device, known: Counter[str]) -> None:
        self.device, self.known, self.recorded = device, known, device.recordings

    def synchronize(self) -> None:
        self.device.order.learns("host", self.known)
        if self.recorded == self.device.recordings:
            self.device.note(self.device.waits, "an event of this step")


class Stream:
    """What runs in its own order."""

    device: Device

    def __init__(self, name: Any) -> None:
        self.name = name if isinstance(name, str) else f"second stream of {name}"

    def __enter__(self) -> Stream:
        self._before, self.device.stream = self.device.stream, self
        return self

    def __exit__(self, *_: object) -> None:
        self.device.stream = self._before

    def record_event(self) -> Event:
        return Event(self.device, self.device.order.of(self.name).copy())

    def wait_event(self, event: Event) -> None:
        self.device.order.learns(self.name, event.known)

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())


def _leaves(tree: Any) -> Iterator[Any]:
    """As torch's own trees, which know more and would take most of the time."""
    if isinstance(tree, (tuple, list)):
        for one in tree:
            yield from _leaves(one)
    elif isinstance(tree, dict):
        yield from _leaves(list(tree.values()))
    else:
        yield tree


def _mapped(change: Callable[[Any], Any], tree: Any) -> Any:
    if isinstance(tree, (tuple, list)):
        return (list if isinstance(tree, list) else tuple)(_mapped(change, one) for one in tree)
    if isinstance(tree, dict):
        return {key: _mapped(change, one) for key, one in tree.items()}
    return change(tree)


def _address(one: Tensor) -> int:
    return int(_values(one).untyped_storage().data_ptr())


def _values(one: Any) -> Any:
    return one.values if isinstance(one, OnDevice) else one


def _placed(one: Any) -> Any:
    return OnDevice(one) if isinstance(one, Tensor) and not isinstance(one, OnDevice) else one


def _line() -> str:
    """Where in ds_optim this comes from."""
    frame = sys._getframe(2)
    while frame.f_back is not None:
        file = frame.f_code.co_filename
        if "/ds_optim/" in file and "/tests/" not in file:
            return f"ds_optim/{file.rsplit('/ds_optim/', 1)[1]}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"


class _Program:
    """A Triton program that is written down, and run on the values."""

    def __init__(self, device: Device, name: str, program: Any, does_run: bool) -> None:
        self.device, self.name, self.program, self.does_run = device, name, program, does_run

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **options: Any) -> None:
            is_there = any(isinstance(one, OnDevice) for one in _leaves(args))
            assert not is_there or self.device.current == CUDA, f"{self.name} would run on {self.device.current}"
            self.device.note(self.device.launches, self.name, with_line=False)
            self.device.touched_by_program(args, f"{self.name} {_line()}")
            if self.does_run:
                self.program[grid](*_mapped(_values, args), **options)

        return launch


@contextlib.contextmanager
def _made_current(device: Device, wanted: torch.device) -> Iterator[None]:
    before, device.current = device.current, wanted
    try:
        yield
    finally:
        device.current = before


def _current_stream(device: Device, of: torch.device | None) -> Any:
    assert (of or device.current) == CUDA, f"the stream of {of or device.current} was asked for"
    return device.stream


@contextlib.contextmanager
def entered(patch: pytest.MonkeyPatch, *, does_run: bool = True) -> Iterator[Device]:
    """The pretended device for what is inside.

    Args:
        patch: takes back what is put in place of torch's own.
        does_run: whether Triton's programs run; False where only their number matters.
    """
    device = Device()
    patch.setenv("DS_OPTIM_KERNELS", "triton")
    patch.setattr(torch.cuda, "_lazy_init", lambda: None)
    patch.setattr(torch.cuda, "device", functools.partial(_made_current, device))
    patch.setattr(torch, "Stream", type(device.main))
    patch.setattr(Tensor, "record_stream", lambda *_: None)
    patch.setattr(torch.accelerator, "current_stream", lambda of=None: _current_stream(device, of))
    patch.setattr(exchange, "_copy_stream", functools.cache(exchange._copy_stream.__wrapped__))
    for module, names in PROGRAMS.items():
        for name in names:
            patch.setattr(module, name, _Program(device, name, getattr(module, name), does_run))
    triangles = _Program(device, "lower_triangle", triangle.program(), does_run)
    patch.setattr(triangle, "program", lambda: triangles)
    with Guardless(), device:
        yield device


def moved(tensor: Tensor) -> OnDevice:
    """A copy on the device."""
    return OnDevice(tensor.detach().clone())
