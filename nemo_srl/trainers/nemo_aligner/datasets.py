"""The file that `data.py` writes, as NeMo-Aligner's loops want it: torch datasets and the SFT collate function.

Items have the keys, shapes and padding of NeMo-Aligner's own `DPOModelDataset` and NeMo's `GPTSFTDataset`
(0.7.0 and 2.2.1), but are built from token ids instead of text. All rows are in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from nemo_srl.trainers.nemo_aligner.data import read_rows

IGNORED_LABEL = -100


class SFTDataset(Dataset[dict[str, Any]]):
    """One row each: `input_ids` (prompt + response) and `prompt_length`."""

    def __init__(self, path: Path) -> None:
        self.rows = list(read_rows(path))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        return {"input_ids": row["prompt_ids"] + row["response_ids"], "prompt_length": len(row["prompt_ids"])}


def collate_sft(batch: Sequence[dict[str, Any]], *, pad_id: int, multiple: int) -> dict[str, torch.Tensor]:
    """Next-token batch `[batch, sequence]`: `tokens`, `labels`, `loss_mask`, `position_ids`.

    The mask is 1 where the label is a response token, its end-of-sequence token included.
    """
    longest = max(len(item["input_ids"]) for item in batch) - 1
    length = -(-longest // multiple) * multiple
    tokens = torch.full((len(batch), length), pad_id)
    labels = torch.full((len(batch), length), pad_id)
    loss_mask = torch.zeros(len(batch), length, dtype=torch.long)
    for index, item in enumerate(batch):
        ids = torch.tensor(item["input_ids"])
        end = len(ids) - 1
        tokens[index, :end] = ids[:-1]
        labels[index, :end] = ids[1:]
        loss_mask[index, item["prompt_length"] - 1 : end] = 1
    position_ids = torch.arange(length).expand(len(batch), length).contiguous()
    return {"tokens": tokens, "labels": labels, "loss_mask": loss_mask, "position_ids": position_ids}


class DPODataset(Dataset[dict[str, Any]]):
    """One pair each, both sides padded to the longer one; labels are -100 outside the response."""

    def __init__(self, path: Path, *, pad_id: int) -> None:
        self.rows = list(read_rows(path))
        self.pad_id = pad_id

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        length = len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) - 1
        item: dict[str, Any] = {"ignore_example": False}
        for side in ("chosen", "rejected"):
            ids = torch.tensor(row["prompt_ids"] + row[f"{side}_ids"])
            labels = ids[1:].clone()
            labels[: len(row["prompt_ids"]) - 1] = IGNORED_LABEL
            item[side] = _pad(ids[:-1], length, self.pad_id)
            item[f"{side}_labels"] = _pad(labels, length, IGNORED_LABEL)
            item[f"{side}_length"] = len(labels)
            item[f"{side}_reward"] = row[f"{side}_reward"]
        return item


def _pad(ids: torch.Tensor, length: int, value: int) -> torch.Tensor:
    return torch.nn.functional.pad(ids, (0, length - len(ids)), value=value)
