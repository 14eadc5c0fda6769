"""A global batch in micro-batches with little padding, and with few tokens twice.

NeMo-Aligner pads every row to the longest of the global batch. Here rows of similar length are together and cut to the
longest of them; or rows that begin alike are together, and have their common tokens once. The mean over a global batch
does not depend on which rows share a micro-batch, so the loss and the gradient are the same up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from nemo_srl.trainers.nemo_aligner import shared_beginnings
from nemo_srl.trainers.nemo_aligner.batches import IGNORED_LABEL, round_up
from nemo_srl.trainers.nemo_aligner.shared_beginnings import Tree


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


@dataclass(frozen=True)
class Part:
    """The rows of a micro-batch."""

    index: torch.Tensor
    """Their numbers in the global batch."""
    tree: Tree | None = None
    """Their sequences, if they share their beginnings."""


class MicroBatches:
    """Takes the place of NeMo's `get_iterator_k_split`. It counts tokens, and says where the targets are."""

    def __init__(
        self, targets: Targets, *, multiple: int, share_beginnings: bool = False,
        part_of_rank: Callable[[torch.Tensor], torch.Tensor] = lambda values: values,
    ) -> None:  # fmt: skip
        """The length of every micro-batch is a multiple of `multiple`, as that of the batches must be.

        With `share_beginnings`, sequences that begin with the same tokens have these once (`shared_beginnings.py`).
        Otherwise every sequence is whole, and `part_of_rank` cuts [rows, sequence] to the tokens that this rank has in
        its model.
        """
        self._targets, self.multiple, self._share_beginnings = targets, multiple, share_beginnings
        self._part_of_rank = part_of_rank
        self._num_tokens = self._num_computed = 0

    def __call__(self, batch: dict[str, Any], num_microbatches: int, *_: Any) -> Iterator[dict[str, Any]]:
        """`batch` of `batches.collate_sft` or `batches.batch_dpo` -> parts of equal size."""
        for part in self.split(batch, len(row_lengths(batch)) // num_microbatches):
            yield self.take(batch, part)

    def split(self, batch: dict[str, Any], size: int) -> list[Part]:
        """The parts, each with `size` rows. If that does not divide their number, the last part has the shortest row
        several times. But if sequences share their beginnings, it has fewer rows.

        Rows that begin alike are together if their sequences share beginnings. Otherwise rows of similar length are,
        the longest ones first.
        """
        if self._share_beginnings:
            return [Part(index, self._tree(batch, index)) for index in torch.split(_by_beginning(batch), size)]
        order = by_length(row_lengths(batch))
        # The buffers of `ub_tp_comm_overlap` have to be full.
        order = torch.cat([order, order[-1:].repeat(-len(order) % size)])
        return [Part(index) for index in torch.split(order, size)]

    def _tree(self, batch: dict[str, Any], index: torch.Tensor) -> Tree:
        sides = _sides(batch)
        ids = torch.cat([batch[side.tokens][index] for side in sides])
        lengths = torch.cat([batch[side.length][index] for side in sides])
        return shared_beginnings.pack(ids, lengths, multiple=self.multiple)

    def take(self, batch: dict[str, Any], part: Part) -> dict[str, Any]:
        """The rows of a part, cut to the longest of them. Their targets are the next ones in the model."""
        width = round_up(int(row_lengths(batch)[part.index].max()), self.multiple)
        found = {k: v[part.index][:, :width].contiguous() if v.ndim == 2 else v[part.index] for k, v in batch.items()}
        # A pair is two sequences: first all chosen ones, then all rejected ones, as NeMo-Aligner has them.
        sides = _sides(batch)
        mask = torch.cat([found[side.labels] for side in sides]) != IGNORED_LABEL
        if (tree := part.tree) is None:
            row, position = self._part_of_rank(mask).nonzero(as_tuple=True)
            self._targets.set(position * len(mask) + row)
            self._num_tokens += sum(int(found[side.length].sum()) for side in sides)
            self._num_computed += mask.numel()
            return found
        row, position = mask.nonzero(as_tuple=True)
        self._targets.set(tree.places[row, position])
        tree.enter()
        self._num_tokens += tree.num_tokens
        self._num_computed += tree.tokens.numel()
        # NeMo-Aligner's model puts the rejected sequences behind the chosen ones.
        none = tree.tokens[:0]
        first, *others = (side.tokens for side in sides)
        return found | {first: tree.tokens, **dict.fromkeys(others, none), "position_ids": tree.positions}

    def take_padding(self) -> float:
        """The share of padding in all tokens since the last call; on this data-parallel rank."""
        share = 1 - self._num_tokens / self._num_computed if self._num_computed else 0.0
        self._num_tokens = self._num_computed = 0
        return share


class _Side(NamedTuple):
    """The keys of one of the sequences of a row."""

    tokens: str
    labels: str
    length: str


_PAIR = tuple(_Side(side, f"{side}_labels", f"{side}_length") for side in ("chosen", "rejected"))
_ROW = (_Side("tokens", "labels", "length"),)


def _sides(batch: dict[str, Any]) -> tuple[_Side, ...]:
    return _PAIR if "chosen" in batch else _ROW


def _by_beginning(batch: dict[str, Any]) -> torch.Tensor:
    """The order in which rows that share their first tokens are neighbours."""
    ids = batch[_sides(batch)[0].tokens].tolist()
    return torch.tensor(sorted(range(len(ids)), key=ids.__getitem__))


def row_lengths(batch: dict[str, Any]) -> torch.Tensor:
    """[rows]: the tokens of a row, for a pair those of its longer side."""
    return torch.stack([batch[side.length] for side in _sides(batch)]).amax(0)


def by_length(lengths: torch.Tensor) -> torch.Tensor:
    """The order from the longest row to the shortest one. Rows of one length stay in their order."""
    return torch.argsort(lengths, descending=True, stable=True)
