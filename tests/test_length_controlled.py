"""The win rate at equal length: what it finds, and what it says where the outcomes cannot tell."""

from __future__ import annotations

import numpy as np
import pytest
import scipy
from scipy.special import expit

from nemo_srl.judging.intervals import Estimate
from nemo_srl.judging.length_controlled import length_controlled

TRUTH = 0.767
QUALITY = float(np.log(TRUTH / (1 - TRUTH)))


def simulated(
    rng: np.random.Generator, n: int, *, longer: float, spread: float, weight: float = 0.8
) -> list[tuple[float, int]]:
    """Outcomes of a judge that likes length, for a model that wins 76.7% of the questions at equal length. Its answers
    are longer by `longer` characters, more or less."""
    difference = rng.normal(longer, spread, n).astype(int)
    p = expit(QUALITY + weight * np.tanh(difference / difference.std(ddof=1)))
    return list(zip((rng.random(n) < p).astype(float).tolist(), difference.tolist(), strict=True))


def covers(e: Estimate) -> bool:
    assert e.low is not None
    assert e.high is not None
    return e.low <= TRUTH <= e.high


def test_a_model_that_is_always_longer_gets_an_interval_that_has_the_truth_and_no_value() -> None:
    rng = np.random.default_rng(0)
    found = [length_controlled(simulated(rng, 400, longer=400, spread=100)) for _ in range(100)]
    assert sum(map(covers, found)) >= 90
    without = [e for e in found if e.value is None]
    assert len(without) >= 80
    assert all((e.high or 0) - (e.low or 0) > 0.5 for e in without)


@pytest.mark.parametrize(("longer", "spread"), [(0, 100), (100, 100), (200, 100)])
def test_where_some_answers_are_shorter_the_truth_is_found(longer: float, spread: float) -> None:
    rng = np.random.default_rng(1)
    found = [length_controlled(simulated(rng, 805, longer=longer, spread=spread)) for _ in range(60)]
    values = [e.value for e in found if e.value is not None]
    assert len(values) >= 50
    assert np.mean(values) == pytest.approx(TRUTH, abs=0.03)
    assert sum(map(covers, found)) >= 54


def test_the_fit_is_that_of_maximum_likelihood() -> None:
    outcomes = simulated(np.random.default_rng(2), 300, longer=80, spread=100)
    y, difference = np.array(outcomes).T
    x = np.tanh(difference / difference.std(ddof=1))

    def loss(weights: tuple[float, float]) -> float:
        p = expit(weights[0] + weights[1] * x)
        return float(-(y * np.log(p) + (1 - y) * np.log(1 - p)).sum())

    found = scipy.optimize.minimize(loss, [0.0, 0.0])
    assert length_controlled(outcomes).value == pytest.approx(expit(found.x[0]), abs=1e-4)


def test_a_judge_that_goes_by_length_alone_gives_no_win_at_equal_length() -> None:
    by_length = [(1.0 if d > 0 else 0.0, d) for d in [*range(1, 80), *range(-20, 0)]]
    e = length_controlled(by_length)
    assert e.value is None or 0.2 < e.value < 0.8
    assert e.low is not None
    assert e.high is not None
    assert e.low < 0.5 < e.high
    no_matter = length_controlled([(float(i % 4 > 0), (-1) ** (i // 4) * 10) for i in range(400)])
    assert no_matter.value == pytest.approx(0.75, abs=0.01)


def test_the_other_model_has_the_rest() -> None:
    outcomes = simulated(np.random.default_rng(3), 200, longer=30, spread=100)
    e, other = length_controlled(outcomes), length_controlled([(1 - y, -d) for y, d in outcomes])
    assert e.value is not None
    assert e.low is not None
    assert e.high is not None
    assert (other.value, other.low, other.high) == pytest.approx((1 - e.value, 1 - e.high, 1 - e.low), abs=1e-4)


def test_extreme_outcomes_have_an_interval() -> None:
    assert length_controlled([]) == Estimate()
    for constant in ([(1.0, 5)] * 9, [(0.5, 7)] * 50):
        e = length_controlled(constant)
        assert e.value is None, "one difference in length says nothing of equal length"
        assert (e.low, e.high) == (pytest.approx(0, abs=1e-6), pytest.approx(1, abs=1e-6))
    same = length_controlled([(1.0, 0), (0.0, 0), (0.5, 0)] * 30)
    assert same.value == pytest.approx(0.5, abs=1e-6)
    assert same.low == pytest.approx(0.4, abs=0.01)
    always = length_controlled([(1.0, (-1) ** i * i) for i in range(60)])
    assert always.value == pytest.approx(1, abs=1e-6)
    assert always.low is not None
    assert 0.8 < always.low < 1
