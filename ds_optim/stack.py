"""Equal blocks of a whole-matrix rule that are updated together, and what a rule does with them on any device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ds_optim import kernels
from ds_optim.kernels import Formula, Scalars, triangles
from ds_optim.linalg import packed
from ds_optim.linalg.packed import Triangles
from ds_optim.linalg.precision import MatmulPrecision
from ds_optim.linalg.products import add_gram_, apply_along


@dataclass(slots=True)
class Stack:
    """Equal blocks that are updated together.

    Attributes:
        shape: of one block.
        grads: (B, *shape) fp32; an update turns them into what is to be subtracted, step size apart.
        state: by name, (B, *shape per block), fp32 where it is floating point; an update advances it in place.
        good: (B,) bool. A block that is not has a gradient that is not finite: its ``grads`` are zero, its state must
            stay as it is.
        step: of the blocks' tensors, from 1.
        offsets: of the blocks' refreshes: they fall on steps t with ``(t + offset) % frequency == 0``.
        memory: what the rule remembers of these blocks from one step to the next outside their state; empty at first,
            and again whenever state is loaded or moved.
        matmul_precision: of products, to be handed to `ds_optim.linalg`.
    """

    shape: tuple[int, ...]
    grads: Tensor
    state: dict[str, Tensor]
    good: Tensor
    step: int
    offsets: tuple[int, ...]
    memory: dict[str, Any] = field(default_factory=dict)
    matmul_precision: MatmulPrecision = "ieee"

    def __len__(self) -> int:
        return len(self.offsets)

    def due(self, step: int, frequency: int) -> slice:
        """The blocks that are refreshed in a step; neighbours, since a stack is in the order of its refreshes."""
        found = [index for index, offset in enumerate(self.offsets) if (step + offset) % frequency == 0]
        return slice(found[0], found[-1] + 1) if found else slice(0, 0)

    def pass_(
        self,
        formula: Formula,
        names: Sequence[str],
        scalars: Scalars,
        values: Tensor | None = None,
        blocks: Tensor | None = None,
    ) -> Tensor:
        """Run a formula over all elements in one pass: its values become what it returns first, which is returned.

        Args:
            formula: elementwise, of values and states. Where a value is not a number it must leave states as they are:
                so blocks that must not advance are marked.
            names: of the states, in the formula's order.
            scalars: of the formula.
            values: (B, *shape) fp32, contiguous; `grads` if not given.
            blocks: (B,) bool, those that advance; `good` if not given.
        """
        values = self.grads if values is None else values
        withhold(values, self.good if blocks is None else blocks, math.nan)
        backend = kernels.backend_for(formula, values.device)
        kernels.one_pass(backend, formula, values, [self.state[name] for name in names], scalars)
        return values

    def average_(self, kept: Tensor, new: Tensor, beta: float) -> Tensor:
        """``kept <- beta kept + (1 - beta) new`` in place, ``kept + new`` if beta is 1; blocks that are not good stay.

        Every operation rounds once: fused ones round differently where a vector register ends.
        """
        return kept.mul_(self._keep(beta, kept)).add_(new if beta == 1 else new * (1 - beta))

    def _keep(self, beta: float, kept: Tensor) -> Tensor:
        """What each block of ``kept`` is multiplied by: ``beta``, or one."""
        decay = torch.full((), beta, dtype=torch.float32, device=kept.device)
        return _over(torch.where(self.good, decay, 1.0), kept)

    def average_gram_(self, kept: Tensor, axis: int, beta: float) -> Tensor:
        """The running average of the gradients' products with themselves, packed: `ds_optim.linalg.products.add_gram_`.

        ``kept <- beta kept + (1 - beta) gram`` in place, ``kept + gram`` if beta is 1; blocks that are not good stay.
        """
        weight = 1 if beta == 1 else 1 - beta
        if kept.device.type == "cpu":
            before = {index: kept[index].clone() for index, good in enumerate(self.good.tolist()) if not good}
            add_gram_(kept, self.grads, axis, beta, weight, self.matmul_precision, _triangles(kept))
            for index, one in before.items():
                kept[index] = one
            return kept
        kept.mul_(self._keep(beta, kept))
        return add_gram_(kept, self.grads, axis, 1.0, weight, self.matmul_precision)

    def applied(self, matrices: Tensor, blocks: Tensor, axis: int) -> Tensor:
        """Blocks multiplied along one axis by matrices of the state, packed: `ds_optim.linalg.products.apply_along`."""
        return apply_along(matrices, blocks, axis, self.matmul_precision, _triangles(matrices))


def _triangles(kept: Tensor) -> Triangles:
    """Who packs and unpacks these matrices."""
    return triangles if kernels.backend_for(None, kept.device) == "native" else packed


def are_finite(blocks: Tensor) -> Tensor:
    """(B,) flags of blocks (B, ...) without infinities and NaN: both extremes see a NaN, and a norm would be slower."""
    flat = blocks.flatten(1)
    return flat.amax(1).isfinite() & flat.amin(1).isfinite()


def withhold(values: Tensor, good: Tensor, instead: float) -> None:
    """Fill the blocks that are not good. Only a CPU may look first whether there are any."""
    if values.device.type != "cpu" or not bool(good.all()):
        values.masked_fill_(~_over(good, values), instead)


def replace_(kept: Tensor, new: Tensor, blocks: Tensor, factors: Tensor | float = 1.0) -> None:
    """``kept <- factors new`` in the blocks that are flagged. Only a CPU may look first whether they all are.

    Args:
        kept: (B, ...).
        new: likewise; may be written to.
        blocks: (B,) bool.
        factors: (B,), or a number.
    """
    if isinstance(factors, Tensor):
        factors = _over(factors, kept)
    if kept.device.type == "cpu" and bool(blocks.all()):
        torch.mul(new, factors, out=kept)
    else:
        scaled = new.mul_(factors) if isinstance(factors, Tensor) or factors != 1 else new
        torch.where(_over(blocks, kept), scaled, kept, out=kept)


def _over(values: Tensor, blocks: Tensor) -> Tensor:
    """(B,) values, shaped to broadcast against (B, ...)."""
    return values.view(-1, *(1 for _ in blocks.shape[1:]))
