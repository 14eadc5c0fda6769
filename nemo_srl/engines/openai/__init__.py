"""The client of servers with an OpenAI-style API: hosted models, NIM, vLLM, and TensorRT-LLM's own.

    settings.py    what can be set
    transport.py   one HTTP call: deadlines, retries, the key
    refusals.py    whether a server's error is about one request, or about all of them
    dialects.py    what it sends and reads: token ids to /completions, text to /chat/completions, or a conversation to
                   /classify
    engine.py      many requests at once, and `GenerationEngine` around it

Raises `ConfigError` before anything is sent, for settings that cannot work. Raises `EngineError` for a server that
cannot be reached, refuses everything, or answers nothing but nonsense. A server's key comes from an environment
variable. It is neither logged nor stored.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from nemo_srl import markers
from nemo_srl.engines import EngineBackend
from nemo_srl.engines.openai.settings import OpenAISettings
from nemo_srl.errors import ConfigError
from nemo_srl.protocols import GenerationEngine, GenerationRequest, SamplingParams
from nemo_srl.records import FinishReason

log = logging.getLogger(__name__)


def _open(settings: OpenAISettings, model_dir: Path) -> GenerationEngine:
    """An engine on the server at `engine.base_url`. Its tokens are counted with the tokenizer of `model_dir`."""
    from nemo_srl.engines.openai.dialects import ChatDialect, ClassifyDialect, CompletionsDialect
    from nemo_srl.engines.openai.engine import OpenAIEngine, ServerSettings
    from nemo_srl.models.hf import read_spec
    from nemo_srl.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(model_dir)
    server = ServerSettings(
        base_urls=[settings.base_url.rstrip("/")],
        model=settings.model,
        api_key=api_key(settings.api_key_env),
        client=settings,
    )
    broken_up = markers.for_servers(markers.of(tokenizer).strings)
    if settings.api == "chat":
        # No probe: a hosted chat costs money, and whatever the probe would find out shows in the answers as well.
        chat = ChatDialect(tokenizer, settings.extra_body, markers=broken_up)
        return OpenAIEngine(server, chat, check=_check_text, warn=log.warning)
    if settings.api == "classify":
        return OpenAIEngine(server, ClassifyDialect(settings.extra_body, broken_up), check=_check_rated)
    completions = CompletionsDialect(tokenizer, read_spec(model_dir).eos_token_ids, settings.extra_body)
    return OpenAIEngine(server, completions, probe=True, warn=log.warning)


def api_key(variable: str) -> str:
    """The key in an environment variable; empty for no variable. Raises `ConfigError` if it is not set."""
    if not variable:
        return ""
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ConfigError(f"engine.api_key_env={variable!r}: this environment variable is not set. Put the key there.")
    return key


def _check(settings: OpenAISettings, model_dir: Path) -> None:
    api_key(settings.api_key_env)


def _check_text(request: GenerationRequest, params: SamplingParams) -> tuple[FinishReason, str] | None:
    return None if request.text else ("refused", "it has no text, and engine.api='chat' sends texts")


def _check_rated(request: GenerationRequest, params: SamplingParams) -> tuple[FinishReason, str] | None:
    reason = "it is no conversation that ends with an answer, and engine.api='classify' rates only those"
    return None if request.earlier_turns and not request.text else ("refused", reason)


BACKEND = EngineBackend(
    settings=OpenAISettings,
    decisive=("base_url", "model", "api", "extra_body"),
    open=_open,
    check=_check,
    has_own_template=lambda settings: settings.api != "completions",
)
