"""What a run will need, before it runs: memory per GPU, tokens, hours, disk. Arithmetic only; no torch, no files.

Sources of the formulas, named where they are used:
  [D] Megatron-Core's developer guide, "Distributed Optimizer": bytes per parameter by data-parallel size
  [K] Korthikanti et al. 2022, arXiv 2205.05198, sections 4.1 to 4.3: activations with tensor and sequence parallelism
  [N] Narayanan et al. 2021, arXiv 2104.04473, equations 2 to 4 and section 2.2: parameters, FLOPs, pipeline bubble

[K] counts a GPT layer with a feed-forward of 4h and GELU; the same count is made here for Llama's SwiGLU, grouped
queries and attention that keeps no scores (FlashAttention). Estimates are for a full micro-batch of the greatest
length; fragmentation is in `OVERHEAD_BYTES`. Not covered: recomputation, context parallelism, fp8, offloading.
"""

from __future__ import annotations

from dataclasses import dataclass

from nemo_srl.config import Config, DPOConfig, OptimConfig, TrainerConfig
from nemo_srl.models.hf import ModelSpec

OVERHEAD_BYTES = 6e9
"""CUDA context, NCCL's buffers, workspaces and fragmentation, as is usual on an H100 with 8-way tensor parallelism."""


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
class TrainingMemory:
    """Bytes on the fullest GPU of a training."""

    weights_and_gradients: float
    optimizer: float
    activations: float
    logits: float

    @property
    def total(self) -> float:
        return self.weights_and_gradients + self.optimizer + self.activations + self.logits + OVERHEAD_BYTES


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


def num_parameters(spec: ModelSpec) -> int:
    """Exactly, as in the checkpoint."""
    embeddings = spec.vocab_size * spec.hidden_size * (1 if spec.tie_word_embeddings else 2)
    return embeddings + spec.num_layers * _layer_parameters(spec) + spec.hidden_size


def _layer_parameters(spec: ModelSpec) -> int:
    h, q = spec.hidden_size, spec.num_attention_heads * spec.head_dim
    kv = spec.num_query_groups * spec.head_dim
    return h * q + 2 * h * kv + q * h + 3 * h * spec.ffn_hidden_size + 2 * h


def parameters_per_rank(spec: ModelSpec, trainer: TrainerConfig) -> float:
    """Of the fullest rank: a pipeline's first or last stage, which has the embedding or the output layer."""
    tp, pp = trainer.tensor_model_parallel_size, trainer.pipeline_model_parallel_size
    embedding = spec.vocab_size * spec.hidden_size
    # With tied embeddings and several stages, the last one keeps a copy; alone, a stage has both.
    num_embeddings = 1 if spec.tie_word_embeddings or pp > 1 else 2
    return (spec.num_layers / pp * _layer_parameters(spec) + num_embeddings * embedding) / tp


def bytes_per_parameter(trainer: TrainerConfig) -> tuple[float, float]:
    """(weights and gradients, optimizer) of the distributed optimizer [D]."""
    d = trainer.data_parallel_size
    return (6.0, 12.0 / d) if trainer.precision == "bf16-O2" else (8.0, 8.0 / d)


def activation_bytes_per_layer(spec: ModelSpec, trainer: TrainerConfig, *, num_tokens: int, dropout: bool) -> float:
    """What one layer keeps for the backward pass of `num_tokens` tokens on one rank, two bytes an element [K, 4.2].

    Divided by tensor parallelism: queries, keys, values, attention's output (and its log-sum-exp, neglected), gate,
    up and their product. Whole on every rank unless sequence parallelism divides them too: the inputs of both
    norms, of the attention and of the feed-forward, and the dropouts' masks (one byte).
    """
    tp = trainer.tensor_model_parallel_size
    size = 4.0 if trainer.precision == "32" else 2.0
    q = spec.num_attention_heads * spec.head_dim
    kv = spec.num_query_groups * spec.head_dim
    divided = size * (2 * q + 2 * kv + 3 * spec.ffn_hidden_size)
    whole = size * 4 * spec.hidden_size + (2 * spec.hidden_size if dropout else 0)
    return num_tokens * (divided / tp + whole / (tp if trainer.sequence_parallel else 1))


