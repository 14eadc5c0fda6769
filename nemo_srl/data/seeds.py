"""Instruction data of other formats as IFT seed: which format a row has is seen from its fields.

    messages   {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}, ...]}
    ShareGPT   {"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}, ...]}
    Alpaca     {"instruction": ..., "input": ..., "output": ...}

Files are JSONL, a JSON array, or Parquet; a directory is one of `datasets.save_to_disk`. The first turn of a
conversation is taken. A row that cannot be used is left out and counted by its reason; a row in none of the formats
is a `DataError`, since the file is then another one than was meant.

Not covered: later turns, and system messages, which would change what the answer means (such rows are left out).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from nemo_srl.errors import DataError
from nemo_srl.records import IFTExample

_ROLES = {
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "model": "assistant",
    "system": "system",
}  # fmt: skip
_FORMATS = "messages (messages), ShareGPT (conversations) or Alpaca (instruction, output)"

Turn = tuple[str, str]
"""Role (user, assistant, system or unknown) and text."""


def read_seed(path: Path, counts: Counter[str], *, prefix: str = "") -> list[IFTExample]:
    """The usable rows of a file or data set directory, with ids in its order; equal instructions once."""
    examples: list[IFTExample] = []
    seen: set[str] = set()
    prefix = prefix or path.name.split(".")[0]
    for number, row in enumerate(_rows(path)):
        counts["rows"] += 1
        turn = _first_turn(row, where=f"{path}, row {number}")
        if isinstance(turn, str):
            counts[f"left out: {turn}"] += 1
        elif turn[0] in seen:
            counts["left out: instruction seen before"] += 1
        else:
            seen.add(turn[0])
            examples.append(IFTExample(example_id=f"{prefix}-{number:07d}", instruction=turn[0], response=turn[1]))
    counts["examples"] = len(examples)
    if not examples:
        raise DataError(f"{path}: no usable row; counted: {dict(counts)}")
    return examples


def _first_turn(row: object, *, where: str) -> tuple[str, str] | str:
    """Instruction and answer, or why there are none."""
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: expected an object as in {_FORMATS}, found {type(row).__name__}")
    if isinstance(row.get("messages"), list):
        return _of_turns(_turn(m, "role", "content") for m in row["messages"])
    if isinstance(row.get("conversations"), list):
        return _of_turns(_turn(m, "from", "value") for m in row["conversations"])
    if "instruction" in row and "output" in row:
        texts = [str(row.get(key) or "").strip() for key in ("instruction", "input", "output")]
        instruction = "\n\n".join(filter(None, texts[:2])) if texts[0] else ""
        return (instruction, texts[2]) if instruction and texts[2] else "empty"
    raise DataError(f"{where}: has the fields {sorted(map(str, row))}, which is none of {_FORMATS}")


def _turn(message: object, role: str, text: str) -> Turn:
    if not isinstance(message, Mapping) or not isinstance(message.get(text), str):
        return "unknown", ""
    return _ROLES.get(str(message.get(role)), "unknown"), message[text].strip()


def _of_turns(turns: Iterable[Turn]) -> tuple[str, str] | str:
    found = [t for t in turns if t != ("system", "")]
    if found and found[0][0] == "system":
        return "system message"
    if [role for role, _ in found[:2]] != ["user", "assistant"]:
        return "does not begin with a user's and an assistant's message"
    (_, instruction), (_, response) = found[:2]
    return (instruction, response) if instruction and response else "empty"


def _rows(path: Path) -> Iterator[Any]:
    if path.is_dir() or path.suffix == ".parquet":
        yield from _datasets_rows(path)
        return
    if not path.is_file():
        raise DataError(f"{path}: no such file; expected JSONL, JSON, Parquet or a directory of datasets.save_to_disk")
    with path.open(encoding="utf-8") as file:
        start = file.read(1)
        file.seek(0)
        try:
            if start == "[":
                yield from json.load(file)
                return
            for line in file:
                if line.strip():
                    yield json.loads(line)
        except (json.JSONDecodeError, UnicodeDecodeError) as e:
            raise DataError(f"{path}: neither JSONL nor a JSON array in UTF-8 ({e})") from e


def _datasets_rows(path: Path) -> Iterator[Any]:
    import datasets
    import pyarrow.parquet

    if path.suffix == ".parquet":
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
        return
    try:
        found = datasets.load_from_disk(str(path))
    except FileNotFoundError as e:
        raise DataError(f"{path}: not a directory of datasets.save_to_disk ({e})") from e
    if isinstance(found, datasets.DatasetDict):
        raise DataError(f"{path}: holds the splits {sorted(found)}; give the directory of one, such as {path}/train")
    yield from found
