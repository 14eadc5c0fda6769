"""The one reader of row files: JSONL, a JSON array, Parquet, or a directory that `datasets.save_to_disk` wrote.

JSONL and JSON may be compressed, with a name that ends in `.gz`. A JSON array is read whole; everything else is
read row by row, so a file may be larger than memory.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

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
    for place, row in _json_rows(path) if is_json else _numbered(_saved_rows(path)):
        where = f"{path}, {place}"
        if not isinstance(row, dict):
            raise DataError(f"{where}: expected a JSON object ({what}), found {type(row).__name__}")
        yield where, row
    if not where:
        raise DataError(f"{path}: empty; expected {what} as {_FORMATS}")


def _numbered(rows: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    return ((f"row {number}", row) for number, row in enumerate(rows, start=1))


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    number, is_first = 0, True
    # Bytes, not text: a text file would also end a line at a lone carriage return.
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        try:
            for number, line in enumerate(file, start=1):
                if line.isspace():
                    continue
                if is_first and line.lstrip().startswith(b"["):
                    yield from _numbered(_parsed(line + file.read(), path, first_line=number))
                    return
                is_first = False
                yield f"line {number}", _parsed(line.rstrip(), path, first_line=number)
        except (EOFError, gzip.BadGzipFile, zlib.error) as e:
            raise DataError(f"{path}, after line {number}: damaged gzip file ({e}); fetch the file again") from e


def _parsed(text: bytes, path: Path, *, first_line: int) -> Any:
    """The JSON value in `text`, which begins in line `first_line` of the file."""
    try:
        return json.loads(text.decode("utf-8"))
    except UnicodeDecodeError as e:
        line = first_line + text[: e.start].count(b"\n")
        raise DataError(f"{path}, line {line}: not UTF-8 ({e.reason}); save the file as UTF-8") from e
    except json.JSONDecodeError as e:
        where = f"{path}, line {first_line + e.lineno - 1}"
        raise DataError(f"{where}: not JSON ({e.msg}, column {e.colno}); expected {_FORMATS}") from e
    except (ValueError, RecursionError) as e:  # a number of thousands of digits; thousands of nested lists
        raise DataError(f"{path}, line {first_line}: JSON that cannot be read ({e})") from e


def _saved_rows(path: Path) -> Iterator[Any]:
    """Rows of a Parquet file, or of a directory that `datasets.save_to_disk` wrote."""
    import datasets
    import pyarrow.parquet

    try:
        if not path.is_dir():
            for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
                yield from batch.to_pylist()
            return
        found = datasets.load_from_disk(str(path))
    except (pyarrow.ArrowException, OSError) as e:
        kind = "a directory of datasets.save_to_disk" if path.is_dir() else "Parquet"
        raise DataError(f"{path}: not {kind}, or damaged ({e})") from e
    if isinstance(found, datasets.DatasetDict):
        raise DataError(f"{path}: holds the splits {sorted(found)}; give the directory of one, such as {path}/train")
    yield from found
