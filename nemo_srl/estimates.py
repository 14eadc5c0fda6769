"""Estimates what a run needs: memory of an engine, tokens, hours, disk. Only arithmetic, without torch or files.

Each stage says how much it generates or trains (`Stage.work`). The trainer says how much memory a training needs on a
GPU (`TrainerBackend.memory`). The engine says how many GPUs it has (`EngineBackend.size`). The launcher says what a run
holds (`LauncherBackend.holds`). `server_starts` says how often servers start, and on how many GPUs a stage finds them.
Source: [N] Narayanan et al. 2021, arXiv 2104.04473, equation 4.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

from nemo_srl import server_starts
from nemo_srl.config import Config
from nemo_srl.engines import EngineSize, engine_backend
from nemo_srl.launchers import Holding, launcher_backend
from nemo_srl.models.arithmetic import flops_per_token, num_parameters
from nemo_srl.models.spec import ModelSpec
from nemo_srl.stages import LOOP, Stage, stage_named
from nemo_srl.trainers import trainer_backend
from nemo_srl.workload import Assumptions, Generated, Trained

ENGINE_OVERHEAD_BYTES = 3e9
"""CUDA context, NCCL's buffers, workspaces and fragmentation of an engine."""
ONE_GPU_ENGINE_OVERHEAD_BYTES = 2e9
"""The same for the embedded engine: the CUDA context, what sampling needs of the whole batch's logits, CUDA graphs, and
fragmentation. An assumption; it was not measured."""


@dataclass(frozen=True, kw_only=True)
class EngineMemory:
    """Bytes on one GPU of an engine, and the sequences that it has room for."""

    weights: float
    kv_cache: float
    overhead: float
    num_cached_tokens: int
    """Tokens in the cache of a replica."""
    num_sequences: int
    """Sequences at once per replica."""

    @property
    def total(self) -> float:
        return self.weights + self.kv_cache + self.overhead


@dataclass(frozen=True, kw_only=True)
class StageEstimate:
    name: str
    times: int
    """How often the run has this stage."""
    num_tokens: float = 0.0
    """Tokens that it trains on or generates each time."""
    num_gpus: int
    """GPUs that are held, used or not."""
    hours: float
    """Hours each time."""
    disk_bytes: float = 0.0
    """Bytes that it leaves each time. While a training runs, it needs two checkpoints more."""
    is_job: bool = False
    """Whether it is a job that waits in Slurm's queue each time."""

    @property
    def gpu_hours(self) -> float:
        return self.hours * self.num_gpus


def engine_size(cfg: Config) -> EngineSize:
    """The number of GPUs, replicas and nodes of the run's engine."""
    return engine_backend(cfg.engine).size(cfg.engine)


def engine_memory(cfg: Config, spec: ModelSpec, assumptions: Assumptions) -> EngineMemory:
    """The memory of one GPU of a replica with bfloat16 weights.

    An engine with a `cache_fraction` serves as many sequences as have room. The embedded engine has a cache for all
    sequences of a batch, each as long as the longest: a judge's prompt and its verdict. Beside it, the distinct prompts
    of the batch have their keys and values once more while they are computed. Verdicts on one answer share a prompt.
    """
    size, a = engine_size(cfg), assumptions
    weights = 2 * num_parameters(spec) / size.gpus_per_replica
    # Keys and values, two bytes each. Tensor parallelism divides the groups, the pipeline divides the layers.
    per_token = 2 * 2 * spec.num_layers * spec.num_query_groups * spec.head_dim / size.gpus_per_replica
    if num_sequences := size.max_batch_size:
        prompt = a.mean_rubric_tokens + a.mean_prompt_tokens + cfg.candidates.max_tokens
        num_prompts = num_sequences / cfg.judge.num_judgements
        num_tokens = int(num_sequences * (prompt + cfg.judge.max_tokens) + num_prompts * prompt)
        overhead = ONE_GPU_ENGINE_OVERHEAD_BYTES
    else:
        overhead = ENGINE_OVERHEAD_BYTES
        free = a.gpu_memory_gb * 1e9 - weights - overhead
        num_tokens = int(max(0.0, free * size.cache_fraction) / per_token)
        num_sequences = int(num_tokens / (a.mean_rubric_tokens + a.mean_response_tokens))
    return EngineMemory(
        weights=weights, kv_cache=num_tokens * per_token, overhead=overhead, num_cached_tokens=num_tokens,
        num_sequences=num_sequences,
    )  # fmt: skip


