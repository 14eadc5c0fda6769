"""Expected points (`judge.mode=expected`): the mean over all points that the judge could have stated.

The score is sum k p(k) over the points k = 0..max. p are the judge's probabilities at the place where the verdict
states its score, renormalised. So one verdict tells 3.9 from 3.1, where a sampled score tells 4 from 3. The score
depends on the verdict's text up to that place, so the mean over several verdicts is still better than one of them.
`coverage` is the sum of p before it is renormalised. When it is low, the judge was likely to say something else there
than points.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from nemo_srl.judging.points import PointsReader, parse_score, stated_score
from nemo_srl.judging.scores import Score
from nemo_srl.records import Completion, NumberLogprobs

_NUM_LOGPROBS = 20
"""Alternatives that are asked for at each number: as many as servers commonly give."""


def score_of(verdict: Completion, max_score: int) -> Score:
    """The expectation, for a verdict that states a score."""
    stated = stated_score(verdict, max_score)
    if stated.value is None:
        return stated
    return expected_score(verdict.text, verdict.number_logprobs or [], max_score=max_score)


def expected_score(verdict: str, number_logprobs: NumberLogprobs, *, max_score: int) -> Score:
    """The expectation over points at the place where `verdict` states its score; empty if there is no such place.

    Not covered: points above 9 and fractions. Both take several tokens, and only the first one is seen.
    """
    for offset, logprobs in reversed(number_logprobs):
        before = verdict[:offset]
        # The score stands here when any number right after this text would be read as the score. Two are tried.
        if all(parse_score(f"{before}{k}", max_score=max_score) == k for k in (0, max_score)):
            return _expectation(logprobs, max_score=max_score)
    return Score(None)


def _expectation(logprobs: Mapping[str, float], *, max_score: int) -> Score:
    points: dict[int, float] = {}
    for token, logprob in logprobs.items():
        if (k := int(token.strip())) <= max_score:  # " 4" and "4" are two tokens for the same points
            points[k] = points.get(k, 0.0) + math.exp(logprob)
    coverage = sum(points.values())
    if coverage == 0:
        return Score(None, 0.0)
    return Score(sum(k * p for k, p in points.items()) / coverage, min(coverage, 1.0))


EXPECTED = PointsReader(score=score_of, max_digits=1, num_logprobs=_NUM_LOGPROBS)
