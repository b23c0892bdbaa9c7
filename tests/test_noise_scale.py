"""The gradient noise scale: the estimator, exact norms under every strategy, known noise found again, and refusals."""

from __future__ import annotations

import contextlib
import csv
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_optim import known_torch
from ds_optim.batch_size import NoiseScale, NoiseScaleError, NothingToCompareError, UnequalBatchesError
from ds_optim.batch_size.estimator import Estimator, Reading, student_t
from ds_optim.batch_size.noise_scale import family
from ds_optim.deepspeed.wrappers import ENGINE_ATTRIBUTES
from ds_optim.roles import canonical_name, infer_roles
from engines import VOCABULARY, Case, able_to_gather, build_engine, build_model
from meshes import average
from pool import Pools

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "launcher"))

# -- the estimator --------------------------------------------------------------------------------------------------

TRUE = 372.7  # noise scale of the Gaussian test vector, in 200 dimensions


def gaussian(small: int, parts: int, updates: int, seed: int, *, runs: int = 1, beta: float = 0.99) -> list[Reading]:
    """Readings of several runs, whose gradients have a known mean of norm 1 and a known covariance."""
    generator = torch.Generator().manual_seed(seed)
    mean = torch.full((200,), 200**-0.5, dtype=torch.float64)
    estimator, good = Estimator(runs, beta), torch.tensor(True)
    sizes = torch.tensor([small, small * parts], dtype=torch.float64)
    for _ in range(updates):
        noise = torch.randn(runs, parts, 200, generator=generator, dtype=torch.float64)
        gradients = mean + noise * math.sqrt(TRUE / 200 / small)
        estimator.update(gradients.square().sum(2).mean(1), gradients.mean(1).square().sum(1), *sizes, good)
    return [estimator.read(run, updates, batch=small * parts, seq_length=128) for run in range(runs)]


@pytest.mark.parametrize(("small", "parts"), [(2, 16), (8, 4)])
def test_the_gaussian_vector_is_found(small: int, parts: int, seed: int) -> None:
    [reading] = gaussian(small, parts, 12_000, seed, beta=0.9999)  # a standard error of 1.5 %
    assert reading.ready
    assert reading.sequences == pytest.approx(TRUE, rel=0.05)
    assert reading.tokens == pytest.approx(128 * reading.sequences)
    assert reading.gradient_sq == pytest.approx(1.0, rel=0.05)
    assert reading.noise == pytest.approx(TRUE, rel=0.05)


def test_single_updates_say_nothing_and_ratios_are_not_averaged(seed: int) -> None:
    alone = gaussian(8, 4, 1, seed, runs=3000)
    negative = sum(one.gradient_sq < 0 for one in alone if one.gradient_sq is not None) / 3000
    assert abs(negative - 0.2436) < 0.04  # of 120,000 runs, with a standard error of 0.0012; of 3,000 it is 0.0078
    ratios = [one.noise / one.gradient_sq for one in alone if one.noise is not None and one.gradient_sq is not None]
    assert abs(sum(ratios) / 3000 - TRUE) > 0.05 * TRUE
    assert not any(one.ready for one in alone)


def test_the_interval_holds_the_truth_as_often_as_it_says(seed: int) -> None:
    intervals = [reading.interval for reading in gaussian(8, 8, 300, seed, runs=400) if reading.interval is not None]
    assert len(intervals) == 400
    assert 0.91 < sum(low <= TRUE <= high for low, high in intervals) / 400 < 0.99  # 0.95, 0.011 of scatter
    assert 1.1 < sum(high / low for low, high in intervals) / 400 < 1.6


