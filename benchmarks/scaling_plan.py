"""What an optimizer's step will cost each rank of a large job: from layouts and shapes, and a stated machine.

State, bytes and flops are those of the layouts and plans that the optimizers themselves follow. Times are a model of a
machine, `Assumptions`, every value of which can be given to ``benchmarks/scaling.py``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any

import numpy as np
from torch import nn

from ds_optim.blueprint import blueprint, meta_model
from ds_optim.deepspeed.facts import zero_settings
from ds_optim.deepspeed.predict import predicted_layouts
from ds_optim.linalg.products import own_product_flops
from ds_optim.optimizers.adamw import AdamW
from ds_optim.rule import bytes_of
from ds_optim.sharding.assignment import Floats, holdings
from ds_optim.sharding.block_runs import block_runs
from ds_optim.sharding.boxes import Box
from ds_optim.sharding.layout import Layout, ParameterSpec
from ds_optim.sharding.plan import Plan
from ds_optim.sharding.schedule import message_size
from ds_optim.stepping.in_place import InPlace
from ds_optim.stepping.owned_blocks import OwnedBlocks

_ADAMS = AdamW.rule.streams  # what Shampoo and SWAN leave to Adam
_HELD_STREAMS, _OWNED_STREAMS = 5, 12
"""Of a matrix's elements: where they lie (gradient, packed; update, weight twice), and at the owner (roughly)."""
_IDENTITY = 16  # bytes per block that say which one it is
_COUNT = 4  # bytes of a local tensor's step count
_SUM = 8  # bytes of a cut block's sum: fp64
_WIDTH = 2  # bytes of a weight and of a gradient: bf16
LOOKED_AT = 5
"""Ranks of which Adam-mini's state is predicted: these, if there are more; they differ by a thousandth at most."""


def _setting(default: float, about: str) -> Any:
    return field(default=default, metadata={"about": about})


@dataclass(frozen=True, slots=True, kw_only=True)
class Assumptions:
    """The machine and the training that times are predicted for: an 8-GPU H100 host, unless said otherwise."""

    peak_tflops: float = _setting(989.0, "TFLOP/s of an accelerator, bf16, dense (H100 SXM's data sheet)")
    mfu: float = _setting(0.4, "share of it that forward and backward pass reach, at 6 flops per parameter and token")
    matrix_tflops: float = _setting(50.0, "TFLOP/s of fp32 matrix products in Shampoo and SWAN (75 % of 67, no TF32)")
    root_factor: float = _setting(
        7.5, "times what the plan counts for a root (20 n^3) that an accelerator's iteration takes"
    )
    memory_gb_s: float = _setting(3350.0, "GB/s of an accelerator's memory")
    memory_share: float = _setting(0.8, "share of it that a fused step reaches")
    node_ranks: int = _setting(8, "ranks per node")
    node_gb_s: float = _setting(450.0, "GB/s per rank and direction inside a node (NVLink)")
    network_gb_s: float = _setting(50.0, "GB/s per rank and direction between nodes (400 Gbit/s)")
    latency_us: float = _setting(5.0, "microseconds per message; all-to-all: one per other rank, collectives: log2")
    tokens: int = _setting(16384, "tokens per rank and step, in one pass")
    overlap: float = _setting(1.0, "share of forward and backward behind which ZeRO's traffic can hide")

    def __post_init__(self) -> None:
        wrong = [one.name for one in fields(self) if not 0 < getattr(self, one.name) < math.inf]
        wrong = [name for name in wrong if name not in ("latency_us", "overlap") or getattr(self, name) != 0]
        if wrong:
            raise ValueError(f"{', '.join(wrong)}: must be greater than 0 (latency_us and overlap may be 0)")

    @property
    def listed(self) -> list[tuple[str, float, str]]:
        """Every assumption: its name, its value, and what it means."""
        return [(one.name, getattr(self, one.name), one.metadata["about"]) for one in fields(self)]

    def collective(self, sent: float, ranks: int, count: int) -> float:
        """Seconds of ``count`` ring collectives in which every rank sends ``sent`` bytes altogether.

        Rings cross a node's edge on all of its network ports at a time.
        """
        if ranks == 1:
            return 0.0
        rate = self.node_gb_s if ranks <= self.node_ranks else min(self.node_gb_s, self.node_ranks * self.network_gb_s)
        return sent / (rate * 1e9) + count * self.latency_us * 1e-6 * math.ceil(math.log2(ranks))

    def all_to_all(self, busiest: float, ranks: int, count: int) -> float:
        """Seconds of ``count`` all-to-alls in which the busiest rank sends or receives ``busiest`` bytes altogether.

        Partners lie evenly over the nodes; a rank's traffic leaves its node by its own port.
        """
        if ranks == 1:
            return 0.0
        away = max(0, ranks - self.node_ranks) / (ranks - 1)
        seconds = max(busiest * away / (self.network_gb_s * 1e9), busiest * (1 - away) / (self.node_gb_s * 1e9))
        return seconds + count * self.latency_us * 1e-6 * (ranks - 1)


