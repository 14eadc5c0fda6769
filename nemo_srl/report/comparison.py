"""Reads a comparison of models back: their matches, their IFEval results, and every answer with its verdicts.

`recipes/evaluate.py` makes such a run directory, and may be called several times with it. `is_comparison` recognizes it
by its stages.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_srl.artifacts import read_jsonl
from nemo_srl.errors import DataError
from nemo_srl.judging import mean_score
from nemo_srl.records import Candidate, Comparison, Metric
from nemo_srl.report import evidence, paper
from nemo_srl.report.browser import CHOSEN, NEITHER, REJECTED, Group, Verdict, candidate_row, packed, verdict_text
from nemo_srl.report.charts import Chart, stacked_bar
from nemo_srl.report.text import with_interval
from nemo_srl.runs import Run, StageRun, read_spec
from nemo_srl.stages import Stage, answers, evaluation, head_to_head, ifeval
from nemo_srl.stages.head_to_head import matches_of

Matches = Mapping[tuple[str, str], Sequence[Metric]]
"""The metrics of each match, by the names of its two models."""

_MAX_UNJUDGED = 0.5
_RATES = {
    "order_agreement_rate": "orders agree",
    "verdict_agreement_rate": "verdicts agree",
    "first_position_rate": "first preferred",
    "cut_off_rate": "cut off",
    "unjudged_rate": "no verdict",
}
OUTCOMES = ("win_rate", "tie_rate", "loss_rate")
IFEVAL = {
    "ifeval_prompt_strict": "prompts, strict",
    "ifeval_instruction_strict": "instructions, strict",
    "ifeval_prompt_loose": "prompts, loose",
    "ifeval_instruction_loose": "instructions, loose",
}


def is_comparison(run: Run) -> bool:
    # In later iterations, early stopping lets checkpoints answer and compares them.
    made = {s.manifest.stage for s in run.stages if s.iteration == 0}
    # The loop evaluates models, too, but not before `sft`.
    own = {x.name for x in (answers.STAGE, head_to_head.STAGE, ifeval.STAGE)}
    return bool(made & own) or made == {evaluation.STAGE.name}


def models(run: Run) -> list[str]:
    """The names of all models that were compared or measured."""
    played = (name for pair in _played(run) for name in pair)
    by_itself = (*measured(run, ifeval.STAGE), *measured(run, evaluation.STAGE))
    return list(dict.fromkeys([*played, *_answered(run), *by_itself]))


def judges(run: Run) -> list[str]:
    """The names of the judges of all matches: that of a server's model, of a compared model, or of a directory."""
    named, played = names_of(run), _played(run).values()
    return list(dict.fromkeys(evidence.judge_of(read_spec(stage.path), named, "judge", "policy") for stage in played))


def names_of(run: Run) -> dict[str, str]:
    """The models that answered, by their paths."""
    return {str(_input(stage, "policy")): name for name, stage in _answered(run).items()}


def evidence_cells(run: Run) -> list[list[str]]:
    """`evidence.evidence_cells` of the models, each beside the one that was given before it."""
    return evidence.evidence_cells(run.sums(_places_of(run)))


def _places_of(run: Run) -> dict[str, list[tuple[int, str]]]:
    """The stages that measured each model: its evaluation and its IFEval."""
    kinds = (evaluation.STAGE.name, ifeval.STAGE.name)
    places: dict[str, list[tuple[int, str]]] = {model: [] for model in models(run)}
    for s in run.stages:
        if s.manifest.stage in kinds:
            places.setdefault(s.name.removeprefix(f"{s.manifest.stage}_"), []).append((s.iteration, s.name))
    return places


def _answered(run: Run) -> dict[str, StageRun]:
    """The stages that made the answers, by model."""
    return {s.name.removeprefix("answers_"): s for s in run.stages if s.name.startswith("answers_")}


def _input(stage: StageRun, name: str) -> Path:
    return Path(read_spec(stage.path)["inputs"][name]["path"])


def measured(run: Run, stage: Stage[Any]) -> dict[str, list[Metric]]:
    """The metrics of `evaluation` or `ifeval` by model."""
    found = [s for s in run.stages if s.manifest.stage == stage.name]
    return {s.name.removeprefix(f"{stage.name}_"): run.table(s.iteration, s.name, Metric) for s in found}


def _played(run: Run) -> dict[tuple[str, str], StageRun]:
    """The stage of each match by its two models. A model's name may contain dots and underscores."""
    found = {}
    for stage in run.stages:
        if stage.manifest.stage == head_to_head.STAGE.name:
            names = [_input(stage, x).name.removesuffix(".jsonl").removeprefix("answers_") for x in ("a", "b")]
            found[names[0], names[1]] = stage
    return found


def matches(run: Run) -> dict[tuple[str, str], list[Metric]]:
    """The metrics of each match."""
    return {pair: run.table(stage.iteration, stage.name, Metric) for pair, stage in _played(run).items()}


