"""Activations, by running a model's forward and backward pass on fake tensors: shapes and dtypes without memory.

Three layers are run, whatever the model has. What the middle one allocates and frees is repeated for all the others,
so that 80 layers cost no more than three. Attention is flash attention, as it is on a GPU: queries, keys, values,
output and one number per row are kept, no mask and no matrix of scores, with dropout or without.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ds_optim.blueprint import BlueprintError
from ds_optim.known_transformers import causal_model, checkpoint_activations
from ds_optim.memory.tracker import Storage, StorageTracker
from ds_optim.roles import canonical_name
from ds_optim.sharding.boxes import Ints

_ATTENTION = "ds_optim_simulated"
_LAYERS = 3  # a first, a middle and a last one


@dataclass(frozen=True, slots=True)
class Arrival:
    """A parameter's gradient is there.

    Attributes:
        at: index into the backward pass.
        name: of the parameter.
        bytes: of the gradient.
    """

    at: int
    name: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Timeline:
    """Bytes alive during one forward and one backward pass, beside parameters and their gradients.

    Attributes:
        forward: after every allocation and release.
        backward: likewise; begins with what the forward pass left.
        arrivals: of the parameters' gradients, in order.
        head: index into the forward pass where the output head begins.
    """

    forward: Ints
    backward: Ints
    arrivals: Sequence[Arrival]
    head: int

    @property
    def kept(self) -> int:
        """What the forward pass leaves for the backward pass."""
        return int(self.forward[-1])


class _FlashAttention(torch.autograd.Function):
    """What flash attention allocates and keeps, without its arithmetic."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # each (B, heads, S, head_dim)
        batch, heads, length, _ = query.shape
        output = query.new_empty((batch, length, heads, value.shape[-1])).transpose(1, 2)
        row_sums = query.new_empty((batch, heads, length), dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, row_sums)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        query, key, value, _, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _flash_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: Any
) -> tuple[Tensor, None]:
    """In the place of a transformers attention function: output (B, S, heads, head_dim)."""
    apply: Any = _FlashAttention.apply  # annotated in some releases of torch
    output: Tensor = apply(query, key, value)
    return output.transpose(1, 2), None


def _without_mask(*_: Any, **__: Any) -> None:
    """In the place of a transformers mask function: flash attention knows causal order by itself."""


@dataclass(slots=True)
class _Stretch:
    """A stretch of a pass: changes of the bytes alive, and the gradients that arrive among them."""

    changes: list[int]
    arrivals: list[tuple[int, str, int]]


def simulate(
    config: Mapping[str, Any], dtype: torch.dtype, micro_batch: int, seq_length: int, checkpointing: bool = False
) -> Timeline:
    """The passes of a causal language model over ``micro_batch`` sequences of ``seq_length`` tokens.

    Args:
        config: a transformers ``config.json``.
        dtype: of weights and activations.
        checkpointing: every layer keeps its input only, and is run again in the backward pass.

    Raises:
        BlueprintError: the model has no list of equal layers, or cannot be run without tensors.
    """
    try:
        return _simulated(config, dtype, micro_batch, seq_length, checkpointing)
    except BlueprintError:
        raise
    except Exception as error:  # a model may do anything in its forward pass
        said = " ".join(str(error).split())[:200]
        raise BlueprintError(
            f"the passes of this {config.get('model_type')} model cannot be run on fake tensors, so its activations "
            f"cannot be predicted ({type(error).__name__}: {said}): give --states-only"
        ) from error


def _simulated(
    config: Mapping[str, Any], dtype: torch.dtype, micro_batch: int, seq_length: int, checkpointing: bool
) -> Timeline:
    from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig

    AttentionInterface.register(_ATTENTION, _flash_attention)
    AttentionMaskInterface.register(_ATTENTION, _without_mask)
    whole = AutoConfig.for_model(**config)
    total = int(whole.num_hidden_layers)
    short = copy.deepcopy(whole)
    short.num_hidden_layers = min(total, _LAYERS)
    if getattr(short, "layer_types", None):
        short.layer_types = list(short.layer_types)[: short.num_hidden_layers]
    short.use_cache = False
    tracker = StorageTracker()
    with FakeTensorMode():
        model: Any = causal_model(short, dtype, _ATTENTION)
        if checkpointing:
            checkpoint_activations(model)
        model.train()
        layers = _layers(model, int(short.num_hidden_layers))
        ids = torch.zeros((micro_batch, seq_length), dtype=torch.int64, device="cpu")
        starts: list[int] = []
        output = model.get_output_embeddings()
        at_head: list[int] = []
        hooks = [output.register_forward_pre_hook(lambda *_: at_head.append(len(tracker.log)))]
        hooks += [layer.register_forward_pre_hook(lambda *_: starts.append(len(tracker.log))) for layer in layers]
        with tracker:
            for tensor in (*model.parameters(), *model.buffers(), ids):
                tracker.storages(tensor)
            tracker.recording = True
            tracker.phase = "forward"
            loss = model(input_ids=ids, labels=ids).loss
            turn = len(tracker.log)
            for hook in hooks:
                hook.remove()
            tracker.phase = "backward"
            loss.backward()
            gradients = {
                storage: canonical_name(name)
                for name, parameter in model.named_parameters()
                if parameter.grad is not None
                for storage in tracker.storages(parameter.grad)
            }
            log = list(tracker.log)
            tracker.recording = False
    prefix = _prefix(model, layers)
    stretches = _stretches(log, starts[: len(layers)], turn, gradients, prefix, len(layers))
    after_head = len([None for storage, _, _ in log[at_head[0] : turn] if storage not in gradients])
    return _joined(stretches, total, len(layers), prefix, after_head)


