"""What has been claimed about memory, as data, and a judge that holds a record against it.

Most arguments about such claims are about the denominator: half of the *optimizer state* is a quarter of all model
states, and less of what a device holds. A claim here therefore says what it counts and at how many bytes per parameter
AdamW is taken, and a record that was made under other conditions is not judged by it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from ds_optim.memory.record import MODEL_STATES, Category, MomentName, RankRecord, Record, StrictModel, human

Outcome = Literal["PASS", "FAIL", "NOT APPLICABLE"]

ADAMS = frozenset({"AdamW", "Adam", "FusedAdam", "DeepSpeedCPUAdam"})
"""What keeps Adam's two values per element, with or without decoupled decay: torch's, DeepSpeed's and ours."""

_CLOSE = 0.01  # how far bytes per parameter may be from a claim's, relatively: padding and step counts
_CLOSE_BY_SIZE = 0.002  # how far a share may be from the one published for a model's size


class ClaimError(ValueError):
    """Two records cannot be compared at all; the message says why."""


class Verdict(StrictModel):
    """One claim, judged.

    Attributes:
        claim: its title.
        who: paper or repository.
        counted: the denominator, in words.
        expected: in words.
        found: share of AdamW's bytes that is saved: 0.45 is 45 %, negative where it costs more. Also given where the
            claim is not applicable but both records have what it counts, for what it is worth.
        outcome: PASS, FAIL or NOT APPLICABLE.
        reason: of the outcome, with bytes.
    """

    claim: str
    who: str
    counted: str
    expected: str
    found: float | None
    outcome: Outcome
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedClaim:
    """What somebody said an optimizer saves against AdamW.

    Attributes:
        title: short.
        who: paper or repository.
        optimizer: name of the class that it is about.
        categories: what is counted.
        counted: the same in words.
        adamw: bytes per parameter that AdamW is taken at; what is not named may be anything.
        state_dtype: of the optimizer's state per element; None for the same as AdamW's.
        saves: smallest and largest share of AdamW's bytes that bears the claim out; negative where it costs more, from
            minus infinity where no limit was named.
        by_size: instead of ``saves``, the share for each number of parameters that it was published for.
    """

    title: str
    who: str
    optimizer: str
    categories: tuple[Category, ...]
    counted: str
    adamw: Mapping[Category, float] = field(default_factory=dict)
    state_dtype: str | None = None
    saves: tuple[float, float] | None = None
    by_size: Mapping[int, float] = field(default_factory=dict)

    def range_for(self, parameters: int) -> tuple[float, float] | None:
        """Smallest and largest expected share for a model of this size; None if nothing was said about it."""
        if self.saves is not None:
            return self.saves
        near = [share for size, share in self.by_size.items() if abs(parameters - size) <= _CLOSE * size]
        return (near[0] - _CLOSE_BY_SIZE, near[0] + _CLOSE_BY_SIZE) if near else None


_STATE = (Category.OPTIMIZER,)
_FP32_STATE = {Category.OPTIMIZER: 8.0}
_MIXED = {Category.PARAMETERS: 2.0, Category.MASTER: 4.0, Category.GRADIENTS: 2.0, Category.OPTIMIZER: 8.0}
_PURE_BF16 = {Category.PARAMETERS: 2.0, Category.MASTER: 0.0, Category.GRADIENTS: 2.0, Category.OPTIMIZER: 4.0}
_EIGHT_BITS = "uint8"  # beside the fp32 of what is small
_SWAN = "Ma et al. 2024, SWAN, arXiv 2412.13148"

