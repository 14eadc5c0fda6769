"""What the page shows above its browser, computed from the published artifacts: charts, counts, cost.

Everything is optional: a run under way has what it has, and a section without data is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
from markupsafe import Markup

from nemo_srl.judging import agreement
from nemo_srl.judging.verdicts import mean_score
from nemo_srl.records import Candidate, Judgement, Metric, PreferencePair
from nemo_srl.report import paper
from nemo_srl.report.charts import Point, Segment, Series, bar_chart, curve_chart, line_chart, stacked_bar
from nemo_srl.runs import Run, StageRun
from nemo_srl.trainers.nemo_aligner.metrics import METRICS_FILE, read_metrics

Evaluations = Mapping[str, Sequence[Metric]]
_NUM_BINS = 12
_PAPER_COLOR = 5
_SHARE, _CORRELATION = (0.0, 1.0), (-1.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class Chart:
    """`legend` has (colour, dashed, name) per series."""

    title: str
    svg: Markup
    legend: Sequence[tuple[int, bool, str]] = ()
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Funnel:
    """What became of one iteration's calls."""

    iteration: int
    outcome: Markup
    segments: Sequence[Segment]
    steps: Sequence[tuple[str, str]]
    """(what, how many), in the order of the work."""


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
    """One metric of every model, the paper's figures for models of the same name beside it."""
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
    """The judge's axis: agreement with given scores on held-out answers (paper, table 4)."""
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
    """The answering axis, as far as a run can see it by itself."""
    own_opinion = "the model's own opinion of its answers"
    charts = [
        metric_chart(evaluations, "self_score", "Self-score, 0 to 5", _two, limits=(0, 5), note=own_opinion),
        metric_chart(
            evaluations, "response_characters", "Length of answers, characters", _whole, reference=paper.LENGTH,
            note="the paper's are on AlpacaEval",
        ),
        metric_chart(evaluations, "pairs_per_100_prompts", "Pairs per 100 held-out prompts", _whole, limits=(0, 100)),
    ]  # fmt: skip
    return [c for c in charts if c]


def score_charts(run: Run, evaluations: Evaluations) -> list[Chart]:
    """How scores are spread: on held-out data by model, and on the candidates by iteration."""
    by_model = {m: shares for m, metrics in evaluations.items() if (shares := _shares(metrics))}
    max_score = int(run.config()["judge"]["max_score"])
    by_iteration = {}
    for t in run.iterations:
        counts = agreement.histogram([j.score for j in run.table(t, "judgements", Judgement)], max_score=max_score)
        if sum(counts):
            by_iteration[f"M{t} judging itself"] = [count / sum(counts) for count in counts]
    charts = []
    for title, groups in (("Verdicts on held-out data", by_model), ("Verdicts on candidates", by_iteration)):
        if groups:
            labels = [str(k) for k in range(max(map(len, groups.values())))]
            svg = bar_chart(list(groups.items()), labels, title=title)
            charts.append(Chart(title=title, svg=svg, legend=[(i % 6, False, name) for i, name in enumerate(groups)]))
    note = "0: always the same score"
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
    """Of one iteration; characters, except `tokens`. `correlation` is Pearson's r of mean score and length."""

    iteration: int
    tokens: float
    chosen: float | None
    rejected: float | None
    correlation: float | None


def lengths(run: Run) -> tuple[list[Lengths], list[Chart]]:
    """Lengths of answers, chosen against rejected, and whether the judge likes long ones."""
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
    """Pearson's r of a candidate's mean score and its characters; None where one of them never varies."""
    scores: dict[str, list[float | None]] = {}
    for j in judgements:
        scores.setdefault(j.candidate_key, []).append(j.score)
    points = [(score, len(c.response)) for c in candidates if (score := mean_score(scores.get(c.key, ()))) is not None]
    if len(points) < 2:
        return None
    x, y = np.array(points, dtype=np.float64).T
    return float(np.corrcoef(x, y)[0, 1]) if x.std() and y.std() else None


def training_charts(run: Run) -> list[Chart]:
    """Loss of each training, and of DPO the rewards' margin and accuracy, by step."""
    kinds: Sequence[tuple[str, str]] = (
        ("loss", "loss by step"),
        ("rewards_margin", "reward margin by step"),
        ("acc", "pairs in the right order, by step"),
    )
    trainings = {model: _metrics_of(stage) for model, stage in run.models().items()}
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


def _metrics_of(stage: StageRun) -> list[dict[str, float]]:
    path = stage.path / "training" / METRICS_FILE
    return read_metrics(path) if path.exists() else []


def funnels(run: Run) -> list[Funnel]:
    """What became of each iteration's prompts."""
    found = []
    for t in run.iterations:
        pairs = run.find(t, "pairs")
        if pairs is None:
            continue
        m = pairs.manifest.metrics
        names = ("pairs", "tied", "identical", "unscored", "truncated")
        labels = ("a pair", "tied", "equal texts", "no scores", "all cut off")
        segments = [
            Segment(name=label, value=m.get(f"num_{name}", 0), color=i)
            for i, (name, label) in enumerate(zip(names, labels, strict=True))
        ]
        title = f"Prompts of iteration {t}"
        svg = stacked_bar(segments, title=title)
        steps = _steps(run, t, num_prompts=sum(s.value for s in segments), num_pairs=m["num_pairs"])
        found.append(Funnel(iteration=t, outcome=svg, segments=segments, steps=steps))
    return found


def _steps(run: Run, t: int, *, num_prompts: float, num_pairs: float) -> list[tuple[str, str]]:
    steps = []
    if prompts := run.find(t, "prompts"):
        m = prompts.manifest.metrics
        counts = {k.removeprefix("num_"): v for k, v in m.items() if k.startswith("num_")}
        dropped = {k: v for k, v in counts.items() if k not in ("calls", "kept")}
        reasons = ", ".join(f"{v:.0f} {k.replace('_', ' ')}" for k, v in sorted(dropped.items(), key=lambda x: -x[1]))
        steps.append(("instructions generated and dropped", reasons or "none"))
        if "novelty" in m:
            varied = f"{m['novelty']:.2f} (1: nothing in common), distinct-2 {m['distinct_2']:.2f}"
            steps.append(("their novelty against the seed and earlier ones", varied))
    steps.append(("prompts", f"{num_prompts:.0f}"))
    if candidates := run.find(t, "candidates"):
        m = candidates.manifest.metrics
        steps.append(("answers", f"{m['num_candidates']:.0f}, {m['truncated_rate']:.0%} cut off"))
    if judgements := run.find(t, "judgements"):
        m = judgements.manifest.metrics
        steps.append(("verdicts", f"{m['num_judgements']:.0f}, {1 - m['valid_rate']:.1%} without a score"))
    steps.append(("pairs", f"{num_pairs:.0f}" + (f" of {num_prompts:.0f} prompts" if num_prompts else "")))
    return steps


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of a stage, over all iterations; `share` is of the dearest stage's seconds."""

    name: str
    seconds: float
    share: float
    peak_memory_bytes: int


def costs(run: Run) -> list[Cost]:
    """What each stage took, the dearest first."""
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
