"""A global batch in micro-batches with little padding: rows of similar length together, cut to the longest of them.

NeMo-Aligner pads every row to the longest of the global batch. The mean over a global batch does not depend on which
rows share a micro-batch, so the loss and the gradient are the same up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from nemo_srl.trainers.nemo_aligner.batches import IGNORED_LABEL, round_up


class Targets:
    """Where the micro-batch that is in the model has targets."""

    def __init__(self) -> None:
        self._mask: torch.Tensor | None = None

    def set(self, mask: torch.Tensor) -> None:
        """`mask` [rows, sequence] is on the CPU, so that counting its tokens need not wait for a GPU."""
        self._mask = mask

    def index(self, device: torch.device) -> torch.Tensor:
        """The places in hidden states of shape [sequence, rows], flat, in the order of `mask`'s rows."""
        assert self._mask is not None, "no micro-batch was handed out"
        row, position = self._mask.nonzero(as_tuple=True)
        return (position * len(self._mask) + row).to(device, non_blocking=True)


class MicroBatches:
    """Takes the place of NeMo's `get_iterator_k_split`. It counts tokens, and says where the targets are."""

    def __init__(self, targets: Targets, *, multiple: int) -> None:
        """The length of every micro-batch is a multiple of `multiple`, as that of the batches must be."""
        self._targets, self.multiple = targets, multiple
        self._num_tokens = self._num_computed = 0

    def __call__(self, batch: dict[str, Any], num_microbatches: int, *_: Any) -> Iterator[dict[str, Any]]:
        """`batch` of `batches.collate_sft` or `batches.batch_dpo` -> parts of equal size, the longest rows first."""
        lengths = row_lengths(batch)
        size = len(lengths) // num_microbatches
        for index in torch.split(by_length(lengths), size):
            yield self.part(batch, index)

    def part(self, batch: dict[str, Any], index: torch.Tensor) -> dict[str, Any]:
        """The rows `index` of `batch`, cut to the longest of them. Their targets are the next ones in the model."""
        width = round_up(int(row_lengths(batch)[index].max()), self.multiple)
        part = {k: v[index][:, :width].contiguous() if v.ndim == 2 else v[index] for k, v in batch.items()}
        # A pair is two sequences: first all chosen ones, then all rejected ones, as NeMo-Aligner's model takes them.
        sides = ("chosen_", "rejected_") if "chosen" in batch else ("",)
        self._targets.set(torch.cat([part[f"{side}labels"] for side in sides]) != IGNORED_LABEL)
        self._num_tokens += sum(int(part[f"{side}length"].sum()) for side in sides)
        self._num_computed += len(sides) * len(index) * width
        return part

    def take_padding(self) -> float:
        """The share of padding in all tokens since the last call; on this data-parallel rank."""
        share = 1 - self._num_tokens / self._num_computed if self._num_computed else 0.0
        self._num_tokens = self._num_computed = 0
        return share


def row_lengths(batch: dict[str, Any]) -> torch.Tensor:
    """[rows]: the tokens of a row, for a pair those of its longer side."""
    if "chosen" in batch:
        return torch.maximum(batch["chosen_length"], batch["rejected_length"])
    return torch.as_tensor(batch["length"])


def by_length(lengths: torch.Tensor) -> torch.Tensor:
    """The order from the longest row to the shortest one. Rows of one length stay in their order."""
    return torch.argsort(lengths, descending=True, stable=True)
