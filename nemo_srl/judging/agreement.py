"""How well a judge's scores agree with people's (paper section 3.2.2), and how its scores are spread.

The unit is a group: all responses to one instruction, each with a human and a model score. Every figure
comes with the number of cases behind it and a 95% bootstrap interval that resamples groups, as the
responses to one instruction are not independent. A response whose verdict had no score (None) takes
part in nothing but `parse_failure_rate`; it is never a zero.

Not covered: which human scores are right. A higher one is taken to be better, and humans' own ties order
nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nemo_srl.errors import DataError

_Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class ScoreGroup:
    """Responses to one instruction: `human[i]` and `model[i]` are the scores of response i."""

    human: Sequence[float]
    model: Sequence[float | None]

    def __post_init__(self) -> None:
        if len(self.human) != len(self.model):
            raise DataError(
                f"a group has {len(self.human)} human and {len(self.model)} model scores; give one of each for "
                "every response, and None where the model gave no score"
            )
        if not all(math.isfinite(score) for score in [*self.human, *self.model] if score is not None):
            raise DataError(f"a group has a score that is no number: {self}; None stands for a missing one")


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A figure over `n` cases, with its 95% interval. None: no case, or for the interval, one group only."""

    value: float | None
    n: int
    low: float | None
    high: float | None


@dataclass(frozen=True, kw_only=True)
class RewardModelMetrics:
    """Agreement of the judge with people. `dataclasses.asdict` makes JSON of it.

    A pair is two scored responses of one group that people do not score equally. The paper does not say
    how it counts pairs that the model ties, so all three ways are here.
    """

    pairwise_accuracy: Estimate
    """Share of the pairs that the model orders as people do; n: pairs that the model does not tie."""
    pairwise_accuracy_ties_half: Estimate
    """The same, a tie of the model counting one half; n: all pairs."""
    pairwise_accuracy_ties_wrong: Estimate
    """The same, a tie of the model counting as wrong; n: all pairs."""
    tie_rate: Estimate
    """Share of the pairs that the model ties; n: all pairs."""
    exact_match: Estimate
    """Share of the groups whose whole ordering is the same, ties included: tied where people tie, and
    nowhere else. n: groups that people order and whose responses all have a model score."""
    five_best: Estimate
    """Of the responses with the model's highest possible score, the share that people rank first, or tied
    for first; n: these responses, in groups that people order."""
    spearman: Estimate
    """Mean over groups of the rank correlation, ties at their mean rank; n: groups with at least two
    scored responses and more than one value on either side."""
    kendall: Estimate
    """Mean over groups of Kendall's tau-b; n: the same groups."""
    parse_failure_rate: Estimate
    """Share of the responses without a model score; n: all responses."""


def reward_model_metrics(
    groups: Sequence[ScoreGroup], *, max_score: float, num_bootstrap: int = 1000, seed: int = 0
) -> RewardModelMetrics:
    """Every metric over the same `groups`; `max_score` is the judge's highest possible score.

    The intervals are percentiles (2.5, 97.5) over `num_bootstrap` resamples of the groups, the same
    resamples for every metric; `seed` decides them.
    """
    names = list(RewardModelMetrics.__dataclass_fields__)
    # Each metric is a ratio of two sums over groups, of which a group has one addend each; the lower sum
    # counts cases. Shape (group, metric, 2).
    addends = np.array([_addends(group, max_score) for group in groups]).reshape(-1, len(names), 2)
    resampled = _resampled_sums(addends, num_bootstrap=num_bootstrap, seed=seed)
    return RewardModelMetrics(**{name: _estimate(addends[:, i], resampled[:, i]) for i, name in enumerate(names)})


def mean_estimate(groups: Sequence[Sequence[float]], *, num_bootstrap: int = 1000, seed: int = 0) -> Estimate:
    """Mean of all values, with an interval that resamples groups of values that belong together."""
    addends = np.array([(sum(group), len(group)) for group in groups], dtype=np.float64).reshape(-1, 1, 2)
    resampled = _resampled_sums(addends, num_bootstrap=num_bootstrap, seed=seed)
    return _estimate(addends[:, 0], resampled[:, 0])


