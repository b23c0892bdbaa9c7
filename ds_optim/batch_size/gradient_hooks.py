"""Sums of squares of gradients as they arrive: whole, local, before they are accumulated, reduced or sharded.

A hook on the parameter sees that at every ZeRO stage and under DDP. Under FSDP2 gradients arrive at the unsharded
parameters, which exist from the first forward pass on and are then the same objects for the whole run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from ds_optim.roles import canonical_name

_CHUNK = 1 << 17
"""Elements that a CPU adds up in fp32 at a time: `vector_norm` of 32 M is 0.3 % off, and copies bf16 to fp32."""


def norms(values: Tensor) -> list[Tensor]:
    """Norms, fp32 (fp64 of fp64), 0-dimensional, whose squares add up to the sum of squares of ``values``."""
    if values.is_sparse:
        values = values.coalesce().values()
    if values.device.type != "cpu":  # accelerators add up in a tree
        return [torch.linalg.vector_norm(values, dtype=None if values.dtype == torch.float64 else torch.float32)]
    if not values.is_contiguous():  # any order will do that makes one piece of it
        values = values.permute(sorted(range(values.ndim), key=values.stride, reverse=True))
    found, flat = [], values.reshape(-1)
    for piece in flat.split(_CHUNK) if flat.numel() > _CHUNK else (flat,):
        exact = piece if piece.dtype == torch.float64 else piece.float()
        # Twice as fast as `vector_norm` where the gradient is still in the cache, four times on strided pieces.
        found.append(torch.dot(exact, exact).sqrt_())
    return found


def square_sum(found: list[Tensor]) -> Tensor:
    """The sum of the squares of `norms`, float64, 0-dimensional, on the device of the first."""
    return torch.stack([norm.to(found[0].device) for norm in found]).double().square().sum()


class GradientHooks:
    """Calls ``arrived(name, gradient)`` for each gradient of each parameter that arrives in a backward pass.

    Args:
        module: the model.
        parameters: of the model, by canonical name.
    """

    def __init__(
        self, module: nn.Module, parameters: dict[str, Tensor], arrived: Callable[[str, Tensor], None]
    ) -> None:
        self._arrived = arrived
        self._handles: list[RemovableHandle] = []
        self._waiting: set[str] = set()
        self._searches: list[RemovableHandle] = []
        for name, parameter in parameters.items():
            if isinstance(parameter, DTensor):
                self._waiting.add(name)
            else:
                self._listen(name, parameter)
        if self._waiting:
            self._search(module)

    def remove(self) -> None:
        """No more calls."""
        for handle in [*self._handles, *self._searches]:
            handle.remove()

    def _listen(self, name: str, parameter: Tensor) -> None:
        def hook(gradient: Tensor) -> None:
            self._arrived(name, gradient)

        self._handles.append(parameter.register_hook(hook))

    def _search(self, module: nn.Module) -> None:
        """Look at modules right before their first forward pass, when FSDP2 has put whole parameters into them."""
        for prefix, part in module.named_modules():
            own = {canonical_name(f"{prefix}.{leaf}".lstrip(".")): leaf for leaf in part._parameters}
            wanted = {name: leaf for name, leaf in own.items() if name in self._waiting}
            if wanted:

                def look(found: nn.Module, _: Any, wanted: dict[str, str] = wanted) -> None:
                    for name, leaf in wanted.items():
                        parameter = found._parameters[leaf]
                        if name in self._waiting and parameter is not None and not isinstance(parameter, DTensor):
                            self._waiting.remove(name)
                            self._listen(name, parameter)
                    if not self._waiting:
                        self._stop_searching()

                self._searches.append(part.register_forward_pre_hook(look))

    def _stop_searching(self) -> None:
        for handle in self._searches:
            handle.remove()
        self._searches.clear()
