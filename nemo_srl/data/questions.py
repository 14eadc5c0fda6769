"""Questions of benchmarks, and answers in the formats that those benchmarks read.

    AlpacaEval   questions and model outputs are JSON arrays of {"instruction", "output", "generator", "dataset"}
    MT-Bench     questions are JSONL of {"question_id", "category", "turns"}; answers, for FastChat's `gen_judgment.py`,
                 JSONL of {"question_id", "answer_id", "model_id", "choices": [{"index", "turns"}], "tstamp"}

Questions may also be JSONL of our own `Prompt` or of anything with an `instruction` (the seed, Alpaca data). No
benchmark is part of this package, and neither is its judge: these are the files that go in and out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_srl.errors import DataError
from nemo_srl.records import Candidate, Question


def read_questions(path: Path) -> list[Question]:
    """The distinct questions of a file, in its order. Raises `DataError`."""
    questions: dict[str, Question] = {}
    for number, row in enumerate(read_rows(path)):
        q = _question(row, where=f"{path}, row {number}")
        questions.setdefault(q.key, q)
    return list(questions.values())


def read_answers(path: Path, questions: Sequence[Question]) -> list[Candidate]:
    """Model outputs in AlpacaEval's format, as answers to the first turns of `questions`. Raises `DataError`."""
    outputs = {str(row.get("instruction")): row.get("output") for row in read_rows(path)}
    answers = []
    for q in questions:
        text = outputs.get(q.turns[0])
        if not isinstance(text, str):
            raise DataError(
                f"{path}: no `output` for the instruction {q.turns[0][:80]!r}; it must answer every question"
            )
        answers.append(
            Candidate(
                prompt_id=q.key, sample_index=0, prompt=q.turns[0], response=text, num_tokens=0, finish_reason="stop"
            )
        )
    return answers


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON array or of JSONL. Raises `DataError`."""
    if not path.is_file():
        raise DataError(f"{path}: no such file; expected a JSON array or JSONL")
    text = path.read_text(encoding="utf-8")
    try:
        if text.lstrip().startswith("["):
            rows = json.loads(text)
        else:
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    except json.JSONDecodeError as e:
        raise DataError(f"{path}: neither a JSON array nor JSONL ({e})") from e
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path}: expected one or more JSON objects")
    found: list[dict[str, Any]] = rows
    return found


def _question(row: dict[str, Any], *, where: str) -> Question:
    if isinstance(row.get("turns"), list) and row["turns"] and "question_id" in row:
        turns = row["turns"]
    else:
        turns = [row.get("instruction", row.get("text"))]
    if not all(isinstance(t, str) and t.strip() for t in turns):
        raise DataError(f"{where}: expected a text in `instruction` or `text`, or `question_id` and `turns`")
    # AlpacaEval's instructions have no ids, and the seed's ids are of answers: a digest of the text is stable.
    digest = hashlib.sha256(turns[0].encode()).hexdigest()[:12]
    key = str(row["question_id"]) if "turns" in row else f"q-{digest}"
    return Question(question_id=key, turns=turns, dataset=str(row.get("dataset", row.get("category", ""))))


def alpaca_eval_rows(questions: Sequence[Question], answers: Sequence[Candidate], model: str) -> list[dict[str, Any]]:
    """What `alpaca_eval --model_outputs` reads; first turns only, as AlpacaEval has no others."""
    texts = {a.prompt_id: a.response for a in answers if a.sample_index == 0}
    return [
        {"dataset": q.dataset, "instruction": q.turns[0], "output": texts[q.key], "generator": model} for q in questions
    ]


def mt_bench_rows(questions: Sequence[Question], answers: Sequence[Candidate], model: str) -> list[dict[str, Any]]:
    """What FastChat's `gen_judgment.py` reads from `model_answer/<model>.jsonl`; `tstamp` is always 0."""
    turns: dict[str, list[Candidate]] = {}
    for a in sorted(answers, key=lambda a: a.sample_index):
        turns.setdefault(a.prompt_id, []).append(a)
    return [
        {
            "question_id": int(q.key) if q.key.isdecimal() else q.key,
            "answer_id": f"{model}-{q.key}",
            "model_id": model,
            "choices": [{"index": 0, "turns": [a.response for a in turns[q.key]]}],
            "tstamp": 0.0,
        }
        for q in questions
    ]
