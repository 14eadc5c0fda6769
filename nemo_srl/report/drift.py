"""Drift of the judge: each model's scores of the held-out answers, compared with the scores of the model before it.

The scores are the part `judgements` of the `evaluation` stage. The answers are the same for every model. So the judge
itself has changed when the rank correlation falls or the mean score climbs.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from statistics import fmean
from typing import NamedTuple

from nemo_srl.judging import agreement, mean_scores
from nemo_srl.records import Judgement
from nemo_srl.runs import Run


class Drift(NamedTuple):
    """Over the `n` answers that both models gave a score. `spearman` is None when one model's scores are all equal."""

    model: str
    before: str
    n: int
    spearman: float | None
    mean_score: float
    mean_score_before: float


def drift(run: Run, places: Mapping[str, tuple[int, str]]) -> list[Drift]:
    """One row for each model with published judgements, except the first. `places` has the models' evaluations."""
    by_model = {m: mean_scores(run.table(*place, Judgement, "judgements")) for m, place in places.items()}
    rows = []
    for before, model in itertools.pairwise(name for name, scores in by_model.items() if scores):
        if not (common := sorted(by_model[before].keys() & by_model[model].keys())):
            continue
        old, new = ([by_model[name][key] for key in common] for name in (before, model))
        groups = [agreement.ScoreGroup(human=old, model=new)]
        spearman = agreement.reward_model_metrics(groups, max_score=1.0)["spearman"].value
        rows.append(Drift(model, before, len(common), spearman, fmean(new), fmean(old)))
    return rows
