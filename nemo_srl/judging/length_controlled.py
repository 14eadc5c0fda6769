"""The win rate that model a would have if the answers of both models were equally long.

It is the length-controlled win rate of AlpacaEval (Dubois et al. 2024, arXiv 2404.04475). A logistic regression
explains the outcome of a question by the models and by their lengths:

    logit p(a wins) = quality + weight * tanh(difference in length / its standard deviation)

The win rate is that of the difference 0. `alpaca_eval` calls this model `length_controlled_minimal`. Its default has
two more terms: the difficulty of each question, from judgements on many models, and a baseline that was asked to be
short or long, with a weight of 20%. Both are published for AlpacaEval's questions alone, so they are left out.
`alpaca_eval` also penalises all weights, which pulls the win rate towards 50%. There is no penalty here.

If one model is always longer, quality and length cannot be told apart: any win rate may be that of equal length. The
interval says so. It has all qualities that the outcomes do not contradict (profile likelihood), so it is right for few
questions, and for models that win all of them. Where it is wide, there is no value.

Not covered: other reasons of a judge to prefer long answers, such as what they contain.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import scipy

from nemo_srl.judging.intervals import Estimate

MAX_WIDTH = 0.5
"""An estimate whose interval is wider has no value. It would say little more than nothing."""
_BOUND = 30.0
"""Limit of both weights. exp(-30) is no probability that an experiment could tell from 0."""


def length_controlled(outcomes: Sequence[tuple[float, int]]) -> Estimate:
    """The win rate at equal length, with its 95% interval.

    `outcomes` has the outcome of each question (1, 0, or 0.5 for a tie) and the length of a's answer minus that of b's.

    `value` is None if the outcomes do not identify it. Then `low` and `high` say what is possible. All are None without
    any outcome.
    """
    if not outcomes:
        return Estimate()
    y, difference = np.array(outcomes, dtype=np.float64).T
    deviation = float(difference.std(ddof=1)) if len(y) > 1 else 0.0
    x = np.tanh(difference / deviation) if deviation > 0 else np.sign(difference)

    def loss(quality: float, weight: float) -> float:
        """Minus the log-likelihood."""
        logits = quality + weight * x
        return float((np.logaddexp(0, logits) - y * logits).sum())

    def profile(quality: float) -> float:
        """The least loss of all weights of the length."""
        return float(_minimum(lambda weight: loss(quality, weight))[1])

    best, least = _minimum(profile)
    most = least + scipy.stats.chi2.ppf(0.95, df=1) / 2

    def end(bound: float) -> float:
        """Where the loss becomes too high on the way to `bound`."""
        if profile(bound) <= most:
            return bound
        return float(scipy.optimize.brentq(lambda quality: profile(quality) - most, best, bound, xtol=1e-4))

    low, value, high = (float(scipy.special.expit(q)) for q in (end(-_BOUND), best, end(_BOUND)))
    return Estimate(value=value if high - low <= MAX_WIDTH else None, n=len(outcomes), low=low, high=high)


def _minimum(f: Callable[[float], float]) -> tuple[float, float]:
    """Where a convex function is least between the bounds, and its value there."""
    found = scipy.optimize.minimize_scalar(f, bounds=(-_BOUND, _BOUND), method="bounded", options={"xatol": 1e-6})
    return float(found.x), float(found.fun)
