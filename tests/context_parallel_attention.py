"""An attention over the ranks of context parallelism in plain PyTorch: every rank gets all keys and values.

The package leaves this to Transformer Engine, which needs a GPU. With it, tests see on a CPU whether all else is right.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.transformer.dot_product_attention import DotProductAttention

from nemo_srl.trainers.nemo_aligner.platforms.modules import Attention


def install() -> None:
    """In the place of the CPU platform's attention, in this process."""
    patched: Any = Attention
    patched.__init__, patched.forward = _init, _forward


def _init(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
    alone = copy.copy(config)
    alone.context_parallel_size = 1  # megatron-core's class accepts no other
    DotProductAttention.__init__(self, alone, *args, **kwargs)


def _forward(
    self: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: object, **kwargs: Any
) -> torch.Tensor:
    size, rank = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
    key, value = (_AllRanks.apply(x) for x in (key, value))
    order = torch.arange(len(key)).chunk(2 * size)
    all_positions = torch.cat([torch.cat([order[r], order[-1 - r]]) for r in range(size)])
    positions = torch.cat([order[rank], order[-1 - rank]])
    query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    visible = all_positions <= positions[:, None]
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=visible, scale=self.softmax_scale, enable_gqa=True
    )
    return out.permute(2, 0, 1, 3).flatten(2)


class _AllRanks(torch.autograd.Function):
    """[sequence / size, ...] of every rank, one behind the other."""

    @staticmethod
    def forward(ctx: Any, part: torch.Tensor) -> torch.Tensor:
        group = parallel_state.get_context_parallel_group()
        parts = [torch.empty_like(part) for _ in range(group.size())]
        torch.distributed.all_gather(parts, part.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        group = parallel_state.get_context_parallel_group()
        gradient = gradient.clone()
        torch.distributed.all_reduce(gradient, group=group)
        return gradient.chunk(group.size())[group.rank()]
