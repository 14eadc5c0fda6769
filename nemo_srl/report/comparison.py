"""What `recipes/evaluate.py` leaves, read back: matches of models, their IFEval, and every answer with its verdicts.

A run directory holds a comparison when models' answers are published in it (`is_comparison`). Matches that were made in
several calls with the same run directory are all there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from nemo_srl.artifacts import DATA, JOURNAL, read_jsonl
from nemo_srl.judging.pairwise import share_of_a
from nemo_srl.records import Candidate, Completion, Metric
from nemo_srl.report import paper
from nemo_srl.report.browser import CHOSEN, NEITHER, REJECTED
from nemo_srl.report.charts import Segment, stacked_bar
from nemo_srl.runs import Run, StageRun
from nemo_srl.stages import answers, evaluation, head_to_head, ifeval

Matches = Mapping[tuple[str, str], Sequence[Metric]]
"""Metrics of head to head by the two models' names."""

_MOST = 0.5
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
    """Whatever was compared or measured."""
    answered = [s.name.removeprefix("answers_") for s in run.stages if s.name.startswith("answers_")]
    return list(dict.fromkeys([*(m for x in _played(run) for m in x.models), *answered, *following(run)]))


def judges(run: Run) -> list[str]:
    """Who compared the answers: a server's model where it has a name, else one of the models, or a directory."""
    directories = {
        _policy(run, s): s.name.removeprefix("answers_") for s in run.stages if s.name.startswith("answers_")
    }
    found = []
    for x in _played(run):
        config, path = run.spec(x.stage)["config"], _policy(run, x.stage)
        engine = config["judge"]["engine"] or config["engine"]
        # Every model of a run is a directory named `hf`.
        place = "/".join(path.parts[-3:]) if path.name == "hf" else path.name
        found.append(engine["model"] or directories.get(path, place))
    return list(dict.fromkeys(found))


def _policy(run: Run, stage: StageRun) -> Path:
    return Path(run.spec(stage)["inputs"]["policy"]["path"])


def judging(run: Run) -> dict[str, list[Metric]]:
    """The reward-model metrics of each model."""
    return _by_model(run, evaluation.STAGE.name)


def following(run: Run) -> dict[str, list[Metric]]:
    """IFEval's figures of each model."""
    return _by_model(run, ifeval.STAGE.name)


def _by_model(run: Run, stage: str) -> dict[str, list[Metric]]:
    found = [s for s in run.stages if s.manifest.stage == stage]
    return {s.name.removeprefix(f"{stage}_"): run.table(s.iteration, s.name, Metric) for s in found}


@dataclass(frozen=True, kw_only=True)
class _Played:
    """A match as it lies in the run directory."""

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
    """Whose answers a file or an artifact holds; names may have dots and underscores in them."""
    return Path(path).name.removesuffix(".jsonl").removeprefix("answers_")


def matches(run: Run) -> dict[tuple[str, str], list[Metric]]:
    return {x.models: run.table(x.stage.iteration, x.stage.name, Metric) for x in _played(run)}


def match_cells(found: Matches) -> list[list[str]]:
    """A line for each match, to be shown as a table."""
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
    """Matches that most questions have no verdict in, in words."""
    rates = {pair: next(m.value for m in metrics if m.name == "unjudged_rate") for pair, metrics in found.items()}
    return [
        f"{a} v {b}: no readable verdict on {rate:.0%} of the questions. This judge does not keep to "
        "judge.pairwise_rubric; take another one (evaluate.judge_model, or judge.engine)."
        for (a, b), rate in rates.items()
        if rate is not None and rate > _MOST
    ]


def ifeval_cells(found: Mapping[str, Sequence[Metric]]) -> list[list[str]]:
    """A line for each model."""
    lines = [["", *IFEVAL.values(), "prompts", "instructions"]]
    for model, metrics in found.items():
        m = {x.name: x for x in metrics}
        counts = [str(m[name].n) for name in ("ifeval_prompt_strict", "ifeval_instruction_strict")]
        lines.append([model, *(share(m[name]) for name in IFEVAL), *counts])
    return lines


def paper_cells() -> list[list[str]]:
    """The paper's matches, in the columns that `match_cells` begins with."""
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
    """Won, tied and lost as one bar for each match in which anything was judged."""
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
    """As `browser.browser_data`, for answers: a prompt is a question, and its candidates are one answer of each model.

    `names` are the models, which `sample's index` counts. The score is the mean of an answer's matches (1 won, 0.5
    tied, 0 lost), CHOSEN won all of them and REJECTED none; a verdict's score is the share that it gives to the answer.
    """
    played = _played(run)
    by_model = {model: found for model in models(run) if (found := _answers(run, model))}
    names = list(by_model)
    outcomes: dict[tuple[str, str], list[float]] = defaultdict(list)
    verdicts: dict[tuple[str, str], list[tuple[float | None, str]]] = defaultdict(list)
    for x in played:
        _add_verdicts(x, by_model, outcomes, verdicts)
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
            judged = [list(v) for v in verdicts[names[i], key]]
            candidates.append([len(prompts) - 1, i, c.response, c.num_tokens, cut, score, role, judged])
    return {"prompts": prompts, "candidates": candidates, "num_omitted": num_omitted, "names": names}


def _answers(run: Run, model: str) -> dict[str, Candidate]:
    """First turns by question."""
    stage = run.find(0, f"answers_{model}")
    path = stage.path / DATA if stage else run.run_dir / "given" / f"answers_{model}.jsonl"
    if not path.exists():
        return {}  # it was asked IFEval alone
    return {c.prompt_id: c for c in read_jsonl(path, Candidate) if c.sample_index == 0}


def _add_verdicts(
    played: _Played,
    by_model: Mapping[str, Mapping[str, Candidate]],
    outcomes: dict[tuple[str, str], list[float]],
    verdicts: dict[tuple[str, str], list[tuple[float | None, str]]],
) -> None:
    """What the judge said of each answer, to both of the models that it is about."""
    a, b = played.models
    completions: dict[str, list[Completion]] = defaultdict(list)
    for c in read_jsonl(played.stage.path / JOURNAL, Completion):
        completions[c.request_key].append(c)
    found = head_to_head.matches_of(by_model[a], by_model[b], completions)
    for key, match in zip(by_model[a], found, strict=True):
        if match.outcome is not None:
            outcomes[a, key].append(match.outcome)
            outcomes[b, key].append(1 - match.outcome)
        for order, (first, second) in (("ab", (a, b)), ("ba", (b, a))):
            for c in completions[f"{key}/{order}"]:
                to_first = share_of_a(c)
                text = f"A is {first}, B is {second}\n{c.text}"
                verdicts[first, key].append((to_first, text))
                verdicts[second, key].append((None if to_first is None else 1 - to_first, text))
