"""From rendered text to the token ids that are trained on, and what is counted on the way.

NeMo-Aligner's own datasets tokenise during the training. They cut an over-long pair to 32 masked tokens that still
count in the batch. They stop the run in its middle when a tokenizer merges characters across the prompt's end. The
SFT dataset strips spaces from the text. Here every row is tokenised once, before anything starts, and the file holds
token ids. So what is counted is what is trained on:

- A row longer than `max_seq_length` is dropped and counted.
- Prompt and response are tokenised together, as NeMo-Aligner does. Where the tokenizer would merge across their
  boundary, they are tokenised apart and counted. The policy also sees the prompt alone when it answers.
- A response ends with the model's end-of-sequence token, so that the policy learns to stop. A response that was cut off
  at `max_tokens` has no end, so it gets none.

Raises `DataError` for rows that cannot be used. Needs no torch. Covers rows of text only.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_srl import jsonio
from nemo_srl.errors import DataError
from nemo_srl.protocols import DPORow, SFTRow

TRAIN_FILE = "train.jsonl"

Encode = Callable[[str], list[int]]
"""Text to token ids, without any special token that is not in the text."""


@dataclass(frozen=True, kw_only=True)
class DataStatistics:
    """What became of the rows. A length is that of prompt and response; tokens count both responses of a pair."""

    num_rows: int
    """Rows that can be trained on."""
    num_rows_too_long: int = 0
    """Rows that were dropped because they are longer than `max_seq_length`."""
    shortest_too_long: int = 0
    """The length of the shortest of them; 0 if there are none."""
    num_boundary_merges: int = 0
    """Rows that were kept, with prompt and response tokenised apart."""
    num_tokens: int = 0
    max_length: int = 0


def tokenize_rows(
    rows: Sequence[SFTRow | DPORow], *, encode: Encode, eos_token_id: int, max_seq_length: int
) -> tuple[list[dict[str, Any]], DataStatistics]:
    """Token ids per row, in order and without the rows that are too long, and the counts."""
    kept: list[dict[str, Any]] = []
    all_lengths: list[int] = []
    too_long: list[int] = []
    num_merges = 0
    for index, row in enumerate(rows):
        ids, lengths, merged = _row_ids(row, encode, eos_token_id)
        if not ids["prompt_ids"]:
            raise DataError(
                f"row {index}: the prompt is empty. The first token of a response can only be trained after another "
                "token. Give the row a prompt; a chat template always writes one."
            )
        if max(lengths) <= max_seq_length:
            kept.append(ids)
            all_lengths += lengths
            num_merges += merged
        else:
            too_long.append(max(lengths))
    return kept, DataStatistics(
        num_rows=len(kept),
        num_rows_too_long=len(too_long),
        shortest_too_long=min(too_long, default=0),
        num_boundary_merges=num_merges,
        num_tokens=sum(all_lengths),
        max_length=max(all_lengths, default=0),
    )


def _row_ids(row: SFTRow | DPORow, encode: Encode, eos_token_id: int) -> tuple[dict[str, Any], list[int], bool]:
    """The row as numbers, the length with each response, and whether a response would have merged."""
    prompt_ids = encode(row.prompt)
    found: dict[str, Any] = {"prompt_ids": prompt_ids}
    lengths, any_merged = [], False
    for name in ("response",) if isinstance(row, SFTRow) else ("chosen", "rejected"):
        response = getattr(row, name)
        both = encode(row.prompt + response)
        merged = both[: len(prompt_ids)] != prompt_ids
        ended = isinstance(row, SFTRow) or getattr(row, f"{name}_finish_reason") == "stop"
        end = [eos_token_id] if ended else []
        found[f"{name}_ids"] = [*(encode(response) if merged else both[len(prompt_ids) :]), *end]
        lengths.append(len(prompt_ids) + len(found[f"{name}_ids"]))
        any_merged |= merged
    if isinstance(row, SFTRow):
        found |= {"weight": row.weight} if row.weight != 1 else {}
    else:
        found |= {key: getattr(row, key) for key in ("chosen_reward", "rejected_reward", "confidence")}
        found |= {"sft_weight": row.sft_weight} if row.sft_weight != 1 else {}
        found |= {} if row.compared else {"compared": False}
    return found, lengths, any_merged


def write_rows(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """One JSON object a line."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(jsonio.dumps(row) + "\n" for row in rows)


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """What `write_rows` wrote, each with its number, `row`, from 0."""
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file):
            yield {**json.loads(line), "row": number}
