"""Micro-batches with little padding, and where they have targets."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nemo_srl.trainers.nemo_aligner.batches import batch_dpo, collate_dpo, collate_sft
from nemo_srl.trainers.nemo_aligner.micro_batches import MicroBatches, Targets
from nemo_srl.trainers.nemo_aligner.shared_prompts import LAYOUT


def dpo_batch(lengths: list[tuple[int, int, int]], multiple: int = 1, **more: Any) -> dict[str, torch.Tensor]:
    """Pairs with prompts, chosen and rejected answers of these lengths. Token ids tell row and side."""
    rows = [
        {
            "prompt_ids": [i] * p, "chosen_ids": [i + 10] * c, "rejected_ids": [i + 20] * r,
            "chosen_reward": 4.0 + i, "rejected_reward": 1.0, "confidence": 1.0, "row": i, **more,
        }
        for i, (p, c, r) in enumerate(lengths)
    ]  # fmt: skip
    return batch_dpo(collate_dpo(rows, pad_id=2), pad_id=2, multiple=multiple)


def test_rows_of_similar_length_stand_together_and_keep_what_is_theirs() -> None:
    batch = dpo_batch([(2, 3, 1), (2, 9, 1), (2, 1, 4), (2, 1, 8)])
    split = MicroBatches(Targets(), multiple=1)
    first, second = split(batch, 2)
    assert first["chosen_rewards"].tolist() == [5.0, 7.0]
    assert second["chosen_rewards"].tolist() == [6.0, 4.0]
    assert first["chosen"].shape == first["rejected_labels"].shape == first["position_ids"].shape == (2, 10)
    assert second["rejected"].tolist() == [[2, 2, 22, 22, 22], [0, 0, 2, 2, 2]]
    assert second["rejected_labels"].tolist() == [[-100, 22, 22, 22, 22], [-100, 20, -100, -100, -100]]
    assert (first["row"].tolist(), second["row"].tolist()) == ([1, 3], [2, 0])
    real = sum(2 * (2 - 1) + c + r for c, r in ((3, 1), (9, 1), (1, 4), (1, 8)))
    assert split.take_padding() == pytest.approx(1 - real / (4 * 10 + 4 * 5))
    assert split.take_padding() == 0.0


def test_lengths_are_multiples() -> None:
    batch = dpo_batch([(2, 3, 1), (2, 12, 1)], multiple=4)
    widths = [part["chosen"].shape[1] for part in MicroBatches(Targets(), multiple=4)(batch, 2)]
    assert widths == [16, 4]
    assert batch["chosen"].shape == (2, 16)


def test_targets_are_where_the_labels_of_the_micro_batch_are() -> None:
    """In hidden states [sequence, rows], where the rows are first all chosen ones and then all rejected ones."""
    targets = Targets()
    parts = MicroBatches(targets, multiple=1)(dpo_batch([(2, 1, 2), (3, 2, 1)]), 1)
    part = next(parts)
    labels = torch.cat([part["chosen_labels"], part["rejected_labels"]])
    index = targets.index(torch.device("cpu"))
    assert labels.T.flatten()[index].tolist() == [11, 11, 10, 21, 20, 20]
    sft = collate_sft(
        [
            {"row": 0, "prompt_ids": [5, 6, 7], "response_ids": [8, 2]},
            {"row": 1, "prompt_ids": [5], "response_ids": [3]},
        ],
        pad_id=2,
        multiple=1,
    )
    for width, found in zip((4, 1), MicroBatches(targets, multiple=1)(sft, 2), strict=True):
        assert found["tokens"].shape == (1, width)
        of_part = found["labels"].T.flatten()[targets.index(torch.device("cpu"))]
        assert of_part.tolist() == ([8, 2] if width == 4 else [3])


def test_a_batch_brings_the_references_log_probabilities_along() -> None:
    reference = {"chosen": torch.tensor([-1.0, -2.0]), "rejected": torch.tensor([-3.0])}
    batch = dpo_batch([(3, 2, 1)], multiple=8, reference=reference)
    assert batch["reference_chosen"].tolist() == [[0, 0, -1.0, -2.0, 0, 0, 0, 0]]
    assert batch["reference_rejected"].tolist() == [[0, 0, -3.0, 0, 0, 0, 0, 0]]
    assert (batch["chosen_labels"] >= 0).tolist() == (batch["reference_chosen"] < 0).tolist()


def test_a_pair_is_one_sequence_with_its_prompt_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("visible", "positions"):
        monkeypatch.setattr(LAYOUT, name, None)
    batch = dpo_batch([(3, 2, 4), (2, 3, 1)])
    targets = Targets()
    split = MicroBatches(targets, multiple=4, share_prompts=True)
    (part,) = split(batch, 1)
    assert part["chosen"][0, :7].tolist() == [0, 0, 0, 10, 20, 20, 20]
    assert part["chosen"][1, :4].tolist() == [1, 1, 11, 11]
    assert part["chosen"].shape == (2, 8)
    assert part["rejected"].shape == (0, 8)
    assert part["position_ids"].tolist()[0][:7] == [0, 1, 2, 3, 3, 4, 5]
    assert LAYOUT.positions is not None
    assert LAYOUT.positions.T.tolist() == part["position_ids"].tolist()
    visible = LAYOUT.visible
    assert visible is not None
    assert visible[0, 0, 5].nonzero().flatten().tolist() == [0, 1, 2, 4, 5], "the prompt and the rejected response"
    assert visible[0, 0, 3].nonzero().flatten().tolist() == [0, 1, 2, 3]
    labels = torch.cat([part["chosen_labels"], part["rejected_labels"]])
    index = targets.index(torch.device("cpu"))
    # Flat places in [sequence, pairs]: the last token of a prompt predicts the first token of both responses.
    assert [int(i) // 2 for i in index] == [2, 3, 1, 2, 3, 2, 4, 5, 6, 1]
    assert [int(i) % 2 for i in index] == [0, 0, 1, 1, 1, 0, 0, 0, 0, 1]
    assert len(index) == int((labels >= 0).sum())
    assert split.take_padding() == pytest.approx(1 - (3 + 1 + 3 + 2 + 2 + 0) / 16)
