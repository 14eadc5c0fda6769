"""A global batch in micro-batches with little padding: rows of similar length together, cut to the longest of them.

NeMo-Aligner pads every row to the longest of the global batch. The mean over a global batch does not depend on which
rows share a micro-batch, so the loss and the gradient are the same up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from nemo_srl.trainers.nemo_aligner import shared_prompts
from nemo_srl.trainers.nemo_aligner.batches import IGNORED_LABEL, round_up


class Targets:
    """Where the micro-batch that is in the model has targets."""

    def __init__(self) -> None:
        self._index: torch.Tensor | None = None

    def set(self, index: torch.Tensor) -> None:
        """The places in hidden states of shape [sequence, rows], flat, row by row. On the CPU: no GPU is waited for."""
        self._index = index

    def index(self, device: torch.device) -> torch.Tensor:
        assert self._index is not None, "no micro-batch was handed out"
        return self._index.to(device, non_blocking=True)


class MicroBatches:
    """Takes the place of NeMo's `get_iterator_k_split`. It counts tokens, and says where the targets are."""

    def __init__(
        self, targets: Targets, *, multiple: int, share_prompts: bool = False,
        part_of_rank: Callable[[torch.Tensor], torch.Tensor] = lambda values: values,
    ) -> None:  # fmt: skip
        """The length of every micro-batch is a multiple of `multiple`, as that of the batches must be.

        `share_prompts`: a pair is one sequence (`shared_prompts.py`). `part_of_rank` cuts [rows, sequence] to the
        tokens that this rank has in its model.
        """
        self._targets, self.multiple, self._share_prompts = targets, multiple, share_prompts
        self._part_of_rank = part_of_rank
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
        if self._share_prompts and "chosen" in batch:
            changed, lengths, places = shared_prompts.pack(part, multiple=self.multiple)
            part |= changed
            computed = part["chosen"].numel()
        else:
            # A pair is two sequences: first all chosen ones, then all rejected ones, as NeMo-Aligner has them.
            sides = ("chosen_", "rejected_") if "chosen" in batch else ("",)
            mask = torch.cat([part[f"{side}labels"] for side in sides]) != IGNORED_LABEL
            row, position = self._part_of_rank(mask).nonzero(as_tuple=True)
            places = position * len(mask) + row
            lengths, computed = torch.cat([part[f"{side}length"] for side in sides]), mask.numel()
        self._targets.set(places)
        self._num_tokens += int(lengths.sum())
        self._num_computed += computed
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