@dataclass(frozen=True, slots=True)
class Planned:
    """One optimizer, ZeRO stage and number of ranks. Bytes and flops of one step; "most": of the rank that has most.

    Attributes:
        matrices: blocks with an owner.
        idle: ranks that own none, where there are any.
        state_most: bytes of optimizer state.
        state_mean: likewise, mean.
        sent_mean: bytes that the optimizer's step sends.
        sent_most: likewise.
        zero_gradients: bytes per rank that ZeRO itself sends of gradients.
        zero_parameters: likewise, of parameters.
        products_most: flops of matrix products, without roots.
        flops_most: with roots, a refresh spread over the steps between two.
        flops_mean: likewise.
        model_seconds: of forward and backward pass.
        zero_seconds: of ZeRO's traffic as far as it does not hide.
        stream_seconds: of the optimizer's step, for what it reads and writes.
        product_seconds: likewise, for matrix products and roots, with waiting for the busiest rank of every bucket.
        exchange_seconds: likewise, for what travels.
    """

    optimizer: str
    stage: int
    ranks: int
    matrices: int
    idle: int
    state_most: float
    state_mean: float
    sent_mean: float
    sent_most: float
    zero_gradients: float
    zero_parameters: float
    products_most: float
    flops_most: float
    flops_mean: float
    model_seconds: float
    zero_seconds: float
    stream_seconds: float
    product_seconds: float
    exchange_seconds: float

    @property
    def zero_sent(self) -> float:
        """Bytes per rank that ZeRO itself sends."""
        return self.zero_gradients + self.zero_parameters

    @property
    def step_seconds(self) -> float:
        """Of the optimizer's step."""
        return self.stream_seconds + self.product_seconds + self.exchange_seconds

    @property
    def share(self) -> float:
        """Of the optimizer's step in the whole training step."""
        return self.step_seconds / (self.step_seconds + self.model_seconds + self.zero_seconds)


@dataclass(frozen=True, slots=True)
class _Step:
    """An optimizer's part; arrays have one entry per rank that was looked at."""

    state: Floats
    sent: Floats
    streamed: float
    exchange_seconds: float
    products_most: float = 0.0
    flops_most: float = 0.0
    flops_mean: float = 0.0
    product_seconds: float = 0.0
    matrices: int = 0
    idle: int = 0


