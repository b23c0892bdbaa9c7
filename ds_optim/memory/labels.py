"""What every long-lived tensor of a training run is for: which tensors lie where in a model, an optimizer, a strategy.

Tensors are found where they are kept (parameters, ``optimizer.state``, the private lists of a DeepSpeed wrapper), and
labelled by the storage under them. DeepSpeed is not imported: its wrappers are known by class name, and what is read
of each is named in `ds_optim.deepspeed.wrappers`.

Two claims on one storage are an error, since one of them must be wrong, with three exceptions in which both are right:
a gradient that lies in a bucket counts as bucket; the master that is the parameter itself counts as parameter (fp32
training without a strategy; ZeRO keeps a copy even in fp32); and a parameter's low-precision copy inside an all-gather
buffer counts as parameter.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from ds_optim.deepspeed import wrappers
from ds_optim.deepspeed.facts import MAKERS_OF_BUCKETS, MAKERS_OF_PARAMETERS
from ds_optim.known_torch import fsdp_parameters
from ds_optim.memory.errors import MemoryAccountError, unknown_torch
from ds_optim.memory.record import Category, StateEntry
from ds_optim.memory.tracker import Storage, StorageTracker
from ds_optim.stepping.sharded import ShardedOptimizer

CountedShape = Literal["element", "block", "owned block", "count"]


class Labelled(NamedTuple):
    """A tensor, what it is for, and where it was found, in words."""

    category: Category
    where: str
    tensor: Tensor


# What is read of FSDP2's `FSDPParam`.
_FSDP_PARAMETER: dict[str, Category] = {
    "_sharded_param_data": Category.PARAMETERS,
    "_sharded_post_forward_param_data": Category.PARAMETERS,
    "all_gather_outputs": Category.PARAMETERS,
    "unsharded_accumulated_grad": Category.GRADIENTS,
}

# Both claims are right; the first prevails.
_ALIASES = (
    (Category.BUCKETS, Category.GRADIENTS),
    (Category.PARAMETERS, Category.MASTER),
)

# Who asks for a storage that nobody keeps tells what it is for.
_PARAMETER_MAKERS = (
    *MAKERS_OF_PARAMETERS,
    "torch.distributed.fsdp._fully_shard._fsdp_param.",
    "torch.distributed.fsdp._fully_shard._fsdp_collectives.foreach_all_gather",
)
_BUCKET_MAKERS = (
    *MAKERS_OF_BUCKETS,
    "torch.distributed.fsdp.",
)
_EXCHANGE_MAKER = "ds_optim.sharding.pipeline."


def transient(storage: Storage) -> Category:
    """What an unlabelled storage is for, by the phase in which it was made and by who asked for it.

    Gathered parameters are parameters, buffers that a strategy reduces gradients in are buckets, and so are the
    exchange buffers of a whole-matrix step; the rest are activations, or in a step workspace.
    """
    if storage.born == "step" and storage.origin.startswith(_EXCHANGE_MAKER):
        return Category.EXCHANGE
    if storage.origin.startswith(_PARAMETER_MAKERS):
        return Category.PARAMETERS
    if storage.born == "step":
        return Category.WORKSPACE
    if storage.born == "backward" and storage.origin.startswith(_BUCKET_MAKERS):
        return Category.BUCKETS
    return Category.ACTIVATIONS if storage.born in ("forward", "backward") else Category.UNACCOUNTED


def basic_optimizer(optimizer: Any) -> Any:
    """The optimizer inside the wrappers of DeepSpeed and accelerate."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def wrapper_of(optimizer: Any) -> Any:
    """DeepSpeed's wrapper around the optimizer, or None.

    Raises:
        MemoryAccountError: it has not the attributes known here.
    """
    while optimizer is not None and wrappers.kind_of(optimizer) is None:
        optimizer = getattr(optimizer, "optimizer", None)
    if optimizer is not None:
        problem = wrappers.tensors_problem(optimizer)
        if problem:
            raise MemoryAccountError(f"{problem}, so tensors cannot be labelled")
    return optimizer


