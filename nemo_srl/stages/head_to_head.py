"""Head to head: a judge compares two models' answers to the same questions (paper section 3.2.1).

Each pair of answers is judged in both orders. A model wins a question if it wins in both orders. All other questions
with readable verdicts are ties, as in the paper. The settings of `judge` say how the input `judge` judges, and
`judge.pairwise_rubric` is its prompt. Only first turns are compared. The verdicts are published as a part.

One sampled verdict is a throw of dice. So a judge that samples must give `judge.num_judgements` of two or more, whose
mean decides an order; or it is greedy (`judge.temperature=0`). Two figures say how far it agrees with itself.

    win_rate, tie_rate, loss_rate   of model a, over the questions judged in both orders
    sign_test_p                     probability of so uneven wins and losses if no model is better; ties are left out
    order_agreement_rate            share of questions with the same result in both orders; 1/3 by chance
    verdict_agreement_rate          share of pairs of verdicts on one question in one order that agree, if there are any
    first_position_rate             share of verdicts for the answer that stood first; far from 0.5: position bias
    length_controlled_win_rate      win rate if both models' answers were equally long; ties count half. It may have an
                                    interval and no value (`nemo_srl/judging/length_controlled.py`)
    cut_off_rate                    share of questions with an answer that was cut off at `candidates.max_tokens`
    unjudged_rate                   share of questions without a readable verdict in one of the orders
    unanswered_rate                 share of questions that one of the models did not answer, if any

Such a question is not judged. All other metrics are over the questions that both models answered.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from nemo_srl.config import JudgeConfig
from nemo_srl.errors import ConfigError, DataError
from nemo_srl.judging.intervals import SHARE, proportion, ratio, sign_test, sums_of
from nemo_srl.judging.length_controlled import length_controlled
from nemo_srl.judging.pairwise import check_rubric
from nemo_srl.records import Candidate, Comparison, Metric, Order
from nemo_srl.stages.base import CHAT, Context, Made, Need, figures, settings_of, table_stage
from nemo_srl.stages.calls import open_caller
from nemo_srl.stages.unanswered import missing_rate


@dataclass(frozen=True, kw_only=True)
class Match:
    """One question: the share of verdicts for model a when it stood first, and when it stood second."""

    first: float | None
    second: float | None
    length_difference: int
    """Characters of a's answer minus those of b's."""
    is_answered: bool = True
    """Whether both models answered it."""
    is_cut_off: bool = False
    """Whether one of the answers was cut off."""
    repeats: tuple[int, int] = (0, 0)
    """Of the pairs of verdicts in one order: how many agree, and how many there are."""

    @property
    def outcome(self) -> float | None:
        """1 if model a won, 0 if it lost, 0.5 for a tie. None without a verdict in both orders."""
        if self.first is None or self.second is None:
            return None
        won, lost = self.first > 0.5 and self.second > 0.5, self.first < 0.5 and self.second < 0.5
        return 1.0 if won else 0.0 if lost else 0.5

    @property
    def orders_agree(self) -> bool | None:
        """Whether both orders have the same result: the same winner, or a tie. None without a verdict in both."""
        if self.first is None or self.second is None:
            return None
        return bool(np.sign(self.first - 0.5) == np.sign(self.second - 0.5))


def metrics_of(matches: Sequence[Match]) -> list[Metric]:
    """The metrics that the module's docstring lists."""
    num_questions, matches = len(matches), [m for m in matches if m.is_answered]
    found = [(m.outcome, m.length_difference) for m in matches]
    outcomes = [x for x, _ in found if x is not None]
    named = {"win_rate": 1.0, "tie_rate": 0.5, "loss_rate": 0.0}
    rates = [proportion(outcomes.count(value), len(outcomes)).named(name) for name, value in named.items()]
    # The two orders of a question are one group of verdicts.
    firsts = {
        str(i): [x for x in (m.first, None if m.second is None else 1 - m.second) if x is not None]
        for i, m in enumerate(matches)
    }
    repeats = {str(i): (float(m.repeats[0]), float(m.repeats[1])) for i, m in enumerate(matches)}
    wins, losses = outcomes.count(1.0), outcomes.count(0.0)
    agree = [m.orders_agree for m in matches if m.orders_agree is not None]
    adjusted = length_controlled([(x, d) for x, d in found if x is not None])
    return [
        *rates,
        Metric(name="sign_test_p", value=sign_test(wins, losses), n=wins + losses),
        proportion(sum(agree), len(agree)).named("order_agreement_rate"),
        ratio(repeats, SHARE).named("verdict_agreement_rate"),
        ratio(sums_of(firsts), SHARE).named("first_position_rate"),
        adjusted.named("length_controlled_win_rate"),
        proportion(sum(m.is_cut_off for m in matches), len(matches)).named("cut_off_rate"),
        proportion(len(matches) - len(outcomes), len(matches)).named("unjudged_rate"),
        *missing_rate("unanswered_rate", num_questions - len(matches), num_questions),
    ]


def matches_of(
    a: Mapping[str, Candidate], b: Mapping[str, Candidate], comparisons: Iterable[Comparison]
) -> list[Match]:
    """One match for each question, in the order of `a`."""
    shares: dict[tuple[str, Order], list[float]] = defaultdict(list)
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
            is_cut_off="length" in (a[key].finish_reason, b[key].finish_reason),
            repeats=_repeats([shares[key, "ab"], shares[key, "ba"]]),
        )
        for key in a
    ]


def _repeats(orders: Sequence[Sequence[float]]) -> tuple[int, int]:
    """How many pairs of verdicts in one order agree, and how many there are."""
    same = [x == y for verdicts in orders for x, y in itertools.combinations(verdicts, 2)]
    return sum(same), len(same)


def check(cfg: JudgeConfig) -> None:
    """Raises `ConfigError` for a judge that cannot compare two answers, or whose verdicts are chance."""
    check_rubric(cfg)
    if cfg.temperature > 0 and cfg.num_judgements < 2:
        raise ConfigError(
            f"judge.num_judgements={cfg.num_judgements}: with judge.temperature={cfg.temperature}, a single verdict is "
            "partly chance. Set judge.num_judgements=3, or judge.temperature=0 for greedy verdicts."
        )


def run(ctx: Context) -> Made[Metric]:
    cfg = ctx.cfg
    check(cfg.judge)
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
    version=3,  # more figures, and the win rate at equal length (nemo_srl/judging/length_controlled.py)
    needs={"judge": Need(None, formerly="policy"), "a": Candidate, "b": Candidate},
    settings=(*settings_of("judge"), *CHAT, "seed"),
    engines=("judge",),
    model="judge",
)
