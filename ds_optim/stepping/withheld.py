"""Updates that an owner withheld: counted over the ranks meanwhile, told to all of them when the next step begins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor

from ds_optim.sharding.exchange import ALONE, FailureCount, Ranks
from ds_optim.sharding.plan import Plan
from ds_optim.stepping.block_step import Suspects


class _Judged(NamedTuple):
    step: int
    failures: FailureCount
    plan: Plan
    suspects: list[Suspects]
    group: dist.ProcessGroup | None


class Withheld:
    """What is to be known of the blocks of a step when the next one begins.

    Args:
        owner: the optimizer's name, for the error.
    """

    def __init__(self, owner: str) -> None:
        self._owner = owner
        self._judged: dict[tuple[int, ...], _Judged] = {}

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
        self._judged[together] = _Judged(step, FailureCount(failures, group), plan, suspects, group)

    def clear(self) -> None:
        """Forget everything: the state that it was about is gone."""
        self._judged.clear()

    def buffers(self) -> list[Tensor]:
        """What is kept on the device."""
        flags = [flag for one in self._judged.values() for part in one.suspects for flag in part.reasons.values()]
        return [*flags, *(kept for one in self._judged.values() for kept in one.failures.buffers())]

    def raise_if_any(self, step: int | None) -> None:
        """Raise on all ranks of a shard group if any of them withheld an update before this step.

        An engine makes several calls per step: the first hears of everything in the previous step, before any weight
        changes in this one.

        Args:
            step: about to be made; None where every call is a step of its own.

        Raises:
            RuntimeError: names every block, its owner and the reason. An optimizer without an engine may go on; an
                engine's own bookkeeping does not survive errors in a step.
        """
        listed = []
        for key in [key for key, one in self._judged.items() if step is None or one.step < step]:
            one = self._judged.pop(key)
            if not one.failures.read():
                continue
            found = (ALONE if one.group is None else Ranks((one.group,))).everyones(_mine(one.plan, one.suspects))
            listed += [f"rank {rank}: {entry}" for rank, entries in found.items() for entry in entries]
        if listed:
            raise RuntimeError(
                f"{self._owner} withheld the updates of these blocks in the previous step. Remedy: find out "
                "why (data, learning rate, loss scale) and resume from the last checkpoint; gradient clipping and bf16 "
                "help most.\n- " + "\n- ".join(listed)
            )


def _mine(plan: Plan, suspects: Sequence[Suspects]) -> list[str]:
    return [
        f"{plan.name(block)}: {reason}"
        for one in suspects
        for reason, flags in one.reasons.items()
        for block, failed in zip(one.blocks, flags.tolist(), strict=True)
        if failed
    ]
