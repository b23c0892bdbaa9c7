"""State in eight bits (``state_dtype="int8"``): of which parameters, under which keys, and for blocks at their owners.

What is kept per element under a key becomes two tensors: its codes, a byte per element, and the scales of its blocks,
see `ds_optim.kernels.codes`. Blocks are 256 consecutive elements of a parameter, or of a whole-matrix rule's tile, both
row-major: nothing depends on how parameters are cut over ranks.

As the authors of the method and bitsandbytes do, some parameters keep fp32 state: norms, biases, those of fewer than
4,096 elements, and embeddings, most of whose rows have no gradient in a step, unless ``int8_embeddings``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ds_optim.kernels.codes import BLOCK, Code, blocks_of, decode_rows, encode_rows
from ds_optim.roles.role import Role
from ds_optim.rule import AnyRule, StateSpec
from ds_optim.sharding.blocks import BlockGrid
from ds_optim.sharding.layout import ParameterSpec
from ds_optim.stepping.options import Options

EIGHT_BITS = torch.int8
"""The ``state_dtype`` that asks for it."""

LEAST = 4096
"""Elements that a parameter, or a tile, must have."""


_CODES, _SCALES = "_codes", "_scales"


class CodedKeys(NamedTuple):
    """The keys of one kind of state in eight bits."""

    codes: str
    scales: str


def coded_keys(key: str) -> CodedKeys:
    """Where codes (uint8) and scales (fp32) of what is called ``key`` are kept."""
    return CodedKeys(key + _CODES, key + _SCALES)


def is_codes(key: str) -> bool:
    """Whether a key is that of codes."""
    return key.endswith(_CODES)


def coded_among(options: Options, roles: Mapping[str, Role], specs: Sequence[ParameterSpec]) -> frozenset[int]:
    """The parameters, as indices, whose state per element is kept in eight bits."""
    return frozenset(index for index, spec in enumerate(specs) if _is_coded(options, roles[spec.name], spec))


def _is_coded(options: Options, role: Role, spec: ParameterSpec) -> bool:
    if options.state_dtype != EIGHT_BITS or spec.numel < LEAST or role.kind in ("norm", "bias"):
        return False
    return role.kind != "embedding" or options.int8_embeddings


def code_grid(numel: int) -> BlockGrid:
    """The blocks of codes of a parameter."""
    whole, rest = divmod(numel, BLOCK)
    runs = ((whole, BLOCK), (1, rest))
    return BlockGrid(1, 1, numel, 1, tuple((count, width) for count, width in runs if count and width))


def plain_dtype(options: Options) -> torch.dtype:
    """Of state per element that is not in eight bits."""
    return torch.float32 if options.state_dtype == EIGHT_BITS else options.state_dtype


def kept_of_block(
    state_of_block: Callable[[tuple[int, ...]], Mapping[str, StateSpec]], shape: tuple[int, ...]
) -> dict[str, StateSpec]:
    """What is kept for a block of a whole-matrix rule, which says `EIGHT_BITS` of what has one value per element."""
    kept: dict[str, StateSpec] = {}
    for key, spec in state_of_block(shape).items():
        its, dtype = spec
        if dtype != EIGHT_BITS:
            kept[key] = spec
        elif math.prod(its) < LEAST:
            kept[key] = its, torch.float32
        else:
            codes, scales = coded_keys(key)
            kept[codes] = its, torch.uint8
            kept[scales] = (blocks_of(math.prod(its)),), torch.float32
    return kept


@dataclass(frozen=True, slots=True)
class CodedBlocks:
    """The state of stacks of blocks as a whole-matrix rule computes with it, and back; or of one parameter.

    Attributes:
        codes: of the rule's state per element, by key.
    """

    codes: Mapping[str, Code]

    @classmethod
    def of(cls, rule: AnyRule) -> CodedBlocks:
        """Of a rule."""
        return cls(dict(zip(rule.element_state, rule.codes, strict=True)))

    def has(self, kept: Mapping[str, Tensor]) -> bool:
        """Whether something is kept in eight bits here."""
        return any(coded_keys(key).codes in kept for key in self.codes)

    def decoded(self, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state of equal blocks (B, *shape per block) as a rule knows it, fp32 where it was in eight bits."""
        found = dict(kept)
        for key, code in self.codes.items():
            names = coded_keys(key)
            if names.codes in found:
                codes_BS, scales = found.pop(names.codes), found.pop(names.scales)
                found[key] = decode_rows(codes_BS.flatten(1), scales, code).view(codes_BS.shape)
        return found

    def encoded(self, state: Mapping[str, Tensor], keys: Mapping[str, object]) -> dict[str, Tensor]:
        """The reverse: what is kept under ``keys``, of state that a rule knows."""
        found = dict(state)
        for key, code in self.codes.items():
            names = coded_keys(key)
            if names.codes in keys:
                values_BS = found.pop(key)
                codes_BE, found[names.scales] = encode_rows(values_BS.flatten(1), code)
                found[names.codes] = codes_BE.view(values_BS.shape)
        return found

    def keep_(self, kept: Mapping[str, Tensor], state: Mapping[str, Tensor], good: Tensor) -> None:
        """Put advanced state back into what `decoded` was given; of blocks that are not ``good`` (B,) it stays."""
        new = self.encoded(state, kept)
        for key in self.codes:
            for name in coded_keys(key):
                if name in kept:
                    blocks = good.view(-1, *(1 for _ in kept[name].shape[1:]))
                    kept[name].copy_(torch.where(blocks, new[name], kept[name]))
