"""Tables and plots of the results of `prove.py`: what the oracle measured, over all seeds.

    python examples/proof/figures.py RESULTS_JSONL OUTPUT_DIR

Writes `table.md` and `proof.png`. Intervals are 95% percentiles of a bootstrap that draws seeds with replacement.
Differences between arms and between models are first taken within a seed, because the arms of a seed share M1, data and
prompts. With three seeds, an interval is hardly more than the range of the seeds. It is no statistical test.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

Row = Mapping[str, Any]
Runs = Mapping[str, Mapping[int, Mapping[int, Row]]]
"""Rows by arm, seed and model."""

ARMS = ("oracle", "self", "frozen", "refresh", "positives_only", "random", "weak_judge", "no_eft")
"""The arms that stand first in the tables, in this order."""
COLOURS = {
    "oracle": "#555555",
    "self": "#0072b2",
    "frozen": "#56b4e9",
    "refresh": "#009e73",
    "positives_only": "#e69f00",
    "random": "#d55e00",
    "weak_judge": "#cc79a7",
    "no_eft": "#999999",
    "iterative_rpo": "#2ca02c",
    "meta_rewarding": "#17becf",
    "self_meta": "#8c564b",
    "cream": "#bcbd22",
    "temporal": "#444444",
    "self_taught_evaluator": "#9467bd",
    "simpo_self_rewarding": "#e377c2",
}
COLUMNS: Sequence[tuple[str, str, str]] = (
    ("oracle_score", "true score", "{:.2f}"),
    ("self_score", "self-score", "{:.2f}"),
    ("self_minus_true", "self minus true", "{:+.2f}"),
    ("pairwise_accuracy_ties_half", "judge accuracy, ties half", "{:.3f}"),
    ("tie_rate", "tied pairs", "{:.1%}"),
    ("valid_verdict_rate", "valid verdicts", "{:.1%}"),
    ("true_margin", "true margin of the pairs", "{:+.2f}"),
    ("anchor.anchor_agreement", "M1 agrees with the pairs", "{:.2f}"),
    ("anchor.self_minus_anchor", "self minus M1's score", "{:+.2f}"),
    ("anchor.score_entropy", "score entropy", "{:.2f}"),
    ("second_anchor.anchor_agreement", "second judge agrees", "{:.2f}"),
    ("second_anchor.self_minus_anchor", "self minus second judge", "{:+.2f}"),
)
PANELS: Sequence[tuple[str, str]] = (
    ("oracle_score", "True score of held-out answers (0 to 5)"),
    ("self_minus_true", "Self-score minus true score"),
    ("pairwise_accuracy_ties_half", "Judge: pairs ordered as the oracle does"),
    ("true_margin", "True margin of the new pairs"),
    ("anchor.anchor_agreement", "No oracle: share of pairs in which M1 agrees"),
    ("second_anchor.anchor_agreement", "No oracle: share in which a second judge agrees"),
)


def arms_of(runs: Runs) -> list[str]:
    """All arms, in the order of the tables."""
    return [*(a for a in ARMS if a in runs), *sorted(runs.keys() - set(ARMS))]


def read(path: Path) -> Runs:
    runs: dict[str, dict[int, dict[int, Row]]] = defaultdict(lambda: defaultdict(dict))
    for line in path.read_text().splitlines():
        row = json.loads(line)
        runs[row["arm"]][row["seed"]][row["model"]] = row
    return runs


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95% interval of the mean. Up to five seeds, every way to draw them is counted."""
    if len(values) <= 5:
        means = [fmean(draw) for draw in itertools.product(values, repeat=len(values))]
    else:
        draws = np.random.default_rng(0).choice(values, size=(10_000, len(values)))
        means = list(draws.mean(axis=1))
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def colour(arm: str) -> str:
    """The colour of an arm's lines. Arms without one of their own get one by their name."""
    others = ("#8c564b", "#17becf", "#bcbd22", "#e377c2", "#7f7f7f", "#2ca02c", "#9467bd", "#ff7f0e")
    return COLOURS.get(arm) or others[sum(map(ord, arm)) % len(others)]


def models_of(seeds: Mapping[int, Mapping[int, Row]]) -> list[int]:
    return sorted({model for rows in seeds.values() for model in rows})


def cell(seeds: Mapping[int, Mapping[int, Row]], model: int, key: str, form: str) -> str:
    values = [rows[model][key] for rows in seeds.values() if model in rows and rows[model].get(key) is not None]
    if not values:
        return "-"
    if len(values) == 1:
        return form.format(values[0])
    low, high = interval(values)
    return f"{form.format(fmean(values))} [{form.format(low)}, {form.format(high)}]"


def main_table(runs: Runs) -> list[str]:
    lines = ["| arm | model | seeds | " + " | ".join(label for _, label, _ in COLUMNS) + " |"]
    lines.append("|" + "---|" * (len(COLUMNS) + 3))
    for arm in arms_of(runs):
        for model in models_of(runs[arm]):
            num_seeds = sum(model in rows for rows in runs[arm].values())
            cells = [cell(runs[arm], model, key, form) for key, _, form in COLUMNS]
            lines.append(f"| {arm} | M{model} | {num_seeds} | " + " | ".join(cells) + " |")
    return lines


