"""Every tensor storage of this process: when it was made, resized and dropped, in which phase, by which line of code.

An adapter over `torch.distributed._tools.mem_tracker.MemTracker`, which sees each storage once, whatever views share
it. Only that part is used: its own categories do not know DeepSpeed, and its module hooks are slow and refuse a second
iteration, so they are switched off. It is private, so everything that is touched of it is named in `_TOUCHED` and
tried out when a tracker is made.

Not seen: what a kernel allocates and frees inside one operator, and what is allocated outside torch (a communication
library's own buffers).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ds_optim.memory.errors import MemoryAccountError, unknown_torch

try:
    from torch._C import _current_graph_task_id
    from torch._guards import active_fake_mode
    from torch.distributed._tools.common_utils import get_untyped_storages
    from torch.distributed._tools.mem_tracker import MemTracker, _MemRefType, _UpdateType
    from torch.utils._python_dispatch import _get_current_dispatch_mode
    from torch.utils._pytree import tree_leaves
except ImportError as error:
    raise unknown_torch(error) from error

# Of MemTracker, of what it keeps about a storage, and of two enumerations.
_TOUCHED = ("_WINFO", "_mod_tracker", "_track", "_track_resize", "_restore_resize", "_update_snap", "_delete_callback")
_TOUCHED_INFO = ("size", "mem_consumed", "device")
_TOUCHED_KINDS = (
    *((_UpdateType, name) for name in ("ADD", "SIZE", "DEL", "REF")),
    (_MemRefType, "OTH"),
)

AUTOGRAD = "autograd"
"""Origin of what the autograd engine makes."""

_BACKWARD_MODULES = ("torch.autograd.graph", "torch.autograd")
_MACHINERY = (__name__, "torch", "deepspeed.utils.nvtx")  # they work for their callers
_ON_BEHALF = ("allocate", "__call__")  # FSDP's: what for, its caller knows
_TORCH_WITH_A_SAY = ("torch.optim.", "torch.distributed.fsdp.")  # frames of torch that tell what a storage is for


@dataclass(eq=False, slots=True)
class Storage:
    """One storage, from its first sight to its end. Compared by identity.

    Attributes:
        bytes: now; on CUDA rounded up as the allocator does; 0 once it is gone.
        born: the phase in which it was first seen.
        origin: module and line that asked for it, `AUTOGRAD`, or empty if unknown.
        device: where it lies.
    """

    bytes: int
    born: str
    origin: str
    device: torch.device

    @property
    def is_host(self) -> bool:
        """Whether it lies in the memory of the machine rather than of an accelerator."""
        return self.device.type == "cpu"


Event = tuple[Storage, int, str]
"""A storage, by how many bytes it grew (or shrank), and the phase."""


class StorageTracker(MemTracker):
    """Follows storages while it is entered; `live` is what there is now, `log` what happened since it was cleared.

    Attributes:
        phase: stamped on events; set by the accountant.
        on_backward: called when autograd is found at work for the first time since the phase was set to "forward".
        recording: whether events are kept in `log`; `live` is always kept.

    Raises:
        MemoryAccountError: this torch has another `MemTracker`.
    """

    def __init__(self) -> None:
        super().__init__()
        _require("MemTracker", self, _TOUCHED)
        for kinds, name in _TOUCHED_KINDS:
            _require(kinds.__name__, kinds, (name,))
        self._any = _MemRefType.OTH  # MemTracker's own categories are not used
        self._mod_tracker: Any = _NoModules()
        self._of: dict[Any, Storage] = {}
        self._is_abandoned = False
        self._entered_under: object = None  # the fake mode that was there already
        self.live: set[Storage] = set()
        self.log: list[Event] = []
        self.phase = "init"
        self.on_backward: Callable[[], None] | None = None
        self.recording = False
        self.is_entered = False
        self._try_out()

    def _try_out(self) -> None:
        """Follow one small storage to its end, so that a `MemTracker` that works otherwise is refused at once."""
        try:
            with self:
                probe = torch.empty(1, device="cpu")
            info, _ = self._WINFO[probe.untyped_storage()]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise unknown_torch(f"MemTracker works otherwise ({type(error).__name__}: {error})") from error
        _require("what MemTracker keeps about a storage", info, _TOUCHED_INFO)
        seen, found = self.total, probe.untyped_storage().nbytes()
        del probe
        if seen != found or self.total != 0:
            raise unknown_torch(f"MemTracker counts {seen} bytes of {found}, and {self.total} when they are gone")

    # -- what the accountant asks -----------------------------------------------------------------------------------

    @property
    def total(self) -> int:
        """Bytes alive."""
        return sum(storage.bytes for storage in self.live)

    def storages(self, tensor: Tensor) -> list[Storage]:
        """The storages under a tensor, those of its inner tensors if it is a wrapper such as DTensor. Adopts unseen
        ones, so that a labelled tensor is counted wherever it came from."""
        found = []
        if tensor.device.type == "meta":
            return []  # the storage of a fake tensor is on meta too, but the tensor says where it would lie
        for storage in get_untyped_storages(tensor):
            if storage not in self._WINFO or self._WINFO[storage][0].size != storage.size():
                self._track(self._any, tensor)
            known = self._WINFO.get(storage)
            if known is not None and known[0] in self._of:
                found.append(self._of[known[0]])
        return found

    def suspend(self) -> None:
        """Leave the dispatch mode, so that operators run bare; ends of storages are still seen.

        Raises:
            MemoryAccountError: another mode was entered later and is still there.
        """
        if _get_current_dispatch_mode() is not self:
            raise MemoryAccountError(
                "the accountant is not the innermost dispatch mode, so it cannot step aside: leave the modes that were "
                "entered after it first"
            )
        self.__exit__(None, None, None)

    def __enter__(self) -> StorageTracker:
        self._entered_under = active_fake_mode()
        super().__enter__()
        self.is_entered = True
        return self

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)
        self.is_entered = False

    def abandon(self) -> None:
        """Stop following from under another mode, which cannot be left: operators still pass through here."""
        self._restore_resize()
        self._is_abandoned = True

    # -- what torch calls -------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """As MemTracker's, without its modules and peaks, and short for usual results: every operator comes here."""
        if DTensor in types:
            return NotImplemented  # its local operators come here afterwards
        result = func(*args, **(kwargs or {}))
        if self._is_abandoned:
            return result
        if active_fake_mode() is self._entered_under:  # DTensor tries shapes out on fake tensors
            for one in (result,) if isinstance(result, Tensor) else tree_leaves(result):
                if isinstance(one, Tensor):
                    self._track(self._any, one)
        return result

    # -- what MemTracker calls --------------------------------------------------------------------------------------

    def _update_snap(
        self, u_type: Any, winfo: Any, old_mem_consumed: int | None = None, old_reftype: Any = None
    ) -> None:
        """A storage came (ADD), changed its size (SIZE), went (DEL) or got another name of MemTracker's (REF)."""
        if u_type is _UpdateType.REF or winfo.device.type == "meta":
            return
        self._notice_backward()
        storage = self._of.get(winfo)
        if storage is None:
            storage = self._of[winfo] = Storage(0, self.phase, _origin(), winfo.device)
            self.live.add(storage)
        size = 0 if u_type is _UpdateType.DEL else winfo.mem_consumed
        change, storage.bytes = size - storage.bytes, size
        if self.recording and change:
            self.log.append((storage, change, self.phase))

    def _delete_callback(self, winfo: Any, w_st: Any) -> None:
        if winfo in self._of:
            self._update_snap(_UpdateType.DEL, winfo)
            self.live.discard(self._of.pop(winfo))

    def _notice_backward(self) -> None:
        if self.on_backward is not None and in_backward():
            self.on_backward()


