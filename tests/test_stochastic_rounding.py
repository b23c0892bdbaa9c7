"""Stochastic rounding of bf16 parameters: what is random in it is a hash that every backend, cut and rank agrees on.

The oracle rounds one number at a time in plain integers, by the words of `ds_optim.kernels.rounding`.
"""

from __future__ import annotations

import copy
import hashlib
import io
import itertools
import pickle
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import ds_optim
from ds_optim import kernels
from ds_optim.deepspeed.configuration import option_problems
from ds_optim.kernels import Formula, Operands, Tables
from ds_optim.kernels.rounding import identity_of, key_of, noise
from ds_optim.optimizers.adam_mini import adam_mini_update
from ds_optim.optimizers.lion import lion_update
from ds_optim.optimizers.registry import optimizers
from ds_optim.sharding.binding import Binding, BoundTensor
from ds_optim.sharding.exchange import Ranks
from ds_optim.sharding.layout import FlatPartition, Layout, ParameterSpec, Replicated, SlicedParameters
from pool import Pools

CLASSES = list(optimizers().values())
BACKENDS: list[kernels.Backend] = ["native", "triton", "eager"]
LION = Formula("lion", lion_update, 1, 0)
SCALARS = {"decay": 0.999, "beta1": 0.9, "one_minus_beta1": 0.1, "beta2": 0.99, "one_minus_beta2": 0.01, "lr": 1e-3}
ADAM_MINI = Formula("adam_mini", adam_mini_update, 1, 1)


