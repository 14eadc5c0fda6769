"""TensorRT-LLM: `trtllm-serve` replicas on a Hugging Face directory, or its `LLM` class in this process.

    settings.py     what can be set
    options.py      every flag and option that TensorRT-LLM gets
    requests.py     what it is asked: token ids, stop tokens, and limits that are checked before
    in_process.py   the `LLM` class behind `GenerationEngine`

The servers are services of the stage's job (`services`). The launcher starts them on M_t, waits for them and stops
them. The engine only talks to them, through the OpenAI-style client. No TensorRT engine is built or refitted: a server
loads the directory, and the next iteration starts another server.

Raises `ConfigError` for bad settings and for a job without servers, and `EngineError` for errors of the servers.
Prompts over the context are not sent, since one such prompt can end the whole list. They give completions without an
answer.

Contract tests and a stand-in server check this against TensorRT-LLM's sources (1.2). `tests/contracts/` says what was
read. `containers/record_trtllm_contract.py` records it anew inside the container.
"""

from __future__ import annotations

import json
import logging
import os
import resource
from pathlib import Path

from nemo_srl.engines import EngineBackend, EngineSize
from nemo_srl.engines.trtllm.settings import TrtllmSettings
from nemo_srl.errors import ConfigError
from nemo_srl.protocols import SERVICES_VARIABLE, GenerationEngine, Service

SERVICE_PREFIX = "trtllm-"
OPTIONS_FILE = "trtllm_options.yaml"

log = logging.getLogger(__name__)


def services(cfg: TrtllmSettings, model_dir: Path, directory: Path) -> tuple[Service, ...]:
    """The replicas that a job needs, as services. Writes their options to a file in `directory`."""
    from omegaconf import OmegaConf

    from nemo_srl.engines.trtllm.options import llm_options, serve_command
    from nemo_srl.engines.trtllm.requests import max_seq_len
    from nemo_srl.models.hf import read_spec

    if cfg.in_process:
        return ()
    directory.mkdir(parents=True, exist_ok=True)
    options_path = directory / OPTIONS_FILE
    options_path.write_text(OmegaConf.to_yaml(OmegaConf.create(llm_options(cfg))))
    command = serve_command(cfg, model_dir, options_path, max_seq_len=max_seq_len(cfg, read_spec(model_dir)))
    return tuple(
        Service(
            name=f"{SERVICE_PREFIX}{i}",
            command=command,
            health_paths=("/health", "/v1/models"),
            start_timeout_seconds=cfg.start_timeout_seconds,
            num_gpus=_size(cfg).gpus_per_replica,
            node=i * cfg.num_nodes // cfg.num_replicas,
        )
        for i in range(cfg.num_replicas)
    )


def _open(cfg: TrtllmSettings, model_dir: Path) -> GenerationEngine:
    """An engine on the job's replicas, which serve `model_dir`."""
    from nemo_srl.engines.openai.dialects import CompletionsDialect
    from nemo_srl.engines.openai.engine import OpenAIEngine, ServerSettings
    from nemo_srl.engines.trtllm.in_process import InProcessEngine
    from nemo_srl.engines.trtllm.requests import TrtllmDialect, max_seq_len, prompt_check
    from nemo_srl.models.hf import read_spec
    from nemo_srl.models.tokenizer import load_tokenizer

    if cfg.in_process:
        return InProcessEngine(cfg, model_dir)
    spec = read_spec(model_dir)
    _allow_open_files(cfg.max_concurrency)
    tokenizer = load_tokenizer(model_dir)
    settings = ServerSettings(
        base_urls=[f"{url}/v1" for url in _urls()],
        client=cfg,
        use_proxies=False,  # the servers belong to the job, on this node or another one
    )
    dialect = TrtllmDialect(CompletionsDialect(tokenizer, spec.eos_token_ids))
    return OpenAIEngine(settings, dialect, check=prompt_check(max_seq_len(cfg, spec)), probe=True, warn=log.warning)


def _allow_open_files(num_connections: int) -> None:
    """Raise this process's limit of open files, which is 1024 on most machines. Raises `ConfigError` if it may not."""
    needed = num_connections + 256
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise ConfigError(
            f"engine.max_concurrency={num_connections}: every request under way is an open file, and this machine "
            f"allows {hard} in a process (ulimit -Hn). Lower max_concurrency, or have the limit raised."
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _urls() -> list[str]:
    """The job's replicas, in the order of their numbers: `trtllm-10` comes after `trtllm-9`."""
    found: dict[str, str] = json.loads(os.environ.get(SERVICES_VARIABLE, "{}"))
    names = sorted((name for name in found if name.startswith(SERVICE_PREFIX)), key=lambda n: (len(n), n))
    if not names:
        raise ConfigError(
            f"engine.name='trtllm': this process has no TensorRT-LLM servers. A stage's launcher starts them and "
            f"names them in {SERVICES_VARIABLE}. To run a step by hand, start `trtllm-serve` yourself and set "
            f'{SERVICES_VARIABLE}=\'{{"{SERVICE_PREFIX}0": "http://127.0.0.1:8000"}}\'.'
        )
    return [found[name] for name in names]


def _check(cfg: TrtllmSettings, model_dir: Path) -> None:
    from nemo_srl.engines.trtllm.requests import max_seq_len
    from nemo_srl.models.hf import read_spec

    max_seq_len(cfg, read_spec(model_dir))


def _size(cfg: TrtllmSettings) -> EngineSize:
    return EngineSize(
        num_replicas=cfg.num_replicas,
        num_nodes=cfg.num_nodes,
        tensor_parallel_size=cfg.tensor_parallel_size,
        pipeline_parallel_size=cfg.pipeline_parallel_size,
        in_process=cfg.in_process,
        cache_fraction=cfg.free_gpu_memory_fraction,
    )


BACKEND = EngineBackend(
    settings=TrtllmSettings,
    decisive=("dtype", "backend", "extra_options"),
    open=_open,
    check=_check,
    services=services,
    size=_size,
    formerly={"trtllm.": ""},
)
