"""Estimates against published figures of Megatron, exact parameter counts, a measured checkpoint and training."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nemo_srl import estimates
from nemo_srl.config import DPOConfig, SFTConfig
from nemo_srl.engines.embedded.kv_cache import KVCache
from nemo_srl.errors import ConfigError
from nemo_srl.models import arithmetic
from nemo_srl.models.hf import read_shape
from nemo_srl.models.spec import ModelSpec
from nemo_srl.preflight import check_shape
from nemo_srl.protocols import DPORow, SFTRow, TrainingTask
from nemo_srl.trainers import open_trainer
from nemo_srl.trainers.nemo_aligner import memory
from nemo_srl.trainers.nemo_aligner.settings import NemoAlignerSettings
from nemo_srl.workload import Assumptions
from recipes.plan import compose_config
from tests.support import composed
from tests.tiny import make_model

ROOT = Path(__file__).resolve().parent.parent


def shape(name: str) -> ModelSpec:
    return read_shape(ROOT / "recipes" / "shapes" / name)


def gpt(*, num_layers: int, hidden_size: int, vocab_size: int = 51200) -> ModelSpec:
    """A GPT in Llama's terms: three matrices of 8/3 h count as two of 4 h, and every head has its own keys."""
    return replace(
        shape("Llama-2-70b-hf"), num_layers=num_layers, hidden_size=hidden_size, ffn_hidden_size=8 * hidden_size // 3,
        num_attention_heads=hidden_size // 128, num_query_groups=hidden_size // 128, head_dim=128,
        vocab_size=vocab_size, tie_word_embeddings=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("Llama-2-70b-hf", 68_976_648_192),
        ("Llama-3.1-8B-Instruct", 8_030_261_248),
        ("Llama-3.1-70B-Instruct", 70_553_706_496),
        ("Llama-3.2-1B-Instruct", 1_235_814_400),
        ("SmolLM2-135M-Instruct", 134_515_008),
        ("Mistral-7B-Instruct-v0.3", 7_248_023_552),
        ("Qwen2.5-7B-Instruct", 7_615_616_512),
        ("Qwen3-8B", 8_190_735_360),
        ("phi-4", 14_659_507_200),
    ],
)
def test_parameters_are_counted_exactly(name: str, number: int) -> None:
    assert arithmetic.num_parameters(shape(name)) == number


@pytest.mark.parametrize(
    ("num_layers", "hidden_size", "billions"),
    [(40, 6144, 18.4), (48, 8192, 39.1), (60, 10240, 76.1), (80, 12288, 145.6), (105, 20480, 529.6), (128, 25600, 1e3)],
)
def test_megatrons_published_parameter_counts(num_layers: int, hidden_size: int, billions: float) -> None:
    # Narayanan et al. 2021, table 1.
    spec = gpt(num_layers=num_layers, hidden_size=hidden_size)
    assert arithmetic.num_parameters(spec) / 1e9 == pytest.approx(billions, rel=0.01)


@pytest.mark.parametrize(
    ("num_layers", "hidden_size", "num_tokens", "num_gpus", "tflops", "days"),
    [(96, 12288, 300e9, 1024, 140, 34), (128, 25600, 450e9, 3072, 163, 84)],
)
def test_megatrons_published_training_times(
    num_layers: int, hidden_size: int, num_tokens: float, num_gpus: int, tflops: float, days: float
) -> None:
    # Narayanan et al. 2021, section 5.1: GPT-3 and a trillion parameters, with recomputed activations.
    spec = gpt(num_layers=num_layers, hidden_size=hidden_size)
    flops = num_tokens * arithmetic.flops_per_token(spec, sequence_length=2048, forward_passes=4)
    hours = estimates.training_hours(flops, num_gpus=num_gpus, tflops_per_gpu=tflops)
    assert hours / 24 == pytest.approx(days, rel=0.04)


@pytest.mark.parametrize(("sequence_parallel", "bytes_per_sbh"), [(False, 10 + 24 / 8), (True, 34 / 8)])
def test_activations_of_a_gpt_layer_are_those_of_the_paper(sequence_parallel: bool, bytes_per_sbh: float) -> None:
    # Korthikanti et al. 2022, table 2, without the attention scores that FlashAttention does not keep.
    trainer = NemoAlignerSettings(tensor_model_parallel_size=8, sequence_parallel=sequence_parallel)
    spec = gpt(num_layers=48, hidden_size=6144)
    found = memory.activation_bytes_per_layer(spec, trainer, num_tokens=2048, dropout=True)
    assert found == pytest.approx(2048 * 6144 * bytes_per_sbh)