def test_a_reading_is_not_ready_until_it_says_something(seed: int) -> None:
    [few] = gaussian(8, 8, 30, seed)
    assert (few.ready, few.sequences, few.interval, few.why) == (False, None, None, "30 of 50 updates")
    noisy = gaussian(2, 2, 60, seed, runs=50)
    assert sum(reading.ready for reading in noisy) <= 5  # lucky draws of |G|² = 1 with a deviation of 1.7: 1 or 2 in 50
    whys = {reading.why for reading in noisy if not reading.ready and "still wide" not in reading.why}
    assert whys == {"the average of |G|² is not positive yet", "|G|² cannot be told from zero yet"}
    assert all("not positive" in reading.why for reading in noisy if (reading.gradient_sq or 0) <= 0)
    assert json.loads(json.dumps(noisy[0].as_dict()))["sequences"] is None
    assert Estimator(1).read(0, 0, batch=0, seq_length=None).why == "no update yet"


def test_students_quantile() -> None:
    assert student_t(10) == pytest.approx(2.228139, abs=1e-3)
    assert student_t(30) == pytest.approx(2.042272, abs=1e-4)


# -- exact norms ----------------------------------------------------------------------------------------------------


SIZE = 2  # sequences in a micro-batch


@dataclass(frozen=True)
class Run:
    """A few steps of the odd model at a learning rate of zero, so that all gradients are of the first weights."""

    strategy: str = "deepspeed"  # or plain, ddp, fsdp, hsdp
    stage: int = 2
    precision: str = "fp32"
    accumulation: int = 2
    clip: float = 1e-3
    zero: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    tied: bool = False
    frozen: tuple[str, ...] = ()
    foreign: bool = False
    zero_init: bool = False
    checkpointing: str = ""  # reentrant or not
    by_role: bool = False
    unused_from: int | None = None
    overflow: int | None = None  # a step whose gradients are infinite
    growing: bool = False  # the loss scale doubles in the second and every later step
    steps: int = 3

    @property
    def case(self) -> Case:
        return Case(
            "AdamW" if self.foreign else "AdamMini",
            {"lr": 0.0, "weight_decay": 0.0},
            stage=self.stage,
            precision=self.precision,
            zero=self.zero,
            extra={
                "train_micro_batch_size_per_gpu": SIZE,
                "gradient_clipping": self.clip,
                "zero_allow_untested_optimizer": True,
                **self.extra,
            },
            tied=self.tied,
            zero_init=self.zero_init,
            frozen=self.frozen,
            accumulation=self.accumulation,
        )