CLAIMS: tuple[PublishedClaim, ...] = (
    PublishedClaim(
        title="Adam-mini saves 45 to 50 % of the optimizer state",
        who="Zhang et al. 2024, Adam-mini, arXiv 2406.16793",
        optimizer="AdamMini",
        categories=_STATE,
        counted="optimizer state, fp32",
        adamw=_FP32_STATE,
        state_dtype="float32",
        saves=(0.45, 0.50),
    ),
    PublishedClaim(
        title="Adam-mini saves a quarter of all model states",
        who="follows from Zhang et al. 2024: 4 of 16 bytes",
        optimizer="AdamMini",
        categories=MODEL_STATES,
        counted="bf16 weights and gradients, fp32 master and state, each once: 16 bytes per parameter",
        adamw=_MIXED,
        state_dtype="float32",
        saves=(0.24, 0.251),
    ),
    PublishedClaim(
        title="SWAN saves about half of weights, gradients and state",
        who=_SWAN,
        optimizer="SWAN",
        categories=MODEL_STATES,
        counted="weights, gradients and state, bf16, no fp32 master",
        adamw=_PURE_BF16,
        state_dtype="bfloat16",
        saves=(0.45, 0.55),
    ),
    PublishedClaim(
        title="SWAN saves what its table implies for the model's size",
        who=f"{_SWAN}, table as in the SCALE repository; bf16 gradients added here",
        optimizer="SWAN",
        categories=MODEL_STATES,
        counted="weights, gradients and state, bf16, no fp32 master",
        adamw=_PURE_BF16,
        state_dtype="bfloat16",
        by_size={58_073_600: 0.218, 134_105_856: 0.317, 367_969_280: 0.411, 1_339_082_752: 0.451, 6_738_415_616: 0.481},
    ),
    PublishedClaim(
        title="SWAN with fp32 state saves less, and costs more at 60M",
        who="this package: the state that SWAN keeps for embeddings, head and norms, at 8 bytes instead of 4",
        optimizer="SWAN",
        categories=MODEL_STATES,
        counted="bf16 weights and gradients, fp32 state, against AdamW in bf16 throughout",
        adamw=_PURE_BF16,
        state_dtype="float32",
        by_size={
            58_073_600: -0.064,
            134_105_856: 0.133,
            367_969_280: 0.322,
            1_339_082_752: 0.402,
            6_738_415_616: 0.461,
        },
    ),
    PublishedClaim(
        title="Lion keeps half of AdamW's state",
        who="Chen et al. 2023, Lion, arXiv 2302.06675",
        optimizer="Lion",
        categories=_STATE,
        counted="optimizer state",
        saves=(0.495, 0.505),
    ),
    PublishedClaim(
        title="Adan keeps twice AdamW's state",
        who="its official code: four values per element; Xie et al. 2022, arXiv 2208.06677",
        optimizer="Adan",
        categories=_STATE,
        counted="optimizer state",
        saves=(-1.005, -0.995),
    ),
    PublishedClaim(
        title="Shampoo costs more state than AdamW",
        who="Gupta et al. 2018, arXiv 1802.09568: factors and roots; momentum and Adam graft as in Anil et al. 2020",
        optimizer="Shampoo",
        categories=_STATE,
        counted="optimizer state: 16 bytes per parameter of square blocks, 8 for embeddings, head and norms",
        adamw=_FP32_STATE,
        state_dtype="float32",
        saves=(-math.inf, -_CLOSE),
    ),
    PublishedClaim(
        title="SOAP costs more state than AdamW",
        who="Vyas et al. 2024, SOAP, arXiv 2409.11321: two moments, two factors, two bases",
        optimizer="SOAP",
        categories=_STATE,
        counted="optimizer state: 20 bytes per parameter of square blocks, 8 for embeddings, head and norms",
        adamw=_FP32_STATE,
        state_dtype="float32",
        saves=(-math.inf, -_CLOSE),
    ),
    *(
        PublishedClaim(
            title=f"{name} keeps half of AdamW's state",
            who=who,
            optimizer=name,
            categories=_STATE,
            counted="optimizer state, fp32, of all parameters: embeddings, head and norms are AdamW's",
            adamw=_FP32_STATE,
            state_dtype="float32",
            saves=(0.45, 0.505),
        )
        for name, who in (
            ("Muon", "Liu et al. 2025, Muon is scalable, arXiv 2502.16982: one momentum"),
            ("NorMuon", "Li et al. 2025, NorMuon, arXiv 2510.05491: Muon's, and one value per neuron"),
        )
    ),
    PublishedClaim(
        title="Eight bits save three quarters of AdamW's state",
        who="Dettmers et al. 2021, 8-bit optimizers, arXiv 2110.02861: 2 of 8 bytes",
        optimizer="AdamW",
        categories=_STATE,
        counted="optimizer state, embeddings and norms in fp32 as recommended there",
        adamw=_FP32_STATE,
        state_dtype=_EIGHT_BITS,
        saves=(0.70, 0.75),
    ),
    *(
        PublishedClaim(
            title=f"{title} in eight bits saves seven eighths of AdamW's state",
            who="follows from Dettmers et al. 2021: one byte for one value",
            optimizer=name,
            categories=_STATE,
            counted="optimizer state, embeddings and norms in fp32 as recommended there",
            adamw=_FP32_STATE,
            state_dtype=_EIGHT_BITS,
            saves=(0.85, 0.875),
        )
        for name, title in (("AdamMini", "Adam-mini"), ("Lion", "Lion"))
    ),
)
"""In the order in which they are shown."""


