"""NeMo-Aligner against an independent implementation in transformers, against itself in other layouts, and killed.

One process imports NeMo once and forks for every training (`trainer_fork_server`); each training happens once
and several tests look at it. The model is a Llama with 4 layers, 4 heads and 2 query groups, or of another family with
2 layers.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemo_srl.config import DPOConfig, OptimConfig, SFTConfig
from nemo_srl.errors import ConfigError
from nemo_srl.models.convert import nemo_to_hf
from nemo_srl.models.distributed_checkpoint import CheckpointReader
from nemo_srl.protocols import DPORow, SFTRow, TrainingTask
from nemo_srl.trainers.nemo_aligner import losses
from nemo_srl.trainers.nemo_aligner.settings import NemoAlignerSettings
from nemo_srl.trainers.nemo_aligner.trainer import NemoAlignerTrainer, last_checkpoint
from tests.families import OTHERS
from tests.tiny import make_model

ROOT = Path(__file__).resolve().parents[1]
PROMPT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
QUESTIONS = ["Name a prime.", "Name a color, please.", "What is tall?", "Who sings best of all the birds?"]
GOOD = ["It is 7.", "Red.", "A tree is tall, and so is a tower.", "The nightingale."]
BAD = ["It is 8, I am quite sure.", "Seven.", "No.", "Tuesday sings."]
DPO_ROWS = [
    DPORow(
        prompt=PROMPT.format(question), chosen=good, rejected=bad, chosen_reward=4.0, rejected_reward=1.0,
        confidence=confidence, sft_weight=weight,
    )
    for question, good, bad, confidence, weight in zip(
        QUESTIONS, GOOD, BAD, (1.0, 0.9, 0.7, 0.6), (1.0, 1.0, 5.0, 0.5), strict=True
    )
]  # fmt: skip
SFT_ROWS = [SFTRow(prompt=PROMPT.format(q), response=a) for q in QUESTIONS for a in (*GOOD[:1], *BAD[:1])]
BETA = 0.3
LEARNING_RATE = 1e-3
ADAM_BETA1 = 0.9
LOGITS = "logits.safetensors"
"""Beside the work directory of a training of one step: NeMo's logits before the step."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished training: its work directory and the exported model."""

    work_dir: Path
    model_dir: Path
    summary: dict[str, float]

    @property
    def steps(self) -> list[dict[str, Any]]:
        return steps_of(self.work_dir)

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.model_dir / "model.safetensors")


@dataclasses.dataclass(frozen=True)
class Killed:
    """A training that was killed and continued, and the content of its checkpoint of step 1."""

    first_moments: dict[str, torch.Tensor]
    """The state of the optimizer after step 1."""
    model_after_step_1: Path
    run: Run


def steps_of(work_dir: Path) -> list[dict[str, Any]]:
    return NemoAlignerTrainer(NemoAlignerSettings()).metrics(work_dir)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    texts = [*QUESTIONS, *GOOD, *BAD]
    return make_model(tmp_path_factory.mktemp("model"), texts, vocab_size=320, num_layers=4)