def plan_scaling(
    model: Mapping[str, Any],
    optimizer: str,
    stage: int,
    ranks: int,
    assumptions: Assumptions | None = None,
    options: Mapping[str, Any] | None = None,
    *,
    on_cpu: bool = False,
) -> Planned:
    """What a step costs, from the layout alone.

    Args:
        model: a transformers ``config.json``.
        optimizer: a name of ours.
        stage: of ZeRO, 1 to 3.
        ranks: data-parallel ranks.
        assumptions: of the machine; `Assumptions` has the defaults.
        options: of the optimizer.
        on_cpu: statistics are multiplied by halves, as on a CPU.

    Raises:
        ds_optim.blueprint.BlueprintError: no such model or optimizer.
        ValueError: options that the optimizer refuses, or another stage or number of ranks.
    """
    if stage not in (1, 2, 3) or ranks < 1:
        raise ValueError(f"ZeRO stage 1, 2 or 3 over at least 1 rank, not stage {stage} over {ranks}")
    about = assumptions or Assumptions()
    made = blueprint(_meta_model(json.dumps(dict(model))), {}, optimizer, dict(options or {}))
    layouts = predicted_layouts(made.groups, stage, ranks)
    stepper = made.optimizer.predicted(layouts, 0)
    if isinstance(stepper, OwnedBlocks):
        step = _whole_matrix(stepper, layouts, ranks, about, _spared(stepper) if on_cpu else {})
    else:
        step = _elementwise(stepper, layouts, ranks, about)
    gradients, parameters = zero_bytes(made.specs, layouts, stage, ranks)
    layers = int(model.get("num_hidden_layers") or model.get("n_layer") or 1)
    model_seconds = 6.0 * made.numel * about.tokens / (about.peak_tflops * 1e12 * about.mfu)
    return Planned(
        optimizer=type(made.optimizer).__name__,
        stage=stage,
        ranks=ranks,
        matrices=step.matrices,
        idle=step.idle,
        state_most=float(step.state.max()),
        state_mean=float(step.state.mean()),
        sent_mean=float(step.sent.mean()),
        sent_most=float(step.sent.max()),
        zero_gradients=gradients,
        zero_parameters=parameters,
        products_most=step.products_most,
        flops_most=step.flops_most,
        flops_mean=step.flops_mean,
        model_seconds=model_seconds,
        zero_seconds=_exposed(gradients, parameters, stage, ranks, layers, model_seconds, about),
        stream_seconds=step.streamed / (about.memory_gb_s * 1e9 * about.memory_share),
        product_seconds=step.product_seconds,
        exchange_seconds=step.exchange_seconds,
    )


@cache
def _meta_model(config: str) -> nn.Module:
    return meta_model(json.loads(config))


# ------------------------------------------------------------------------------------------------------ ZeRO's own part


