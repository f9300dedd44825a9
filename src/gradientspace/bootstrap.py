"""Intervals: a paired bootstrap over samples, stratified by domain, of means, ratios and their differences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gradientspace.evaluation import BOOTSTRAP_DRAWS

_CHUNK = 500


@dataclass(frozen=True)
class Resampled:
    """Sums of m columns in each of S strata: as measured, and in every bootstrap draw.

    All columns share the draws, so that a difference of two of them is paired.
    """

    strata: list[str]
    point: np.ndarray
    """(S, m)"""
    drawn: np.ndarray
    """(draws, S, m)"""

    def interval(self, statistic: Statistic) -> dict[str, float]:
        """`statistic` of the measured sums, and its 95 % percentile interval."""
        low, high = np.quantile(statistic(self.drawn), [0.025, 0.975])
        return {"mean": float(statistic(self.point)), "low": float(low), "high": float(high)}


class Statistic:
    """A number made of sums (…, S, m): a ratio of two columns, over all strata, in one of them, or their average."""

    def __init__(
        self,
        numerator: int,
        denominator: int,
        *,
        minus: int | None = None,
        over: int | None = None,
        mean_of_strata: bool = False,
    ) -> None:
        self.numerator, self.denominator, self.minus = numerator, denominator, minus
        self.over, self.mean_of_strata = over, mean_of_strata

    def __call__(self, sums: np.ndarray) -> np.ndarray:
        top = sums[..., self.numerator] - (sums[..., self.minus] if self.minus is not None else 0)
        bottom = sums[..., self.denominator]
        if self.mean_of_strata:
            return (top / bottom).mean(axis=-1)
        if self.over is not None:
            return top[..., self.over] / bottom[..., self.over]
        return top.sum(axis=-1) / bottom.sum(axis=-1)


def resample(columns: np.ndarray, strata: Sequence[str], *, draws: int = BOOTSTRAP_DRAWS, seed: int = 0) -> Resampled:
    """Draw the rows of `columns` (n, m) with replacement, within each of their strata (n,)."""
    generator = np.random.default_rng(seed)
    labels, names = np.asarray(strata), sorted(set(strata))
    point = np.stack([columns[labels == name].sum(axis=0) for name in names])
    drawn = np.empty((draws, *point.shape))
    for s, name in enumerate(names):
        values = columns[labels == name]
        # Drawing n of n with replacement gives multinomial counts: one product instead of n look-ups.
        for start in range(0, draws, _CHUNK):
            size = min(_CHUNK, draws - start)
            counts = generator.multinomial(len(values), np.full(len(values), 1 / len(values)), size=size)
            drawn[start : start + size, s] = counts @ values
    return Resampled(names, point, drawn)
