"""Causal attention over a tree of sequences (`shared_beginnings.py`), path by path.

One attention over the whole tree would compute a score for every two tokens of a micro-batch, and most of them lie on
different paths. Here the tokens that a sequence has for itself look at the tokens of its path, and nothing else is
computed. The heads that share keys and values are rows of one product.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from nemo_srl.trainers.nemo_aligner.shared_beginnings import Branch

BLOCK = 128
"""Queries at a time. No matrix has more than heads x BLOCK x path numbers."""


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


class TreeAttention(torch.autograd.Function):
    """softmax(scale q k^T) v, where a query looks at the keys on its path up to itself, with grouped queries.

    As in FlashAttention (Dao et al. 2022, section 3.1), the backward pass computes the probabilities again.
    """

    @staticmethod
    @_plain
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, branches: Sequence[Branch]
    ) -> torch.Tensor:
        """`query` [nodes, 1, heads, size], `key` and `value` with groups for heads -> [nodes, 1, heads * size].

        It is zero for nodes on no path.
        """
        ctx.save_for_backward(query, key, value)
        ctx.scale, ctx.branches = scale, branches
        out = torch.zeros_like(query)
        for path, blocks in _blocks(branches):
            k, v = _along(key, path), _along(value, path)
            for own, end in blocks:
                p = _probabilities(_folded(query, own, len(k)) * scale, k[:, :end], own)
                _unfolded(out, own, len(k)).copy_((p @ v[:, :end]).view(len(k), -1, _length(own), v.shape[-1]))
        return out.flatten(2)

    @staticmethod
    @_plain
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        query, key, value = ctx.saved_tensors
        gradient = gradient.view(query.shape)
        of_query = torch.zeros_like(query)
        of_key, of_value = (torch.zeros_like(x, dtype=torch.float32) for x in (key, value))
        for path, blocks in _blocks(ctx.branches):
            k, v = _along(key, path), _along(value, path)
            for own, end in blocks:
                q, g = _folded(query, own, len(k)) * ctx.scale, _folded(gradient, own, len(k))
                p = _probabilities(q, k[:, :end], own)
                _add_along(of_value, path, p.mT @ g)
                of_scores = g @ v[:, :end].mT  # so far of the probabilities; the next line overwrites it
                torch.ops.aten._softmax_backward_data.out(of_scores, p, -1, p.dtype, grad_input=of_scores)
                del p
                _add_along(of_key, path, of_scores.mT @ q)
                of_q = (of_scores @ k[:, :end]).mul_(ctx.scale)
                _unfolded(of_query, own, len(k)).copy_(of_q.view(len(k), -1, _length(own), q.shape[-1]))
        return of_query, of_key.to(key.dtype), of_value.to(value.dtype), None, None


def _blocks(branches: Sequence[Branch]) -> Iterator[tuple[tuple[slice, ...], list[tuple[slice, int]]]]:
    """The path of each branch, and its queries in blocks, each with the number of keys up to its last query."""
    for own, path in branches:
        num_shared = sum(map(_length, path)) - _length(own)
        starts = range(own.start, own.stop, BLOCK)
        blocks = [slice(start, min(start + BLOCK, own.stop)) for start in starts]
        yield path, [(block, num_shared + block.stop - own.start) for block in blocks]


def _length(nodes: slice) -> int:
    return int(nodes.stop - nodes.start)


def _along(x: torch.Tensor, path: Sequence[slice]) -> torch.Tensor:
    """Keys or values of a path: [nodes, 1, groups, size] -> [groups, path, size] in float32."""
    return torch.cat([x[nodes, 0] for nodes in path]).float().transpose(0, 1)


def _add_along(x: torch.Tensor, path: Sequence[slice], part: torch.Tensor) -> None:
    """The reverse: add [groups, nodes, size] to the first nodes of a path."""
    left = part.transpose(0, 1)
    for nodes in path:
        of_nodes, left = left[: _length(nodes)], left[_length(nodes) :]
        x[nodes.start : nodes.start + len(of_nodes), 0] += of_nodes


def _folded(x: torch.Tensor, own: slice, num_groups: int) -> torch.Tensor:
    """Queries in float32, with the heads of a group below each other: [nodes, 1, heads, size] -> [groups, queries,
    size]."""
    return _unfolded(x, own, num_groups).flatten(1, 2).float()


def _unfolded(x: torch.Tensor, own: slice, num_groups: int) -> torch.Tensor:
    """A view of them: [groups, heads of a group, own nodes, size]."""
    rows = x[own, 0]
    return rows.view(len(rows), num_groups, -1, rows.shape[-1]).permute(1, 2, 0, 3)


def _probabilities(q: torch.Tensor, k: torch.Tensor, own: slice) -> torch.Tensor:
    """[groups, queries, keys]. The last keys are those of the nodes of `own`."""
    num_nodes, num_keys = _length(own), k.shape[1]
    scores = q @ k.mT
    scores.view(len(k), -1, num_nodes, num_keys)[..., num_keys - num_nodes :] += _later(num_nodes)
    return torch.softmax(scores, -1, out=scores)


@functools.cache  # at most BLOCK of them
def _later(num_nodes: int) -> torch.Tensor:
    """What is added to the scores of nodes that follow each other: 0, and -inf for later ones."""
    return torch.full((num_nodes, num_nodes), -torch.inf).triu_(1)
