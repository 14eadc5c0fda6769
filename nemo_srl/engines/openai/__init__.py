"""The client of servers with an OpenAI-style API: hosted models, NIM, vLLM, `trtllm-serve`.

    transport.py   one HTTP call: deadlines, retries, the key
    dialects.py    what is sent and read: token ids to /completions, text to /chat/completions
    engine.py      many requests at once, and `GenerationEngine` around it

Raises `ConfigError` before anything is sent for settings that cannot work, `EngineError` for a server that
cannot be reached, refuses, or answers nonsense. Server keys come from an environment variable and are
neither logged nor stored.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from nemo_srl.config import EngineConfig
from nemo_srl.engines.openai.dialects import ChatDialect, CompletionsDialect, Dialect, load_tokenizer
from nemo_srl.engines.openai.engine import OpenAIEngine, ServerSettings
from nemo_srl.errors import ConfigError, DataError
from nemo_srl.models.hf import read_spec
from nemo_srl.protocols import GenerationRequest, SamplingParams

__all__ = ["api_key", "open_openai"]


def open_openai(cfg: EngineConfig, model_dir: Path) -> OpenAIEngine:
    """The server at `engine.base_url`. `model_dir` gives the tokenizer that counts (and makes) token ids."""
    tokenizer = load_tokenizer(model_dir)
    settings = ServerSettings(
        base_urls=[cfg.base_url.rstrip("/")],
        model=cfg.model,
        api_key=api_key(cfg.api_key_env),
        max_concurrency=cfg.max_concurrency,
        timeout_seconds=cfg.timeout_seconds,
        max_retries=cfg.max_retries,
    )
    if cfg.api == "chat":
        chat: Dialect = ChatDialect(tokenizer, cfg.extra_body)
        return OpenAIEngine(settings, chat, check=_check_texts)
    return OpenAIEngine(settings, CompletionsDialect(tokenizer, read_spec(model_dir).eos_token_ids, cfg.extra_body))


def api_key(variable: str) -> str:
    """The key in an environment variable; empty for no variable. Raises `ConfigError` if it is not set."""
    if not variable:
        return ""
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ConfigError(f"engine.api_key_env={variable!r}: this environment variable is not set; put the key there")
    return key


def _check_texts(requests: Sequence[GenerationRequest], params: SamplingParams) -> None:
    if without := [r.key for r in requests if not r.text]:
        raise DataError(f"request {without[0]!r}: has no text, which is what engine.api='chat' sends")
