"""The statistics of a score: intervals, paired tests, pass@k. Pure functions of counts.

Rows of one recording are no independent rows. Intervals take an effective number of rows (`effective_size`), and
McNemar's test flips the rows of one recording together.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

Z_95 = 1.959963984540054
Interval = tuple[float, float]


def effective_size(values: Sequence[float], recordings: Sequence[str]) -> float:
    """How many independent rows would know the mean of `values` as well as these do, of which some share a recording.

    The number of rows by the design effect (Kish 1965; Korn and Graubard 1998): the variance of the mean with rows of a
    recording summed first, to that of independent rows. Never more than there are rows. Where all values are equal the
    effect cannot be estimated, and each recording counts as one row.
    """
    total, sums = len(values), defaultdict(float)
    if not total or len(set(recordings)) == total:
        return float(total)
    mean = math.fsum(values) / total
    for value, recording in zip(values, recordings, strict=True):
        sums[recording] += value - mean
    spread = math.fsum((value - mean) ** 2 for value in values)
    if not spread or len(sums) == 1:
        return float(len(sums))
    between = math.fsum(each**2 for each in sums.values()) * len(sums) / (len(sums) - 1)
    return max(1.0, total / max(1.0, between / spread))


def wilson(right: float, total: float, effective: float | None = None) -> Interval:
    """The 95% Wilson interval of `right` of `total`, which are worth `effective` independent ones."""
    if not total:
        return 0.0, 1.0
    size = total if effective is None else effective
    share, z2 = right / total, Z_95**2
    centre = (share + z2 / (2 * size)) / (1 + z2 / size)
    half = Z_95 * math.sqrt(share * (1 - share) / size + z2 / (4 * size**2)) / (1 + z2 / size)
    # Exactly 0 and 1 at the ends: rounding must not exclude what was observed.
    return (0.0 if right == 0 else centre - half), (1.0 if right == total else centre + half)


def independent_difference(first: tuple[int, int], second: tuple[int, int]) -> Interval:
    """The 95% interval of the share of `first` (right, total) minus that of `second`, of rows that are not paired:
    Newcombe's hybrid score interval (1998, method 10)."""
    (p1, (low1, high1)), (p2, (low2, high2)) = ((r / n if n else 0.0, wilson(r, n)) for r, n in (first, second))
    difference = p1 - p2
    below, above = math.hypot(p1 - low1, high2 - p2), math.hypot(high1 - p1, p2 - low2)
    return max(-1.0, difference - below), min(1.0, difference + above)


def mean_interval(groups: Sequence[tuple[float, Interval]]) -> Interval:
    """The 95% interval of the mean of several independent shares, each with its own interval (MOVER, Zou and Donner
    2008): as wide as the shares' intervals are, where a bootstrap has no width at 0 and at 1."""
    mean = math.fsum(share for share, _ in groups) / len(groups)
    below = math.sqrt(math.fsum((share - low) ** 2 for share, (low, _) in groups)) / len(groups)
    above = math.sqrt(math.fsum((high - share) ** 2 for share, (_, high) in groups)) / len(groups)
    return max(0.0, mean - below), min(1.0, mean + above)


def mcnemar(differences: Sequence[int]) -> float:
    """The exact two-sided p-value of McNemar's test.

    `differences`: for each recording, the number of rows that only the second is right on, less the number that only
    the first is right on. Were both equally good, each could as well have the other sign: how unlikely is a sum as far
    from 0 as this one? With one row a recording that is McNemar's binomial test.
    """
    sizes = [abs(difference) for difference in differences if difference]
    ways = np.zeros(2 * sum(sizes) + 1)
    middle = sum(sizes)
    ways[middle] = 1.0
    for size in sizes:
        up, down = np.zeros_like(ways), np.zeros_like(ways)
        up[size:], down[:-size] = ways[:-size], ways[size:]
        ways = 0.5 * (up + down)
    far = abs(sum(differences))
    return min(1.0, float(ways[middle + far :].sum() + ways[: middle - far + 1].sum())) if far else 1.0


def holm(ps: Sequence[float]) -> list[float]:
    """p-values of several tests, corrected by Holm's step-down rule (1979): the chance of one false finding is kept."""
    order, corrected, largest = sorted(range(len(ps)), key=ps.__getitem__), [0.0] * len(ps), 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[place]))
        corrected[place] = largest
    return corrected


def difference_interval(only_first: float, only_second: float, total: float) -> Interval:
    """The 95% interval of second minus first in paired rows: Tango's score interval (1998), which has a width where no
    row changed, too. The counts may be scaled to an effective number of rows."""

    def score(difference: float) -> float:
        b = -only_first - only_second + (2 * total - only_second + only_first) * difference
        c = -only_first * difference * (1 - difference)
        share = (math.sqrt(max(0.0, b * b - 8 * total * c)) - b) / (4 * total)
        variance = total * (2 * share + difference * (1 - difference))
        gap = only_second - only_first - total * difference
        return gap / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, gap) if gap else 0.0

    def crossing(level: float) -> float:
        """Where `score`, which falls, passes `level`."""
        low, high = -1.0, 1.0
        for _ in range(60):
            half = (low + high) / 2
            low, high = (half, high) if score(half) > level else (low, half)
        return (low + high) / 2

    return crossing(Z_95), crossing(-Z_95)


def pass_at_k(right: int, runs: int, k: int) -> float:
    """The unbiased estimate that one of `k` answers is right, from `right` of `runs` (Chen et al. 2021)."""
    if not 1 <= k <= runs:
        raise ValueError(f"pass@{k} of {runs} runs")
    return 1.0 - math.comb(runs - right, k) / math.comb(runs, k)
