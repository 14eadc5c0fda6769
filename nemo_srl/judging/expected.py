"""The score of one verdict on one answer: what the judge states, or what it would state on average (`judge.mode`).

The sampled score is the paper's. The expected one is sum k p(k) over the points k = 0..max that could stand
where the verdict states its score, p from the judge's log-probabilities there, renormalised: one verdict
then tells 3.9 from 3.1, where sampling tells 4 from 3. It depends on the verdict's text up to there, so several
verdicts are still worth their mean. `coverage` is the probability before renormalising: when it is
low, the judge had something else in mind than points.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from nemo_srl.config import JudgeConfig
from nemo_srl.judging import verdicts
from nemo_srl.records import Completion, NumberLogprobs


@dataclass(frozen=True)
class Score:
    """`value` is None for a verdict without a score; `coverage` is there for an expected one only."""

    value: float | None
    coverage: float | None = None


def score_of(completion: Completion, cfg: JudgeConfig) -> Score:
    """The score of one verdict, by `judge.mode`."""
    stated = verdicts.parse_score(_as_it_ended(completion), max_score=cfg.max_score)
    if cfg.mode != "expected" or stated is None:
        return Score(stated)
    return expected_score(completion.text, completion.number_logprobs or [], max_score=cfg.max_score)


def _as_it_ended(c: Completion) -> str:
    """The verdict, with a mark where it was cut off: `Score: 4` may have been going to be `Score: 4.5`."""
    return c.text if c.finish_reason == "stop" else c.text + "\u2026"


def expected_score(verdict: str, number_logprobs: NumberLogprobs, *, max_score: int) -> Score:
    """The expectation over points at the place of `verdict` where its score stands; empty if it cannot be told.

    Not covered: points above 9 and fractions; both take several tokens, and only the first one is seen.
    """
    for offset, logprobs in reversed(number_logprobs):
        if _states_the_score(verdict[:offset], max_score=max_score):
            return _expectation(logprobs, max_score=max_score)
    return Score(None)


def _states_the_score(before: str, *, max_score: int) -> bool:
    """Whether a number right after `before` would be read as the score: tried with two of them."""
    return all(verdicts.parse_score(f"{before}{k}", max_score=max_score) == k for k in (0, max_score))


def _expectation(logprobs: Mapping[str, float], *, max_score: int) -> Score:
    points: dict[int, float] = {}
    for token, logprob in logprobs.items():
        if (k := int(token.strip())) <= max_score:  # " 4" and "4" are two tokens for one thing
            points[k] = points.get(k, 0.0) + math.exp(logprob)
    coverage = sum(points.values())
    if coverage == 0:
        return Score(None, 0.0)
    return Score(sum(k * p for k, p in points.items()) / coverage, min(coverage, 1.0))
