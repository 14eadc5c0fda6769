"""Files on disk: they are published completely or not at all, never mixed, and a kill loses nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_srl.artifacts import DATA, JOURNAL, SPEC, Artifact, Journal, Table, read_jsonl, to_line, write_atomic
from nemo_srl.errors import DataError, StaleArtifactError
from nemo_srl.records import Comparison, Completion, IFTExample, Metric, Prompt, Record, from_row, to_row


def completion(key: str, index: int, text: str = "text") -> Completion:
    return Completion(request_key=key, index=index, text=text, num_tokens=3, finish_reason="stop")


def publish(artifact: Artifact) -> None:
    artifact.publish(stage="s", digest="d", metrics={}, seconds=1.0)


def test_an_artifact_is_kept_only_with_the_same_identity(tmp_path: Path) -> None:
    artifact = Artifact(tmp_path, {"stage": "policy", "dpo.beta": 0.1, "input pairs": "abc"})
    assert not artifact.is_published()
    publish(artifact)
    assert artifact.is_published()
    other = Artifact(tmp_path, {"stage": "policy", "dpo.beta": 0.2, "input pairs": "abd"})
    with pytest.raises(StaleArtifactError) as e:
        other.is_published()
    assert "dpo.beta: 0.1 -> 0.2" in str(e.value)
    assert "input pairs: 'abc' -> 'abd'" in str(e.value)
    assert "stage:" not in str(e.value)


def test_a_setting_that_is_new_or_gone_is_a_change_too(tmp_path: Path) -> None:
    publish(Artifact(tmp_path, {"a": 1, "b": 2}))
    with pytest.raises(StaleArtifactError, match=r"b: 2 -> None\n  c: None -> 3"):
        Artifact(tmp_path, {"a": 1, "c": 3}).is_published()


def test_unfinished_work_of_other_settings_is_refused_as_well(tmp_path: Path) -> None:
    write_atomic(tmp_path / SPEC, json.dumps({"identity": {"seed": 1}}))
    assert not Artifact(tmp_path, {"seed": 1}).is_published()
    with pytest.raises(StaleArtifactError, match="was begun with other settings"):
        Artifact(tmp_path, {"seed": 2}).is_published()


def test_a_long_setting_is_shown_by_its_beginning_and_digest(tmp_path: Path) -> None:
    publish(Artifact(tmp_path, {"judge.rubric": "a" * 500}))
    with pytest.raises(StaleArtifactError, match="digest") as e:
        Artifact(tmp_path, {"judge.rubric": "a" * 499 + "b"}).is_published()
    assert len(str(e.value)) < 900


def test_a_table_is_sorted_by_key_and_refuses_two_of_one_key(tmp_path: Path) -> None:
    table = Table(tmp_path, {}, Prompt)
    rows = [Prompt(prompt_id="b", text="two\u2028lines"), Prompt(prompt_id="a", text="one")]
    digest = table.write(rows)
    assert [p.prompt_id for p in table.read()] == ["a", "b"]
    assert table.read()[1].text == "two\u2028lines"
    assert table.write(reversed(rows)) == digest
    with pytest.raises(DataError, match="two records have the key 'a'"):
        table.write([rows[1], rows[1]])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("\n\n", "empty"),
        ('{"example_id": "a", "instruction": "x", "response": "y"}\n{"example_id": ', "line 2: not JSON"),
        ('{"example_id": "a", "instruction": "x"}\n', r"line 1: field\(s\) \['response'\] are missing"),
        ('{"example_id": "a", "instruction": "x", "response": "y", "z": 1}\n', r"unknown field\(s\) \['z'\]"),
        ('["a"]\n', "expected a JSON object"),
        ('{"example_id": "a", "instruction": 3, "response": "y"}\n', "line 1: instruction=3"),
        ('{"example_id": "a", "instruction": "x", "response": "y"}\n' * 2, "line 2: the key 'a' is already used"),
    ],
)
def test_bad_seed_files_are_refused_with_their_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "seed.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_jsonl(path, IFTExample)


METRIC = {"name": "x", "value": 1.5, "n": 2, "low": None, "high": None}
COMPLETION = to_row(completion("a", 0)) | {"number_logprobs": [[7, {"4": -0.2, "3": -1}]]}
COMPARISON = {"question_id": "q", "order": "ba", "verdict_index": 3, "verdict": "A", "first_share": 0.5}


@pytest.mark.parametrize(
    ("record", "row", "change", "message"),
    [
        (Metric, METRIC, {"n": True}, r"n=True: expected int \(.*\), found bool"),
        (Metric, METRIC, {"n": 2.0}, "n=2.0: expected int .* found float"),
        (Metric, METRIC, {"n": "2"}, "n='2': expected int .* found str"),
        (Metric, METRIC, {"value": True}, r"value=True: expected float \| None .* found bool"),
        (Metric, METRIC, {"name": None}, "name=None: expected str .* found NoneType"),
        (Completion, COMPLETION, {"finish_reason": "abort"}, "finish_reason='abort': expected FinishReason .*'length'"),
        (
            Completion,
            COMPLETION,
            {"number_logprobs": [[7, {"4": "x"}]]},
            r"number_logprobs\[0\]\[1\]\['4'\]='x': .*str",
        ),
        (Completion, COMPLETION, {"number_logprobs": [[7]]}, r"number_logprobs\[0\]\[1\]=\[7\]: .*required"),
        (Comparison, COMPARISON, {"order": "a"}, "order='a': expected Order .*'ab' or 'ba'"),
        (Comparison, COMPARISON, {"first_share": False}, "first_share=False"),
        (
            Comparison,
            COMPARISON,
            {"share": 1, "other": 2},
            r"unknown field\(s\) \['other', 'share'\]; a Comparison has",
        ),
    ],
)
def test_a_field_of_another_type_is_refused_with_its_value_and_what_was_expected(
    record: type[Record], row: dict[str, object], change: dict[str, object], message: str
) -> None:
    assert from_row(record, row, where="f, line 1")
    with pytest.raises(DataError, match=f"^f, line 1: {message}"):
        from_row(record, row | change, where="f, line 1")


@pytest.mark.parametrize(
    ("record", "text"),
    [
        (Metric, '{"name": "x", "value": 3, "n": 2, "low": 0.1, "high": 1e-07}\n'),
        (Metric, '{"name": "\u2028", "value": null, "n": 0, "low": null, "high": null}\n'),
        (Completion, json.dumps(COMPLETION) + "\n"),
        (Comparison, json.dumps(COMPARISON) + "\n"),
    ],
)
def test_a_record_is_written_as_it_was_read(record: type[Record], text: str) -> None:
    assert to_line(from_row(record, json.loads(text), where="here")) == text


def test_a_comparison_is_named_by_question_order_and_number() -> None:
    assert from_row(Comparison, COMPARISON, where="here").key == "q/ba/03"


def test_a_seed_file_that_is_missing_or_not_utf8_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_jsonl(tmp_path / "none.jsonl", IFTExample)
    (tmp_path / "latin.jsonl").write_bytes(b'{"example_id": "\xe9"}\n')
    with pytest.raises(DataError, match="not UTF-8"):
        read_jsonl(tmp_path / "latin.jsonl", IFTExample)


def test_a_journal_goes_on_where_it_was_whatever_byte_it_was_cut_at(tmp_path: Path) -> None:
    first = Journal(tmp_path / "whole")
    first.append((completion("a", 0, "caf\u00e9\u2028"), completion("a", 1)))
    first.append((completion("b", 0),))
    first.close()
    data = (tmp_path / "whole" / JOURNAL).read_bytes()
    for cut in range(len(data) + 1):
        directory = tmp_path / "cut"
        directory.mkdir(exist_ok=True)
        (directory / JOURNAL).write_bytes(data[:cut])
        journal = Journal(directory)
        assert len(journal.completions) == data[:cut].count(b"\n")
        journal.append((completion("z", 9),))
        journal.close()
        reopened = Journal(directory)
        assert list(reopened.completions) == [*list(first.completions)[: data[:cut].count(b"\n")], "z/09"]
        reopened.close()


def test_write_atomic_leaves_the_old_file_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / DATA
    write_atomic(path, "old")

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, "new")
    assert path.read_text() == "old"


FILLS_THE_DISK = """
import resource, sys
from pathlib import Path
from nemo_srl.artifacts import Journal
from tests.test_artifacts import completion
journal = Journal(Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))  # a write beyond it writes a part, and then fails
try:
    for i in range(1000):
        journal.append((completion("a", i), completion("b", i)))
except OSError:
    print(i)
"""


def test_a_disk_that_gets_full_costs_no_completed_call(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FILLS_THE_DISK, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    num_written = int(done.stdout)
    assert (tmp_path / JOURNAL).stat().st_size == 2000
    journal = Journal(tmp_path)
    written = [completion(key, i).key for i in range(num_written) for key in "ab"]
    assert list(journal.completions)[: len(written)] == written
    assert len(journal.completions) - len(written) in (0, 1)  # one of the two in the last write may be whole
    journal.append((completion("c", 0),))
    journal.close()
    assert [json.loads(line)["request_key"] for line in (tmp_path / JOURNAL).read_text().splitlines()][-1] == "c"
