"""Micro-batches with little padding, and where they have targets."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nemo_srl.trainers.nemo_aligner.batches import batch_dpo, collate_dpo, collate_sft
from nemo_srl.trainers.nemo_aligner.micro_batches import MicroBatches, Targets
from nemo_srl.trainers.nemo_aligner.shared_beginnings import LAYOUT, Layout, pack


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


def test_with_one_length_all_micro_batches_have_one_shape() -> None:
    """As the buffers of `ub_tp_comm_overlap` need it, also the last micro-batch of rows that do not fill it."""
    dpo = dpo_batch([(2, 3, 1), (2, 12, 1), (2, 1, 1), (2, 5, 5), (2, 6, 1)], multiple=64)
    rows = [{"row": i, "prompt_ids": [5] * n, "response_ids": [8, 2]} for i, n in enumerate((1, 50, 62, 3, 7))]
    sft = collate_sft(rows, pad_id=2, multiple=64)
    for batch, keys in ((dpo, ("chosen", "rejected", "chosen_labels", "position_ids")), (sft, ("tokens", "labels"))):
        split = MicroBatches(Targets(), multiple=64)
        taken = [split.take(batch, part) for part in split.split(batch, 2)]
        assert {tuple(found[key].shape) for found in taken for key in keys} == {(2, 64)}
        numbers = [found["row"].tolist() for found in taken]
        assert numbers[-1] == [numbers[-1][0]] * 2, "the shortest row fills it up"
        assert sorted({n for of_part in numbers for n in of_part}) == [0, 1, 2, 3, 4]


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


@pytest.fixture
def layout(monkeypatch: pytest.MonkeyPatch) -> Layout:
    for name in ("visible", "positions"):
        monkeypatch.setattr(LAYOUT, name, None)
    return LAYOUT


DEAR = 1e6
"""The cost of a token beside which attention costs nothing."""


def test_a_tree_has_common_beginnings_once() -> None:
    ids = torch.tensor([[5, 6, 7, 8, 0], [5, 6, 9, 0, 0], [4, 6, 7, 8, 1], [5, 6, 7, 8, 0]])
    lengths = torch.tensor([4, 3, 5, 4])
    trees = pack(ids, lengths, [range(4)], multiple=4)
    assert trees.num_tokens == 5 + 4 + 1
    assert trees.tokens.shape == (1, 12)
    nodes = trees.places.tolist()
    assert trees.visible is not None
    for row, end in enumerate(lengths.tolist()):
        path = nodes[row][:end]
        assert trees.tokens[0, path].tolist() == ids[row, :end].tolist()
        assert trees.positions[0, path].tolist() == list(range(end))
        assert path == sorted(path)
        for depth, node in enumerate(path):
            assert trees.visible[0, 0, node].nonzero().flatten().tolist() == path[: depth + 1]
    assert nodes[0][:2] == nodes[1][:2] != nodes[2][:2]
    assert nodes[0][:4] == nodes[3][:4]
    assert trees.visible[0, 0].any(1).all(), "padding sees something; a softmax over nothing is no number"
    two = pack(ids, lengths, [(0, 2), (1, 3)], multiple=1)
    assert two.tokens.shape == (2, 9)
    assert (two.places[1, :3] % 2).tolist() == [1, 1, 1]
    assert two.tokens[1, two.places[1, :3] // 2].tolist() == [5, 6, 9]


def test_a_pair_is_one_sequence_with_its_prompt_once(layout: Layout) -> None:
    batch = dpo_batch([(3, 2, 4), (2, 3, 1)])
    targets = Targets()
    split = MicroBatches(targets, multiple=4, linear_cost=0)  # so trees of two pairs do not pay
    (part,) = split(batch, 1)
    assert part["chosen"][0, :7].tolist() == [0, 0, 0, 10, 20, 20, 20]
    assert part["chosen"][1, :4].tolist() == [1, 1, 11, 11]
    assert part["chosen"].shape == (2, 8)
    assert part["rejected"].shape == (0, 8)
    assert part["position_ids"].tolist()[0][:7] == [0, 1, 2, 3, 3, 4, 5]
    assert layout.positions is not None
    assert layout.positions.T.tolist() == part["position_ids"].tolist()
    visible = layout.visible
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


def verdicts(num: int, *, shared: int, own: int) -> dict[str, torch.Tensor]:
    """Rows with `shared` tokens that all have, and `own` ones; every other row is of another rubric."""
    rows = [
        {"row": i, "prompt_ids": [3 + i % 2] * shared + [10 + i] * own, "response_ids": [100 + i]} for i in range(num)
    ]
    return collate_sft(rows, pad_id=2, multiple=1)


def test_rows_that_begin_alike_are_together_where_that_is_cheaper(layout: Layout) -> None:
    targets = Targets()
    split = MicroBatches(targets, multiple=1, linear_cost=DEAR)
    first, second = split(verdicts(4, shared=8, own=2), 2)
    assert (first["row"].tolist(), second["row"].tolist()) == ([0, 2], [1, 3])
    assert first["tokens"].shape == first["position_ids"].shape == (1, 12)
    assert first["labels"].shape == first["loss_mask"].shape == (2, 10)
    assert targets.index(torch.device("cpu")).tolist() == [9, 11], "the last tokens of both prompts"
    assert layout.visible is not None
    assert layout.visible[0, 0, 11].nonzero().flatten().tolist() == [*range(8), 10, 11]
    assert split.take_padding() == 0

    cheap = MicroBatches(targets, multiple=1, linear_cost=0)
    first, second = cheap(verdicts(4, shared=2, own=8), 2)
    assert first["tokens"].shape == (2, 10), "one tree of 18 tokens would have to see more than two of ten"
    assert first["row"].tolist() == [0, 1]
    assert layout.visible is layout.positions is None, "nothing is shared: causal attention is enough"
