"""Causal attention over a tree of sequences (`shared_beginnings.py`), many branches at a time.

One attention over the whole tree would compute a score for every two tokens of a micro-batch, and most of them lie on
different paths. Here the tokens that a sequence has for itself look at the tokens of its path. One matrix product for
each sequence would be small, and a second thread would gain nothing. So blocks of similar size are padded to one size,
and are one batch of products. The heads that share keys and values are rows of one product.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

from nemo_srl.trainers.nemo_aligner.shared_beginnings import Branch

BLOCK = 128
"""Queries of a block. More would compute more scores of later keys, which are masked."""
BATCH = 2**18
"""Scores of a batch, for one head: those of a block with 2,048 keys. More would take memory and save no time."""
PADDED = 1.3
"""A batch computes at most so many times the scores that its blocks have."""


def _plain(function: Callable[..., Any]) -> Callable[..., Any]:
    """Without the mode of `cpu.py`, which looks at the arguments of every operation: there are thousands in a step.

    And without autocast, which would round scores to bfloat16: those above 8 by up to 0.03. Here all is float32, and
    the result is rounded, as in PyTorch's kernels.
    """

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        with torch._C.DisableTorchFunction(), torch.autocast("cpu", enabled=False):
            return function(*args)

    return call


class Block(NamedTuple):
    """Nodes that follow each other on one path."""

    own: range
    keys: torch.Tensor
    """The nodes that they see: their path up to the last of them."""

    @property
    def num_scores(self) -> int:
        return len(self.own) * len(self.keys)


@dataclass(frozen=True)
class Batch:
    """Blocks that are computed together, padded to the same numbers of queries and keys."""

    queries: torch.Tensor
    """[blocks, queries]: the node of a query, or -1 for padding."""
    keys: torch.Tensor
    """[blocks, keys]: their nodes. Padding is in front of them, and is node 0."""
    mask: torch.Tensor
    """[blocks, 1, 1, queries, keys]: 0 where a query sees a key, and else -inf. Queries that are padding see all."""
    real: torch.Tensor
    """[nodes of the blocks]: where they are in `queries`, flattened."""
    nodes: torch.Tensor
    """[nodes of the blocks]: they themselves."""

    def of_queries(self, x: torch.Tensor, num_groups: int) -> torch.Tensor:
        """[nodes, 1, heads, size] -> [blocks * groups, heads of a group * queries, size] in float32, 0 for padding."""
        found = x.new_zeros(self.queries.numel(), x[0].numel())
        found.index_copy_(0, self.real, _rows(x).index_select(0, self.nodes))
        split = found.view(*self.queries.shape, num_groups, -1, x.shape[-1]).permute(0, 2, 3, 1, 4)
        return _float(split).flatten(2, 3).flatten(0, 1)

    def put_queries(self, x: torch.Tensor, found: torch.Tensor, num_groups: int) -> None:
        """The reverse: write what was `found` for queries to their nodes in `x`."""
        blocks, queries = self.queries.shape
        rows = found.view(blocks, num_groups, -1, queries, x.shape[-1]).permute(0, 3, 1, 2, 4).to(x.dtype)
        rows = rows.reshape(blocks * queries, -1).index_select(0, self.real)
        _rows(x).index_copy_(0, self.nodes, rows)

    def of_keys(self, x: torch.Tensor) -> torch.Tensor:
        """Keys or values: [nodes, 1, groups, size] -> [blocks * groups, keys, size] in float32."""
        found = _rows(x).index_select(0, self.keys.flatten())
        return _float(found.view(*self.keys.shape, *x.shape[2:]).transpose(1, 2)).flatten(0, 1)

    def add_keys(self, x: torch.Tensor, found: torch.Tensor) -> None:
        """The reverse: add what was `found` for keys to their nodes in `x`, in float32."""
        blocks, keys = self.keys.shape
        rows = found.view(blocks, -1, keys, x.shape[-1]).transpose(1, 2).reshape(blocks * keys, -1)
        _rows(x).index_add_(0, self.keys.flatten(), rows)

    def probabilities(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """[blocks * groups, heads of a group * queries, keys]."""
        scores = torch.bmm(q, k.mT)
        of_blocks = scores.view(len(self.queries), -1, q.shape[1] // self.queries.shape[1], *self.mask.shape[-2:])
        of_blocks += self.mask
        return torch.softmax(scores, -1, out=scores)


class TreeAttention(torch.autograd.Function):
    """softmax(scale q k^T) v, where a query looks at the keys on its path up to itself, with grouped queries.

    As in FlashAttention (Dao et al. 2022, section 3.1), the backward pass computes the probabilities again.
    """

    @staticmethod
    @_plain
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        branches: tuple[Branch, ...],
    ) -> torch.Tensor:
        """`query` [nodes, 1, heads, size], `key` and `value` with groups for heads -> [nodes, 1, heads * size].

        It is zero for nodes on no path.
        """
        ctx.save_for_backward(query, key, value)
        ctx.scale, ctx.batches = scale, batches_of(branches)
        out, groups = torch.zeros(query.shape, dtype=query.dtype), key.shape[2]
        for batch in ctx.batches:
            p = batch.probabilities(batch.of_queries(query, groups).mul_(scale), batch.of_keys(key))
            batch.put_queries(out, torch.bmm(p, batch.of_keys(value)), groups)
        return out.flatten(2)

    @staticmethod
    @_plain
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        query, key, value = ctx.saved_tensors
        gradient, groups = gradient.view(query.shape), key.shape[2]
        of_query = torch.zeros(query.shape, dtype=query.dtype)
        of_key, of_value = (torch.zeros(x.shape, dtype=torch.float32) for x in (key, value))
        for batch in ctx.batches:
            q, g = batch.of_queries(query, groups).mul_(ctx.scale), batch.of_queries(gradient, groups)
            k = batch.of_keys(key)
            p = batch.probabilities(q, k)
            batch.add_keys(of_value, torch.bmm(p.mT, g))
            of_scores = torch.bmm(g, batch.of_keys(value).mT)  # so far of p; the next line overwrites it
            torch.ops.aten._softmax_backward_data.out(of_scores, p, -1, p.dtype, grad_input=of_scores)
            del p
            batch.add_keys(of_key, torch.bmm(of_scores.mT, q))
            batch.put_queries(of_query, torch.bmm(of_scores, k).mul_(ctx.scale), groups)
        return of_query, of_key.to(key.dtype), of_value.to(value.dtype), None, None


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[nodes, 1, heads, size] -> [nodes, heads * size]. A view where `x` is contiguous."""
    return x.flatten(1)


