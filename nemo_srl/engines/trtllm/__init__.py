"""TensorRT-LLM: `trtllm-serve` replicas on a Hugging Face directory, or its `LLM` class in this process.

    settings.py     what can be set
    options.py      every flag and option that TensorRT-LLM gets
    requests.py     what it is asked: token ids, stop tokens, and limits that are checked before
    in_process.py   the `LLM` class behind `GenerationEngine`

The servers are services of the job that runs the stage (`../served.py`). No TensorRT engine is built or refitted: a
server loads the directory, and the next iteration starts another server.

Raises `ConfigError` for bad settings and for a job without servers, and `EngineError` for errors of the servers.
Prompts over the context are not sent, since one such prompt can end the whole list. They give completions without an
answer.

Contract tests and a stand-in server check this against TensorRT-LLM's sources (1.2). `tests/contracts/` says what was
read. `containers/record_trtllm_contract.py` records it anew inside the container.
"""

from __future__ import annotations

import os
from pathlib import Path

from nemo_srl.engines import EngineBackend, EngineSize
from nemo_srl.engines.served import open_served, replicas, served_name, size_of
from nemo_srl.engines.trtllm.settings import TrtllmSettings
from nemo_srl.protocols import GenerationEngine, Service

SERVICE_PREFIX = "trtllm-"
PROGRAM = "trtllm-serve"


def services(cfg: TrtllmSettings, model_dir: Path, directory: Path) -> tuple[Service, ...]:
    """The replicas that a job needs, as services. Their options and a link to the model go to `directory`."""
    from nemo_srl.engines.trtllm.options import serve_command, write_options
    from nemo_srl.engines.trtllm.requests import max_seq_len
    from nemo_srl.models.hf import read_spec

    if cfg.in_process:
        return ()
    directory.mkdir(parents=True, exist_ok=True)
    command = serve_command(
        cfg,
        _link(model_dir.absolute(), directory / served_name(model_dir)),
        write_options(cfg, directory),
        max_seq_len=max_seq_len(cfg, read_spec(model_dir)),
    )
    # A user who puts something before the program has chosen how it starts.
    return replicas(cfg, SERVICE_PREFIX, command, uses_mpi=Path(cfg.command[0]).name == PROGRAM)


def _link(model_dir: Path, link: Path) -> Path:
    """`link` leads to `model_dir`. `trtllm-serve` names its model after the last part of the path that it gets."""
    if not (link.is_symlink() and link.readlink() == model_dir):
        new = link.with_name(f".{link.name}-{os.getpid()}")
        new.unlink(missing_ok=True)
        new.symlink_to(model_dir)
        new.replace(link)
    return link


def _open(cfg: TrtllmSettings, model_dir: Path) -> GenerationEngine:
    """An engine on the job's replicas, which serve `model_dir`."""
    from nemo_srl.engines.openai.dialects import CompletionsDialect
    from nemo_srl.engines.trtllm.in_process import InProcessEngine
    from nemo_srl.engines.trtllm.requests import TrtllmDialect, max_seq_len, prompt_check
    from nemo_srl.models.hf import read_spec
    from nemo_srl.models.tokenizer import load_tokenizer

    if cfg.in_process:
        return InProcessEngine(cfg, model_dir)
    spec = read_spec(model_dir)
    dialect = TrtllmDialect(CompletionsDialect(load_tokenizer(model_dir), spec.eos_token_ids))
    check = prompt_check(max_seq_len(cfg, spec))
    return open_served(cfg, model_dir, dialect, prefix=SERVICE_PREFIX, check=check, probe=True)


def _check(cfg: TrtllmSettings, model_dir: Path) -> None:
    from nemo_srl.engines.trtllm.requests import max_seq_len
    from nemo_srl.models.hf import read_spec

    max_seq_len(cfg, read_spec(model_dir))


def _size(cfg: TrtllmSettings) -> EngineSize:
    return size_of(cfg, cache_fraction=cfg.free_gpu_memory_fraction, in_process=cfg.in_process)


BACKEND = EngineBackend(
    settings=TrtllmSettings,
    decisive=("dtype", "backend", "extra_options"),
    open=_open,
    check=_check,
    services=services,
    size=_size,
    formerly={"trtllm.": ""},
)
