"""Settings of the generation engines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nemo_srl.config.check import check


@dataclass
class TrtllmConfig:
    """How `engine.name=trtllm` starts `trtllm-serve`: R replicas of TP x PP GPUs each."""

    command: list[str] = field(default_factory=lambda: ["trtllm-serve"])
    """Program and what must precede it. Under Slurm, TensorRT-LLM wants
    `[mpirun, -n, "1", --oversubscribe, --allow-run-as-root, trtllm-serve]`."""
    in_process: bool = False
    """Use TensorRT-LLM's `LLM` class in the stage's own process instead of servers; one replica."""
    num_replicas: int = 1
    """Servers, each with the whole model. Placement, like all sizes here."""
    num_nodes: int = 1
    """Nodes that share the replicas evenly; a replica lies on one node. More than one needs a cluster's launcher."""
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    backend: str = "pytorch"
    """pytorch, _autodeploy or tensorrt (gone since TensorRT-LLM 1.3)."""
    max_num_tokens: int = 8192
    """Tokens of all sequences in one forward pass, prompts included."""
    max_seq_len: int | None = None
    """Prompt and completion of one request, in tokens; null: the model's context."""
    free_gpu_memory_fraction: float = 0.9
    """Share of the memory that the weights leave free, used for keys and values."""
    extra_options: dict[str, Any] = field(default_factory=dict)
    """More LLM API options by TensorRT-LLM's names, over those that are set for you."""
    start_timeout_seconds: float = 1800
    """Until a server must be healthy; loading 70B weights from shared storage takes minutes."""

    def __post_init__(self) -> None:
        check(bool(self.command), "engine.trtllm.command", self.command, "must name a program")
        for key in ("num_replicas", "num_nodes", "tensor_parallel_size", "pipeline_parallel_size", "max_num_tokens"):
            check(getattr(self, key) >= 1, f"engine.trtllm.{key}", getattr(self, key), "must be at least 1")
        fraction = self.free_gpu_memory_fraction
        check(0 < fraction < 1, "engine.trtllm.free_gpu_memory_fraction", fraction, "must be in (0, 1)")
        check(
            not self.in_process or self.num_replicas == 1,
            "engine.trtllm.num_replicas",
            self.num_replicas,
            "with engine.trtllm.in_process=true there is one replica",
        )
        check(
            self.num_replicas % self.num_nodes == 0,
            "engine.trtllm.num_nodes",
            self.num_nodes,
            f"must divide engine.trtllm.num_replicas={self.num_replicas}, so that every node has as many",
        )


DECISIVE_FIELDS: Mapping[str, tuple[str, ...]] = {
    "embedded": ("dtype",),
    "trtllm": ("dtype", "trtllm.backend", "trtllm.extra_options"),
    "openai": ("base_url", "model", "api", "extra_body"),
}
"""By the kind of engine; every other field of `EngineConfig` only places the work."""


@dataclass
class EngineConfig:
    """Fields that decide what is generated are part of a stage's identity, if the stage uses the engine
    (`decisive`); the others only place the work."""

    name: str = "embedded"
    """embedded: in process, on the CPU. trtllm: TensorRT-LLM servers that each stage starts on its
    model. openai: a server that is there already (hosted, NIM, vLLM, trtllm-serve), at `base_url`."""
    dtype: str = "bfloat16"
    """Of weights and matrix products: bfloat16 or float32."""
    max_batch_size: int = 32
    """Sequences decoded together."""
    base_url: str = ""
    """openai: where the server's API is, up to and including `/v1`."""
    model: str = ""
    """openai: the model's name on that server; empty: the only one that it lists."""
    api: str = "chat"
    """openai: `chat` sends the text of a prompt as the user's turn, and the server renders it; `completions`
    sends token ids, for a server whose model has the same tokenizer as the policy."""
    extra_body: dict[str, Any] = field(default_factory=dict)
    """openai: fields added to every request, for what only that server knows."""
    api_key_env: str = ""
    """openai: name of the environment variable that holds the key, which is read, sent and never stored."""
    max_concurrency: int = 64
    """trtllm, openai: requests under way at once, over all replicas."""
    timeout_seconds: float = 600
    """trtllm, openai: deadline of one attempt at a request."""
    max_retries: int = 5
    """trtllm, openai: further attempts after connection errors, timeouts, 429 and 5xx."""
    trtllm: TrtllmConfig = field(default_factory=TrtllmConfig)

    def __post_init__(self) -> None:
        known = tuple(DECISIVE_FIELDS)
        check(self.name in known, "engine.name", self.name, f"there is no such engine; choose one of {known}")
        check(
            self.name != "openai" or self.base_url.startswith(("http://", "https://")),
            "engine.base_url",
            self.base_url,
            "engine.name='openai' needs the URL of a server, such as http://host:8000/v1",
        )
        check(self.api in ("chat", "completions"), "engine.api", self.api, "must be 'chat' or 'completions'")
        check(self.max_concurrency >= 1, "engine.max_concurrency", self.max_concurrency, "must be at least 1")
        check(self.timeout_seconds > 0, "engine.timeout_seconds", self.timeout_seconds, "must be above 0")
        check(self.max_retries >= 0, "engine.max_retries", self.max_retries, "must be 0 or above")

    def decisive(self) -> dict[str, Any]:
        """The settings of this kind of engine that decide what it generates, by their dotted names."""

        def value(name: str) -> Any:
            section, _, field_name = name.rpartition(".")
            return getattr(self.trtllm if section else self, field_name)

        return {name: value(name) for name in ("name", *DECISIVE_FIELDS[self.name])}
