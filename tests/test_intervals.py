"""Intervals of few groups: coverage in simulations, their ends, and paired changes on the same items."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats

from nemo_srl.judging.intervals import (
    SHARE,
    Estimate,
    Sums,
    paired_change,
    proportion,
    ratio,
    rows_of,
    sign_test,
    sums_in,
    sums_of,
)

NOTHING = Estimate()


def covered(estimate: Estimate, truth: float) -> bool:
    assert estimate.low is not None
    assert estimate.high is not None
    return estimate.low <= truth <= estimate.high


@pytest.mark.parametrize(("hits", "n"), [(0, 8), (8, 8), (3, 8), (1, 2), (137, 541)])
def test_a_proportion_has_the_exact_interval(hits: int, n: int) -> None:
    """With a share at an end of it, a sample that is so far away has the probability 2.5%."""
    e = proportion(hits, n)
    assert e.low is not None
    assert e.high is not None
    assert (e.value, e.n) == (hits / n, n)
    assert e.low == 0 if hits == 0 else at_most(n - hits, n, 1 - e.low) == pytest.approx(0.025, rel=1e-6)
    assert e.high == 1 if hits == n else at_most(hits, n, e.high) == pytest.approx(0.025, rel=1e-6)
    assert 0 <= e.low <= hits / n <= e.high <= 1
    assert proportion(0, 0) == NOTHING


def at_most(hits: int, n: int, share: float) -> float:
    return sum(math.comb(n, k) * share**k * (1 - share) ** (n - k) for k in range(hits + 1))


@pytest.mark.parametrize(("wins", "losses"), [(0, 1), (6, 1), (1, 6), (5, 5), (40, 60), (300, 200)])
def test_the_sign_test_is_exact(wins: int, losses: int) -> None:
    n = wins + losses
    tail = sum(math.comb(n, k) for k in range(min(wins, losses) + 1)) / 2**n
    assert sign_test(wins, losses) == pytest.approx(min(1.0, 2 * tail), abs=1e-12)
    assert sign_test(0, 0) is None


def test_a_ratio_has_the_standard_error_of_its_groups() -> None:
    """Many groups of one case have nearly the exact interval. Of equal sizes, they have the error of their means."""
    e, known = ratio({str(i): (float(i % 5 < 3), 1.0) for i in range(4000)}, SHARE), proportion(2400, 4000)
    assert (e.value, e.n) == (known.value, known.n)
    assert (e.low, e.high) == (pytest.approx(known.low, abs=3e-4), pytest.approx(known.high, abs=3e-4))
    rng = np.random.default_rng(0)
    means = rng.normal(2.5, 0.4, 400)
    e = ratio({str(i): (4 * m, 4.0) for i, m in enumerate(means)}, (0.0, 5.0))
    low, high = scipy.stats.t.interval(0.95, 399, loc=means.mean(), scale=scipy.stats.sem(means))
    assert (e.value, e.n) == (pytest.approx(means.mean()), 1600)
    assert (e.low, e.high) == (pytest.approx(low, abs=1e-3), pytest.approx(high, abs=1e-3))


@pytest.mark.parametrize(("num_groups", "skill"), [(4, 2.0), (8, 0.2), (8, 2.0), (20, 2.0)])
def test_intervals_of_few_dependent_groups_cover_the_truth(num_groups: int, skill: float) -> None:
    """Each group has its own share of right pairs, 15 pairs each."""
    rng = np.random.default_rng(1)
    shares = rng.beta(4 * skill, 4, size=(2000, num_groups))
    truth, hits = skill / (skill + 1), rng.binomial(15, shares)
    found = [ratio({str(i): (float(h), 15.0) for i, h in enumerate(row)}, SHARE) for row in hits]
    assert 0.935 <= np.mean([covered(e, truth) for e in found]) <= 0.985
    for e in found:
        assert e.low is not None
        assert e.high is not None
        assert 0 <= e.low < e.high <= 1


def test_scores_near_the_end_of_their_scale_are_covered_and_stay_on_it() -> None:
    rng = np.random.default_rng(2)

    def sums(num_groups: int) -> Sums:
        level = rng.normal(4.6, 0.6, size=(num_groups, 1))
        values = np.clip(np.round(level + rng.normal(0, 0.8, size=(num_groups, 4))), 0, 5)
        return sums_of({str(i): list(map(float, row)) for i, row in enumerate(values)})

    truth = ratio(sums(20_000), (0.0, 5.0)).value
    assert truth is not None
    found = [ratio(sums(8), (0.0, 5.0)) for _ in range(1500)]
    assert 0.935 <= np.mean([covered(e, truth) for e in found]) <= 0.985
    assert max(e.high or 0 for e in found) <= 5


def test_equal_groups_are_no_certainty() -> None:
    """0 of 8 groups are others, so up to 41% of all groups may be (Wilson's bound, with t)."""
    t = scipy.stats.t.ppf(0.975, 7)
    others = t**2 / (8 + t**2)
    assert others == pytest.approx(0.41, abs=0.01)
    for value in (0.0, 0.5, 1.0):
        e = ratio({str(i): (3 * value, 3.0) for i in range(8)}, SHARE)
        assert e.value == value
        assert (e.low, e.high) == pytest.approx((value - others * value, value + others * (1 - value)))
    same = {str(i): (float(i), 8.0) for i in range(8)}
    e = paired_change(same, same, SHARE)
    assert (e.value, e.low, e.high) == pytest.approx((0, -others, others))


def test_one_group_or_none_has_no_interval() -> None:
    assert ratio({}, SHARE) == ratio({"a": (0.0, 0.0)}, SHARE) == NOTHING
    assert ratio({"a": (1.0, 4.0), "b": (0.0, 0.0)}, SHARE) == Estimate(value=0.25, n=4)
    assert paired_change({"a": (1.0, 1.0)}, {"b": (1.0, 1.0)}, SHARE) == NOTHING
    assert paired_change({"a": (1.0, 2.0)}, {"a": (2.0, 2.0)}, SHARE) == Estimate(value=0.5, n=1)


def test_a_paired_change_is_seen_where_unpaired_intervals_overlap() -> None:
    """Items differ much more than the two models do: 40 items, each a tenth better."""
    before = {str(i): (float(i % 10), 10.0) for i in range(40)}
    after = {k: (total + 1 - (int(k) % 4 == 0), n) for k, (total, n) in before.items()}
    change = paired_change(before, after, SHARE)
    assert change.value == pytest.approx(0.075)
    assert change.n == 40
    assert change.low is not None
    assert change.low > 0.05
    a, b = ratio(before, SHARE), ratio(after, SHARE)
    assert a.high is not None
    assert b.low is not None
    assert a.high > b.low, "the two intervals overlap"
    back = paired_change(after, before, SHARE)
    assert (back.value, back.low, back.high) == pytest.approx((-0.075, -(change.high or 0), -(change.low or 0)))


def test_only_items_of_both_models_are_compared() -> None:
    before: Sums = {"a": (1.0, 2.0), "b": (0.0, 2.0), "only": (9.0, 9.0), "empty": (1.0, 1.0)}
    after: Sums = {"a": (2.0, 2.0), "b": (1.0, 2.0), "new": (0.0, 9.0), "empty": (0.0, 0.0)}
    change = paired_change(before, after, SHARE)
    assert (change.value, change.n) == (0.5, 2)
    assert change.low is not None
    assert change.low < 0.5, "two equal differences prove no certainty"


@pytest.mark.parametrize("num_groups", [8, 20])
def test_paired_changes_cover_the_truth(num_groups: int) -> None:
    rng = np.random.default_rng(3)
    found = []
    for _ in range(1500):
        level = rng.beta(6, 3, num_groups)
        effect = np.clip(level + rng.choice([-0.1, 0.0, 0.1, 0.2], num_groups), 0, 1) - level
        truth_of_draw = rng.binomial(15, level), rng.binomial(15, level + effect)
        before, after = ({str(i): (float(h), 15.0) for i, h in enumerate(hits)} for hits in truth_of_draw)
        found.append(paired_change(before, after, SHARE))
    many = rng.beta(6, 3, 200_000)
    truth = float((np.clip(many + rng.choice([-0.1, 0.0, 0.1, 0.2], 200_000), 0, 1) - many).mean())
    assert 0.935 <= np.mean([covered(e, truth) for e in found]) <= 0.97


def test_sums_come_back_from_their_records() -> None:
    sums = {"accuracy": {"Name a prime.": (1.5, 3.0), "Sing.": (0.0, 0.0)}, "score": {"Sing.": (7.0, 2.0)}}
    rows = rows_of(sums)
    assert [row.key for row in rows] == ["accuracy/Name a prime.", "score/Sing."]
    assert sums_in(rows) == {"accuracy": {"Name a prime.": (1.5, 3.0)}, "score": {"Sing.": (7.0, 2.0)}}