def _float(x: torch.Tensor) -> torch.Tensor:
    """In float32 and contiguous, in one pass over memory."""
    return x.to(torch.float32, memory_format=torch.contiguous_format)


@functools.lru_cache(maxsize=8)  # all layers ask for the same; a pipeline has several micro-batches under way
@_plain
def batches_of(branches: tuple[Branch, ...]) -> list[Batch]:
    """The attention of a tree. Its blocks are sorted by size, so that those of a batch need little padding."""
    blocks = sorted(_blocks(branches), key=lambda block: (len(block.own), len(block.keys)))
    parts, part = [], blocks[:1]
    for block in blocks[1:]:
        if _fit(*part, block):
            part.append(block)
        else:
            parts.append(part)
            part = [block]
    return [_padded(part) for part in (*parts, part)]


def _blocks(branches: Sequence[Branch]) -> Iterator[Block]:
    for own, path in branches:
        nodes = torch.cat([torch.arange(part.start, part.stop) for part in path])
        num_shared = len(nodes) - len(own)
        for start in range(0, len(own), BLOCK):
            block = own[start : start + BLOCK]
            yield Block(block, nodes[: num_shared + start + len(block)])


def _fit(*blocks: Block) -> bool:
    computed = len(blocks) * max(len(b.own) for b in blocks) * max(len(b.keys) for b in blocks)
    return computed <= min(BATCH, PADDED * sum(b.num_scores for b in blocks))


def _padded(blocks: Sequence[Block]) -> Batch:
    queries = pad_sequence([torch.arange(b.own.start, b.own.stop) for b in blocks], batch_first=True, padding_value=-1)
    keys = pad_sequence([b.keys.flip(0) for b in blocks], batch_first=True).flip(1)  # padded in front
    num_queries, num_keys = queries.shape[1], keys.shape[1]
    # The last keys of a block are its own nodes. A query sees those before it, and all keys of the path before them.
    first_own = torch.tensor([num_keys - len(b.own) for b in blocks])[:, None, None]
    first = torch.tensor([num_keys - len(b.keys) for b in blocks])[:, None, None]
    place, order = torch.arange(num_keys), torch.arange(num_queries)[:, None]
    sees = (place >= first) & (place <= first_own + order) | (queries < 0)[:, :, None]
    mask = torch.zeros(sees.shape).masked_fill_(~sees, -torch.inf)[:, None, None]
    real = (queries.flatten() >= 0).nonzero().flatten()
    return Batch(queries, keys, mask, real, queries.flatten()[real])