def zero_bytes(
    specs: Sequence[ParameterSpec], layouts: Sequence[Layout], stage: int, ranks: int
) -> tuple[float, float]:
    """Bytes per rank and step that ZeRO itself sends in bf16, one pass per step: gradients, parameters.

    stage       gradients                                        parameters
    1 and 2     all-reduced in buckets (DeepSpeed's default):    gathered once, after the step: w P (N-1)/N
                2 w P (N-1)/N; a reduction to owners would halve it
    3           reduce-scattered: w P (N-1)/N                    gathered before forward and before backward pass:
                                                                 2 w P (N-1)/N; tensors below
                                                                 ``stage3_param_persistence_threshold`` once

    w is 2 bytes. P includes padding where that travels.
    """
    others = (ranks - 1) / ranks
    padded = float(sum(layout.local_numel(0) for layout in layouts) * ranks)
    if stage < 3:
        return 2 * _WIDTH * others * sum(spec.numel for spec in specs), _WIDTH * others * padded
    threshold = zero_settings({"stage": 3}).param_persistence_threshold
    persistent = sum(-(-spec.numel // ranks) * ranks for spec in specs if spec.numel <= threshold)
    return _WIDTH * others * padded, _WIDTH * others * (2 * padded - persistent)


def _exposed(
    gradients: float, parameters: float, stage: int, ranks: int, layers: int, model_seconds: float, about: Assumptions
) -> float:
    """Seconds of ZeRO's traffic that do not hide: gradients behind the backward pass (two thirds), ZeRO-3's parameters
    behind both passes, ZeRO-1/2's behind nothing."""
    if stage < 3:
        reducing = about.collective(gradients, ranks, layers) - about.overlap * model_seconds * 2 / 3
        return max(0.0, reducing) + about.collective(parameters, ranks, 1)
    return max(0.0, about.collective(gradients + parameters, ranks, 3 * layers) - about.overlap * model_seconds)


# ----------------------------------------------------------------------------------------------------- the optimizer's


def _elementwise(stepper: InPlace, layouts: Sequence[Layout], ranks: int, about: Assumptions) -> _Step:
    """Elementwise and blockwise rules: nothing travels but the sums of blocks that a boundary cuts."""
    cuts = 0
    looked_at = [0]  # padding included, all ranks have tensors of the same size
    if stepper.rule.block_state:
        looked_at = sorted({round(part * (ranks - 1) / (LOOKED_AT - 1)) for part in range(LOOKED_AT)})
        for layout in layouts:
            cuts += block_runs(layout, 0, stepper.grids_of(layout)).num_cuts
    steppers = [stepper.at_rank(rank) for rank in looked_at]
    state = [sum(bytes_of(one.spec(tensor)) for tensor in one.shards.tensors) for one in steppers]
    sent = 2 * _SUM * cuts * (ranks - 1) / ranks
    elements = sum(layout.local_numel(0) for layout in layouts)
    return _Step(
        state=np.array(state, dtype=np.float64) + _COUNT * len(layouts),
        sent=np.array([sent]),
        streamed=4.0 * elements * stepper.rule.streams,
        exchange_seconds=about.collective(sent, ranks, 1) if cuts else 0.0,
    )


def _spared(stepper: OwnedBlocks) -> dict[tuple[int, ...], float]:
    """Flops of a step that blocks of a shape are spared on a CPU, which computes half of a large symmetric product."""
    found = {}
    for plan in stepper.plans.listed:
        for shape in {block.tile.shape for block in plan.blocks}:
            kept, numel = stepper.plans.state_of_block(shape), math.prod(shape)
            orders = [size for axis, size in enumerate(shape) if f"factor_{axis}" in kept]
            found[shape] = sum(2.0 * numel * size - own_product_flops(size, numel // size) for size in orders)
    return found


def _whole_matrix(
    stepper: OwnedBlocks,
    layouts: Sequence[Layout],
    ranks: int,
    about: Assumptions,
    spared: Mapping[tuple[int, ...], float],
) -> _Step:
    """Shampoo and SWAN: blocks travel to their owners and back; the rest is Adam's where it lies."""
    (plan,) = stepper.plans.listed
    costs, owners = plan.costs, np.array(plan.owners)
    numel = np.array([block.tile.box.numel for block in plan.blocks], dtype=np.float64)
    owned = np.bincount(owners, weights=numel, minlength=ranks)
    held, adams = np.zeros(ranks), _adams(plan, ranks)
    for holding in plan.held:
        np.add.at(held, holding.ranks, holding.counts)
    # Sent is what leaves as gradients and what leaves as updates; their difference is what a rank holds and owns more.
    gradients_in = (costs.sent + owned - held) / 2
    gradients_out = (costs.sent - owned + held) / 2
    busiest = float(np.maximum(gradients_in, gradients_out).max())  # each way; then the same back
    width = stepper.options.exchange_dtype.itemsize
    exchanges = math.ceil(max(float(owned.max()), busiest) / message_size(stepper.options.exchange_bucket_size))
    verdict = 2 * 4 * (ranks - 1) / ranks if plan.blocks else 0.0
    steady = [one.work.step_flops - spared.get(one.tile.shape, 0.0) for one in plan.blocks]
    products = np.bincount(owners, weights=steady, minlength=ranks)
    arithmetic = products.mean() + about.root_factor * float((costs.flops - products).mean())
    waiting = plan.waiting(stepper.options.exchange_bucket_size)
    kept = 0 if plan.stateless else _IDENTITY
    fallback = 4 * (_ADAMS * adams + _HELD_STREAMS * held + _OWNED_STREAMS * owned)
    return _Step(
        state=costs.state_bytes + kept * costs.blocks + 2 * 4 * adams + _COUNT * len(layouts),
        sent=costs.sent * width + verdict,
        streamed=float((fallback + 2 * costs.state_bytes).max()),
        exchange_seconds=about.all_to_all(2 * busiest * width, ranks, 2 * exchanges) if costs.sent.any() else 0.0,
        products_most=float(products.max()),
        flops_most=float(costs.flops.max()),
        flops_mean=float(costs.flops.mean()),
        product_seconds=float(waiting * arithmetic) / (about.matrix_tflops * 1e12),
        matrices=len(plan.blocks),
        idle=int((costs.blocks == 0).sum()),
    )


def _adams(plan: Plan, ranks: int) -> Floats:
    """Elements per rank that are in no block."""
    found = np.zeros(ranks)
    for tensor, layout in enumerate(plan.layouts):
        matrices = {plan.blocks[block].parameter for block in plan.of_tensor(tensor)}
        for parameter, spec in enumerate(layout.parameters):
            if parameter not in matrices:
                whole = Box((0,) * len(spec.shape), spec.shape)
                for holding in holdings(layout, parameter, [whole]):
                    np.add.at(found, holding.ranks, holding.counts)
    return found
