"""Who owns which block is arithmetic: the same everywhere, even, near the data, and told before training.

Llama shapes are laid out as ZeRO does, and judged by the plan's own cost model: what is tested here is the assignment,
not the model of the costs.
"""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import ds_optim
from ds_optim.roles.role import Kind, Role
from ds_optim.rule import Settings, WholeMatrix
from ds_optim.sharding.assignment import Block, Tile, Work, assign, holdings, stagger
from ds_optim.sharding.boxes import Box
from ds_optim.sharding.layout import FlatPartition, Layout, ParameterSpec, Replicated, SlicedParameters
from ds_optim.sharding.plan import Plan, imbalance, make_plans

EVEN = 1.10  # largest over mean, where every rank has ten blocks or more

Model = Mapping[str, tuple[tuple[int, ...], Kind]]
"""Shape and kind of every parameter, by name."""


def llama(hidden: int, ffn: int, layers: int, vocab: int) -> Model:
    attention: list[tuple[str, tuple[int, ...], Kind]] = [
        (f"self_attn.{part}_proj.weight", (hidden, hidden), "linear") for part in "qkvo"
    ]
    layer: list[tuple[str, tuple[int, ...], Kind]] = [
        *attention,
        ("mlp.gate_proj.weight", (ffn, hidden), "mlp"),
        ("mlp.up_proj.weight", (ffn, hidden), "mlp"),
        ("mlp.down_proj.weight", (hidden, ffn), "mlp"),
        ("input_layernorm.weight", (hidden,), "norm"),
        ("post_attention_layernorm.weight", (hidden,), "norm"),
    ]
    return {
        "model.embed_tokens.weight": ((vocab, hidden), "embedding"),
        **{f"model.layers.{i}.{name}": (shape, kind) for i in range(layers) for name, shape, kind in layer},
        "model.norm.weight": ((hidden,), "norm"),
        "lm_head.weight": ((vocab, hidden), "head"),
    }


SMALL = llama(hidden=512, ffn=1376, layers=8, vocab=32000)  # 58 M
LLAMA2_7B = llama(hidden=4096, ffn=11008, layers=32, vocab=32000)


