"""State in eight bits, in the kernels: the code against what is published of it, and every backend against the oracle.

New state is the same on all backends to the last bit, and so are codes and scales; parameters to what roots are rounded
to (`test_kernels`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ds_optim import kernels
from ds_optim.kernels import Formula, Operands, Place, Places, Rounding, Tables, codes, eager
from ds_optim.kernels.tables import table_of
from ds_optim.optimizers.registry import optimizers
from ds_optim.rule import WholeMatrix
from reference.eight_bits import dynamic_code, kept
from test_kernels import ADAM_MINI, FORMULAS, SCALARS, Blocks, same_bits

BACKENDS: list[kernels.Backend] = ["native", "eager", "triton"]
CODES: list[codes.Code] = ["signed", "unsigned"]
CODED = {
    "adamw": replace(FORMULAS["adamw"], codes=("signed", "unsigned")),
    "lion": replace(FORMULAS["lion"], codes=("signed",)),
    "adan": replace(FORMULAS["adan"], codes=("signed", "signed", "unsigned", "signed")),
}


def normal(numel: int, seed: int) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed))


# -- the code ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", CODES)
def test_the_256_numbers_are_the_published_ones(code: codes.Code) -> None:
    found = codes.values(code)
    torch.testing.assert_close(found.sort().values, torch.tensor(dynamic_code(code == "signed")), rtol=3e-7, atol=0)
    assert found.numel() == found.unique().numel() == 256
    assert found[0] == 0, "a byte of zero is zero"
    assert found.max() == 1
    assert found.min() == (-found[found < 1].max() if code == "signed" else 0)
    positive = found[(found > 0) & (found < 1)]
    per_decade = [int(((positive >= 10**-e) & (positive < 10 ** (1 - e))).sum()) for e in range(1, 8)]
    most = 64 if code == "signed" else 128
    assert per_decade == [most // 2**e for e in range(7)], "each decade down has half the numbers"


@pytest.mark.parametrize("code", CODES)
def test_a_lookup_of_boundaries_counts_those_below(code: codes.Code) -> None:
    edges = codes.boundaries(code)
    around = torch.cat([edges, torch.nextafter(edges, torch.tensor(0.0)), torch.nextafter(edges, torch.tensor(1.0))])
    drawn = 10 ** (normal(4000, 1) * 2 - 3)
    for magnitude in [0.0, 1e-45, 1.0, *around.tolist(), *drawn.clamp(max=1).tolist()]:
        bits = int(torch.tensor(magnitude).view(torch.int32))
        word = int(codes.places(code)[max(bits >> 16, codes.first_place(code)) - codes.first_place(code)])
        assert (word >> 16) + ((bits & 0xFFFF) > (word & 0xFFFF)) == int((edges < magnitude).sum())


@pytest.mark.parametrize("code", CODES)
def test_beside_a_boundary_a_magnitude_becomes_the_nearest_number_too(code: codes.Code) -> None:
    """The middle of two numbers is seldom one of fp32: the last that is no nearer the larger, and the next."""
    edges, numbers = codes.boundaries(code), codes.magnitudes(code)
    for at, edge in enumerate(edges):
        below, above = (float(one) for one in numbers[at : at + 2])  # differences of fp32 numbers are exact in fp64
        assert float(edge) - below <= above - float(edge)
        assert (following := float(torch.nextafter(edge, torch.tensor(1.0)))) - below > above - following


@pytest.mark.parametrize("code", CODES)
def test_a_value_becomes_the_nearest_number(code: codes.Code) -> None:
    block_BE = normal(8 * 256, 2).view(8, 256) * torch.logspace(-18, 18, 8)[:, None]
    block_BE = block_BE if code == "signed" else block_BE.square()
    scales = codes.scales_of(codes.maxima(block_BE))
    assert torch.equal(scales, block_BE.abs().amax(1))
    found = codes.decode(codes.encode(block_BE, scales, code), scales[:, None], code)
    assert same_bits([found + 0.0], [kept(block_BE, is_signed=code == "signed") + 0.0])


ADAMS: dict[str, codes.Code] = {"exp_avg": "signed", "exp_avg_sq": "unsigned"}
KEPT: dict[str, dict[str, codes.Code]] = {
    "AdamW": ADAMS,
    "Lion": {"exp_avg": "signed"},
    "Adan": {"exp_avg": "signed", "exp_avg_diff": "signed", "exp_avg_sq": "unsigned", "previous_grad": "signed"},
    "AdamMini": {"exp_avg": "signed"},
    "Shampoo": {"momentum": "signed", "graft": "unsigned"},
    "SWAN": {},
    "Muon": {"momentum": "signed"},
    "NorMuon": {"momentum": "signed"},
    "SOAP": {"momentum": "signed", "second_moment": "unsigned"},
}


@pytest.mark.parametrize("name", list(optimizers()))
def test_every_rule_states_which_of_its_state_is_never_negative(name: str) -> None:
    rule = optimizers()[name].rule
    assert dict(zip(rule.element_state, rule.codes, strict=True)) == KEPT[name]
    fused = rule.others if isinstance(rule, WholeMatrix) else rule
    wanted = ADAMS if isinstance(rule, WholeMatrix) else KEPT[name]
    assert dict(zip(fused.element_state, fused.coded_formula.codes, strict=True)) == wanted


# -- updates ----------------------------------------------------------------------------------------------------------


@dataclass
class Coded:
    """What a call over tensors works on; tensors are parameters of their own, cut nowhere."""

    params: list[Tensor]
    grads: list[Tensor | None]
    states: list[list[Tensor]]
    scales: list[list[Tensor]]

    @classmethod
    def zero(cls, formula: Formula, numels: list[int], seed: int, dtype: torch.dtype = torch.float32) -> Coded:
        params = [normal(numel, seed + index).to(dtype) for index, numel in enumerate(numels)]
        states = [[torch.zeros(numel, dtype=torch.uint8) for numel in numels] for _ in formula.codes]
        scales = [[torch.zeros(codes.blocks_of(numel)) for numel in numels] for _ in formula.codes]
        return cls(params, [], states, scales)

    def step(
        self,
        backend: kernels.Backend,
        formula: Formula,
        grads: list[Tensor | None],
        table: Callable[[list[Tensor]], Tensor] | None = None,
    ) -> None:
        runs = table(self.params) if table is not None else whole_runs(self.params)
        kernels.coded(backend, formula, self.operands(formula, grads, runs))

    def operands(self, formula: Formula, grads: list[Tensor | None], runs: Tensor) -> Operands:
        return Operands(
            self.params, grads, self.states, [], Tables(code_runs=runs), SCALARS[formula.name], None,
            torch.zeros(0, dtype=torch.float64), self.scales, torch.zeros(0, len(formula.codes), dtype=torch.int32),
        )  # fmt: skip

    def kept(self) -> list[Tensor]:
        return [one for of_state in (*self.states, *self.scales) for one in of_state]


def whole_runs(params: list[Tensor]) -> Tensor:
    rows = []
    for index, param in enumerate(params):
        whole, rest = divmod(param.numel(), 256)
        if whole:
            rows.append((index, 0, whole * 256, 0, 256, 0, -1, -1))
        if rest:
            rows.append((index, whole * 256, rest, 0, rest, whole, -1, -1))
    return table_of(rows, 8)


def code_rows(start: int, stop: int, numel: int, cut_blocks: list[int]) -> list[tuple[int, ...]]:
    """The table of elements [start, stop) of a parameter, as `ds_optim.kernels.tables` describes it."""
    rows, tail, first = [], numel // 256 * 256, start // 256
    for low, high, begin, width in ((start, min(stop, tail), 0, 256), (max(start, tail), stop, tail, numel - tail)):
        if low < high:
            known = [
                cut_blocks.index(block) if block in cut_blocks else -1 for block in (low // 256, (high - 1) // 256)
            ]
            rows.append((0, low - start, high - low, (low - begin) % width, width, low // 256 - first, *known))
    return rows


def assert_kept_alike(left: list[Tensor], right: list[Tensor]) -> None:
    for a, b in zip(left, right, strict=True):
        same = a == b if a.dtype == torch.uint8 else (a.view(torch.int32) == b.view(torch.int32))
        assert bool(same.all())


@pytest.mark.parametrize("rule", CODED)
def test_state_in_eight_bits_is_the_formulas_kept_in_eight_bits(rule: str) -> None:
    """Step by step: the textbook's formula in fp32, then `kept`, from zero on."""
    formula, numels = CODED[rule], [4096, 1000, 256, 7]
    for backend in BACKENDS:
        mine = Coded.zero(formula, numels, 3)
        params = [one.clone() for one in mine.params]
        states = [[torch.zeros(numel) for numel in numels] for _ in formula.codes]
        for step in range(4):
            grads = [normal(numel, 50 + 10 * step + index) for index, numel in enumerate(numels)]
            mine.step(backend, formula, list(grads))
            for index, grad in enumerate(grads):
                scalars = {key: torch.tensor(value).float() for key, value in SCALARS[rule].items()}
                old = [of_state[index] for of_state in states]
                params[index], *new = formula.update(params[index], grad, *old, **scalars)
                for of_state, values, code in zip(states, new, formula.codes, strict=True):
                    of_state[index] = kept(values, is_signed=code == "signed")
        for index in range(len(numels)):
            torch.testing.assert_close(mine.params[index], params[index], rtol=1e-6, atol=1e-7)
            for state, code in enumerate(formula.codes):
                spread = mine.scales[state][index].repeat_interleave(256)[: numels[index]]
                assert torch.equal(codes.decode(mine.states[state][index], spread, code), states[state][index])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", CODED)