def tokens_of(step: int, micro: int, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(1 + 1000 * step + 10 * micro + rank)
    return torch.randint(VOCABULARY, (SIZE, 12), generator=generator)


def uses_all(run: Run, step: int) -> bool:
    return run.unused_from is None or step < run.unused_from


def expected(run: Run, ranks: int) -> dict[str, list[float]]:
    """{role: squared norms of small and big}: means over the steps, from gradients that are computed one by one."""
    model = build_model(run.case)
    roles = infer_roles(model)
    named = {canonical_name(name): p for name, p in model.named_parameters() if p.requires_grad}
    weight, sums = 0.0, dict[str, list[float]]()
    for step in range(run.steps):
        if step == run.overflow:
            continue
        scale = 1 / run.accumulation
        if run.precision == "fp16" and run.stage:
            scale *= 8 if run.overflow is not None and run.overflow < step else 16
            scale *= 2 ** max(0, step - 1) if run.growing else 1
        parts: list[dict[str, Tensor]] = []
        for micro in range(run.accumulation):
            for rank in range(ranks):
                model.zero_grad()
                (scale * model(tokens_of(step, micro, rank), uses_all(run, step))).backward()
                parts.append(
                    {n: torch.zeros_like(p) if p.grad is None else p.grad.double() / scale for n, p in named.items()}
                )
        weight = 0.99 * weight + 1
        sums = {role: [0.99 * value for value in entry] for role, entry in sums.items()}
        for name in named:
            stacked = torch.stack([part[name].double().flatten() for part in parts])
            for role in ("all", family(roles[name])):
                entry = sums.setdefault(role, [0.0, 0.0])
                entry[0] += stacked.square().sum(1).mean().item()
                entry[1] += stacked.mean(0).square().sum().item()
    return {role: [value / weight for value in entry] for role, entry in sums.items()}


@contextlib.contextmanager
def training(run: Run) -> Iterator[tuple[Any, Any, nn.Module, Any]]:
    """What is called, what `NoiseScale` is given, the model, and the optimizer."""
    if run.strategy == "deepspeed":
        if run.foreign:
            import deepspeed

            model = build_model(run.case)
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0, weight_decay=0.0)
            config = replace(run.case, client=True).config()
            if run.precision == "fp16":  # see `build_engine`
                deepspeed.get_accelerator().is_fp16_supported = lambda: True
            engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
            able_to_gather(engine)
        else:
            engine, model = build_engine(run.case)
        try:
            yield engine, engine, model, None
        finally:
            engine.destroy()
        return
    model = build_model(run.case)
    wrapped: nn.Module = model
    if run.strategy == "ddp":
        wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=run.unused_from is not None)
    elif run.strategy in ("fsdp", "hsdp"):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        world = dist.get_world_size()
        shape = (2, world // 2) if run.strategy == "hsdp" else (world,)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
        for layer in model.llama.model.layers:
            fully_shard(layer, mesh=mesh, mp_policy=MixedPrecisionPolicy())
        fully_shard(model, mesh=mesh)
        average(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0, weight_decay=0.0)
    yield wrapped, wrapped, model, optimizer


def one_step(run: Run, called: Any, model: nn.Module, optimizer: Any, step: int) -> None:
    rank = dist.get_rank()
    for micro in range(run.accumulation):
        tokens, use_all = tokens_of(step, micro, rank), uses_all(run, step)
        if run.strategy == "deepspeed":
            called.backward(called(tokens, use_all))
            called.step()
            continue
        is_last = micro == run.accumulation - 1
        waits = called.no_sync() if run.strategy == "ddp" and not is_last else contextlib.nullcontext()
        if run.strategy == "fsdp":
            called.set_requires_gradient_sync(is_last)
        with waits:
            (called(tokens, use_all) / run.accumulation).backward()
    if optimizer is not None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), run.clip)
        optimizer.step()
        optimizer.zero_grad()


def measured(run: Run) -> dict[str, list[float]]:
    """A job: the same norms as `NoiseScale` finds them."""
    with training(run) as (called, target, model, optimizer):
        if run.checkpointing:
            model.llama.gradient_checkpointing_enable({"use_reentrant": run.checkpointing == "reentrant"})
        if run.growing:
            target.optimizer.loss_scaler.scale_window = 1
        now = {"step": -1}
        model.gain.register_hook(lambda gradient: gradient * math.inf if now["step"] == run.overflow else None)
        noise = NoiseScale(target, optimizer=optimizer, micro_batch_size=SIZE, by_role=run.by_role)
        for step in range(run.steps):
            now["step"] = step
            one_step(run, called, model, optimizer, step)
            with torch.no_grad():  # an evaluation changes nothing
                called(tokens_of(99, 0, 0))
        reading = noise.read()
        assert reading.updates == run.steps - (run.overflow is not None), reading.why
        assert reading.batch == SIZE * run.accumulation * dist.get_world_size()
        noise.detach()
        one_step(run, called, model, optimizer, 0)
        assert noise.read() == reading
    return {role: norms_of(one) for role, one in {"all": reading, **reading.roles}.items()}


def two_at_once(first_leaves_first: bool) -> tuple[list[int], bool]:
    """A job: the steps that two of them saw when one left after the first step; whether the engine is as it was."""
    run = Run(stage=2, accumulation=2)
    with training(run) as (called, target, model, optimizer):
        pair = [NoiseScale(target, micro_batch_size=SIZE) for _ in range(2)]
        leaves, stays = pair if first_leaves_first else reversed(pair)
        one_step(run, called, model, optimizer, 0)
        leaves.detach()
        one_step(run, called, model, optimizer, 1)
        stays.detach()
        one_step(run, called, model, optimizer, 2)
        return [leaves.read().updates, stays.read().updates], "unscale_and_clip_grads" not in vars(target.optimizer)


