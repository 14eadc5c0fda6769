"""What large models need, by the real NeMo-Aligner: LoRA, against an independent implementation in transformers, and
what changes only memory or time, against trainings without it.
"""

from __future__ import annotations

import math
import re
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_srl.models.distributed_checkpoint import CheckpointReader
from nemo_srl.trainers.nemo_aligner.trainer import last_checkpoint
from tests import test_trainer_nemo_aligner as whole
from tests.test_trainer_nemo_aligner import ALL_ROWS, HuggingFace, Run, assert_same_training, max_difference, steps_of

launch, model_dir, model_of, run_of = whole.launch, whole.model_dir, whole.model_of, whole.run_of

RANK, ALPHA = 4, 6.0
LORA = {"lora_rank": RANK, "lora_alpha": ALPHA}
PLACES = {
    "self_attention.linear_qkv": "self_attention.adapter_layer.lora_kqv_adapter",
    "self_attention.linear_proj": "self_attention.adapter_layer.lora_dense_attention_adapter",
    "mlp.linear_fc1": "mlp.adapter_layer.lora_hto4h_adapter",
    "mlp.linear_fc2": "mlp.adapter_layer.lora_4htoh_adapter",
}
Matrices = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""A [layers, rank, inputs] and B [layers, outputs, rank] for each of `PLACES`."""


def read_adapters(checkpoint: Path) -> Matrices:
    reader = CheckpointReader(checkpoint)

    def read(key: str) -> torch.Tensor:
        shape = reader.shape(key)
        return reader.read(key, (0,) * len(shape), shape)

    names = {place: f"model.decoder.layers.{name}.linear_" for place, name in PLACES.items()}
    return {place: (read(f"{name}in.weight"), read(f"{name}out.weight")) for place, name in names.items()}


def products(adapters: Matrices) -> dict[str, torch.Tensor]:
    """(alpha / rank) B A for every weight that has an adapter, by Hugging Face's names. Queries, keys and values are
    together for each of 2 groups: 2 heads of queries, one of keys, one of values, of 16 rows each."""
    found = {}
    for place, (a, b) in adapters.items():
        for layer in range(len(a)):
            change = (ALPHA / RANK) * (b[layer].float() @ a[layer].float())
            if place == "self_attention.linear_qkv":
                groups = change.unflatten(0, (2, 4, 16))
                parts = {"q": groups[:, :2], "k": groups[:, 2], "v": groups[:, 3]}
                named = {f"self_attn.{x}_proj": part.reshape(-1, change.shape[1]) for x, part in parts.items()}
            elif place == "mlp.linear_fc1":
                named = dict(zip(("mlp.gate_proj", "mlp.up_proj"), change.chunk(2), strict=True))
            else:
                named = {"self_attn.o_proj" if place == "self_attention.linear_proj" else "mlp.down_proj": change}
            found |= {f"model.layers.{layer}.{name}.weight": part for name, part in named.items()}
    return found


class WithAdapters(HuggingFace):
    """The model in transformers. Its weights are frozen, and adapters are added to them."""

    def __init__(self, model_dir: Path, adapters: Matrices) -> None:
        super().__init__(model_dir)
        self.model.requires_grad_(False)
        self.leaves = {k: (a.clone().requires_grad_(), b.clone().requires_grad_()) for k, (a, b) in adapters.items()}
        for name, change in products(self.leaves).items():
            linear = self.model.get_submodule(name.removesuffix(".weight"))
            weight = linear.weight + change
            del linear.weight
            linear.weight = weight

    def norm(self) -> float:
        return math.sqrt(sum(float(t.grad.double().square().sum()) for pair in self.leaves.values() for t in pair))


@dataclass
class LoRARun:
    first: Matrices
    """The adapters after the first step. It moves only B, because A has no gradient where B is zero."""
    last: Matrices
    frozen: dict[str, torch.Tensor]
    """What was not trained, as it was at the end."""
    start: Path
    run: Run


@pytest.fixture(scope="module")
def lora(launch: Callable[..., list[int]], model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> LoRARun:
    return killed_and_resumed(launch, model_dir, tmp_path_factory.mktemp("lora"))


def killed_and_resumed(launch: Callable[..., list[int]], model_dir: Path, base: Path) -> LoRARun:
    """A DPO training that was killed after its second step and went on from the checkpoint of the first."""
    of, work_dir = whole.training("dpo", **LORA), base / "work"
    of.prepare(model_dir, work_dir)
    assert launch(work_dir, at_step=2) == [-signal.SIGKILL], (work_dir / "log_0.txt").read_text()[-3000:]
    (checkpoint,) = (work_dir / "nemo" / "checkpoints").glob("*-last")
    first = read_adapters(checkpoint)
    of.prepare(model_dir, work_dir)
    assert launch(work_dir, frozen=str(base / "frozen")) == [0], (work_dir / "log_0.txt").read_text()[-3000:]
    last = read_adapters(last_checkpoint(work_dir))
    shutil.copytree(work_dir / "start", base / "start")
    run = Run(work_dir, base / "hf", of.export(work_dir, base / "hf"))
    return LoRARun(first, last, torch.load(base / "frozen_0"), base / "start", run)


def test_the_first_loss_is_ln_2_because_the_reference_is_the_model_without_adapters(lora: LoRARun) -> None:
    assert lora.run.steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert lora.run.steps[0]["rewards_margin"] == 0.0
    assert lora.run.summary["train_loss_last"] < 0.65


def sums_of_logps(model: HuggingFace) -> torch.Tensor:
    """[pairs, 2]: the log-probabilities of the chosen and of the rejected response."""
    texts = [(row.prompt, response) for row in whole.DPO_ROWS for response in (row.chosen, row.rejected)]
    return torch.stack([model.response_logps(*text).sum() for text in texts]).view(-1, 2)


def test_dpo_of_the_adapters_equals_transformers(lora: LoRARun, model_dir: Path) -> None:
    assert_equals_transformers(lora, model_dir)


def test_adapters_of_a_model_with_norms_of_queries_and_keys_equal_transformers(
    launch: Callable[..., list[int]], model_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """NeMo's own layer with adapters leaves these norms out."""
    assert_equals_transformers(killed_and_resumed(launch, model_of("qwen3"), tmp_path), model_of("qwen3"))


