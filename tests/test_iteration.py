"""Which model judges and answers in which iteration, and which further stages a setting adds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nemo_srl.artifacts import BaseModel, Model
from nemo_srl.iteration import Iteration, names_of_models
from tests.support import composed

M = [Model(Path(f"m{t}"), {}) for t in range(5)]
OTHER = BaseModel(Path("other"), "digest")


class Recorder:
    """Takes the place of an `Experiment`: it notes every stage, and the models that the stage gets."""

    def __init__(self, *overrides: str) -> None:
        self.cfg = composed(*overrides)
        self.runs: list[tuple[str, list[str]]] = []

    def run(self, stage: Any, iteration: int, *, directory: str = "", **inputs: Any) -> str:
        names = [x.path.name if isinstance(x, Model) else x.model_dir.name for x in inputs.values() if _is_model(x)]
        self.runs.append((directory or stage.name, names))
        return directory or stage.name


def _is_model(x: object) -> bool:
    return isinstance(x, Model | BaseModel)


def stages(t: int, *overrides: str) -> list[tuple[str, list[str]]]:
    """What an iteration runs between M_t's answers and its training."""
    exp = Recorder(*overrides)
    iteration = Iteration(
        exp=exp, number=t, policy=M[t], previous=M[max(t - 1, 1)], first=M[1],  # type: ignore[arg-type]
        others=dict.fromkeys(names_of_models(exp.cfg), OTHER),
    )  # fmt: skip
    judged = iteration.judge("answers")  # type: ignore[arg-type]
    iteration.pairs("prompts", "answers", judged)  # type: ignore[arg-type]
    iteration.verdict_pairs("answers", judged)  # type: ignore[arg-type]
    return exp.runs


def test_by_default_m_t_judges_and_nothing_is_added() -> None:
    assert stages(2) == [("judgements", ["m2"]), ("pairs", [])]


@pytest.mark.parametrize(
    ("name", "judges"),
    [("m1", ["m1", "m1", "m1"]), ("previous", ["m1", "m1", "m2"]), ("/models/big", ["other"] * 3)],
)
def test_the_judge_may_be_another_model(name: str, judges: list[str]) -> None:
    for t, judge in enumerate(judges, start=1):
        assert stages(t, f"judge.model={name}")[0] == ("judgements", [judge])


def test_cream_asks_the_model_before_from_the_second_iteration_on() -> None:
    assert stages(1, "method=cream") == [("judgements", ["m1"]), ("pairs", [])]
    assert stages(3, "method=cream") == [("judgements", ["m3"]), ("second_judgements", ["m2"]), ("pairs", [])]


def test_temporal_lets_m1_answer_and_m_t_judge_these_answers_from_the_second_iteration_on() -> None:
    assert stages(1, "method=temporal") == [("judgements", ["m1"]), ("pairs", [])]
    more = [("anchor_candidates", ["m1"]), ("anchor_judgements", ["m3"])]
    assert stages(3, "method=temporal") == [("judgements", ["m3"]), *more, ("pairs", [])]


def test_pairs_of_verdicts_come_from_their_source_until_the_last_iteration() -> None:
    assert stages(2, "method=meta_rewarding")[-1] == ("meta_judge", ["m2"])
    assert stages(3, "method=meta_rewarding")[-1] == ("pairs", [])
    assert stages(3, "method=self_taught_evaluator")[-1] == ("taught_verdicts", ["m3"])
    assert stages(3, "verdict_pairs.num_prompts=4")[-1] == ("verdict_pairs", [])


def test_code_needs_no_judge() -> None:
    found = stages(2, "method=iterative_rpo", "judge.verifier_path=x.jsonl")
    assert found == [("judgements", []), ("pairs", [])]