@pytest.mark.parametrize("first_leaves_first", [True, False])
def test_two_on_one_engine_leave_in_any_order(pool: Pools, first_leaves_first: bool) -> None:
    [(updates, is_as_it_was)] = pool(1).run(two_at_once, first_leaves_first)
    assert updates == [1, 2]
    assert is_as_it_was != first_leaves_first, "what another one holds stays, and does nothing"


LINEAR = torch._C._nn.linear


def norms_of(reading: Reading) -> list[float]:
    """What the two unbiased numbers were made of: squared norms of a micro-batch's and of the batch's gradient."""
    assert reading.gradient_sq is not None
    assert reading.noise is not None
    return [reading.gradient_sq + reading.noise / SIZE, reading.gradient_sq + reading.noise / reading.batch]


def job(run: Run) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Both, in one process: DeepSpeed replaces `torch.nn.functional.linear` by another that rounds differently.

    And that does not go with FSDP2 and checkpointing: without DeepSpeed torch's own is put back.
    """
    own = contextlib.nullcontext() if run.strategy == "deepspeed" else patch.object(nn.functional, "linear", LINEAR)
    with own:
        return measured(run), expected(run, dist.get_world_size())


def check(pools: Pools, ranks: int, run: Run) -> None:
    results = pools(ranks).run(job, run)
    found, wanted = results[0]
    assert all(result == results[0] for result in results)
    assert set(found) == (set(wanted) if run.by_role else {"all"})
    # Averaging rounds to the precision of the gradients.
    averaging = {"fp32": 2e-6, "fp16": 2**-10, "bf16": 2**-8, "bf16_optimizer": 2**-8}[run.precision]
    for role, (small, big) in found.items():
        assert small == pytest.approx(wanted[role][0], rel=2e-6), role
        assert big == pytest.approx(wanted[role][1], rel=averaging), role


OFFLOAD = {"offload_optimizer": {"device": "cpu"}}

ONE_RANK = [
    Run(stage=0),
    Run(stage=3, accumulation=3),
    Run("plain"),
    Run("plain", checkpointing="reentrant", tied=True, accumulation=3, by_role=True),
]
TWO_RANKS = [
    Run(stage=0, accumulation=1, clip=0.0, tied=True, unused_from=1),
    Run(stage=0, precision="bf16"),
    Run(stage=0, precision="fp16", foreign=True),
    Run(stage=1, foreign=True, by_role=True, accumulation=1),
    Run(stage=1, precision="fp16", overflow=1),
    Run(stage=1, precision="bf16_optimizer", unused_from=1),
    Run(stage=2, precision="fp16", growing=True),
    Run(stage=2, accumulation=3, frozen=("embed",), checkpointing="not"),
    Run(stage=2, precision="bf16", by_role=True),
    Run(stage=2, zero=OFFLOAD, unused_from=1),
    Run(stage=3, zero_init=True, unused_from=1, frozen=("embed",)),
    Run(stage=1, extra={"prescale_gradients": True}),
    Run(stage=3, foreign=True, clip=0.0),
    Run(stage=3, precision="fp16", overflow=0),
    Run(stage=3, precision="bf16", zero=OFFLOAD, by_role=True, checkpointing="reentrant"),
    Run("ddp"),
    Run("ddp", accumulation=1, unused_from=1, frozen=("embed",)),
    Run("fsdp", by_role=True),
    Run("fsdp", accumulation=1, tied=True, checkpointing="not"),
]


def name_of(run: Run) -> str:
    changed = [f"{name}={value}" for name, value in vars(run).items() if value != getattr(Run(), name)]
    return " ".join(changed) or "default"


@pytest.mark.parametrize("run", ONE_RANK, ids=name_of)
def test_norms_are_exact_on_one_rank(run: Run, pool: Pools) -> None:
    check(pool, 1, run)


@pytest.mark.parametrize("run", TWO_RANKS, ids=name_of)
def test_norms_are_exact_on_two_ranks(run: Run, pool: Pools) -> None:
    check(pool, 2, run)


def test_norms_are_exact_where_shards_are_replicated(pool: Pools) -> None:
    check(pool, 4, Run("hsdp", accumulation=1))


# -- known noise ----------------------------------------------------------------------------------------------------

DIMENSIONS, QUADRATIC = 64, 16.0  # the true noise scale


class Quadratic(nn.Module):
    """|w - x|²/2 but for a constant: gradients are w less noise, one number of which comes with each sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((DIMENSIONS,), DIMENSIONS**-0.5))

    def forward(self, noise: Tensor) -> Tensor:
        return (self.weight.square().sum() / 2 - noise @ self.weight).mean()