def training_memory(optim: OptimConfig, trainer: TrainerConfig, spec: ModelSpec) -> TrainingMemory:
    """Of the fullest rank: the first pipeline stage, which keeps a micro-batch for every stage [N, 2.2]."""
    tp, pp = trainer.tensor_model_parallel_size, trainer.pipeline_model_parallel_size
    # A pair is two sequences in one forward pass.
    num_tokens = trainer.micro_batch_size * optim.max_seq_length * (2 if isinstance(optim, DPOConfig) else 1)
    num_micro_batches = optim.global_batch_size // (trainer.micro_batch_size * trainer.data_parallel_size)
    layers = spec.num_layers / pp * min(pp, num_micro_batches)
    per_layer = activation_bytes_per_layer(spec, trainer, num_tokens=num_tokens, dropout=optim.hidden_dropout > 0)
    parameters = parameters_per_rank(spec, trainer)
    weights, optimizer = bytes_per_parameter(trainer)
    # The last stage: logits as computed, in float32, and their gradient. It keeps one micro-batch only, so with
    # a pipeline this falls together with fewer activations; it is counted in full all the same.
    logits = num_tokens * spec.vocab_size / tp * 10
    return TrainingMemory(
        weights_and_gradients=parameters * weights,
        optimizer=parameters * optimizer,
        activations=layers * per_layer,
        logits=logits,
    )


def engine_memory(cfg: Config, spec: ModelSpec, assumptions: Assumptions) -> EngineMemory:
    """Of one GPU of a TensorRT-LLM replica."""
    sizes = cfg.engine.trtllm
    num_gpus = sizes.tensor_parallel_size * sizes.pipeline_parallel_size
    weights = 2 * num_parameters(spec) / num_gpus
    free = assumptions.gpu_memory_gb * 1e9 - weights - OVERHEAD_BYTES / 2
    cache = max(0.0, free * sizes.free_gpu_memory_fraction)
    # Keys and values, two bytes each; groups are divided by tensor parallelism, layers by the pipeline.
    per_token = 2 * 2 * spec.num_layers * spec.num_query_groups * spec.head_dim / num_gpus
    return EngineMemory(weights=weights, kv_cache=cache, num_cached_tokens=int(cache / per_token))


def num_engine_gpus(cfg: Config) -> int:
    """Of all replicas, on all of the engine's nodes."""
    sizes = cfg.engine.trtllm
    return sizes.num_replicas * sizes.tensor_parallel_size * sizes.pipeline_parallel_size


def flops_per_token(spec: ModelSpec, *, sequence_length: float, forward_passes: float) -> float:
    """Model FLOPs: 2 a parameter and token in each matrix product of a forward pass, and attention [N, eq. 3].

    A training step is three forward passes; with recomputed activations four; DPO's reference adds one.
    """
    matrices = spec.num_layers * _layer_parameters(spec) + spec.vocab_size * spec.hidden_size
    # Scores and their product with the values, 2 FLOPs each; causal masking, which halves it, is not counted,
    # as is Megatron's habit.
    attention = 4 * spec.num_layers * sequence_length * spec.num_attention_heads * spec.head_dim
    return forward_passes * (2 * matrices + attention)


def training_hours(num_flops: float, *, num_gpus: int, tflops_per_gpu: float) -> float:
    """Compute alone [N, eq. 4]."""
    return num_flops / (num_gpus * tflops_per_gpu * 1e12) / 3600


def pipeline_efficiency(optim: OptimConfig, trainer: TrainerConfig) -> float:
    """Share of the time in which a stage works: m / (m + p - 1) for m micro-batches [N, 2.2.1]."""
    num_micro_batches = optim.global_batch_size // (trainer.micro_batch_size * trainer.data_parallel_size)
    return num_micro_batches / (num_micro_batches + trainer.pipeline_model_parallel_size - 1)


def checkpoint_bytes(trainer: TrainerConfig, spec: ModelSpec) -> float:
    """One checkpoint of a training: weights, float32 masters (also of float32 weights) and both moments.

    Measured on a CPU: 2.1 GB for the 134.5M parameters of SmolLM2-135M in float32; this gives 2.15 GB.
    """
    weights = 2 if trainer.precision == "bf16-O2" else 4
    return num_parameters(spec) * (weights + 4 + 8)


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
    rate = a.peak_tflops * a.training_mfu * pipeline_efficiency(optim, cfg.trainer)
    num_steps = num_rows // optim.global_batch_size * optim.max_epochs
    num_saves = num_steps // optim.save_interval + 1
    saving = num_saves * checkpoint_bytes(cfg.trainer, spec) / (a.storage_gb_per_second * 1e9)
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
