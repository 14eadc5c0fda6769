"""What the page shows above its browser: charts, counts and costs, computed from the published artifacts.

Nothing is required, because a run may be under way. A section without data is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
from markupsafe import Markup

from nemo_srl.judging import agreement, mean_scores
from nemo_srl.pairing import LABELS
from nemo_srl.records import Candidate, Judgement, Metric, PreferencePair
from nemo_srl.report import paper
from nemo_srl.report.charts import Point, Segment, Series, bar_chart, curve_chart, line_chart, stacked_bar
from nemo_srl.runs import Run, StageRun
from nemo_srl.stages import LOOP, stage_named

Evaluations = Mapping[str, Sequence[Metric]]
_NUM_BINS = 12
_PAPER_COLOR = 5
_SHARE, _CORRELATION = (0.0, 1.0), (-1.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class Chart:
    """`legend` has (color, dashed, name) for each series."""

    title: str
    svg: Markup
    legend: Sequence[tuple[int, bool, str]] = ()
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Funnel:
    """What happened to the prompts of one iteration."""

    iteration: int
    outcome: Markup
    segments: Sequence[Segment]
    steps: Sequence[tuple[str, str]]
    """(what, how many), in the order of the stages."""


def _percent(value: float) -> str:
    return f"{100 * value:.3g}%"


def _two(value: float) -> str:
    return f"{value:.2f}"


def _whole(value: float) -> str:
    return f"{value:.0f}"


def metric_chart(
    evaluations: Evaluations,
    name: str,
    title: str,
    form: Callable[[float], str],
    *,
    limits: tuple[float, float] = (-math.inf, math.inf),
    reference: Mapping[str, float] | None = None,
    note: str = "",
) -> Chart | None:
    """One metric of every model, or None when no model has it. `reference`: the paper's figures by model name."""
    models = list(evaluations)
    found = {m: next((x for x in evaluations[m] if x.name == name), None) for m in models}
    ours = [
        Point(x=i, value=metric.value, low=metric.low, high=metric.high)
        for i, metric in enumerate(found.values())
        if metric is not None and metric.value is not None
    ]
    if not ours:
        return None
    series = [Series(name="this run", points=ours)]
    theirs = [Point(x=i, value=reference[m]) for i, m in enumerate(models) if reference and m in reference]
    if theirs:
        series.append(Series(name="the paper (70B)", points=theirs, color=_PAPER_COLOR, dashed=True))
    legend = [(s.color, s.dashed, s.name) for s in series] if theirs else ()
    return Chart(
        title=title, svg=line_chart(series, models, title=title, form=form, limits=limits), legend=legend, note=note
    )


def judging_charts(evaluations: Evaluations) -> list[Chart]:
    """How well each model judges: agreement with the given scores of held-out answers (paper, table 4)."""
    wanted = (
        ("pairwise_accuracy", "Pairwise accuracy, ties excluded", _percent, _SHARE),
        ("spearman", "Spearman correlation", _two, _CORRELATION),
        ("kendall", "Kendall's tau", _two, _CORRELATION),
        ("exact_match", "Exact match of the ordering", _percent, _SHARE),
        ("five_best", "5-best", _percent, _SHARE),
        ("valid_verdict_rate", "Valid verdicts", _percent, _SHARE),
    )
    charts = [
        metric_chart(evaluations, name, title, form, limits=limits, reference=paper.JUDGING.get(name))
        for name, title, form, limits in wanted
    ]
    return [c for c in charts if c]


def answering_charts(evaluations: Evaluations) -> list[Chart]:
    """How well each model answers, as far as the run can measure it without another judge."""
    own_opinion = "the model's own opinion of its answers"
    charts = [
        metric_chart(evaluations, "self_score", "Self-score, 0 to 5", _two, limits=(0, 5), note=own_opinion),
        metric_chart(
            evaluations, "response_characters", "Length of answers, characters", _whole, reference=paper.LENGTH,
            note="the paper measured it on AlpacaEval",
        ),
        metric_chart(evaluations, "pairs_per_100_prompts", "Pairs per 100 held-out prompts", _whole, limits=(0, 100)),
    ]  # fmt: skip
    return [c for c in charts if c]


def score_charts(run: Run, evaluations: Evaluations) -> list[Chart]:
    """The distribution of the scores: on held-out data by model, and on candidates by iteration."""
    by_model = {m: shares for m, metrics in evaluations.items() if (shares := _shares(metrics))}
    max_score = int(run.config()["judge"]["max_score"])
    by_iteration = {}
    for t in run.iterations:
        counts = agreement.histogram([j.score for j in run.table(t, "judgements", Judgement)], max_score=max_score)
        if sum(counts):
            by_iteration[f"answers of M{t}"] = [count / sum(counts) for count in counts]
    charts = []
    for title, groups in (("Verdicts on held-out data", by_model), ("Verdicts on candidates", by_iteration)):
        if groups:
            labels = [str(k) for k in range(max(map(len, groups.values())))]
            svg = bar_chart(list(groups.items()), labels, title=title)
            charts.append(Chart(title=title, svg=svg, legend=[(i % 6, False, name) for i, name in enumerate(groups)]))
    note = "0: all scores are the same"
    title = "Saturation: verdicts with the highest score"
    by_model_alone = (
        metric_chart(evaluations, "score_entropy", "Entropy of scores, 0 to 1", _two, limits=_SHARE, note=note),
        metric_chart(evaluations, f"score_share_{max_score}", title, _percent, limits=_SHARE),
    )
    return charts + [c for c in by_model_alone if c]


