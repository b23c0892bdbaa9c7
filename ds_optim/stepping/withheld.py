"""Updates that an owner withheld: counted over the ranks meanwhile, told to all of them when a later step begins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ds_optim.sharding.exchange import FailureCount, Ranks
from ds_optim.sharding.plan import Plan
from ds_optim.stepping.block_step import Suspects
from ds_optim.stepping.shards import Shards

Axes = tuple[dist.ProcessGroup, ...]


class _Judged(NamedTuple):
    step: int
    failures: Tensor
    counted: FailureCount | None
    plan: Plan
    suspects: list[Suspects]
    group: dist.ProcessGroup | None


class _Told(NamedTuple):
    """What all ranks will know of a step, and what this one has to say of it."""

    counted: FailureCount
    judged: list[_Judged]


class Withheld:
    """What is to be known of the blocks of a step when a later one begins.

    Where every rank has a part in every block's group, the next step's first call hears of it. Where some have not
    (stages of a pipeline, experts, meshes that overlap), they would wait for those that raise: there a step's failures
    go along all axes of ranks when the next one begins, and are heard of in the one behind it. Nothing waits for a
    device either way.

    Args:
        owner: the optimizer's name, for the error.
        shards: whose tensors.
    """

    def __init__(self, owner: str, shards: Shards) -> None:
        self._owner, self._shards = owner, shards
        self._known: tuple[int, Axes] = (-1, ())
        self._judged: dict[tuple[int, ...], _Judged] = {}
        self._spread: _Told | None = None
        self._heard_at: int | None = None

    def note(
        self,
        together: tuple[int, ...],
        step: int,
        failures: Tensor,
        plan: Plan,
        suspects: list[Suspects],
        group: dist.ProcessGroup | None,
    ) -> None:
        """Start to count.

        Args:
            together: identities of the tensors that were stepped together.
            step: count, from 1.
            failures: this rank's, 0-dim fp32, not waited for.
            plan: of the blocks.
            suspects: of every stack.
            group: over which owners are spread.
        """
        count = None if self._axes else FailureCount(failures, () if group is None else (group,))
        self._judged[together] = _Judged(step, failures, count, plan, suspects, group)

    @property
    def _axes(self) -> Axes:
        """Found once for tensors and roles that stay the same."""
        if self._known[0] != self._shards.generation:
            self._known = self._shards.generation, self._shards.axes
        return self._known[1]

    def clear(self) -> None:
        """Forget everything: the state that it was about is gone."""
        self._judged.clear()
        self._spread = self._heard_at = None

    def buffers(self) -> list[Tensor]:
        """What is kept on the device."""
        kept = [*self._judged.values(), *(self._spread.judged if self._spread is not None else ())]
        counts = [one.counted for one in (*self._judged.values(), self._spread) if one is not None]
        flags = [flag for one in kept for part in one.suspects for flag in part.reasons.values()]
        return [*flags, *(buffer for count in counts if count is not None for buffer in count.buffers())]

    def raise_if_any(self, step: int | None) -> None:
        """Raise on all ranks if any of them withheld an update before this step.

        An engine makes several calls per step: the first hears of everything before, before any weight changes.

        Args:
            step: about to be made; None where every call is a step of its own.

        Raises:
            RuntimeError: names every block, its owner and the reason. An optimizer without an engine may go on; an
                engine's own bookkeeping does not survive errors in a step.
        """
        found = self._along_axes() if self._axes else self._in_groups(step)
        if found:
            raise RuntimeError(
                f"{self._owner} withheld the updates of these blocks in an earlier step. Remedy: find out "
                "why (data, learning rate, loss scale) and resume from the last checkpoint; gradient clipping and bf16 "
                "help most.\n- " + "\n- ".join(found)
            )

    def _in_groups(self, step: int | None) -> list[str]:
        found = list[str]()
        for key in [key for key, one in self._judged.items() if step is None or one.step < step]:
            one = self._judged.pop(key)
            if one.counted is not None and one.counted.read():
                found += _in_words(Ranks(() if one.group is None else (one.group,)), [one])
        return found

    def _along_axes(self) -> list[str]:
        count = self._shards.elsewhere.steps  # ranks that step different parameters make different calls in a step
        now = count() if count is not None else None
        if now is not None and now == self._heard_at:
            return []
        self._heard_at = now
        before, judged = self._spread, list(self._judged.values())
        self._judged.clear()
        failures = torch.zeros((), device=next((tensor.device for tensor in self._shards.tensors), "cpu"))
        for one in judged:
            failures = failures.to(one.failures.device) + one.failures
        self._spread = _Told(FailureCount(failures, self._axes), judged)
        return _in_words(Ranks(self._axes), before.judged) if before is not None and before.counted.read() else []


def _in_words(ranks: Ranks, judged: Sequence[_Judged]) -> list[str]:
    """What went wrong on all of these ranks: a collective."""
    mine = [
        f"{one.plan.name(block)}: {reason}"
        for one in judged
        for stack in one.suspects
        for reason, flags in stack.reasons.items()
        for block, failed in zip(stack.blocks, flags.tolist(), strict=True)
        if failed
    ]
    return [f"rank {rank}: {entry}" for rank, entries in ranks.everyones(mine).items() for entry in entries]
