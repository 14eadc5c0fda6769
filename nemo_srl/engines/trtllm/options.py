"""What TensorRT-LLM is started with: options of its LLM API and flags of `trtllm-serve`, from our configuration.

The names are TensorRT-LLM's. They were read in its sources (`tests/contracts/`), and a test compares everything that is
written here with that record. The servers get the options as a YAML file. The `LLM` class in this process gets them as
keyword arguments.

Why these values: the scheduler's policy is TensorRT-LLM's default. The other one, MAX_UTILIZATION, lost 40% of the
throughput where more sequences were asked for than had room (1.2.1, TensorRT-LLM issue 16827). Block reuse computes a
common beginning of prompts once, such as the prompt of n samples, or a rubric. Padding lets CUDA graphs serve every
batch size. A host cache (`host_cache_size`) is not set on purpose, because it has mixed up prompts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_srl.engines.trtllm.settings import TrtllmSettings


def llm_options(cfg: TrtllmSettings) -> dict[str, Any]:
    """Options of the LLM API beside sizes. `engine.extra_options` is merged over them, at every level."""
    options: dict[str, Any] = {
        "dtype": cfg.dtype,
        "enable_chunked_prefill": True,
        "kv_cache_config": {"enable_block_reuse": True, "free_gpu_memory_fraction": cfg.free_gpu_memory_fraction},
    }
    if cfg.backend == "pytorch":
        options["cuda_graph_config"] = {"enable_padding": True, "max_batch_size": cfg.max_batch_size}
    return merged(options, cfg.extra_options)


def llm_sizes(cfg: TrtllmSettings, *, max_seq_len: int) -> dict[str, int]:
    """The sizes, by their names in the LLM API."""
    return {
        "tensor_parallel_size": cfg.tensor_parallel_size,
        "pipeline_parallel_size": cfg.pipeline_parallel_size,
        "max_batch_size": cfg.max_batch_size,
        "max_num_tokens": cfg.max_num_tokens,
        "max_seq_len": max_seq_len,
    }


def write_options(cfg: TrtllmSettings, directory: Path) -> Path:
    """Write the options to a file that is named after its content. So servers that run keep theirs."""
    from omegaconf import OmegaConf

    text = OmegaConf.to_yaml(OmegaConf.create(llm_options(cfg)))
    path = directory / f"trtllm_options-{hashlib.sha256(text.encode()).hexdigest()[:8]}.yaml"
    path.write_text(text)
    return path


def serve_command(cfg: TrtllmSettings, model_dir: Path, options_path: Path, *, max_seq_len: int) -> list[str]:
    """The command line of one replica. The launcher replaces `{host}` and `{port}`."""
    sizes = llm_sizes(cfg, max_seq_len=max_seq_len)
    return [
        *cfg.command, str(model_dir),
        "--host", "{host}",
        "--port", "{port}",
        "--backend", cfg.backend,
        "--tp_size", str(sizes["tensor_parallel_size"]),
        "--pp_size", str(sizes["pipeline_parallel_size"]),
        "--max_batch_size", str(sizes["max_batch_size"]),
        "--max_num_tokens", str(sizes["max_num_tokens"]),
        "--max_seq_len", str(sizes["max_seq_len"]),
        "--extra_llm_api_options", str(options_path),
    ]  # fmt: skip


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over`. Where both have a mapping, these are merged in the same way."""
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        result[key] = merged(old, value) if both else value  # type: ignore[arg-type]
    return result
