"""How many bytes of optimizer state each rank holds, measured, beside what AdamW would hold.

Nothing here knows an optimizer: state is whatever tensors lie in ``optimizer.state``, counted by their storages, each
storage once. AdamW's figure is arithmetic, not a measurement: two fp32 tensors of the size that this rank's optimizer
was really handed, padding included. It is not the peak of the step, and it leaves out activations and DeepSpeed's
communication buffers.
"""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table


@dataclass(frozen=True, slots=True)
class ModelStates:
    """Bytes on one rank.

    Attributes:
        weights: the weights that the model computes with.
        master: the fp32 copy that the optimizer updates; 0 where it updates the weights themselves.
        gradients: what the optimizer's ``step()`` was handed.
        state: tensors in ``optimizer.state``.
        elements: parameters (with padding) that this rank's optimizer updates.
    """

    weights: int
    master: int
    gradients: int
    state: int
    elements: int

    @property
    def adamw_state(self) -> int:
        return 2 * 4 * self.elements

    @property
    def shared(self) -> int:
        """What does not depend on the optimizer."""
        return self.weights + self.master + self.gradients


class StateMeter:
    """Sees the tensors that one training step hands to the optimizer; ZeRO takes them away again afterwards.

    Args:
        model: its parameters are the weights.
        optimizer: the optimizer that DeepSpeed wraps.
    """

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._model = model
        self._optimizer = optimizer
        self._masters: dict[int, int] = {}  # storage address -> bytes
        # By the address of the tensor that is updated, not by the gradient's own: ZeRO-3 frees the gradient of one
        # sub-group before it makes that of the next, often at the same address.
        self._gradients: dict[int, int] = {}
        self._elements: dict[int, int] = {}
        self._hook = optimizer.register_step_pre_hook(self._before)

    def _before(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                self._masters |= _storages([parameter])
                self._elements[parameter.data_ptr()] = parameter.numel()
                if parameter.grad is not None:
                    self._gradients[parameter.data_ptr()] = parameter.grad.nbytes

    def step_done(self) -> None:
        """One whole training step was seen; stop looking."""
        self._hook.remove()

    def read(self) -> ModelStates:
        """The figures of this rank, after at least one step."""
        # Under ZeRO-3 a parameter is empty between steps, and its shard hangs on it as `ds_tensor`.
        weights = _storages(getattr(p, "ds_tensor", p) for p in self._model.parameters())
        masters = {address: size for address, size in self._masters.items() if address not in weights}
        return ModelStates(
            weights=sum(weights.values()),
            master=sum(masters.values()),
            gradients=sum(self._gradients.values()),
            state=sum(_storages(_tensors(self._optimizer.state)).values()),
            elements=sum(self._elements.values()),
        )


def table(optimizer: str, ranks: list[ModelStates]) -> Table:
    """The table for people; `figures` has the same for programs."""
    shown = Table(
        title="Memory per rank, with both denominators",
        caption="Measured: the storages of the tensors in optimizer.state after the last step. Computed for the same "
        "partition: two fp32 values per element. All model states: weights, fp32 master, gradients (as the optimizer's "
        "step gets them) and optimizer states; activations and communication buffers are not counted. "
        "B is bytes, 1 MB = 1,000,000 B, 1 MiB = 1,048,576 B.",
        caption_justify="left",
    )
    shown.add_column("")
    for title in (f"{optimizer}, measured", "AdamW, computed", "ratio"):
        shown.add_column(title, justify="right", no_wrap=True)
    # A long list of ranks says nothing that the fullest of them does not.
    fullest = max(range(len(ranks)), key=lambda rank: ranks[rank].state)
    for rank in range(len(ranks)) if len(ranks) <= 4 else [fullest]:
        states = ranks[rank]
        _row(shown, f"rank {rank}\noptimizer states", states.state, states.adamw_state)
        _row(shown, "\nall model states", states.shared + states.state, states.shared + states.adamw_state)
        shown.add_section()
    return shown


def figures(ranks: list[ModelStates]) -> list[dict[str, int]]:
    """One dictionary per rank, in bytes."""
    return [asdict(states) | {"adamw_state": states.adamw_state} for states in ranks]


def _row(shown: Table, counted: str, measured: int, adamw: int) -> None:
    """Two lines high and at most 80 columns wide, the width of a terminal."""
    ratio = f"{100 * measured / adamw:.2f} %" if adamw else "-"
    shown.add_row(counted, _bytes(measured), _bytes(adamw), ratio)


def _bytes(count: int) -> str:
    unit, size, binary = ("GB", 1e9, 2**30) if count >= 1e9 else ("MB", 1e6, 2**20)
    return f"{count:,} B\n{count / size:.2f} {unit} ({count / binary:.2f} {unit[0]}iB)"


def _storages(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    """Address and size of every storage under the tensors: tensors that share one are counted once."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {storage.data_ptr(): storage.nbytes() for storage in storages if storage.nbytes()}


def _tensors(state: Any) -> Iterator[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, dict):
        for value in state.values():
            yield from _tensors(value)
    elif isinstance(state, (list, tuple)):
        for value in state:
            yield from _tensors(value)
