"""Causal attention in few matrix products, for a CPU on which oneDNN multiplies.

PyTorch's fused kernel makes a small product for every head and every block of queries. oneDNN takes longer to start
such a product than to compute it. Here all heads of a sequence are one product, for `BLOCK` queries at a time. Keys
after these queries are left out. No matrix has more than heads x BLOCK x sequence numbers.
"""

from __future__ import annotations

from typing import Any

import torch

BLOCK = 128
LONG = 768
"""From this length on, PyTorch's kernel takes larger blocks, too, and is the faster one without a mask."""

Blocks = list[tuple[slice, slice, torch.Tensor]]
"""Some queries, the keys that they may look at, and what is added to their scores: 0, and -inf for later keys."""


def is_faster(query: torch.Tensor, *, masked: bool) -> bool:
    """Whether `CausalAttention` is faster than PyTorch's kernel for `query` [sequence, batch, heads, size].

    `masked`: a query does not see all keys before it. PyTorch's kernel is slow then at any length.
    """
    multiplied_by_onednn = torch.get_float32_matmul_precision() != "highest"
    on_cpu = query.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
    return on_cpu and multiplied_by_onednn and query.dtype == torch.float32 and (masked or len(query) < LONG)


class CausalAttention(torch.autograd.Function):
    """softmax(scale q k^T) v, where a query looks at the keys up to its own position, with grouped queries.

    `visible` [batch, 1, sequence, sequence], if it is there, says which of these keys it looks at. As in FlashAttention
    (Dao et al. 2022, section 3.1), the backward pass computes the probabilities again.
    """

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float,
        visible: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """`query` [sequence, batch, heads, size], `key` and `value` with groups for heads -> [s, b, heads * size]."""
        ctx.save_for_backward(query, key, value)
        ctx.scale, ctx.visible = scale, visible
        out = query.new_empty(query.shape)
        for row in range(query.shape[1]):
            q, k, v, out_of_row = (
                _heads(query, row),
                _repeated(key, row, query),
                _repeated(value, row, query),
                _heads(out, row),
            )
            for queries, keys, mask in _blocks(len(query), visible, row):
                out_of_row[:, queries] = _probabilities(q[:, queries], k[:, keys], mask, scale) @ v[:, keys]
        return out.flatten(2)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        query, key, value = ctx.saved_tensors
        gradient = gradient.view(query.shape)
        of_query, of_key, of_value = (x.new_empty(x.shape) for x in (query, key, value))
        for row in range(query.shape[1]):
            q, g, of_q = _heads(query, row), _heads(gradient, row), _heads(of_query, row)
            k, v = _repeated(key, row, query), _repeated(value, row, query)
            of_k, of_v = torch.zeros_like(k), torch.zeros_like(v)
            for queries, keys, mask in _blocks(len(query), ctx.visible, row):
                p = _probabilities(q[:, queries], k[:, keys], mask, ctx.scale)
                of_v[:, keys].baddbmm_(p.mT, g[:, queries])
                of_p = g[:, queries] @ v[:, keys].mT
                of_scores = torch._softmax_backward_data(of_p, p, -1, p.dtype).mul_(ctx.scale)
                of_q[:, queries] = of_scores @ k[:, keys]
                of_k[:, keys].baddbmm_(of_scores.mT, q[:, queries])
            for target, of_heads in ((of_key, of_k), (of_value, of_v)):
                groups = _heads(target, row)
                torch.sum(of_heads.view(len(groups), -1, *of_heads.shape[1:]), 1, out=groups)
        return of_query, of_key, of_value, None, None


def _blocks(length: int, visible: torch.Tensor | None, row: int) -> Blocks:
    found = []
    for start in range(0, length, BLOCK):
        end = min(start + BLOCK, length)
        if visible is None:
            mask = torch.full((end - start, end), -torch.inf).triu_(start + 1)
        else:
            mask = torch.zeros(end - start, end).masked_fill_(~visible[row, 0, start:end, :end], -torch.inf)
        found.append((slice(start, end), slice(end), mask))
    return found


def _heads(x: torch.Tensor, row: int) -> torch.Tensor:
    """One sequence of [sequence, batch, heads, size] as a view [heads, sequence, size]."""
    return x[:, row].transpose(0, 1)


def _repeated(x: torch.Tensor, row: int, query: torch.Tensor) -> torch.Tensor:
    """The same of keys or values, each group repeated for all of its heads."""
    return _heads(x, row).repeat_interleave(query.shape[2] // x.shape[2], dim=0)


def _probabilities(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    return torch.baddbmm(mask, q, k.mT, alpha=scale).softmax(-1)