class _NoModules:
    """In place of MemTracker's `ModTracker`, whose hooks on every module and tensor are not needed."""

    is_bw = False
    parents: frozenset[str] = frozenset()

    def register_user_hooks(self, *hooks: Any) -> None: ...
    def clear_user_hooks(self) -> None: ...
    def __enter__(self) -> None: ...
    def __exit__(self, *args: Any) -> None: ...


def in_backward() -> bool:
    """Whether autograd is running a graph in this thread; recomputed activations belong to it."""
    return bool(_current_graph_task_id() != -1)


def _require(what: str, owner: object, names: tuple[str, ...]) -> None:
    missing = [name for name in names if not hasattr(owner, name)]
    if missing:
        raise unknown_torch(f"{what} has no {', '.join(missing)}")


def _origin() -> str:
    """The nearest line of code that is not mere machinery."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module in _BACKWARD_MODULES:
            return AUTOGRAD
        if module.startswith(_TORCH_WITH_A_SAY) and frame.f_code.co_name not in _ON_BEHALF:
            return f"{module}.{frame.f_code.co_name}:{frame.f_lineno}"
        if not (module in _MACHINERY or module.startswith("torch.")):
            return f"{module}.{frame.f_code.co_name}:{frame.f_lineno}"
        frame = frame.f_back
    return AUTOGRAD if in_backward() else ""
