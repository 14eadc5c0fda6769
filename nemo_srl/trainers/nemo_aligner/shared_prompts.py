"""A pair as one sequence: the prompt once, then the chosen and then the rejected response.

Both responses follow the same prompt, so its hidden states are the same, and a pair needs them once. The attention of
the rejected response leaves out the chosen one, and its positions go on after the prompt. Losses and gradients are the
same up to rounding. NeMo-Aligner's own code still sees labels and log-probabilities of two sequences.

It needs an attention that takes a mask, and a rotary embedding that takes positions. Of the platforms, only `cpu` uses
it: there the time goes by the number of tokens. On a GPU, attention with a mask costs more than the prompts.
"""

from __future__ import annotations

from typing import Any

import torch

from nemo_srl.trainers.nemo_aligner.batches import IGNORED_LABEL, round_up


class Layout:
    """How the sequences of the micro-batch that is in the model are laid out. None: one after the other, and causal."""

    def __init__(self) -> None:
        self.visible: torch.Tensor | None = None
        """[pairs, 1, sequence, sequence]: whether a token sees another."""
        self.positions: torch.Tensor | None = None
        """[sequence, pairs]."""


LAYOUT = Layout()
"""Of this process, which trains one model. The attention layers read it; megatron-core constructs them."""


def pack(part: dict[str, Any], *, multiple: int) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """From a micro-batch of pairs whose `chosen` and `rejected` are two sequences to one sequence for each pair.

    Sets `LAYOUT`. Returns what replaces entries of the micro-batch, the length of each pair, [pairs], and the places of
    the targets in hidden states of shape [sequence, pairs], flat: first those of all chosen responses. `rejected` has
    no rows afterwards, because NeMo-Aligner's model puts it behind `chosen`.
    """
    num_pairs = len(part["chosen"])
    masks = [part[f"{side}_labels"] != IGNORED_LABEL for side in ("chosen", "rejected")]
    prompts = masks[0].int().argmax(-1) + 1  # the last token of the prompt predicts the first one of the response
    ends = part["chosen_length"]  # where the rejected response begins
    lengths = ends + part["rejected_length"] - prompts
    width = round_up(int(lengths.max()), multiple)
    order = torch.arange(width)
    is_rejected = order >= ends[:, None]  # [pairs, sequence]
    positions = torch.where(is_rejected, order - (ends - prompts)[:, None], order)
    source = torch.where(is_rejected, positions + part["chosen"].shape[1], positions)
    source = source.clamp(max=2 * part["chosen"].shape[1] - 1)  # behind the end of a pair, any token will do
    both = torch.cat([part["chosen"], part["rejected"]], 1)
    is_chosen = (order >= prompts[:, None]) & ~is_rejected
    LAYOUT.visible = ((order <= order[:, None]) & ~(is_rejected[:, :, None] & is_chosen[:, None]))[:, None]
    LAYOUT.positions = positions.T.contiguous()
    row, place = torch.cat(masks).nonzero(as_tuple=True)
    pair = row % num_pairs
    place = torch.where((row >= num_pairs) & (place >= prompts[pair]), place + (ends - prompts)[pair], place)
    changed = {
        "chosen": both.gather(1, source), "rejected": part["rejected"][:0, :1].expand(0, width),
        "position_ids": positions,
    }  # fmt: skip
    return changed, lengths, place * num_pairs + pair


def use_positions(rotary_pos_emb: Any) -> None:
    """Let megatron-core's `RotaryEmbedding` compute the angles [sequence, pairs, 1, dim] of `LAYOUT.positions`."""
    inner = rotary_pos_emb.forward

    def forward(max_seq_len: int, *args: Any, **kwargs: Any) -> torch.Tensor:
        angles: torch.Tensor = inner(max_seq_len, *args, **kwargs)
        return angles if LAYOUT.positions is None else angles[LAYOUT.positions, 0]

    rotary_pos_emb.forward = forward
