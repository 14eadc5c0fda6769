"""Which request an error of a server is about: the one that it answers, or all of them.

Servers agree on no code for it, so the codes and the wordings that are in use are looked for. The wordings of long
prompts are those of OpenAI, vLLM, TensorRT-LLM, SGLang, llama.cpp, TGI, Mistral, Anthropic, Google and Groq. Those of
filters are those of OpenAI, Azure, OpenRouter, DashScope and DeepSeek.
"""

from __future__ import annotations

import re
from typing import Any

from nemo_srl.records import FinishReason

_FILTER = re.compile(
    r"content[ _-]?(filter|polic|management|moderation|inspection|exists risk)|responsible ?ai ?policy|moderat(ion|ed)"
    r"|data_inspection_failed|inappropriate content|input was flagged|(rejected|blocked|flagged) .{0,60}safety"
    r"|prohibited[ _]content"
)
_TOO_LONG = re.compile(
    r"context_(length|window)_exceeded|exceed_context_size|string_above_max_length"
    r"|maximum (context|prompt|model|input) length|model'?s context length|(available )?context (size|window)"
    r"|(prompt|input|inputs|request) (is )?too (long|large)|reduce the length"
    r"|should not exceed max_(num_tokens|seq_len)"
    r"|prompt length .{0,40}exceeds|default_max_tokens .{0,80}greater than 0|token count .{0,60}exceeds"
    r"|`?inputs`?( tokens)? .{0,40}must (be|have) .{0,20}(<=|less than)"
)
# A server that does not know a field may name it, and the name may contain one of the words above.
_GENERAL = re.compile(
    r"extra inputs|extra_forbidden|unrecognized|unknown[ _](field|param|arg)|unexpected keyword|not permitted"
)
_NEVER_THE_REQUEST = (401, 402, 404, 405)
_NAMES = ("code", "type", "message", "error", "innererror", "status", "detail", "raw", "metadata")


def concerns_request(status: int, body: Any) -> FinishReason | None:
    """`refused` or `too_long` if the error is about the one request. None if that cannot be said.

    `body` is the error as the server sent it, read as JSON or as text.
    """
    words = " ".join(_words(body)).lower()[:4000]
    if status in _NEVER_THE_REQUEST or _GENERAL.search(words):
        return None
    if _FILTER.search(words):
        return "refused"
    return "too_long" if status not in (403, 429) and (status == 413 or _TOO_LONG.search(words)) else None


def _words(value: Any) -> list[str]:
    """The codes and messages in an error. Lists are left out, because they may repeat what was sent."""
    if isinstance(value, str):
        return [value]
    return [w for name in _NAMES for w in _words(value.get(name))] if isinstance(value, dict) else []