def _shares(metrics: Sequence[Metric]) -> list[float]:
    found = sorted(
        (int(m.name.rsplit("_", 1)[1]), m.value or 0.0) for m in metrics if m.name.startswith("score_share_")
    )
    return [value for _, value in found]


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Mean lengths in one iteration: `tokens` of all candidates, characters of the chosen and rejected ones.

    `correlation` is Pearson's r of a candidate's mean score and its characters.
    """

    iteration: int
    tokens: float
    chosen: float | None
    rejected: float | None
    correlation: float | None


def lengths(run: Run) -> tuple[list[Lengths], list[Chart]]:
    """The lengths of answers, of chosen and of rejected ones, and whether the judge prefers long answers."""
    rows, tokens = [], {}
    for t in run.iterations:
        candidates = run.table(t, "candidates", Candidate)
        if not candidates:
            continue
        pairs = run.table(t, "pairs", PreferencePair)
        tokens[t] = [c.num_tokens for c in candidates]
        row = Lengths(
            iteration=t,
            tokens=fmean(tokens[t]),
            chosen=fmean(len(p.chosen) for p in pairs) if pairs else None,
            rejected=fmean(len(p.rejected) for p in pairs) if pairs else None,
            correlation=score_length_correlation(candidates, run.table(t, "judgements", Judgement)),
        )
        rows.append(row)
    if not tokens:
        return [], []
    top = max(max(x) for x in tokens.values()) + 1
    edges = np.linspace(0, top, _NUM_BINS + 1)
    groups = [(f"iteration {t}", (np.histogram(x, edges)[0] / len(x)).tolist()) for t, x in tokens.items()]
    labels = [f"{edge:.0f}" if i % 3 == 0 else "" for i, edge in enumerate(edges[:-1])]
    title = "Tokens of candidates"
    legend = [(i % 6, False, name) for i, (name, _) in enumerate(groups)]
    return rows, [Chart(title=title, svg=bar_chart(groups, labels, title=title), legend=legend)]


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
    kinds: Sequence[tuple[str, str]] = (
        ("loss", "loss by step"),
        ("rewards_margin", "reward margin by step"),
        ("acc", "share of pairs in the right order, by step"),
    )
    trainings = {model: run.training(stage) for model, stage in run.models().items()}
    dpo = {model: lines for model, lines in trainings.items() if any("rewards_margin" in x for x in lines)}
    sft = {model: lines for model, lines in trainings.items() if model not in dpo}
    charts = []
    for name, group, keys in (("SFT", sft, kinds[:1]), ("DPO", dpo, kinds)):
        for key, label in keys:
            curves = [(m, [(x["step"], x[key]) for x in lines if key in x]) for m, lines in group.items()]
            curves = [(m, points) for m, points in curves if points]
            if curves:
                title = f"{name}: {label}"
                legend = [(i % 6, False, m) for i, (m, _) in enumerate(curves)]
                charts.append(Chart(title=title, svg=curve_chart(curves, title=title), legend=legend))
    return charts


def funnels(run: Run) -> list[Funnel]:
    """What happened to the prompts of each iteration."""
    found = []
    for t in run.iterations:
        pairs = run.find(t, "pairs")
        if pairs is None:
            continue
        counts = {k.removeprefix("num_"): n for k, n in pairs.manifest.metrics.items() if k.startswith("num_")}
        # The known reasons always come in the same order, and so have the same colors in every run.
        reasons = dict.fromkeys([*(name for name in LABELS if name in counts), *sorted(counts.keys() - {"pairs"})])
        segments = [
            Segment(name={"pairs": "a pair", **LABELS}.get(name, name), value=counts[name], color=i % 6)
            for i, name in enumerate(["pairs", *reasons])
        ]
        svg = stacked_bar(segments, title=f"Prompts of iteration {t}")
        found.append(Funnel(iteration=t, outcome=svg, segments=segments, steps=_steps(run, t)))
    return found


def _steps(run: Run, t: int) -> list[tuple[str, str]]:
    made = [s.manifest for name in LOOP if (s := run.find(t, name)) and s.manifest.stage == name]
    return [line for manifest in made for line in stage_named(manifest.stage).summary(manifest.metrics)]


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The cost of a stage over all iterations. `share` is its seconds divided by those of the most expensive stage."""

    name: str
    seconds: float
    share: float
    peak_memory_bytes: int


def costs(run: Run) -> list[Cost]:
    """The cost of each stage, the most expensive one first."""
    by_name: dict[str, list[StageRun]] = {}
    for s in run.stages:
        by_name.setdefault(s.name, []).append(s)
    seconds = {name: sum(s.manifest.seconds for s in stages) for name, stages in by_name.items()}
    top = max(seconds.values()) or math.inf
    return [
        Cost(
            name=name,
            seconds=seconds[name],
            share=seconds[name] / top,
            peak_memory_bytes=max(s.manifest.peak_memory_bytes for s in by_name[name]),
        )
        for name in sorted(seconds, key=lambda n: -seconds[n])
    ]
