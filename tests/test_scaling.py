"""benchmarks/scaling.py: what it counts is what travels, what it plans is what the optimizers do."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import pages
import scaling
import torch
import torch.distributed as dist
from scaling_measured import Counting, measure
from scaling_page import OPTIMIZERS
from scaling_plan import Assumptions, plan_scaling

from ds_optim.blueprint import blueprint, meta_model
from ds_optim.deepspeed.predict import predicted_layouts
from ds_optim.linalg.polar import cubic, polynomial_flops
from ds_optim.rule import bytes_of

ROOT = Path(__file__).parents[1]
TINY = {
    "model_type": "llama",
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
    "use_cache": False,
}


def shape(name: str) -> dict[str, Any]:
    return scaling.shape(ROOT / "configs" / "models" / f"{name}.json")


def sent_by_known_collectives() -> dict[str, float]:
    """On three ranks: 12, 24 and 3 fp32 elements, and an all-to-all of uneven parts."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    with Counting() as counting:
        dist.all_reduce(torch.ones(12))
        gathered = torch.empty(24)
        dist.all_gather_into_tensor(gathered, torch.ones(8))
        dist.broadcast(torch.ones(3), 0)
        counting.in_optimizer = True
        parts = [rank + 1] * ranks  # to everyone, itself included
        dist.all_to_all_single(torch.empty(6), torch.ones(sum(parts)), [1, 2, 3], parts)
        torch.mm(torch.ones(2, 5), torch.ones(5, 7))
    counts = counting.counts
    return {"zero": counts.of("zero"), "optimizer": counts.of("optimizer"), "flops": counts.flops}


def test_what_is_counted_is_what_the_collectives_must_send(pool: Any) -> None:
    for rank, found in enumerate(pool(3).run(sent_by_known_collectives)):
        assert found["zero"] == 4 * (2 * 12 * 2 // 3 + 24 * 2 // 3 + 3 * 2 // 3)
        assert found["optimizer"] == 4 * (rank + 1) * 2
        assert found["flops"] == 2 * 2 * 5 * 7


@pytest.mark.parametrize("stage", [2, 3])
def test_real_engines_send_multiply_and_keep_what_was_predicted(pool: Any, stage: int) -> None:
    optimizers = {name: scaling.OPTIONS.get(name, {}) for name in OPTIMIZERS}
    reports = pool(3).run(measure, TINY, optimizers, stage, 16, 1)
    for name, options in optimizers.items():
        predicted = plan_scaling(TINY, name, stage, 3, options=options)
        row = scaling.row(name, stage, 3, [one[name] for one in reports], predicted)
        assert scaling.holds(row), row
        wrong = replace(predicted, state_most=predicted.state_most + 1)
        assert not scaling.holds(scaling.row(name, stage, 3, [one[name] for one in reports], wrong))


@pytest.mark.parametrize("name", ["Shampoo", "SWAN"])
@pytest.mark.parametrize("stage", [1, 3])
def test_state_is_planned_as_every_rank_would_keep_it(name: str, stage: int) -> None:
    made = blueprint(meta_model(TINY), {}, name, {})
    layouts = predicted_layouts(made.groups, stage, 5)
    steppers = [made.optimizer.predicted(layouts, rank) for rank in range(5)]
    kept = [sum(bytes_of(one.spec(tensor)) + 4 for tensor in one.shards.tensors) for one in steppers]
    planned = plan_scaling(TINY, name, stage, 5)
    assert (planned.state_most, planned.state_mean) == (max(kept), sum(kept) / 5)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_does_the_same_at_stages_1_and_2(name: str) -> None:
    assert plan_scaling(TINY, name, 1, 4) == replace(plan_scaling(TINY, name, 2, 4), stage=1)


def test_a_70b_shape_has_fewer_matrices_than_1024_ranks() -> None:
    planned = plan_scaling(shape("llama2_70b"), "SWAN", 3, 1024)
    assert planned.matrices == 80 * 7
    assert planned.idle >= 1024 - 560  # more where one rank owns several small matrices
    least = polynomial_flops(8192, 28672, cubic(0.8, 10), "ieee")  # of one matrix: a rank cannot be given less
    assert planned.products_most == least
    assert planned.state_most < 1.01 * planned.state_mean


def test_times_follow_the_machine() -> None:
    model, usual = shape("llama_small"), Assumptions()

    def seconds(ranks: int, **changes: float) -> tuple[float, float, float]:
        one = plan_scaling(model, "SWAN", 3, ranks, replace(usual, **changes))
        return one.stream_seconds, one.product_seconds, one.exchange_seconds

    stream, products, exchange = seconds(16, latency_us=0)
    assert seconds(16, latency_us=0, network_gb_s=25)[2] == pytest.approx(2 * exchange)
    inside = seconds(8)
    assert seconds(8, network_gb_s=25) == inside  # one node has no network
    assert seconds(16, latency_us=0, matrix_tflops=25) == (stream, pytest.approx(2 * products), exchange)
    assert seconds(16, latency_us=0, memory_share=0.4) == (pytest.approx(2 * stream), products, exchange)
    assert plan_scaling(model, "AdamW", 3, 1).exchange_seconds == 0


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="mfu, tokens"):
        Assumptions(mfu=-1, tokens=0)
    with pytest.raises(ValueError, match="stage 0 over 8"):
        plan_scaling(TINY, "AdamW", 0, 8)


def test_the_page_shows_what_the_results_say() -> None:
    results = (ROOT / "docs" / "results" / "scaling.md").read_text(encoding="utf-8").splitlines()
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8").splitlines()
    shown = [line for line in page if line.startswith("| ") and line.split("|")[1].strip() in OPTIMIZERS]
    assert shown
    assert [line for line in shown if line not in results] == []
    record = json.loads((ROOT / "docs" / "results" / "scaling.json").read_text(encoding="utf-8"))
    assert all(map(scaling.holds, record["measured"]["rows"]))
    assert "\n".join(results) + "\n" == pages.wrapped(scaling.page(record, scaling.deviation))
    for name, _, meaning in record["planned"]["assumptions"]:
        assert any(line.startswith(f"| `{name}` |") and meaning in line for line in page), name
