"""What is stepped of a local tensor, and which of it has its state in eight bits."""

from __future__ import annotations

from collections.abc import Callable, Set
from typing import NamedTuple

from torch import Tensor
from torch.distributed.tensor import DTensor

from ds_optim.roles import warn_unclaimed
from ds_optim.sharding.binding import BoundTensor
from ds_optim.sharding.block_runs import BlockRuns, block_runs, held_spans
from ds_optim.stepping.eight_bits import EIGHT_BITS, code_grid, is_coded
from ds_optim.stepping.options import Options
from ds_optim.stepping.shards import Shards


class KeptPart(NamedTuple):
    """What is stepped of a local tensor whose state is kept in one way.

    Attributes:
        parameters: of the layout, by index.
        spans: ``(start, length)``, ascending.
        is_whole: whether state has the tensor's shape; otherwise it has room for the spans alone, one behind the other.
        codes: the blocks of codes of which something is here; None: state is kept as it is.
    """

    parameters: frozenset[int]
    spans: list[tuple[int, int]]
    is_whole: bool
    codes: BlockRuns | None


class KeptParts:
    """The parts of every tensor of some shards.

    Args:
        options: of the whole optimizer.
        shards: whose tensors.
        left_out: the parameters of each tensor that somebody else steps, by their index in its layout; None: none are.
    """

    def __init__(self, options: Options, shards: Shards, left_out: Callable[[Tensor], Set[int]] | None) -> None:
        self._options, self._shards, self._left_out = options, shards, left_out
        self._is_coded = options.state_dtype == EIGHT_BITS
        self._parts: dict[Tensor, list[KeptPart]] = {}
        self._generation = shards.generation
        self._warned_of = -1  # the generation whose guesses were told of

    def forget(self) -> None:
        """Drop what was derived from tensors and roles."""
        self._parts.clear()

    def follow(self, other: KeptParts) -> None:
        """Say nothing that the other has said: these stand for another rank's."""
        self._warned_of = other._warned_of

    def of(self, tensor: Tensor) -> list[KeptPart]:
        """What is stepped of a local tensor: what is kept as it is, and what is in eight bits, where there is any."""
        if self._generation != self._shards.generation:
            self._generation = self._shards.generation
            self.forget()
        if tensor not in self._parts:
            if self._is_coded and self._warned_of != self._generation:
                self._warned_of = self._generation
                self._warn_of_guesses()
            coded = self._coded_of(tensor)
            everything = frozenset(range(len(self._shards.parameters_of(tensor)))) - self._left_out_of(tensor)
            found = [(everything - coded, False), (everything & coded, True)]
            has_room = self._left_out is None and not self._is_coded
            self._parts[tensor] = [
                _part(tensor, self._shards.of(tensor), parameters, has_room=has_room, in_codes=codes)
                for parameters, codes in found
                if parameters or not (coded or codes)
            ]
        return self._parts[tensor]

    def _coded_of(self, tensor: Tensor) -> frozenset[int]:
        """The parameters of a tensor whose state per element is in eight bits, whoever steps them."""
        specs = self._shards.parameters_of(tensor) if self._is_coded else ()
        roles = self._shards.roles
        return frozenset(i for i, spec in enumerate(specs) if is_coded(self._options, roles[spec.name], spec))

    def _left_out_of(self, tensor: Tensor) -> frozenset[int]:
        return frozenset(self._left_out(tensor) if self._left_out is not None else ())

    def _warn_of_guesses(self) -> None:
        """One warning that names what is kept in eight bits for want of a role: a norm or an embedding, perhaps."""
        names = [
            self._shards.parameters_of(tensor)[index].name
            for tensor in self._shards.tensors
            for index in sorted(self._coded_of(tensor) - self._left_out_of(tensor))
        ]
        consequence = "keeps their state in eight bits, as if none were an embedding, a norm or a bias"
        roles, shapes = self._shards.roles, self._shards.shapes
        its = {name: roles[name] for name in names}
        warn_unclaimed(its, shapes, lambda role: role.kind != "other", consequence, vectors=True)


def _part(
    tensor: Tensor, bound: BoundTensor, parameters: frozenset[int], *, has_room: bool, in_codes: bool
) -> KeptPart:
    """The part of a tensor that some parameters are.

    Args:
        has_room: whether state has room for all of the tensor, padding too.
    """
    layout = bound.layout
    others = frozenset(range(len(layout.parameters))) - parameters
    spans = held_spans(layout, bound.rank, others)
    is_all = not others if isinstance(tensor, DTensor) else sum(length for _, length in spans) == tensor.numel()
    codes = None
    if in_codes:
        grids = {layout.parameters[index].name: code_grid(layout.parameters[index].numel) for index in parameters}
        codes = block_runs(layout, bound.rank, grids)
    return KeptPart(parameters, spans, has_room or is_all, codes)