def claims(model: nn.Module, optimizer: Any) -> Iterator[Labelled]:
    """Every tensor that model, optimizer and strategy keep now, and what it is for."""
    yield from _of_model(model)
    if optimizer is None:
        return
    wrapper, basic = wrapper_of(optimizer), basic_optimizer(optimizer)
    kind = wrappers.kind_of(wrapper)
    if kind is not None:
        for attribute, purpose in {**kind.tensors, **kind.at_times}.items():
            for tensor in tensors_in(getattr(wrapper, attribute, None)):
                yield Labelled(Category(purpose), f"{kind.name}.{attribute}", tensor)
    own = {id(parameter) for parameter in model.parameters()}
    for tensor in stepped(optimizer):
        if id(tensor) not in own:
            yield Labelled(Category.MASTER, "updated by the optimizer", tensor)
        yield from _gradient(tensor, "a tensor that the optimizer steps")
    for state in basic.state.values():
        for key, value in state.items():
            for tensor in tensors_in(value):
                yield Labelled(Category.OPTIMIZER, f"optimizer.state {key!r}", tensor)
    for tensor in basic.stepper.buffers() if isinstance(basic, ShardedOptimizer) else ():
        yield Labelled(Category.BUFFERS, f"tables of {type(basic).__name__}", tensor)


def stepped(optimizer: Any) -> list[Tensor]:
    """The tensors that an optimizer updates: a DeepSpeed wrapper's masters, or what the groups hold.

    ZeRO-3 empties the groups between steps.
    """
    wrapper = wrapper_of(optimizer)
    kind = wrappers.kind_of(wrapper)
    if kind is not None:
        masters = [name for name, purpose in kind.tensors.items() if purpose == Category.MASTER.value]
        return [tensor for name in masters for tensor in tensors_in(getattr(wrapper, name))]
    return [parameter for group in basic_optimizer(optimizer).param_groups for parameter in group["params"]]


def _of_model(model: nn.Module) -> Iterator[Labelled]:
    for name, parameter in model.named_parameters():
        yield Labelled(Category.PARAMETERS, f"parameter {name}", parameter.data)
        if hasattr(parameter, "ds_tensor"):  # ZeRO-3: this rank's slice
            yield Labelled(Category.PARAMETERS, f"slice of parameter {name}", parameter.ds_tensor)
        yield from _gradient(parameter, f"parameter {name}")
    for name, buffer in model.named_buffers():
        yield Labelled(Category.BUFFERS, f"buffer {name}", buffer)
    for held in _held_by_fsdp(model):
        for attribute, category in _FSDP_PARAMETER.items():
            for tensor in tensors_in(getattr(held, attribute, None)):
                yield Labelled(category, f"FSDPParam.{attribute}", tensor)


def _held_by_fsdp(model: nn.Module) -> Iterator[Any]:
    """FSDP2's own objects, one for each parameter.

    Raises:
        MemoryAccountError: they are not what is known here.
    """
    for module in model.modules():
        if not isinstance(module, FSDPModule):
            continue
        try:
            held = list(fsdp_parameters(module))
        except AttributeError as error:
            raise unknown_torch(f"FSDP2 keeps its parameters elsewhere ({error})") from error
        for one in held:
            known = getattr(type(one), "__annotations__", {})  # some are set only for a time
            missing = [name for name in _FSDP_PARAMETER if name not in known and not hasattr(one, name)]
            if missing:
                raise unknown_torch(f"{type(one).__name__} of FSDP2 has no {', '.join(missing)}")
            yield one