def judge(record: Record, baseline: Record) -> list[Verdict]:
    """One verdict for every claim about the record's optimizer; none if nobody claimed anything about it.

    Args:
        record: measured or predicted.
        baseline: of AdamW, made under the same strategy, precision and ranks, for the same model.

    Raises:
        ClaimError: the records are of models of different sizes.
    """
    ours, theirs = record.provenance, baseline.provenance
    if ours.parameters != theirs.parameters:
        raise ClaimError(
            f"the record is of a model with {ours.parameters:,} parameters ({ours.model}), the baseline of one with "
            f"{theirs.parameters:,} ({theirs.model}): record AdamW on the same model"
        )
    name = class_name(ours.optimizer)
    in_codes = _EIGHT_BITS in _dtypes(record.ranks)
    about_it = [claim for claim in CLAIMS if claim.optimizer == name and (claim.state_dtype != _EIGHT_BITS or in_codes)]
    return [_judged(claim, record, baseline) for claim in about_it]


def class_name(optimizer: str) -> str:
    """``AdamW`` of ``torch.AdamW (fused)``."""
    return optimizer.partition(" ")[0].rpartition(".")[2]


def _judged(claim: PublishedClaim, record: Record, baseline: Record) -> Verdict:
    expected = claim.range_for(record.provenance.parameters)
    ranks, base, whose = _same_ranks(record, baseline)
    obstacles = _obstacles(claim, record, baseline, ranks, base)
    ours, theirs = (sum(_bytes(rank, one) for rank in of for one in claim.categories) for of in (ranks, base))
    counts_all = _missing(claim, ranks) is None and _missing(claim, base) is None
    found = (theirs - ours) / theirs if theirs and counts_all else None
    outcome: Outcome = "NOT APPLICABLE"
    reason = "; ".join(obstacles)
    if found is not None and expected is not None and not obstacles:
        outcome = "PASS" if expected[0] <= found <= expected[1] else "FAIL"
        reason = f"{human(ours)} against {human(theirs)} of {baseline.provenance.optimizer}, {whose}"
    return Verdict(
        claim=claim.title,
        who=claim.who,
        counted=claim.counted,
        expected=_in_words(claim, expected),
        found=found,
        outcome=outcome,
        reason=reason,
    )


def _same_ranks(record: Record, baseline: Record) -> tuple[list[RankRecord], list[RankRecord], str]:
    """The ranks that both recorded (a prediction may leave some out); if there are none, the fullest of each."""
    world_size = record.provenance.world_size
    shared = {rank.rank for rank in record.ranks} & {rank.rank for rank in baseline.ranks}
    if not shared:
        return [record.fullest], [baseline.fullest], f"the fullest recorded of {world_size} ranks"
    ours, theirs = ([rank for rank in one.ranks if rank.rank in shared] for one in (record, baseline))
    if world_size == 1:
        return ours, theirs, "one rank"
    some = f"{len(shared)} of " if len(shared) < world_size else ""
    return ours, theirs, f"{some}{world_size} ranks together"


def _bytes(rank: RankRecord, category: Category) -> int:
    return rank.state_bytes if category is Category.OPTIMIZER else rank.model_states[category]


