"""vLLM: `vllm serve` replicas on a Hugging Face directory.

    settings.py    what can be set
    options.py     every flag that vLLM gets
    requests.py    what it is asked, and what is read from its answers

The servers are services of the job that runs the stage (`../served.py`). vLLM has an environment of its own, because
its packages clash with the trainer's: `engine.command=[/envs/vllm/bin/vllm, serve]`. Nothing of vLLM is imported here.

Raises `ConfigError` for bad settings and for a job without servers, and `EngineError` for errors of the servers.
Prompts over the context are not sent: vLLM would cut their completions short without a word.

Run with vLLM 0.32.0 on a CPU (`make vllm`). `tests/contracts/` has the names that this version knows.
"""

from __future__ import annotations

from pathlib import Path

from nemo_srl.engines import EngineBackend, EngineSize
from nemo_srl.engines.served import open_served, replicas, sequence_limit, served_name, size_of
from nemo_srl.engines.vllm.settings import VllmSettings
from nemo_srl.protocols import GenerationEngine, Service

SERVICE_PREFIX = "vllm-"
ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
"""vLLM reports its use to its makers, unless this forbids it. The model lies on the disk, so nothing is looked up."""


def services(cfg: VllmSettings, model_dir: Path, directory: Path) -> tuple[Service, ...]:
    """The replicas that a job needs, as services."""
    from nemo_srl.engines.vllm.options import serve_command

    command = serve_command(cfg, model_dir, name=served_name(model_dir), max_model_len=_max_model_len(cfg, model_dir))
    return replicas(cfg, SERVICE_PREFIX, command, ENVIRONMENT)


def _open(cfg: VllmSettings, model_dir: Path) -> GenerationEngine:
    """An engine on the job's replicas, which serve `model_dir`."""
    from nemo_srl.engines.checks import length_check
    from nemo_srl.engines.openai.dialects import CompletionsDialect
    from nemo_srl.engines.vllm.requests import VllmDialect
    from nemo_srl.models.hf import read_spec
    from nemo_srl.models.tokenizer import load_tokenizer

    dialect = VllmDialect(CompletionsDialect(load_tokenizer(model_dir), read_spec(model_dir).eos_token_ids))
    check = length_check(_max_model_len(cfg, model_dir), "the model's context, or engine.max_model_len")
    return open_served(cfg, model_dir, dialect, prefix=SERVICE_PREFIX, check=check, probe=False)


def _max_model_len(cfg: VllmSettings, model_dir: Path) -> int:
    from nemo_srl.models.hf import read_spec

    return sequence_limit("max_model_len", cfg.max_model_len, read_spec(model_dir).max_position_embeddings)


def _check(cfg: VllmSettings, model_dir: Path) -> None:
    _max_model_len(cfg, model_dir)


def _size(cfg: VllmSettings) -> EngineSize:
    # vLLM's share is one of all memory, the weights included. So the plan shows a little too much room.
    return size_of(cfg, cache_fraction=cfg.gpu_memory_utilization)


BACKEND = EngineBackend(
    settings=VllmSettings,
    decisive=("dtype", "extra_options"),
    open=_open,
    check=_check,
    services=services,
    size=_size,
)