@pytest.fixture(scope="module")
def model_of(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The tiny model of a family. Phi's and Mistral's embeddings are not tied."""

    @functools.cache
    def make(family: str) -> Path:
        if family == "llama":
            return model_dir
        texts, tied = [*QUESTIONS, *GOOD, *BAD], family.startswith("qwen")
        directory = tmp_path_factory.mktemp(family)
        return make_model(directory, texts, vocab_size=320, family=family, tie_word_embeddings=tied)

    return make


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., list[int]]]:
    """Run the ranks of a training to their end; returns their exit codes."""
    errors = (tmp_path_factory.mktemp("server") / "log.txt").open("w+")
    server = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "tests.trainer_fork_server"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
    )
    assert server.stdin is not None
    assert server.stdout is not None

    def run(
        work_dir: Path, *, num_ranks: int = 1, at_step: int | None = None, number: int = signal.SIGKILL,
        **more: int | str,
    ) -> list[int]:  # fmt: skip
        job = {"work_dir": str(work_dir), "num_ranks": num_ranks, "at_step": at_step, "signal": int(number), **more}
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        for line in server.stdout:
            if line.startswith('{"exit_codes"'):
                return list(json.loads(line)["exit_codes"])
        errors.seek(0)
        raise AssertionError(f"the fork server ended: {errors.read()[-3000:]}")

    yield run
    server.stdin.close()
    server.wait(timeout=60)
    server.stdout.close()
    errors.close()


@dataclasses.dataclass
class Training:
    """The settings of one training, and the trainer's steps with them."""

    algorithm: str
    optim: OptimConfig
    settings: NemoAlignerSettings
    rows: int | None
    """How many of the rows it trains on; None: all."""

    def prepare(self, model_dir: Path, work_dir: Path) -> None:
        rows = (SFT_ROWS if self.algorithm == "sft" else DPO_ROWS)[: self.rows]
        task = TrainingTask(algorithm=self.algorithm, model_dir=model_dir, rows=rows, optim=self.optim, seed=1234)
        NemoAlignerTrainer(self.settings).prepare(task, work_dir)

    def export(self, work_dir: Path, model_dir: Path) -> dict[str, float]:
        return dict(NemoAlignerTrainer(self.settings).export(work_dir, model_dir))


def training(
    algorithm: str, *, optim: dict[str, Any] | None = None, rows: int | None = None, **trainer: Any
) -> Training:
    """`optim` and `trainer` are settings that differ from the usual ones."""
    usual = {"learning_rate": LEARNING_RATE, "min_learning_rate": 1e-4, "max_seq_length": 128, "gradient_clip_val": 0.0}
    usual |= {"global_batch_size": 4, "save_interval": 1, "max_epochs": 2 if algorithm == "sft" else 3}
    config = SFTConfig if algorithm == "sft" else partial(DPOConfig, beta=BETA)
    settings = NemoAlignerSettings(**{"precision": "32", **trainer})
    return Training(algorithm, config(**{**usual, **(optim or {})}), settings, rows)


@pytest.fixture(scope="module")
def run_of(
    launch: Callable[..., list[int]], model_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Run]:
    """Train once for every combination of arguments."""
    done: dict[str, Run] = {}

    def run(algorithm: str, family: str = "llama", **changes: Any) -> Run:
        key = json.dumps([algorithm, family, changes], sort_keys=True)
        if key not in done:
            base = tmp_path_factory.mktemp(algorithm)
            of, work_dir = training(algorithm, **changes), base / "work"
            of.prepare(model_of(family), work_dir)
            more = {"logits": str(base / LOGITS)} if changes.get("optim") in ONE_STEP.values() else {}
            codes = launch(work_dir, num_ranks=of.settings.world_size, **more)
            assert set(codes) == {0}, (work_dir / "log_0.txt").read_text()[-3000:]
            if (work_dir / "reference").exists():
                shutil.copytree(work_dir / "reference", base / "reference")  # `export` removes it
            done[key] = Run(work_dir, base / "hf", of.export(work_dir, base / "hf"))
        return done[key]

    return run


@pytest.fixture(scope="module")
def killed(
    launch: Callable[..., list[int]], model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Killed]:
    """Train, kill -9 after the second step, before its checkpoint; then go on to the end."""

    def run(algorithm: str, **changes: Any) -> Killed:
        base = tmp_path_factory.mktemp(f"{algorithm}_killed")
        of, work_dir = training(algorithm, **changes), base / "work"
        of.prepare(model_dir, work_dir)
        assert launch(work_dir, at_step=2) == [-signal.SIGKILL]
        with pytest.raises(ConfigError, match="has not reached step"):
            of.export(work_dir, base / "hf")
        (checkpoint,) = (work_dir / "nemo" / "checkpoints").glob("*-last")
        assert "step=1" in checkpoint.name
        moments = read_moments(checkpoint)
        nemo_to_hf(checkpoint, base / "after_step_1", template_hf_dir=model_dir)
        # As if it had been killed between writing this checkpoint and removing the one before.
        older = checkpoint.with_name(checkpoint.name.replace("step=1", "step=0"))
        shutil.copytree(checkpoint, older)
        of.prepare(model_dir, work_dir)  # as the stage does: must not start over
        assert not older.exists()
        assert checkpoint.exists()
        assert launch(work_dir) == [0], (work_dir / "log_0.txt").read_text()[-3000:]
        run = Run(work_dir, base / "hf", of.export(work_dir, base / "hf"))
        return Killed(moments, base / "after_step_1", run)

    return run


@pytest.fixture(scope="module")
def killed_dpo(killed: Callable[..., Killed]) -> Killed:
    return killed("dpo")


@pytest.fixture(scope="module")
def killed_sft(killed: Callable[..., Killed]) -> Killed:
    return killed("sft")


def read_moments(checkpoint: Path, name: str = "exp_avg") -> dict[str, torch.Tensor]:
    """Adam's `exp_avg` (after one step: (1 - beta1) x gradient) or `exp_avg_sq` per parameter, by NeMo's names."""
    prefix, reader = f"optimizer.state.{name}.", CheckpointReader(checkpoint)
    moments = {}
    for key in reader.tensor_keys():
        if key.startswith(prefix):
            shape, parameter = reader.shape(key), key.removeprefix(prefix)
            # They are stored flat, per part that tensor parallelism would cut.
            flat = reader.read(key, (0,) * len(shape), shape)
            moments[parameter.removeprefix("model.")] = flat.reshape(-1, *reader.shape(parameter)[1:])
    return moments


def nemo_layout(hf: dict[str, torch.Tensor], *, num_layers: int = 4, groups: int = 2) -> dict[str, torch.Tensor]:
    """Hugging Face tensors (weights or gradients) in NeMo's layout, written down independently of the package."""

    def fused_qkv(layer: int) -> torch.Tensor:
        q, k, v = (hf[f"model.layers.{layer}.self_attn.{x}_proj.weight"] for x in "qkv")
        rows = [torch.cat([x.chunk(groups)[g] for x in (q, k, v)]) for g in range(groups)]
        return torch.cat(rows)

    def stacked(make: Callable[[int], torch.Tensor]) -> torch.Tensor:
        return torch.stack([make(layer) for layer in range(num_layers)])

    def named(name: str) -> torch.Tensor:
        return stacked(lambda layer: hf[f"model.layers.{layer}.{name}.weight"])

    gate_up = stacked(lambda i: torch.cat([hf[f"model.layers.{i}.mlp.{name}_proj.weight"] for name in ("gate", "up")]))
    untied = {"output_layer.weight": hf["lm_head.weight"]} if "lm_head.weight" in hf else {}
    return untied | {
        "embedding.word_embeddings.weight": hf["model.embed_tokens.weight"],
        "decoder.final_layernorm.weight": hf["model.norm.weight"],
        "decoder.layers.self_attention.linear_qkv.weight": stacked(fused_qkv),
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight": named("input_layernorm"),
        "decoder.layers.self_attention.linear_proj.weight": named("self_attn.o_proj"),
        "decoder.layers.mlp.linear_fc1.weight": gate_up,
        "decoder.layers.mlp.linear_fc1.layer_norm_weight": named("post_attention_layernorm"),
        "decoder.layers.mlp.linear_fc2.weight": named("mlp.down_proj"),
    }


class HuggingFace:
    """The model in transformers, in float32. It computes one row at a time, without padding."""

    def __init__(self, model_dir: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(model_dir, torch_dtype=torch.float32)
        # transformers drops the gradient of the padding token's embedding, which here is the end-of-turn token.
        self.model.get_input_embeddings().padding_idx = None
        self.tokenizer = AutoTokenizer.from_pretrained(model_dir)

    def response_logps(self, prompt: str, response: str) -> torch.Tensor:
        """[response tokens + 1]: log-probabilities of the response's tokens and of the end of sequence."""
        prompt_ids = self.tokenizer(prompt)["input_ids"]
        ids = torch.tensor([[*self.tokenizer(prompt + response)["input_ids"], self.tokenizer.eos_token_id]])
        logps = self.model(ids[:, :-1]).logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[0, :, 0]
        return logps[len(prompt_ids) - 1 :]

    def dpo_loss(self) -> torch.Tensor:
        return self.preference_loss("dpo", beta=BETA)

    def preference_loss(self, name: str, **settings: float) -> torch.Tensor:
        """At the start, where policy and reference are the same model (but only one has gradients)."""
        given: dict[str, Any] = {"confidence": torch.tensor([row.confidence for row in DPO_ROWS]), **settings}
        for side in ("chosen", "rejected"):
            logps = [self.response_logps(row.prompt, getattr(row, side)) for row in DPO_ROWS]
            total = torch.stack([x.sum() for x in logps])
            given |= {side: total - total.detach(), f"policy_{side}_logps": total}
            given[f"{side}_lengths"] = torch.tensor([len(x) for x in logps])
        loss = losses.find(name)
        assert loss is not None
        return loss(given).mean()

    def chosen_nll(self) -> torch.Tensor:
        """Iterative RPO's second term: for each pair the mean over the chosen response's tokens, then over pairs. Here
        each pair has a weight, too."""
        return torch.stack([-r.sft_weight * self.response_logps(r.prompt, r.chosen).mean() for r in DPO_ROWS]).mean()

    def sft_loss(self) -> torch.Tensor:
        """Mean over all tokens of all rows."""
        return -torch.cat([self.response_logps(r.prompt, r.response) for r in SFT_ROWS]).mean()

    def gradients(self) -> dict[str, torch.Tensor]:
        return nemo_layout({k: p.grad for k, p in self.model.named_parameters() if p.grad is not None})

    def step(self, loss: torch.Tensor) -> tuple[float, float]:
        """Loss and gradient norm."""
        self.model.zero_grad()
        loss.backward()
        gradients = {name: p.grad for name, p in self.model.named_parameters()}
        assert all(gradient is not None and gradient.any() for gradient in gradients.values())
        return loss.item(), norm(gradients)


def norm(tensors: dict[str, torch.Tensor]) -> float:
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors.values()))