def _missing(claim: PublishedClaim, ranks: Sequence[RankRecord]) -> str | None:
    """What the claim needs and what was not recorded, in words: a moment, or state that a step has made."""
    names: list[MomentName] = ["after step"] if claim.categories == _STATE else ["after backward", "after step"]
    moment = next((name for name in names for rank in ranks if rank.moment(name) is None), None)
    if moment is not None:
        return f"no moment {moment!r}"
    if claim.categories == _STATE and not sum(rank.state_bytes for rank in ranks):
        return "no optimizer state after its step"
    return None


def _dtypes(ranks: Sequence[RankRecord]) -> set[str]:
    return {entry.dtype for rank in ranks for entry in rank.state if entry.shape_rule == "element" and entry.elements}


def _obstacles(
    claim: PublishedClaim, record: Record, baseline: Record, ranks: Sequence[RankRecord], base: Sequence[RankRecord]
) -> list[str]:
    """Why the claim does not apply, as clauses; empty if it does."""
    ours, theirs = record.provenance, baseline.provenance
    if class_name(theirs.optimizer) not in ADAMS:
        return [f"the baseline is {theirs.optimizer}, the claim is against AdamW"]
    found = [
        f"{what} differs: {mine!r}, the baseline's {its!r}"
        for what, mine, its in (
            ("precision", ours.precision, theirs.precision),
            ("strategy", ours.strategy, theirs.strategy),
            ("ZeRO stage", ours.stage, theirs.stage),
            ("number of ranks", ours.world_size, theirs.world_size),
            ("offload", ours.offload, theirs.offload),
        )
        if mine != its
    ]
    if claim.range_for(ours.parameters) is None:
        sizes = ", ".join(f"{size / 1e6:,.0f}" for size in claim.by_size)
        found.append(f"nothing was said about {ours.parameters / 1e6:,.1f} million parameters, only about {sizes}")
    for one, whose in ((ranks, "record"), (base, "baseline")):
        missing = _missing(claim, one)
        if missing is not None:
            found.append(f"the {whose} has {missing}")
    return found or [*_state_obstacles(claim, ranks, base), *_byte_obstacles(claim, base)]


def _state_obstacles(claim: PublishedClaim, ranks: Sequence[RankRecord], base: Sequence[RankRecord]) -> list[str]:
    elements = sum(rank.elements for rank in base)
    kept = sum(entry.elements for rank in base for entry in rank.state if entry.shape_rule == "element")
    found = []
    if abs(kept - 2 * elements) > 2 * _CLOSE * elements:
        found.append(f"the baseline keeps {kept / max(elements, 1):.2f} values per element, AdamW two")
    wanted = {claim.state_dtype} if claim.state_dtype else _dtypes(base)
    wanted |= {"float32"} if claim.state_dtype == _EIGHT_BITS else set()
    other = _dtypes(ranks) - wanted
    if other:
        found.append(f"its state is {' and '.join(sorted(other))}, the claim counts {' and '.join(sorted(wanted))}")
    return found


def _byte_obstacles(claim: PublishedClaim, base: Sequence[RankRecord]) -> list[str]:
    """Where AdamW is not what the claim takes it for: other dtypes, or something that every rank keeps whole."""
    elements = max(sum(rank.elements for rank in base), 1)
    found = {category: sum(_bytes(rank, category) for rank in base) / elements for category in claim.adamw}
    other = [
        f"{category.value} {found[category]:.2f} (claim {claimed:g})"
        for category, claimed in claim.adamw.items()
        if abs(found[category] - claimed) > _CLOSE * max(claimed, 1)
    ]
    return [f"the baseline's bytes per parameter, by dtype or by copies, are {', '.join(other)}"] if other else []


def _in_words(claim: PublishedClaim, expected: tuple[float, float] | None) -> str:
    if expected is None:
        return "nothing for a model of this size"
    low, high = (100 * share for share in expected)
    if math.isinf(low):
        return f"at least {-high:.4g} % more"
    if claim.saves is None:
        middle = (low + high) / 2
        return f"{abs(middle):.1f} % {'saved' if middle >= 0 else 'more'} at this size"
    return f"{low:.4g} to {high:.4g} % saved" if high > 0 else f"{-high:.4g} to {-low:.4g} % more"