def assert_equals_transformers(lora: LoRARun, model_dir: Path) -> None:
    """At the first step B is zero, so it is the reference. At the second one, both matrices have gradients."""
    without = {place: (a, torch.zeros_like(b)) for place, (a, b) in lora.first.items()}
    reference = WithAdapters(model_dir, without)
    with torch.no_grad():
        expected = sums_of_logps(reference)
    for step, adapters in zip(lora.run.steps, (without, lora.first), strict=False):
        policy = WithAdapters(model_dir, adapters)
        chosen, rejected = (sums_of_logps(policy) - expected).unbind(1)
        loss = -torch.nn.functional.logsigmoid(whole.BETA * (chosen - rejected)).mean()
        loss.backward()
        assert step["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert step["grad_norm"] == pytest.approx(policy.norm(), rel=1e-4)


def test_only_adapters_move(lora: LoRARun, model_dir: Path) -> None:
    """At the end, all else has the bits that the training started from."""
    reader = CheckpointReader(lora.start / "model_weights")
    for name, value in lora.frozen.items():
        layer = re.search(r"layers\.(\d+)\.", name)
        key = "model." + (name.replace(layer[0], "layers.") if layer else name)
        stored = reader.read(key, (0,) * len(reader.shape(key)), reader.shape(key))
        assert torch.equal(value, stored[int(layer[1])] if layer else stored), name
    hf = load_file(model_dir / "model.safetensors")
    assert sum(t.numel() for t in lora.frozen.values()) == sum(t.numel() for t in hf.values())
    for place, (a, b) in lora.first.items():
        bound = a.shape[-1] ** -0.5
        assert 0.9 * bound < a.abs().max() <= bound
        assert b.abs().max() > 0
        assert len({layer.sum().item() for layer in a}) == 4, "every layer has numbers of its own"
        assert all(not torch.equal(x, y) for x, y in zip(lora.last[place], (a, b), strict=True))


def test_a_killed_training_goes_on_with_its_moments(lora: LoRARun, run_of: Callable[..., Run]) -> None:
    alone = run_of("dpo", **LORA)
    assert max_difference(alone.weights, lora.run.weights) == 0
    timeless = [[{k: v for k, v in s.items() if k != "step_time"} for s in run.steps] for run in (alone, lora.run)]
    assert timeless[0] == timeless[1]


def test_the_export_is_the_model_with_its_adapters_bit_by_bit(lora: LoRARun, model_dir: Path) -> None:
    assert_merged(lora.run.model_dir, model_dir, lora.last)


def assert_merged(exported: Path, model_dir: Path, adapters: Matrices) -> None:
    base, merged, changes = *(load_file(d / "model.safetensors") for d in (model_dir, exported)), products(adapters)
    assert merged.keys() == base.keys()
    for name, value in merged.items():
        expected = base[name].float() + changes[name] if name in changes else base[name].float()
        assert torch.equal(value, expected.to(value.dtype)), name
        assert torch.equal(value.float(), base[name].float()) == (name not in changes)


@pytest.mark.parametrize(
    "layout",
    [{"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}, {"devices": 2, "micro_batch_size": 2}],
    ids=["TP=2", "PP=2", "DP=2"],
)
def test_every_layout_trains_the_same_adapters(run_of: Callable[..., Run], layout: dict[str, Any]) -> None:
    assert_same_training(run_of("dpo", **LORA), run_of("dpo", **LORA, **layout))


@pytest.mark.parametrize("precision", ["32", "bf16", "bf16-O2"])
def test_sft_of_the_adapters_equals_transformers(
    launch: Callable[..., list[int]], model_dir: Path, tmp_path: Path, precision: str
) -> None:
    of = whole.training("sft", optim=ALL_ROWS, precision=precision, micro_batch_size=2, **LORA)
    work_dir, base = tmp_path / "work", tmp_path / "base"
    of.prepare(model_dir, work_dir)
    assert launch(work_dir) == [0], (work_dir / "log_0.txt").read_text()[-3000:]
    adapters = read_adapters(last_checkpoint(work_dir))
    of.export(work_dir, tmp_path / "hf")
    model = WithAdapters(model_dir, {place: (a.float(), torch.zeros(b.shape)) for place, (a, b) in adapters.items()})
    loss = model.sft_loss()
    loss.backward()
    (step,) = steps_of(work_dir)
    rounded = precision != "32"
    assert step["loss"] == pytest.approx(loss.item(), rel=1e-3 if rounded else 1e-5)
    assert step["grad_norm"] == pytest.approx(model.norm(), rel=0.02 if rounded else 1e-4)
    shutil.copytree(model_dir, base)
    if precision == "bf16-O2":
        weights = {name: value.bfloat16() for name, value in load_file(base / "model.safetensors").items()}
        save_file(weights, base / "model.safetensors")
    assert_merged(tmp_path / "hf", base, adapters)


FULL = {"recompute_granularity": "full"}


@pytest.mark.parametrize(
    "changes",
    [
        FULL,
        {"recompute_granularity": "selective"},
        {**FULL, "pipeline_model_parallel_size": 2},
        {**FULL, "tensor_model_parallel_size": 2, "sequence_parallel": True},
    ],
    ids=["full", "selective", "full, PP=2", "full, TP=2+SP"],
)
def test_layers_that_are_computed_again_have_the_same_gradients(
    run_of: Callable[..., Run], changes: dict[str, Any]
) -> None:
    """In a pipeline, the layers of the first stage are computed again when it has the next micro-batch."""
    assert_same_training(run_of("dpo"), run_of("dpo", **changes))


def test_adapters_of_layers_that_are_computed_again_have_gradients(run_of: Callable[..., Run]) -> None:
    assert_same_training(run_of("dpo", **LORA), run_of("dpo", **LORA, **FULL))


@pytest.mark.parametrize("granularity", ["full", "selective"])
def test_layers_that_are_computed_again_drop_the_same_elements(run_of: Callable[..., Run], granularity: str) -> None:
    dropout = {"hidden_dropout": 0.1, "attention_dropout": 0.1, "max_epochs": 1}
    assert_same_training(run_of("sft", optim=dropout), run_of("sft", optim=dropout, recompute_granularity=granularity))


OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}


@pytest.mark.parametrize("lora", [{}, LORA], ids=["all weights", "LoRA"])
def test_communication_beside_the_computation_changes_nothing(run_of: Callable[..., Run], lora: dict[str, Any]) -> None:
    """Weights that another rank has updated are there when a checkpoint is saved."""
    assert_same_training(run_of("dpo", **lora, devices=2), run_of("dpo", **lora, **OVERLAP, devices=2))


CONTEXT = {"context_parallel_size": 2}


@pytest.mark.parametrize(
    ("algorithm", "optim"),
    [
        ("sft", ALL_ROWS),
        ("dpo", {}),
        ("dpo", {"preference_loss": "dpo_norm", "beta": 5.0, "sft_loss_weight": 0.5, "max_epochs": 1}),
    ],
    ids=["sft", "dpo", "dpo_norm"],
)
def test_ranks_that_share_sequences_train_the_same_model(
    run_of: Callable[..., Run], algorithm: str, optim: dict[str, Any]
) -> None:
    """With an attention for tests. Transformer Engine's runs on GPUs alone."""
    usual = {"optim": optim, "micro_batch_size": 2}
    assert_same_training(run_of(algorithm, **usual), run_of(algorithm, **usual, **CONTEXT))
