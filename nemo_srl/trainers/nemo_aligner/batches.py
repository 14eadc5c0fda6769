"""The rows that `data.py` writes, as batches for NeMo-Aligner's loops.

Batches have the keys, shapes and padding of those from NeMo's `GPTSFTDataset` and NeMo-Aligner's `DPOModelDataset`
(2.2.1 and 0.7.0), but are built from token ids instead of text. Pairs have their `confidence` besides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

IGNORED_LABEL = -100


def collate_sft(rows: Sequence[dict[str, Any]], *, pad_id: int, multiple: int) -> dict[str, torch.Tensor]:
    """Next-token batch `[batch, sequence]`: `tokens`, `labels`, `loss_mask`, `position_ids`.

    The mask is 1 where the label is a response token, its end-of-sequence token included.
    """
    all_ids = [torch.tensor(row["prompt_ids"] + row["response_ids"]) for row in rows]
    length = -(-max(len(ids) - 1 for ids in all_ids) // multiple) * multiple
    tokens = torch.full((len(rows), length), pad_id)
    labels, loss_mask = tokens.clone(), torch.zeros_like(tokens)
    for index, ids in enumerate(all_ids):
        end = len(ids) - 1
        tokens[index, :end], labels[index, :end] = ids[:-1], ids[1:]
        loss_mask[index, len(rows[index]["prompt_ids"]) - 1 : end] = 1
    position_ids = torch.arange(length).expand(len(rows), length).contiguous()
    return {"tokens": tokens, "labels": labels, "loss_mask": loss_mask, "position_ids": position_ids}


def collate_dpo(rows: Sequence[dict[str, Any]], *, pad_id: int) -> list[dict[str, Any]]:
    """One item each pair, both sides padded to the longer one; labels are -100 outside the response.

    The items stay apart. NeMo-Aligner's loop makes one batch of them with its `dpo_custom_collate`.
    """
    return [_dpo_item(row, pad_id) for row in rows]


def _dpo_item(row: dict[str, Any], pad_id: int) -> dict[str, Any]:
    length = len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) - 1
    item: dict[str, Any] = {"ignore_example": False, "confidence": row["confidence"]}
    for side in ("chosen", "rejected"):
        ids = torch.tensor(row["prompt_ids"] + row[f"{side}_ids"])
        labels = ids[1:].clone()
        labels[: len(row["prompt_ids"]) - 1] = IGNORED_LABEL
        padding = (0, length - len(labels))
        item[side] = torch.nn.functional.pad(ids[:-1], padding, value=pad_id)
        item[f"{side}_labels"] = torch.nn.functional.pad(labels, padding, value=IGNORED_LABEL)
        item[f"{side}_length"] = len(labels)
        item[f"{side}_reward"] = row[f"{side}_reward"]
    return item
