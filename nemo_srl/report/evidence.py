"""The evidence of a run in two tables: each model beside the model before it, and what made each table.

A change is paired: both models met the same items, so most of the difference between items cancels out. That is more
than a look at two intervals tells. True scores and IFEval's figures are counted by code. The judge's accuracy is its
agreement with the given order of held-out answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nemo_srl.config import Config
from nemo_srl.judging import READERS
from nemo_srl.judging.intervals import SHARE, Limits, Sums, paired_change, ratio
from nemo_srl.records import Metric
from nemo_srl.report.drift import Drift, drift
from nemo_srl.report.text import with_interval
from nemo_srl.runs import Run, read_spec

ModelSums = Mapping[str, Mapping[str, Sums]]
"""What each item adds to each metric, by the name of the model, in the order of the models."""


class Measure(NamedTuple):
    """A metric that models are compared by. `factor` and `form` write its value, as in 75.2 for a share of 0.752."""

    metric: str
    label: str
    limits: Limits
    factor: float
    form: str


_SETTINGS: Mapping[str, Sequence[str]] = {
    "sft": ("sft.learning_rate", "sft.max_epochs"),
    "candidates": ("candidates.num_samples", "candidates.temperature", "candidates.max_tokens"),
    "pairs": ("pairs.rule", "pairs.min_margin", "pairs.rho", "pairs.num_pairs", "pairs.anchor", "pairs.second_judge"),
    "verdict_pairs": ("verdict_pairs.source", "verdict_pairs.num_prompts", "verdict_pairs.num_seed"),
    "taught_verdicts": ("verdict_pairs.source", "verdict_pairs.num_prompts"),
    "meta_judge": ("verdict_pairs.source", "verdict_pairs.num_prompts", "verdict_pairs.max_chars"),
    "policy": (
        "dpo.preference_loss",
        "dpo.beta",
        "dpo.sft_loss_weight",
        "dpo.verdict_weight",
        "dpo.compare_verdicts",
        "dpo.simpo_gamma",
        "pairs.accumulate",
    ),
    "refresh": ("refresh.learning_rate", "refresh.max_epochs"),
}
"""The settings that tell methods apart, by stage. Those of `_OPTIONAL` are left out if they are the default."""
_OPTIONAL = frozenset({
    "pairs.rho", "pairs.num_pairs", "pairs.anchor", "pairs.second_judge", "pairs.accumulate", "dpo.simpo_gamma",
    "verdict_pairs.num_seed", "verdict_pairs.max_chars", "dpo.verdict_weight",
    "dpo.compare_verdicts",
})  # fmt: skip
_JUDGED: Mapping[str, Sequence[str]] = {
    "judgements": ("judge", "policy"),
    "taught_verdicts": ("judge",),
    "meta_judge": ("judge",),
    "anchor": ("judge", "policy"),
    "eft": ("judge", "policy"),
    "head_to_head": ("judge", "policy"),
    "evaluation": ("policy",),
}
"""By stage: the input that judges, with its older names."""
_BY_CODE = ("checked", "ifeval")

MEASURES = (
    Measure("true_score", "true score, 0 to 5", (0.0, 5.0), 1, ".2f"),
    Measure("ifeval_prompt_strict", "IFEval prompts, strict, %", SHARE, 100, ".1f"),
    Measure("pairwise_accuracy_ties_half", "judge: pairwise accuracy, ties half, %", SHARE, 100, ".1f"),
    Measure("pairwise_accuracy_models", "judge: pairwise accuracy, models' answers, %", SHARE, 100, ".1f"),
)


def evidence_cells(sums: ModelSums, drifts: Sequence[Drift] = ()) -> list[list[str]]:
    """The cells of a table with a line for each model: each measure, its paired change from the model before, and the
    agreement of the two models' scores. The last line compares the last model with M1, or with the first model.

    Empty if no model was measured.
    """
    shown = [m for m in MEASURES if any(m.metric in found for found in sums.values())]
    if not shown:
        return []
    agreements = {d.model: "-" if d.spearman is None else f"{d.spearman:.2f} (n {d.n})" for d in drifts}
    names = list(sums)
    lines = [["", *(cell for m in shown for cell in (m.label, "change")), "agreement with the model before"]]
    empty: Mapping[str, Sums] = {}
    for before, model in zip([empty, *sums.values()], names, strict=False):
        cells = [cell for m in shown for cell in (_value(m, sums[model]), _change(m, before, sums[model]))]
        lines.append([model, *cells, agreements.get(model, "-")])
    first, last = "M1" if "M1" in names else names[0], names[-1]
    if names.index(last) - names.index(first) > 1:
        cells = [cell for m in shown for cell in ("", _change(m, sums[first], sums[last]))]
        lines.append([f"{last} - {first}", *cells, ""])
    return lines if agreements else [line[:-1] for line in lines]


def of_run(run: Run) -> list[list[str]]:
    """`evidence_cells` of a self-rewarding run."""
    return evidence_cells(run.sums(run.measured()), drift(run, run.evaluated()))


def _value(m: Measure, found: Mapping[str, Sums]) -> str:
    return _cell(ratio(found.get(m.metric, {}), m.limits).named(m.metric), m, sign="")


def _change(m: Measure, before: Mapping[str, Sums], after: Mapping[str, Sums]) -> str:
    found = paired_change(before.get(m.metric, {}), after.get(m.metric, {}), m.limits)
    return _cell(found.named(m.metric), m, sign="+")


def _cell(metric: Metric, m: Measure, *, sign: str) -> str:
    low, value, high = (None if x is None else x * m.factor for x in (metric.low, metric.value, metric.high))
    form = f"{{:{sign}{m.form}}}"
    text = with_interval(Metric(name=m.metric, value=value, n=metric.n, low=low, high=high), form, form)
    return text if text == "-" else f"{text} (n {metric.n})"


def made_by_cells(run: Run, names: Mapping[str, str]) -> list[list[str]]:
    """The cells of a table with a line for each stage that a method decides: its settings, and its judge.

    Names and settings are those that the artifacts have recorded. `names` is that of `judge_of`.
    """
    lines = [["", "settings", "judge", "how the judge is asked"]]
    for stage in run.stages:
        name, spec = stage.manifest.stage, read_spec(stage.path)
        settings, judge, asked = _settings(spec["config"], _SETTINGS.get(name, ())), "", ""
        inputs = [x for x in _JUDGED.get(name, ()) if x in spec["inputs"]]
        if inputs:
            judge, asked = judge_of(spec, names, *inputs), _asked(name, spec["config"]["judge"])
        elif name in _BY_CODE or name in _JUDGED:
            judge = "code"
            asked = spec["config"]["judge"].get("verifier", "") if name == "judgements" else ""
        if settings or judge:
            lines.append([f"{stage.path.parent.name}/{stage.name}", settings or "-", judge or "-", asked or "-"])
    return lines


def names_of(run: Run) -> dict[str, str]:
    """The models of a self-rewarding run, by the ends of their paths. A run directory may have been moved."""
    named = {"/".join(stage.path.parts[-2:]): model for model, stage in run.models().items()}
    sft = run.find(0, "sft")
    policy = read_spec(sft.path)["inputs"].get("policy") if sft else None
    return {policy["path"]: "M0", **named} if policy else named


def judge_of(spec: Mapping[str, Any], names: Mapping[str, str], *inputs: str) -> str:
    """The name of a stage's judge: that of a server's model, of a model in `names`, or of a directory.

    `names` has models by the ends of their paths. `inputs` are the names of the stage's input, of which it has one.
    """
    engine = spec["config"]["judge"]["engine"] or spec["config"]["engine"]
    path = next(spec["inputs"][name]["path"] for name in inputs if name in spec["inputs"])
    # The directory of every trained model is called `hf`, so the directories above it are needed to tell it apart.
    parts = Path(path).parts
    place = "/".join(parts[-3:]) if parts[-1] == "hf" else parts[-1]
    return str(engine.get("model") or next((name for end, name in names.items() if path.endswith(end)), place))


def _asked(stage: str, judge: Mapping[str, Any]) -> str:
    if stage == "meta_judge":
        return f"two verdicts in both orders, temperature {judge['temperature']:g}"
    mode = str(judge.get("mode", "sampled"))
    if stage == "head_to_head":
        mode = "pairwise"
    elif stage == "evaluation" and mode in READERS:
        mode = READERS[mode].absolute or mode
    return f"{mode}, K {judge['num_judgements']}, temperature {judge['temperature']:g}"


def _settings(config: Mapping[str, Any], keys: Sequence[str]) -> str:
    """The recorded settings. An older version may not have all of them."""
    found = []
    for key in keys:
        section, name = key.split(".")
        value = config.get(section, {}).get(name)
        is_default = value == getattr(getattr(Config(), section), name)
        if value is not None and not (key in _OPTIONAL and is_default):
            found.append(f"{key}={value}")
    return ", ".join(found)