def max_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[k].double() - b[k].double()).abs().max()) for k in a)


def test_first_dpo_loss_is_ln_2_and_nothing_is_preferred_yet(run_of: Callable[..., Run]) -> None:
    first = run_of("dpo").steps[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["rewards_margin"] == 0.0


def test_dpo_gradients_equal_those_of_transformers(killed_dpo: Killed, model_dir: Path) -> None:
    moments, run = killed_dpo.first_moments, killed_dpo.run
    reference = HuggingFace(model_dir)
    reference.dpo_loss().backward()
    expected = reference.gradients()
    actual = {name: moment / (1 - ADAM_BETA1) for name, moment in moments.items()}
    assert max_difference(actual, expected) < 1e-4 * max(float(g.abs().max()) for g in expected.values())
    assert run.steps[0]["grad_norm"] == pytest.approx(norm(expected), rel=1e-4)


@pytest.mark.parametrize(
    ("name", "settings", "layout"),
    [
        ("cdpo", {"beta": BETA, "label_smoothing": 0.1}, {"pipeline_model_parallel_size": 2}),
        ("ipo", {"beta": BETA}, {}),
        ("dpo_norm", {"beta": 5.0}, {"micro_batch_size": 2}),
        ("rdpo", {"beta": BETA, "rdpo_alpha": 0.1}, {"micro_batch_size": 2, "devices": 2}),
        ("simpo", {"beta": 2.0, "simpo_gamma": 1.0}, {"pipeline_model_parallel_size": 2}),
    ],
)
def test_loss_and_gradient_norm_of_every_preference_loss_equal_those_of_transformers(
    run_of: Callable[..., Run], model_dir: Path, name: str, settings: dict[str, float], layout: dict[str, Any]
) -> None:
    """In a pipeline, the last stage has the lengths and each row's own confidence, too."""
    step = run_of("dpo", optim={"preference_loss": name, "max_epochs": 1, **settings}, **layout).steps[0]
    reference = HuggingFace(model_dir)
    loss = reference.preference_loss(name, **settings)
    loss.backward()
    assert step["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert step["grad_norm"] == pytest.approx(norm(reference.gradients()), rel=1e-4)


def test_simpo_has_no_reference_and_logs_rewards_per_token(run_of: Callable[..., Run], model_dir: Path) -> None:
    simpo = {"preference_loss": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "max_epochs": 1}
    run = run_of("dpo", optim=simpo, pipeline_model_parallel_size=2)
    rewards = {}
    with torch.no_grad():
        for side in ("chosen", "rejected"):
            logps = [HuggingFace(model_dir).response_logps(r.prompt, getattr(r, side)).mean() for r in DPO_ROWS]
            rewards[side] = 2.0 * torch.stack(logps)
    assert run.steps[0]["rewards_chosen"] == pytest.approx(rewards["chosen"].mean().item(), rel=1e-5)
    assert run.steps[0]["rewards_rejected"] == pytest.approx(rewards["rejected"].mean().item(), rel=1e-5)
    assert run.steps[0]["acc"] == (rewards["chosen"] > rewards["rejected"]).float().mean().item()


@pytest.mark.parametrize("layout", [{}, {"micro_batch_size": 2, "devices": 2}], ids=["1", "2, DP=2"])
def test_the_likelihood_of_the_chosen_response_is_averaged_over_its_tokens(
    run_of: Callable[..., Run], model_dir: Path, layout: dict[str, Any]
) -> None:
    """Pang et al. 2024, arXiv 2404.19733, equation 1."""
    step = run_of("dpo", optim={"sft_loss_weight": 0.5, "max_epochs": 1}, **layout).steps[0]
    reference = HuggingFace(model_dir)
    nll = reference.chosen_nll()
    (reference.dpo_loss() + 0.5 * nll).backward()
    assert step["sft_loss"] == pytest.approx(nll.item(), rel=1e-5)
    assert step["loss"] == pytest.approx(math.log(2) + 0.5 * nll.item(), rel=1e-5)
    assert step["grad_norm"] == pytest.approx(norm(reference.gradients()), rel=1e-4)


def test_logged_rewards_are_beta_times_the_log_ratios(killed_dpo: Killed, model_dir: Path) -> None:
    """The second step, which sees all rows, recomputed in transformers from the checkpoint of the first."""
    logged = killed_dpo.run.steps[1]
    policy, reference = HuggingFace(killed_dpo.model_after_step_1), HuggingFace(model_dir)
    rewards = {}
    with torch.no_grad():
        for side in ("chosen", "rejected"):
            ratios = [
                policy.response_logps(r.prompt, getattr(r, side)).sum()
                - reference.response_logps(r.prompt, getattr(r, side)).sum()
                for r in DPO_ROWS
            ]
            rewards[side] = BETA * torch.stack(ratios)
    margin = rewards["chosen"] - rewards["rejected"]
    assert logged["rewards_chosen"] == pytest.approx(float(rewards["chosen"].mean()), abs=1e-4)
    assert logged["rewards_rejected"] == pytest.approx(float(rewards["rejected"].mean()), abs=1e-4)
    assert logged["rewards_margin"] > 0.01, "the first step has moved the policy away from the reference"
    assert logged["acc"] == float((margin > 0).float().mean())
    expected_loss = float(-torch.nn.functional.logsigmoid(margin).mean())
    assert logged["loss"] == pytest.approx(expected_loss, abs=1e-4)


def test_a_users_loss_trains_as_nemo_aligners_own(run_of: Callable[..., Run], killed: Callable[..., Killed]) -> None:
    """DPO's formula written by a user, in a training that was also killed and went on: the plan keeps the path."""
    own, users = run_of("dpo"), killed("dpo", optim={"preference_loss": "tests.user_losses:dpo"}).run
    for key in ("loss", "preference_loss", "acc", "rewards_margin"):
        assert [step[key] for step in users.steps] == pytest.approx([step[key] for step in own.steps], rel=1e-4)
    assert max_difference(own.weights, users.weights) < 1e-4
    assert users.steps[0]["loss"] != users.steps[2]["loss"]


def test_a_users_loss_gets_the_judges_scores(run_of: Callable[..., Run]) -> None:
    own = run_of("dpo", optim={"preference_loss": "rpo_sq"})
    users = run_of("dpo", optim={"preference_loss": "tests.user_losses:rpo_sq"}, pipeline_model_parallel_size=2)
    assert own.steps[0]["loss"] == pytest.approx((4.0 - 1.0) ** 2)
    assert_same_training(own, users)


def test_training_prefers_the_chosen_responses(run_of: Callable[..., Run]) -> None:
    summary = run_of("dpo").summary
    assert summary["train_loss_last"] < summary["train_loss_first"]
    assert summary["rewards_margin_last"] > 0


@pytest.mark.parametrize("algorithm", ["dpo", "sft"])
@pytest.mark.parametrize(
    "layout",
    [
        {"tensor_model_parallel_size": 2},
        {"tensor_model_parallel_size": 2, "sequence_parallel": True},
        {"pipeline_model_parallel_size": 2},
    ],
    ids=["TP=2", "TP=2+SP", "PP=2"],
)
def test_every_layout_trains_the_same_model(run_of: Callable[..., Run], algorithm: str, layout: dict[str, Any]) -> None:
    assert_same_training(run_of(algorithm), run_of(algorithm, **layout))


def test_two_data_parallel_ranks_train_the_same_model(run_of: Callable[..., Run]) -> None:
    """With DPO, where a batch is all rows: NeMo draws rows in another order for another number of ranks."""
    assert_same_training(run_of("dpo"), run_of("dpo", devices=2))


def test_rows_of_unequal_length_in_a_micro_batch_change_nothing(run_of: Callable[..., Run]) -> None:
    """And they need no padding: all of them are one sequence."""
    one, two, all_rows = (run_of("dpo", micro_batch_size=size) for size in (1, 2, 4))
    assert_same_training(one, two)
    assert_same_training(one, all_rows)
    assert [run.summary["padding"] for run in (one, two, all_rows)] == [0, 0, 0]
    lengths = sorted(max(len(r.chosen), len(r.rejected)) for r in DPO_ROWS)
    assert lengths[3] > 1.2 * lengths[0]


def assert_same_training(alone: Run, parallel: Run) -> None:
    assert max_difference(alone.weights, parallel.weights) < 1e-4
    for key in ("loss", "grad_norm"):  # Adam hides a wrong gradient norm from the weights
        expected = [step[key] for step in alone.steps]
        assert [step[key] for step in parallel.steps] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("algorithm", ["dpo", "sft"])
def test_killed_and_resumed_equals_uninterrupted(
    run_of: Callable[..., Run], request: pytest.FixtureRequest, algorithm: str
) -> None:
    resumed = request.getfixturevalue(f"killed_{algorithm}").run
    alone = run_of(algorithm)
    assert max_difference(alone.weights, resumed.weights) < 1e-6
    timeless = [[{k: v for k, v in s.items() if k != "step_time"} for s in run.steps] for run in (alone, resumed)]
    assert timeless[0] == timeless[1]


def test_moments_in_the_hosts_memory_train_the_same_model(
    run_of: Callable[..., Run], killed: Callable[..., Killed]
) -> None:
    """Also when the training was killed and went on from a checkpoint."""
    offloaded, usual = (
        killed("sft", precision="bf16-O2", optimizer_cpu_offload=True),
        run_of("sft", precision="bf16-O2"),
    )
    assert norm(offloaded.first_moments) > 0
    assert max_difference(usual.weights, offloaded.run.weights) == 0
    timeless = [[{k: v for k, v in s.items() if k != "step_time"} for s in run.steps] for run in (usual, offloaded.run)]
    assert timeless[0] == timeless[1]


@pytest.mark.parametrize("algorithm", ["dpo", "sft"])
def test_a_training_that_diverges_ends_at_that_step_and_publishes_nothing(
    launch: Callable[..., list[int]], model_dir: Path, tmp_path: Path, algorithm: str
) -> None:
    of, work_dir = training(algorithm, devices=2 if algorithm == "dpo" else 1), tmp_path / "work"
    of.optim.learning_rate = of.optim.min_learning_rate = 1e30
    of.prepare(model_dir, work_dir)
    assert launch(work_dir, num_ranks=of.settings.world_size) == [1] * of.settings.world_size
    log = (work_dir / "log_0.txt").read_text()
    # The loss may still be a number: the norms of the layers make one of weights that are far too large.
    assert re.search(r"DivergedError: step 2: the loss is \S+ and the norm of the gradient is nan", log), log[-3000:]
    lines = re.search(r"the lines ([\d, ]+) of .*train\.jsonl.*it was 1\.0e\+30.*delete", log)
    assert lines is not None
    assert len(lines[1].split(", ")) == 4
    assert [step["step"] for step in steps_of(work_dir)] == [1]
    with pytest.raises(ConfigError, match="nothing to export"):
        of.export(work_dir, tmp_path / "hf")


def test_asked_to_stop_saves_and_goes_on_later(
    run_of: Callable[..., Run], launch: Callable[..., list[int]], model_dir: Path, tmp_path: Path
) -> None:
    """SIGTERM to one of two ranks: both stop at the same step.

    The save is the second one, after that of step 1. What a first save starts, a stop must not have ended.
    """
    of = training("dpo", tensor_model_parallel_size=2)
    of.prepare(model_dir, tmp_path / "work")
    assert launch(tmp_path / "work", num_ranks=2, at_step=2, number=signal.SIGTERM) == [1, 1]
    assert "StoppedError" in (tmp_path / "work" / "log_1.txt").read_text()
    (checkpoint,) = (tmp_path / "work" / "nemo" / "checkpoints").iterdir()
    assert "step=2" in checkpoint.name
    assert launch(tmp_path / "work", num_ranks=2) == [0, 0]
    of.export(tmp_path / "work", tmp_path / "hf")
    resumed = load_file(tmp_path / "hf" / "model.safetensors")
    assert max_difference(run_of("dpo", tensor_model_parallel_size=2).weights, resumed) < 1e-6


@pytest.mark.parametrize(
    ("algorithm", "more"),
    [("dpo", {}), ("sft", {}), ("dpo", {"length": 128, "chunk_rows": 3})],
    ids=["dpo", "sft", "dpo, one length"],
)
def test_whole_sequences_train_the_same_model(
    run_of: Callable[..., Run], launch: Callable[..., list[int]], model_dir: Path, tmp_path: Path, algorithm: str,
    more: dict[str, int],
) -> None:  # fmt: skip
    """As on a GPU. On the CPU, sequences that begin with the same tokens have these once.

    With one length, the reference of three pairs is computed in two micro-batches of the same shape.
    """
    of, work_dir = training(algorithm, micro_batch_size=2), tmp_path / "work"
    of.prepare(model_dir, work_dir)
    assert launch(work_dir, share_beginnings=0, **more) == [0], (work_dir / "log_0.txt").read_text()[-3000:]
    whole = Run(work_dir, tmp_path / "hf", of.export(work_dir, tmp_path / "hf"))
    shared = run_of(algorithm, micro_batch_size=2)
    assert_same_training(shared, whole)
    assert whole.summary["padding"] > shared.summary["padding"] == 0


def test_megatrons_own_attention_over_whole_sequences_trains_the_same_model(run_of: Callable[..., Run]) -> None:
    """It is used with dropout, here with one that drops nothing."""
    assert_same_training(run_of("dpo"), run_of("dpo", optim={"attention_dropout": 1e-12}))


def reference_files(work_dir: Path) -> list[Path]:
    return sorted((work_dir / "reference").iterdir())


def assert_reference_is_that_of_transformers(work_dir: Path, model_dir: Path) -> None:
    chunks = [load_file(path) for path in reference_files(work_dir)]
    model = HuggingFace(model_dir)
    for side in ("chosen", "rejected"):
        with torch.no_grad():
            expected = torch.cat([model.response_logps(r.prompt, getattr(r, side)) for r in DPO_ROWS])
        torch.testing.assert_close(torch.cat([chunk[side] for chunk in chunks]), expected, atol=1e-4, rtol=0)


def test_reference_log_probabilities_are_computed_once(
    run_of: Callable[..., Run], launch: Callable[..., list[int]], model_dir: Path, tmp_path: Path
) -> None:
    """Two data-parallel ranks share the chunks. After a kill, only the damaged one is computed again."""
    of, work_dir = training("dpo", devices=2), tmp_path / "work"
    of.optim.save_interval = 100
    of.prepare(model_dir, work_dir)
    launch(work_dir, num_ranks=2, at_step=1, chunk_rows=3)
    first, second = reference_files(work_dir)
    assert_reference_is_that_of_transformers(work_dir, model_dir)
    whole = second.read_bytes()
    second.write_bytes(whole[:-4])
    before = first.stat().st_mtime_ns
    of.prepare(model_dir, work_dir)
    assert launch(work_dir, num_ranks=2, chunk_rows=3) == [0, 0], (work_dir / "log_0.txt").read_text()[-3000:]
    assert (first.stat().st_mtime_ns, second.read_bytes()) == (before, whole)
    of.export(work_dir, tmp_path / "hf")
    resumed = load_file(tmp_path / "hf" / "model.safetensors")
    assert max_difference(run_of("dpo", devices=2).weights, resumed) < 1e-6


def test_lost_reference_log_probabilities_are_an_error_after_the_first_step(
    launch: Callable[..., list[int]], model_dir: Path, tmp_path: Path
) -> None:
    """With dropout, which the reference does not have."""
    of, work_dir = training("dpo"), tmp_path / "work"
    of.optim.hidden_dropout = of.optim.attention_dropout = 0.1
    of.prepare(model_dir, work_dir)
    assert launch(work_dir, at_step=2) == [-signal.SIGKILL]
    assert_reference_is_that_of_transformers(work_dir, model_dir)
    reference_files(work_dir)[0].unlink()
    of.prepare(model_dir, work_dir)
    assert launch(work_dir) == [1]
    assert "1 of 1 files with the reference's log-probabilities are missing" in (work_dir / "log_0.txt").read_text()
    shutil.rmtree(work_dir)  # what the message says
    of.prepare(model_dir, work_dir)
    assert launch(work_dir) == [0]


def test_a_rank_lost_at_the_end_of_a_save_leaves_the_previous_checkpoint(
    run_of: Callable[..., Run], launch: Callable[..., list[int]], model_dir: Path, tmp_path: Path
) -> None:
    of, work_dir = training("dpo", tensor_model_parallel_size=2), tmp_path / "work"
    of.prepare(model_dir, work_dir)
    assert launch(work_dir, num_ranks=2, lost_at_save=2) == [1, 9]
    names = sorted(path.name for path in (work_dir / "nemo" / "checkpoints").iterdir())
    assert [(name.split("step=")[1][0], name.endswith("-unfinished")) for name in names] == [
        ("1", False), ("2", False), ("2", True)
    ]  # fmt: skip
    of.prepare(model_dir, work_dir)
    assert launch(work_dir, num_ranks=2) == [0, 0], (work_dir / "log_0.txt").read_text()[-3000:]
    of.export(work_dir, tmp_path / "hf")
    resumed = load_file(tmp_path / "hf" / "model.safetensors")
    assert max_difference(run_of("dpo", tensor_model_parallel_size=2).weights, resumed) < 1e-6


def test_an_unfinished_first_checkpoint_is_removed_because_nemo_would_refuse_it(
    model_dir: Path, tmp_path: Path
) -> None:
    of, checkpoints = training("dpo"), tmp_path / "work" / "nemo" / "checkpoints"
    of.prepare(model_dir, tmp_path / "work")
    first = checkpoints / "dpo--step=1-consumed_samples=4-epoch=1-last"
    first.mkdir(parents=True)
    (checkpoints / f"{first.name}-unfinished").touch()
    of.prepare(model_dir, tmp_path / "work")
    assert not list(checkpoints.iterdir())


@pytest.mark.parametrize("algorithm", ["dpo", "sft"])
@pytest.mark.parametrize("precision", ["bf16", "bf16-O2"])
def test_bfloat16_agrees_with_float32(run_of: Callable[..., Run], algorithm: str, precision: str) -> None:
    exact, rounded = run_of(algorithm), run_of(algorithm, precision=precision)
    for key in ("loss", "grad_norm"):
        assert [s[key] for s in rounded.steps] == pytest.approx([s[key] for s in exact.steps], rel=0.03)


def test_bf16_keeps_float32_weights(run_of: Callable[..., Run], model_dir: Path) -> None:
    weights = run_of("dpo", precision="bf16").weights
    assert {w.dtype for w in weights.values()} == {torch.float32}
    assert all(not torch.equal(w, w.bfloat16().float()) for w in weights.values())


def untied_with_scaled_rope(directory: Path) -> Path:
    """Another kind of Llama: an output layer of its own, and Llama 3.1's rotary embedding."""
    make_model(directory, [*QUESTIONS, *GOOD, *BAD], vocab_size=301, num_layers=4, tie_word_embeddings=False)
    path = directory / "config.json"
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rope_scaling": scaling}))
    return directory


ALL_ROWS = {"global_batch_size": len(SFT_ROWS), "max_epochs": 1}
"""One batch of all rows, so that the order in which NeMo draws them does not matter."""


@pytest.fixture(scope="module")
def sft_step_in_transformers(model_dir: Path) -> tuple[float, float]:
    """Loss and gradient norm of `ALL_ROWS`."""
    reference = HuggingFace(model_dir)
    loss = reference.sft_loss()
    loss.backward()
    return loss.item(), norm(reference.gradients())


@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"micro_batch_size": 2},
        {"micro_batch_size": 4},
        {"micro_batch_size": 2, "devices": 2},
        {"micro_batch_size": 2, "pipeline_model_parallel_size": 2},
        {"micro_batch_size": 4, "tensor_model_parallel_size": 2, "sequence_parallel": True},
    ],
    ids=["1", "2", "4", "2, DP=2", "2, PP=2", "4, TP=2+SP"],
)
def test_every_token_of_a_global_batch_counts_alike_whatever_the_micro_batches(
    run_of: Callable[..., Run], sft_step_in_transformers: tuple[float, float], layout: dict[str, Any]
) -> None:
    (step,) = run_of("sft", optim=ALL_ROWS, **layout).steps
    loss, grad_norm = sft_step_in_transformers
    assert step["loss"] == pytest.approx(loss, rel=1e-5)
    assert step["grad_norm"] == pytest.approx(grad_norm, rel=1e-4)


