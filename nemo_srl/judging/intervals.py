"""Estimates with 95% intervals, for few cases that may depend on each other.

A metric is a ratio of two sums over groups, such as instructions: what the cases add, and how many cases there are. The
cases of a group depend on each other, and groups do not. `ratio` takes the standard error from the groups (linearised,
as in survey sampling: Cochran 1977, section 6.5). Its interval is that of Wilson's score (1927) with two changes, which
are those of Korn and Graubard (1998) for shares in surveys. The number of cases is the number of independent cases that
would have the same standard error. The quantile is Student's t, with one degree of freedom less than groups. A value on
another scale than [0, 1] is moved to it first. If all groups are equal, as many unlike groups are allowed for as
Wilson's bound for 0 of them says. So no interval leaves the scale, and none has a width of zero.

In simulations the intervals cover the truth in 94% to 98% of cases at 8 and 20 groups, and more often at fewer. The
percentile bootstrap over groups has 77% to 91% at 8 groups, and BCa 86% to 93%. `tests/test_intervals.py` repeats a
part of it. Where each case stands alone, `proportion` has the exact interval.

Not covered: fewer than two groups. Such an estimate has no interval.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy  # loads scipy.stats when it is first used, which takes a third of a second

from nemo_srl.records import GroupSum, Metric

_Floats = npt.NDArray[np.float64]

Sums = Mapping[str, tuple[float, float]]
"""By the name of the group: what its cases add to the metric, and their number."""
Limits = tuple[float, float]
"""The lowest and the highest value that a case can have."""
SHARE: Limits = (0.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A figure over `n` cases, with its 95% interval. None: no case, or for an interval, only one group."""

    value: float | None = None
    n: int = 0
    low: float | None = None
    high: float | None = None

    def named(self, name: str) -> Metric:
        return Metric(name=name, value=self.value, n=self.n, low=self.low, high=self.high)


def proportion(hits: int, n: int) -> Estimate:
    """Share of `hits` in `n` independent cases, with the exact interval (Clopper and Pearson 1934)."""
    if n == 0:
        return Estimate()
    low, high = scipy.stats.binomtest(hits, n).proportion_ci(method="exact")
    return Estimate(value=hits / n, n=n, low=float(low), high=float(high))


def sign_test(wins: int, losses: int) -> float | None:
    """Exact two-sided p-value of the sign test; None without any win or loss."""
    return float(scipy.stats.binomtest(wins, wins + losses).pvalue) if wins + losses else None


def sums_of(groups: Mapping[str, Sequence[float]]) -> Sums:
    """The sums whose ratio is the mean of all values."""
    return {name: (float(sum(values)), float(len(values))) for name, values in groups.items()}


def rows_of(metrics: Mapping[str, Sums]) -> list[GroupSum]:
    """The sums of each metric as records. Groups without a case are left out."""
    return [
        GroupSum(metric=metric, group=group, total=total, n=round(n))
        for metric, sums in metrics.items()
        for group, (total, n) in sums.items()
        if n
    ]


def sums_in(rows: Iterable[GroupSum]) -> dict[str, dict[str, tuple[float, float]]]:
    """The sums of each metric, from their records."""
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for row in rows:
        found.setdefault(row.metric, {})[row.group] = (row.total, float(row.n))
    return found


def ratio(sums: Sums, limits: Limits) -> Estimate:
    """The sum over all groups divided by their number of cases, `n`."""
    used = np.array([pair for pair in sums.values() if pair[1]], dtype=np.float64).reshape(-1, 2)
    if not len(used):
        return Estimate()
    value, errors = _linearised(used)
    return _with_interval(value, errors, n=round(used[:, 1].sum()), limits=limits)


def paired_change(before: Sums, after: Sums, limits: Limits) -> Estimate:
    """The ratio of `after` minus that of `before`, over the groups that both have; `n` is the number of these groups.

    Both are measured on the same items, so most of the difference between items cancels out. An interval without 0 says
    that the metric has changed.
    """
    both = [name for name in before if before[name][1] and after.get(name, (0.0, 0.0))[1]]
    if not both:
        return Estimate()
    (old, old_errors), (new, new_errors) = (
        _linearised(np.array([sums[name] for name in both], dtype=np.float64)) for sums in (before, after)
    )
    span = limits[1] - limits[0]
    return _with_interval(new - old, new_errors - old_errors, n=len(both), limits=(-span, span))


def _linearised(sums: _Floats) -> tuple[float, _Floats]:
    """The ratio, and how much of its error each group contributes. `sums` has shape (group, 2)."""
    total, num_cases = sums.sum(axis=0)
    value = total / num_cases
    return float(value), (sums[:, 0] - value * sums[:, 1]) / num_cases


def _with_interval(value: float, errors: _Floats, *, n: int, limits: Limits) -> Estimate:
    num_groups, (lowest, highest) = len(errors), limits
    if num_groups < 2:
        return Estimate(value=value, n=n)
    span, t = highest - lowest, float(scipy.stats.t.ppf(0.975, num_groups - 1))
    share = (value - lowest) / span
    variance = num_groups / (num_groups - 1) * float((errors**2).sum()) / span**2
    if (
        variance < 1e-12
    ):  # Equal groups prove no certainty: as many others as Wilson allows for 0 of them may be anywhere.
        others = t**2 / (num_groups + t**2)
        return Estimate(
            value=value, n=n, low=value - others * (value - lowest), high=value + others * (highest - value)
        )
    cases = share * (1 - share) / variance
    centre = (share + t**2 / (2 * cases)) / (1 + t**2 / cases)
    half = t / (1 + t**2 / cases) * math.sqrt(share * (1 - share) / cases + (t / (2 * cases)) ** 2)
    low, high = (lowest + span * x for x in (centre - half, centre + half))
    return Estimate(value=value, n=n, low=max(lowest, low), high=min(highest, high))