@pytest.fixture(autouse=True)
def _threads() -> object:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def normal(shape: int | tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_bits(name: str, index: int, seed: int, step: int) -> int:
    """The oracle's 16 random bits."""

    def hashed(text: str) -> int:
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")

    def prospector(x: int, middle: int = 0) -> int:
        x ^= x >> 15
        x = x * 0x2C1B3C6D % 2**32 ^ middle
        x ^= x >> 12
        x = x * 0x297A2D39 % 2**32
        return x ^ x >> 15

    key = hashed(name) ^ hashed(f"{seed} {step}")
    low, high = prospector(key % 2**32), prospector(key >> 32 ^ index >> 32)
    return prospector(index % 2**32 ^ low, high) >> 16


def rounded(value: float, bits: int) -> float:
    """The oracle's choice between an fp32 number's neighbours in bf16."""
    (pattern,) = struct.unpack("<I", struct.pack("<f", value))
    if value != value or pattern & 0x7FFFFFFF >= 0x7F7F0000:
        return float(value if value != value else struct.unpack("<f", struct.pack("<I", pattern >> 16 << 16))[0])
    return float(struct.unpack("<f", struct.pack("<I", (pattern + bits) >> 16 << 16))[0])


def by_oracle(values: Tensor, name: str, first: int, seed: int, step: int) -> Tensor:
    """fp32 values of consecutive elements as bf16."""
    numbers = [
        rounded(value, random_bits(name, first + offset, seed, step)) for offset, value in enumerate(values.tolist())
    ]
    return torch.tensor(numbers, dtype=torch.float32).bfloat16()


def rounding(*places: tuple[int, int, int, str, int], seed: int = 0, step: int = 1) -> kernels.Rounding:
    """Of (tensor, start, length, name, first) places."""
    rows = [
        kernels.Place(tensor, start, length, identity_of(name), first) for tensor, start, length, name, first in places
    ]
    return kernels.Rounding(key_of(seed, step), kernels.Places(rows))


def lion(
    backend: kernels.Backend, param: Tensor, grad: Tensor, how: kernels.Rounding | None, spans: list[list[int]]
) -> Tensor:
    """The parameter after a step; Lion has no roots, so that backends agree on fp32 results."""
    param = param.clone()
    kernels.elementwise(backend, LION, operands_of_lion(param, grad, torch.zeros(param.numel()), how, spans))
    return param


def operands_of_lion(
    param: Tensor, grad: Tensor, average: Tensor, how: kernels.Rounding | None, spans: list[list[int]]
) -> Operands:
    tables, no_sums = Tables(spans=torch.tensor(spans)), torch.zeros(0, dtype=torch.float64)
    return Operands([param], [grad], [[average]], [], tables, SCALARS, how, no_sums)


def same_bits(one: Tensor, two: Tensor) -> bool:
    """Equal to the sign of a zero, NaN at the same places."""
    return bool(((one.view(torch.int16) == two.view(torch.int16)) | (one.isnan() & two.isnan())).all())


# -- the hash ----------------------------------------------------------------------------------------------------------


def test_the_random_bits_are_the_hash_that_is_written_down() -> None:
    indices = [0, 1, 2, 1000, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 3 * 2**40]
    for name, seed, step in itertools.product(("a", "model.layers.0.weight"), (0, 7), (1, 100_000)):
        found = noise(torch.tensor(indices), identity_of(name), key_of(seed, step))
        assert found.tolist() == [random_bits(name, index, seed, step) for index in indices]


def test_the_random_bits_are_uniform_and_unrelated() -> None:
    """Over a million elements: every bit, the distribution, and correlations with neighbours, steps and parameters."""
    count = 1 << 20
    limit = 5 / count**0.5

    def draw(name: str = "a", seed: int = 0, step: int = 1, first: int = 0) -> Tensor:
        return noise(torch.arange(first, first + count), identity_of(name), key_of(seed, step))

    def correlation(one: Tensor, two: Tensor) -> float:
        return float(((one.double() - 32767.5) * (two.double() - 32767.5)).mean() * 12 / 65536**2)

    bits = draw()
    for bit in range(16):
        assert abs(float((bits >> bit & 1).double().mean()) - 0.5) < limit / 2
    histogram = torch.bincount(bits >> 6, minlength=1024).double()
    chi_square = float(((histogram - count / 1024).square() / (count / 1024)).sum())
    assert 1023 - 5 * 2046**0.5 < chi_square < 1023 + 5 * 2046**0.5
    for lag in (1, 2, 3, 16, 128, 1024, 4096):
        assert abs(correlation(bits, draw(first=lag))) < limit
    others = [draw(step=2), draw(step=3), draw(seed=1), draw("b"), draw("aa"), draw(first=1 << 32)]
    for one, two in itertools.combinations([bits, *others], 2):
        assert abs(correlation(one, two)) < limit
        assert abs(float((one == two).double().mean()) - 2**-16) < 5 * 2**-8 / count**0.5


# -- rounding ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_number_goes_to_a_neighbour_and_infinity_stays_where_it_is(backend: kernels.Backend, seed: int) -> None:
    patterns = torch.randint(-(2**31), 2**31, (3000,), generator=torch.Generator().manual_seed(seed))
    special = [
        0x7F7F0000,
        0x7F7F0001,
        0x7F7FFFFF,
        0x7F800000,
        0x7F800001,
        0x7FFFFFFF,
        0,
        1,
        0xFFFF,
        0x3F800000,
        0x3F80FFFF,
    ]
    signed = [pattern + sign for pattern in special for sign in (0, -(2**31))]
    values = torch.cat([patterns, torch.tensor(signed)]).to(torch.int32).view(torch.float32)
    target = torch.zeros(values.numel(), dtype=torch.bfloat16)
    kernels.descend(backend, target, -values, 1.0, (identity_of("a"), 5, key_of(0, 1)))
    assert same_bits(target, by_oracle(values + 0.0, "a", 5, 0, 1))
    assert torch.equal(target.isinf(), values.isinf())
    assert torch.equal(target.isnan(), values.isnan())
    exact = values.bfloat16().float() == values
    assert torch.equal(target[exact].float(), values[exact])


def test_rounding_is_unbiased() -> None:
    values = 1 + torch.arange(1, 128) / 128 * 2**-7  # between 1 and the next number of bf16
    values = torch.cat([values, -values, values * 1e-30])
    steps = 4000
    total = torch.zeros(values.numel(), dtype=torch.float64)
    for step in range(steps):
        target = torch.zeros(values.numel(), dtype=torch.bfloat16)
        kernels.descend("native", target, -values, 1.0, (identity_of("a"), 0, key_of(0, step)))
        total += target.double()
    ulp = (
        values.abs().double() / (1 + 2**-8)
    ).log2().floor().exp2() * 2**-7  # of values between 2^k and 2^k (1 + 2^-7)
    z = (total / steps - values.double()) / ulp * steps**0.5 / 0.5  # at most so many standard deviations
    assert z.abs().max() < 5
    assert abs(float(z.sum())) < 5 * values.numel() ** 0.5


@pytest.mark.parametrize("backend", BACKENDS)
def test_elementwise_rules_round_parameters_by_their_place(backend: kernels.Backend, seed: int) -> None:
    """Two parameters in one span, one of them with indices around 2^32."""
    param, grad = normal(700, seed).bfloat16(), normal(700, seed + 1)
    parts = ((0, 400, "a", 2**32 - 150), (400, 300, "b", 0))
    how = rounding(*((0, *part) for part in parts), seed=3, step=9)
    found = lion(backend, param, grad, how, [[0, 0, 700]])
    exact = param.float() * torch.tensor(0.999) - torch.tensor(1e-3) * grad.sign()
    wanted = [by_oracle(exact[start : start + size], name, first, 3, 9) for start, size, name, first in parts]
    assert same_bits(found, torch.cat(wanted))
    assert not same_bits(found, exact.bfloat16())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["rows", "columns"])
