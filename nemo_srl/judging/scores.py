"""The score that is read in one verdict, and the mean over several verdicts on one answer."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from nemo_srl.records import Judgement


@dataclass(frozen=True)
class Score:
    """`value` is None for a verdict without a score. `coverage` is None unless the score is an expectation."""

    value: float | None
    coverage: float | None = None


def mean_score(scores: Sequence[float | None]) -> float | None:
    """Mean of the scores that are there; None when there are none (paper section 2.2: mean of 3)."""
    valid = [score for score in scores if score is not None]
    return sum(valid) / len(valid) if valid else None


def mean_scores(judgements: Iterable[Judgement]) -> dict[str, float]:
    """Mean score by candidate key, in the order of the judgements. A candidate without any score is left out."""
    scores: dict[str, list[float | None]] = defaultdict(list)
    for j in judgements:
        scores[j.candidate_key].append(j.score)
    return {key: mean for key, found in scores.items() if (mean := mean_score(found)) is not None}


def shuffled(found: Sequence[Judgement], rng: random.Random) -> list[Judgement]:
    """A control: all verdicts on one candidate become those of another one. The scores keep their distribution."""
    keys = list(dict.fromkeys(j.candidate_key for j in found))
    others = rng.sample(keys, len(keys))
    new_key = dict(zip(keys, others, strict=True))
    return sorted((replace(j, candidate_key=new_key[j.candidate_key]) for j in found), key=lambda j: j.key)
