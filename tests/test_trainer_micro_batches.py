"""Micro-batches with little padding, and where they have targets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from nemo_srl.trainers.nemo_aligner.batches import batch_dpo, collate_dpo, collate_sft
from nemo_srl.trainers.nemo_aligner.micro_batches import MicroBatches, Targets
from nemo_srl.trainers.nemo_aligner.shared_beginnings import LAYOUT, Branch, Layout, pack


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
    for name in ("branches", "positions"):
        monkeypatch.setattr(LAYOUT, name, None)
    return LAYOUT


def paths_of(branches: Sequence[Branch]) -> dict[int, list[int]]:
    """The nodes that each node sees: those on its path, up to itself."""
    found = {}
    for own, path in branches:
        nodes = [n for run in path for n in range(run.start, run.stop)]
        found |= {node: nodes[: nodes.index(node) + 1] for node in range(own.start, own.stop)}
    return found


def test_a_tree_has_common_beginnings_once() -> None:
    ids = torch.tensor([[5, 6, 7, 8, 0], [5, 6, 9, 0, 0], [4, 6, 7, 8, 1], [5, 6, 7, 8, 0]])
    lengths = torch.tensor([4, 3, 5, 4])
    tree = pack(ids, lengths, multiple=4)
    assert tree.num_tokens == 5 + 4 + 1
    assert tree.tokens.shape == (1, 12)
    nodes = tree.places.tolist()
    paths = [paths_of(tree.branches)[nodes[row][end - 1]] for row, end in enumerate(lengths.tolist())]
    for row, end in enumerate(lengths.tolist()):
        path = nodes[row][:end]
        assert tree.tokens[0, path].tolist() == ids[row, :end].tolist()
        assert tree.positions[0, path].tolist() == list(range(end))
        assert path == sorted(path) == paths[row]
    assert nodes[0][:2] == nodes[1][:2] != nodes[2][:2]
    assert nodes[0][:4] == nodes[3][:4]
    assert len(tree.branches) == 3, "the last sequence is the first one again"
    assert sorted(n for branch in tree.branches for n in range(branch.own.start, branch.own.stop)) == [*range(10)]


def test_a_pair_is_one_sequence_with_its_prompt_once(layout: Layout) -> None:
    batch = dpo_batch([(3, 2, 4), (2, 3, 1)])
    targets = Targets()
    split = MicroBatches(targets, multiple=4, share_beginnings=True)
    (part,) = split(batch, 1)
    assert part["chosen"][0, :11].tolist() == [0, 0, 0, 10, 20, 20, 20, 1, 1, 11, 11]
    assert part["chosen"].shape == (1, 12)
    assert part["rejected"].shape == (0, 12)
    assert part["position_ids"].tolist()[0][:11] == [0, 1, 2, 3, 3, 4, 5, 0, 1, 2, 3]
    assert layout.positions is not None
    assert layout.positions.T.tolist() == part["position_ids"].tolist()
    assert layout.branches is not None
    paths = paths_of(layout.branches)
    assert paths[5] == [0, 1, 2, 4, 5], "the prompt and the rejected response"
    assert paths[3] == [0, 1, 2, 3]
    assert 11 not in paths, "padding is on no path"
    labels = torch.cat([part["chosen_labels"], part["rejected_labels"]])
    index = targets.index(torch.device("cpu"))
    # The last token of a prompt predicts the first token of both responses.
    assert index.tolist() == [2, 3, 8, 9, 10, 2, 4, 5, 6, 8]
    assert len(index) == int((labels >= 0).sum())
    assert split.take_padding() == pytest.approx(1 - 11 / 12)


def verdicts(num: int, *, shared: int, own: int) -> dict[str, torch.Tensor]:
    """Rows with `shared` tokens that all have, and `own` ones; every other row is of another rubric."""
    rows = [
        {"row": i, "prompt_ids": [3 + i % 2] * shared + [10 + i] * own, "response_ids": [100 + i]} for i in range(num)
    ]
    return collate_sft(rows, pad_id=2, multiple=1)


def test_rows_that_begin_alike_are_together(layout: Layout) -> None:
    targets = Targets()
    split = MicroBatches(targets, multiple=1, share_beginnings=True)
    first, second = split(verdicts(4, shared=8, own=2), 2)
    assert (first["row"].tolist(), second["row"].tolist()) == ([0, 2], [1, 3])
    assert first["tokens"].shape == first["position_ids"].shape == (1, 12)
    assert first["labels"].shape == first["loss_mask"].shape == (2, 10)
    assert targets.index(torch.device("cpu")).tolist() == [9, 11], "the last tokens of both prompts"
    assert layout.branches is not None
    assert paths_of(layout.branches)[11] == [*range(8), 10, 11]
    assert split.take_padding() == 0
