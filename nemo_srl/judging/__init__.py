"""How models judge answers: the rubric, the reading of verdicts, scores, comparisons, agreement."""

from __future__ import annotations

from collections.abc import Iterable

from nemo_srl.judging.verdicts import mean_score
from nemo_srl.records import Judgement


def mean_scores(judgements: Iterable[Judgement]) -> dict[str, float]:
    """The mean score of each candidate, by its key. A candidate without any score is left out."""
    by_key: dict[str, list[float | None]] = {}
    for j in judgements:
        by_key.setdefault(j.candidate_key, []).append(j.score)
    return {key: score for key, scores in by_key.items() if (score := mean_score(scores)) is not None}