def quadratic(stage: int, accumulation: int, updates: int, seed: int) -> Reading:
    """A job: the noise scale of the quadratic under DeepSpeed, at a learning rate of zero."""
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.5,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "ds_optim.AdamW", "params": {"lr": 0.0}},
    }
    engine, *_ = deepspeed.initialize(model=Quadratic(), config=config)
    generator = torch.Generator().manual_seed(seed + dist.get_rank())
    with NoiseScale(engine, beta=0.999) as noise:
        for _ in range(updates * accumulation):
            sample = torch.randn(4, DIMENSIONS, generator=generator) * math.sqrt(QUADRATIC / DIMENSIONS)
            engine.backward(engine(sample))
            engine.step()
    engine.destroy()
    return noise.read()


@pytest.mark.parametrize(("ranks", "stage", "accumulation"), [(1, 2, 4), (2, 0, 1), (2, 1, 4), (2, 3, 1)])
def test_known_noise_is_found(ranks: int, stage: int, accumulation: int, pool: Pools, seed: int) -> None:
    readings = pool(ranks).run(quadratic, stage, accumulation, 500, seed)
    assert all(reading == readings[0] for reading in readings)
    assert readings[0].updates == 500
    assert readings[0].batch == 4 * ranks * accumulation
    assert readings[0].sequences == pytest.approx(QUADRATIC, rel=0.1)


# -- what cannot be measured ----------------------------------------------------------------------------------------


