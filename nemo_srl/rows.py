"""The one reader of row files: JSONL, a JSON array, Parquet, or a directory that `datasets.save_to_disk` wrote.

JSONL and JSON may be compressed by gzip, whatever the name, and may begin with the byte order mark of UTF-8 or UTF-16,
as Windows writes it. JSON arrays and UTF-16 are read whole; everything else is read row by row, so a file may be larger
than memory.
"""

from __future__ import annotations

import codecs
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from nemo_srl import jsonio
from nemo_srl.errors import DataError

_FORMATS = "JSONL, a JSON array (either may be .gz), .parquet, or a directory of datasets.save_to_disk"


def read_rows(path: Path, *, what: str = "rows") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place, row) for each row of a file, in its order.

    The place is "<path>, line N" in JSONL and "<path>, row N" elsewhere; N counts from 1. `what` names the expected
    rows in messages. Raises `DataError` for a file that is missing, empty, damaged or not UTF-8, and for a row that
    is not a JSON object.
    """
    if not path.exists():
        raise DataError(f"{path}: no such file; expected {what} as {_FORMATS}")
    is_json = not path.is_dir() and path.suffix != ".parquet"
    where = ""
    try:
        for place, row in _json_rows(path) if is_json else _numbered(_saved_rows(path)):
            where = f"{path}, {place}"
            if not isinstance(row, dict):
                raise DataError(f"{where}: expected a JSON object ({what}), found {type(row).__name__}")
            yield where, row
    except OSError as e:
        raise DataError(f"{path}: cannot be read ({e.strerror or e}). Make it readable, or copy it again.") from e
    if not where:
        raise DataError(f"{path}: empty; expected {what} as {_FORMATS}")


def _numbered(rows: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    return ((f"row {number}", row) for number, row in enumerate(rows, start=1))


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    number, is_first = 0, True
    # Bytes, not text: a text file would also end a line at a lone carriage return.
    with gzip.open(path) if path.suffix == ".gz" or _begins(path, b"\x1f\x8b") else path.open("rb") as file:
        try:
            lines = _utf8_lines(file, path)
            for number, line in enumerate(lines, start=1):
                if line.isspace():
                    continue
                if is_first and line.lstrip().startswith(b"["):
                    yield from _numbered(_parsed(line + b"".join(lines), path, first_line=number))
                    return
                is_first = False
                yield f"line {number}", _parsed(line.rstrip(), path, first_line=number)
        except (EOFError, gzip.BadGzipFile, zlib.error) as e:
            raise DataError(f"{path}, after line {number}: damaged gzip file ({e}); fetch the file again") from e


def _begins(path: Path, magic: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(magic)) == magic


def _utf8_lines(file: Any, path: Path) -> Iterator[bytes]:
    """The lines of an open file in UTF-8 and without a byte order mark."""
    first = file.readline()
    if first.startswith(b"version https://git-lfs.github.com/spec/"):
        raise DataError(f"{path}: this is a pointer of Git LFS, and not the data. `git lfs pull` fetches the data.")
    if first.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        try:
            yield from (first + file.read()).decode("utf-16").encode().splitlines(keepends=True)
        except UnicodeError as e:
            raise DataError(f"{path}: it begins as UTF-16, and is not ({e}); save the file as UTF-8") from e
        return
    if first:
        yield first.removeprefix(codecs.BOM_UTF8)
        yield from file


def _parsed(text: bytes, path: Path, *, first_line: int) -> Any:
    """The JSON value in `text`, which begins in line `first_line` of the file."""
    try:
        value = jsonio.loads(text)
        if b"\\ud" in text or b"\\uD" in text:  # perhaps half of a pair, which cannot be written as text
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeDecodeError as e:
        line = first_line + text[: e.start].count(b"\n")
        raise DataError(
            f"{path}, line {line}: not UTF-8 ({e.reason}). It seems to be Latin-1 or Windows-1252. To convert it: "
            f"iconv -f WINDOWS-1252 -t UTF-8 {path} > new.jsonl"
        ) from e
    except UnicodeEncodeError as e:
        raise DataError(
            f"{path}, line {first_line}: a text has half of a character, {e.object[e.start]!r}, such as half an emoji. "
            "Remove it, or the row."
        ) from e
    except json.JSONDecodeError as e:
        where = f"{path}, line {first_line + e.lineno - 1}"
        raise DataError(f"{where}: not JSON ({e.msg}, column {e.colno}); expected {_FORMATS}") from e
    except ValueError as e:  # a number of thousands of digits; thousands of nested lists
        raise DataError(
            f"{path}, line {first_line}: JSON that cannot be read ({e}). Correct the row, or remove it."
        ) from e


def _saved_rows(path: Path) -> Iterator[Any]:
    """Rows of a Parquet file, or of a directory that `datasets.save_to_disk` wrote."""
    import datasets
    import pyarrow.parquet

    # Arrow and datasets raise errors of many kinds for damaged files.
    try:
        if not path.is_dir():
            for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
                yield from batch.to_pylist()
            return
        found = datasets.load_from_disk(str(path))
        if not isinstance(found, datasets.DatasetDict):
            yield from found
            return
    except Exception as e:
        kind = "a directory of datasets.save_to_disk" if path.is_dir() else "Parquet"
        reason = " ".join(f"{e}".split())[:300]
        raise DataError(f"{path}: not {kind}, or damaged ({reason}). Copy or download it again.") from e
    raise DataError(f"{path}: holds the splits {sorted(found)}; give the directory of one, such as {path}/train")
