"""Head to head: a judge compares two models' answers to the same questions (paper section 3.2.1).

Each pair of answers is judged in both orders. A model wins a question if it wins in both orders. All other questions
with readable verdicts are ties, as in the paper. The settings of `judge` say how the input `judge` judges, and
`judge.pairwise_rubric` is its prompt. Only first turns are compared. The verdicts are published as a part.

    win_rate, tie_rate, loss_rate   of model a, over the questions judged in both orders, with 95% intervals
    sign_test_p                     probability of so uneven wins and losses if no model is better; ties are left out
    first_position_rate             share of verdicts for the answer that stood first; far from 0.5: position bias
    length_controlled_win_rate      win rate if both models' answers were equally long; ties count half
    unjudged_rate                   share of questions without a readable verdict in one of the orders
    unanswered_rate                 share of questions that one of the models did not answer, if any

Such a question is not judged. All other metrics are over the questions that both models answered.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from nemo_srl.errors import DataError
from nemo_srl.judging.agreement import proportion, sign_test
from nemo_srl.judging.pairwise import check_rubric
from nemo_srl.records import Candidate, Comparison, Metric
from nemo_srl.stages.base import CHAT, Context, Made, Need, figures, settings_of, table_stage
from nemo_srl.stages.calls import open_caller
from nemo_srl.stages.unanswered import missing_rate

_MIN_FOR_LENGTH_CONTROL = 10


@dataclass(frozen=True, kw_only=True)
class Match:
    """One question: the share of verdicts for model a when it stood first, and when it stood second."""

    first: float | None
    second: float | None
    length_difference: int
    """Characters of a's answer minus those of b's."""
    is_answered: bool = True
    """Whether both models answered it."""

    @property
    def outcome(self) -> float | None:
        """1 if model a won, 0 if it lost, 0.5 for a tie. None without a verdict in both orders."""
        if self.first is None or self.second is None:
            return None
        won, lost = self.first > 0.5 and self.second > 0.5, self.first < 0.5 and self.second < 0.5
        return 1.0 if won else 0.0 if lost else 0.5


def metrics_of(matches: Sequence[Match]) -> list[Metric]:
    """The metrics that the module's docstring lists."""
    num_questions, matches = len(matches), [m for m in matches if m.is_answered]
    found = [(m.outcome, m.length_difference) for m in matches]
    outcomes = [x for x, _ in found if x is not None]
    named = {"win_rate": 1.0, "tie_rate": 0.5, "loss_rate": 0.0}
    rates = [proportion(outcomes.count(value), len(outcomes)).named(name) for name, value in named.items()]
    firsts = [x for m in matches for x in (m.first, None if m.second is None else 1 - m.second) if x is not None]
    wins, losses = outcomes.count(1.0), outcomes.count(0.0)
    adjusted = length_controlled([(x, d) for x, d in found if x is not None])
    return [
        *rates,
        Metric(name="sign_test_p", value=sign_test(wins, losses), n=wins + losses),
        Metric(name="first_position_rate", value=float(np.mean(firsts)) if firsts else None, n=len(firsts)),
        Metric(name="length_controlled_win_rate", value=adjusted, n=len(outcomes)),
        proportion(len(matches) - len(outcomes), len(matches)).named("unjudged_rate"),
        *missing_rate("unanswered_rate", num_questions - len(matches), num_questions),
    ]


def length_controlled(outcomes: Sequence[tuple[float, int]]) -> float | None:
    """Win rate at equal length, from a logistic regression of (outcome, length difference).

    The idea and the regressor, tanh(difference / its deviation), are those of length-controlled AlpacaEval (Dubois et
    al. 2024, section 3). Its term for the difficulty of questions is left out, because it needs many models. A weak
    ridge penalty on the weight of the length keeps the fit finite. None for too few questions.
    """
    if len(outcomes) < _MIN_FOR_LENGTH_CONTROL:
        return None
    y, difference = np.array(outcomes, dtype=np.float64).T
    deviation = float(difference.std())
    if deviation == 0:
        return float(y.mean())
    x = np.stack([np.ones_like(y), np.tanh(difference / deviation)], axis=1)
    # One half win and one half loss at equal length keep the fit finite, even if one model wins every question.
    x, y = np.vstack([x, [[1.0, 0.0], [1.0, 0.0]]]), np.append(y, [0.0, 1.0])
    case_weights = np.append(np.ones(len(y) - 2), [0.5, 0.5])
    weights, ridge = np.zeros(2), np.diag([0.0, 0.1])
    for _ in range(50):  # Newton's method; the problem is convex and has two unknowns
        p = 1 / (1 + np.exp(-x @ weights))
        gradient = x.T @ (case_weights * (y - p)) - ridge @ weights
        hessian = (x * (case_weights * p * (1 - p))[:, None]).T @ x + ridge
        step = np.linalg.solve(hessian, gradient)
        weights = weights + step
        if np.abs(step).max() < 1e-9:
            break
    return float(1 / (1 + np.exp(-weights[0])))


def matches_of(
    a: Mapping[str, Candidate], b: Mapping[str, Candidate], comparisons: Iterable[Comparison]
) -> list[Match]:
    """One match for each question, in the order of `a`."""
    shares: dict[tuple[str, str], list[float]] = defaultdict(list)
    for c in comparisons:
        if c.first_share is not None:
            shares[c.question_id, c.order].append(c.first_share)
    first = {key: fmean(found) for (key, order), found in shares.items() if order == "ab"}
    second = {key: 1 - fmean(found) for (key, order), found in shares.items() if order == "ba"}
    return [
        Match(
            first=first.get(key),
            second=second.get(key),
            length_difference=len(a[key].response) - len(b[key].response),
            is_answered=a[key].is_answered and b[key].is_answered,
        )
        for key in a
    ]


def run(ctx: Context) -> Made[Metric]:
    cfg = ctx.cfg
    check_rubric(cfg.judge)
    a, b = ({c.prompt_id: c for c in ctx.read(name, Candidate) if c.sample_index == 0} for name in ("a", "b"))
    if a.keys() != b.keys():
        raise DataError(
            f"a and b answer different questions: {len(a.keys() ^ b.keys())} of them are in only one input. Give "
            "both models' answers to the same questions."
        )
    both = [key for key in a if a[key].is_answered and b[key].is_answered]
    material = {key: (a[key].prompt, a[key].response, b[key].response) for key in both}
    with open_caller(ctx) as caller:
        comparisons = caller.judge.compare(material, title="head to head")
    metrics = metrics_of(matches_of(a, b, comparisons))
    return Made(metrics, {**figures(metrics), **caller.figures()}, {"verdicts": comparisons})


STAGE = table_stage(
    "head_to_head",
    Metric,
    run,
    version=2,  # what counts as the score of a verdict (nemo_srl/judging/form.py)
    needs={"judge": Need(None, formerly="policy"), "a": Candidate, "b": Candidate},
    settings=(*settings_of("judge"), *CHAT, "seed"),
    engines=("judge",),
    model="judge",
)
