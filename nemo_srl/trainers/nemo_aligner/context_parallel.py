"""Which tokens of a sequence a rank of context parallelism has, and sums over these ranks.

Megatron cuts a sequence into 2 x size chunks. Rank r has chunk r and chunk 2 x size - 1 - r, so causal attention is the
same work for all. NeMo and NeMo-Aligner cut their batches in this way. What this package adds to them has to follow.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state


def mine(values: torch.Tensor) -> torch.Tensor:
    """[rows, sequence] -> [rows, sequence / size]: this rank's part."""
    size, rank = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
    if size < 2:
        return values
    chunks = values.chunk(2 * size, 1)
    return torch.cat([chunks[rank], chunks[-1 - rank]], 1)


def whole(part: torch.Tensor) -> torch.Tensor:
    """[rows, sequence / size] -> [rows, sequence], without a gradient: the opposite of `mine`, on every rank."""
    size = parallel_state.get_context_parallel_world_size()
    if size < 2:
        return part
    parts = [torch.empty_like(part) for _ in range(size)]
    torch.distributed.all_gather(parts, part.contiguous(), group=parallel_state.get_context_parallel_group())
    halves = [p.chunk(2, 1) for p in parts]
    return torch.cat([*(first for first, _ in halves), *(last for _, last in reversed(halves))], 1)


def total(value: torch.Tensor) -> torch.Tensor:
    """The sum over the ranks. Its gradient goes to this rank's `value` alone. Megatron adds up gradients over ranks."""
    if parallel_state.get_context_parallel_world_size() < 2:
        return value
    added = value.detach().clone()
    torch.distributed.all_reduce(added, group=parallel_state.get_context_parallel_group())
    return value + (added - value.detach())


def cut_batches(model: Any) -> None:
    """Let `model`, NeMo-Aligner's for SFT or DPO, cut all that has a sequence, and nothing else.

    Upstream does not cut the reference's log-probabilities, because it computes them in parts. Here they come with the
    whole row (`reference.py`). And it tries to cut what has no sequence: the lengths of rows, and our small mask.
    """
    inner = model.get_batch_on_this_context_parallel_rank

    def get_batch_on_this_context_parallel_rank(batch: dict[str, Any]) -> dict[str, Any]:
        sequences = {key: value for key, value in batch.items() if value is not None and value.ndim == 2}
        for key in ("ref_policy_log_probs_chosen", "ref_policy_log_probs_rejected"):
            if key in sequences:
                sequences[key] = mine(sequences[key])
        return {**batch, **inner(sequences)}

    model.get_batch_on_this_context_parallel_rank = get_batch_on_this_context_parallel_rank
