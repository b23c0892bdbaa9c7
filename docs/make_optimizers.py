"""Writes the table of docs/optimizers/README.md from what the rules state.

    python docs/make_optimizers.py

tests/test_registry.py fails when the table is not what this writes.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from ds_optim.optimizers.registry import optimizers
from ds_optim.rule import WholeMatrix
from ds_optim.stepping.sharded import ShardedOptimizer

PAGE = Path(__file__).parent / "optimizers" / "README.md"
BEGIN, END = "<!-- written by docs/make_optimizers.py -->\n", "<!-- end -->\n"


def table() -> str:
    """One line for each registered optimizer."""
    lines = [
        "| page | choose it | state, bytes per parameter | cost of a step | learning rate, against AdamW's |",
        "|---|---|---|---|---|",
    ]
    for cls in optimizers().values():
        rule = cls.rule
        page = PAGE.parent / f"{cls.__module__.rpartition('.')[2]}.md"
        title = page.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
        cells = f"[{title}]({page.name})", rule.summary, rule.memory, cost(cls), rule.learning_rate
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def cost(cls: type[ShardedOptimizer]) -> str:
    """What a step is bound by."""
    if not isinstance(cls.rule, WholeMatrix):
        return f"{cls.rule.streams} streams"
    defaults = {name: one.default for name, one in inspect.signature(cls).parameters.items()}
    rest = " and decompositions" if cls.rule.refresh(defaults).frequency > 1 else ""
    return f"matrix products{rest}, shared out over the ranks"


def written() -> str:
    """The page with its table."""
    text = PAGE.read_text(encoding="utf-8")
    return re.sub(f"(?<={re.escape(BEGIN)}).*(?={re.escape(END)})", lambda _: table(), text, flags=re.DOTALL)


if __name__ == "__main__":
    PAGE.write_text(written(), encoding="utf-8")
