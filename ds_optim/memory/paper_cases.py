"""The papers' own cases, predicted and judged, and the verdicts that are expected: continuous integration holds them.

A FAIL that is expected is a finding: "about half" is not true of SWAN on small models, and the list says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from ds_optim.memory.claims import Outcome, Verdict, judge
from ds_optim.memory.paper_models import PAPER_MODELS
from ds_optim.memory.record import Record

if TYPE_CHECKING:
    from ds_optim.memory.training import Precision

_CLOSE = 0.001  # how far a share may be from the expected one, which is written down to a tenth of a per cent


class Expected(NamedTuple):
    """What is expected of a claim: the outcome, and the share of AdamW's bytes that is saved."""

    outcome: Outcome
    found: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A model, an optimizer and how it is run, with the verdict that is expected for each claim.

    Attributes:
        model: a name in `PAPER_MODELS`.
        optimizer: class name.
        precision: ``fp32``, ``bf16`` (with an fp32 master) or ``pure bf16``.
        stage: ZeRO stage; None for plain PyTorch.
        world_size: ranks.
        settings: of the optimizer.
        expected: by the claim's title.
    """

    model: str
    optimizer: str
    precision: Precision = "fp32"
    stage: int | None = None
    world_size: int = 1
    settings: Mapping[str, Any] = field(default_factory=dict)
    expected: Mapping[str, Expected]

    def __str__(self) -> str:
        options = "".join(f", {key} {value}" for key, value in self.settings.items())
        ranks = f", {self.world_size} ranks" if self.world_size > 1 else ""
        strategy = "" if self.stage is None else f", ZeRO-{self.stage}"
        return f"{self.model}, {self.optimizer}{options}, {self.precision}{strategy}{ranks}"


class JudgedCase(NamedTuple):
    """A case's verdict.

    Attributes:
        deviation: how it differs from what was expected, in words; empty if it does not.
    """

    case: Case
    verdict: Verdict
    deviation: str


_STATE = "Adam-mini saves 45 to 50 % of the optimizer state"
_QUARTER = "Adam-mini saves a quarter of all model states"
_HALF = "SWAN saves about half of weights, gradients and state"
_TABLE = "SWAN saves what its table implies for the model's size"
_FP32 = "SWAN with fp32 state saves less, and costs more at 60M"
_LION = "Lion keeps half of AdamW's state"
_ADAN = "Adan keeps twice AdamW's state"
_SHAMPOO = "Shampoo costs more state than AdamW"


_SOAP = "SOAP costs more state than AdamW"
_MUON = "Muon keeps half of AdamW's state"
_NORMUON = "NorMuon keeps half of AdamW's state"
_THREE_QUARTERS = "Eight bits save three quarters of AdamW's state"
_MINI_IN_CODES = "Adam-mini in eight bits saves seven eighths of AdamW's state"
_LION_IN_CODES = "Lion in eight bits saves seven eighths of AdamW's state"


def _swan(model: str, half: Outcome, saved: float) -> Case:
    """SWAN as published."""
    return Case(
        model=model,
        optimizer="SWAN",
        precision="pure bf16",
        expected={
            _HALF: Expected(half, saved),
            _TABLE: Expected("PASS", saved),
            _FP32: Expected("NOT APPLICABLE", saved),
        },
    )


def _swan_fp32(model: str, saved: float) -> Case:
    """SWAN with its state in fp32, beside AdamW in bf16 throughout."""
    return Case(
        model=model,
        optimizer="SWAN",
        precision="pure bf16",
        settings={"state_dtype": "fp32"},
        expected={
            _HALF: Expected("NOT APPLICABLE", saved),
            _TABLE: Expected("NOT APPLICABLE", saved),
            _FP32: Expected("PASS", saved),
        },
    )


def _shampoo(model: str, longest: int, saved: float) -> Case:
    return Case(
        model=model,
        optimizer="Shampoo",
        settings={"max_preconditioner_dim": longest},
        expected={_SHAMPOO: Expected("PASS", saved)},
    )


def _in_codes(model: str, optimizer: str, title: str, verdict: Expected, others: Mapping[str, float]) -> Case:
    """State in eight bits, of which claims about other precisions say nothing."""
    not_judged = {other: Expected("NOT APPLICABLE", saved) for other, saved in others.items()}
    settings = {"state_dtype": "int8"}
    return Case(model=model, optimizer=optimizer, settings=settings, expected={title: verdict, **not_judged})


CASES: tuple[Case, ...] = (
    Case(
        model="llama2_7b",
        optimizer="AdamMini",
        expected={_STATE: Expected("PASS", 0.500), _QUARTER: Expected("NOT APPLICABLE", 0.250)},
    ),
    Case(
        model="llama2_7b",
        optimizer="AdamMini",
        precision="bf16",
        stage=3,
        world_size=2,
        expected={_STATE: Expected("PASS", 0.500), _QUARTER: Expected("PASS", 0.250)},
    ),
    Case(
        model="llama2_7b",
        optimizer="AdamMini",
        precision="bf16",
        stage=2,
        world_size=2,
        expected={_STATE: Expected("PASS", 0.500), _QUARTER: Expected("NOT APPLICABLE", 0.222)},
    ),
    _swan("llama_60m", "FAIL", 0.218),
    _swan("llama_130m", "FAIL", 0.317),
    _swan("llama_350m", "FAIL", 0.411),
    _swan("llama_1.3b", "PASS", 0.451),
    _swan("llama2_7b", "PASS", 0.481),
    _swan_fp32("llama_60m", -0.064),
    _swan_fp32("llama_130m", 0.133),
    _swan_fp32("llama2_7b", 0.461),
    Case(model="llama2_7b", optimizer="Lion", expected={_LION: Expected("PASS", 0.5)}),
    Case(model="llama2_7b", optimizer="Adan", expected={_ADAN: Expected("PASS", -1.0)}),
    _shampoo("llama_60m", 1024, -0.496),
    _shampoo("llama2_7b", 1024, -0.964),
    _shampoo("llama2_7b", 512, -0.967),
    _shampoo("llama2_7b", 256, -0.965),
    Case(model="llama2_7b", optimizer="SOAP", expected={_SOAP: Expected("PASS", -1.445)}),
    Case(model="llama2_7b", optimizer="Muon", expected={_MUON: Expected("PASS", 0.48)}),
    Case(model="llama_350m", optimizer="Muon", expected={_MUON: Expected("FAIL", 0.41)}),
    Case(model="llama_60m", optimizer="Muon", expected={_MUON: Expected("FAIL", 0.218)}),
    Case(model="llama2_7b", optimizer="NorMuon", expected={_NORMUON: Expected("PASS", 0.48)}),
    _in_codes("llama2_7b", "AdamW", _THREE_QUARTERS, Expected("PASS", 0.731), {}),
    _in_codes("llama_60m", "AdamW", _THREE_QUARTERS, Expected("FAIL", 0.535), {}),
    _in_codes("llama2_7b", "AdamMini", _MINI_IN_CODES, Expected("PASS", 0.865), {_STATE: 0.865, _QUARTER: 0.433}),
    _in_codes("llama2_7b", "Lion", _LION_IN_CODES, Expected("PASS", 0.865), {_LION: 0.865}),
)


def judged_cases(cases: Sequence[Case] | None = None) -> Iterator[JudgedCase]:
    """Every verdict on every case, as predicted from shapes alone; nothing is allocated."""
    for case in CASES if cases is None else cases:
        baseline = _predicted(case.model, "AdamW", (), case.stage, case.world_size, case.precision)
        settings = tuple(case.settings.items())
        record = _predicted(case.model, case.optimizer, settings, case.stage, case.world_size, case.precision)
        verdicts = judge(record, baseline)
        lost = case.expected.keys() - {verdict.claim for verdict in verdicts}
        assert not lost, f"{case}: nothing is claimed with the title {', '.join(sorted(lost))}"
        for verdict in verdicts:
            yield JudgedCase(case, verdict, _deviation(verdict, case.expected.get(verdict.claim)))


def _deviation(verdict: Verdict, expected: Expected | None) -> str:
    if expected is None:
        return f"{verdict.outcome}, nothing was expected"
    if verdict.outcome != expected.outcome:
        return f"{verdict.outcome}, {expected.outcome} was expected"
    if verdict.found is None or abs(verdict.found - expected.found) > _CLOSE:
        found = "nothing" if verdict.found is None else f"{verdict.found:.1%}"
        return f"{found} found, {expected.found:.1%} was expected"
    return ""


@cache
def _predicted(
    model: str,
    optimizer: str,
    settings: tuple[tuple[str, Any], ...],
    stage: int | None,
    world_size: int,
    precision: Precision,
) -> Record:
    from ds_optim.memory.estimate import Request, predict

    return predict(
        Request(
            model=PAPER_MODELS[model],
            model_name=model,
            optimizer=optimizer,
            settings=dict(settings),
            stage=stage,
            world_size=world_size,
            precision=precision,
            states_only=True,
        )
    )
