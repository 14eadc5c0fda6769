"""Generation engines: each serves one model directory behind `protocols.GenerationEngine`.

A backend is imported only when it is asked for, so none needs what another one needs.
"""

from __future__ import annotations

from pathlib import Path

from nemo_srl.config import EngineConfig
from nemo_srl.models.hf import read_spec
from nemo_srl.protocols import GenerationEngine, Service


def open_engine(cfg: EngineConfig, model_dir: Path) -> GenerationEngine:
    """The engine that `cfg.name` names, ready to serve `model_dir`.

    Raises `ConfigError` for a setting the engine cannot work with, `ModelError` for a model directory it
    cannot serve.
    """
    if cfg.name == "embedded":
        from nemo_srl.engines.embedded import EmbeddedEngine

        return EmbeddedEngine(model_dir, dtype=cfg.dtype, max_batch_size=cfg.max_batch_size)
    if cfg.name == "trtllm":
        from nemo_srl.engines.trtllm import open_trtllm

        return open_trtllm(cfg, model_dir)
    from nemo_srl.engines.openai import open_openai

    return open_openai(cfg, model_dir)


def check(cfg: EngineConfig, model_dir: Path) -> None:
    """What can be known of an engine before anything is started on `model_dir`, or on models like it.

    Raises `ConfigError` for a length that the model does not have, or a missing key.
    """
    if cfg.name == "trtllm":
        from nemo_srl.engines.trtllm.requests import max_seq_len

        max_seq_len(cfg, read_spec(model_dir))
    if cfg.name == "openai":
        from nemo_srl.engines.openai import api_key

        api_key(cfg.api_key_env)


def services(cfg: EngineConfig, model_dir: Path, directory: Path) -> tuple[Service, ...]:
    """The servers that a job must run for `open_engine` in its steps; their files are written to `directory`.

    Raises what `check` does.
    """
    check(cfg, model_dir)
    if cfg.name == "trtllm":
        from nemo_srl.engines import trtllm

        return trtllm.services(cfg, model_dir, directory)
    return ()
