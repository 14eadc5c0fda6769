"""Seed data from Open Assistant's tree files, made here in the published schema."""

from __future__ import annotations

import copy
import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from nemo_srl import cli
from nemo_srl.artifacts import read_jsonl
from nemo_srl.data.oasst import Tree, build, read_trees
from nemo_srl.errors import DataError
from nemo_srl.records import EFTExample, IFTExample, RankedAnswers
from recipes import prepare_oasst


def message(key: str, text: str, role: str, **changes: Any) -> dict[str, Any]:
    """A message with every field that the published files have."""
    label = {"value": 0.0, "count": 3}
    return {
        "message_id": key,
        "parent_id": None if role == "prompter" else "parent",
        "user_id": "2c96e467-66f0-4be7-9693-bda51356a424",
        "created_date": "2023-02-06T18:48:49.391686+00:00",
        "text": text,
        "role": role,
        "lang": "en",
        "review_count": 3,
        "review_result": True,
        "deleted": False,
        "rank": None,
        "synthetic": False,
        "model_name": None,
        "detoxify": {"toxicity": 0.0003},
        "emojis": {"+1": 3, "_skip_reply": 1},
        "labels": {"spam": label, "quality": {"value": 0.5, "count": 3}, "toxicity": label},
        "replies": [],
    } | changes


def tree(key: str, prompt: str, *answers: tuple[str, int | None, float], **changes: Any) -> dict[str, Any]:
    """A tree whose answers are (text, rank, quality); each has a further turn, which is not to be taken."""
    replies = [
        message(
            f"{key}-{i}", text, "assistant", rank=rank, labels={"quality": {"value": quality, "count": 3}},
            replies=[message(f"{key}-{i}-q", "And then?", "prompter", replies=[message("z", "Deep.", "assistant")])],
        )
        for i, (text, rank, quality) in enumerate(answers)
    ]  # fmt: skip
    root = message(key, prompt, "prompter", replies=replies)
    return {"message_tree_id": key, "tree_state": "ready_for_export", "prompt": root} | changes


GOOD = tree("t0", " Name a prime. ", ("8", 2, 0.1), ("7", 0, 0.9), ("It is 5.", 1, 0.7))


def changed(**changes: Any) -> dict[str, Any]:
    """GOOD with another prompt message, and ids and texts of its own."""
    row = copy.deepcopy(GOOD)
    row["prompt"] |= changes
    return row


def write(path: Path, rows: list[Any]) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


def read(path: Path) -> tuple[list[Tree], Counter[str]]:
    counts = Counter[str]()
    return list(read_trees(path, counts, max_characters=100)), counts


@pytest.mark.parametrize("name", ["a.trees.jsonl", "a.trees.jsonl.gz"])
def test_a_tree_gives_its_first_turn_with_ranks_and_quality(tmp_path: Path, name: str) -> None:
    (found,), counts = read(write(tmp_path / name, [GOOD]))
    assert found.prompt == "Name a prime."
    assert [(a.text, a.rank, a.quality) for a in found.ranked] == [("7", 0, 0.9), ("It is 5.", 1, 0.7), ("8", 2, 0.1)]
    assert counts == {"trees in the file": 1}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (changed(lang="es"), "another language"),
        (changed(lang=None), "another language"),
        (changed(deleted=True), "deleted"),
        (changed(review_result=False), "rejected in review"),
        (changed(text="   "), "empty"),
        (changed(text="x" * 101), "too long"),
        (changed(replies=None), "no usable answer"),
        (changed(replies=[]), "no usable answer"),
        (GOOD | {"tree_state": "growing"}, "not ready for export"),
        (changed(role="assistant"), "malformed"),
        (changed(message_id="other"), "malformed"),
        (changed(text=None), "malformed"),
        (changed(text=7), "malformed"),
        (changed(replies="none"), "malformed"),
        (changed(replies=[None]), "malformed"),
        (changed(replies=[message("a", "7", "assistant", rank=-1)]), "malformed"),
        (changed(replies=[message("a", "7", "assistant", rank="0")]), "malformed"),
        (changed(replies=[message("a", "7", "assistant", labels=["quality"])]), "malformed"),
        (GOOD | {"prompt": None}, "malformed"),
        (GOOD | {"prompt": {}}, "malformed"),
    ],
)
def test_what_cannot_be_used_is_left_out_and_counted(tmp_path: Path, row: dict[str, Any], reason: str) -> None:
    found, counts = read(write(tmp_path / "a.jsonl", [row, GOOD]))
    assert [t.prompt for t in found] == ["Name a prime."]
    assert counts[f"trees left out: {reason}"] == 1
    assert counts["trees in the file"] == 2


