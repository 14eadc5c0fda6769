"""How well a judge's scores agree with people's (paper section 3.2.2), and how its scores are spread.

The unit is a group: all responses to one instruction, each with a human and a model score. Every figure comes with its
number of cases and a 95% interval. The responses to one instruction are not independent, so the intervals are those of
a bootstrap that resamples groups; a share of independent cases has Wilson's interval (`proportion`). A response whose
verdict has no score (None) counts in `parse_failure_rate` only; it is never a zero.

Not covered: which human scores are right. A higher human score means a better response, and responses that people
score equally are in no order.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy  # loads scipy.stats when it is first used, which takes a third of a second

from nemo_srl.errors import DataError
from nemo_srl.records import Metric

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
                "every response, and None for a model score that is missing"
            )
        if not all(math.isfinite(score) for score in [*self.human, *self.model] if score is not None):
            raise DataError(f"a group has a score that is no number: {self}; give None for a missing score")


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A figure over `n` cases, with its 95% interval. None: no case, or for a bootstrap interval, only one group."""

    value: float | None = None
    n: int = 0
    low: float | None = None
    high: float | None = None

    def named(self, name: str) -> Metric:
        return Metric(name=name, value=self.value, n=self.n, low=self.low, high=self.high)


def reward_model_metrics(
    groups: Sequence[ScoreGroup], *, max_score: float, num_bootstrap: int = 1000, seed: int = 0
) -> dict[str, Estimate]:
    """Agreement of the judge with people over `groups`; `max_score` is the judge's highest possible score.

    A pair is two scored responses of one group to which people give different scores. The paper does not say how it
    counts pairs that the model ties, so all three ways are here. Ties have their mean rank in rank correlations.

    pairwise_accuracy             share of the pairs that the model orders as people do; n: pairs that it does not tie
    pairwise_accuracy_ties_half   the same, a tie of the model counting one half; n: all pairs
    pairwise_accuracy_ties_wrong  the same, a tie of the model counting as wrong; n: all pairs
    tie_rate                      share of the pairs that the model ties; n: all pairs
    exact_match                   share of the groups whose whole order is the same, with its ties; n: groups that
                                  people order and whose responses all have a model score. The interval is Wilson's.
    five_best                     share of the responses with the highest possible score that people rank first, or tied
                                  for first; n: the responses with that score, in groups that people order
    spearman                      mean over groups of the rank correlation; n: groups whose scored responses have at
                                  least two different human scores and two different model scores
    kendall                       mean over groups of Kendall's tau-b; n: the same groups
    parse_failure_rate            share of the responses without a model score; n: all responses

    The bootstrap's intervals are percentiles (2.5, 97.5) over `num_bootstrap` resamples of the groups. All metrics
    share the resamples, which `seed` decides.
    """
    names = list(_addends(ScoreGroup(human=(), model=()), max_score))
    addends = np.array([list(_addends(group, max_score).values()) for group in groups]).reshape(-1, len(names), 2)
    found = dict(zip(names, _estimates(addends, num_bootstrap=num_bootstrap, seed=seed), strict=True))
    # Here a group is one case, so the cases are independent. A bootstrap of 0 hits in 8 would say [0, 0].
    hits, n = addends[:, names.index("exact_match")].sum(axis=0)
    return found | {"exact_match": proportion(round(hits), round(n))}


def proportion(hits: int, n: int) -> Estimate:
    """Share of `hits` in `n` independent cases, with the interval of Wilson's score."""
    if n == 0:
        return Estimate()
    low, high = scipy.stats.binomtest(hits, n).proportion_ci(method="wilson")
    return Estimate(value=hits / n, n=n, low=float(low), high=float(high))


def sign_test(wins: int, losses: int) -> float | None:
    """Exact two-sided p-value of the sign test; None without any win or loss."""
    return float(scipy.stats.binomtest(wins, wins + losses).pvalue) if wins + losses else None


def mean_estimate(groups: Sequence[Sequence[float]], *, num_bootstrap: int = 1000, seed: int = 0) -> Estimate:
    """Mean of all values, with a bootstrap interval that resamples groups of values that depend on each other."""
    addends = np.array([(sum(group), len(group)) for group in groups], dtype=np.float64).reshape(-1, 1, 2)
    return _estimates(addends, num_bootstrap=num_bootstrap, seed=seed)[0]


