"""Drift of the judge: how each model's scores of the same held-out answers compare with those of the model before.

The scores are read from the evaluations' journals. Agreement that falls, or a mean score that climbs while the
answers stay the same, shows a judge on its way to somewhere, whether the given scores move with it or not.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from nemo_srl.artifacts import JOURNAL, read_jsonl
from nemo_srl.config import JudgeConfig
from nemo_srl.judging import agreement
from nemo_srl.judging.expected import score_of
from nemo_srl.judging.verdicts import mean_score
from nemo_srl.records import Completion
from nemo_srl.runs import Run

_PREFIX = "eft/"  # of the requests for held-out judgements (`stages/evaluation.py`)


@dataclass(frozen=True, kw_only=True)
class Drift:
    """`spearman` over the `n` answers that both models gave a score to; None where one of them always says the same."""

    model: str
    before: str
    n: int
    spearman: float | None
    mean_score: float
    mean_score_before: float


def drift(run: Run) -> list[Drift]:
    """One row for each model but the first that has a readable evaluation."""
    scores = {name: found for name, found in _scores_by_model(run).items() if found}
    rows = []
    for before, model in zip(list(scores)[:-1], list(scores)[1:], strict=True):
        common = sorted(scores[before].keys() & scores[model].keys())
        if not common:
            continue
        old, new = ([scores[name][key] for key in common] for name in (before, model))
        found = agreement.reward_model_metrics(
            [agreement.ScoreGroup(human=old, model=new)], max_score=1.0, num_bootstrap=0
        )
        rows.append(
            Drift(
                model=model,
                before=before,
                n=len(common),
                spearman=found.spearman.value,
                mean_score=sum(new) / len(new),
                mean_score_before=sum(old) / len(old),
            )
        )
    return rows


def _scores_by_model(run: Run) -> dict[str, dict[str, float]]:
    judge = run.config()["judge"]
    # Evaluations ask for points also where candidates are compared in pairs.
    mode = "expected" if judge.get("mode") == "expected" else "sampled"
    cfg = JudgeConfig(mode=mode, max_score=judge["max_score"])
    places = {"M0": (0, "evaluation_m0")} | {f"M{t + 1}": (t, "evaluation") for t in (0, *run.iterations)}
    return {name: _scores(run, place, cfg) for name, place in places.items()}


def _scores(run: Run, place: tuple[int, str], cfg: JudgeConfig) -> dict[str, float]:
    """Mean score of each held-out answer."""
    stage = run.find(*place)
    if stage is None or not (stage.path / JOURNAL).exists():
        return {}
    by_answer: Mapping[str, list[float | None]] = defaultdict(list)
    for c in read_jsonl(stage.path / JOURNAL, Completion):
        if c.request_key.startswith(_PREFIX):
            by_answer[c.request_key.removeprefix(_PREFIX)].append(score_of(c, cfg).value)
    return {key: mean for key, scores in by_answer.items() if (mean := mean_score(scores)) is not None}
