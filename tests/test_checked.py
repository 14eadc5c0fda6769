"""The stage `checked`: what code knows about a model's answers and its judging."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nemo_srl import checked
from nemo_srl.artifacts import SourceFile, to_line
from nemo_srl.data.checked.truth import CheckedInstruction
from nemo_srl.errors import DataError
from nemo_srl.records import Candidate, EFTExample, FinishReason, Judgement, Metric
from nemo_srl.report import table
from tests.support import composed, made
from tests.tables import published

BREAD = CheckedInstruction(
    instruction_id="bread", task_id="bread", split="held_out", category="", instruction="How is bread made? Be brief.",
    constraints=[{"kind": "max_words", "value": 9}], asked=["bread"], topic=["dough", "flour"],
)  # fmt: skip


def source(path: Path, records: list[Any]) -> SourceFile[Any]:
    path.write_text("".join(map(to_line, records)))
    return SourceFile(path, type(records[0]))


def answer(index: int, text: str, reason: FinishReason = "stop", prompt: str = BREAD.instruction) -> Candidate:
    return Candidate(
        prompt_id="answer-000000", sample_index=index, prompt=prompt, response=text, num_tokens=9, finish_reason=reason
    )


def example(name: str, score: int, category: str = "model", text: str = "Bread.") -> EFTExample:
    return EFTExample(
        example_id=name, instruction=BREAD.instruction, response=text, justification="", score=score, category=category
    )


def run(
    directory: Path, answers: list[Candidate], judged: dict[str, float | None], *, with_eft: bool = True
) -> dict[str, Metric]:
    evaluation = published(directory, "evaluation", Metric, [])
    parts: dict[str, list[Any]] = {
        "answers": answers,
        "judgements": [
            Judgement(candidate_key=key, judgement_index=0, verdict="", score=score) for key, score in judged.items()
        ],
    }
    for name, records in parts.items():
        evaluation.write(records, name)
    held_out = [example("e0", 5), example("e1", 2), example("e2", 1, "cut"), example("e3", 3)]
    eft = [example("t0", 5, text="Dough is baked."), example("t1", 0, text="no no no no no no")]
    given = {"eft": source(directory / "eft.jsonl", eft)} if with_eft else {}
    found, _ = made(
        checked.STAGE,
        composed(),
        directory / "checked",
        evaluation=evaluation,
        instructions=source(directory / "instructions.jsonl", [BREAD]),
        eft_eval=source(directory / "eft_eval.jsonl", held_out),
        **given,
    )
    return {m.name: m for m in found.read()}


def test_code_counts_the_points_of_each_answer_and_the_judges_order_of_models_answers(tmp_path: Path) -> None:
    answers = [
        answer(0, "Bread is baked from a dough of flour."),
        answer(1, "Bread is baked from a dough of flour", "length"),
        answer(2, "The moon is far away."),
    ]
    found = run(tmp_path, answers, {"e0": 4.0, "e1": 3.0, "e2": 5.0, "e3": 3.0})
    assert found["true_score"].value == pytest.approx((5 + 4 + 2) / 3)
    points = {name: found[f"true_{name}"].value for name in ("on_topic", "complete", "no_loop")}
    assert points == pytest.approx({"on_topic": 2 / 3, "complete": 2 / 3, "no_loop": 1})
    # e0 and e1 are in order, e0 and e3 too; e1 and e3 tie. The cut answer, by no model, does not count.
    assert (found["pairwise_accuracy_models"].value, found["pairwise_accuracy_models"].n) == (pytest.approx(2.5 / 3), 3)
    assert "surface_accuracy" in found
    shown = table({"M0": list(found.values())})
    assert "true score of the answers" in shown
    assert "accuracy of the surface" in shown


def test_without_eft_there_is_no_surface_to_fit(tmp_path: Path) -> None:
    assert "surface_accuracy" not in run(tmp_path, [answer(0, "Bread.")], {"e0": None}, with_eft=False)


def test_an_answer_to_another_instruction_is_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.checked_path: it has no instruction 'Other\?'.*build_checked_seed"):
        run(tmp_path, [answer(0, "Bread.", prompt="Other?")], {})
