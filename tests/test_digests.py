"""benchmarks/digests.py: one bit more or less is another digest, and a comparison names every case that moved."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from digests import add_options, digest, finish

TENSORS = {"weight": torch.tensor([0.0, 1.0]), "bias": torch.zeros(3, dtype=torch.bfloat16)}


def test_the_order_and_the_memory_of_tensors_do_not_matter() -> None:
    strided = torch.tensor([[0.0, 5.0], [1.0, 5.0]])[:, 0]
    assert digest(TENSORS) == digest({"bias": TENSORS["bias"].clone(), "weight": strided})


@pytest.mark.parametrize(
    "other",
    [
        {**TENSORS, "weight": torch.tensor([-0.0, 1.0])},
        {**TENSORS, "weight": torch.tensor([0.0, 1.0]).nextafter(torch.tensor(2.0))},
        {**TENSORS, "weight": TENSORS["weight"].view(torch.int32)},
        {**TENSORS, "weight": TENSORS["weight"].view(2, 1)},
        {"weights": TENSORS["weight"], "bias": TENSORS["bias"]},
        {"weight": TENSORS["weight"]},
    ],
    ids=["sign of zero", "one ulp", "dtype", "shape", "name", "one less"],
)
def test_whatever_differs_is_another_digest(other: dict[str, torch.Tensor]) -> None:
    assert digest(other) != digest(TENSORS)


def options(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_options(parser)
    return parser.parse_args(arguments)


def test_a_comparison_names_what_moved_and_what_is_new(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = str(tmp_path / "before.json"), str(tmp_path / "after.json")
    cases = {"Lion | 2 fp32 | 3": "aa", "Adan | 2 fp32 | 3": "bb", "Adan | 3 fp32 | 3": "cc"}
    assert finish(cases, options("--digests", before))
    assert finish(cases, options("--compare", before))
    assert "3 of 3 digests are those of" in capsys.readouterr().out
    moved = {"Adan | 2 fp32 | 3": "bb", "Adan | 3 fp32 | 3": "dd", "SWAN | 2 fp32 | 3": "ee"}
    assert not finish(moved, options("--digests", after, "--compare", before))
    *lines, summary = capsys.readouterr().out.splitlines()
    assert lines == ["- DIFFERS Adan | 3 fp32 | 3", "- NEW SWAN | 2 fp32 | 3: not in the earlier run"]
    assert summary.startswith("1 of 3 digests are those of")
    assert summary.endswith("1 of its cases were not run")
    assert json.loads(Path(after).read_text())["cases"] == moved
