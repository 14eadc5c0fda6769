"""The order of the rows: drawn at random for each epoch, as in NeMo-Aligner, but rows that begin alike stay together.

The verdicts on all answers to one instruction begin alike, for example. In one step, what they share is computed once
(`shared_beginnings.py`). InstructGPT trained its reward model in this way, with all comparisons of a prompt in a batch
(Ouyang et al. 2022, arXiv 2203.02155, section 3.5).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from nemo.collections.nlp.data.language_modeling.megatron.megatron_batch_samplers import (
    MegatronPretrainingRandomBatchSampler,
)

from nemo_srl.trainers.nemo_aligner.shared_beginnings import groups_alike


class AlikeTogetherSampler(MegatronPretrainingRandomBatchSampler):  # type: ignore[misc]
    """NeMo's sampler, but it shuffles groups of rows. NeMo-Aligner's loops accept no other class for several epochs.

    As there, a data-parallel rank draws from its own part of the rows, and rows that fill no batch are left out. The
    order depends on the seed and the epoch alone, so a training that goes on finds it again.
    """

    def __init__(self, rows: Sequence[dict[str, Any]], *, largest_group: int, **arguments: Any) -> None:
        """`arguments` are those of NeMo's sampler."""
        super().__init__(**arguments)
        per_rank = self.total_samples // self.micro_batch_times_data_parallel_size * self.micro_batch_size
        first = self.data_parallel_rank * per_rank
        mine = rows[first : first + per_rank]
        ids = [row["prompt_ids"] + row.get("response_ids", row.get("chosen_ids")) for row in mine]
        self._groups = [[first + number for number in group] for group in groups_alike(ids, largest_group)]

    def __iter__(self) -> Iterator[list[int]]:
        """The numbers of the rows of each global batch, of this rank, from where the training is to the epoch's end."""
        epoch, consumed = divmod(self.consumed_samples, self.total_samples - self.last_batch_size)
        order = torch.randperm(len(self._groups), generator=torch.Generator().manual_seed(self.seed + epoch))
        rows = list(chain.from_iterable(self._groups[number] for number in order.tolist()))
        size = self._global_batch_size_on_this_data_parallel_rank
        for start in range(consumed // self.data_parallel_size, len(rows) - size + 1, size):
            self.consumed_samples += self._global_batch_size
            yield rows[start : start + size]
