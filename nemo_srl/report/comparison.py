"""Reads a comparison of models back: their matches, their IFEval results, and every answer with its verdicts.

`recipes/evaluate.py` makes such a run directory, and may be called several times with it. `is_comparison` recognizes it
by the published answers of models.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from nemo_srl.artifacts import read_jsonl
from nemo_srl.records import Candidate, Comparison, Metric
from nemo_srl.report import paper
from nemo_srl.report.browser import CHOSEN, NEITHER, REJECTED
from nemo_srl.report.charts import Segment, stacked_bar
from nemo_srl.runs import Run, StageRun
from nemo_srl.stages import answers, evaluation, head_to_head, ifeval
from nemo_srl.stages.head_to_head import matches_of

Matches = Mapping[tuple[str, str], Sequence[Metric]]
"""The metrics of each match, by the names of its two models."""

_MAX_UNJUDGED = 0.5
OUTCOMES = ("win_rate", "tie_rate", "loss_rate")
IFEVAL = {
    "ifeval_prompt_strict": "prompts, strict",
    "ifeval_instruction_strict": "instructions, strict",
    "ifeval_prompt_loose": "prompts, loose",
    "ifeval_instruction_loose": "instructions, loose",
}


def is_comparison(run: Run) -> bool:
    return any(s.manifest.stage == answers.STAGE.name for s in run.stages)


def models(run: Run) -> list[str]:
    """The names of all models that were compared or measured."""
    answered = [s.name.removeprefix("answers_") for s in run.stages if s.name.startswith("answers_")]
    return list(dict.fromkeys([*(m for x in _played(run) for m in x.models), *answered, *following(run)]))


def judges(run: Run) -> list[str]:
    """The names of the judges of all matches: that of a server's model, of a compared model, or of a directory."""
    answered = [stage for stage in run.stages if stage.name.startswith("answers_")]
    names = {_input(run, stage, "policy"): stage.name.removeprefix("answers_") for stage in answered}
    found = []
    for x in _played(run):
        config, path = run.spec(x.stage)["config"], _input(run, x.stage, "judge", "policy")
        engine = config["judge"]["engine"] or config["engine"]
        # The directory of every trained model is called `hf`, so the directories above it are needed to tell it apart.
        place = "/".join(path.parts[-3:]) if path.name == "hf" else path.name
        found.append(engine.get("model") or names.get(path, place))
    return list(dict.fromkeys(found))


def _input(run: Run, stage: StageRun, *names: str) -> Path:
    """The path of the first of the named inputs that the stage has. Older runs call the judge `policy`."""
    inputs = run.spec(stage)["inputs"]
    return Path(next(inputs[name]["path"] for name in names if name in inputs))


def judging(run: Run) -> dict[str, list[Metric]]:
    """The metrics of each model's evaluation."""
    return _by_model(run, evaluation.STAGE.name)


def following(run: Run) -> dict[str, list[Metric]]:
    """The IFEval metrics of each model."""
    return _by_model(run, ifeval.STAGE.name)


def _by_model(run: Run, stage: str) -> dict[str, list[Metric]]:
    found = [s for s in run.stages if s.manifest.stage == stage]
    return {s.name.removeprefix(f"{stage}_"): run.table(s.iteration, s.name, Metric) for s in found}


@dataclass(frozen=True, kw_only=True)
class _Played:
    """A match in the run directory."""

    models: tuple[str, str]
    stage: StageRun


def _played(run: Run) -> list[_Played]:
    found = []
    for stage in run.stages:
        if stage.manifest.stage == head_to_head.STAGE.name:
            inputs = run.spec(stage)["inputs"]
            a, b = (_model_of(inputs[name]["path"]) for name in ("a", "b"))
            found.append(_Played(models=(a, b), stage=stage))
    return found


def _model_of(path: str) -> str:
    """The model whose answers are in a file or an artifact. Its name may contain dots and underscores."""
    return Path(path).name.removesuffix(".jsonl").removeprefix("answers_")


def matches(run: Run) -> dict[tuple[str, str], list[Metric]]:
    """The metrics of each match."""
    return {x.models: run.table(x.stage.iteration, x.stage.name, Metric) for x in _played(run)}


def match_cells(found: Matches) -> list[list[str]]:
    """The cells of a table with a line for each match."""
    head = ["a v b", "a wins", "tied", "b wins", "a wins at equal length", "p", "first preferred", "no verdict", "n"]
    lines = [head]
    for (a, b), metrics in found.items():
        m = {x.name: x for x in metrics}
        p = m["sign_test_p"].value
        lines.append(
            [
                f"{a} v {b}",
                *(share(m[name]) for name in (*OUTCOMES, "length_controlled_win_rate")),
                "-" if p is None else f"{p:.3g}",
                *(share(m[name]) for name in ("first_position_rate", "unjudged_rate")),
                str(m["win_rate"].n),
            ]
        )
    return lines


def unreadable(found: Matches) -> list[str]:
    """A warning for each match in which most questions have no readable verdict."""
    rates = {pair: next(m.value for m in metrics if m.name == "unjudged_rate") for pair, metrics in found.items()}
    return [
        f"{a} v {b}: no readable verdict on {rate:.0%} of the questions. This judge does not follow "
        "judge.pairwise_rubric. Use another one (evaluate.judge_model or judge.engine)."
        for (a, b), rate in rates.items()
        if rate is not None and rate > _MAX_UNJUDGED
    ]


