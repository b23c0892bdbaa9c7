"""The last part of a report: versions, settings, the method behind each number, and what was held against it."""

from __future__ import annotations

from ds_optim.memory.record import Category, Check, Record, StrictModel, human
from ds_optim.memory.report_runs import Shown

STACK = (
    Category.PARAMETERS,
    Category.MASTER,
    Category.GRADIENTS,
    Category.BUCKETS,
    Category.OPTIMIZER,
    Category.ACTIVATIONS,
    Category.WORKSPACE,
    Category.EXCHANGE,
    Category.BUFFERS,
    Category.SLACK,
    Category.UNACCOUNTED,
)
"""From the bottom of every stack to its top."""


class CheckRow(StrictModel):
    """A check at the rank where the two numbers differ most."""

    who: str
    rank: int
    check: Check


def checks(name: str, record: Record) -> list[CheckRow]:
    worst: dict[str, CheckRow] = {}
    for rank in record.ranks:
        for check in rank.checks:
            known = worst.get(check.name)
            if known is None or _badness(check) > _badness(known.check):
                worst[check.name] = CheckRow(who=name, rank=rank.rank, check=check)
    return list(worst.values())


def _badness(check: Check) -> tuple[bool, float]:
    """Failed ones are worse than the others, whatever the difference."""
    return check.passed is False, abs(check.difference)


def provenance(shown: Shown) -> list[tuple[str, list[str]]]:
    """(name, value per run), without rows that are empty for all."""
    columns = [_provenance_of(record) for _, record in shown]
    names = dict.fromkeys(name for column in columns for name in column)
    rows = [(name, [column.get(name, "") for column in columns]) for name in names]
    return [(name, values) for name, values in rows if any(values)]


def _provenance_of(record: Record) -> dict[str, str]:
    known = record.provenance
    memory = known.device_memory
    return {
        "kind": record.kind,
        "date": known.date,
        "machine": known.machine,
        "model": known.model,
        "parameters": f"{known.parameters:,}",
        "optimizer": known.optimizer,
        "settings": ", ".join(f"{name} = {value}" for name, value in known.settings.items()),
        "strategy": known.strategy,
        "ranks": str(known.world_size),
        "precision": known.precision,
        "offload": known.offload,
        "micro-batch": "" if known.micro_batch is None else str(known.micro_batch),
        "tokens per sequence": "" if known.seq_length is None else str(known.seq_length),
        "activations recomputed": "yes" if known.checkpointing else "no",
        "device memory": "" if memory is None else human(memory),
        "time measured over bare": "" if known.overhead is None else f"{known.overhead:.2f}",
        "versions": ", ".join(f"{name} {version}" for name, version in known.versions.items()),
        "command": known.command,
        "notes": " ".join(known.notes),
    }


def methods(shown: Shown) -> list[tuple[str, list[str]]]:
    """(category, method per run), every method that one of its moments names."""
    columns: list[dict[Category, str]] = []
    for _, record in shown:
        found: dict[Category, dict[str, None]] = {}
        for rank in record.ranks:
            for moment in rank.moments:
                for category, amount in moment.amounts.items():
                    found.setdefault(category, {})[amount.method.value] = None
        columns.append({category: ", ".join(methods) for category, methods in found.items()})
    used = [category for category in STACK if any(category in column for column in columns)]
    return [(category.value, [column.get(category, "") for column in columns]) for category in used]
