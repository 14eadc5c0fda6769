"""IFT seed from instruction data of other formats. The fields of a row tell its format.

    messages   {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}, ...]}
               content may also be a list of parts {"type": "text", "text": ...}
    ShareGPT   {"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}, ...]}
    Alpaca     {"instruction": ..., "input": ..., "output": ...}

`nemo_srl/rows.py` says which files can be read. The first turn of a conversation is used. A row that cannot be used is
left out and counted by its reason. A row in none of the formats is a `DataError`, because the file is then probably
not the one that the user meant.

Not covered: later turns; and system messages, because an answer depends on them (such rows are left out).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_srl.errors import DataError
from nemo_srl.records import IFTExample
from nemo_srl.rows import read_rows

_ROLES = {
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "model": "assistant",
    "system": "system", "developer": "system",
}  # fmt: skip
_FORMATS = "messages (messages), ShareGPT (conversations) or Alpaca (instruction, output)"


def read_seed(path: Path, counts: Counter[str], *, prefix: str = "") -> list[IFTExample]:
    """The usable rows of a file or directory, in its order; of equal instructions, the first.

    `counts` gets the number of rows, and of those left out by reason. Raises `DataError` when no row is usable.
    """
    examples: list[IFTExample] = []
    seen: set[str] = set()
    prefix = prefix or path.name.split(".")[0]
    for number, (where, row) in enumerate(read_rows(path, what=f"rows of {_FORMATS}")):
        counts["rows"] += 1
        turn = _first_turn(row, where=where)
        if isinstance(turn, str):
            counts[f"left out: {turn}"] += 1
        elif turn[0] in seen:
            counts["left out: instruction seen before"] += 1
        else:
            seen.add(turn[0])
            examples.append(IFTExample(example_id=f"{prefix}-{number:07d}", instruction=turn[0], response=turn[1]))
    counts["examples"] = len(examples)
    if not examples:
        raise DataError(
            f"{path}: no usable row; counted: {dict(counts)}. Give rows that have an instruction and an answer to it."
        )
    return examples


def _first_turn(row: Mapping[str, Any], *, where: str) -> tuple[str, str] | str:
    """Instruction and answer, or the reason to leave the row out."""
    for field in ("messages", "conversations"):
        if isinstance(row.get(field), list):
            return _of_turns([_turn(message) for message in row[field]])
    if "instruction" in row and "output" in row:
        instruction, more, response = (_text(row, key, where=where) for key in ("instruction", "input", "output"))
        return ("\n\n".join(filter(None, (instruction, more))), response) if instruction and response else "empty"
    raise DataError(
        f"{where}: has the fields {sorted(row)}; expected {_FORMATS}. Rename the fields, or give another file."
    )


def _text(row: Mapping[str, Any], key: str, *, where: str) -> str:
    """The text of a field. Nothing, null and a data frame's NaN are no text. Raises `DataError` for anything else."""
    value = row.get(key)
    if value is None or value != value:
        return ""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise DataError(f"{where}: `{key}` is {value!r}, a {type(value).__name__}. Make it a text, or remove the row.")
    return str(value).strip()


def _turn(message: object) -> tuple[str, str]:
    """The role (user, assistant, system or unknown) and the text. Either format's names are understood in both."""
    if not isinstance(message, Mapping):
        return "unknown", ""
    role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
    if isinstance(content, list) and all(isinstance(x, Mapping) and x.get("type") == "text" for x in content):
        content = "".join(str(part.get("text", "")) for part in content)
    if not isinstance(content, str):
        return "unknown", ""
    return _ROLES.get(str(role).lower(), "unknown"), content.strip()


def _of_turns(turns: Sequence[tuple[str, str]]) -> tuple[str, str] | str:
    found = [t for t in turns if t != ("system", "")]
    if found and found[0][0] == "system":
        return "system message"
    if [role for role, _ in found[:2]] != ["user", "assistant"]:
        return "does not begin with a user's and an assistant's message"
    (_, instruction), (_, response) = found[:2]
    return (instruction, response) if instruction and response else "empty"
