"""Pairs that are not compared: the likelihood of the chosen response teaches alone (`dpo.compare_verdicts=false`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nemo_srl.protocols import DPORow, TrainingTask
from nemo_srl.trainers.nemo_aligner.trainer import NemoAlignerTrainer
from tests import test_trainer_nemo_aligner as whole
from tests.test_trainer_nemo_aligner import BETA, DPO_ROWS, HuggingFace, Run, norm

launch, model_dir = whole.launch, whole.model_dir

COMPARED = (False, True, False, True)
OPTIM = {"sft_loss_weight": 0.5}


@pytest.fixture(scope="module")
def train(
    launch: Callable[..., list[int]], model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Run]:
    """Three steps on all rows, of which some are compared."""

    def run(compared: Sequence[bool] = COMPARED, optim: dict[str, Any] = OPTIM, **layout: Any) -> Run:
        base = tmp_path_factory.mktemp("compared")
        of = whole.training("dpo", optim=optim, **layout)
        rows = [replace(row, compared=which) for row, which in zip(DPO_ROWS, compared, strict=True)]
        task = TrainingTask(algorithm="dpo", model_dir=model_dir, rows=rows, optim=of.optim, seed=1234)
        NemoAlignerTrainer(of.settings).prepare(task, base / "work")
        codes = launch(base / "work", num_ranks=of.settings.world_size)
        assert set(codes) == {0}, (base / "work" / "log_0.txt").read_text()[-3000:]
        return Run(base / "work", base / "hf", {})

    return run


def of_compared(reference: HuggingFace, value: Callable[[DPORow], torch.Tensor]) -> torch.Tensor:
    return torch.stack([value(row) for row, which in zip(DPO_ROWS, COMPARED, strict=True) if which])


@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"micro_batch_size": 1},  # a micro-batch has compared pairs, or none
        {"micro_batch_size": 2, "devices": 2},
        {"pipeline_model_parallel_size": 2},
        {"tensor_model_parallel_size": 2},
    ],
    ids=["1", "one by one", "DP=2", "PP=2", "TP=2"],
)
def test_loss_and_gradient_equal_those_of_transformers(
    train: Callable[..., Run], model_dir: Path, layout: dict[str, Any]
) -> None:
    """The preference loss is a mean over all pairs, and those that are not compared add nothing to it."""
    step = train(**layout).steps[0]
    reference = HuggingFace(model_dir)

    def margin(row: DPORow) -> torch.Tensor:
        chosen, rejected = (reference.response_logps(row.prompt, x).sum() for x in (row.chosen, row.rejected))
        return (chosen - chosen.detach()) - (rejected - rejected.detach())

    preference = -torch.nn.functional.logsigmoid(BETA * of_compared(reference, margin)).sum() / len(DPO_ROWS)
    loss = preference + OPTIM["sft_loss_weight"] * reference.chosen_nll()
    loss.backward()
    assert step["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert step["preference_loss"] == pytest.approx(preference.item(), rel=1e-5)
    assert step["grad_norm"] == pytest.approx(norm(reference.gradients()), rel=1e-4)


def test_a_loss_of_nemo_aligner_leaves_them_out_as_well(train: Callable[..., Run]) -> None:
    rpo = {**OPTIM, "preference_loss": "rpo_sq"}
    all_pairs, some = (train(compared, rpo).steps[0] for compared in ((True,) * 4, COMPARED))
    assert all_pairs["sft_loss"] == pytest.approx(some["sft_loss"], rel=1e-6)
    # At the start the margins are zero, and all rewards of the judge are alike, so each pair adds the same.
    assert some["preference_loss"] == pytest.approx(all_pairs["preference_loss"] / 2, rel=1e-5)


@pytest.mark.parametrize("layout", [{}, {"micro_batch_size": 1}, {"micro_batch_size": 2, "devices": 2}])
def test_accuracy_and_rewards_are_those_of_compared_pairs(train: Callable[..., Run], layout: dict[str, Any]) -> None:
    """Both pairs are in order after some steps. Of all four, that would be a half."""
    last = train(**layout).steps[-1]
    assert last["acc"] == 1.0
    assert last["rewards_margin"] > 0
    usual = train().steps[-1]
    assert [last[key] for key in ("rewards_chosen", "rewards_margin")] == pytest.approx(
        [usual[key] for key in ("rewards_chosen", "rewards_margin")], rel=1e-3
    )


def test_a_step_without_compared_pairs_has_the_likelihood_alone(train: Callable[..., Run], model_dir: Path) -> None:
    first = train((False,) * 4, micro_batch_size=2, devices=2).steps[0]
    with torch.no_grad():
        expected = HuggingFace(model_dir).chosen_nll().item()
    assert first["preference_loss"] == 0
    assert first["loss"] == pytest.approx(OPTIM["sft_loss_weight"] * expected, rel=1e-5)
    assert not {"acc", "rewards_chosen", "rewards_rejected", "rewards_margin"} & first.keys()


def test_the_reference_is_computed_for_compared_pairs_alone(train: Callable[..., Run], model_dir: Path) -> None:
    (chunk,) = (train().work_dir / "reference").iterdir()
    found, tokenize = load_file(chunk), HuggingFace(model_dir).tokenizer
    for side in ("chosen", "rejected"):
        texts = [getattr(row, side) for row, which in zip(DPO_ROWS, COMPARED, strict=True) if which]
        assert len(found[side]) == sum(len(tokenize(text)["input_ids"]) + 1 for text in texts)