def _gradient(tensor: Tensor, where: str) -> Iterator[Labelled]:
    for attribute in wrappers.GRADIENTS_OF_PARAMETERS:
        gradient = getattr(tensor, attribute, None)
        if isinstance(gradient, Tensor):
            yield Labelled(Category.GRADIENTS, f"gradient of {where}", gradient)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor; any other tensor itself."""
    return getattr(tensor, "_local_tensor", tensor)


def tensors_in(value: Any, depth: int = 4) -> Iterator[Tensor]:
    """Tensors inside lists, tuples, dictionaries and plain objects of data."""
    if isinstance(value, Tensor):
        yield value
    elif depth and isinstance(value, Mapping):
        for inner in value.values():
            yield from tensors_in(inner, depth - 1)
    elif depth and isinstance(value, (list, tuple)):
        for inner in value:
            yield from tensors_in(inner, depth - 1)
    elif depth and (hasattr(value, "__dict__") or hasattr(type(value), "__dataclass_fields__")):
        fields = getattr(type(value), "__dataclass_fields__", None) or vars(value)
        for name in fields:
            if name != "params":  # a bucket lists whose gradients it holds
                yield from tensors_in(getattr(value, name, None), depth - 1)


@dataclass(frozen=True, slots=True)
class Label:
    """What a storage is for, and where that is said."""

    category: Category
    where: str


class Labels:
    """The category of every storage that somebody claims.

    `claim` takes what is found where tensors are kept; `hint` what is seen in passing (a gradient on its way, a batch),
    which gives way to any claim. Both are of one step: what was an output or a gradient in an earlier one and is still
    alive at the end of this one is kept by somebody else.
    """

    def __init__(self, tracker: StorageTracker) -> None:
        self._tracker = tracker
        self._claimed: dict[Storage, Label] = {}
        self._hinted: dict[Storage, Category] = {}
        self._before: dict[Storage, Category] = {}  # in the step before

    def claim(self, found: Iterable[Labelled]) -> None:
        """Label the storages under tensors, as they are kept at one moment.

        Raises:
            MemoryAccountError: two different categories claim one storage; both are named.
        """
        now: dict[Storage, Label] = {}
        problems = []
        for category, where, tensor in found:
            for storage in self._tracker.storages(tensor):
                known = now.get(storage)
                if known is None:
                    now[storage] = Label(category, where)
                elif known.category is not category:
                    prevailing = _prevails(known.category, category)
                    if prevailing is None:
                        problems.append(
                            f"{storage.bytes:,} bytes are claimed as {known.category.value} ({known.where}) and as "
                            f"{category.value} ({where})"
                        )
                    elif prevailing is category:
                        now[storage] = Label(category, where)
        if problems:
            listed = list(dict.fromkeys(problems))
            raise MemoryAccountError(
                "one storage cannot be two things: a tensor was labelled wrongly, or state shares memory with what it "
                "must not. Correct `extra`, or keep a copy:\n- " + "\n- ".join(listed[:8])
            )
        self._claimed.update(now)

    def hint(self, tensor: Tensor, category: Category) -> None:
        """Remember what a tensor is that is seen in passing."""
        for storage in self._tracker.storages(tensor):
            self._hinted.setdefault(storage, category)

    def of(self, storage: Storage, *, of_this_step: bool = False) -> Category | None:
        """The category that was claimed or hinted, in this step or (what may be gone soon) in the one before."""
        label = self._claimed.get(storage)
        found = label.category if label else self._hinted.get(storage)
        return found if found or of_this_step else self._before.get(storage)

    def begin_step(self) -> None:
        """From now on only new labels count for what outlives the step; drop those of storages that are gone."""
        labelled = {**self._hinted, **{storage: label.category for storage, label in self._claimed.items()}}
        self._before = {storage: category for storage, category in labelled.items() if storage in self._tracker.live}
        self._claimed, self._hinted = {}, {}


def _prevails(one: Category, other: Category) -> Category | None:
    return next((first for first, second in _ALIASES if {first, second} == {one, other}), None)


def state_entries(tracker: StorageTracker, basic: Any) -> list[StateEntry]:
    """Optimizer state per key, dtype and shape rule, every storage once."""
    seen: set[Storage] = set()
    sums: dict[tuple[str, str, CountedShape], list[int]] = {}
    for parameter, state in basic.state.items():
        for key, value in state.items():
            for tensor in tensors_in(value):
                fresh = [storage for storage in tracker.storages(tensor) if storage not in seen]
                seen.update(fresh)
                entry = (str(key), str(tensor.dtype).removeprefix("torch."), _shape_rule(basic, parameter, key, tensor))
                amount = sums.setdefault(entry, [0, 0])
                amount[0] += local(tensor).numel() if fresh or not tracker.storages(tensor) else 0
                amount[1] += sum(storage.bytes for storage in fresh)
    return [
        StateEntry(key=key, dtype=dtype, shape_rule=rule, elements=elements, bytes=size)
        for (key, dtype, rule), (elements, size) in sorted(sums.items())
    ]


def _shape_rule(basic: Any, parameter: Any, key: Any, value: Tensor) -> CountedShape:
    """Ours say what they keep; of others it shows in the shape."""
    if key == "step" or value.dtype in (torch.int32, torch.int64):
        return "count"
    if isinstance(basic, ShardedOptimizer):
        return basic.stepper.shape_rule(key)
    if not isinstance(parameter, Tensor) or value.numel() == parameter.numel():
        return "element"
    return "count" if value.numel() == 1 else "block"
