"""Settings of the TensorRT-LLM engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from nemo_srl.config.check import check
from nemo_srl.engines.served import ServedSettings

BACKENDS = ("pytorch", "_autodeploy")


@dataclass
class TrtllmSettings(ServedSettings):
    """`engine=trtllm`: `trtllm-serve` on each model. Each replica has TP x PP GPUs."""

    name: str = "trtllm"
    max_batch_size: int = 32
    """Sequences that one replica decodes together."""
    command: list[str] = field(default_factory=lambda: ["trtllm-serve"])
    """The program, and what stands before it. In a Slurm job, `mpirun -n 1` is put before a bare `trtllm-serve`, which
    would hang without it."""
    in_process: bool = False
    """Use TensorRT-LLM's `LLM` class in the stage's own process, with one replica and no servers."""
    backend: str = "pytorch"
    """pytorch or _autodeploy. (`tensorrt` needs engines that are built before, and TensorRT-LLM 1.3 has it no more.)"""
    max_num_tokens: int = 8192
    """Tokens of all sequences in one forward pass, prompts included."""
    max_seq_len: int | None = None
    """Tokens of one prompt and its completion at most. null: the model's context."""
    free_gpu_memory_fraction: float = 0.9
    """Share of the memory that the weights leave free, used for keys and values."""
    extra_options: dict[str, Any] = field(default_factory=dict)
    """Further options of the LLM API, by TensorRT-LLM's names. They win over those that this engine sets."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.backend in BACKENDS, "engine.backend", self.backend, f"must be one of {BACKENDS}")
        check(self.max_num_tokens >= 1, "engine.max_num_tokens", self.max_num_tokens, "must be at least 1")
        fraction = self.free_gpu_memory_fraction
        check(0 < fraction < 1, "engine.free_gpu_memory_fraction", fraction, "must be in (0, 1)")
        check(
            not self.in_process or self.num_replicas == 1,
            "engine.num_replicas",
            self.num_replicas,
            "with engine.in_process=true there is one replica",
        )
