"""The reader of row files: every form gives the same rows, and errors name file and line."""

from __future__ import annotations

import gzip
import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from nemo_srl.errors import DataError
from nemo_srl.rows import read_rows

ROWS: list[dict[str, Any]] = [{"text": "caf\u00e9\u2028\r", "tags": ["a", "b"], "n": i} for i in range(5)]


def lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def test_every_form_gives_the_same_rows(tmp_path: Path) -> None:
    import datasets

    array = json.dumps(ROWS, indent=1).encode()
    (tmp_path / "a.jsonl").write_bytes(lines(ROWS).replace(b"\n", b"\r\n\n"))
    (tmp_path / "a.json").write_bytes(b"\n  " + array)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines(ROWS)))
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(array))
    data = datasets.Dataset.from_list(ROWS)
    data.to_parquet(tmp_path / "a.parquet", batch_size=2)
    data.save_to_disk(tmp_path / "a")
    names = ("a.jsonl", "a.json", "a.jsonl.gz", "a.json.gz", "a.parquet", "a")
    found = {name: list(read_rows(tmp_path / name)) for name in names}
    assert all([row for _, row in rows] == ROWS for rows in found.values())
    place = {name: rows[2][0].removeprefix(f"{tmp_path / name}, ") for name, rows in found.items()}
    assert place == {
        "a.jsonl": "line 5",  # there is an empty line after each row
        "a.json": "row 3",
        "a.jsonl.gz": "line 3",
        "a.json.gz": "row 3",
        "a.parquet": "row 3",
        "a": "row 3",
    }


def test_jsonl_is_read_line_by_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(ROWS[:2]) + b"{")
    rows = read_rows(tmp_path / "a.jsonl")
    assert [row for _, row in islice(rows, 2)] == ROWS[:2]
    with pytest.raises(DataError, match="line 3: not JSON"):
        next(rows)


PACKED = gzip.compress(b"".join(lines([{"i": i}]) for i in range(10_000)))


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jsonl", b"", "empty; expected things as JSONL, a JSON array"),
        ("a.jsonl", b" \n\n", "empty"),
        ("a.json", b"[]", "empty"),
        ("a.json", b"null", r"line 1: expected a JSON object \(things\), found NoneType"),
        ("a.jsonl", b"{}\n[]", "line 2: expected a JSON object .* found list"),
        ("a.json", b"[{}, 3]", "row 2: expected a JSON object .* found int"),
        ("a.json", b'{\n"data": []}', r"line 1: not JSON \(.*column 2\)"),
        ("a.json", b'\n[{},\n{"a" 1}]', r"line 3: not JSON \(Expecting ':' delimiter, column 6\)"),
        ("a.jsonl", b'{}\n{"a": "\xe9"}', "line 2: not UTF-8 .*.*Latin-1.*iconv -f WINDOWS-1252 -t UTF-8"),
        ("a.json", b'[{},\n\n{"a": "\xe9"}]', "line 3: not UTF-8"),
        ("a.jsonl", b'{"a": ' + b"9" * 5000 + b"}", "line 1: JSON that cannot be read"),
        ("a.jsonl", b'{"a": ' + b"[" * 100_000, "line 1: JSON that cannot be read"),
        ("a.jsonl.gz", b"{}", "after line 0: damaged gzip file .*; fetch the file again"),
        ("a.jsonl.gz", PACKED[:-30], r"after line \d+: damaged gzip file"),
        ("a.jsonl.gz", PACKED[:10] + b"\xff" * 99, "after line 0: damaged gzip file .*invalid"),
        ("a.parquet", b"PAR1, or not", "not Parquet, or damaged"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_place(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name}[,:] {reason}"):
        list(read_rows(tmp_path / name, what="things"))


def test_no_file_and_another_directory_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="x: no such file; expected things as JSONL"):
        next(read_rows(tmp_path / "x", what="things"))
    with pytest.raises(DataError, match=r"not a directory of datasets\.save_to_disk"):
        next(read_rows(tmp_path))


OTHER_ROWS = [{"a": "caf\u00e9 \U0001f600"}, {"a": 2}]
TEXT = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in OTHER_ROWS)


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + TEXT.encode(),
        TEXT.replace("\n", "\r\n").encode("utf-16"),
        TEXT.encode("utf-16-be").join([b"\xfe\xff", b""]),
        gzip.compress(TEXT.encode()),
        gzip.compress(b"\xef\xbb\xbf" + json.dumps(OTHER_ROWS).encode()),
        ("\n\n" + json.dumps(OTHER_ROWS, indent=1)).encode("utf-16"),
        json.dumps(OTHER_ROWS).encode(),
    ],
)
def test_what_windows_and_others_write_is_read(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    assert [row for _, row in read_rows(tmp_path / "a.jsonl")] == OTHER_ROWS


def test_a_pointer_of_git_lfs_and_half_a_character_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
    with pytest.raises(DataError, match=r"pointer of Git LFS.*git lfs pull"):
        list(read_rows(path))
    path.write_text('{"a": "\\ud83d\\ude00"}\n{"a": "ok \\ud83d done"}\n')
    with pytest.raises(DataError, match=r"line 2: a text has half of a character, '\\ud83d'"):
        list(read_rows(path))
