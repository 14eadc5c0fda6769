"""Best against worst, and a reason for every prompt that gives no pair."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_srl.config import Config, PairsConfig
from nemo_srl.judging import mean_scores
from nemo_srl.pairing import build_pairs
from nemo_srl.records import Candidate, FinishReason, Judgement
from nemo_srl.stages import pairs as pairs_stage
from tests.support import made
from tests.tables import published


def candidate(index: int, response: str, finish: FinishReason = "stop", prompt_id: str = "p") -> Candidate:
    return Candidate(
        prompt_id=prompt_id, sample_index=index, prompt="Q", response=response, num_tokens=1, finish_reason=finish
    )


def judged(c: Candidate, *scores: float | None) -> list[Judgement]:
    return [Judgement(candidate_key=c.key, judgement_index=i, verdict="v", score=s) for i, s in enumerate(scores)]


def build(*rows: tuple[Candidate, tuple[float | None, ...]], min_margin: float = 0.0):  # type: ignore[no-untyped-def]
    judgements = [j for c, scores in rows for j in judged(c, *scores)]
    return build_pairs([c for c, _ in rows], mean_scores(judgements), PairsConfig(min_margin=min_margin))


def test_the_best_mean_is_chosen_and_the_worst_rejected() -> None:
    pairs, dropped = build(
        (candidate(0, "mid"), (3, 3, 3)), (candidate(1, "best"), (5, 4, 4)), (candidate(2, "worst"), (0, 1, 0))
    )
    assert not dropped
    assert (pairs[0].chosen, pairs[0].rejected) == ("best", "worst")
    assert pairs[0].chosen_score == pytest.approx(13 / 3)
    assert pairs[0].rejected_score == pytest.approx(1 / 3)


def test_verdicts_without_a_score_count_for_nothing() -> None:
    pairs, _ = build((candidate(0, "a"), (None, 4, None)), (candidate(1, "b"), (3, 3, 3)))
    assert pairs[0].chosen == "a"
    assert pairs[0].chosen_score == 4


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([(candidate(0, "a"), (3.0,)), (candidate(1, "b"), (3.0,))], "tied"),
        ([(candidate(0, "a"), (3.0,)), (candidate(1, "a"), (4.0,))], "identical"),
        ([(candidate(0, "a"), (3.0,)), (candidate(1, "b"), (None,))], "unscored"),
        ([(candidate(0, "a"), ()), (candidate(1, "b"), ())], "unscored"),
        ([(candidate(0, "a", "length"), (3.0,)), (candidate(1, "b", "length"), (4.0,))], "truncated"),
        ([(candidate(0, ""), (5.0,)), (candidate(1, "b", "length"), (4.0,))], "truncated"),
    ],
)
def test_each_prompt_without_a_pair_has_its_reason(
    rows: list[tuple[Candidate, tuple[float | None, ...]]], reason: str
) -> None:
    pairs, dropped = build(*rows)
    assert not pairs
    assert dict(dropped) == {reason: 1}


def test_a_truncated_answer_may_be_rejected_but_is_never_chosen() -> None:
    pairs, _ = build(
        (candidate(0, "cut", "length"), (5.0,)), (candidate(1, "good"), (4.0,)), (candidate(2, "bad", "length"), (1.0,))
    )
    assert (pairs[0].chosen, pairs[0].rejected) == ("good", "bad")
    assert (pairs[0].chosen_finish_reason, pairs[0].rejected_finish_reason) == ("stop", "length")


def test_the_margin_must_be_exceeded() -> None:
    rows = ((candidate(0, "a"), (3.0,)), (candidate(1, "b"), (4.0,)))
    assert build(*rows, min_margin=1.0)[1] == {"tied": 1}
    assert len(build(*rows, min_margin=0.9)[0]) == 1


def test_chosen_never_equals_rejected_whatever_the_scores() -> None:
    for best in range(4):
        rows = [(candidate(i, "same" if i != 3 else "other"), (float(i == best),)) for i in range(4)]
        pairs, _ = build(*rows)
        assert all(p.chosen != p.rejected for p in pairs)


def test_ties_at_the_top_take_the_first_sample_so_the_result_is_reproducible() -> None:
    pairs, _ = build((candidate(1, "b"), (5.0,)), (candidate(0, "a"), (5.0,)), (candidate(2, "c"), (1.0,)))
    assert pairs[0].chosen == "a"


def test_the_mean_margin_is_told_before_dpo(tmp_path: Path) -> None:
    scores = {"a": (4.5, 4.25), "b": (3.0, 3.5), "tied": (2.0, 2.0)}
    rows = [(candidate(i, f"{i}", prompt_id=p), s) for p, both in scores.items() for i, s in enumerate(both)]
    given = {
        "candidates": published(tmp_path, "y", Candidate, [c for c, _ in rows]),
        "judgements": published(tmp_path, "r", Judgement, [j for c, s in rows for j in judged(c, s)]),
    }
    _, figures = made(pairs_stage.STAGE, Config(run_dir="run"), tmp_path / "d", **given)
    assert (figures["num_pairs"], figures["num_tied"], figures["margin"]) == (2, 1, 0.375)
    assert ("chosen minus rejected score, mean", "0.38") in pairs_stage.summary(figures)
