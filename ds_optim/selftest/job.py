"""The ranks that ``torchrun`` starts a selftest with: what each found is printed by the first.

Findings travel through the store in which the ranks met, not in collectives: those no longer work when a rank has left
one with an error.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from ds_optim.selftest.result import CheckResult, failed

PATIENCE = datetime.timedelta(minutes=5)
"""How long ranks wait for one another: they have the same to do."""


@dataclasses.dataclass(frozen=True, slots=True)
class TestingRank:
    """One of the ranks that a selftest runs on.

    Attributes:
        rank: which one.
        size: how many there are.
        store: where they meet; None for one rank alone.
    """

    rank: int = 0
    size: int = 1
    store: Any = None

    def gathered(self, mine: Sequence[CheckResult]) -> list[CheckResult]:
        """On the first rank what all have found, rank by rank; elsewhere what this one has."""
        if self.store is None:
            return list(mine)
        found = [dataclasses.replace(one, rank=self.rank) for one in mine]
        if self.rank > 0:
            self.store.set(_key(self.rank), json.dumps([dataclasses.asdict(one) for one in found]))
            return found
        for rank in range(1, self.size):
            try:
                found += [CheckResult(**one) for one in json.loads(self.store.get(_key(rank)))]
            except Exception as error:  # it was killed, or hangs
                found.append(dataclasses.replace(failed("what it found", error), rank=rank))
        return found


def _key(rank: int) -> str:
    return f"found by rank {rank}"


@contextlib.contextmanager
def joined() -> Iterator[TestingRank]:
    """This rank of the job that the environment describes, with a process group over gloo.

    All ranks leave it together, when the first one is through: ``torchrun`` ends the others as soon as one has failed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield TestingRank()
        return
    store, rank, size = next(rendezvous("env://", timeout=PATIENCE))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=PATIENCE)
    try:
        yield TestingRank(rank, size, store)
    finally:
        if rank == 0:
            store.set("is through", "")
        with contextlib.suppress(dist.DistError):  # the first rank is gone, and its store with it
            store.wait(["is through"], size * PATIENCE)
        dist.destroy_process_group()