def histogram(scores: Sequence[float | None], *, max_score: int) -> tuple[int, ...]:
    """How many scores round to 0, 1, .. `max_score` (halves go up). None is not counted."""
    counts = [0] * (max_score + 1)
    for score in scores:
        if score is None:
            continue
        if not 0 <= score <= max_score:
            raise DataError(f"score {score}: the scale goes from 0 to {max_score} (judge.max_score)")
        counts[math.floor(score + 0.5)] += 1
    return tuple(counts)


def score_entropy(scores: Sequence[float | None], *, max_score: int) -> float | None:
    """Entropy of the histogram over that of an even one: 0, always the same score; 1, all equally often.

    None without any score. A judge that "always says 5" shows here before the pairs run out.
    """
    counts = [count for count in histogram(scores, max_score=max_score) if count]
    total = sum(counts)
    if not total:
        return None
    entropy = sum(count / total * math.log(total / count) for count in counts)
    return entropy / math.log(max_score + 1)


def _addends(group: ScoreGroup, max_score: float) -> list[tuple[float, float]]:
    """(numerator, number of cases) of one group, in the order of `RewardModelMetrics`."""
    human_all = np.array(group.human, dtype=np.float64)
    scored = np.array([score is not None for score in group.model], dtype=bool)
    human = human_all[scored]
    model = np.array([score for score in group.model if score is not None], dtype=np.float64)
    # Which response of each pair is better: 1 the first, -1 the second, 0 neither.
    first, second = np.triu_indices(len(human), k=1)
    by_human = np.sign(human[first] - human[second])
    by_model = np.sign(model[first] - model[second])

    ordered = by_human != 0
    num_pairs = int(ordered.sum())
    num_right = int((ordered & (by_model == by_human)).sum())
    num_ties = int((ordered & (by_model == 0)).sum())
    people_order = len(set(group.human)) > 1
    whole = people_order and bool(scored.all())
    best = model >= max_score if people_order else np.zeros(len(model), dtype=bool)
    correlated = bool(ordered.any() and by_model.any())
    return [
        (num_right, num_pairs - num_ties),
        (num_right + num_ties / 2, num_pairs),
        (num_right, num_pairs),
        (num_ties, num_pairs),
        (bool(np.array_equal(by_human, by_model)) if whole else 0, whole),
        (int((best & (human == human_all.max(initial=-np.inf))).sum()), int(best.sum())),
        (float(np.corrcoef(_ranks(human), _ranks(model))[0, 1]) if correlated else 0, correlated),
        (_kendall_tau_b(by_human, by_model) if correlated else 0, correlated),
        (int((~scored).sum()), len(scored)),
    ]


def _ranks(values: _Floats) -> _Floats:
    """Ranks from 1; equal values share the mean of theirs."""
    below = (values[:, None] > values).sum(axis=1)
    equal = (values[:, None] == values).sum(axis=1)
    ranks: _Floats = below + (equal + 1) / 2
    return ranks


def _kendall_tau_b(by_human: _Floats, by_model: _Floats) -> float:
    """Concordant less discordant pairs, over the geometric mean of the pairs that each side orders."""
    orders = np.count_nonzero(by_human) * np.count_nonzero(by_model)
    return float((by_human * by_model).sum() / math.sqrt(orders))


def _resampled_sums(addends: _Floats, *, num_bootstrap: int, seed: int) -> _Floats:
    """Sums over groups drawn with replacement: shape (num_bootstrap, metric, 2)."""
    num_groups, rng = len(addends), np.random.default_rng(seed)
    sums = np.zeros((num_bootstrap, *addends.shape[1:]))
    for i in range(num_bootstrap if num_groups else 0):
        times_drawn = np.bincount(rng.integers(num_groups, size=num_groups), minlength=num_groups)
        sums[i] = np.tensordot(times_drawn, addends, axes=1)
    return sums


def _estimate(addends: _Floats, resampled: _Floats) -> Estimate:
    """Ratio of sums; `addends` has shape (group, 2), `resampled` (num_bootstrap, 2)."""
    total, num_cases = addends.sum(axis=0)
    if not num_cases:
        return Estimate(value=None, n=0, low=None, high=None)
    value, n = float(total / num_cases), round(num_cases)
    usable = resampled[resampled[:, 1] > 0]
    if np.count_nonzero(addends[:, 1]) < 2 or not len(usable):
        return Estimate(value=value, n=n, low=None, high=None)
    low, high = np.percentile(usable[:, 0] / usable[:, 1], [2.5, 97.5])
    return Estimate(value=value, n=n, low=float(low), high=float(high))
