"""The rows that `data.py` writes, as batches for NeMo-Aligner's loops.

Batches have the keys, shapes and padding of those from NeMo's `GPTSFTDataset` and NeMo-Aligner's `DPOModelDataset`
(2.2.1 and 0.7.0), but are built from token ids instead of text. Pairs have their `confidence` besides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

IGNORED_LABEL = -100


def round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def collate_sft(rows: Sequence[dict[str, Any]], *, pad_id: int, multiple: int) -> dict[str, torch.Tensor]:
    """Next-token batch `[batch, sequence]`: `tokens`, `labels`, `loss_mask`, `position_ids`. [batch]: `length`, `row`.

    The mask is the row's weight where the label is a response token, its end-of-sequence token included. Elsewhere it
    is 0, and labels are -100.
    """
    all_ids = [torch.tensor(row["prompt_ids"] + row["response_ids"]) for row in rows]
    length = round_up(max(len(ids) - 1 for ids in all_ids), multiple)
    tokens = torch.full((len(rows), length), pad_id)
    labels = torch.full_like(tokens, IGNORED_LABEL)
    for index, ids in enumerate(all_ids):
        end, first = len(ids) - 1, len(rows[index]["prompt_ids"]) - 1
        tokens[index, :end], labels[index, first:end] = ids[:-1], ids[first + 1 :]
    position_ids = torch.arange(length).expand(len(rows), length).contiguous()
    lengths = torch.tensor([len(ids) - 1 for ids in all_ids])
    numbers = torch.tensor([row["row"] for row in rows])
    weights = torch.tensor([row.get("weight", 1.0) for row in rows], dtype=torch.float32)
    loss_mask = (labels != IGNORED_LABEL) * weights[:, None]
    return {
        "tokens": tokens, "labels": labels, "loss_mask": loss_mask, "position_ids": position_ids, "length": lengths,
        "row": numbers,
    }  # fmt: skip


def collate_dpo(rows: Sequence[dict[str, Any]], *, pad_id: int) -> list[dict[str, Any]]:
    """One item each pair, both sides padded to the longer one; labels are -100 outside the response.

    The items stay apart. NeMo-Aligner's loop makes one batch of them with `batch_dpo`.
    """
    return [_dpo_item(row, pad_id) for row in rows]


def batch_dpo(items: Sequence[dict[str, Any]], *, pad_id: int, multiple: int, **_: Any) -> dict[str, torch.Tensor]:
    """The keys of NeMo-Aligner's `dpo_custom_collate`, and what it leaves out: `confidence`, `sft_weight`, `compared`
    and `row` [pairs], and `reference_{chosen,rejected}` [pairs, sequence], if the rows have it. The sequence is a
    multiple of `multiple`.

    NeMo-Aligner's attention mask is a square for every row. No layer reads it, because attention is causal. Here it is
    one element a row.
    """
    batch: dict[str, torch.Tensor] = {}
    length = round_up(max(len(item["chosen"]) for item in items), multiple)
    for side in ("chosen", "rejected"):
        for key, value in ((side, pad_id), (f"{side}_labels", IGNORED_LABEL), (f"reference_{side}", 0.0)):
            if key in items[0]:
                rows = [torch.nn.functional.pad(x[key], (0, length - len(x[key])), value=value) for x in items]
                batch[key] = torch.stack(rows)
        batch[f"{side}_length"] = torch.tensor([item[f"{side}_length"] for item in items])
        batch[f"{side}_rewards"] = torch.tensor([item[f"{side}_reward"] for item in items], dtype=torch.float32)
    batch["confidence"] = torch.tensor([item["confidence"] for item in items])
    batch["sft_weight"] = torch.tensor([item["sft_weight"] for item in items])
    batch["compared"] = torch.tensor([item["compared"] for item in items])
    batch["row"] = torch.tensor([item["row"] for item in items])
    batch["position_ids"] = torch.arange(length).repeat(len(items), 1)
    batch["attention_mask"] = torch.zeros(len(items), 1, 1, 1, dtype=torch.bool)
    return batch


def _dpo_item(row: dict[str, Any], pad_id: int) -> dict[str, Any]:
    length = len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) - 1
    item: dict[str, Any] = {"ignore_example": False, "confidence": row["confidence"], "row": row["row"]}
    item["sft_weight"], item["compared"] = row.get("sft_weight", 1.0), row.get("compared", True)
    for side in ("chosen", "rejected"):
        ids = torch.tensor(row["prompt_ids"] + row[f"{side}_ids"])
        labels = ids[1:].clone()
        labels[: len(row["prompt_ids"]) - 1] = IGNORED_LABEL
        padding = (0, length - len(labels))
        item[side] = torch.nn.functional.pad(ids[:-1], padding, value=pad_id)
        item[f"{side}_labels"] = torch.nn.functional.pad(labels, padding, value=IGNORED_LABEL)
        item[f"{side}_length"] = len(labels)
        item[f"{side}_reward"] = row[f"{side}_reward"]
        if "reference" in row:
            before = len(row["prompt_ids"]) - 1
            logprobs = torch.nn.functional.pad(row["reference"][side], (before, 0))
            item[f"reference_{side}"] = torch.nn.functional.pad(logprobs, (0, length - len(logprobs)))
    return item