def differences(runs: Runs) -> list[str]:
    """Differences between models and between arms, within seeds."""
    lines = ["| difference | mean | 95% | seeds |", "|---|---|---|---|"]

    def add(label: str, pairs: Sequence[tuple[float | None, float | None]]) -> None:
        values = [a - b for a, b in pairs if a is not None and b is not None]
        if values:
            low, high = interval(values)
            between = f"[{low:+.3f}, {high:+.3f}]" if len(values) > 1 else "-"
            lines.append(f"| {label} | {fmean(values):+.3f} | {between} | {', '.join(f'{v:+.3f}' for v in values)} |")

    def at(arm: str, key: str, model: Callable[[Mapping[int, Row]], int]) -> dict[int, float | None]:
        return {s: rows[model(rows)].get(key) for s, rows in sorted(runs.get(arm, {}).items())}

    for key, name in (("oracle_score", "true score"), ("pairwise_accuracy_ties_half", "judge accuracy")):
        for arm in (a for a in arms_of(runs) if a != "no_eft"):
            last, first = at(arm, key, max), at(arm, key, min)
            label = f"{name}, {arm}: M{max(models_of(runs[arm]))} - M1"
            add(label, [(last[s], first[s]) for s in last])
        for other in (a for a in arms_of(runs) if a not in ("self", "weak_judge", "no_eft")):
            mine, theirs = at("self", key, max), at(other, key, max)
            add(f"{name}, last model: self - {other}", [(mine[s], theirs[s]) for s in mine if s in theirs])
    return lines


def alarm_lines(runs: Runs) -> list[str]:
    """For each run: when its true score was highest, and which alarms came when."""
    lines = ["| arm | seed | true score, M1 first | highest at | M1's alarms, by iteration | a second judge's |"]
    lines.append("|---|---|---|---|---|---|")
    for arm, seeds in ((a, runs[a]) for a in arms_of(runs)):
        for seed, rows in sorted(seeds.items()):
            true = {model: row["oracle_score"] for model, row in sorted(rows.items())}
            best = max(true, key=lambda model: true[model])
            scores = " ".join(f"{score:.2f}" for score in true.values())
            found = [_alarms_of(rows, f"{name}.alarms") for name in ("anchor", "second_anchor")]
            lines.append(f"| {arm} | {seed} | {scores} | M{best} | {' | '.join(found)} |")
    return lines


def _alarms_of(rows: Mapping[int, Row], key: str) -> str:
    if not any(key in row for row in rows.values()):
        return "-"
    return "; ".join(f"{model}: {', '.join(row[key])}" for model, row in sorted(rows.items()) if row.get(key)) or "none"


def plot(runs: Runs, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(2, 3, figsize=(13, 7.5), layout="constrained")
    for axis, (key, title) in zip(axes.flat, PANELS, strict=True):
        ends: list[tuple[float, float, str]] = []
        for arm in (a for a in arms_of(runs) if a != "no_eft"):
            means: list[tuple[int, float]] = []
            for model in models_of(runs[arm]):
                values = [r[model][key] for r in runs[arm].values() if model in r and r[model].get(key) is not None]
                if values:
                    means.append((model, fmean(values)))
            for rows in runs[arm].values():
                points = [(m, r[key]) for m, r in sorted(rows.items()) if r.get(key) is not None]
                if points:
                    axis.plot(*zip(*points, strict=True), color=colour(arm), alpha=0.25, linewidth=0.8)
            if means:
                axis.plot(
                    *zip(*means, strict=True),
                    color=colour(arm),
                    linewidth=2,
                    marker="o",
                    markersize=3,
                    linestyle=_style(runs[arm]),
                )
                axis.margins(y=0.12)
                ends.append((means[-1][0], means[-1][1], arm))
        if not ends:
            axis.set_visible(False)  # for example, no arm has a second judge
            continue
        axis.set_title(title, loc="left", fontsize=10)
        last = max(x for x, _, _ in ends)
        axis.set_xticks(range(1, int(last) + 1), [f"M{m}" for m in range(1, int(last) + 1)])
        axis.set_xlim(0.9, last + 0.3 * last)
        axis.grid(axis="y", alpha=0.3)
        _label(axis, ends, {arm: len(seeds) for arm, seeds in runs.items()})
    lines = "Thick: mean of 3 seeds (dashed: one seed); thin: each seed."
    figure.suptitle(f"{lines} Only `oracle` and `iterative_rpo` train on true scores.", x=0.01, ha="left")
    figure.savefig(path, dpi=130)


def _style(seeds: Mapping[int, Any]) -> str:
    return "--" if len(seeds) == 1 else "-"


def _label(axis: Any, ends: list[tuple[float, float, str]], num_seeds: Mapping[str, int]) -> None:
    """Write the names at the ends of the lines, moved apart where they would overlap, and mark arms with one seed."""
    low, high = axis.get_ylim()
    gap, floor = (high - low) * 0.05, -np.inf
    for x, y, arm in sorted(ends, key=lambda end: end[1]):
        floor = max(y, floor + gap)
        axis.annotate(
            arm.replace("_", " ") + (" (1 seed)" if num_seeds[arm] == 1 else ""),
            (x, y),
            xytext=(x + 0.12, floor),
            color=colour(arm),
            va="center",
            fontsize=8,
            arrowprops={"arrowstyle": "-", "color": colour(arm), "linewidth": 0.5, "alpha": 0.5},
        )


def main(results: Path, output: Path) -> None:
    runs = read(results)
    output.mkdir(parents=True, exist_ok=True)
    text = ["## Means over seeds", "", *main_table(runs), "", "## Differences within seeds", "", *differences(runs)]
    text += ["", "## Alarms", "", *alarm_lines(runs)]
    (output / "table.md").write_text("\n".join(text) + "\n")
    plot(runs, output / "proof.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
