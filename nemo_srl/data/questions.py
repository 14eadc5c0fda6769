"""Questions of benchmarks, and answers in the formats that these benchmarks read.

    AlpacaEval   questions and model outputs are JSON arrays of {"instruction", "output", "generator", "dataset"}
    MT-Bench     questions are JSONL of {"question_id", "category", "turns"}; answers, for FastChat's `gen_judgment.py`,
                 JSONL of {"question_id", "answer_id", "model_id", "choices": [{"index", "turns"}], "tstamp"}

Rows of our own `Prompt` and rows with an `instruction` (the seed, Alpaca data) are questions, too.

Not covered: the benchmarks' questions and judges themselves. This module reads and writes their files only.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_srl.errors import DataError
from nemo_srl.records import Candidate, Question
from nemo_srl.rows import read_rows


def read_questions(path: Path) -> list[Question]:
    """The questions of a file, in its order, each once. Raises `DataError`, also for two questions with one id."""
    questions: dict[str, tuple[str, Question]] = {}
    for where, row in read_rows(path, what="questions"):
        question = _question(row, where=where)
        first, known = questions.setdefault(question.key, (where, question))
        if known.turns != question.turns:
            raise DataError(
                f"{where}: question_id={question.key!r} is that of another question, too ({first}). Give each question "
                "an id of its own."
            )
    return [question for _, question in questions.values()]


def read_answers(path: Path, questions: Sequence[Question]) -> list[Candidate]:
    """The answers to the first turns of `questions`, from model outputs in AlpacaEval's format. Raises `DataError`."""
    rows = read_rows(path, what="model outputs in AlpacaEval's format")
    outputs = {_instruction(row): row.get("output") for _, row in rows}
    answers = []
    for q in questions:
        prompt, text = q.turns[0], outputs.get(q.turns[0])
        if not isinstance(text, str):
            raise DataError(f"{path}: no `output` for the instruction {prompt[:80]!r}; it must answer every question")
        answers.append(
            Candidate(prompt_id=q.key, sample_index=0, prompt=prompt, response=text, num_tokens=0, finish_reason="stop")
        )
    return answers


def _question(row: dict[str, Any], *, where: str) -> Question:
    if isinstance(row.get("turns"), list) and row["turns"] and "question_id" in row:
        turns = row["turns"]
    else:
        turns = [_instruction(row)]
    if not all(isinstance(t, str) and t.strip() for t in turns):
        raise DataError(
            f"{where}: expected a text in `instruction` or `text`, or `question_id` and `turns`. Correct the row, "
            "or remove it."
        )
    # AlpacaEval's instructions have no ids, and the seed's ids name answers. A digest of the text names one question.
    digest = hashlib.sha256(turns[0].encode()).hexdigest()[:12]
    key = str(row["question_id"]) if "turns" in row else f"q-{digest}"
    return Question(question_id=key, turns=turns, dataset=str(row.get("dataset", row.get("category", ""))))


def _instruction(row: dict[str, Any]) -> Any:
    """The text of a row's instruction, with the `input` of Alpaca's format behind it."""
    text, more = row.get("instruction", row.get("text")), row.get("input")
    has_more = isinstance(text, str) and isinstance(more, str) and more.strip()
    return f"{str(text).strip()}\n\n{str(more).strip()}" if has_more else text


def alpaca_eval_rows(questions: Sequence[Question], answers: Sequence[Candidate], model: str) -> list[dict[str, Any]]:
    """The rows that `alpaca_eval --model_outputs` reads. First turns only, because AlpacaEval has no others.

    A question without an answer has no row, because an empty output would be judged.
    """
    texts = {a.prompt_id: a.response for a in answers if a.sample_index == 0 and a.is_answered}
    return [
        {"dataset": q.dataset, "instruction": q.turns[0], "output": texts[q.key], "generator": model}
        for q in questions
        if q.key in texts
    ]


def mt_bench_rows(questions: Sequence[Question], answers: Sequence[Candidate], model: str) -> list[dict[str, Any]]:
    """The rows that FastChat's `gen_judgment.py` reads from `model_answer/<model>.jsonl`; `tstamp` is always 0."""
    turns: dict[str, list[str]] = defaultdict(list)
    for a in sorted(answers, key=lambda a: a.sample_index):
        turns[a.prompt_id].append(a.response)
    return [
        {
            "question_id": int(q.key) if q.key.isdecimal() else q.key,
            "answer_id": f"{model}-{q.key}",
            "model_id": model,
            "choices": [{"index": 0, "turns": turns[q.key]}],
            "tstamp": 0.0,
        }
        for q in questions
    ]
