"""The table that a run prints at its end, from the published metrics of the evaluations: one column for each model.

It is plain text and Markdown, so that a terminal can show it. `page` has the plots and the browser.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from nemo_srl.records import Metric

ROWS: Sequence[tuple[str, str, str]] = (
    ("valid_verdict_rate", "valid verdicts", "{:.0%}"),
    ("score_entropy", "entropy of the scores, 0 to 1", "{:.2f}"),
    ("pairwise_accuracy", "pairwise accuracy, ties excluded", "{:.1%}"),
    ("pairwise_accuracy_ties_half", "pairwise accuracy, ties half", "{:.1%}"),
    ("pairwise_accuracy_ties_wrong", "pairwise accuracy, ties wrong", "{:.1%}"),
    ("tie_rate", "tied pairs of held-out answers", "{:.0%}"),
    ("exact_match", "exact match of the ordering", "{:.1%}"),
    ("five_best", "5-best", "{:.1%}"),
    ("spearman", "Spearman", "{:.3f}"),
    ("kendall", "Kendall tau", "{:.3f}"),
    ("pairwise_accuracy_models", "pairwise accuracy, models' answers", "{:.1%}"),
    ("surface_accuracy", "pairwise accuracy of the surface", "{:.1%}"),
    ("true_score", "true score of the answers, 0 to 5", "{:.2f}"),
    ("self_score", "self-score, 0 to 5", "{:.2f}"),
    ("response_tokens", "response length, tokens", "{:.0f}"),
    ("response_characters", "response length, characters", "{:.0f}"),
    ("truncated_rate", "responses cut off", "{:.0%}"),
    ("tied_prompt_rate", "tied prompts", "{:.0%}"),
    ("pairs_per_100_prompts", "pairs per 100 prompts", "{:.0f}"),
)
"""Metric, label, format. The shares of the scores make one more row."""
CHECKED = frozenset({"pairwise_accuracy_models", "surface_accuracy", "true_score"})
"""Rows that are left out when no model has them: only runs with `data.checked_path` do."""
UNANSWERED_ROWS: Sequence[tuple[str, str, str]] = (
    ("unanswered_rate", "questions without an answer", "{:.1%}"),
    ("unanswered_verdict_rate", "verdicts that were not given", "{:.1%}"),
)
"""Rows that are shown if a model has the metric, which it has if something is missing."""


NO_VALUE = "not identifiable"
"""Stands where the data allow an interval and no value."""


def table(evaluations: Mapping[str, Sequence[Metric]]) -> str:
    """A Markdown table of `{model name: its metrics}`. Each value has its `n`."""
    return markdown(cells(evaluations))


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table. The first line is its head. The columns are aligned, so that it can be read as plain text."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    rows = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines]
    rule = "|" + "|".join("-" * (w + 2) for w in widths) + "|"
    return "\n".join([rows[0], rule, *rows[1:]])


def cells(evaluations: Mapping[str, Sequence[Metric]]) -> list[list[str]]:
    """The cells of the table: a line with the models' names, then a line for each metric, with its label first."""
    measured = {m.name for metrics in evaluations.values() for m in metrics}
    rows = [row for row in ROWS if row[0] in measured or row[0] not in CHECKED]
    lines = metric_lines(evaluations, [*rows, *(row for row in UNANSWERED_ROWS if row[0] in measured)])
    shares = (" ".join(f"{100 * x:.0f}" for x in score_shares(metrics)) for metrics in evaluations.values())
    return [*lines, ["share of scores 0 to 5, %", *(x or "-" for x in shares)]]


def metric_lines(columns: Mapping[str, Sequence[Metric]], rows: Iterable[tuple[str, str, str]]) -> list[list[str]]:
    """A line with the names of the columns, then a line for each of `rows`, as in `ROWS`."""
    found = [{m.name: m for m in metrics} for metrics in columns.values()]
    return [["", *columns], *([label, *(_cell(x.get(name), form) for x in found)] for name, label, form in rows)]


def _cell(metric: Metric | None, form: str) -> str:
    cell = with_interval(metric, form, form) if metric else "-"
    return f"{cell} (n {metric.n})" if metric and cell != "-" else cell


def with_interval(metric: Metric, form: str, bounds: str) -> str:
    """The value and its interval, in the formats `form` and `bounds`. It may be an interval alone."""
    value = "-" if metric.value is None else form.format(metric.value)
    if metric.low is None or metric.high is None:
        return value
    return f"{NO_VALUE if value == '-' else value} [{bounds.format(metric.low)}, {bounds.format(metric.high)}]"


def score_shares(metrics: Sequence[Metric]) -> list[float]:
    """The share of each score, from 0 upwards. Empty when they were not measured."""
    found = {int(m.name.rsplit("_", 1)[1]): m.value or 0.0 for m in metrics if m.name.startswith("score_share_")}
    return [found[score] for score in sorted(found)]
