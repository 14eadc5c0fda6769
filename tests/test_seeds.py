"""IFT seed from other formats."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from nemo_srl import cli
from nemo_srl.artifacts import read_jsonl
from nemo_srl.data.seeds import read_seed
from nemo_srl.errors import DataError
from nemo_srl.records import IFTExample
from recipes import prepare_seed


def chat(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def sharegpt(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"id": "x", "conversations": [{"from": role, "value": text} for role, text in turns]}


QUESTION, ANSWER = ("user", "Name a prime."), ("assistant", " 7 ")
ROWS: list[tuple[dict[str, Any], tuple[str, str] | str]] = [
    (chat(QUESTION, ANSWER), ("Name a prime.", "7")),
    (chat(("system", ""), QUESTION, ANSWER, ("user", "Another?")), ("Name a prime.", "7")),
    (sharegpt(("human", "Name a prime."), ("gpt", "7")), ("Name a prime.", "7")),
    ({"instruction": "Name a prime.", "input": "", "output": "7"}, ("Name a prime.", "7")),
    ({"instruction": "Sum.", "input": "1, 2", "output": "3", "text": "..."}, ("Sum.\n\n1, 2", "3")),
    (chat(("system", "Rhyme."), QUESTION, ANSWER), "system message"),
    (chat(ANSWER, QUESTION), "does not begin with a user's and an assistant's message"),
    (chat(QUESTION), "does not begin with a user's and an assistant's message"),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}]},
     "does not begin with a user's and an assistant's message"),
    (chat(QUESTION, ("assistant", "")), "empty"),
    ({"instruction": "", "input": "x", "output": "7"}, "empty"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "expected"), ROWS)
def test_a_row_gives_its_first_turn_or_a_reason(
    tmp_path: Path, row: dict[str, Any], expected: tuple[str, str] | str
) -> None:
    other = chat(("user", "Other?"), ("assistant", "Yes."))
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n\n" + json.dumps(other) + "\n")
    counts = Counter[str]()
    found = [(x.instruction, x.response) for x in read_seed(tmp_path / "a.jsonl", counts)]
    if isinstance(expected, str):
        assert found == [("Other?", "Yes.")]
        assert counts[f"left out: {expected}"] == 1
    else:
        assert found == [expected, ("Other?", "Yes.")]
    assert counts["rows"] == 2


def test_every_kind_of_file_gives_the_same(tmp_path: Path) -> None:
    import datasets

    rows = [chat(("user", f"Say {i}."), ("assistant", str(i))) for i in range(3)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    data = datasets.Dataset.from_list(rows)
    data.to_parquet(tmp_path / "a.parquet")
    data.save_to_disk(tmp_path / "a")
    datasets.DatasetDict({"train": data}).save_to_disk(tmp_path / "dict")
    found = [read_seed(tmp_path / name, Counter()) for name in ("a.jsonl", "a.json", "a.parquet", "a", "dict/train")]
    assert [(x.instruction, x.response) for x in found[0]] == [(f"Say {i}.", str(i)) for i in range(3)]
    assert found[0] == found[1] == found[2] == found[3]
    assert [x.instruction for x in found[4]] == [x.instruction for x in found[0]]
    with pytest.raises(DataError, match=r"splits \['train'\]"):
        read_seed(tmp_path / "dict", Counter())


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"prompt": "a", "completion": "b"}', r"line 1: has the fields \['completion', 'prompt'\]; expected messages"),
        ('"text"', r"line 1: expected a JSON object \(rows of messages.*Alpaca.*found str"),
        ("{", "line 1: not JSON .*; expected JSONL, a JSON array"),
        ('{"instruction": "", "output": "x"}', "no usable row"),
        ("", "empty; expected rows of messages"),
    ],
)
def test_another_file_than_was_meant_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(DataError, match=reason):
        read_seed(tmp_path / "a.jsonl", Counter())


def test_the_command_writes_seed_that_the_loop_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [chat(("user", f"Say {i % 4}."), ("assistant", str(i))) for i in range(6)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    arguments = [f"input={tmp_path / 'a.jsonl'}", f"output={tmp_path / 'ift.jsonl'}", "num_examples=3"]
    cli.run_program(prepare_seed.Options, prepare_seed.main, arguments)
    assert [x.response for x in read_jsonl(tmp_path / "ift.jsonl", IFTExample)] == ["0", "1", "2"]
    assert "2  left out: instruction seen before" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("row", "turn"),
    [
        ({"instruction": "Name a prime.", "input": float("nan"), "output": "7"}, ("Name a prime.", "7")),
        ({"instruction": "Name a prime.", "input": None, "output": 7}, ("Name a prime.", "7")),
        ({"instruction": "Say hi.", "input": float("nan"), "output": float("nan")}, None),
        (
            {"messages": [{"role": "User", "content": "Say hi."}, {"role": "ASSISTANT", "content": "Hi."}]},
            ("Say hi.", "Hi."),
        ),
        (
            {"conversations": [{"role": "user", "content": "Say hi."}, {"role": "assistant", "content": "Hi."}]},
            ("Say hi.", "Hi."),
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "Say "}, {"type": "text", "text": "hi."}]},
                    {"role": "assistant", "content": [{"type": "text", "text": "Hi."}]},
                ]
            },
            ("Say hi.", "Hi."),
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image_url", "image_url": "x"}]},
                    {"role": "assistant", "content": "Hi."},
                ]
            },
            None,
        ),
        ({"messages": [{"role": "developer", "content": "Be kind."}, {"role": "user", "content": "Hi."}]}, None),
        ({"messages": [{"role": "user", "content": "A"}, {"role": "user", "content": "B"}]}, None),
    ],
)
def test_usual_shapes_are_read_or_left_out(tmp_path: Path, row: dict[str, Any], turn: tuple[str, str] | None) -> None:
    path, counts = tmp_path / "a.jsonl", Counter[str]()
    path.write_text(json.dumps(row) + "\n" + json.dumps({"instruction": "Other", "output": "x"}) + "\n")
    found = [(x.instruction, x.response) for x in read_seed(path, counts)]
    assert found == ([turn] if turn else []) + [("Other", "x")]
    assert sum(n for reason, n in counts.items() if reason.startswith("left out")) == (turn is None)


@pytest.mark.parametrize("output", [["2", "3"], {"text": "Hi."}, True])
def test_an_answer_that_is_no_text_is_refused_by_row(tmp_path: Path, output: object) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"instruction": "Name two.", "output": output}) + "\n")
    with pytest.raises(DataError, match=r"line 1: `output` is .*Make it a text, or remove the row"):
        read_seed(path, Counter())
