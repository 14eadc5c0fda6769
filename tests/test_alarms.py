"""Each alarm speaks for its own reason, and a healthy run is silent."""

from __future__ import annotations

import itertools
import random

import pytest

from nemo_srl.config import JudgeConfig
from nemo_srl.judging import mean_scores
from nemo_srl.records import Candidate, Judgement, Metric, PreferencePair
from nemo_srl.report.alarms import alarms
from nemo_srl.stages.anchor import compare, spread

HEALTHY = {
    "anchor_agreement": 0.95,
    "own_margin": 2.2,
    "anchor_margin": 2.0,
    "self_minus_anchor": 0.02,
    "score_entropy": 0.9,
}


def metrics(**changes: float | None) -> list[Metric]:
    values = {**HEALTHY, **changes}
    return [Metric(name=k, value=v, n=100, low=None if v is None else v - 0.1) for k, v in values.items()]


def test_a_healthy_run_raises_no_alarm() -> None:
    assert alarms({t: metrics() for t in (1, 2, 3)}) == []
    assert alarms({}) == []


def test_each_alarm_names_its_iteration_and_reason() -> None:
    cases = {
        "agreement": metrics(anchor_agreement=0.6),
        "inflation": metrics(self_minus_anchor=0.7),
        "entropy": metrics(score_entropy=0.2),
        "margin": metrics(anchor_margin=0.7),
        "ties": metrics(tie_rate=0.6),
    }
    for name, bad in cases.items():
        found = alarms({1: metrics(), 2: bad})
        assert [(a.iteration, a.name) for a in found] == [(2, name)]
        assert found[0].text.startswith("iteration 2: ")


def test_an_inflation_that_may_be_chance_raises_no_alarm() -> None:
    assert alarms({1: metrics(self_minus_anchor=0.3)}) == []  # its interval begins at 0.2


def test_what_could_not_be_measured_raises_no_alarm() -> None:
    assert alarms({1: metrics(anchor_margin=None, anchor_agreement=None, score_entropy=None)}) == []


TRUE = random.Random(1).choices([1.0, 2.0, 3.0, 4.0, 4.5], k=400)
"""The true scores of four answers to each of 100 prompts."""


def perfect(mode: str, a: int, b: int) -> float:
    """What a perfect judge says of answer `a`: its points, or in pairwise mode 5, 2.5 or 0 against answer `b`."""
    if mode == "pairwise":
        return 5.0 if TRUE[a] > TRUE[b] else 0.0 if TRUE[a] < TRUE[b] else 2.5
    return TRUE[a]


@pytest.mark.parametrize("mode", ["sampled", "expected", "pairwise"])
def test_a_perfect_judge_with_a_perfect_anchor_raises_no_alarm_in_any_mode(mode: str) -> None:
    """Points and shares of wins have different scales, so an alarm must compare like with like."""
    candidates = [
        Candidate(
            prompt_id=f"p{i // 4}", sample_index=i % 4, prompt="?", response=f"r{i}", num_tokens=1, finish_reason="stop"
        )
        for i in range(len(TRUE))
    ]
    judged = [
        Judgement(
            candidate_key=candidates[a].key, judgement_index=b % 4, verdict="", score=perfect(mode, a, b),
            coverage=1.0 if mode == "expected" else None,
        )
        for start in range(0, len(TRUE), 4)
        for a, b in itertools.permutations(range(start, start + 4), 2)
    ]  # fmt: skip
    scores = mean_scores(judged)
    pairs = []
    for start in range(0, len(TRUE), 4):
        best, *_, worst = sorted(candidates[start : start + 4], key=lambda c: -scores[c.key])
        if scores[best.key] > scores[worst.key]:
            pairs.append(
                PreferencePair(
                    prompt_id=best.prompt_id, prompt="?", chosen=best.response, rejected=worst.response,
                    chosen_score=scores[best.key], rejected_score=scores[worst.key],
                )
            )  # fmt: skip
    cfg = JudgeConfig(rubric="", mode=mode)
    found = [*compare(candidates, pairs, own=scores, anchor=scores, max_score=5), *spread(judged, cfg)]
    assert next(m for m in found if m.name == "anchor_agreement").value == 1
    assert alarms({1: found}) == []


def test_a_pairwise_judge_that_goes_by_the_order_of_the_answers_is_noticed() -> None:
    judged = [
        Judgement(candidate_key=f"p{p}/{a:02d}", judgement_index=i, verdict="", score=score)
        for p in range(20)
        for a in range(4)
        for i, score in enumerate([5.0] * 3 + [0.0] * 3)
    ]
    (alarm,) = alarms({1: spread(judged, JudgeConfig(rubric="", mode="pairwise"))})
    assert (alarm.name, "ties 100% of the pairs" in alarm.text) == ("ties", True)
