"""The examples of other tools: what benchmarks/tools.py ran, and that it is what stands there and in the docs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from ds_optim.deepspeed.refusals import judge

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import tools  # noqa: E402

EXAMPLES = ROOT / "examples" / "tools"


def test_every_command_was_run_and_passed() -> None:
    kept = json.loads(tools.KEPT.read_text(encoding="utf-8"))
    assert {tool: [row["command"] for row in run["rows"]] for tool, run in kept.items()} == tools.COMMANDS
    assert [row for run in kept.values() for row in run["rows"] if not row["passes"]] == []
    assert tools.PAGE.read_text(encoding="utf-8") == tools.page(kept), "run: python benchmarks/tools.py"


def test_what_was_trained_was_trained_by_ours_and_went_on() -> None:
    for tool, run in json.loads(tools.KEPT.read_text(encoding="utf-8")).items():
        said = [row for row in run["rows"] if "optimizer" in row]
        assert said, tool
        for row in said:
            is_lightning = tool == "lightning"
            assert row["optimizer"] == ("SWAN" if is_lightning else "AdamMini")
            assert row["steps"] == (12 if is_lightning and "--resume" in row["command"] else 6)


@pytest.mark.parametrize("config", sorted(EXAMPLES.glob("*.json")), ids=lambda path: path.name)
def test_a_json_is_one_that_engines_take(config: Path) -> None:
    assert judge(json.loads(config.read_text(encoding="utf-8")))[1] == []
