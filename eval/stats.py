"""The statistics of a score: intervals, paired tests, pass@k. Pure functions of counts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Z_95 = 1.959963984540054
RESAMPLES = 10_000
_SEED = 20_260_101  # of the bootstraps, so that a score is the same each time it is computed


def wilson(right: int, total: int) -> tuple[float, float]:
    """The 95% Wilson interval of `right` of `total`."""
    if not total:
        return 0.0, 1.0
    share, z2 = right / total, Z_95**2
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = Z_95 * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2)) / (1 + z2 / total)
    # Exactly 0 and 1 at the ends: rounding must not exclude what was observed.
    return (0.0 if right == 0 else centre - half), (1.0 if right == total else centre + half)


def macro_interval(groups: Sequence[tuple[int, int]]) -> tuple[float, float]:
    """The 95% bootstrap interval of the mean of several groups' shares, (right, total) each, rows resampled within
    their group. Resampling zeros and ones is drawing their number from a binomial distribution."""
    right, total = np.array(groups, dtype=np.int64).T
    draws = np.random.default_rng(_SEED).binomial(total, right / total, size=(RESAMPLES, len(total))) / total
    return _middle_95(draws.mean(axis=1))


def mcnemar(only_first: int, only_second: int) -> float:
    """The exact two-sided p-value of McNemar's test: of the rows that just one of two is right on, how unlikely is a
    split as uneven as this, were both equally good?"""
    changed = only_first + only_second
    tail = ways = 1
    for count in range(min(only_first, only_second)):
        ways = ways * (changed - count) // (count + 1)  # math.comb(changed, count + 1), from the one before
        tail += ways
    return min(1.0, 2 * tail / 2**changed)


def difference_interval(only_first: int, only_second: int, total: int) -> tuple[float, float]:
    """The 95% bootstrap interval of second minus first, pairs of rows resampled."""
    shares = [only_first / total, only_second / total, (total - only_first - only_second) / total]
    draws = np.random.default_rng(_SEED).multinomial(total, shares, size=RESAMPLES)
    return _middle_95((draws[:, 1] - draws[:, 0]) / total)


def pass_at_k(right: int, runs: int, k: int) -> float:
    """The unbiased estimate that one of `k` answers is right, from `right` of `runs` (Chen et al. 2021)."""
    if not 1 <= k <= runs:
        raise ValueError(f"pass@{k} of {runs} runs")
    return 1.0 - math.comb(runs - right, k) / math.comb(runs, k)


def _middle_95(draws: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(low), float(high)
