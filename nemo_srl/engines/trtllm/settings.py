"""Settings of the TensorRT-LLM engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from nemo_srl.config.check import check
from nemo_srl.engines.openai.settings import ClientSettings


@dataclass
class TrtllmSettings(ClientSettings):
    """`engine=trtllm`: each stage starts `trtllm-serve` on its model. Each replica has TP x PP GPUs."""

    name: str = "trtllm"
    dtype: str = "bfloat16"
    """Of weights and matrix products."""
    max_batch_size: int = 32
    """Sequences that one replica decodes together."""
    command: list[str] = field(default_factory=lambda: ["trtllm-serve"])
    """The program, and what stands before it. Under Slurm, TensorRT-LLM wants
    `[mpirun, -n, "1", --oversubscribe, --allow-run-as-root, trtllm-serve]`."""
    in_process: bool = False
    """Use TensorRT-LLM's `LLM` class in the stage's own process, with one replica and no servers."""
    num_replicas: int = 1
    """Servers, each with the whole model. This and the other sizes decide no result."""
    num_nodes: int = 1
    """Nodes that share the replicas evenly. A replica is on one node. More than one node needs a cluster's launcher."""
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    backend: str = "pytorch"
    """pytorch, _autodeploy or tensorrt (gone since TensorRT-LLM 1.3)."""
    max_num_tokens: int = 8192
    """Tokens of all sequences in one forward pass, prompts included."""
    max_seq_len: int | None = None
    """Tokens of one prompt and its completion at most. null: the model's context."""
    free_gpu_memory_fraction: float = 0.9
    """Share of the memory that the weights leave free, used for keys and values."""
    extra_options: dict[str, Any] = field(default_factory=dict)
    """Further options of the LLM API, by TensorRT-LLM's names. They win over those that this engine sets."""
    start_timeout_seconds: float = 1800
    """A server must be healthy after so long. To load 70B weights from shared storage takes minutes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(bool(self.command), "engine.command", self.command, "must name a program")
        for key in ("num_replicas", "num_nodes", "tensor_parallel_size", "pipeline_parallel_size", "max_num_tokens"):
            check(getattr(self, key) >= 1, f"engine.{key}", getattr(self, key), "must be at least 1")
        fraction = self.free_gpu_memory_fraction
        check(0 < fraction < 1, "engine.free_gpu_memory_fraction", fraction, "must be in (0, 1)")
        check(
            not self.in_process or self.num_replicas == 1,
            "engine.num_replicas",
            self.num_replicas,
            "with engine.in_process=true there is one replica",
        )
        check(
            self.num_replicas % self.num_nodes == 0,
            "engine.num_nodes",
            self.num_nodes,
            f"must divide engine.num_replicas={self.num_replicas}, so that every node has as many",
        )
