"""What a batch size costs and saves, in numbers and words: pure functions of the batch and the noise scale.

McCandlish et al. (1812.06162): to reach a given loss with batch ``B`` takes ``S`` steps and ``E = S B`` sequences,

    S / S_min = 1 + B_noise / B        E / E_min = 1 + B / B_noise        (S/S_min - 1) (E/E_min - 1) = 1

so that at the noise scale a run takes twice the fewest steps and twice the fewest sequences. The law assumes a
well-tuned learning rate at every batch, and that the noise scale stands for the curvature-weighted one: a guide, not a
promise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

NEAR = 2.0  # within this factor of the noise scale, either way, a batch is "near" it


@dataclass(frozen=True, slots=True)
class Estimate:
    """A noise scale in sequences, with the ends of its interval (both equal to it where none is known).

    Raises:
        ValueError: not ``0 <= low <= sequences <= high``, or the estimate is zero or infinite.
    """

    sequences: float
    low: float
    high: float

    def __post_init__(self) -> None:
        if not (0 <= self.low <= self.sequences <= self.high and 0 < self.sequences < math.inf):
            raise ValueError(
                f"a noise scale of {self.sequences:g} with interval {self.low:g} to {self.high:g}: it must be more "
                "than 0 and lie in its interval"
            )

    @property
    def is_known(self) -> bool:
        """Whether there is an interval."""
        return self.low < self.high


def estimate_of(said: Mapping[str, Any]) -> tuple[Estimate | None, str]:
    """The estimate in the ``noise_scale`` entry of a run's summary, or why there is none."""
    if not said:
        return None, "the run's summary has none (was --noise-scale given?)"
    if not said.get("ready"):
        return None, str(said.get("why") or "it was not ready")
    try:
        low, high = (
            float(end) if end is not None else unknown
            for end, unknown in zip(said["interval"], (0.0, math.inf), strict=True)
        )
        return Estimate(float(said["sequences"]), low, high), ""
    except (KeyError, TypeError, ValueError) as error:
        return None, f"it cannot be read: {error!r}"


@dataclass(frozen=True, slots=True)
class Change:
    """What another batch needs for the same loss, as multiples of what the present one needs."""

    steps: float
    tokens: float


@dataclass(frozen=True, slots=True)
class Shares:
    """How a batch is shared out: ``micro_batch`` sequences, ``accumulation`` passes, ``ranks``."""

    micro_batch: int
    accumulation: int
    ranks: int

    @property
    def batch(self) -> int:
        """Sequences per step."""
        return self.micro_batch * self.accumulation * self.ranks

    def __str__(self) -> str:
        return (
            f"micro-batch {self.micro_batch} x accumulation {self.accumulation} x "
            f"{self.ranks} rank{'s'[: self.ranks != 1]}"
        )


def excess_steps(batch: float, noise_scale: float) -> float:
    """``S / S_min``."""
    return 1 + noise_scale / batch


def excess_tokens(batch: float, noise_scale: float) -> float:
    """``E / E_min``."""
    return 1 + batch / noise_scale


def change(old: float, new: float, noise_scale: float) -> Change:
    """What going from batch ``old`` to ``new`` does: the ratios of `excess_steps` and of `excess_tokens`.

    Written so that it also holds at a noise scale of 0 (steps are all that there is) and of infinity (tokens are).
    """
    tokens = 1.0 if math.isinf(noise_scale) else (new + noise_scale) / (old + noise_scale)
    return Change(steps=tokens * old / new, tokens=tokens)