def ifeval_cells(found: Mapping[str, Sequence[Metric]]) -> list[list[str]]:
    """The cells of a table with a line for each model."""
    lines = [["", *IFEVAL.values(), "prompts", "instructions"]]
    for model, metrics in found.items():
        m = {x.name: x for x in metrics}
        counts = [str(m[name].n) for name in ("ifeval_prompt_strict", "ifeval_instruction_strict")]
        lines.append([model, *(share(m[name]) for name in IFEVAL), *counts])
    return lines


def paper_cells() -> list[list[str]]:
    """The matches of the paper. The columns are the first ones of `match_cells`."""
    rows = [[name, *(f"{x:.1%}" for x in shares)] for name, shares in paper.HEAD_TO_HEAD.items()]
    return [["a v b", "a wins", "tied", "b wins"], *rows]


def share(m: Metric) -> str:
    """A share with its interval."""
    if m.value is None:
        return "-"
    interval = "" if m.low is None or m.high is None else f" [{m.low:.0%}, {m.high:.0%}]"
    return f"{m.value:.1%}{interval}"


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One match, ours or the paper's."""

    title: str
    svg: Markup
    shares: Sequence[float]
    """Won, tied, lost."""


def bars(found: Matches) -> list[Bar]:
    """A bar of the won, tied and lost questions for each match with a readable verdict."""
    made = []
    for (a, b), metrics in found.items():
        values = {m.name: m.value for m in metrics}
        shares = [x for name in OUTCOMES if (x := values[name]) is not None]
        if len(shares) == len(OUTCOMES):
            made.append(_bar(f"{a} v {b}", shares))
    return made


def paper_bars() -> list[Bar]:
    return [_bar(name, shares) for name, shares in paper.HEAD_TO_HEAD.items()]


def _bar(title: str, shares: Sequence[float]) -> Bar:
    names, colors = ("won, %", "tied, %", "lost, %"), (2, 5, 1)
    segments = [Segment(name=n, value=100 * x, color=c) for n, x, c in zip(names, shares, colors, strict=True)]
    return Bar(title=title, svg=stacked_bar(segments, title=title), shares=shares)


def browser_data(run: Run, *, max_candidates: int) -> dict[str, Any]:
    """The data of the page's browser, as `browser.browser_data` describes it.

    A prompt is a question, and its candidates are one answer of each model. `names` has the models, and the index of
    the sample is an index into it. The score of an answer is the mean of its matches: 1 won, 0.5 tied, 0 lost. CHOSEN
    marks an answer that won all of them, REJECTED one that lost all. The score of a verdict is 1 when the verdict
    prefers this answer, 0.5 for a tie and 0 when it prefers the other answer.
    """
    by_model = {model: found for model in models(run) if (found := _answers(run, model))}
    names = list(by_model)
    outcomes: dict[tuple[str, str], list[float]] = defaultdict(list)
    verdicts: dict[tuple[str, str], list[list[float | str | None]]] = defaultdict(list)
    for x in _played(run):
        comparisons = run.table(x.stage.iteration, x.stage.name, Comparison, "verdicts")
        _add_verdicts(x.models, comparisons, by_model, outcomes, verdicts)
    prompts: list[list[Any]] = []
    candidates: list[list[Any]] = []
    num_omitted = 0
    for key in dict.fromkeys(key for found in by_model.values() for key in found):
        there = [(i, by_model[model][key]) for i, model in enumerate(names) if key in by_model[model]]
        if len(candidates) + len(there) > max_candidates:
            num_omitted += len(there)
            continue
        prompts.append([0, key, there[0][1].prompt])
        for i, c in there:
            won = outcomes[names[i], key]
            score = sum(won) / len(won) if won else None
            role = {1.0: CHOSEN, 0.0: REJECTED}.get(-1.0 if score is None else score, NEITHER)
            cut = int(c.finish_reason == "length")
            judged = verdicts[names[i], key]
            candidates.append([len(prompts) - 1, i, c.response, c.num_tokens, cut, score, role, judged])
    return {"prompts": prompts, "candidates": candidates, "num_omitted": num_omitted, "names": names}


def _answers(run: Run, model: str) -> dict[str, Candidate]:
    """The model's answers to the first turns, by question. Empty for a model that only has IFEval results."""
    given = run.run_dir / "given" / f"answers_{model}.jsonl"
    found = run.table(0, f"answers_{model}", Candidate) or (read_jsonl(given, Candidate) if given.exists() else [])
    return {c.prompt_id: c for c in found if c.sample_index == 0}


def _add_verdicts(
    models: tuple[str, str],
    comparisons: Sequence[Comparison],
    by_model: Mapping[str, Mapping[str, Candidate]],
    outcomes: dict[tuple[str, str], list[float]],
    verdicts: dict[tuple[str, str], list[list[float | str | None]]],
) -> None:
    """Add the results and the verdicts of one match to both of its models."""
    a, b = models
    for key, match in zip(by_model[a], matches_of(by_model[a], by_model[b], comparisons), strict=True):
        if match.outcome is not None:
            outcomes[a, key].append(match.outcome)
            outcomes[b, key].append(1 - match.outcome)
    for c in comparisons:
        first, second = (a, b) if c.order == "ab" else (b, a)
        text = f"A is {first}, B is {second}\n{c.verdict}"
        verdicts[first, c.question_id].append([c.first_share, text])
        verdicts[second, c.question_id].append([None if c.first_share is None else 1 - c.first_share, text])
