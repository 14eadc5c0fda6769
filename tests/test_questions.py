"""Reads questions and writes answers in the formats of the benchmarks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nemo_srl.data.questions import alpaca_eval_rows, mt_bench_rows, read_answers, read_questions
from nemo_srl.errors import DataError
from nemo_srl.records import Candidate, Question

ALPACA_EVAL = [
    {"dataset": "helpful_base", "instruction": "Name a prime.", "output": "7", "generator": "text_davinci_003"},
    {"dataset": "koala", "instruction": "Name a bird.", "output": "Owl.", "generator": "text_davinci_003"},
]
MT_BENCH = [
    {"question_id": 81, "category": "writing", "turns": ["Write a line.", "Now rhyme it."]},
    {"question_id": 102, "category": "reasoning", "turns": ["Count.", "Again."], "reference": ["1", "2"]},
]


def answer(key: str, turn: int, text: str) -> Candidate:
    return Candidate(prompt_id=key, sample_index=turn, prompt="?", response=text, num_tokens=1, finish_reason="stop")


def test_alpaca_eval_goes_in_and_comes_out_under_another_generator(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(ALPACA_EVAL))
    questions = read_questions(tmp_path / "a.json")
    assert [q.turns for q in questions] == [["Name a prime."], ["Name a bird."]]
    answers = [answer(q.key, 0, f"{i}") for i, q in enumerate(questions)]
    rows = alpaca_eval_rows(questions, answers, "m2")
    assert rows == [row | {"output": str(i), "generator": "m2"} for i, row in enumerate(ALPACA_EVAL)]
    given = read_answers(tmp_path / "a.json", questions)
    assert [a.response for a in given] == ["7", "Owl."]
    assert alpaca_eval_rows(questions, given, "text_davinci_003") == ALPACA_EVAL


def test_mt_bench_keeps_its_ids_and_turns(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in MT_BENCH))
    questions = read_questions(tmp_path / "q.jsonl")
    assert questions[0] == Question(question_id="81", turns=["Write a line.", "Now rhyme it."], dataset="writing")
    answers = [answer(q.key, t, f"{q.key}-{t}") for t in (1, 0) for q in questions]
    rows = mt_bench_rows(questions, answers, "m2")
    assert rows[1]["question_id"] == 102
    assert rows[1]["model_id"] == "m2"
    assert rows[1]["choices"] == [{"index": 0, "turns": ["102-0", "102-1"]}]
    assert rows[0].keys() == {"question_id", "answer_id", "model_id", "choices", "tstamp"}


def test_the_seed_and_our_prompts_are_questions_once_each(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"example_id": f"{i}", "instruction": "Name a prime."} for i in range(3)]
    rows.append({"prompt_id": "x", "text": "Name a bird."})
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [q.turns[0] for q in read_questions(tmp_path / "q.jsonl")] == ["Name a prime.", "Name a bird."]


@pytest.mark.parametrize(
    ("text", "reason"),
    [("", "empty; expected questions"), ("[1]", r"row 1: expected a JSON object \(questions\)"),
     ("{", "not JSON .*expected JSONL, a JSON array"), ('{"a": 1}', "line 1: expected a text"),
     ('{"question_id": 1, "turns": [""]}', "line 1: expected a text"), ('[{"instruction": null}]', "row 1: ")],
)  # fmt: skip
def test_what_holds_no_questions_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "q.jsonl").write_text(text)
    with pytest.raises(DataError, match=reason):
        read_questions(tmp_path / "q.jsonl")
    with pytest.raises(DataError, match="no such file"):
        read_questions(tmp_path / "missing.jsonl")


def test_given_answers_must_be_complete(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(ALPACA_EVAL))
    with pytest.raises(DataError, match="no `output` for the instruction 'Other"):
        read_answers(tmp_path / "a.json", [Question(question_id="x", turns=["Other?"])])


def test_the_input_of_a_question_belongs_to_it(tmp_path: Path) -> None:
    rows = [{"instruction": "Translate.", "input": x, "output": y} for x, y in (("Hola", "Hello"), ("Adios", "Bye"))]
    path = tmp_path / "questions.json"
    path.write_text(json.dumps(rows))
    questions = read_questions(path)
    assert [q.turns for q in questions] == [["Translate.\n\nHola"], ["Translate.\n\nAdios"]]
    assert [a.response for a in read_answers(path, questions)] == ["Hello", "Bye"]


def test_one_id_for_two_questions_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    rows = [{"question_id": 1, "category": "x", "turns": [text]} for text in ("One?", "One?", "Two?")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"line 3: question_id='1' is that of another question, too \(.*line 1\)"):
        read_questions(path)