def share_out(batch: int, ranks: int, largest: int) -> Shares:
    """The largest micro-batch that divides a batch and is no larger than ``largest``; the rest is accumulation.

    Raises:
        ValueError: the batch is no multiple of the ranks, or not even one sequence fits.
    """
    each, left = divmod(batch, ranks)
    if each < 1 or left:
        raise ValueError(f"a batch of {batch} is no multiple of {ranks} ranks")
    if largest < 1:
        raise ValueError("not even a micro-batch of 1 fits: more ranks, a higher ZeRO stage, offload or checkpointing")
    micro_batch = max(n for n in range(1, min(each, largest) + 1) if each % n == 0)
    return Shares(micro_batch, each // micro_batch, ranks)


# ------------------------------------------------------------------------------------------------------------ in words


def position(batch: int, estimate: Estimate) -> str:
    """Where a batch stands: below the noise scale, near it, above it, or not settled by the interval."""
    ratios = [batch / noise if noise > 0 else math.inf for noise in (estimate.sequences, estimate.high, estimate.low)]
    where = [_zone(ratio) for ratio in ratios]
    interval = f" (between {ratios[1]:.2g} and {ratios[2]:.2g})" if estimate.is_known else ""
    said = f"At {batch:,} sequences you are at {ratios[0]:.2g} of the noise scale{interval}: "
    if len(set(where)) > 1:
        return said + f"most likely {where[0]}, but the interval does not settle that."
    return (
        said
        + {
            "below it": "below it, where a larger batch is cheap.",
            "near it": "near it, where tokens and steps are in balance.",
            "above it": "above it, where a larger batch saves few steps.",
        }[where[0]]
    )


def sentence(old: int, new: int, estimate: Estimate) -> str:
    """What going to another batch costs and saves, with what the interval's ends would make of it."""
    changes = [change(old, new, noise) for noise in (estimate.sequences, estimate.low, estimate.high)]
    verb = _verb(new / old)
    tokens = _percent([one.tokens for one in changes], estimate.is_known)
    steps = _percent([one.steps for one in changes], estimate.is_known)
    if new > old:
        return f"{verb} to {new:,} costs about {tokens} more tokens for about {steps} fewer steps."
    return f"{verb} to {new:,} saves about {tokens} of the tokens for about {steps} more steps."


def in_words(batch: int, estimate: Estimate) -> list[str]:
    """The position, and what doubling and halving would do."""
    words = [position(batch, estimate), sentence(batch, 2 * batch, estimate)]
    return words if batch % 2 else [*words, sentence(batch, batch // 2, estimate)]


def sharing_words(now: Shares, largest: Sequence[tuple[int, int]], estimate: Estimate) -> list[str]:
    """How micro-batch, accumulation and ranks should change.

    Args:
        now: how the present batch is shared out.
        largest: numbers of ranks, with the largest micro-batch that fits each; the present number is among them.
        estimate: of the noise scale.
    """
    fits = dict(largest)
    if fits[now.ranks] < 1:
        return [f"On {now.ranks} ranks {_reason(now.batch, now.ranks, 0)}."]
    words = [f"The largest micro-batch that fits is {fits[now.ranks]:,} on {_ranks(now.ranks)}."]
    if now.micro_batch > fits[now.ranks]:
        words[0] += f" Yours, {now.micro_batch}, is predicted not to."
    better = share_out(now.batch, now.ranks, fits[now.ranks])
    if better.accumulation < now.accumulation:
        words.append(f"The same batch in fewer passes: {better} instead of {now}. The result of a step is the same.")
    new = 2 * now.batch if now.batch < estimate.sequences else now.batch // 2
    if new < 1:
        return words
    cost = change(now.batch, new, estimate.sequences)
    verb = _verb(new / now.batch)
    for ranks, micro_batch in largest:
        try:
            shares = share_out(new, ranks, micro_batch)
        except ValueError:
            words.append(f"{verb} on {_ranks(ranks)} cannot be done: {_reason(new, ranks, micro_batch)}.")
            continue
        # The work of a rank: a step's passes times the steps. What ranks say to one another is left out.
        time = cost.tokens * now.ranks / ranks
        words.append(
            f"{verb} on {_ranks(ranks)}: {shares}; the run takes about {100 * abs(time - 1):.0f} % "
            f"{'more' if time > 1 else 'less'} time, if a sequence takes a rank as long as now."
        )
    return words


def _reason(batch: int, ranks: int, largest: int) -> str:
    try:
        share_out(batch, ranks, largest)
    except ValueError as error:
        return str(error)
    return ""


def _zone(ratio: float) -> str:
    return "below it" if ratio < 1 / NEAR else "above it" if ratio > NEAR else "near it"


def _verb(ratio: float) -> str:
    return {2.0: "Doubling", 0.5: "Halving"}.get(ratio, "Going")


def _ranks(number: int) -> str:
    return f"{number:,} rank{'s'[: number != 1]}"


def _percent(ratios: Sequence[float], interval: bool) -> str:
    """Of the first ratio; where there is an interval, with the range over all of them."""
    values = [100 * abs(ratio - 1) for ratio in ratios]
    return f"{values[0]:.0f} %" + (f" ({min(values):.0f} to {max(values):.0f} %)" if interval else "")
