"""Sequences that begin with the same tokens, as one sequence that has these tokens once.

The hidden states of a token depend on the tokens before it alone. So both responses to a prompt need its hidden states
once, and so do all verdicts under one rubric. Here sequences become a tree, and its nodes become one sequence: what
the first one has, then what the next one has beyond the tokens that they share, and so on. A token's position is its
depth, and it sees those on its own path only: `platforms/attention.py` computes nothing else. Losses and gradients are
the same up to rounding. NeMo-Aligner's own code still sees labels and log-probabilities of all sequences.

It needs an attention that knows paths, and a rotary embedding that takes positions. Of the platforms, only `cpu` uses
it: there the time goes by the number of tokens. A GPU has fused kernels for attention over whole sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from nemo_srl.trainers.nemo_aligner.batches import round_up


class Branch(NamedTuple):
    """What one sequence of a tree has beyond the one before it."""

    own: range
    """Its own nodes."""
    path: tuple[range, ...]
    """The nodes of the whole sequence, from its first token to its last one. The last ones are its own."""


class Layout:
    """How the sequences of the micro-batch that is in the model are laid out. None: one after the other, and causal."""

    def __init__(self) -> None:
        self.branches: tuple[Branch, ...] | None = None
        self.positions: torch.Tensor | None = None
        """[sequence, 1]."""


LAYOUT = Layout()
"""Of this process, which trains one model. The attention layers read it; megatron-core constructs them."""


@dataclass(frozen=True)
class Tree:
    """Sequences as one sequence for the model."""

    tokens: torch.Tensor
    """[1, nodes], padded on the right. The padding is on no path."""
    positions: torch.Tensor
    """[1, nodes]."""
    branches: tuple[Branch, ...]
    """They have all nodes without padding, each of them once."""
    places: torch.Tensor
    """[sequences, length]: the node of a token of a sequence."""
    num_tokens: int
    """Nodes without padding."""

    def enter(self) -> None:
        """Let the attention layers of the next forward pass see this tree."""
        LAYOUT.branches = self.branches
        # One sequence has the usual positions, so no angles need to be copied.
        LAYOUT.positions = self.positions.T.contiguous() if len(self.branches) > 1 else None


def pack(ids: torch.Tensor, lengths: torch.Tensor, *, multiple: int) -> Tree:
    """`ids` [sequences, length] with their `lengths` -> their tree, padded to a `multiple`."""
    # In this order, a sequence shares most with the one before it, so only these two need to be compared.
    order = sorted(range(len(ids)), key=lambda row: ids[row, : lengths[row]].tolist())
    places = torch.zeros_like(ids)
    tokens, depths, branches, count, before = [], [], [], 0, order[0]
    for row in order:
        end = int(lengths[row])
        shared = 0 if row == before else _num_shared(ids[before, : lengths[before]], ids[row, :end])
        places[row, :shared] = places[before, :shared]
        places[row, shared:end] = torch.arange(count, count + end - shared)
        tokens.append(ids[row, shared:end])
        depths.append(torch.arange(shared, end))
        if end > shared:
            branches.append(Branch(range(count, count + end - shared), _runs(places[row, :end].tolist())))
        count, before = count + end - shared, row
    padding = (0, round_up(count, multiple) - count)
    return Tree(
        tokens=torch.nn.functional.pad(torch.cat(tokens), padding)[None],
        positions=torch.nn.functional.pad(torch.cat(depths), padding)[None],
        branches=tuple(branches),
        places=places,
        num_tokens=count,
    )


def _runs(nodes: list[int]) -> tuple[range, ...]:
    """Ascending numbers as ranges of numbers that follow each other."""
    starts = [i for i, node in enumerate(nodes) if i == 0 or node != nodes[i - 1] + 1]
    ends = [*starts[1:], len(nodes)]
    return tuple(range(nodes[a], nodes[b - 1] + 1) for a, b in zip(starts, ends, strict=True))


def _num_shared(a: torch.Tensor, b: torch.Tensor) -> int:
    shortest = min(len(a), len(b))
    return int((a[:shortest] == b[:shortest]).int().cumprod(0).sum())


def groups_alike(ids: Sequence[list[int]], largest: int) -> list[list[int]]:
    """The numbers of all sequences in groups of `largest` at most, which can share much.

    They are sorted by their tokens. One that shares at least half of its tokens, or half of those of the sequence
    before it, joins the group of that one.
    """
    groups: list[list[int]] = []
    for number in sorted(range(len(ids)), key=ids.__getitem__):
        if groups and len(groups[-1]) < largest and _begin_alike(ids[groups[-1][-1]], ids[number]):
            groups[-1].append(number)
        else:
            groups.append([number])
    return groups


def _begin_alike(a: list[int], b: list[int]) -> bool:
    half = -(-min(len(a), len(b)) // 2)
    return a[:half] == b[:half]


def use_positions(rotary_pos_emb: Any) -> None:
    """Let megatron-core's `RotaryEmbedding` compute the angles [sequence, 1, 1, dim] of `LAYOUT.positions`."""
    inner = rotary_pos_emb.forward

    def forward(max_seq_len: int, *args: Any, **kwargs: Any) -> torch.Tensor:
        angles: torch.Tensor = inner(max_seq_len, *args, **kwargs)
        return angles if LAYOUT.positions is None else angles[LAYOUT.positions, 0]

    rotary_pos_emb.forward = forward
