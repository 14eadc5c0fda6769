"""What engines share whose servers a stage's job starts on M_t: TensorRT-LLM and vLLM.

The servers are services of the job. The launcher starts them, waits for them, restarts one that ends, hangs or is ill,
and stops them. The engine only talks to them, through the OpenAI-style client. No server loads other weights later: the
next model gets other servers.

A server's model has a name with the digest of its weights. Before anything is asked, every server must list this name.
So a server that was left over, or that belongs to another run, never answers.

What differs between the engines stands in their folders: flags, files, the fields of a request, and what an answer has.
"""

from __future__ import annotations

import json
import logging
import os
import resource
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_srl.config.check import check
from nemo_srl.engines import EngineSize
from nemo_srl.engines.checks import RequestCheck
from nemo_srl.engines.openai.dialects import Dialect
from nemo_srl.engines.openai.settings import ClientSettings
from nemo_srl.errors import ConfigError
from nemo_srl.protocols import SERVICES_VARIABLE, GenerationEngine, GenerationRequest, Service

log = logging.getLogger(__name__)

_NOTICED_SECONDS = 600.0
"""In this time a job notices that a server is ill, and ends it (`launchers/keeper.py`)."""


@dataclass
class ServedSettings(ClientSettings):
    """How servers are started on each M_t. Each replica has TP x PP GPUs."""

    dtype: str = "bfloat16"
    """Of weights and matrix products."""
    command: list[str] = field(default_factory=list)
    """The program, and what stands before it. It may have an environment or a container of its own."""
    num_replicas: int = 1
    """Servers, each with the whole model. This and the other sizes decide no result."""
    num_replicas_small: int | None = None
    """So many of the replicas for small work: the anchor, the evaluation of a model that makes no candidates, and new
    prompts by `prompts.model`. Where more servers of the same model run already, it uses those. null: all of them."""
    num_nodes: int = 1
    """Nodes that share the replicas evenly. A replica is on one node. More than one node needs a cluster's launcher."""
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    start_timeout_seconds: float = 1800
    """A server must be healthy after so long. To load 70B weights from shared storage takes minutes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(bool(self.command), "engine.command", self.command, "must name a program")
        for key in ("num_replicas", "num_nodes", "tensor_parallel_size", "pipeline_parallel_size"):
            check(getattr(self, key) >= 1, f"engine.{key}", getattr(self, key), "must be at least 1")
        check(
            self.num_replicas_small is None or 1 <= self.num_replicas_small <= self.num_replicas,
            "engine.num_replicas_small",
            self.num_replicas_small,
            f"must be null or from 1 to engine.num_replicas={self.num_replicas}",
        )
        check(
            self.num_replicas % self.num_nodes == 0,
            "engine.num_nodes",
            self.num_nodes,
            f"must divide engine.num_replicas={self.num_replicas}, so that every node has as many",
        )


def size_of(cfg: ServedSettings, *, cache_fraction: float, in_process: bool = False) -> EngineSize:
    """The replicas and their sizes. `cache_fraction` is the share of free memory for keys and values."""
    return EngineSize(
        num_replicas=cfg.num_replicas,
        num_replicas_small=cfg.num_replicas_small or 0,
        num_nodes=cfg.num_nodes,
        tensor_parallel_size=cfg.tensor_parallel_size,
        pipeline_parallel_size=cfg.pipeline_parallel_size,
        in_process=in_process,
        cache_fraction=cache_fraction,
    )


def replicas(
    cfg: ServedSettings, prefix: str, command: Sequence[str], env: Mapping[str, str] | None = None, *,
    uses_mpi: bool = False,
) -> tuple[Service, ...]:  # fmt: skip
    """One service for each replica, named `<prefix>0` and so on. All have the same command."""
    return tuple(
        Service(
            name=f"{prefix}{i}",
            command=command,
            health_paths=("/health", "/v1/models"),
            start_timeout_seconds=cfg.start_timeout_seconds,
            num_gpus=cfg.tensor_parallel_size * cfg.pipeline_parallel_size,
            node=i * cfg.num_nodes // cfg.num_replicas,
            env=env or {},
            uses_mpi=uses_mpi,
        )
        for i in range(cfg.num_replicas)
    )


def served_name(model_dir: Path) -> str:
    """The name under which servers have this model. Other weights have another name."""
    from nemo_srl.models.hf import digest

    return f"model-{digest(model_dir)[:16]}"


def open_served(
    cfg: ServedSettings, model_dir: Path, dialect: Dialect, *, prefix: str, check: RequestCheck, probe: bool
) -> GenerationEngine:
    """An engine on the job's replicas, which serve `model_dir`. Raises `ConfigError` if the job has none."""
    from nemo_srl.engines.openai.engine import OpenAIEngine, ServerSettings

    _allow_open_files(cfg.max_concurrency)
    settings = ServerSettings(
        base_urls=[f"{url}/v1" for url in _urls(cfg, prefix, served_name(model_dir))],
        model=served_name(model_dir),
        check_model=True,
        client=cfg,
        restart_seconds=cfg.start_timeout_seconds + _NOTICED_SECONDS,
        use_proxies=False,  # the servers belong to the job, on this node or another one
    )
    return OpenAIEngine(settings, dialect, check=check, probe=probe, warn=log.warning)


def ending_fields(request: GenerationRequest, end_token_ids: Sequence[int]) -> dict[str, Any]:
    """The fields of a request that tell where a sample ends, beside `max_tokens`. Both servers know them."""
    stop = {"stop": list(request.stop), "include_stop_str_in_output": True} if request.stop else {}
    return {"stop_token_ids": list(end_token_ids), **stop}


def sequence_limit(key: str, asked: int | None, context: int) -> int:
    """The most tokens that a prompt and its completion may have together. Raises `ConfigError`.

    `asked` is the setting `engine.<key>`, and `context` the model's limit.
    """
    if asked is not None and asked > context:
        raise ConfigError(f"engine.{key}={asked}: the model's context has {context} tokens. Lower it.")
    return context if asked is None else asked


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


def _urls(cfg: ServedSettings, prefix: str, name: str) -> list[str]:
    """The job's replicas, in the order of their numbers: `trtllm-10` comes after `trtllm-9`."""
    found: dict[str, str] = json.loads(os.environ.get(SERVICES_VARIABLE, "{}"))
    names = sorted((n for n in found if n.startswith(prefix)), key=lambda n: (len(n), n))
    if not names:
        raise ConfigError(
            f"engine.name={prefix.rstrip('-')!r}: this process has no servers. A stage's launcher starts them and "
            f"names them in {SERVICES_VARIABLE}. To run a step by hand, start `{' '.join(cfg.command)}` yourself, let "
            f'it serve the model under the name {name}, and set {SERVICES_VARIABLE}=\'{{"{prefix}0": '
            '"http://127.0.0.1:8000"}\'.'
        )
    return [found[n] for n in names]
