"""Rows that begin alike stay together in the order of a training."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_srl.trainers.nemo_aligner.shared_beginnings import groups_alike
from tests import test_trainer_nemo_aligner as whole
from tests.test_trainer_nemo_aligner import SFT_ROWS, Run, assert_same_training

launch, model_dir, model_of, run_of = whole.launch, whole.model_dir, whole.model_of, whole.run_of

PAIRED = {"rows_together": 2}
"""The rows of SFT are two answers to each of four questions. They are short, so they share more than half of it."""


def test_what_shares_half_of_its_tokens_is_a_group() -> None:
    ids = [[1, 2, 3, 4], [7, 8], [1, 2, 9], [1, 5, 6], [7, 9], [1, 2, 9, 9]]
    # 1 2 3 4 and 1 2 9 share two tokens of three. 1 5 6 shares one with the row before, and 7 9 one of two.
    assert groups_alike(ids, 10) == [[0, 2, 5], [3], [1, 4]]


def test_a_group_is_never_larger_than_asked() -> None:
    assert groups_alike([[1, 2, 3]] * 5, 2) == [[0, 1], [2, 3], [4]]
    assert groups_alike([[1, 2, 3]] * 3, 1) == [[0], [1], [2]]


def test_every_row_is_in_one_group() -> None:
    ids = [[i // 7, i // 3, i] for i in range(50)]
    assert sorted(number for group in groups_alike(ids, 4) for number in group) == list(range(50))


def steps(path: Path) -> list[list[int]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def order(
    launch: Callable[..., list[int]], model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[list[int]]:
    """The rows of each step: two epochs of two steps of four rows."""
    base = tmp_path_factory.mktemp("order")
    whole.training("sft", optim=PAIRED).prepare(model_dir, base / "work")
    assert launch(base / "work", rows=str(base / "rows")) == [0], (base / "work" / "log_0.txt").read_text()[-3000:]
    return steps(base / "rows_0")


def test_a_step_has_both_answers_to_a_question(order: list[list[int]]) -> None:
    for rows in order:
        assert {row ^ 1 for row in rows} == set(rows)


def test_an_epoch_has_every_row_once_in_an_order_of_its_own(order: list[list[int]]) -> None:
    first, second = order[0] + order[1], order[2] + order[3]
    assert sorted(first) == sorted(second) == list(range(len(SFT_ROWS)))
    assert first != second


def test_a_killed_training_goes_on_in_the_same_order(
    order: list[list[int]], launch: Callable[..., list[int]], model_dir: Path, tmp_path: Path
) -> None:
    """It is killed after its third step, the first of an epoch, before its checkpoint."""
    of, work_dir = whole.training("sft", optim=PAIRED), tmp_path / "work"
    of.prepare(model_dir, work_dir)
    assert launch(work_dir, rows=str(tmp_path / "rows"), at_step=3) == [-signal.SIGKILL]
    assert launch(work_dir, rows=str(tmp_path / "rows")) == [0]
    assert steps(tmp_path / "rows_0") == [*order[:3], order[2], order[3]]


def test_two_data_parallel_ranks_have_groups_of_their_own(
    launch: Callable[..., list[int]], model_dir: Path, tmp_path: Path
) -> None:
    work_dir = tmp_path / "work"
    whole.training("sft", optim=PAIRED, devices=2).prepare(model_dir, work_dir)
    assert launch(work_dir, num_ranks=2, rows=str(tmp_path / "rows")) == [0, 0]
    for rank in (0, 1):
        found = steps(tmp_path / f"rows_{rank}")
        assert all({row ^ 1 for row in rows} == set(rows) for rows in found)
        assert sorted(found[0] + found[1]) == list(range(4 * rank, 4 * rank + 4))


def test_what_is_computed_once_trains_the_same_model(
    run_of: Callable[..., Run], launch: Callable[..., list[int]], model_dir: Path, tmp_path: Path
) -> None:
    """The order is the same where a platform cannot compute common tokens once."""
    of, work_dir = whole.training("sft", optim=PAIRED), tmp_path / "work"
    of.prepare(model_dir, work_dir)
    assert launch(work_dir, share_beginnings=0) == [0]
    assert_same_training(
        run_of("sft", optim=PAIRED), Run(work_dir, tmp_path / "hf", of.export(work_dir, tmp_path / "hf"))
    )
