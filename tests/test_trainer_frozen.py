"""Training of the upper layers alone, by the real NeMo-Aligner, against transformers and in other layouts."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests import test_trainer_nemo_aligner as whole
from tests.test_trainer_nemo_aligner import (
    ADAM_BETA1,
    HuggingFace,
    Killed,
    Run,
    assert_same_training,
    max_difference,
    norm,
)

killed, launch, model_dir, model_of, run_of = whole.killed, whole.launch, whole.model_dir, whole.model_of, whole.run_of

NUMBER = 3
"""Of 4 layers. The model's embedding is tied."""
FROZEN = {"frozen_share": NUMBER / 4}


@pytest.fixture(scope="module")
def frozen(killed: Callable[..., Killed]) -> Killed:
    return killed("dpo", **FROZEN)


def trained(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of tensors in NeMo's layout, the parts that are trained."""
    kept = {name: value[NUMBER:] for name, value in tensors.items() if ".layers." in name}
    return kept | {"decoder.final_layernorm.weight": tensors["decoder.final_layernorm.weight"]}


def test_gradients_of_the_upper_layers_equal_those_of_transformers(frozen: Killed, model_dir: Path) -> None:
    reference = HuggingFace(model_dir)
    reference.dpo_loss().backward()
    expected = trained(reference.gradients())
    actual = {name: moment / (1 - ADAM_BETA1) for name, moment in frozen.first_moments.items()}
    assert max_difference(actual, expected) < 1e-4 * max(float(g.abs().max()) for g in expected.values())
    assert frozen.run.steps[0]["grad_norm"] == pytest.approx(norm(expected), rel=1e-4)


def test_the_embedding_and_the_first_layers_keep_their_bits(frozen: Killed, model_dir: Path) -> None:
    before, after = load_file(model_dir / "model.safetensors"), frozen.run.weights
    kept = ("model.embed_tokens.", *(f"model.layers.{number}." for number in range(NUMBER)))
    for name, value in after.items():
        assert torch.equal(value, before[name]) == name.startswith(kept), name


def test_the_output_layer_of_an_untied_model_is_trained(run_of: Callable[..., Run], model_of: Any) -> None:
    before = load_file(model_of("mistral") / "model.safetensors")
    after = run_of("dpo", "mistral", frozen_share=0.5).weights
    same = {name for name, value in after.items() if torch.equal(value, before[name])}
    assert same == {name for name in before if name.startswith(("model.embed_tokens.", "model.layers.0."))}


def test_a_killed_training_goes_on_with_its_moments(frozen: Killed, run_of: Callable[..., Run]) -> None:
    alone = run_of("dpo", **FROZEN)
    assert max_difference(alone.weights, frozen.run.weights) == 0
    timeless = [[{k: v for k, v in s.items() if k != "step_time"} for s in run.steps] for run in (alone, frozen.run)]
    assert timeless[0] == timeless[1]


@pytest.mark.parametrize(
    "layout",
    [
        {"tensor_model_parallel_size": 2, "sequence_parallel": True},
        {"devices": 2, "overlap_grad_reduce": True, "overlap_param_gather": True},
        {"recompute_granularity": "selective"},
    ],
    ids=["TP=2+SP", "DP=2, overlap", "recomputed"],
)
def test_every_layout_trains_the_same_layers(run_of: Callable[..., Run], layout: dict[str, Any]) -> None:
    assert_same_training(run_of("dpo", **FROZEN), run_of("dpo", **FROZEN, **layout))


@pytest.mark.parametrize(
    "layout", [{"tensor_model_parallel_size": 2}, {"devices": 2, "precision": "bf16-O2"}], ids=["TP=2", "DP=2, O2"]
)
def test_ranks_that_share_the_moments_find_them_again(
    launch: Callable[..., list[int]],
    model_dir: Path,
    run_of: Callable[..., Run],
    layout: dict[str, Any],
    tmp_path: Path,
) -> None:
    """One rank is lost after the second step, before its checkpoint."""
    of, work_dir = whole.training("dpo", **FROZEN, **layout), tmp_path / "work"
    of.prepare(model_dir, work_dir)
    assert -signal.SIGKILL in launch(work_dir, num_ranks=2, at_step=2)
    of.prepare(model_dir, work_dir)
    assert launch(work_dir, num_ranks=2) == [0, 0], (work_dir / "log_0.txt").read_text()[-3000:]
    resumed = Run(work_dir, tmp_path / "hf", of.export(work_dir, tmp_path / "hf"))
    assert_same_training(run_of("dpo", **FROZEN, **layout), resumed)


def test_bfloat16_weights_of_two_ranks_agree_with_float32(run_of: Callable[..., Run]) -> None:
    expected = [step["loss"] for step in run_of("sft", **FROZEN).steps]
    found = run_of("sft", **FROZEN, precision="bf16-O2", devices=2)
    assert [step["loss"] for step in found.steps] == pytest.approx(expected, rel=0.02)