def test_blockwise_rules_round_parameters_by_their_place(backend: kernels.Backend, kind: str, seed: int) -> None:
    """Blocks of all kernels' kinds: tiny, wide, cut; gradients of one absolute value, so that no root is inexact."""
    generator = torch.Generator().manual_seed(seed)
    numel, first = 60 * 47, 1000
    param, average = normal(numel, seed).bfloat16(), torch.zeros(numel)
    grad = (torch.randint(0, 2, (numel,), generator=generator) * 2.0 - 1).bfloat16() / 8
    cut_sums = torch.tensor([47 * 40 / 64], dtype=torch.float64)  # of the last run, which has a brother elsewhere
    if kind == "rows":
        runs = [(0, 940, 0, 1, 0, -1, -1), (940, 900, 0, 300, 940, -1, -1), (1840, 940, 0, 47, 943, -1, -1)]
        table = [(0, *run) for run in runs] + [(0, 2780, 40, 0, 47 * 40, 963, 0, 0)]
        tables, blocks = Tables(row_runs=torch.tensor(table), num_cuts=1), 964
    else:
        spread = [(0, 15, 3, 0), (15, 45, 30, 5), (45, 47, 1, 6)]
        table = [(0, 0, numel, 0, 47, start, stop, width, slot, -1, width * 60) for start, stop, width, slot in spread]
        tables, blocks = Tables(column_runs=torch.tensor(table)), 8
    scalars = {"decay": 0.999, "beta1": 0.9, "one_minus_beta1": 0.1, "beta2": 0.0, "one_minus_beta2": 1.0}
    scalars |= {"step_size": 2**-10, "bias2_sqrt": 1.0, "eps": 0.0}
    found, squares = param.clone(), torch.zeros(blocks)
    how = rounding((0, 0, numel, "a", first))
    operands = Operands([found], [grad], [[average]], [[squares]], tables, scalars, how, cut_sums)
    kernels.blockwise(backend, ADAM_MINI, operands)
    assert torch.equal(squares, torch.full((blocks,), 1 / 64))
    one_minus = torch.tensor(0.1)
    exact = param.float() * torch.tensor(0.999) - grad.float() * one_minus * (2**-10 * 8)
    assert same_bits(found, by_oracle(exact, "a", first, 0, 1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_whole_matrix_rules_round_strided_parts_by_their_place(backend: kernels.Backend, seed: int) -> None:
    whole, inner = (slice(0, 4), slice(0, 6), slice(0, 9)), (slice(1, 3), slice(2, 6), slice(3, 8))
    column = (slice(0, 4), slice(2, 3), slice(4, 5))
    for box in (whole, inner, column):
        param = normal((4, 6, 9), seed).bfloat16()
        update = normal((4, 6, 9), seed + 1) * 1e-3
        first = 50 + int(torch.arange(216).view(4, 6, 9)[box].flatten()[0])
        exact = (param.float() * torch.tensor(0.999) - update).flatten()
        wanted = param.clone()
        wanted[box] = by_oracle(exact, "a", 50, 0, 1).view(4, 6, 9)[box]
        kernels.descend(backend, param[box], update[box].contiguous(), 0.999, (identity_of("a"), first, key_of(0, 1)))
        assert same_bits(param, wanted)


@given(cuts=st.lists(st.integers(1, 69_999), max_size=6), threads=st.sampled_from((1, 2, 5)), data=st.integers(0, 99))
@settings(max_examples=25)
@pytest.mark.parametrize("backend", ["native", "eager"])
def test_rounding_does_not_depend_on_how_a_parameter_is_cut_nor_on_threads(
    backend: kernels.Backend, cuts: list[int], threads: int, data: int
) -> None:
    param, grad = normal(70_000, data).bfloat16(), normal(70_000, data + 1)
    torch.set_num_threads(1)
    whole = lion("native", param, grad, rounding((0, 0, 70_000, "a", 0)), [[0, 0, 70_000]])
    torch.set_num_threads(threads)
    edges = sorted({0, *cuts, 70_000})
    parts = []
    for start, stop in itertools.pairwise(edges):
        how = rounding((0, 3, stop - start, "a", start))  # behind padding, in a tensor of its own
        padded = torch.cat([torch.zeros(3, dtype=torch.bfloat16), param[start:stop]])
        span = [[0, 3, stop - start]]
        parts.append(lion(backend, padded, torch.cat([torch.zeros(3), grad[start:stop]]), how, span)[3:])
    assert same_bits(torch.cat(parts), whole)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_element_without_a_place_is_an_error(backend: kernels.Backend) -> None:
    param = torch.ones(10, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"does not fit|no place"):
        lion(backend, param, torch.ones(10), rounding((0, 0, 9, "a", 0)), [[0, 0, 10]])


def test_rounding_needs_no_memory_of_the_tensors_size() -> None:
    """Peak resident memory during a step, as Linux counts it, against the tensors' 64 MiB."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("Linux only")

    def resident(key: str) -> int:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith(key)))

    numel = 1 << 23
    param, grad, state = torch.ones(numel).bfloat16(), torch.ones(numel).bfloat16(), torch.ones(numel)
    how = rounding((0, 0, numel, "a", 0))
    for _ in range(2):
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
        kernels.elementwise("native", LION, operands_of_lion(param, grad, state, how, [[0, 0, numel]]))
    assert resident("VmHWM") - before < 0.01 * 8 * numel


# -- the optimizers ----------------------------------------------------------------------------------------------------

SHAPES = {
    "layers.0.q_proj.weight": (18, 20),
    "layers.0.mlp.up_proj.weight": (31, 20),
    "layers.0.norm.weight": (20,),
    "embed_tokens.weight": (37, 20),
    "layers.1.mlp.down_proj.weight": (20, 31),
    "layers.1.bias": (7,),
}
ROLES = {
    "*q_proj*": {"kind": "query", "head_dim": 6},
    "*mlp*": "mlp",
    "*norm*": "norm",
    "*embed*": "embedding",
    "*bias": "bias",
}
SETTINGS: dict[str, dict[str, Any]] = {"Shampoo": {"max_preconditioner_dim": 16, "precondition_frequency": 2}}


def first_values(seed: int) -> dict[str, Tensor]:
    return {name: normal(shape, seed + index).bfloat16() for index, (name, shape) in enumerate(SHAPES.items())}


def gradients(seed: int, step: int) -> dict[str, Tensor]:
    """Whole multiples of 3/1024 that bf16 holds: the squares of a block add up exactly in any order."""
    generator = torch.Generator().manual_seed(100 * seed + step)
    return {
        name: torch.randint(-28, 29, shape, generator=generator).bfloat16() * 3 / 1024 for name, shape in SHAPES.items()
    }


def make(cls: Any, params: Any, **options: Any) -> Any:
    return cls(params, lr=1e-3, weight_decay=0.1, roles=ROLES, **{**SETTINGS.get(cls.__name__, {}), **options})


def plain_run(cls: Any, data: int, steps: int, **options: Any) -> dict[str, Tensor]:
    params = {name: nn.Parameter(values) for name, values in first_values(data).items()}
    take_steps(make(cls, params.items(), **options), params, data, range(steps))
    return {name: parameter.detach() for name, parameter in params.items()}


def take_steps(optimizer: Any, params: dict[str, nn.Parameter], seed: int, steps: range) -> None:
    for step in steps:
        for name, grad in gradients(seed, step).items():
            params[name].grad = grad.to(params[name].dtype)
        optimizer.step()


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], two[name]) for name in one)


def layouts_of(kind: str, world_size: int) -> list[Layout]:
    specs = tuple(ParameterSpec(name, shape) for name, shape in SHAPES.items())
    if kind == "replicated":
        return [Replicated(spec, world_size) for spec in specs]
    found: list[Layout] = []
    for part in (specs[:4], specs[4:]):
        offsets = [0, *itertools.accumulate(-(-spec.numel // 4) * 4 for spec in part)]
        flat = FlatPartition(part, tuple(offsets[:-1]), -(-offsets[-1] // world_size), world_size)
        found.append(flat if kind == "flat" else SlicedParameters(part, world_size))
    return found


def bound_runs(kind: str, world_size: int, seed: int, steps: int) -> dict[str, list[Tensor]]:
    """Local tensors of one rank after the steps, by optimizer."""
    rank, found = dist.get_rank(), {}
    layouts = layouts_of(kind, world_size)

    def local(values: dict[str, Tensor]) -> list[Tensor]:
        tensors = []
        for layout in layouts:
            flat = torch.zeros(layout.local_numel(rank), dtype=torch.bfloat16)
            for one in layout.fragments(rank):
                whole = values[layout.parameters[one.parameter].name].flatten()
                flat[one.offset : one.offset + one.numel] = whole[one.start : one.stop]
            tensors.append(flat)
        return tensors

    for cls in CLASSES:
        roles = make(cls, first_values(seed).items()).shards.roles
        tensors = [nn.Parameter(flat) for flat in local(first_values(seed))]
        optimizer = make(cls, tensors, bf16_stochastic_round=True, seed=5)
        group = dist.group.WORLD
        bounds = [BoundTensor(layout, 0 if kind == "replicated" else rank, group) for layout in layouts]
        optimizer.bind(Binding(dict(zip(tensors, bounds, strict=True)), Ranks.of_job()), roles)
        for step in range(steps):
            for tensor, grad in zip(tensors, local(gradients(seed, step)), strict=True):
                tensor.grad = grad
            optimizer.step()
        found[cls.__name__] = [tensor.detach() for tensor in tensors]
    return found


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["flat", "sliced", "replicated"])
def test_all_optimizers_round_alike_on_any_number_of_ranks(pool: Pools, kind: str, world_size: int, seed: int) -> None:
    steps = 4
    ranks = pool(world_size).run(bound_runs, kind, world_size, seed, steps)
    for cls in CLASSES:
        wanted = plain_run(cls, seed, steps, bf16_stochastic_round=True, seed=5)
        for rank, of_rank in enumerate(ranks):
            for layout, flat in zip(layouts_of(kind, world_size), of_rank[cls.__name__], strict=True):
                for one in layout.fragments(rank):
                    whole = wanted[layout.parameters[one.parameter].name].flatten()
                    assert torch.equal(flat[one.offset : one.offset + one.numel], whole[one.start : one.stop]), cls


@pytest.mark.parametrize("cls", CLASSES)
def test_a_seed_gives_the_same_weights_again_and_another_seed_others(cls: Any, seed: int) -> None:
    once, again, other = (plain_run(cls, seed, 3, bf16_stochastic_round=True, seed=number) for number in (5, 5, 6))
    assert same(once, again)
    differ = torch.cat([(once[name] != other[name]).flatten() for name in SHAPES])
    assert 0.1 < differ.double().mean() < 0.9


# Updates of a root mean square of one with these, or of learning rates that make up for it. A constant gradient is
# diagonal in SOAP's basis: all else there is rounding, which a larger eps keeps small.
OF_LENGTH_ONE: dict[Any, dict[str, float]] = {
    ds_optim.Muon: {"lr": 2.5e-3},
    ds_optim.NorMuon: {"lr": 2.5e-3},
    ds_optim.SOAP: {"lr": 5e-3, "eps": 1e-3},
}


@pytest.mark.parametrize("cls", CLASSES)
def test_small_updates_are_lost_to_nearest_rounding_alone(cls: Any, seed: int) -> None:
    """Weights of one and updates of about 5e-4 in one direction, 30 times; nearest needs 2e-3 at once."""
    steps, grad = 30, normal((64, 96), seed)

    def displacement(dtype: torch.dtype, **options: Any) -> Tensor:
        weight = nn.Parameter(torch.ones(64, 96, dtype=dtype))
        settings = {"lr": 5e-4, "weight_decay": 0.0, **OF_LENGTH_ONE.get(cls, {}), **options}
        optimizer = cls([("w", weight)], roles={"w": "mlp"}, **settings)
        for _ in range(steps):
            weight.grad = grad.to(dtype)
            optimizer.step()
        return weight.detach().double() - 1

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        nearest = displacement(torch.bfloat16)
    wanted, found = displacement(torch.float32), displacement(torch.bfloat16, bf16_stochastic_round=True)

    def along(moved: Tensor) -> float:
        return float((moved * wanted).sum() / wanted.square().sum())

    assert along(nearest) < 0.2
    standard_error = float((found - wanted).std()) / found.numel() ** 0.5
    assert found.mean() == pytest.approx(float(wanted.mean()), abs=5 * standard_error)
    assert along(found) == pytest.approx(1, abs=0.03)


def test_adamw_moves_as_in_fp32_on_average_and_nearest_rounding_stands_still(seed: int) -> None:
    """Every update is 1e-3 of a weight."""

    def run(dtype: torch.dtype, **options: Any) -> Tensor:
        weight = nn.Parameter(torch.ones(4096, dtype=dtype))
        optimizer = ds_optim.AdamW([("w", weight)], lr=1e-3, weight_decay=0.0, **options)
        for _ in range(100):
            weight.grad = torch.ones(4096, dtype=dtype)
            optimizer.step()
        return weight.detach().double()

    assert float(run(torch.float32).mean()) == pytest.approx(0.9, abs=1e-4)
    with pytest.warns(UserWarning, match="bf16_stochastic_round=True"):
        assert bool((run(torch.bfloat16) == 1).all())
    found = run(torch.bfloat16, bf16_stochastic_round=True, seed=seed)
    deviation = (100 * 0.256 * 0.744) ** 0.5 * 2**-8  # a step of a quarter of a unit in the last place, 100 times
    assert float(found.std()) == pytest.approx(deviation, rel=0.1)
    assert float(found.mean()) == pytest.approx(0.9, abs=5 * deviation / 64)


@pytest.mark.parametrize("cls", CLASSES)
def test_a_resumed_run_rounds_as_the_whole_one_did(cls: Any, seed: int) -> None:
    options = {"bf16_stochastic_round": True, "seed": 3}
    wanted = plain_run(cls, seed, 5, **options)
    params = {name: nn.Parameter(values) for name, values in first_values(seed).items()}
    optimizer = make(cls, params.items(), **options)
    take_steps(optimizer, params, seed, range(2))
    saved = io.BytesIO()
    torch.save(optimizer.state_dict(), saved)
    saved.seek(0)
    resumed = {name: nn.Parameter(parameter.detach().clone()) for name, parameter in params.items()}
    other = make(cls, resumed.items(), **options)
    other.load_state_dict(torch.load(saved, weights_only=True))
    take_steps(other, resumed, seed, range(2, 5))
    assert same(wanted, {name: parameter.detach() for name, parameter in resumed.items()})


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
@pytest.mark.parametrize("cls", CLASSES)
def test_a_copy_rounds_alike(cls: Any, copied: Callable[[Any], Any], seed: int) -> None:
    params = {name: nn.Parameter(values) for name, values in first_values(seed).items()}
    optimizer, twins = copied((make(cls, params.items(), bf16_stochastic_round=True, seed=4), params))
    take_steps(optimizer, twins, seed, range(3))
    wanted = plain_run(cls, seed, 3, bf16_stochastic_round=True, seed=4)
    assert same(wanted, {name: parameter.detach() for name, parameter in twins.items()})


@pytest.mark.parametrize("cls", CLASSES)
def test_other_dtypes_are_rounded_to_nearest_with_and_without_the_setting(cls: Any, seed: int) -> None:
    results = []
    for options in ({}, {"bf16_stochastic_round": True, "seed": 1}):
        params = {
            name: nn.Parameter(values.to(torch.float16 if "mlp" in name else torch.float32))
            for name, values in first_values(seed).items()
        }
        take_steps(make(cls, params.items(), **options), params, seed, range(3))
        results.append({name: parameter.detach() for name, parameter in params.items()})
    assert same(*results)


@pytest.mark.parametrize("cls", CLASSES)
def test_bf16_parameters_rounded_to_nearest_are_worth_one_warning(cls: Any, seed: int) -> None:
    params = {name: nn.Parameter(values) for name, values in first_values(seed).items()}
    optimizer = make(cls, params.items())
    with pytest.warns(UserWarning, match="bf16_stochastic_round=True") as caught:
        take_steps(optimizer, params, seed, range(3))
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain_run(cls, seed, 2, bf16_stochastic_round=True)


@pytest.mark.parametrize("cls", CLASSES)
def test_the_settings_are_judged_and_belong_to_the_whole_optimizer(cls: Any) -> None:
    weight = nn.Parameter(torch.ones(4, 4))
    with pytest.raises(ValueError, match="bf16_stochastic_round must be true or false") as problem:
        cls([weight], bf16_stochastic_round="yes", seed=-1)
    assert "seed must be a whole number >= 0" in str(problem.value)
    for seed in (1.5, True, "0"):
        with pytest.raises(ValueError, match="seed must be"):
            cls([weight], seed=seed)
    for key, value in {"bf16_stochastic_round": True, "seed": 1}.items():
        with pytest.raises(ValueError, match=f"{key} is a setting of the whole optimizer"):
            cls([{"params": [weight], key: value}])
    params = {"bf16_stochastic_round": True, "seed": 7}
    assert not option_problems(cls, {"optimizer": {"type": cls.__name__, "params": params}})
    bad = option_problems(cls, {"optimizer": {"type": cls.__name__, "params": {"seed": "x"}}})
    assert len(bad) == 1
    assert "seed must be" in bad[0]
