"""What a run will need, before it runs: memory of an engine, tokens, hours, disk. Arithmetic only; no torch, no files.

What a training needs is the trainer's own to say (`TrainerBackend.memory`, `checkpoint_bytes`).
Source: [N] Narayanan et al. 2021, arXiv 2104.04473, equation 4.
"""

from __future__ import annotations

from dataclasses import dataclass

from nemo_srl.config import Config, DPOConfig, OptimConfig
from nemo_srl.models.arithmetic import flops_per_token, num_parameters
from nemo_srl.models.spec import ModelSpec
from nemo_srl.trainers import trainer_backend

ENGINE_OVERHEAD_BYTES = 3e9
"""CUDA context, NCCL's buffers, workspaces and fragmentation of an engine."""


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """What no formula knows. Every value can be set on the command line of `recipes/plan.py`."""

    gpu_memory_gb: float = 80.0
    peak_tflops: float = 989.0
    """Dense bfloat16 of one GPU (H100 SXM's data sheet)."""
    training_mfu: float = 0.35
    """Share of `peak_tflops` that model FLOPs reach while no pipeline stage idles; Megatron's best is 0.47."""
    generation_tokens_per_second: float = 1000.0
    """Output tokens per second and GPU of a 70B model in bfloat16, in proportion to size for others: half of what
    TensorRT-LLM publishes for Llama-3.3-70B in FP8 (2,209 on H100, TP2, 1000 tokens in, 1000 out)."""
    start_minutes: float = 15.0
    """Of every job: container, weights from shared storage, communicators, CUDA graphs."""
    step_overhead_seconds: float = 3.0
    """Of every optimizer step beside its FLOPs: small batches, the optimizer, with DPO the swap of the reference's
    weights between host and GPU."""
    storage_gb_per_second: float = 10.0
    """At which all nodes together write a checkpoint."""
    num_sft_rows: int = 4830
    pairs_per_prompt: float = 0.66
    """What is left after ties and verdicts that cannot be read (the paper's 3,964 of some 6,000)."""
    prompts_kept: float = 0.5
    """Share of generated prompts that pass the filters."""
    mean_prompt_tokens: float = 60.0
    mean_response_tokens: float = 400.0
    mean_rubric_tokens: float = 450.0
    mean_verdict_tokens: float = 120.0


@dataclass(frozen=True, kw_only=True)
class EngineMemory:
    """Bytes on one GPU of an engine, and what the cache holds."""

    weights: float
    kv_cache: float
    num_cached_tokens: int


@dataclass(frozen=True, kw_only=True)
class StageEstimate:
    name: str
    num_tokens: float
    """Trained on, or generated."""
    num_gpus: int
    hours: float
    disk_bytes: float = 0.0
    """What it leaves; a training needs `checkpoint_bytes` more until its end."""

    @property
    def gpu_hours(self) -> float:
        return self.hours * self.num_gpus


def engine_memory(cfg: Config, spec: ModelSpec, assumptions: Assumptions) -> EngineMemory:
    """Of one GPU of a TensorRT-LLM replica."""
    sizes = cfg.engine.trtllm
    num_gpus = sizes.tensor_parallel_size * sizes.pipeline_parallel_size
    weights = 2 * num_parameters(spec) / num_gpus
    free = assumptions.gpu_memory_gb * 1e9 - weights - ENGINE_OVERHEAD_BYTES
    cache = max(0.0, free * sizes.free_gpu_memory_fraction)
    # Keys and values, two bytes each; groups are divided by tensor parallelism, layers by the pipeline.
    per_token = 2 * 2 * spec.num_layers * spec.num_query_groups * spec.head_dim / num_gpus
    return EngineMemory(weights=weights, kv_cache=cache, num_cached_tokens=int(cache / per_token))


def num_engine_gpus(cfg: Config) -> int:
    """Of all replicas, on all of the engine's nodes."""
    sizes = cfg.engine.trtllm
    return sizes.num_replicas * sizes.tensor_parallel_size * sizes.pipeline_parallel_size


