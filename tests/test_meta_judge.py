"""Pairs of M_t's own verdicts: ratings from battles, the answers whose verdicts disagree, and a known order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from nemo_srl.artifacts import BaseModel, digest_of_file
from nemo_srl.config import Config
from nemo_srl.errors import DataError
from nemo_srl.judging.elo import Battle, position_weights, ratings
from nemo_srl.records import Candidate, Judgement
from nemo_srl.stages import meta_judge, taught_verdicts
from tests import tiny
from tests.loopback import Loopback, ids_of
from tests.support import made, server
from tests.tables import published
from tests.tiny_loop import RUBRIC


def test_wins_weigh_as_much_as_the_other_place_wins() -> None:
    battles = [Battle(0, 1, 1), Battle(0, 2, 1), Battle(1, 2, 1), Battle(2, 1, 0), Battle(1, 0, 0.5)]
    # Three of four wins are in the first place, so such a win counts 1/4, and one in the second place 3/4.
    assert position_weights(battles) == (0.25, 0.75)
    assert position_weights([Battle(0, 1, 0.5)]) == (0.5, 0.5)


def test_the_rating_of_two_texts_is_the_logarithm_of_their_odds() -> None:
    battles = [Battle(0, 1, 1)] * 300 + [Battle(0, 1, 0)] * 100
    a, b = ratings(2, battles, weights=(1, 1))
    assert a - b == pytest.approx(math.log(3), abs=1e-3)  # the prior pulls by less than that
    a, b = ratings(2, battles, weights=(1, 3))
    assert a == pytest.approx(b, abs=1e-6)


def test_ratings_order_texts_by_their_battles_and_stay_finite() -> None:
    battles = [Battle(1, 0, 1), Battle(0, 1, 0), Battle(0, 2, 1), Battle(2, 0, 0), Battle(1, 2, 1), Battle(2, 1, 0)]
    found = ratings(3, battles, weights=(0.5, 0.5))
    assert found[1] > found[0] > found[2]
    assert all(math.isfinite(x) for x in found)
    assert sum(found) == pytest.approx(0, abs=1e-4)
    assert ratings(2, [Battle(0, 1, 0.5)], weights=(0.5, 0.5)) == [0, 0]


def answer(prompt: str, index: int) -> Candidate:
    return Candidate(
        prompt_id=prompt, sample_index=index, prompt=f"Say {prompt}.", response=f"It is {prompt}{index}, and it is so.",
        num_tokens=9, finish_reason="stop",
    )  # fmt: skip


def verdicts(c: Candidate, *scores: float | None) -> list[Judgement]:
    return [
        Judgement(candidate_key=c.key, judgement_index=i, verdict=f"Reason {i}.\nScore: {s}", score=s)
        for i, s in enumerate(scores)
    ]


def test_the_answer_with_the_highest_variance_of_each_prompt_is_disputed() -> None:
    sure, doubtful, unread = answer("p", 0), answer("p", 1), answer("q", 0)
    judged = [*verdicts(sure, 3, 4, 3), *verdicts(doubtful, 1, 5, None), *verdicts(unread, 2, None, None)]
    (case,) = meta_judge.disputed([sure, doubtful, unread], judged)
    assert case.answer == doubtful
    assert [j.score for j in case.verdicts] == [1, 5]


def settings(url: str, tmp_path: Path, **more: Any) -> Config:
    cfg = Config(run_dir=str(tmp_path))
    cfg.judge.rubric, cfg.judge.engine = RUBRIC, server(url)
    cfg.verdict_pairs.num_prompts = 5
    for key, value in more.items():
        setattr(cfg.verdict_pairs, key, value)
    return cfg


def run(stage: Any, cfg: Config, tmp_path: Path, answers: Sequence[Candidate], judged: Sequence[Judgement]) -> Any:
    policy = BaseModel(tiny.make_model(tmp_path / "model", ["Winner: A"], vocab_size=300), "digest")
    return made(
        stage, cfg, tmp_path / stage.name, judge=policy,
        candidates=published(tmp_path, "candidates", Candidate, answers),
        judgements=published(tmp_path, "judgements", Judgement, judged),
    )  # fmt: skip


def test_the_meta_judge_prefers_the_verdict_that_wins_in_both_places(tmp_path: Path) -> None:
    def likes_reason_1(body: dict[str, Any], index: int) -> tuple[list[int], str]:
        _, _, first, _ = body["messages"][0]["content"].split("|")
        return ids_of(f"Winner: {'A' if 'Reason 1' in first else 'B' if 'Reason 0' in first else 'tie'}"), "stop"

    x = answer("p", 0)
    rubric = "{instruction}|{response}|{verdict_a}|{verdict_b} Winner:"
    with Loopback(likes_reason_1).running() as url:
        cfg = settings(url, tmp_path, source="meta_judge", meta_rubric=rubric)
        table, figures = run(meta_judge.STAGE, cfg, tmp_path, [x], verdicts(x, 0, 4, 5))
    (pair,) = table.read()
    # A win: 1 v 0 and 1 v 2 in the first place; in the second, whatever 0 meets wins.
    assert (pair.chosen, pair.rejected) == ("Reason 1.\nScore: 4", "Reason 0.\nScore: 0")
    assert pair.prompt == f"Grade: {x.prompt} / {x.response} Score:"
    assert figures["num_pairs"] == figures["num_answers"] == 1
    assert figures["num_too_long"] == 0
    assert figures["decided_rate"] == pytest.approx(4 / 6)


def test_a_pair_whose_chosen_verdict_is_too_long_is_left_out() -> None:
    pair = meta_judge.pair(meta_judge.Disputed(answer("p", 0), verdicts(answer("p", 0), 4, 10)), "prompt", 1, 0)
    assert pair.chosen == "Reason 1.\nScore: 10"
    limits = (0, 18, 19, 20)
    assert [meta_judge.is_too_long(pair, limit) for limit in limits] == [False, True, False, False]


def test_an_iteration_without_disputes_makes_no_pairs_and_asks_nobody(tmp_path: Path) -> None:
    x = answer("p", 0)
    cfg = settings("http://127.0.0.1:9/v1", tmp_path, source="meta_judge", meta_rubric="x")
    table, figures = run(meta_judge.STAGE, cfg, tmp_path, [x], verdicts(x, 3, 3, None))
    assert figures["num_pairs"] == 0
    with pytest.raises(DataError, match="empty"):
        table.read()
    table.publish(stage="meta_judge", digest=digest_of_file(table.path / "data.jsonl"), metrics={}, seconds=0)
    assert table.read() == [], "it was published so, and is not damaged"


@pytest.mark.parametrize(
    ("scores", "other", "is_better", "expected"),
    [
        ((1, 4, 5), 3.0, True, (5, 1)),
        ((1, 4, 5), 3.0, False, (1, 5)),
        ((3, 4), 3.0, True, (4, 3)),  # an equal score does not see the difference
        ((4, 5), 3.0, True, None),
        ((1, None), 3.0, True, None),
    ],
)
def test_verdicts_are_right_if_they_see_the_known_order(
    scores: tuple[float | None, ...], other: float, is_better: bool, expected: tuple[float, float] | None
) -> None:
    found = taught_verdicts.right_and_wrong(verdicts(answer("p", 0), *scores), other, is_better=is_better)
    assert (found and (found[0].score, found[1].score)) == expected


def test_the_damaged_copy_is_judged_and_right_verdicts_are_preferred(tmp_path: Path) -> None:
    def of_copy(body: dict[str, Any], index: int) -> tuple[list[int], str]:
        return ids_of(f"Copy {index}.\nScore: {(0, 4, 5)[index]}"), "stop"

    x = answer("p", 0)
    with Loopback(of_copy).running() as url:
        cfg = settings(url, tmp_path, source="sampled")
        table, figures = run(taught_verdicts.STAGE, cfg, tmp_path, [x], verdicts(x, 2, 4, 5))
    # The copy has a mean of 3, and the answer of 11/3.
    on_answer, on_copy = table.read()
    assert (on_answer.chosen, on_answer.rejected) == ("Reason 2.\nScore: 5", "Reason 0.\nScore: 2")
    assert (on_copy.chosen, on_copy.rejected) == ("Copy 0.\nScore: 0", "Copy 2.\nScore: 5")
    assert x.response in on_answer.prompt
    assert x.response not in on_copy.prompt
    assert figures["num_pairs"] == 2