@pytest.mark.parametrize(
    ("micro_batch_size", "global_batch_size", "data", "pipeline", "tensor", "gib"),
    [(2, 2048, 8, 1, 1, 69.1), (4, 512, 4, 1, 2, 55.7), (2, 2048, 4, 2, 1, 49.8), (4, 128, 1, 1, 8, 28.8)],
)
def test_megatrons_published_peaks_of_a_7b_llama(
    micro_batch_size: int, global_batch_size: int, data: int, pipeline: int, tensor: int, gib: float
) -> None:
    # Megatron-LM's pull request 482, tools/get_training_info/README.md: Llama-2-7B on 8 H800, `max_memory_allocated`
    # in GiB; the length and the dropouts are those of its example. Its SwiGLU is not fused and keeps a fourth tensor.
    spec = replace(
        shape("Llama-2-70b-hf"), num_layers=32, hidden_size=4096, ffn_hidden_size=11008, num_attention_heads=32,
        num_query_groups=32, head_dim=128,
    )  # fmt: skip
    trainer = NemoAlignerSettings(
        precision="bf16-O2", devices=data * pipeline * tensor, tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline, micro_batch_size=micro_batch_size,
    )  # fmt: skip
    optim = SFTConfig(global_batch_size=global_batch_size, max_seq_length=2048, hidden_dropout=0.1)
    total = memory.training_memory(optim, trainer, spec).total
    tensors = total - memory.OVERHEAD_BYTES
    not_fused = 2 * 11008 * micro_batch_size * 2048 * 32 / tensor
    assert (tensors + not_fused) / 2**30 == pytest.approx(gib, rel=0.01)
    assert 0.92 * gib < tensors / 2**30 < gib < total / 2**30, "with the overhead, the plan errs on the safe side"


def test_bytes_per_parameter_are_those_of_megatrons_guide() -> None:
    for precision, replicas, total in (("bf16-O2", 1, 18), ("32", 1, 16), ("bf16-O2", 4, 6 + 3), ("32", 4, 8 + 2)):
        trainer = NemoAlignerSettings(precision=precision, devices=replicas)
        assert sum(memory.bytes_per_parameter(trainer)) == total
        # Adam's moments are two of the numbers, float32 in both precisions.
        offloaded = memory.bytes_per_parameter(replace(trainer, optimizer_cpu_offload=True))
        assert (sum(offloaded), offloaded[2]) == (total, 8 / replicas)


def test_a_checkpoint_is_as_large_as_a_measured_one() -> None:
    found = memory.checkpoint_bytes(NemoAlignerSettings(precision="32"), shape("SmolLM2-135M-Instruct"))
    assert found == pytest.approx(2.1e9, rel=0.05)


Layout = tuple[str, int, int, str, float]
"""Precision, number of data-parallel ranks, rank of LoRA, what is recomputed, and the share of frozen layers."""
LAYOUTS: list[Layout] = [
    ("32", 1, 0, "none", 0), ("32", 2, 0, "none", 0), ("bf16-O2", 1, 0, "none", 0), ("bf16-O2", 2, 0, "none", 0),
    ("32", 1, 16, "none", 0), ("bf16-O2", 2, 16, "none", 0), ("32", 1, 0, "full", 0), ("bf16-O2", 1, 0, "full", 0),
    ("32", 1, 16, "full", 0), ("32", 1, 0, "none", 0.25), ("bf16-O2", 2, 0, "none", 0.75),
]  # fmt: skip

OF_PAIRS: list[Layout] = [("bf16-O2", 1, 8, "none", 0), ("bf16-O2", 1, 0, "none", 0.5)]
"""These train by DPO, the output layer's weights being frozen."""


def trainer_of(layout: Layout) -> NemoAlignerSettings:
    keys = ("precision", "devices", "lora_rank", "recompute_granularity", "frozen_share")
    return NemoAlignerSettings(**dict(zip(keys, layout, strict=True)))