def histogram(scores: Sequence[float | None], *, max_score: int) -> tuple[int, ...]:
    """How many scores round to 0, 1, .. `max_score`; a half is rounded up. None is not counted."""
    there = [score for score in scores if score is not None]
    if outside := [score for score in there if not 0 <= score <= max_score]:
        raise DataError(f"score {outside[0]}: the scale goes from 0 to {max_score} (judge.max_score)")
    counts = Counter(math.floor(score + 0.5) for score in there)
    return tuple(counts[k] for k in range(max_score + 1))


def score_entropy(scores: Sequence[float | None], *, max_score: int) -> float | None:
    """Entropy of the histogram, divided by that of a uniform one. 0: always the same score; 1: all equally often.

    None without any score. It falls when a judge begins to give everything one score, before the pairs run out.
    """
    counts = [count for count in histogram(scores, max_score=max_score) if count]
    total = sum(counts)
    return sum(count / total * math.log(total / count) for count in counts) / math.log(max_score + 1) if total else None


def _addends(group: ScoreGroup, max_score: float) -> dict[str, tuple[float, float]]:
    """(numerator, number of cases) of one group for each metric."""
    human_all = np.array(group.human, dtype=np.float64)
    scored = np.array([score is not None for score in group.model], dtype=bool)
    human = human_all[scored]
    model = np.array([score for score in group.model if score is not None], dtype=np.float64)
    # Which response of each pair is better: 1: the first, -1: the second, 0: neither.
    first, second = np.triu_indices(len(human), k=1)
    by_human = np.sign(human[first] - human[second])
    by_model = np.sign(model[first] - model[second])

    ordered = by_human != 0
    num_pairs, num_right = ordered.sum(), (ordered & (by_model == by_human)).sum()
    num_ties = (ordered & (by_model == 0)).sum()
    people_order = len(set(group.human)) > 1
    whole = people_order and bool(scored.all())
    best = model >= max_score if people_order else np.zeros(len(model), dtype=bool)
    correlated = bool(ordered.any() and by_model.any())
    five_best = int((best & (human == human_all.max(initial=-np.inf))).sum())
    spearman = float(scipy.stats.spearmanr(human, model).statistic) if correlated else 0
    kendall = float(scipy.stats.kendalltau(human, model, variant="b").statistic) if correlated else 0
    return {
        "pairwise_accuracy": (num_right, num_pairs - num_ties),
        "pairwise_accuracy_ties_half": (num_right + num_ties / 2, num_pairs),
        "pairwise_accuracy_ties_wrong": (num_right, num_pairs),
        "tie_rate": (num_ties, num_pairs),
        "exact_match": (whole and np.array_equal(by_human, by_model), whole),
        "five_best": (five_best, int(best.sum())),
        "spearman": (spearman, correlated),
        "kendall": (kendall, correlated),
        "parse_failure_rate": (int((~scored).sum()), len(scored)),
    }


def _estimates(addends: _Floats, *, num_bootstrap: int, seed: int) -> list[Estimate]:
    """The ratio of two sums over groups for each metric; `addends` has shape (group, metric, 2).

    The lower sum counts cases. The intervals come from sums over groups that are drawn with replacement.
    """
    num_groups, rng = len(addends), np.random.default_rng(seed)
    resampled = np.zeros((num_bootstrap, *addends.shape[1:]))
    for i in range(num_bootstrap if num_groups else 0):
        times_drawn = np.bincount(rng.integers(num_groups, size=num_groups), minlength=num_groups)
        resampled[i] = np.tensordot(times_drawn, addends, axes=1)
    return [_estimate(addends[:, i], resampled[:, i]) for i in range(addends.shape[1])]


def _estimate(addends: _Floats, resampled: _Floats) -> Estimate:
    """Ratio of sums; `addends` has shape (group, 2), `resampled` (num_bootstrap, 2)."""
    total, num_cases = addends.sum(axis=0)
    if not num_cases:
        return Estimate()
    value, n = float(total / num_cases), round(num_cases)
    usable = resampled[resampled[:, 1] > 0]
    if np.count_nonzero(addends[:, 1]) < 2 or not len(usable):
        return Estimate(value=value, n=n)
    low, high = np.percentile(usable[:, 0] / usable[:, 1], [2.5, 97.5])
    return Estimate(value=value, n=n, low=float(low), high=float(high))
