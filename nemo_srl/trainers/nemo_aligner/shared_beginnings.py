"""Sequences that begin with the same tokens, as one sequence that has these tokens once.

The hidden states of a token depend on the tokens before it alone. So both responses to a prompt need its hidden states
once, and so do all verdicts under one rubric. Here sequences become a tree, and its nodes become one sequence: what
the first one has, then what the next one has beyond the tokens that they share, and so on. A token sees those on its
own path only, and its position is its depth. Losses and gradients are the same up to rounding. NeMo-Aligner's own code
still sees labels and log-probabilities of all sequences.

It needs an attention that takes a mask, and a rotary embedding that takes positions. Of the platforms, only `cpu` uses
it: there the time goes by the number of tokens. On a GPU, attention with a mask costs more than the shared tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nemo_srl.trainers.nemo_aligner.batches import round_up


class Layout:
    """How the sequences of the micro-batch that is in the model are laid out. None: one after the other, and causal."""

    def __init__(self) -> None:
        self.visible: torch.Tensor | None = None
        """[trees, 1, sequence, sequence]: whether a token sees another."""
        self.positions: torch.Tensor | None = None
        """[sequence, trees]."""


LAYOUT = Layout()
"""Of this process, which trains one model. The attention layers read it; megatron-core constructs them."""


@dataclass(frozen=True)
class Trees:
    """Sequences as trees, each of which is one sequence for the model."""

    tokens: torch.Tensor
    """[trees, sequence], padded on the right."""
    positions: torch.Tensor
    """[trees, sequence]."""
    visible: torch.Tensor | None
    """[trees, 1, sequence, sequence]; None if no tree has more than one sequence."""
    places: torch.Tensor
    """[sequences, length]: where a token of a sequence is in hidden states of shape [sequence, trees], flat."""
    num_tokens: int
    """Tokens without padding."""

    def enter(self) -> None:
        """Let the attention layers of the next forward pass see these trees."""
        LAYOUT.visible = self.visible
        LAYOUT.positions = None if self.visible is None else self.positions.T.contiguous()

    def cost(self, linear: float) -> float:
        """What a forward pass takes, if a token costs `linear` in matrix products with weights, in units of what it
        costs for each token that it might see."""
        num_trees, length = self.tokens.shape
        return num_trees * length * (linear + length)


def pack(ids: torch.Tensor, lengths: torch.Tensor, groups: Sequence[Sequence[int]], *, multiple: int) -> Trees:
    """`ids` [sequences, length] with their `lengths` -> a tree for each group of rows, padded to a `multiple`."""
    nodes = torch.zeros_like(ids)
    all_ids, all_depths, paths = [], [], []
    for group in groups:
        new_ids, depths = _grow(ids, lengths.tolist(), group, nodes)
        all_ids.append(new_ids)
        all_depths.append(depths)
        paths.append([nodes[row, : lengths[row]] for row in group])
    width = round_up(max(len(x) for x in all_ids), multiple)
    tree_of = torch.zeros(len(ids), 1, dtype=ids.dtype)
    for tree, group in enumerate(groups):
        tree_of[list(group)] = tree
    return Trees(
        tokens=torch.stack([torch.nn.functional.pad(x, (0, width - len(x))) for x in all_ids]),
        positions=torch.stack([torch.nn.functional.pad(x, (0, width - len(x))) for x in all_depths]),
        visible=_visible(paths, width) if max(map(len, groups)) > 1 else None,
        places=nodes * len(groups) + tree_of,
        num_tokens=sum(len(x) for x in all_ids),
    )


def _grow(
    ids: torch.Tensor, lengths: list[int], group: Sequence[int], nodes: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and depths of the nodes of a tree. Writes into `nodes` which node a token of a sequence is."""
    # In this order, a sequence shares most with the one before it, so only these two need to be compared.
    order = sorted(group, key=lambda row: ids[row, : lengths[row]].tolist())
    new, depths, count, before = [], [], 0, order[0]
    for row in order:
        end = lengths[row]
        shared = 0 if row == before else _num_shared(ids[before, : lengths[before]], ids[row, :end])
        nodes[row, :shared] = nodes[before, :shared]
        nodes[row, shared:end] = torch.arange(count, count + end - shared)
        new.append(ids[row, shared:end])
        depths.append(torch.arange(shared, end))
        count, before = count + end - shared, row
    return torch.cat(new), torch.cat(depths)


def _visible(paths: Sequence[Sequence[torch.Tensor]], width: int) -> torch.Tensor:
    """From the nodes of each sequence of each tree. Padding sees all before it: a softmax over nothing is no number."""
    causal = torch.ones(width, width, dtype=torch.bool).tril()
    visible = causal.repeat(len(paths), 1, 1, 1)
    for tree, of_tree in enumerate(paths):
        visible[tree, 0, : 1 + max(int(path[-1]) for path in of_tree)] = False
        for path in of_tree:
            visible[tree, 0, path[:, None], path] = causal[: len(path), : len(path)]
    return visible


def _num_shared(a: torch.Tensor, b: torch.Tensor) -> int:
    shortest = min(len(a), len(b))
    return int((a[:shortest] == b[:shortest]).int().cumprod(0).sum())


def use_positions(rotary_pos_emb: Any) -> None:
    """Let megatron-core's `RotaryEmbedding` compute the angles [sequence, trees, 1, dim] of `LAYOUT.positions`."""
    inner = rotary_pos_emb.forward

    def forward(max_seq_len: int, *args: Any, **kwargs: Any) -> torch.Tensor:
        angles: torch.Tensor = inner(max_seq_len, *args, **kwargs)
        return angles if LAYOUT.positions is None else angles[LAYOUT.positions, 0]

    rotary_pos_emb.forward = forward