def test_answers_are_left_out_one_by_one(tmp_path: Path) -> None:
    replies = [
        message("a", "7", "assistant", rank=0),
        message("b", "Siete.", "assistant", rank=1, lang="es"),
        message("c", "buy!", "assistant", rank=2, review_result=False),
        message("d", "By a model.", "assistant", rank=3, synthetic=True, model_name="x"),
        message("e", "Why?", "prompter", rank=4),
        message("f", "No labels.", "assistant", labels=None, review_result=None),
    ]
    (found,), counts = read(write(tmp_path / "a.jsonl", [changed(replies=replies)]))
    assert [(a.text, a.rank, a.quality) for a in found.answers] == [("7", 0, 0.5), ("No labels.", None, 0.0)]
    reasons = ("another language", "rejected in review", "written by a model", "malformed")
    assert [counts[f"answers left out: {r}"] for r in reasons] == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"message_tree_id": "a", ', "line 1: not JSON"),
        (gzip.compress(json.dumps(GOOD).encode() * 50)[:-20], "damaged"),
        (b"not gzip", "damaged"),
        (gzip.compress(b"\xff\xfe\n"), "begins as UTF-16, and is not"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / ("a.jsonl" if content.startswith(b"{") else "a.jsonl.gz")
    path.write_bytes(content)
    with pytest.raises(DataError, match=reason):
        read(path)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (message("a", "Hello", "prompter"), "line 1: not a conversation tree"),
        ({"thread_id": "a", "thread": []}, "line 1: not a conversation tree"),
        (["a"], "row 1: expected a JSON object"),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path: Path, row: Any, reason: str) -> None:
    with pytest.raises(DataError, match=rf"{reason}.*\.trees\.jsonl\.gz"):
        read(write(tmp_path / "a.jsonl", [row]))
    with pytest.raises(DataError, match="no such file"):
        read(tmp_path / "missing.jsonl")


def many(num: int) -> list[dict[str, Any]]:
    """Trees of which every second one has three ranked answers, the others a single one of rank 0."""
    return [
        tree(f"t{i}", f"Do {i}.", *(((f"best {i}", 0, i / num), ("b", 1, 0.0), ("c", 2, 0.0)) if i % 2 else
                                    ((f"best {i}", 0, i / num),)))
        for i in range(num)
    ]  # fmt: skip


def test_the_three_files_share_no_prompt_and_ift_takes_the_best(tmp_path: Path) -> None:
    counts = Counter[str]()
    trees = list(read_trees(write(tmp_path / "a.jsonl", [*many(60), many(60)[0]]), counts))
    data = build(trees, counts, num_ift=20, num_eft=10, num_eft_eval=5, seed=1)
    files: list[Any] = [data.ift, data.rankings, data.eft_eval]
    prompts = [{x.instruction for x in rows} for rows in files]
    assert [len(p) for p in prompts] == [20, 10, 5]
    assert len(set.union(*prompts)) == 35
    quality = [int(x.example_id[1:]) for x in data.ift]
    assert quality == sorted(quality, reverse=True)
    left = {i for i in range(60)} - {int(p.split()[1][:-1]) for p in prompts[1] | prompts[2]}
    assert quality == sorted(left, reverse=True)[:20]
    assert all(x.response.startswith("best") for x in data.ift)
    assert data.rankings[0].ranks == [0, 1, 2]
    assert [x.score for x in data.eft_eval[:3]] == [5, 4, 3]
    assert data.counts["trees left out: prompt seen before"] == 1
    assert data.counts["prompts with several ranked answers"] == 30
    assert build(trees, Counter(), num_ift=20, num_eft=10, num_eft_eval=5, seed=1).rankings == data.rankings
    assert build(trees, Counter(), num_ift=20, num_eft=10, num_eft_eval=5, seed=2).rankings != data.rankings


def test_too_few_trees_are_shared_and_counted(tmp_path: Path) -> None:
    trees = list(read_trees(write(tmp_path / "a.jsonl", many(30)), Counter()))
    data = build(trees, Counter(), num_ift=3200, num_eft=1000, num_eft_eval=200, seed=1)
    assert data.counts["eft_eval prompts"] + data.counts["rankings for the EFT filter"] == 15
    assert data.counts["eft_eval prompts"] == round(15 / 6)
    assert data.counts["ift examples"] == 15


def test_ties_and_equal_answers_keep_peoples_order(tmp_path: Path) -> None:
    row = tree("t", "Q?", ("a", 1, 0.0), ("b", 1, 0.0), ("c", 0, 0.0), ("c", 4, 0.0), ("d", 9, 0.0))
    counts = Counter[str]()
    trees = list(read_trees(write(tmp_path / "a.jsonl", [row]), counts))
    data = build(trees, counts, num_ift=0, num_eft=0, num_eft_eval=1, seed=1)
    assert {x.response: x.score for x in data.eft_eval} == {"c": 5, "a": 4, "b": 4, "d": 3}


def test_the_command_writes_what_the_loop_reads_and_a_manifest_beside_the_papers_counts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "a.trees.jsonl.gz", many(40))
    arguments = [f"trees={source}", f"output_dir={tmp_path / 'out'}", "num_ift=10", "num_eft=8", "num_eft_eval=4"]
    cli.run_program(prepare_oasst.Options, prepare_oasst.main, arguments)
    assert len(read_jsonl(tmp_path / "out" / "ift.jsonl", IFTExample)) == 10
    assert len(read_jsonl(tmp_path / "out" / "rankings.jsonl", RankedAnswers)) == 8
    assert len(read_jsonl(tmp_path / "out" / "eft_eval.jsonl", EFTExample)) == 12
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["source"] == "a.trees.jsonl.gz"
    assert manifest["counts"]["trees in the file"] == 40
    assert manifest["paper"] == {"ift": 3200, "eft_train": 1630, "eft_eval": 541}
    assert "10  ift examples   (the paper: 3200)" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        cli.run_program(prepare_oasst.Options, prepare_oasst.main, [*arguments[:2], "language=de"])
    assert "too few usable trees" in capsys.readouterr().err