def host_bytes(cfg: Config, spec: ModelSpec) -> float:
    """Bytes of a node's memory that a training needs at least: offloaded moments, and the checkpoint that it writes.

    A conversion needs less (`models/convert.py`). What engines need while they read the weights is not counted.
    """
    backend, trainer = trainer_backend(cfg.trainer), cfg.trainer
    moments = max(backend.memory(optim, trainer, spec).host for optim in (cfg.sft, cfg.dpo))
    # Megatron copies what a rank saves to the host's memory before it writes.
    copies = backend.checkpoint_bytes(trainer, spec) / trainer.world_size
    return float(trainer.num_ranks_per_node * (moments + copies))


def training_hours(num_flops: float, *, num_gpus: int, tflops_per_gpu: float) -> float:
    """Hours of the computation alone [N, eq. 4]."""
    return num_flops / (num_gpus * tflops_per_gpu * 1e12) / 3600


def times_of(stage: Stage[Any], cfg: Config) -> int:
    """How often a run has the stage."""
    return {"run": 1, "iteration": cfg.num_iterations, "model": cfg.num_iterations + 2}[stage.per]


def num_passes(cfg: Config, work: Trained, spec: ModelSpec) -> float:
    """Forward passes that take as long as all that a training does with a row, each time that it trains on it."""
    return trainer_backend(cfg.trainer).step_passes(cfg.trainer, spec) + work.num_reference_passes


def holding(cfg: Config) -> Holding:
    """What a run holds (`LauncherBackend.holds`). A recipe for several nodes without a launcher is planned as jobs."""
    holds = launcher_backend(cfg.launcher).holds
    needs_cluster = max(cfg.trainer.num_nodes, engine_size(cfg).num_nodes) > 1
    return "jobs" if holds == "machine" and needs_cluster else holds


def stages(cfg: Config, spec: ModelSpec, assumptions: Assumptions) -> list[StageEstimate]:
    """Every stage of the run that generates or trains, in the order of `stages.LOOP`, and what starts before them.

    A stage that the run has on servers of different sizes is there once for each size.
    """
    served = server_starts.served(cfg)
    starts = Counter(x.num_gpus for x in served if x.starts)
    made = [_starts(num_gpus, times, cfg, assumptions) for num_gpus, times in sorted(starts.items())]
    for stage in map(stage_named, LOOP):
        work = stage.work(cfg, assumptions)
        if isinstance(work, Trained):
            made += _training(stage.name, times_of(stage, cfg), work, cfg, spec, assumptions)
        elif work is not None and (sizes := Counter(x.num_gpus for x in served if x.stage == stage.name)):
            for num_gpus, times in sorted(sizes.items()):
                hours = _hours_of_prompts(work, num_gpus, spec, assumptions)
                hours += work.num_tokens / _rate(num_gpus, spec, assumptions) / 3600
                made.append(_generated(stage.name, times, work, num_gpus, hours))
        elif work is not None:
            made.append(_generation(stage.name, times_of(stage, cfg), work, cfg, spec, assumptions))
    return _in_one_allocation(made, assumptions) if holding(cfg) == "allocation" else made


def num_queued(cfg: Config, found: list[StageEstimate]) -> int:
    """How many jobs wait in Slurm's queue. One allocation waits once."""
    return 1 if holding(cfg) == "allocation" else sum(s.times for s in found if s.is_job)


def num_server_starts(cfg: Config) -> int:
    """How often the run starts servers, all replicas of a model together."""
    return sum(x.starts for x in server_starts.served(cfg))


def saved_by_sharing(cfg: Config, assumptions: Assumptions) -> tuple[int, float, float]:
    """Beside a start for each stage that asks a model, with all replicas: starts, minutes and GPU-hours that are saved.

    `engine=openai` and engines in a stage's own process have no servers, so nothing is saved.
    """
    served = server_starts.served(cfg)
    num_fewer = len(served) - num_server_starts(cfg)
    full = max((x.num_gpus for x in served), default=0)
    fewer = len(served) * full - sum(x.num_gpus for x in served if x.starts)
    if holding(cfg) == "allocation":
        fewer = num_fewer * max(full, cfg.trainer.world_size)
    minutes = 60 * _start_hours(cfg, assumptions.engine_start_minutes, assumptions)
    return num_fewer, num_fewer * minutes, fewer * minutes / 60


def _start_hours(cfg: Config, minutes: float, a: Assumptions) -> float:
    """Hours until a job works that needs so many minutes in its container. An allocation has its containers already."""
    return (minutes + (a.container_minutes if holding(cfg) == "jobs" else 0.0)) / 60


def _in_one_allocation(found: list[StageEstimate], a: Assumptions) -> list[StageEstimate]:
    """The same stages in one allocation. It holds its GPUs all the time, and each node unpacks both images once."""
    held = max(s.num_gpus for s in found)
    images = StageEstimate(name="containers", times=2, num_gpus=held, hours=a.container_minutes / 60)
    return [images, *(replace(s, num_gpus=held, is_job=False) for s in found)]


def _starts(num_gpus: int, times: int, cfg: Config, a: Assumptions) -> StageEstimate:
    hours, is_job = _start_hours(cfg, a.engine_start_minutes, a), holding(cfg) == "jobs"
    return StageEstimate(name="start servers", times=times, num_gpus=num_gpus, hours=hours, is_job=is_job)


def _training(
    name: str, times: int, work: Trained, cfg: Config, spec: ModelSpec, a: Assumptions
) -> list[StageEstimate]:  # fmt: skip
    """The training and, if they are jobs of their own (`launchers/slurm`), the conversions before and after it."""
    trainer, are_jobs = cfg.trainer, holding(cfg) == "jobs"
    conversion = 2 * num_parameters(spec) / (a.conversion_gb_per_second * 1e9) / 3600
    hours = _start_hours(cfg, a.training_start_minutes, a) + _step_hours(work, cfg, spec, a)
    training = StageEstimate(
        name=name, times=times, num_tokens=_num_trained(work), num_gpus=trainer.world_size, hours=hours,
        disk_bytes=2 * num_parameters(spec), is_job=are_jobs,
    )  # fmt: skip
    if not are_jobs or trainer.num_nodes == 1:
        return [replace(training, hours=hours + 2 * conversion)]
    one_node = replace(
        training, num_tokens=0.0, num_gpus=trainer.num_ranks_per_node, hours=_start_hours(cfg, 0.0, a) + conversion,
        disk_bytes=0.0,
    )  # fmt: skip
    return [replace(one_node, name=f"{name}-prepare"), training, replace(one_node, name=f"{name}-export")]


def _num_trained(work: Trained) -> float:
    """Tokens that a training trains on, without padding."""
    return work.num_rows * work.row_tokens * work.optim.max_epochs


def _step_hours(work: Trained, cfg: Config, spec: ModelSpec, a: Assumptions) -> float:
    """Hours of a training's steps and checkpoints."""
    optim, trainer = work.optim, cfg.trainer
    length = work.row_tokens / work.num_sequences
    fixed = trainer_backend(trainer).fixed_length(optim, trainer)
    # With one length for all sequences, it is known how much is padding. Otherwise a usual share is.
    num_computed = _num_trained(work) * (fixed / length if fixed else 1 / (1 - a.padding))
    flops = num_computed * flops_per_token(
        spec, sequence_length=fixed or length, forward_passes=num_passes(cfg, work, spec)
    )
    rate = a.peak_tflops * a.training_mfu * trainer.pipeline_efficiency(optim)
    num_steps = work.num_rows // optim.global_batch_size * optim.max_epochs
    num_saves = num_steps // optim.save_interval + 1
    saving = num_saves * trainer_backend(trainer).checkpoint_bytes(trainer, spec) / (a.storage_gb_per_second * 1e9)
    computing = training_hours(flops, num_gpus=trainer.world_size, tflops_per_gpu=rate)
    return computing + (num_steps * a.step_overhead_seconds + saving) / 3600


def _generation(name: str, times: int, work: Generated, cfg: Config, spec: ModelSpec, a: Assumptions) -> StageEstimate:
    """By an engine without servers: it starts with each stage."""
    size = engine_size(cfg)
    num_gpus = size.num_gpus or 1
    rate = _rate(num_gpus, spec, a)
    if size.max_batch_size:
        rate = min(rate, size.max_batch_size / 2 / a.decode_step_seconds)
    hours = _start_hours(cfg, a.engine_start_minutes, a) + _hours_of_prompts(work, num_gpus, spec, a)
    made = _generated(name, times, work, num_gpus, hours + work.num_tokens / rate / 3600)
    return replace(made, is_job=holding(cfg) == "jobs")


def _hours_of_prompts(work: Generated, num_gpus: int, spec: ModelSpec, a: Assumptions) -> float:
    """Hours in which an engine reads its prompts."""
    flops = work.num_prompt_tokens * 2 * num_parameters(spec)
    return training_hours(flops, num_gpus=num_gpus, tflops_per_gpu=a.peak_tflops * a.training_mfu)


def _generated(name: str, times: int, work: Generated, num_gpus: int, hours: float) -> StageEstimate:
    # A record takes about six bytes per token of its text.
    return StageEstimate(
        name=name, times=times, num_tokens=work.num_tokens, num_gpus=num_gpus, hours=hours,
        disk_bytes=6 * work.num_tokens,
    )  # fmt: skip


def _rate(num_gpus: int, spec: ModelSpec, a: Assumptions) -> float:
    """Tokens per second."""
    return a.generation_tokens_per_second * 70e9 / num_parameters(spec) * num_gpus