def match_cells(found: Matches) -> list[list[str]]:
    """The cells of a table with a line for each match. Runs of older versions lack some figures."""
    lines = [["a v b", "a wins", "tied", "b wins", "a wins at equal length", "p", *_RATES.values(), "no answer", "n"]]
    for (a, b), metrics in found.items():
        m = {x.name: x for x in metrics}
        p = with_interval(m["sign_test_p"], "{:.3g}", "")
        outcomes = [_share(m[name]) for name in (*OUTCOMES, "length_controlled_win_rate")]
        rates = [_share(m[name]) if name in m else "-" for name in _RATES]
        rates.append(_share(m["unanswered_rate"]) if "unanswered_rate" in m else "0.0%")
        lines.append([f"{a} v {b}", *outcomes, p, *rates, str(m["win_rate"].n)])
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
    lines = [["", *IFEVAL.values(), "no answer", "prompts", "instructions"]]
    for model, metrics in found.items():
        m = {x.name: x for x in metrics}
        counts = [str(m[name].n) for name in ("ifeval_prompt_strict", "ifeval_instruction_strict")]
        missing = m.get("ifeval_unanswered_rate")
        lines.append([model, *(_share(m[name]) for name in IFEVAL), _share(missing) if missing else "0.0%", *counts])
    return lines


def paper_cells() -> list[list[str]]:
    """The matches of the paper. The columns are the first ones of `match_cells`."""
    rows = [[name, *(f"{x:.1%}" for x in shares)] for name, shares in paper.HEAD_TO_HEAD.items()]
    return [["a v b", "a wins", "tied", "b wins"], *rows]


def _share(m: Metric) -> str:
    return with_interval(m, "{:.1%}", "{:.0%}")


def match_shares(found: Matches) -> dict[str, list[float]]:
    """The shares of won, tied and lost questions of each match with a readable verdict."""
    named = {f"{a} v {b}": {m.name: m.value for m in metrics} for (a, b), metrics in found.items()}
    return {title: [x[name] or 0.0 for name in OUTCOMES] for title, x in named.items() if x["win_rate"] is not None}


def bars(shares: Mapping[str, Sequence[float]]) -> list[Chart]:
    """A bar for each match, by its title."""
    named = {title: dict(zip(("won", "tied", "lost"), x, strict=True)) for title, x in shares.items()}
    return [stacked_bar(x, title=title, form="{:.1%}".format, colors=(2, 5, 1)) for title, x in named.items()]


def browser_data(run: Run, *, max_candidates: int) -> dict[str, Any]:
    """The data of the page's browser, as `browser.browser_data` describes it.

    A prompt is a question, and its candidates are one answer of each model. `names` has the models, and the index of
    the sample is an index into it. The score of an answer is the mean of its matches: 1 won, 0.5 tied, 0 lost. CHOSEN
    marks an answer that won all of them, REJECTED one that lost all. The score of a verdict is 1 when the verdict
    prefers this answer, 0.5 for a tie and 0 when it prefers the other answer.
    """
    by_model = {model: found for model in models(run) if (found := _answers(run, model))}
    outcomes: dict[tuple[str, str], list[float]] = defaultdict(list)
    verdicts: dict[tuple[str, str], list[Verdict]] = defaultdict(list)
    for (a, b), stage in _played(run).items():
        comparisons = run.table(stage.iteration, stage.name, Comparison, "verdicts")
        if by_model.get(a, {}).keys() != by_model.get(b, {}).keys():
            raise DataError(
                f"{stage.path}: it compares {a} and {b}, and {run.run_dir} lacks answers of one of them. Run "
                "recipes/evaluate.py again with the same settings. It makes what is missing."
            )
        for key, match in zip(by_model[a], matches_of(by_model[a], by_model[b], comparisons), strict=True):
            if match.outcome is not None:
                outcomes[a, key].append(match.outcome)
                outcomes[b, key].append(1 - match.outcome)
        for c in comparisons:
            first, second = (a, b) if c.order == "ab" else (b, a)
            text = f"A is {first}, B is {second}\n{verdict_text(c)}"
            verdicts[first, c.question_id].append([c.first_share, text])
            verdicts[second, c.question_id].append([None if c.first_share is None else 1 - c.first_share, text])
    groups: dict[str, Group] = {}
    for i, (model, found) in enumerate(by_model.items()):
        for key, answer in found.items():
            score = mean_score(outcomes[model, key])
            role = NEITHER if score is None else {1.0: CHOSEN, 0.0: REJECTED}.get(score, NEITHER)
            _, rows = groups.setdefault(key, ([0, key, answer.prompt], []))
            rows.append(candidate_row(answer, i, score, role, verdicts[model, key]))
    return {**packed([groups.values()], max_candidates), "names": list(by_model)}


def _answers(run: Run, model: str) -> dict[str, Candidate]:
    """The model's answers to the first turns, by question. Empty for a model that only has IFEval results."""
    given = run.run_dir / "given" / f"answers_{model}.jsonl"
    found = run.table(0, f"answers_{model}", Candidate) or (read_jsonl(given, Candidate) if given.exists() else [])
    return {c.prompt_id: c for c in found if c.sample_index == 0}