def flat(model: Model, world_size: int) -> Layout:
    """One flat tensor, as at ZeRO-1 and 2."""
    specs = tuple(ParameterSpec(name, shape) for name, (shape, _) in model.items())
    ends = np.cumsum([spec.numel for spec in specs]).tolist()
    return FlatPartition(specs, (0, *ends[:-1]), -(-ends[-1] // world_size), world_size)


def sliced(model: Model, world_size: int) -> Layout:
    """Every parameter in slices, as at ZeRO-3."""
    return SlicedParameters(tuple(ParameterSpec(name, shape) for name, (shape, _) in model.items()), world_size)


def replicated(model: Model, world_size: int) -> list[Layout]:
    return [Replicated(ParameterSpec(name, shape), world_size) for name, (shape, _) in model.items()]


def plan_of(model: Model, layouts: Sequence[Layout], optimizer: RuleOf) -> Plan:
    rule, settings = optimizer
    tiles = {name: rule.tiles(settings, Role(kind), shape) for name, (shape, kind) in model.items()}
    stateless = rule is ds_optim.SWAN.rule
    frequency, staggered = rule.refresh(settings)
    work = partial(rule.work, settings)
    plans = make_plans([(one, "group", 1) for one in layouts], tiles, work, frequency, staggered, stateless)
    ((plan, tensors),) = plans
    assert tensors == tuple(range(len(layouts)))
    return plan


RuleOf = tuple[WholeMatrix, Settings]
"""A rule, and an optimizer's settings."""


def of(optimizer: Any) -> RuleOf:
    return optimizer.rule, {**optimizer.defaults, "state_dtype": torch.float32, "matmul_precision": "ieee"}


def shampoo(largest: int, **settings: Any) -> RuleOf:
    return of(ds_optim.Shampoo([nn.Parameter(torch.zeros(1))], max_preconditioner_dim=largest, **settings))


def swan() -> RuleOf:
    return of(ds_optim.SWAN([nn.Parameter(torch.zeros(1))]))


# -- holdings ----------------------------------------------------------------------------------------------------------


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    shapes = draw(st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple), min_size=1, max_size=4))
    specs = tuple(ParameterSpec(f"p{index}", shape) for index, shape in enumerate(shapes))
    world_size = draw(st.integers(1, 6))
    kind = draw(st.sampled_from(["sliced", "flat", "replicated"]))
    if kind == "replicated":
        return Replicated(specs[0], world_size)
    if kind == "sliced":
        return SlicedParameters(specs, world_size)
    offsets, end = [], 0
    for spec in specs:
        offsets.append(end)
        end += spec.numel + draw(st.integers(0, 3))
    return FlatPartition(specs, tuple(offsets), -(-end // world_size), world_size)


@given(layouts(), st.data())
def test_holdings_are_who_has_each_element_of_a_box(layout: Layout, data: st.DataObject) -> None:
    for parameter, spec in enumerate(layout.parameters):
        holder = torch.full((spec.numel,), -1)
        for rank in range(layout.world_size):
            for fragment in layout.fragments(rank):
                if fragment.parameter == parameter:
                    holder[fragment.start : fragment.stop] = rank
        ranges = [
            sorted(data.draw(st.sets(st.integers(0, size), min_size=2, max_size=2)) if size > 1 else (0, 1))
            for size in spec.shape
        ]
        box = Box(tuple(start for start, _ in ranges), tuple(stop for _, stop in ranges))
        (found,) = holdings(layout, parameter, [box])
        assert found.edges[0] == 0
        assert found.edges[-1] == box.numel
        if isinstance(layout, Replicated):
            assert len(found.ranks) == 0
            continue
        slices = tuple(slice(start, stop) for start, stop in ranges)
        wanted, counts = holder.view(spec.shape)[slices].flatten().unique_consecutive(return_counts=True)
        assert found.ranks.tolist() == wanted.tolist()
        assert found.counts.tolist() == counts.tolist()


def test_a_parameter_without_blocks_may_have_any_shape() -> None:
    """A single number (CLIP's logit_scale) is no matrix, and must not stop the plan of those that are."""
    scalar: Model = {"logit_scale": ((), "other"), "w": ((8, 8), "linear")}
    for layout in (flat(scalar, 2), sliced(scalar, 2)):
        plan = plan_of(scalar, [layout], shampoo(4))
        assert {plan.name(block).split(",")[0] for block in range(len(plan.blocks))} == {"w"}


# -- refreshes ---------------------------------------------------------------------------------------------------------

WORKS = st.lists(st.integers(1, 50).map(lambda n: Work(1.0, float(n**3), 0)), min_size=1, max_size=60)


@given(WORKS, st.integers(1, 12), st.randoms())
def test_every_refresh_residue_gets_an_equal_share_of_the_work(works: list[Work], frequency: int, random: Any) -> None:
    keys = [(f"p{index // 3}", index % 3) for index in range(len(works))]
    offsets = stagger(keys, works, frequency)
    assert set(offsets) <= set(range(frequency))
    loads = [0.0] * frequency
    for work, offset in zip(works, offsets, strict=True):
        loads[offset] += work.refresh_flops
    assert max(loads) - min(loads) <= max(work.refresh_flops for work in works)
    # Whatever the order in which blocks are listed: another number of ranks lists them in another one.
    order = list(range(len(works)))
    random.shuffle(order)
    shuffled = stagger([keys[i] for i in order], [works[i] for i in order], frequency)
    assert shuffled == [offsets[i] for i in order]


def test_blocks_that_cost_the_same_are_dealt_evenly() -> None:
    offsets = stagger([("w", index) for index in range(41)], [Work(1.0, 8.0)] * 41, 10)
    assert sorted(np.bincount(offsets).tolist()) == [4] * 9 + [5]


def test_refreshes_do_not_depend_on_the_number_of_ranks() -> None:
    def schedule(layouts: Sequence[Layout]) -> dict[str, int]:
        plan = plan_of(SMALL, layouts, shampoo(256))
        return {plan.name(index): block.offset for index, block in enumerate(plan.blocks)}

    alone = schedule(replicated(SMALL, 1))
    for world_size in (2, 3, 8):
        for layouts in ([flat(SMALL, world_size)], [sliced(SMALL, world_size)], replicated(SMALL, world_size)):
            assert schedule(layouts) == alone


# -- plans -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [shampoo(128), swan()], ids=["shampoo", "swan"])
@pytest.mark.parametrize("lay_out", [flat, sliced])
def test_a_plan_is_the_same_every_time(lay_out: Callable[[Model, int], Layout], optimizer: RuleOf) -> None:
    one, two = (plan_of(SMALL, [lay_out(SMALL, 3)], optimizer) for _ in range(2))
    assert one.owners == two.owners
    assert one.digest == two.digest
    assert one.digest != dataclasses.replace(one, owners=tuple(2 - owner for owner in one.owners)).digest
    other = plan_of(SMALL, [lay_out(SMALL, 4)], optimizer)
    assert one.digest != other.digest


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_ranks_together_keep_and_compute_what_one_process_would(world_size: int) -> None:
    alone = plan_of(SMALL, replicated(SMALL, 1), shampoo(256)).costs
    for layouts in ([flat(SMALL, world_size)], [sliced(SMALL, world_size)], replicated(SMALL, world_size)):
        spread = plan_of(SMALL, layouts, shampoo(256)).costs
        assert spread.state_bytes.sum() == alone.state_bytes.sum()
        assert spread.blocks.sum() == alone.blocks.sum()
        assert spread.flops.sum() == pytest.approx(alone.flops.sum(), rel=1e-12)
        assert spread.matrix_elements == alone.matrix_elements


def assert_even(plan: Plan) -> None:
    costs = plan.costs
    assert costs.blocks.min() >= 10
    assert imbalance(costs.flops) <= EVEN
    assert imbalance(costs.state_bytes) <= EVEN
    assert costs.worst_step <= EVEN
    assert_worst_step_is_the_worst(plan)


def assert_worst_step_is_the_worst(plan: Plan) -> None:
    """Step by step from the blocks: no step of a whole period is less even than the plan says."""
    worst = 1.0
    for step in range(1, plan.frequency + 1):
        flops = np.zeros(plan.world_size)
        for block, owner in zip(plan.blocks, plan.owners, strict=True):
            due = (step + block.offset) % plan.frequency == 0
            flops[owner] += block.work.step_flops + (block.work.refresh_flops if due else 0.0)
        worst = max(worst, flops.max() / flops.mean())
    assert plan.costs.worst_step == pytest.approx(worst)


@pytest.mark.parametrize("lay_out", [flat, sliced])
@pytest.mark.parametrize("world_size", [2, 3, 4, 8])
@pytest.mark.parametrize("largest", [256, 128])
def test_ranks_of_a_small_llama_are_evenly_loaded(
    lay_out: Callable[[Model, int], Layout], world_size: int, largest: int
) -> None:
    assert_even(plan_of(SMALL, [lay_out(SMALL, world_size)], shampoo(largest)))


@pytest.mark.parametrize("lay_out", [flat, sliced])
def test_sixty_four_ranks_of_llama2_7b_are_evenly_loaded(lay_out: Callable[[Model, int], Layout]) -> None:
    assert_even(plan_of(LLAMA2_7B, [lay_out(LLAMA2_7B, 64)], shampoo(1024)))


def test_replicas_of_a_small_llama_are_evenly_loaded() -> None:
    assert_even(plan_of(SMALL, replicated(SMALL, 8), shampoo(256)))


def stay(plan: Plan) -> float:
    """Of the blocks that one rank holds whole, the part that this rank owns."""
    pairs = zip(plan.held, plan.owners, strict=True)
    whole = [int(held.ranks[0]) == owner for held, owner in pairs if len(held.ranks) == 1]
    return sum(whole) / len(whole)


@pytest.mark.parametrize(
    ("model", "world_size", "largest"), [(SMALL, 2, 128), (LLAMA2_7B, 64, 1024)], ids=["small", "7b"]
)
def test_blocks_that_lie_whole_on_one_rank_mostly_stay_there(model: Model, world_size: int, largest: int) -> None:
    plan = plan_of(model, [flat(model, world_size)], shampoo(largest))
    assert stay(plan) >= 0.9
    spread = sum(len(held.ranks) == 1 for held in plan.held)
    assert spread >= 0.9 * len(plan.blocks)  # so that this says something


def test_one_process_plans_llama2_7b_on_1024_ranks_in_a_minute() -> None:
    started = time.perf_counter()
    plan = plan_of(LLAMA2_7B, [flat(LLAMA2_7B, 1024)], shampoo(1024))
    text = plan.explain()
    buckets = plan.schedule([0], 512, 1 << 24)
    assert time.perf_counter() - started < 60
    assert imbalance(plan.costs.flops) <= EVEN
    assert imbalance(plan.costs.state_bytes) <= EVEN
    mine = [one.block for bucket in buckets for one in bucket.owned]
    assert mine == plan.owned(0, 512)
    assert "(1008 more)" in text


@st.composite
def lumps(draw: st.DrawFn) -> tuple[list[Block], Layout, int]:
    works = draw(st.lists(st.tuples(*[st.integers(0, 9)] * 3), min_size=1, max_size=12))
    frequency = draw(st.integers(1, 3))
    tile = Tile(Box((0,), (4,)), (4,))
    blocks = [
        Block(0, index, 0, tile, Work(1.0 + step, float(refresh), state), draw(st.integers(0, frequency - 1)))
        for index, (step, refresh, state) in enumerate(works)
    ]
    specs = tuple(ParameterSpec(f"p{index}", (4,)) for index in range(len(blocks)))
    world_size = draw(st.integers(1, 5))
    return blocks, SlicedParameters(specs, world_size), frequency


@given(lumps())
def test_every_block_has_one_owner_whatever_it_costs(drawn: tuple[list[Block], Layout, int]) -> None:
    """Also where there is no state at all, or no refresh."""
    blocks, layout, frequency = drawn
    held = [holdings(layout, block.parameter, [block.tile.box])[0] for block in blocks]
    owners = assign(blocks, held, layout.world_size, frequency)
    assert len(owners) == len(blocks)
    assert set(owners) <= set(range(layout.world_size))


# -- explain -----------------------------------------------------------------------------------------------------------

ROW = re.compile(r"^ *(\d+) +(\d+) +([\d.]+) +([\d.]+) +([\d.]+) +([\d.]+)$", re.MULTILINE)


@pytest.mark.parametrize("world_size", [3, 8])
@pytest.mark.parametrize("exchange_bytes", [4, 2])
def test_what_explain_says_adds_up(world_size: int, exchange_bytes: int) -> None:
    for layouts in ([flat(SMALL, world_size)], [sliced(SMALL, world_size)], replicated(SMALL, world_size)):
        plan = plan_of(SMALL, layouts, shampoo(256))
        rows = ROW.findall(plan.explain(exchange_bytes=exchange_bytes, all_ranks=True))
        assert [int(row[0]) for row in rows] == list(range(world_size))
        blocks, _, state, sent, received = (sum(float(row[column]) for row in rows) for column in range(1, 6))
        assert blocks == len(plan.blocks)
        # Two fp32 per element, two fp32 triangles per axis, two counters.
        tiles = [block.tile.shape for block in plan.blocks]
        kept = sum(8 * math.prod(shape) + 8 * sum(size * (size + 1) // 2 for size in shape) + 8 for shape in tiles)
        rounding = 0.005 * world_size
        assert state * 1e6 == pytest.approx(kept, abs=rounding * 1e6)
        assert sent == pytest.approx(received, abs=2 * rounding)
        assert plan.costs.sent.sum() == plan.costs.received.sum()
        assert plan.costs.sent.sum() * exchange_bytes / 1e6 == pytest.approx(sent, abs=rounding)


def test_what_travels_is_what_owners_do_not_hold() -> None:
    """One matrix of two blocks over two ranks, cut where the blocks are not: counted by hand."""
    model: Model = {"w": ((6, 4), "linear")}
    plan = plan_of(model, [sliced(model, 2)], shampoo(4))  # rows 0-3 and 4-5; ranks hold rows 0-2 and 3-5
    assert [held.counts.tolist() for held in plan.held] == [[12, 4], [8]]
    assert plan.owners == (0, 1)
    assert plan.costs.sent.tolist() == plan.costs.received.tolist() == [4, 4]  # row 3 in, its update out
    assert plan.costs.straddling == 8


def test_explain_names_ranks_that_own_nothing() -> None:
    model: Model = {"w": ((16, 16), "linear"), "norm.weight": ((16,), "norm")}
    plan = plan_of(model, [sliced(model, 5)], shampoo(8))
    assert "1 of 5 ranks own nothing" in plan.explain()
    assert "own nothing" not in plan_of(model, [sliced(model, 4)], shampoo(8)).explain()
    nothing: Model = {"norm.weight": ((16,), "norm")}
    assert "no matrices" in plan_of(nothing, [sliced(nothing, 3)], shampoo(8)).explain()


def test_explain_of_one_process_mentions_no_exchange() -> None:
    plan = plan_of(SMALL, replicated(SMALL, 1), swan())
    (row,) = ROW.findall(plan.explain())
    assert [float(value) for value in row[3:]] == [0.0, 0.0, 0.0]
    assert "refreshed" not in plan.explain()
    assert "refreshed every 10 steps" in plan_of(SMALL, replicated(SMALL, 1), shampoo(256)).explain()