class Words(nn.Module):
    """A model with labels, and two layers that can be one and the same under checkpointing."""

    def __init__(self, *, shared: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = self.first if shared else nn.Linear(8, 8)
        self.shared = shared

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        if self.shared:
            from torch.utils.checkpoint import checkpoint

            hidden = inputs.requires_grad_()
            for layer in (self.first, self.second):
                hidden = checkpoint(layer, hidden, use_reentrant=True)
            return hidden.square().mean()
        output = self.second(self.first(inputs))
        if labels is None:
            return output.square().mean()
        return nn.functional.cross_entropy(output, labels)


def words(sizes: list[int], ignored: list[int], *, shared: bool = False, seed: int = 0) -> NoiseScale:
    """Steps of two micro-batches each, of which ``sizes`` and numbers of ``ignored`` labels are given."""
    torch.manual_seed(seed)
    model = Words(shared=shared)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    noise = NoiseScale(model, optimizer=optimizer, micro_batch_size=4)
    for index, (size, missing) in enumerate(zip(sizes, ignored, strict=True)):
        labels = torch.randint(8, (size,))
        labels[:missing] = -100
        (model(torch.randn(size, 8), labels=labels) / 2).backward()
        if index % 2:
            optimizer.step()
            optimizer.zero_grad()
    return noise


def test_steps_with_other_sizes_are_left_out_and_counted() -> None:
    reading = words([4, 4, 4, 3, 4, 4], [0, 0, 0, 0, 0, 0]).read()
    assert reading.updates == 2
    assert reading.why.startswith("1 of 3 steps left out: a micro-batch did not have 4 sequences")
    reading = words([4, 4, 4, 4], [1, 1, 0, 2]).read()
    assert reading.updates == 1
    assert "different numbers of tokens" in reading.why


def test_nothing_but_other_sizes_is_an_error() -> None:
    with pytest.raises(UnequalBatchesError, match=r"did not have 4 sequences.*drop_last=True"):
        words([3, 3], [0, 0]).read()
    with pytest.raises(UnequalBatchesError, match=r"different numbers of tokens.*pack them"):
        words([4, 4], [0, 1]).read()


def test_a_gradient_that_comes_in_parts_is_left_out() -> None:
    reading = words([4, 4], [0, 0], shared=True).read()
    assert reading.updates == 0
    assert "came in parts" in reading.why


def test_steps_that_were_dropped_do_not_count() -> None:
    """Gradients that are zeroed without a step belong to no batch."""
    torch.manual_seed(0)
    model = Words()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    inputs = [torch.randn(4, 8) for _ in range(3)]
    found = []
    for dropped in (0, 1):
        noise = NoiseScale(model, optimizer=optimizer, micro_batch_size=4)
        for index in range(dropped):
            model(inputs[index]).backward()
            optimizer.zero_grad()
        for batch in inputs[1:]:
            (model(batch) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(noise.read())
        noise.detach()
    assert found[0] == found[1]
    assert found[0].batch == 8


def test_one_micro_batch_on_one_rank_is_refused() -> None:
    model = Words()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    noise = NoiseScale(model, optimizer=optimizer, micro_batch_size=4)
    model(torch.randn(4, 8)).backward()
    with pytest.raises(NothingToCompareError, match="accumulate gradients over 2 micro-batches or more"):
        optimizer.step()
    noise.detach()


def test_the_same_sequences_everywhere_are_never_ready() -> None:
    torch.manual_seed(0)
    model = Words()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with NoiseScale(model, optimizer=optimizer, micro_batch_size=4) as noise:
        for _ in range(60):
            inputs = torch.randn(4, 8)
            for _ in range(2):
                model(inputs).backward()
            optimizer.step()
            optimizer.zero_grad()
    reading = noise.read()
    assert not reading.ready
    assert "read the same sequences" in reading.why


@pytest.mark.parametrize(
    ("options", "words"),
    [({}, "second.bias, second.weight: trained, but not the optimizer's"), ({"beta": 1.0}, "beta is 1.0")],
)
def test_training_goes_on_after_a_refusal(options: dict[str, Any], words: str) -> None:
    model = Words()
    optimizer = torch.optim.SGD(model.parameters() if options else model.first.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=words):
        NoiseScale(model, optimizer=optimizer, micro_batch_size=4, **options)
    before = model.first.weight.detach().clone()
    model(torch.randn(4, 8)).backward()
    optimizer.step()
    assert not torch.equal(model.first.weight, before)


def refusals() -> list[str]:
    """A job: what is said on this rank."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    said = []
    if dist.get_world_size() == 1:
        with training(Run(stage=2, accumulation=1)) as (_, engine, _, _):
            with pytest.raises(NothingToCompareError) as error:
                NoiseScale(engine)
            assert "unscale_and_clip_grads" not in vars(engine.optimizer)  # it is as it was
        said.append(str(error.value))
    else:
        model = Words()
        mesh = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("data", "tensor"))
        parallelize_module(model.first, mesh["tensor"], ColwiseParallel())
        with pytest.raises(NoiseScaleError) as refusal:
            NoiseScale(model, optimizer=torch.optim.SGD(model.parameters()), micro_batch_size=1)
        said.append(str(refusal.value))
        # One rank's last batch is shorter: all ranks learn of it.
        wrapped = nn.parallel.DistributedDataParallel(Words())
        optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.0)
        noise = NoiseScale(wrapped, optimizer=optimizer, micro_batch_size=4)
        wrapped(torch.randn(4 - dist.get_rank(), 8)).backward()
        optimizer.step()
        with pytest.raises(UnequalBatchesError) as unequal:
            noise.read()
        said.append(str(unequal.value))
    return said


def test_all_ranks_refuse_alike(pool: Pools) -> None:
    [[alone]] = pool(1).run(refusals)
    assert "one micro-batch on one rank" in alone
    one, two = pool(2).run(refusals)
    assert one == two
    assert "others are" in one[0] or "tensor parallelism" in one[0]
    assert "did not have 4 sequences" in one[1]


def test_an_engine_of_another_release_is_refused_by_name() -> None:
    engine = SimpleNamespace(train_micro_batch_size_per_gpu=lambda: 1)
    with pytest.raises(NoiseScaleError, match=r"has no seq_data_parallel_group, .*; deepspeed versions known to work"):
        NoiseScale(engine)
    for name in ENGINE_ATTRIBUTES["configuration"]:
        setattr(engine, name.partition(".")[0], None)
    engine._config = SimpleNamespace(_param_dict={}, optimizer_params={}, zero_force_ds_cpu_optimizer=True)
    with pytest.raises(NoiseScaleError, match=r"has no optimizer, .*, torch_autocast_z0_gradscaler, "):
        NoiseScale(engine)


def test_a_torch_that_does_not_say_when_a_backward_pass_ends_is_refused() -> None:
    model = nn.Linear(2, 1)
    with (
        patch.object(known_torch, "backward_problem", lambda: "torch 9 does not say"),
        pytest.raises(NoiseScaleError, match="torch 9 does not say"),
    ):
        NoiseScale(model, optimizer=torch.optim.SGD(model.parameters()), micro_batch_size=1)


def test_what_is_missing_is_said() -> None:
    model = Words()
    optimizer = torch.optim.SGD(model.parameters())
    with pytest.raises(NoiseScaleError, match="micro_batch_size is not given"):
        NoiseScale(model, optimizer=optimizer)
    with pytest.raises(NoiseScaleError, match="micro_batch_size is 0"):
        NoiseScale(model, optimizer=optimizer, micro_batch_size=0)
    with pytest.raises(NoiseScaleError, match="optimizer is not given"):
        NoiseScale(model, micro_batch_size=1)
    with pytest.raises(ValueError, match="beta is 1"):
        NoiseScale(model, optimizer=optimizer, micro_batch_size=1, beta=1)
    model.first.weight._is_flat_param = True  # type: ignore[assignment]
    with pytest.raises(NoiseScaleError, match="FSDP1"):
        NoiseScale(model, optimizer=optimizer, micro_batch_size=1)


# -- state, and other loops -----------------------------------------------------------------------------------------


def test_the_averages_survive_a_checkpoint() -> None:
    whole = words([4] * 12, [0] * 12).read()
    part = words([4] * 12, [0] * 12)
    model = Words()
    again = NoiseScale(model, optimizer=torch.optim.SGD(model.parameters()), micro_batch_size=4)
    again.load_state_dict(json.loads(json.dumps(part.state_dict())))
    assert again.read() == whole
    other = NoiseScale(model, optimizer=torch.optim.SGD(model.parameters()), micro_batch_size=4, beta=0.9)
    with pytest.raises(ValueError, match=r"saved noise scale has beta 0\.99"):
        other.load_state_dict(part.state_dict())


def trained_by_trainer(folder: str, deepspeed: dict[str, Any] | None) -> tuple[list[dict[str, float]], Reading | None]:
    """A job: what a real Trainer logged."""
    from transformers import Trainer, TrainingArguments

    from ds_optim.batch_size.callback import NoiseScaleCallback
    from test_memory import medium_model

    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(5, (192, 16), generator=generator)  # of few tokens, which all sequences ask for
    data = [{"input_ids": row, "labels": row} for row in rows]
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=12,
        logging_steps=6,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-5,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        deepspeed=deepspeed,
        optim="adamw_torch",
    )
    trainer = Trainer(model=medium_model(), args=arguments, train_dataset=data)
    callback = NoiseScaleCallback(trainer, seq_length=16, min_updates=2)
    trainer.add_callback(callback)
    trainer.train()
    return [entry for entry in trainer.state.log_history if "noise_scale" in entry], callback.reading


def trained_under_deepspeed(folder: str) -> tuple[list[dict[str, float]], Reading | None]:
    config = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "zero_optimization": {"stage": 2},
        "optimizer": {"type": "AdamMini", "params": {"lr": "auto"}},
    }
    return trained_by_trainer(folder, config)


@pytest.mark.parametrize(("ranks", "under"), [(1, "torch"), (2, "torch"), (2, "deepspeed")])
def test_a_trainer_logs_it(ranks: int, under: str, pool: Pools, tmp_path: Path) -> None:
    if under == "torch":
        results = pool(ranks).run(trained_by_trainer, str(tmp_path), None)
    else:
        results = pool(ranks).run(trained_under_deepspeed, str(tmp_path))
    assert results[0] == results[-1]
    logged, reading = results[0]
    assert reading is not None
    assert (reading.updates, reading.batch) == (12, 4 * ranks)
    assert reading.ready, reading.why
    assert reading.sequences is not None
    last = logged[-1]
    assert last["noise_scale"] == pytest.approx(reading.sequences, abs=0.06)
    assert last["noise_scale_tokens"] == pytest.approx(16 * reading.sequences, abs=0.06)
    assert last["noise_scale_low"] < last["noise_scale"] < last["noise_scale_high"]
    assert last["step"] == 12


def watched(folder: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A job: the launcher's watch over a few steps, with a csv monitor; its summary and its resumed state."""
    import settings
    from noise_watch import NoiseWatch
    from progress import Progress

    run = Run(stage=1, extra={"csv_monitor": {"enabled": True, "output_path": folder, "job_name": "run"}}, clip=0.0)
    chosen = settings.read(["--noise-scale-by-role", "--seq-length", "12"])
    with training(run) as (engine, _, model, _):
        watch = NoiseWatch(engine, chosen, None)
        with Progress(dist.get_rank() == 0, 0, 60, 30, Path(folder)) as progress:
            for step in range(60):
                one_step(run, engine, model, None, step)
                watch.step_done(progress, step + 1)
        resumed = NoiseWatch(engine, chosen, watch.state()["noise_scale"])
        assert NoiseWatch(engine, settings.read([]), None).summary() == {}
        return watch.summary()["noise_scale"], resumed.summary()["noise_scale"]


def test_the_launcher_and_the_monitors_show_it(pool: Pools, tmp_path: Path) -> None:
    (summary, resumed), other = pool(2).run(watched, str(tmp_path))
    assert summary == resumed == other[0] == other[1]
    assert summary["ready"], summary["why"]
    assert summary["tokens"] == pytest.approx(12 * summary["sequences"])
    assert {"attention", "embedding", "head", "mlp", "norm"} <= set(summary["roles"])
    for key in ("gradient_sq", "noise"):
        assert sum(role[key] for role in summary["roles"].values()) == pytest.approx(summary[key])
    logged = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in logged] == [1, 30, 60]
    assert logged[0]["noise_scale"]["ready"] is False
    assert logged[-1]["noise_scale"] == summary
    [path] = tmp_path.rglob("NoiseScale_sequences.csv")
    [_, *rows] = csv.reader(path.open())
    assert [(int(step), float(value)) for step, value in rows] == [(60 * 8, pytest.approx(summary["sequences"]))]
    assert len(list(tmp_path.rglob("NoiseScale_*csv"))) >= 6