def training_hours(num_flops: float, *, num_gpus: int, tflops_per_gpu: float) -> float:
    """Compute alone [N, eq. 4]."""
    return num_flops / (num_gpus * tflops_per_gpu * 1e12) / 3600


def stages(cfg: Config, spec: ModelSpec, assumptions: Assumptions) -> list[StageEstimate]:
    """Every stage of the run, in order; those of one iteration once, since all are alike."""
    a = assumptions
    answer = min(a.mean_response_tokens, cfg.candidates.max_tokens)
    verdict = min(a.mean_verdict_tokens, cfg.judge.max_tokens)
    sft_row = a.mean_prompt_tokens + a.mean_response_tokens
    num_candidates = cfg.prompts.num_prompts * cfg.candidates.num_samples
    num_pairs = cfg.prompts.num_prompts * a.pairs_per_prompt
    num_evaluated = cfg.evaluation.num_prompts
    generated = {
        "evaluation": num_evaluated * (answer + verdict * cfg.judge.num_judgements),
        "prompts": cfg.prompts.num_prompts / a.prompts_kept * a.mean_prompt_tokens,
        "candidates": num_candidates * answer,
        "judgements": num_candidates * cfg.judge.num_judgements * verdict,
    }
    if cfg.anchor.num_prompts:
        judged = min(cfg.anchor.num_prompts, cfg.prompts.num_prompts) * cfg.candidates.num_samples
        generated["anchor"] = judged * cfg.judge.num_judgements * verdict
    made = [_training("sft", cfg.sft, cfg, spec, a, num_rows=a.num_sft_rows, row_tokens=sft_row)]
    made += [_generation(name, number, cfg, spec, a) for name, number in generated.items()]
    row = 2 * (a.mean_prompt_tokens + answer)
    made.append(_training("policy", cfg.dpo, cfg, spec, a, num_rows=num_pairs, row_tokens=row))
    return made


def _training(
    name: str, optim: OptimConfig, cfg: Config, spec: ModelSpec, a: Assumptions, *, num_rows: float, row_tokens: float
) -> StageEstimate:
    is_dpo = isinstance(optim, DPOConfig)
    num_tokens = num_rows * row_tokens * optim.max_epochs
    length = row_tokens / (2 if is_dpo else 1)
    flops = num_tokens * flops_per_token(spec, sequence_length=length, forward_passes=4 if is_dpo else 3)
    rate = a.peak_tflops * a.training_mfu * cfg.trainer.pipeline_efficiency(optim)
    num_steps = num_rows // optim.global_batch_size * optim.max_epochs
    num_saves = num_steps // optim.save_interval + 1
    saving = (
        num_saves * trainer_backend(cfg.trainer).checkpoint_bytes(cfg.trainer, spec) / (a.storage_gb_per_second * 1e9)
    )
    hours = training_hours(flops, num_gpus=cfg.trainer.world_size, tflops_per_gpu=rate) + a.start_minutes / 60
    hours += (num_steps * a.step_overhead_seconds + saving) / 3600
    return StageEstimate(
        name=name, num_tokens=num_tokens, num_gpus=cfg.trainer.world_size, hours=hours,
        disk_bytes=2 * num_parameters(spec),
    )  # fmt: skip


def _generation(name: str, num_tokens: float, cfg: Config, spec: ModelSpec, a: Assumptions) -> StageEstimate:
    num_gpus = num_engine_gpus(cfg)
    rate = a.generation_tokens_per_second * 70e9 / num_parameters(spec) * num_gpus
    # Text and its record, some six bytes a token.
    hours = num_tokens / rate / 3600 + a.start_minutes / 60
    return StageEstimate(name=name, num_tokens=num_tokens, num_gpus=num_gpus, hours=hours, disk_bytes=6 * num_tokens)