def test_backends_keep_the_same_bits(rule: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(eager.CHUNK, "cpu", 2048)
    formula, numels = CODED[rule], [7_000, 2048 + 13, 300]
    kept_by = {}
    for backend in BACKENDS:
        mine = Coded.zero(formula, numels, 4, dtype)
        for step in range(3):
            grads: list[Tensor | None] = [normal(n, 100 * step + i).to(dtype) for i, n in enumerate(numels)]
            grads[2] = None if step == 1 else grads[2]
            mine.step(backend, formula, grads)
        kept_by[backend] = mine
    for backend in BACKENDS[1:]:
        assert_kept_alike(kept_by[BACKENDS[0]].kept(), kept_by[backend].kept())
        for a, b in zip(kept_by[BACKENDS[0]].params, kept_by[backend].params, strict=True):
            torch.testing.assert_close(a.float(), b.float(), rtol=1e-6 if dtype == torch.float32 else 1e-2, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_finite_reaches_its_block_and_no_other(backend: kernels.Backend) -> None:
    for bad in (math.nan, math.inf, -math.inf):
        formula = CODED["adamw"]
        mine = Coded.zero(formula, [1024], 5)
        grad = normal(1024, 6)
        grad[300] = bad
        mine.step(backend, formula, [grad])
        assert [bool(scale.isnan()) for scale in mine.scales[0][0]] == [False, True, False, False]
        assert not mine.states[0][0][256:512].any()
        assert not mine.states[1][0][256:512].any()
        mine.step(backend, formula, [normal(1024, 7)])
        assert mine.params[0].isnan().view(4, 256).all(1).tolist() == [False, True, False, False]
        assert mine.params[0].isnan().view(4, 256).any(1).tolist() == [False, True, False, False]


@pytest.mark.parametrize("backend", BACKENDS)
def test_tiny_state_becomes_zero_and_huge_state_is_kept(backend: kernels.Backend) -> None:
    for size, wanted in ((1e-20, 0.0), (1e18, 1.0)):
        formula = CODED["adamw"]
        mine = Coded.zero(formula, [512], 8)
        mine.step(backend, formula, [torch.full((512,), size)])
        square = codes.decode(mine.states[1][0], mine.scales[1][0].repeat_interleave(256), "unsigned")
        assert torch.allclose(square / (0.05 * size * size if wanted else 1.0), torch.full((512,), wanted), rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_square_that_is_positive_stays_so_beside_any_other(backend: kernels.Backend) -> None:
    """Its quotient may underflow; where nothing was, there is still nothing; a NaN is not counted, nor tiny blocks."""
    formula, grad = CODED["adamw"], torch.zeros(1024)
    grad[:4] = torch.tensor([1e19, 3e-22, -1e-20, 1e15])
    grad[256:258] = torch.tensor([math.nan, 1.0])
    grad[512:514] = torch.tensor([1e-20, -1e-22])
    grad[768:771] = torch.tensor([1.0, 1e-4, -1e-4])
    mine = Coded.zero(formula, [1024], 8)
    mine.step(backend, formula, [grad])
    found = mine.states[1][0].view(4, 256)
    assert found[:, :4].tolist() == [[255, 1, 1, 1], [0] * 4, [0] * 4, [255, 1, 1, 0]]
    assert not found[:, 4:].any()


@pytest.mark.parametrize("backend", ["native", "eager"])
@pytest.mark.parametrize("rule", ["AdamW", "Adan", "Shampoo"])
def test_rows_with_small_gradients_take_no_larger_steps_than_others(
    rule: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neighbours in a block of codes whose squares are 1e-6 of the others', and now and then far less."""
    monkeypatch.setenv("DS_OPTIM_KERNELS", backend)
    lr, generator = 1e-3, torch.Generator().manual_seed(1)
    weight = torch.nn.Parameter(torch.zeros(512, 16))
    settings: dict[str, Any] = {
        "AdamW": {"betas": (0.9, 0.95)},
        "Adan": {"betas": (0.98, 0.92, 0.95)},
        "Shampoo": {"start_preconditioning_step": 100},  # until then its steps are the graft's
    }
    optimizer: Any = optimizers()[rule](
        [("weight", weight)], lr=lr, weight_decay=0.0, state_dtype="int8", roles={"weight": "mlp"}, **settings[rule]
    )
    largest = 0.0
    for _ in range(40):
        grad = torch.randn(512, 16, generator=generator) * 1e-2
        grad[1::2] *= 1e-3
        before, weight.grad = weight.detach().clone(), grad
        optimizer.step()
        largest = max(largest, float((weight.detach() - before).abs().max()) / lr)
    assert any(key.endswith("_codes") for key in optimizer.state[weight])
    assert largest < 4


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(sorted(CODED)),
    st.integers(1, 1500),
    st.lists(st.integers(1, 1499), max_size=3),
    st.sampled_from(BACKENDS),
    st.integers(0, 999),
)
def test_a_parameter_that_is_cut_anywhere_keeps_the_same_bits(
    rule: str, numel: int, cuts: list[int], backend: kernels.Backend, seed: int
) -> None:
    """As over ranks: each piece finds its part of the maxima, the largest are exchanged, each piece is updated."""
    formula = CODED[rule]
    whole = Coded.zero(formula, [numel], seed)
    edges = [0, *sorted({cut for cut in cuts if cut < numel}), numel]
    grads = [normal(numel, seed + step + 1) for step in range(3)]
    pieces = []
    for start, stop in itertools.pairwise(edges):
        piece = Coded.zero(formula, [stop - start], 0)
        piece.params[0].copy_(whole.params[0][start:stop])
        first, last = start // 256, -(-stop // 256)
        for of_state in piece.scales:
            of_state[0] = torch.zeros(last - first)
        pieces.append((piece, start, stop, first))
    cut_blocks = sorted({edge // 256 for edge in edges[1:-1] if edge % 256})
    for grad in grads:
        whole.step(backend, formula, [grad])
        calls = []
        for piece, start, stop, _ in pieces:
            rows = code_rows(start, stop, numel, cut_blocks)
            maxima = torch.zeros(len(cut_blocks), len(formula.codes), dtype=torch.int32)
            tables = Tables(code_runs=table_of(rows, 8), num_code_cuts=len(cut_blocks))
            operands = Operands(
                piece.params, [grad[start:stop].clone()], piece.states, [], tables, SCALARS[rule], None,
                torch.zeros(0, dtype=torch.float64), piece.scales, maxima,
            )  # fmt: skip
            kernels.partial_maxima(backend, formula, operands)
            calls.append(operands)
        if cut_blocks:
            everyones = torch.stack([call.cut_maxima for call in calls]).amax(0)
        for call in calls:
            kernels.coded(backend, formula, call, "uncut")
            if cut_blocks:
                call.cut_maxima = everyones
                kernels.coded(backend, formula, call, "cut")
    assert same_bits([torch.cat([piece.params[0] for piece, *_ in pieces])], whole.params)
    for state in range(len(formula.codes)):
        assert torch.equal(torch.cat([piece.states[state][0] for piece, *_ in pieces]), whole.states[state][0])
        for piece, _, _, first in pieces:
            its = piece.scales[state][0]
            assert torch.equal(its, whole.scales[state][0][first : first + len(its)])


def test_bf16_weights_are_rounded_by_the_same_noise_as_without_codes() -> None:
    """That is: by what element of the parameter they are, on every backend."""
    formula, numel = CODED["lion"], 3000
    whole = Coded.zero(formula, [numel], 20, torch.bfloat16)
    places, ends = Places([Place(0, 0, numel, 77, (1 << 32) - 700)]), []
    for backend in ("native", "eager"):
        mine = Coded.zero(formula, [numel], 20, torch.bfloat16)
        for key in (1, 2):
            operands = mine.operands(formula, [normal(numel, key).bfloat16()], whole_runs(mine.params))
            operands.rounding = Rounding(key, places)
            kernels.coded(backend, formula, operands)  # type: ignore[arg-type]
        ends.append(mine)
    assert torch.equal(ends[0].params[0].view(torch.int16), ends[1].params[0].view(torch.int16))
    assert_kept_alike(ends[0].kept(), ends[1].kept())
    for key in (1, 2):
        whole.step("native", formula, [normal(numel, key).bfloat16()])
    assert not torch.equal(whole.params[0], ends[0].params[0])


PARTS: list[tuple[list[tuple[int, int]], int | None, int]] = [
    ([(40, 1), (3, 12), (2, 2500), (5, 700)], None, 1),
    ([(7, 300)], None, 1),
    ([(3, 64), (700, 3)], 3 * 64 + 2100, 5),
    ([(2, 40), (10, 1)], 90, 33),
]


@pytest.mark.parametrize("share", [0, 1, 2])
@pytest.mark.parametrize("backend", ["native", "eager"])
@pytest.mark.parametrize(("parts", "row_length", "rows"), PARTS)
def test_adam_minis_blocks_and_blocks_of_codes_need_not_agree(
    parts: list[tuple[int, int]], row_length: int | None, rows: int, backend: kernels.Backend, share: int
) -> None:
    """Over one, two and three ranks; cuts fall into blocks of both kinds."""
    blocks, formula = Blocks(parts, row_length, rows, 3), replace(ADAM_MINI, codes=("signed",))
    numel = blocks.labels.numel()
    cuts = [[], [numel // 2 + 3], [numel // 3 + 1, numel // 2 + 3]][share]
    edges = [0, *cuts, numel]
    cut_blocks = sorted({cut // 256 for cut in cuts})
    known, scales = codes.encode_rows(blocks.average[None], "signed")
    blocks.average = codes.decode_rows(known, scales, "signed")[0]
    made = blocks.shards(cuts, 0)
    sums = torch.zeros(made.num_cuts, dtype=torch.float64)
    calls = []
    for rank, (start, stop) in enumerate(itertools.pairwise(edges)):
        its = scales[0, start // 256 : -(-stop // 256)].clone()
        operands = made._operands(rank, sums)
        operands.states, operands.scales = [[known[0, start:stop].clone()]], [[its]]
        operands.tables.code_runs = table_of(code_rows(start, stop, numel, cut_blocks), 8)
        operands.tables.num_code_cuts = len(cut_blocks)
        operands.cut_maxima = torch.zeros(len(cut_blocks), 1, dtype=torch.int32)
        kernels.partial_sums(backend, operands)
        kernels.partial_maxima(backend, formula, operands)
        calls.append(operands)
    everyones = torch.stack([call.cut_maxima for call in calls]).amax(0)
    for call in calls:
        call.cut_maxima = everyones
        kernels.coded(backend, formula, call)
    param, _, square = blocks.expected()
    new = blocks.average + (blocks.grad - blocks.average) * torch.tensor(SCALARS["adamw"]["one_minus_beta1"])
    wanted, its_scales = codes.encode_rows(new[None], "signed")
    torch.testing.assert_close(torch.cat([call.params[0] for call in calls]).double(), param, rtol=1e-6, atol=1e-6)
    assert torch.equal(torch.cat([call.states[0][0] for call in calls]), wanted[0])
    for call, (start, stop), squares in zip(calls, itertools.pairwise(edges), made.squares, strict=True):
        assert torch.equal(call.scales[0][0], its_scales[0, start // 256 : -(-stop // 256)])
        held = blocks.labels[start:stop].unique() if row_length is None else slice(None)
        torch.testing.assert_close(squares.double(), square[held], rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_kept_by_block_has_no_choice_of_dtype(backend: kernels.Backend) -> None:
    """Kernels would write four bytes where there are two."""
    formula, row = CODED["adamw"], table_of([(0, 0, 200, 0, 256, 0, 0, -1)], 8)
    mine, grad = Coded.zero(formula, [200], 12), normal(200, 13)
    for maxima in (
        torch.zeros(1, 2, dtype=torch.int64),
        torch.zeros(1, 2, dtype=torch.bfloat16),
        torch.zeros(2, 1, dtype=torch.int32),
        torch.zeros(2, dtype=torch.int32),
        torch.zeros(2, 2, dtype=torch.int32).t(),
        torch.zeros(1, 2, dtype=torch.int32, device="meta"),
    ):
        operands = mine.operands(formula, [grad], row)
        operands.cut_maxima = maxima
        for call in (kernels.partial_maxima, kernels.coded):
            with pytest.raises(ValueError, match="cut_maxima must be a contiguous"):
                call(backend, formula, operands)
    for state in (0, 1):
        mine = Coded.zero(formula, [512], 12)
        mine.scales[state][0] = mine.scales[state][0].bfloat16()
        with pytest.raises(ValueError, match=r"scales must be torch\.float32"):
            mine.step(backend, formula, [normal(512, 13)])
    mine.scales.pop()
    with pytest.raises(ValueError, match="scales must be 2 lists of 1 tensors"):
        mine.step(backend, formula, [normal(512, 13)])
    blocks, coded = Blocks([(4, 80)], None, 1, 3), replace(ADAM_MINI, codes=("signed",))
    operands = blocks.shards([], 0)._operands(0, torch.zeros(0, dtype=torch.float64))
    operands.block_states = [[one.bfloat16() for one in operands.block_states[0]]]
    with pytest.raises(ValueError, match=r"block states must be torch\.float32"):
        kernels.blockwise(backend, ADAM_MINI, operands)
    with pytest.raises(ValueError, match=r"block states must be torch\.float32.*; scales must be 1 lists"):
        kernels.coded(backend, coded, operands)


@pytest.mark.parametrize("name", ["AdamW", "AdamMini"])
def test_a_state_dict_whose_floats_were_cast_is_refused_before_anything_is_written(name: str) -> None:
    weight = torch.nn.Parameter(normal(5000, 30).view(50, 100))
    optimizer: Any = optimizers()[name]([("weight", weight)], state_dtype="int8", roles={"weight": "mlp"})
    weight.grad = normal(5000, 31).view(50, 100)
    optimizer.step()
    saved = optimizer.state_dict()
    state = saved["state"][0]
    saved["state"][0] = {key: one.bfloat16() if one.is_floating_point() else one for key, one in state.items()}
    optimizer.load_state_dict(saved)
    before = weight.detach().clone()
    with pytest.raises(ValueError, match=r"scales must be torch\.float32"):
        optimizer.step()
    assert torch.equal(weight, before)


def test_threads_do_not_matter() -> None:
    formula, found = CODED["adan"], []
    before = torch.get_num_threads()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        mine = Coded.zero(formula, [200_000, 999], 9)
        mine.step("native", formula, [normal(200_000, 10), normal(999, 11)])
        found.append([*mine.kept(), *(one.view(torch.int32) for one in mine.params)])
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_a_table_that_does_not_fit_is_refused() -> None:
    formula = CODED["lion"]
    for row in ((0, 0, 512, 0, 512, 0, -1, -1), (0, 0, 768, 0, 256, 0, -1, -1), (0, 0, 512, 0, 256, 1, -1, -1)):
        mine = Coded.zero(formula, [512], 12)
        with pytest.raises(ValueError, match="does not fit"):
            mine.step("native", formula, [normal(512, 13)], lambda _, row=row: table_of([row], 8))
