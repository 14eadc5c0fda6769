"""Settings of the vLLM engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from nemo_srl.config.check import check
from nemo_srl.engines.served import ServedSettings

_SETTINGS = {
    "dtype": "dtype",
    "gpu_memory_utilization": "gpu_memory_utilization",
    "max_model_len": "max_model_len",
    "max_num_batched_tokens": "max_num_batched_tokens",
    "max_num_seqs": "max_num_seqs",
    "pipeline_parallel_size": "pipeline_parallel_size",
    "tensor_parallel_size": "tensor_parallel_size",
    "data_parallel_size": "num_replicas",
}
"""vLLM's options that are settings of this engine, with the settings' names."""
_FIXED = ("config", "enable_prefix_caching", "generation_config", "host", "model", "port", "served_model_name", "uds")
"""vLLM's options on which this engine relies."""


@dataclass
class VllmSettings(ServedSettings):
    """`engine=vllm`: `vllm serve` on each model. Each replica has TP x PP GPUs."""

    name: str = "vllm"
    command: list[str] = field(default_factory=lambda: ["vllm", "serve"])
    """vLLM's program in an environment of its own, such as `[/envs/vllm/bin/vllm, serve]`. Variables may stand before
    it: `[env, VLLM_CPU_KVCACHE_SPACE=4, /envs/vllm/bin/vllm, serve]`."""
    max_num_seqs: int = 256
    """Sequences that one replica decodes together."""
    max_num_batched_tokens: int | None = None
    """Tokens of all sequences in one forward pass, prompts included. null: vLLM chooses for the GPU."""
    max_model_len: int | None = None
    """Tokens of one prompt and its completion at most. null: the model's context. vLLM does not start if the memory has
    no room for one such sequence, so lower this for a model with a long context."""
    gpu_memory_utilization: float = 0.9
    """Share of a GPU's memory for weights, keys and values."""
    extra_options: dict[str, Any] = field(default_factory=dict)
    """Further options of `vllm serve`, by their names without dashes: `{quantization: fp8, enforce_eager: true}`. true
    and false give `--name` and `--no-name`, and mappings are written as JSON."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.max_num_seqs >= 1, "engine.max_num_seqs", self.max_num_seqs, "must be at least 1")
        tokens = self.max_num_batched_tokens
        check(tokens is None or tokens >= 1, "engine.max_num_batched_tokens", tokens, "must be null or at least 1")
        share = self.gpu_memory_utilization
        check(0 < share < 1, "engine.gpu_memory_utilization", share, "must be in (0, 1)")
        for name in self.extra_options:
            plain = name.strip("-").replace("-", "_").removeprefix("no_")
            own = _SETTINGS.get(plain, "")
            check(not own, "engine.extra_options", name, f"this is a setting of the engine. Use engine.{own}")
            check(plain not in _FIXED, "engine.extra_options", name, "the engine sets this option itself. Leave it out")
            well = name == plain
            check(
                well, "engine.extra_options", name, f"write the name as {plain!r}, and false for an option with --no-"
            )
