"""The flags of `vllm serve`, from our configuration. A test compares them with the record in `tests/contracts/`.

Why these: with prefix caching, a common beginning of prompts is computed once, such as the prompt of n samples, or a
rubric. With `--generation-config vllm`, the sampling settings that some models bring (top-k, a repetition penalty) do
not replace what a request leaves out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_srl.engines.vllm.settings import VllmSettings


def serve_command(cfg: VllmSettings, model_dir: Path, *, name: str, max_model_len: int) -> list[str]:
    """The command line of one replica, whose model is called `name`. The launcher replaces `{host}` and `{port}`."""
    options = {
        "host": "{host}",
        "port": "{port}",
        "served_model_name": name,
        "dtype": cfg.dtype,
        "generation_config": "vllm",
        "enable_prefix_caching": True,
        "max_model_len": max_model_len,
        "max_num_seqs": cfg.max_num_seqs,
        "max_num_batched_tokens": cfg.max_num_batched_tokens,
        "gpu_memory_utilization": cfg.gpu_memory_utilization,
        "tensor_parallel_size": cfg.tensor_parallel_size,
        "pipeline_parallel_size": cfg.pipeline_parallel_size,
        **cfg.extra_options,
    }
    return [*cfg.command, str(model_dir), *(word for key, value in options.items() for word in _flag(key, value))]


def _flag(name: str, value: Any) -> list[str]:
    flag = name.replace("_", "-")
    match value:
        case None:
            return []
        case bool():
            return [f"--{flag}" if value else f"--no-{flag}"]
        case Mapping():
            return [f"--{flag}", json.dumps(value)]
        case list():
            return [f"--{flag}", *map(str, value)]
    return [f"--{flag}", str(value)]
