"""What the page shows above its browser: charts, counts and costs, computed from the published artifacts.

Nothing is required, because a run may be under way. A section without data is left out.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import NamedTuple

import numpy as np

from nemo_srl.judging import agreement, mean_scores
from nemo_srl.pairing import LABELS
from nemo_srl.records import Candidate, Judgement, Metric, PreferencePair
from nemo_srl.report import paper
from nemo_srl.report.charts import Chart, Format, Limits, Point, Series, bar_chart, curve_chart, line_chart, stacked_bar
from nemo_srl.report.text import score_shares
from nemo_srl.runs import Run, training_metrics
from nemo_srl.stages import LOOP, stage_named
from nemo_srl.stages.unanswered import CALL_LABELS, reasons_in

Evaluations = Mapping[str, Sequence[Metric]]
_NUM_BINS = 12
_PAPER_COLOR = 5
_SHARE, _CORRELATION = (0.0, 1.0), (-1.0, 1.0)
_TWO, _WHOLE = "{:.2f}".format, "{:.0f}".format


def _percent(value: float) -> str:
    return f"{100 * value:.3g}%"


class Shown(NamedTuple):
    """How a chart shows a metric. `reference` has the paper's figures by model name."""

    metric: str
    title: str
    form: Format
    limits: Limits
    reference: Mapping[str, float] = {}
    note: str = ""


JUDGING = (
    Shown(
        "pairwise_accuracy", "Pairwise accuracy, ties excluded", _percent, _SHARE, paper.JUDGING["pairwise_accuracy"]
    ),
    Shown("pairwise_accuracy_models", "Pairwise accuracy, models' answers", _percent, _SHARE),
    Shown(
        "surface_accuracy",
        "Pairwise accuracy of the surface",
        _percent,
        _SHARE,
        note="what an answer's look tells without its instruction; a judge should be far above it",
    ),
    Shown("spearman", "Spearman correlation", _TWO, _CORRELATION, paper.JUDGING["spearman"]),
    Shown("kendall", "Kendall's tau", _TWO, _CORRELATION, paper.JUDGING["kendall"]),
    Shown("exact_match", "Exact match of the ordering", _percent, _SHARE, paper.JUDGING["exact_match"]),
    Shown("five_best", "5-best", _percent, _SHARE, paper.JUDGING["five_best"]),
    Shown("valid_verdict_rate", "Valid verdicts", _percent, _SHARE),
)
"""How well each model judges: agreement with the given scores of held-out answers (paper, table 4)."""

ANSWERING = (
    Shown("true_score", "True score, 0 to 5", _TWO, (0, 5), note="counted by code; no training reads it"),
    Shown("self_score", "Self-score, 0 to 5", _TWO, (0, 5), note="the model's own opinion of its answers"),
    Shown("response_characters", "Length of answers, characters", _WHOLE, (-math.inf, math.inf), paper.LENGTH,
          "the paper measured it on AlpacaEval"),
    Shown("pairs_per_100_prompts", "Pairs per 100 held-out prompts", _WHOLE, (0, 100)),
)  # fmt: skip
"""How well each model answers, as far as the run can measure it without another judge."""


def metric_charts(evaluations: Evaluations, wanted: Sequence[Shown]) -> list[Chart]:
    """One chart of all models for each metric that at least one of them has."""
    charts = []
    for x in wanted:
        found = [next((m for m in metrics if m.name == x.metric), None) for metrics in evaluations.values()]
        ours = [Point(i, m.value, m.low, m.high) for i, m in enumerate(found) if m and m.value is not None]
        theirs = [Point(i, x.reference[m]) for i, m in enumerate(evaluations) if m in x.reference]
        series = [Series("this run", ours)]
        if theirs:
            series.append(Series("the paper (70B)", theirs, color=_PAPER_COLOR, dashed=True))
        if ours:
            chart = line_chart(series, list(evaluations), title=x.title, form=x.form, limits=x.limits, note=x.note)
            charts.append(chart)
    return charts


def score_charts(run: Run, evaluations: Evaluations) -> list[Chart]:
    """The distribution of the scores: on held-out data by model, and on candidates by iteration."""
    by_model = {m: shares for m, metrics in evaluations.items() if (shares := score_shares(metrics))}
    max_score = int(run.config()["judge"]["max_score"])
    by_iteration = {}
    for t in run.iterations:
        counts = agreement.histogram([j.score for j in run.table(t, "judgements", Judgement)], max_score=max_score)
        if sum(counts):
            by_iteration[f"answers of M{t}"] = [count / sum(counts) for count in counts]
    charts = [
        bar_chart(groups, [str(k) for k in range(max(map(len, groups.values())))], title=title)
        for title, groups in (("Verdicts on held-out data", by_model), ("Verdicts on candidates", by_iteration))
        if groups
    ]
    by_model_alone = (
        Shown("score_entropy", "Entropy of scores, 0 to 1", _TWO, _SHARE, note="0: all scores are the same"),
        Shown(f"score_share_{max_score}", "Saturation: verdicts with the highest score", _percent, _SHARE),
    )
    return charts + metric_charts(evaluations, by_model_alone)


