"""The gradient noise scale from squared gradient norms: two averages, their ratio, and how far it can be trusted.

With G the true gradient, Σ the covariance of one sequence's gradient, and b < B the sizes of a small and of a big batch
(McCandlish et al., 1812.06162, appendix A.1), every update gives two unbiased numbers:

    |G|²  ≈ (B |g_B|² - b |g_b|²) / (B - b)          tr Σ ≈ (|g_b|² - |g_B|²) / (1/b - 1/B)

|g_b|² is the mean over all small batches in the big one. A single update says little (|G|² often comes out negative),
so both are averaged with weights β^age and then divided: B_simple = tr Σ / |G|². Ratios are never averaged.

The interval is Fieller's for the ratio of two means. It needs the covariance of the two averages, and takes the errors
of different updates as uncorrelated: each comes from fresh sequences, so given the weights they are martingale
differences, and no blocks of updates are needed. A drift of the true values only widens it. Where |G|² cannot be told
from zero the interval is unbounded, and there is nothing to say yet.

Only arithmetic on a device; where the norms come from is the business of `noise_scale`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

CONFIDENCE = 0.95
WIDEST = 4.0  # high / low of the interval of an estimate that is ready: within a factor of two either way


@dataclass(frozen=True, slots=True)
class Reading:
    """What is known of the noise scale.

    Attributes:
        updates: optimizer steps that entered the averages.
        ready: whether ``sequences`` and ``interval`` say something; they are None otherwise.
        why: why it is not ready, or which updates were left out; may be empty.
        sequences: the noise scale B_simple = tr Σ / |G|².
        interval: the ends of its 95 % confidence interval.
        tokens: ``sequences`` times the sequence length, if that is known.
        gradient_sq: |G|², unbiased; of the loss as it was differentiated, without a loss scale. None before an update.
        noise: tr Σ of one sequence's gradient, unbiased.
        batch: sequences per step at present; 0 before an update.
        roles: the same for the parameters of one role each, where asked for.
    """

    updates: int
    ready: bool
    why: str
    sequences: float | None
    interval: tuple[float, float] | None
    tokens: float | None
    gradient_sq: float | None
    noise: float | None
    batch: int
    roles: Mapping[str, Reading] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "updates": self.updates,
            "ready": self.ready,
            "why": self.why,
            "sequences": self.sequences,
            "interval": None if self.interval is None else list(self.interval),
            "tokens": self.tokens,
            "gradient_sq": self.gradient_sq,
            "noise": self.noise,
            "batch": self.batch,
            "roles": {role: reading.as_dict() for role, reading in self.roles.items()},
        }

    def __str__(self) -> str:
        if self.sequences is None or self.interval is None:
            return f"noise scale not ready: {self.why}"
        low, high = self.interval
        return f"noise scale {self.sequences:,.0f} sequences ({low:,.0f} to {high:,.0f}), batch {self.batch:,}"


class Estimator:
    """Averages of |G|² and tr Σ, for several sets of parameters at once. Nothing here waits for the device but `read`.

    State, float64: the weighted sums of f and of f fᵀ over the updates, f = (1, |G|², tr Σ), with weights β^age and
    β^(2 age); 12 numbers per row.

    Args:
        rows: how many sets of parameters.
        beta: what a step's weight is multiplied by with each further step. 0.99 looks back about 100 steps: short
            against the thousands over which the noise scale moves, and worth 199 equally weighted updates.
        min_updates: how many updates a reading needs.
    """

    def __init__(self, rows: int, beta: float = 0.99, min_updates: int = 50) -> None:
        if not 0 < beta < 1:
            raise ValueError(f"beta is {beta}; it must lie between 0 and 1")
        if min_updates < 2:
            raise ValueError(f"min_updates is {min_updates}; a variance needs 2 or more")
        self.beta, self.min_updates = beta, min_updates
        self._first = torch.zeros(rows, 3, dtype=torch.float64, device="cpu")
        self._second = torch.zeros(rows, 3, 3, dtype=torch.float64, device="cpu")

    def update(self, small: Tensor, big: Tensor, small_size: Tensor, big_size: Tensor, is_good: Tensor) -> None:
        """One optimizer step.

        Args:
            small: (rows,) float64: mean of the small batches' squared norms.
            big: (rows,) float64: squared norm of the whole batch's gradient.
            small_size: sequences in a small batch, float64 or a number of 0 dimensions.
            big_size: sequences in the whole batch.
            is_good: 0-dimensional, bool; an update that is not counts for nothing.
        """
        self._first, self._second = self._first.to(small.device), self._second.to(small.device)
        gradient_sq = (big_size * big - small_size * small) / (big_size - small_size)
        noise = (small - big) / (1 / small_size - 1 / big_size)
        f = torch.stack([torch.ones_like(gradient_sq), gradient_sq, noise], dim=1)
        f = torch.where(is_good, f, torch.zeros_like(f))
        decay = torch.where(is_good, self.beta, 1.0)
        self._first = decay * self._first + f
        self._second = decay.square() * self._second + f[:, :, None] * f[:, None, :]

    def read(self, row: int, updates: int, *, batch: int, seq_length: int | None, about: str = "") -> Reading:
        """The state of one row. Waits for the device.

        Args:
            updates: good updates so far.
            about: put first where the reading is not ready, and alone otherwise.
        """
        return _reading(
            self._first[row].tolist(), self._second[row].tolist(), updates, self.min_updates, batch, seq_length, about
        )

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, so that it goes into any checkpoint, and JSON."""
        return {"beta": self.beta, "first": self._first.tolist(), "second": self._second.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where another estimator was.

        Raises:
            ValueError: another beta, or other rows.
        """
        first = torch.tensor(state["first"], dtype=torch.float64, device="cpu")
        if state["beta"] != self.beta or first.shape != self._first.shape:
            raise ValueError(
                f"the saved noise scale has beta {state['beta']} and {len(first)} sets of parameters, this one "
                f"{self.beta} and {len(self._first)}: make it with the same beta and by_role, or start anew"
            )
        device = self._first.device
        self._first = first.to(device)
        self._second = torch.tensor(state["second"], dtype=torch.float64, device=device)


def _reading(
    first: list[float],
    second: list[list[float]],
    updates: int,
    min_updates: int,
    batch: int,
    seq_length: int | None,
    about: str,
) -> Reading:
    weight, sum_g, sum_s = first
    if updates == 0 or weight == 0:
        return Reading(0, False, about or "no update yet", None, None, None, None, None, batch)
    gradient_sq, noise = sum_g / weight, sum_s / weight
    interval, why = None, ""
    if updates < min_updates:
        why = f"{updates} of {min_updates} updates"
    elif gradient_sq <= 0:
        why = "the average of |G|² is not positive yet"
    else:
        interval = fieller(first, second)
        if interval is None:
            why = "|G|² cannot be told from zero yet"
        elif noise <= 0 or interval[1] <= 0:
            why, interval = "tr Σ is not positive: do all micro-batches and ranks read the same sequences?", None
        elif interval[1] > WIDEST * interval[0]:
            why = f"the interval is still wide: {interval[0]:,.0f} to {interval[1]:,.0f} sequences"
            interval = None
    is_ready = interval is not None
    sequences = noise / gradient_sq if is_ready else None
    return Reading(
        updates,
        is_ready,
        "; ".join(part for part in (about, why) if part),
        sequences,
        interval,
        None if sequences is None or seq_length is None else sequences * seq_length,
        gradient_sq,
        noise,
        batch,
    )


def fieller(first: list[float], second: list[list[float]]) -> tuple[float, float] | None:
    """The 95 % interval of (mean of S) / (mean of G), ends below 0 set to 0; None where it is unbounded.

    Args:
        first: Σ w (1, G, S).
        second: Σ w² (1, G, S)ᵀ(1, G, S).
    """
    weight, squares = first[0], second[0][0]
    mean_g, mean_s = first[1] / weight, first[2] / weight
    effective = weight * weight / squares
    if effective <= 1:
        return None

    def covariance(i: int, mean_i: float, j: int, mean_j: float) -> float:
        """Of two weighted means."""
        centred = second[i][j] - mean_i * second[0][j] - mean_j * second[i][0] + mean_i * mean_j * squares
        return centred / (weight * weight) * effective / (effective - 1)

    q = student_t(effective - 1) ** 2
    a = mean_g**2 - q * covariance(1, mean_g, 1, mean_g)
    b = mean_g * mean_s - q * covariance(1, mean_g, 2, mean_s)
    c = mean_s**2 - q * covariance(2, mean_s, 2, mean_s)
    if a <= 0:
        return None
    half = math.sqrt(max(b * b - a * c, 0.0))
    return max((b - half) / a, 0.0), max((b + half) / a, 0.0)


def student_t(freedom: float) -> float:
    """Two-sided 95 % quantile of Student's t, by its expansion in 1/freedom (1e-3 from 10 degrees of freedom on)."""
    z = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)
    return (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )
