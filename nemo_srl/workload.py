"""How much work a stage is, and the assumptions for a plan. `estimates` turns these into hours and disk space."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from nemo_srl.config import OptimConfig
from nemo_srl.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """Values that no formula gives. The section `assume` of a recipe has those that differ from these defaults, and
    `++assume.KEY=` sets one on the command line of `recipes/plan.py`."""

    gpu_memory_gb: float = 80.0
    peak_tflops: float = 989.0
    """Dense bfloat16 TFLOP/s of one GPU (data sheet of the H100 SXM)."""
    training_mfu: float = 0.35
    """Share of `peak_tflops` that model FLOPs reach if no pipeline stage waits. Megatron's best is 0.47. NeMo-Aligner's
    DPO without Transformer Engine reached 0.40 (one H200, Llama-3.2-1B's shape, bf16-O2, 40,600 tokens/s)."""
    generation_tokens_per_second: float = 1000.0
    """Output tokens per second and GPU of a 70B model in bfloat16. A model of half the size writes twice as many. This
    is half of what TensorRT-LLM publishes for Llama-3.3-70B in FP8 (2,209 on H100, TP2, 1000 tokens in, 1000 out). That
    rate includes the prompts. Here they are counted apart, at `training_mfu`, so the plan is on the safe side."""
    decode_step_seconds: float = 0.02
    """The embedded engine on a GPU: seconds of a decoding step, however small the model is, with everything around it.
    Batches are on average half as large as at their beginning. Not measured."""
    container_minutes: float = 5.0
    """Time until a job's first process runs in its container: each node reads and unpacks an image of some 20 GB. Not
    measured. `launcher=local` has no containers."""
    engine_start_minutes: float = 10.0
    """Time until an engine answers: weights from shared storage, warm-up, CUDA graphs. Not measured."""
    training_start_minutes: float = 5.0
    """Time until a training makes its first step: imports, communicators, weights. Not measured on several nodes. One
    process on an H200 needed 20 s for its imports."""
    queue_minutes: float = 10.0
    """Time that a job of Slurm waits for its nodes. It holds no GPUs then. Not measured: ask your cluster."""
    conversion_gb_per_second: float = 0.5
    """Rate at which one process converts bfloat16 weights between Hugging Face's layout and NeMo's, before and after a
    training. Measured on one CPU core: 0.54 GB of weights in 0.8 to 1.2 s of its time, in either direction."""
    padding: float = 0.1
    """Share of padding in the tokens that a training computes. Measured in the CPU runs of `examples/proof`: 0.06 in
    SFT, 0.07 to 0.10 in DPO."""
    step_overhead_seconds: float = 3.0
    """Time of an optimizer step beside its FLOPs: small batches and the optimizer. Not measured on several nodes. On
    one H200 there was hardly any: with all of it, DPO reached the `training_mfu` of 0.40 above."""
    storage_gb_per_second: float = 10.0
    """Rate at which all nodes together write a checkpoint."""
    num_sft_rows: int = 4830
    pairs_per_prompt: float = 0.66
    """Share of prompts that remain after ties and unreadable verdicts (the paper: 3,964 of about 6,000)."""
    prompts_kept: float = 0.5
    """Share of generated prompts that pass the filters."""
    mean_prompt_tokens: float = 60.0
    mean_response_tokens: float = 400.0
    mean_rubric_tokens: float = 450.0
    mean_verdict_tokens: float = 120.0


def assumptions(given: Mapping[str, float]) -> Assumptions:
    """The assumptions with the values of a recipe's section `assume`. Raises `ConfigError` for an unknown one."""
    known = {f.name for f in fields(Assumptions)}
    if unknown := sorted(set(given) - known):
        names = ", ".join(sorted(known))
        raise ConfigError(f"assume.{unknown[0]}={given[unknown[0]]:g}: no such assumption. There are {names}.")
    return Assumptions(**{key: type(getattr(Assumptions, key))(value) for key, value in given.items()})


@dataclass(frozen=True, kw_only=True)
class Generated:
    """Tokens that an engine generates, and those that it reads: prompts that samples or verdicts share count once."""

    num_tokens: float
    num_prompt_tokens: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Trained:
    """Rows that a trainer trains on."""

    optim: OptimConfig
    num_rows: float
    row_tokens: float
    """Tokens of all sequences of a row."""
    num_sequences: int
    """Sequences of a row: 1, or 2 for a pair."""
    shared_tokens: float = 0.0
    """Of `row_tokens`: those of a prompt that the two sequences of a pair share. A platform may compute them once."""
    num_reference_passes: float = 0.0
    """Forward passes besides the training steps, for each time that a row is trained on: DPO's reference adds one per
    row, once."""


Work = Generated | Trained