def lengths(run: Run) -> tuple[list[list[str]], list[Chart]]:
    """The cells of a table with a line for each iteration, and the histograms of the answers' tokens.

    The correlation is Pearson's r of a candidate's mean score and its characters: it tells whether the judge prefers
    long answers.
    """
    characters = ("chosen, characters", "rejected, characters")
    cells, tokens = [["iteration", "tokens, mean", *characters, "correlation of score and length"]], {}
    for t in run.iterations:
        if candidates := run.table(t, "candidates", Candidate):
            tokens[t] = [c.num_tokens for c in candidates if c.is_answered]
            pairs = run.table(t, "pairs", PreferencePair)
            sides = ([len(p.chosen) for p in pairs], [len(p.rejected) for p in pairs])
            means = [_WHOLE(fmean(x)) if x else "-" for x in (tokens[t], *sides)]
            r = score_length_correlation(candidates, run.table(t, "judgements", Judgement))
            cells.append([str(t), *means, "-" if r is None else _TWO(r)])
    if not tokens:
        return [], []
    top = max(max(x) for x in tokens.values()) + 1
    edges = np.linspace(0, top, _NUM_BINS + 1)
    groups = {f"iteration {t}": (np.histogram(x, edges)[0] / len(x)).tolist() for t, x in tokens.items()}
    labels = [f"{edge:.0f}" if i % 3 == 0 else "" for i, edge in enumerate(edges[:-1])]
    return cells, [bar_chart(groups, labels, title="Tokens of candidates")]


def score_length_correlation(candidates: Sequence[Candidate], judgements: Sequence[Judgement]) -> float | None:
    """Pearson's r of a candidate's mean score and its characters. None when one of them is constant."""
    scores = mean_scores(judgements)
    points = [(scores[c.key], len(c.response)) for c in candidates if c.key in scores]
    if len(points) < 2:
        return None
    x, y = np.array(points, dtype=np.float64).T
    return float(np.corrcoef(x, y)[0, 1]) if x.std() and y.std() else None


def training_charts(run: Run) -> list[Chart]:
    """By step: the loss of each training, and the margin and the accuracy of the rewards of each DPO training."""
    loss = {"loss": "loss by step"}
    rewards = {"rewards_margin": "reward margin by step", "acc": "pairs in the right order, by step"}
    trainings = {model: training_metrics(stage.path) for model, stage in run.models().items()}
    dpo = {model: lines for model, lines in trainings.items() if any("rewards_margin" in x for x in lines)}
    sft = {model: lines for model, lines in trainings.items() if model not in dpo}
    charts = []
    for name, group, labels in (("SFT", sft, loss), ("DPO", dpo, loss | rewards)):
        for key, label in labels.items():
            curves = {m: [(x["step"], x[key]) for x in lines if key in x] for m, lines in group.items()}
            if curves := {m: points for m, points in curves.items() if points}:
                charts.append(curve_chart(curves, title=f"{name}: {label}"))
    return charts


def funnels(run: Run) -> list[tuple[Chart, list[tuple[str, str]]]]:
    """What happened to the prompts of each iteration: a bar, and (what, how many) in the order of the stages."""
    found = []
    for t in run.iterations:
        if not (pairs := run.find(t, "pairs")):
            continue
        counts = {k.removeprefix("num_"): n for k, n in pairs.manifest.metrics.items() if k.startswith("num_")}
        # The known reasons always come in the same order, and so have the same colors in every run.
        names = dict.fromkeys(["pairs", *(name for name in LABELS if name in counts), *sorted(counts)])
        shares = {{"pairs": "a pair", **LABELS}.get(name, name): counts[name] for name in names}
        made = [s.manifest for name in LOOP if (s := run.find(t, name)) and s.manifest.stage == name]
        steps = [line for manifest in made for line in stage_named(manifest.stage).summary(manifest.metrics)]
        found.append((stacked_bar(shares, title=f"Prompts of iteration {t}", form=_WHOLE, colors=range(6)), steps))
    return found


def unanswered(run: Run) -> list[list[str]]:
    """The cells of a table with the model calls without an answer, by stage. Empty if every call was answered."""
    found = [(s, reasons) for s in run.stages if (reasons := reasons_in(s.manifest.metrics))]
    rows = [
        [f"{s.name}, iteration {s.iteration}", *(str(reasons.get(name, 0)) for name in CALL_LABELS)]
        for s, reasons in found
    ]
    return [["", *CALL_LABELS.values()], *rows] if rows else []


class Cost(NamedTuple):
    """The cost of a stage over all iterations. `share` is its seconds divided by those of the most expensive stage."""

    name: str
    seconds: float
    share: float
    peak_memory_bytes: int


def costs(run: Run) -> list[Cost]:
    """The cost of each stage, the most expensive one first."""
    seconds: dict[str, float] = defaultdict(float)
    memory: dict[str, int] = defaultdict(int)
    for s in run.stages:
        seconds[s.name] += s.manifest.seconds
        memory[s.name] = max(memory[s.name], s.manifest.peak_memory_bytes)
    top = max(seconds.values()) or math.inf
    ordered = sorted(seconds.items(), key=lambda item: -item[1])
    return [Cost(name, total, total / top, memory[name]) for name, total in ordered]