def _layers(model: nn.Module, count: int) -> Sequence[nn.Module]:
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return list(module)
    raise BlueprintError(
        "this model has no list of layers as long as its config's num_hidden_layers, so its activations cannot be "
        "predicted: give --states-only"
    )


def _prefix(model: nn.Module, layers: Sequence[nn.Module]) -> str:
    """What the names of a layer's parameters begin with, the layer's number left out."""
    name = next(name for name, module in model.named_modules() if module is layers[0])
    return canonical_name(name).removesuffix("0")


def _layer_of(name: str, prefix: str) -> int | None:
    return int(name.removeprefix(prefix).split(".", 1)[0]) if name.startswith(prefix) else None


def _stretches(
    log: Sequence[tuple[Storage, int, str]],
    starts: Sequence[int],
    turn: int,
    gradients: Mapping[Storage, str],
    prefix: str,
    count: int,
) -> list[_Stretch]:
    """The log cut where each layer begins: embedding, first ... last layer (with the head), then backward: head,
    last ... first layer (with the embedding). A layer begins in the backward pass with the first of its gradients."""
    begins: dict[int, int] = {}
    for index, (storage, change, _) in enumerate(log[turn:], turn):
        layer = _layer_of(gradients.get(storage, ""), prefix)
        if layer is not None and change > 0:
            begins.setdefault(layer, index)
    backward = [begins[layer] for layer in reversed(range(count))]
    edges = [0, *starts, turn, *backward, len(log)]
    stretches = []
    for start, stop in pairwise(edges):
        stretch = _Stretch([], [])
        for storage, change, _ in log[start:stop]:
            name = gradients.get(storage)
            if name is None:
                stretch.changes.append(change)
            elif change > 0:
                stretch.arrivals.append((len(stretch.changes), name, change))
                stretch.changes.append(0)
        stretches.append(stretch)
    return stretches


def _joined(stretches: Sequence[_Stretch], total: int, count: int, prefix: str, after_head: int) -> Timeline:
    """The passes of all layers: the middle one's stretches repeated."""
    middle = count // 2
    forward = [stretches[0], *_repeated(stretches[1 : 1 + count], middle, total - count)]
    head, layers = stretches[1 + count], stretches[2 + count :]
    backward = [head, *_repeated(layers, count - 1 - middle, total - count)]
    alive = np.cumsum([0, *(change for stretch in forward for change in stretch.changes)], dtype=np.int64)
    changes: list[int] = [int(alive[-1])]
    arrivals = []
    for position, stretch in enumerate(backward):
        for at, name, size in stretch.arrivals:
            layer = _layer_of(name, prefix)
            if layer is not None:
                rest = name.removeprefix(prefix).partition(".")[2]
                # The stretch before may hold a straggler of the layer above: numbers count from the stretch's own.
                name = f"{prefix}{total - position + (layer - _own_layer(stretch, prefix))}.{rest}"
            arrivals.append(Arrival(len(changes) + at, name, size))
        changes.extend(stretch.changes)
    return Timeline(alive, np.cumsum(changes, dtype=np.int64), arrivals, len(alive) - 1 - after_head)


def _own_layer(stretch: _Stretch, prefix: str) -> int:
    """The layer whose gradient opens a stretch."""
    return next(layer for _, name, _ in stretch.arrivals if (layer := _layer_of(name, prefix)) is not None)


def _repeated(stretches: Sequence[_Stretch], which: int, times: int) -> list[_Stretch]:
    return [*stretches[:which], *[stretches[which]] * (times + 1), *stretches[which + 1 :]]
