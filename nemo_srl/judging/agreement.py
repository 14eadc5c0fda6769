"""How well a judge's scores agree with people's (paper section 3.2.2), and how its scores are spread.

The unit is a group: all responses to one instruction, each with a human and a model score. Every figure comes with its
number of cases and a 95% interval (`intervals.py`); the responses to one instruction are not independent. A response
whose verdict has no score (None) counts in `parse_failure_rate` only; it is never a zero.

Not covered: which human scores are right. A higher human score means a better response, and responses that people
score equally are in no order.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import scipy  # loads scipy.stats when it is first used, which takes a third of a second

from nemo_srl.errors import DataError
from nemo_srl.judging.intervals import SHARE, Estimate, Limits, Sums, proportion, ratio

CORRELATION: Limits = (-1.0, 1.0)


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


def reward_model_metrics(groups: Sequence[ScoreGroup], *, max_score: float) -> dict[str, Estimate]:
    """Agreement of the judge with people over `groups`; `max_score` is the judge's highest possible score.

    A pair is two scored responses of one group to which people give different scores. The paper does not say how it
    counts pairs that the model ties, so all three ways are here. Ties have their mean rank in rank correlations.

    pairwise_accuracy             share of the pairs that the model orders as people do; n: pairs that it does not tie
    pairwise_accuracy_ties_half   the same, a tie of the model counting one half; n: all pairs
    pairwise_accuracy_ties_wrong  the same, a tie of the model counting as wrong; n: all pairs
    tie_rate                      share of the pairs that the model ties; n: all pairs
    exact_match                   share of the groups whose whole order is the same, with its ties; n: groups that
                                  people order and whose responses all have a model score
    five_best                     share of the responses with the highest possible score that people rank first, or tied
                                  for first; n: the responses with that score, in groups that people order
    spearman                      mean over groups of the rank correlation; n: groups whose scored responses have at
                                  least two different human scores and two different model scores
    kendall                       mean over groups of Kendall's tau-b; n: the same groups
    parse_failure_rate            share of the responses without a model score; n: all responses
    """
    named = {str(i): group for i, group in enumerate(groups)}
    return estimates_of(reward_model_sums(named, highest=max_score))


def reward_model_sums(groups: Mapping[str, ScoreGroup], *, highest: float) -> dict[str, Sums]:
    """What each group adds to each metric of `reward_model_metrics`, by the group's name.

    A score counts as the highest possible one (`five_best`) from `highest` on. Stated points reach the maximum, and an
    expectation is only rounded to it.
    """
    names = _addends(ScoreGroup(human=(), model=()), highest)
    found = {name: _addends(group, highest) for name, group in groups.items()}
    return {metric: {name: addends[metric] for name, addends in found.items()} for metric in names}


def estimates_of(sums: Mapping[str, Sums]) -> dict[str, Estimate]:
    """The metrics of `reward_model_metrics`, from their sums."""
    correlations = {"spearman", "kendall"}
    found = {name: ratio(s, CORRELATION if name in correlations else SHARE) for name, s in sums.items()}
    # Here a group is one case, so the cases are independent and the interval is the binomial one.
    hits, n = (sum(pair[side] for pair in sums["exact_match"].values()) for side in (0, 1))
    return found | {"exact_match": proportion(round(hits), round(n))}


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


def _addends(group: ScoreGroup, highest: float) -> dict[str, tuple[float, float]]:
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
    best = model >= highest if people_order else np.zeros(len(model), dtype=bool)
    correlated = bool(ordered.any() and by_model.any())
    five_best = (best & (human == human_all.max(initial=-np.inf))).sum()
    spearman = float(scipy.stats.spearmanr(human, model).statistic) if correlated else 0
    kendall = float(scipy.stats.kendalltau(human, model, variant="b").statistic) if correlated else 0
    found = {
        "pairwise_accuracy": (num_right, num_pairs - num_ties),
        "pairwise_accuracy_ties_half": (num_right + num_ties / 2, num_pairs),
        "pairwise_accuracy_ties_wrong": (num_right, num_pairs),
        "tie_rate": (num_ties, num_pairs),
        "exact_match": (whole and np.array_equal(by_human, by_model), whole),
        "five_best": (five_best, best.sum()),
        "spearman": (spearman, correlated),
        "kendall": (kendall, correlated),
        "parse_failure_rate": ((~scored).sum(), len(scored)),
    }
    return {name: (float(total), float(n)) for name, (total, n) in found.items()}
