"""What the oracle says of a finished run: one row of figures per model.

It reads the tables that the stages published. No stage reads what is computed here.
"""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean
from typing import Any

import toy_language

from nemo_srl.errors import DataError
from nemo_srl.records import Candidate, Metric, PreferencePair
from nemo_srl.report.alarms import alarms
from nemo_srl.runs import Run


def measure(run: Run, m1_run: Run) -> Iterator[dict[str, Any]]:
    """The rows of one arm: `model` t stands for M_t, with the figures of iteration t, which begins with M_t.

    `m1_run` is the run that made M1 and evaluated it. Several arms share it.
    """
    for t in (1, *(t + 1 for t in run.iterations)):
        made_by, iteration = (m1_run, 0) if t == 1 else (run, t - 1)
        if not made_by.find(iteration, "evaluation"):
            return
        yield {"model": t, **measure_model(made_by, iteration), **measure_pairs(run, t), **anchors(run, t)}


def measure_model(run: Run, iteration: int) -> dict[str, float | None]:
    """The true scores of a model's answers to the held-out instructions, and the metrics of its evaluation.

    An instruction without an answer has no true score. The metric `unanswered_rate` counts it.
    """
    answers = run.table(iteration, "evaluation", Candidate, part="answers")
    if not answers:
        raise DataError(
            f"{run.run_dir}/iter_{iteration:02d}/evaluation: it has no table of answers, because an older version "
            "of nemo_srl made it. Delete this directory and start again."
        )
    answers = [c for c in answers if c.is_answered]
    true = [toy_language.oracle_score(c.prompt, c.response) for c in answers]
    metrics = {m.name: m.value for m in run.table(iteration, "evaluation", Metric)}
    row: dict[str, float | None] = {
        "oracle_score": fmean(true),
        "perfect": fmean(s == toy_language.NUM_CRITERIA for s in true),
        "distinct": len({(c.prompt_id, c.response) for c in answers}) / len(answers),
        **{name: value for name, value in metrics.items() if not name.startswith("score_share")},
    }
    if metrics["self_score"] is not None:
        row["self_minus_true"] = metrics["self_score"] - fmean(true)
    return row


def measure_pairs(run: Run, iteration: int) -> dict[str, float]:
    """How good the pairs of an iteration really are. Empty if it made none."""
    stage = run.find(iteration, "pairs")
    if stage is None:
        return {}
    pairs = run.table(iteration, "pairs", PreferencePair)
    oracle = toy_language.oracle_score
    margins = [oracle(p.prompt, p.chosen) - oracle(p.prompt, p.rejected) for p in pairs]
    return {
        "num_pairs": len(pairs),
        "num_tied": stage.manifest.metrics["num_tied"],
        "true_margin": fmean(margins),
        "true_pair_sign": fmean((m > 0) - (m < 0) for m in margins),
    }


def anchors(run: Run, iteration: int) -> dict[str, Any]:
    """What other judges said of the pairs of an iteration, and which alarms follow from that."""
    row: dict[str, Any] = {}
    for name in ("anchor", "second_anchor"):
        if seen := run.table(iteration, name, Metric):
            row |= {f"{name}.{m.name}": m.value for m in seen}
            row[f"{name}.alarms"] = sorted(alarm.name for alarm in alarms({iteration: seen}))
    return row