def assert_logits_are_those_of_transformers(path: Path, model_dir: Path) -> None:
    """Of every token, over the vocabulary of the model; NeMo's may be padded to a multiple of the ranks."""
    found, model = load_file(path), HuggingFace(model_dir).model
    with torch.no_grad():
        expected = model(found["tokens"]).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(found["logits"][..., : expected.shape[-1]], expected, atol=1e-4, rtol=0)


def test_sft_of_another_llama_in_a_pipeline_equals_transformers(
    launch: Callable[..., list[int]], tmp_path: Path
) -> None:
    """Untied embeddings, Llama 3's rotary scaling, and a vocabulary that 128 does not divide."""
    model_dir = untied_with_scaled_rope(tmp_path / "model")
    of = training("sft", optim=ALL_ROWS, pipeline_model_parallel_size=2)
    of.prepare(model_dir, tmp_path / "work")
    assert launch(tmp_path / "work", num_ranks=2, logits=str(tmp_path / LOGITS)) == [0, 0]
    assert_logits_are_those_of_transformers(tmp_path / LOGITS, model_dir)
    (step,) = steps_of(tmp_path / "work")
    reference = HuggingFace(model_dir)
    loss = reference.sft_loss()
    loss.backward()
    assert step["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert step["grad_norm"] == pytest.approx(norm(reference.gradients()), rel=1e-4)


ONE_STEP: dict[str, dict[str, Any]] = {"sft": ALL_ROWS, "dpo": {"max_epochs": 1}}
FAMILY_LAYOUTS: dict[str, dict[str, Any]] = {
    "PP=2": {"pipeline_model_parallel_size": 2},
    "TP=2": {"tensor_model_parallel_size": 2},
    "TP=2+SP": {"tensor_model_parallel_size": 2, "sequence_parallel": True, "micro_batch_size": 2},
}


@pytest.fixture(scope="module")
def step_of(model_of: Callable[[str], Path]) -> Callable[[str, str], tuple[float, float]]:
    """Loss and gradient norm of one step in transformers."""

    @functools.cache
    def step(algorithm: str, family: str) -> tuple[float, float]:
        reference = HuggingFace(model_of(family))
        return reference.step(reference.sft_loss() if algorithm == "sft" else reference.dpo_loss())

    return step


STEPS = [
    *((f, algorithm, "") for f in OTHERS for algorithm in ("sft", "dpo")),
    *((f, algorithm, layout) for f in OTHERS for algorithm, layout in (("sft", "PP=2"), ("dpo", "TP=2"))),
    ("qwen3", "dpo", "TP=2+SP"),  # megatron-core adds up the gradients of its norms in both cases
]
"""Family, algorithm and layout of trainings of one step."""


@pytest.mark.parametrize(("family", "algorithm", "layout"), STEPS, ids=lambda x: x or "1")
def test_a_step_of_every_family_equals_transformers(
    run_of: Callable[..., Run],
    model_of: Callable[[str], Path],
    step_of: Callable[..., tuple[float, float]],
    family: str,
    algorithm: str,
    layout: str,
) -> None:
    run = run_of(algorithm, family, optim=ONE_STEP[algorithm], **FAMILY_LAYOUTS.get(layout, {}))
    loss, grad_norm = step_of(algorithm, family)
    assert run.steps[0]["loss"] == pytest.approx(loss, rel=1e-5)
    assert run.steps[0]["grad_norm"] == pytest.approx(grad_norm, rel=1e-4)
    if layout:
        plain = run_of(algorithm, family, optim=ONE_STEP[algorithm]).weights
        # Adam moves every weight by the learning rate, up or down. Where the gradient is almost 0, rounding decides.
        assert max_difference(run.weights, plain) < 2.1 * LEARNING_RATE
        differences = torch.cat([(weight - plain[name]).flatten().abs() for name, weight in run.weights.items()])
        assert differences.mean() < 0.01 * LEARNING_RATE
    elif algorithm == "dpo":
        assert_reference_is_that_of_transformers(run.work_dir.parent, model_of(family))


@pytest.mark.parametrize(("family", "algorithm", "layout"), [("llama", "sft", ""), *STEPS], ids=lambda x: x or "1")
def test_logits_of_every_family_equal_those_of_transformers(
    run_of: Callable[..., Run], model_of: Callable[[str], Path], family: str, algorithm: str, layout: str
) -> None:
    """Before the only step of a training that other tests look at, too."""
    run = run_of(algorithm, family, optim=ONE_STEP[algorithm], **FAMILY_LAYOUTS.get(layout, {}))
    assert_logits_are_those_of_transformers(run.work_dir.with_name(LOGITS), model_of(family))


def test_dropout_changes_the_training(
    run_of: Callable[..., Run], launch: Callable[..., list[int]], model_dir: Path, tmp_path: Path
) -> None:
    of = training("sft")
    of.optim.hidden_dropout = of.optim.attention_dropout = 0.1
    of.prepare(model_dir, tmp_path / "work")
    assert launch(tmp_path / "work") == [0]
    with_dropout = [step["loss"] for step in steps_of(tmp_path / "work")]
    plain = [step["loss"] for step in run_of("sft").steps]
    assert with_dropout != plain
    assert with_dropout == pytest.approx(plain, rel=0.2)


def test_the_reference_is_computed_without_dropout(run_of: Callable[..., Run], model_dir: Path) -> None:
    """With one pair the logged values give it: log pi from `sft_loss`, log pi - log pi_ref from `rewards_chosen`."""
    dropout = {"hidden_dropout": 0.2, "attention_dropout": 0.2}
    first = run_of("dpo", rows=1, optim={"global_batch_size": 1, "sft_loss_weight": 1.0, **dropout}).steps[0]
    with torch.no_grad():
        logps = HuggingFace(model_dir).response_logps(DPO_ROWS[0].prompt, DPO_ROWS[0].chosen)
    assert first["sft_loss"] != pytest.approx(-logps.mean().item(), rel=1e-3), "the policy has dropout"
    reference = -first["sft_loss"] * len(logps) - first["rewards_chosen"] / BETA
    assert reference == pytest.approx(logps.sum().item(), abs=1e-3)


def test_adam_has_the_betas_that_were_set(launch: Callable[..., list[int]], model_dir: Path, tmp_path: Path) -> None:
    of = training("dpo", optim={"max_epochs": 1, "adam_beta1": 0.7, "adam_beta2": 0.6})
    of.prepare(model_dir, tmp_path / "work")
    assert launch(tmp_path / "work") == [0]
    first, second = (read_moments(last_checkpoint(tmp_path / "work"), name) for name in ("exp_avg", "exp_avg_sq"))
    gradients = {name: moment / (1 - 0.7) for name, moment in first.items()}
    assert norm(gradients) == pytest.approx(steps_of(tmp_path / "work")[0]["grad_norm"], rel=1e-5)
    squares = {name: gradient.square() * (1 - 0.6) for name, gradient in gradients.items()}
    assert max_difference(second, squares) < 1e-5 * max(float(s.max()) for s in squares.values())


def test_checkpoints_hold_parameters_and_optimizer_state_and_little_else(
    launch: Callable[..., list[int]], tmp_path: Path
) -> None:
    model_dir = make_model(tmp_path / "model", QUESTIONS, hidden_size=256, num_layers=4)
    of = training("dpo")
    of.prepare(model_dir, tmp_path / "work")
    assert launch(tmp_path / "work") == [0]
    checkpoints = list((tmp_path / "work" / "nemo" / "checkpoints").iterdir())
    assert checkpoints == [last_checkpoint(tmp_path / "work")]
    num_parameters = sum(t.numel() for t in load_file(model_dir / "model.safetensors").values())
    expected = num_parameters * 4 * 4  # parameters, masters and two moments of 4 bytes
    size = sum(file.stat().st_size for file in checkpoints[0].iterdir())
    assert expected <= size <= 1.1 * expected
    of.export(tmp_path / "work", tmp_path / "hf")
    assert not (tmp_path / "work" / "nemo" / "checkpoints").exists()
    assert not (tmp_path / "work" / "start").exists()


def test_a_training_of_its_own_process_under_torchrun(
    model_dir: Path, run_of: Callable[..., Run], tmp_path: Path
) -> None:
    """Without the fork server, through `Trainer.train`, as a job does."""
    of = training("dpo", pipeline_model_parallel_size=2)
    of.prepare(model_dir, tmp_path / "work")
    program = tmp_path / "program.py"
    program.write_text(
        "import sys\n"
        "from pathlib import Path\n"
        "from nemo_srl.trainers import open_trainer\n"
        "from nemo_srl.trainers.nemo_aligner.settings import NemoAlignerSettings\n"
        "if __name__ == '__main__':\n"
        "    open_trainer(NemoAlignerSettings()).train(Path(sys.argv[1]))\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0"]
    result = subprocess.run(
        [*command, "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", str(program), str(tmp_path / "work")],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "Training steps: 100%" in result.stderr
    assert len(result.stderr) < 20_000
    of.export(tmp_path / "work", tmp_path / "hf")
    assert max_difference(load_file(tmp_path / "hf" / "model.safetensors"), run_of("dpo").weights) < 1e-4


def test_a_wrong_number_of_ranks_is_refused(launch: Callable[..., list[int]], model_dir: Path, tmp_path: Path) -> None:
    training("dpo", tensor_model_parallel_size=2).prepare(model_dir, tmp_path / "work")
    assert launch(tmp_path / "work", num_ranks=1) == [1]
    assert "2 ranks were planned, and 1 were started" in (tmp_path / "work" / "log_0.txt").read_text()