NUM_TOKENS = 512
"""Of each row. Activations are then larger than the copy of all gradients that gloo makes to add them up."""


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelSpec, dict[Layout, dict[str, int]]]:
    """A model of 3.4 million parameters, and the bytes of its tensors while NeMo-Aligner trains it."""
    base = tmp_path_factory.mktemp("memory")
    words = random.Random(1)
    texts = [" ".join("".join(words.choices("abcdefghijklmnop", k=6)) for _ in range(5000))]
    model_dir = make_model(base / "model", texts, vocab_size=4096, num_layers=4, hidden_size=256)
    # Q and R are not in the texts, so each is a token.
    chosen, rejected = (first + other * (NUM_TOKENS - 3) for first, other in ("aQ", "bR"))
    rows = [SFTRow(prompt="a", response="Q" * (NUM_TOKENS - 2))] * 4
    pairs = [DPORow(prompt="c", chosen=chosen, rejected=rejected, chosen_reward=5.0, rejected_reward=1.0)] * 4
    jobs = []
    for layout in [*LAYOUTS, *OF_PAIRS]:
        config = DPOConfig if layout in OF_PAIRS else SFTConfig
        optim = config(global_batch_size=2, max_epochs=1, max_seq_length=NUM_TOKENS, save_interval=1000)
        work_dir, trainer = base / "_".join(map(str, layout)), trainer_of(layout)
        task = TrainingTask(
            algorithm="dpo" if layout in OF_PAIRS else "sft", model_dir=model_dir,
            rows=pairs if layout in OF_PAIRS else rows, optim=optim, seed=1234,
        )  # fmt: skip
        open_trainer(trainer).prepare(task, work_dir)
        jobs.append(f"{work_dir}:{trainer.world_size}")
    command = [sys.executable, "-W", "ignore", "-m", "tests.training_memory", *jobs]
    done = subprocess.run(command, text=True, capture_output=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"parameters"')]
    return read_shape(model_dir), dict(zip([*LAYOUTS, *OF_PAIRS], lines, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parameters_gradients_and_optimizer_are_as_large_as_measured(
    measured: tuple[ModelSpec, dict[Layout, dict[str, int]]], layout: Layout
) -> None:
    spec, found = measured
    estimate = memory.training_memory(SFTConfig(global_batch_size=2), trainer_of(layout), spec)
    actual, rank = found[layout], layout[2]
    adapters = spec.num_layers * memory.adapter_parameters_per_layer(spec, rank)
    assert actual["parameters"] == arithmetic.num_parameters(spec) + adapters
    # The last norm is not counted, and buffers may be padded to whole shards: a ten-thousandth here.
    assert actual["weights"] + actual["gradients"] == pytest.approx(estimate.weights_and_gradients, rel=1e-3)
    assert actual["optimizer"] == pytest.approx(estimate.optimizer, rel=1e-3)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_activations_and_logits_are_as_large_as_measured(
    measured: tuple[ModelSpec, dict[Layout, dict[str, int]]], layout: Layout
) -> None:
    spec, found = measured
    optim = SFTConfig(global_batch_size=2, max_seq_length=NUM_TOKENS)
    estimate, precision = memory.training_memory(optim, trainer_of(layout), spec), layout[0]
    # Ours for a CPU in float32 keeps its input, as a GPU's kernel does, and the input is counted. PyTorch's RMSNorm
    # keeps two float32 copies in the place of its input, and one if the weights are frozen.
    size, extra = (4, 0) if precision == "32" else (2, (4 if layout[2] else 2 * 4) - 2)
    norm = NUM_TOKENS * spec.hidden_size * extra
    # The estimate neglects cosines and sines. Here queries and keys each have them for half a head's elements.
    per_layer = 2 * norm + NUM_TOKENS * 2 * spec.head_dim * size
    # If layers are computed again, one of them is there, or the last norm and the logits.
    whole, again = (0, 1) if layout[3] == "full" else (spec.num_layers * (1 - layout[4]), 0)
    passing = max(estimate.logits + norm, estimate.recomputed + again * per_layer)
    expected = estimate.activations + whole * per_layer + passing
    if layout[4]:  # the first norm that is trained has an input without a gradient, so it keeps one copy
        expected -= NUM_TOKENS * spec.hidden_size * (0 if precision == "32" else 4)
    assert found[layout]["passing"] == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("layout", OF_PAIRS)
def test_a_step_of_dpo_over_a_frozen_output_layer_needs_no_copies_of_its_weights(
    measured: tuple[ModelSpec, dict[Layout, dict[str, int]]], layout: Layout
) -> None:
    """PyTorch copied them for every token of a row once: 2.2 GB here."""
    spec, found = measured
    optim = DPOConfig(global_batch_size=2, max_seq_length=NUM_TOKENS)
    estimate = memory.training_memory(optim, trainer_of(layout), spec)
    planned = estimate.activations + estimate.logits
    assert planned < found[layout]["passing"] < 1.3 * planned


def test_a_pair_needs_the_activations_of_two_sequences_and_a_pipeline_those_of_its_stages() -> None:
    spec = shape("Llama-2-70b-hf")
    eight = NemoAlignerSettings(precision="bf16-O2", num_nodes=8, devices=8, tensor_model_parallel_size=8,
                          pipeline_model_parallel_size=4, sequence_parallel=True)  # fmt: skip
    sft = memory.training_memory(SFTConfig(max_seq_length=2048), eight, spec)
    dpo = memory.training_memory(DPOConfig(max_seq_length=2048), eight, spec)
    assert dpo.activations == pytest.approx(2 * sft.activations)
    no_pipeline = replace(eight, pipeline_model_parallel_size=1)
    assert memory.training_memory(SFTConfig(max_seq_length=2048), no_pipeline, spec).activations == sft.activations
    assert eight.pipeline_efficiency(SFTConfig(global_batch_size=16)) == pytest.approx(8 / 11)


def test_padding_to_one_length_takes_time_and_user_buffers_take_memory() -> None:
    cfg, assumed = compose_config(["recipe=srl-llama3.1-8b-1n8g-tp8"])
    spec = shape("Llama-3.1-8B-Instruct")
    usual = cfg.trainer
    assert usual.sequence_parallel

    def sft_hours(trainer: NemoAlignerSettings, response_tokens: float) -> float:
        cfg.trainer = trainer
        found = estimates.stages(cfg, spec, replace(assumed, mean_response_tokens=response_tokens))
        return next(s.hours for s in found if s.name == "sft")

    padded = replace(usual, ub_tp_comm_overlap=True)
    assert sft_hours(usual, 100) < sft_hours(usual, 200) < sft_hours(padded, 200) == sft_hours(padded, 100)
    one, other = (memory.training_memory(cfg.sft, trainer, spec) for trainer in (usual, padded))
    num_tokens = usual.rows_at_a_time(cfg.sft) * cfg.sft.max_seq_length
    assert other.total - one.total == pytest.approx(10 * 2 * num_tokens * spec.hidden_size)


def test_an_engine_that_allocates_its_cache_needs_what_it_allocates() -> None:
    spec, assumed = shape("SmolLM2-135M-Instruct"), Assumptions(mean_rubric_tokens=100, mean_prompt_tokens=20)
    cfg = composed("engine=embedded-1gpu", "engine.max_batch_size=6", "candidates.max_tokens=40", "judge.max_tokens=32")
    found = estimates.engine_memory(cfg, spec, assumed)
    device, dtype = torch.device("cpu"), torch.bfloat16
    cache = KVCache(
        num_layers=spec.num_layers, max_rows=6, num_groups=spec.num_query_groups, head_dim=spec.head_dim,
        capacity=160 + 32, device=device, dtype=dtype,
    )  # fmt: skip
    prompts = 2 * (100 + 20 + 40)  # three verdicts share a prompt
    assert found.num_cached_tokens == 6 * cache.capacity + prompts
    allocated = cache.keys.nbytes + cache.values.nbytes
    assert found.kv_cache == pytest.approx(allocated * found.num_cached_tokens / (6 * cache.capacity))
    assert found.total == found.weights + found.kv_cache + estimates.ONE_GPU_ENGINE_OVERHEAD_BYTES


def test_a_small_model_is_not_faster_than_its_decoding_steps() -> None:
    spec, cfg = shape("SmolLM2-135M-Instruct"), composed(recipe="srl-smollm2-135m-1gpu")

    def hours(**assumed: float) -> float:
        found = estimates.stages(cfg, spec, Assumptions(engine_start_minutes=0, **assumed))
        return next(s.hours for s in found if s.name == "candidates")

    tokens = 1000 * 4 * 256
    prompts = 1000 * 60 * 2 * 134_515_008 / (989e12 * 0.35)  # seconds
    assert hours(decode_step_seconds=0.1) == pytest.approx((tokens / (256 / 2 / 0.1) + prompts) / 3600, rel=1e-3)
    by_size = tokens / (1000 * 70e9 / 134_515_008)
    assert hours(decode_step_seconds=1e-9) == pytest.approx((by_size + prompts) / 3600, rel=1e-3)


RECIPE_70B = "srl-llama2-70b-8n8g-tp8pp4"


def rows_70b(*overrides: str, **assumed: float) -> dict[str, estimates.StageEstimate]:
    """The rows of the plan for 70B by name. Of those with one name, the last."""
    cfg = composed(*overrides, recipe=RECIPE_70B)
    return {s.name: s for s in estimates.stages(cfg, shape("Llama-2-70b-hf"), Assumptions(**assumed))}


def test_conversions_are_jobs_on_one_node_and_hold_the_others_only_in_one_allocation() -> None:
    conversion = 2 * 68_976_648_192 / 0.5e9 / 3600
    jobs, allocation = rows_70b("launcher=slurm"), rows_70b("launcher=srun")
    for name, times in (("sft", 1), ("policy", 2)):
        for step in ("prepare", "export"):
            row = jobs[f"{name}-{step}"]
            assert (row.times, row.num_gpus) == (times, 8)
            assert row.hours == pytest.approx(5 / 60 + conversion)
        assert jobs[name].num_gpus == 64
        assert allocation[name].hours == pytest.approx(jobs[name].hours - 5 / 60 + 2 * conversion)
    assert not [name for name in allocation if name.endswith(("-prepare", "-export"))]
    assert {row.num_gpus for row in allocation.values()} == {64}
    assert allocation["containers"].times == 2, "an image for each role, unpacked once"


def test_the_jobs_of_one_node_are_whole_and_without_slurm_nothing_waits() -> None:
    spec, a = shape("Llama-3.1-8B-Instruct"), Assumptions()
    found: dict[str, list[estimates.StageEstimate]] = {}
    for launcher in ("local", "slurm"):
        cfg = composed(f"launcher={launcher}", recipe="srl-llama3.1-8b-1n8g-tp8")
        found[launcher] = estimates.stages(cfg, spec, a)
        num_jobs = {"local": 0, "slurm": 3 + estimates.num_server_starts(cfg)}[launcher]
        assert estimates.num_queued(cfg, found[launcher]) == num_jobs
    for here, there in zip(found["local"], found["slurm"], strict=True):
        assert here.name == there.name
        starts = here.name in ("start servers", "sft", "policy")
        assert there.hours - here.hours == pytest.approx(a.container_minutes / 60 if starts else 0)


def test_each_job_waits_in_the_queue_and_an_allocation_once() -> None:
    spec, a = shape("Llama-2-70b-hf"), Assumptions()
    for launcher, number in (("slurm", 6 + 3 * 3), ("srun", 1), ("local", 6 + 3 * 3)):
        cfg = composed(f"launcher={launcher}", recipe=RECIPE_70B)
        assert estimates.num_queued(cfg, estimates.stages(cfg, spec, a)) == number


def test_prompts_of_the_judge_count_once_for_all_verdicts_on_an_answer() -> None:
    row, cfg = rows_70b()["judgements"], composed(recipe=RECIPE_70B)
    num_answers, prompt = 6000 * 4, 450 + 60 + 400
    assert cfg.judge.num_judgements * 120 * num_answers == row.num_tokens
    reading = num_answers * prompt * 2 * 68_976_648_192 / (16 * 989e12 * 0.35)
    writing = row.num_tokens / (16 * 1000 * 70e9 / 68_976_648_192)
    assert row.hours == pytest.approx((reading + writing) / 3600)


def test_padding_is_computed_and_not_trained_on() -> None:
    hours = [rows_70b(padding=padding, step_overhead_seconds=0, training_start_minutes=0, container_minutes=0,
                      storage_gb_per_second=1e9)["policy"].hours for padding in (0.0, 0.5)]  # fmt: skip
    assert hours[1] == pytest.approx(2 * hours[0], rel=1e-3)
    assert rows_70b(padding=0.5)["policy"].num_tokens == rows_70b(padding=0.0)["policy"].num_tokens


def test_a_host_needs_room_for_the_checkpoint_of_its_ranks_and_for_offloaded_moments() -> None:
    cfg, spec = composed(recipe=RECIPE_70B), shape("Llama-2-70b-hf")
    assert estimates.host_bytes(cfg, spec) == pytest.approx(14 * 68_976_648_192 / 8)
    small, spec = composed(recipe="srl-llama3.2-1b-1gpu"), shape("Llama-3.2-1B-Instruct")
    assert estimates.host_bytes(small, spec) == pytest.approx((14 + 8) * 1_235_814_400, rel=1e-3)


def test_the_70b_recipe_needs_half_of_the_345_gpu_hours_of_a_start_for_each_stage() -> None:
    cfg, spec = composed(recipe=RECIPE_70B), shape("Llama-2-70b-hf")
    found = estimates.stages(cfg, spec, Assumptions())
    assert sum(s.times * s.gpu_hours for s in found) <= 345 / 2


@pytest.mark.parametrize("recipe", sorted(p.stem for p in (ROOT / "conf" / "recipe").glob("srl-*g*.yaml")))
def test_every_recipe_for_gpus_fits_them(recipe: str) -> None:
    done = plan(f"recipe={recipe}")
    assert done.returncode == 0, done.stderr
    assert "whole run" in done.stdout


def test_a_plan_assumes_what_the_recipe_says_unless_it_is_told_otherwise() -> None:
    recipe = "recipe=srl-llama3.2-1b-1gpu"
    cfg, assumed = compose_config([recipe, "++assume.peak_tflops=165", "++assume.num_sft_rows=1000"])
    assert (assumed.gpu_memory_gb, assumed.peak_tflops, assumed.num_sft_rows) == (24, 165, 1000)
    assert assumed.training_mfu == Assumptions.training_mfu
    assert check_shape(cfg, shape("Llama-3.2-1B-Instruct")) is None
    with pytest.raises(ConfigError, match=r"assume\.gpu_gb=24: no such assumption\. There are .*gpu_memory_gb"):
        compose_config([recipe, "++assume.gpu_gb=24"])


def test_a_model_of_1b_needs_its_moments_on_the_host_to_fit_24_gb() -> None:
    cfg, assumed = compose_config(["recipe=srl-llama3.2-1b-1gpu"])
    spec = shape("Llama-3.2-1B-Instruct")
    for optim in (cfg.sft, cfg.dpo):
        fits = memory.training_memory(optim, cfg.trainer, spec)
        usual = memory.training_memory(optim, replace(cfg.trainer, optimizer_cpu_offload=False), spec)
        assert fits.total < assumed.gpu_memory_gb * 1e9 < usual.total
        assert fits.host == pytest.approx(usual.total - fits.total)
    # With few tokens, the visit of the largest moments needs more than the backward pass.
    short = memory.training_memory(replace(cfg.sft, max_seq_length=64), cfg.trainer, spec)
    assert short.total == short.weights_and_gradients + short.optimizer + 8 * 128256 * 2048 + short.overhead


def test_what_does_not_fit_or_divide_is_said_before_anything_runs() -> None:
    small = plan("recipe=srl-llama2-70b-8n8g-tp8pp4", "trainer.num_nodes=1", "trainer.pipeline_model_parallel_size=1")
    assert small.returncode == 2
    assert "DOES NOT FIT" in small.stdout
    engine = plan("recipe=srl-llama3.2-1b-1gpu", "engine.max_batch_size=512")
    assert engine.returncode == 2
    assert [line.split()[0] for line in engine.stdout.splitlines() if "DOES NOT FIT" in line] == ["engine"]
    assert "lower engine.max_batch_size" in engine.stderr
    heads = plan("recipe=srl-llama3.1-8b-1n8g-tp8", "trainer.tensor_model_parallel_size=16", "trainer.devices=16")
    assert heads.returncode == 2
    assert "query groups" in heads.stderr


def plan(*overrides: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "recipes" / "plan.py"), *overrides]
    return subprocess.run(command, text=True, capture_output=True, cwd=ROOT, check=False)
