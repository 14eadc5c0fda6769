"""The score of a verdict: the stated score, or the mean of the scores that it could have stated."""

from __future__ import annotations

import json
import math

import pytest

from nemo_srl.config import JudgeConfig
from nemo_srl.errors import ConfigError
from nemo_srl.judging import reader
from nemo_srl.judging.expected import expected_score
from nemo_srl.judging.scores import Score
from nemo_srl.records import Completion, FinishReason, NumberLogprobs, from_row, to_row

RUBRIC = "{instruction} {response} Score:"
HALF = {"4": math.log(0.5), " 3": math.log(0.25), "3": math.log(0.05), "7": math.log(0.1)}


def completion(text: str, numbers: NumberLogprobs | None, reason: FinishReason = "stop") -> Completion:
    return Completion(request_key="k", index=0, text=text, num_tokens=9, finish_reason=reason, number_logprobs=numbers)


def score_of(c: Completion, cfg: JudgeConfig) -> Score:
    """What the reader of `cfg` makes of one verdict."""
    (judgement,) = reader(cfg).judgements({"k": ("Q", "r")}, {"k": [c]}, cfg)
    return Score(judgement.score, judgement.coverage)


def test_the_expectation_is_taken_over_points_and_its_coverage_told() -> None:
    score = expected_score("Good. Score: 4", [(13, HALF)], max_score=5)
    assert score.value == pytest.approx((4 * 0.5 + 3 * 0.3) / 0.8)
    assert score.coverage == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("verdict", "offsets"),
    [
        ("2 flaws. Score: 4", [0, 16]),
        ("Score: 4/5", [7, 9]),
        ("Score: 1\nNo.\nScore: 4", [7, 20]),
        ("Score: 4\nIt claims Score: 1", [7, 26]),
        ("Score: 4. Of 5 points.", [7, 13]),
        ("**Score:** 4", [11]),
    ],
)
def test_only_the_place_where_the_score_stands_counts(verdict: str, offsets: list[int]) -> None:
    numbers: NumberLogprobs = [
        (at, {verdict[at]: math.log(0.6), "3": math.log(0.4)} if verdict[at] == "4" else {"0": 0.0}) for at in offsets
    ]
    assert expected_score(verdict, numbers, max_score=5).value == pytest.approx(4 * 0.6 + 3 * 0.4)


def test_without_a_score_or_its_probabilities_there_is_none() -> None:
    assert expected_score("No score, 4 flaws.", [(10, HALF)], max_score=5) == Score(None)
    assert expected_score("Score: 4", [], max_score=5) == Score(None)
    assert expected_score("Score: 4", [(7, {"9": 0.0})], max_score=5) == Score(None, 0.0)


def test_the_mode_decides_and_a_cut_verdict_has_no_score_in_either() -> None:
    sampled, expected = JudgeConfig(rubric=RUBRIC), JudgeConfig(rubric=RUBRIC, mode="expected")
    whole, cut = completion("Score: 4", [(7, HALF)]), completion("Score: 4", [(7, HALF)], "length")
    assert score_of(whole, sampled) == Score(4.0)
    assert score_of(whole, expected).value == pytest.approx(3.625)
    assert score_of(cut, sampled) == score_of(cut, expected) == Score(None)
    assert score_of(completion("Score: 4", None), expected) == Score(None)


def test_probabilities_survive_the_journal() -> None:
    c = completion("Score: 4", [(7, HALF)])
    read = from_row(Completion, json.loads(json.dumps(to_row(c))), where="here")
    expected = JudgeConfig(rubric=RUBRIC, mode="expected")
    assert score_of(read, expected) == score_of(c, expected)


def test_expected_scores_need_points_of_one_digit() -> None:
    def check(cfg: JudgeConfig) -> None:
        reader(cfg).check(cfg)

    check(JudgeConfig(rubric=RUBRIC, mode="expected", max_score=9))
    check(JudgeConfig(rubric=RUBRIC, max_score=10))
    with pytest.raises(ConfigError, match=r"judge\.max_score=10: judge\.mode='expected' reads .*up to 9 at most"):
        check(JudgeConfig(rubric=RUBRIC, mode="expected", max_score=10))
    with pytest.raises(ConfigError, match=r"judge\.mode='mean'.*expected, pairwise, reward, sampled, verifier"):
        check(JudgeConfig(rubric=RUBRIC, mode="mean"))
