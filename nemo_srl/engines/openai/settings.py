"""Settings of the client of OpenAI-style servers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from nemo_srl.config.check import check


@dataclass
class ClientSettings:
    """How every engine that talks to a server sends requests."""

    max_concurrency: int = 64
    """Requests under way at once, over all replicas."""
    timeout_seconds: float = 600
    """Deadline of one attempt at a request."""
    max_retries: int = 5
    """Further attempts after connection errors, timeouts, 429 and 5xx."""

    def __post_init__(self) -> None:
        check(self.max_concurrency >= 1, "engine.max_concurrency", self.max_concurrency, "must be at least 1")
        check(self.timeout_seconds > 0, "engine.timeout_seconds", self.timeout_seconds, "must be above 0")
        check(self.max_retries >= 0, "engine.max_retries", self.max_retries, "must be 0 or above")


@dataclass
class OpenAISettings(ClientSettings):
    """`engine=openai`: a server that runs already, such as a hosted model, NIM or vLLM."""

    name: str = "openai"
    base_url: str = ""
    """Where the server's API is, up to and including `/v1`."""
    model: str = ""
    """The model's name on that server. Empty: the only one that it lists."""
    api: str = "chat"
    """`chat` sends the text of a prompt as the user's turn, and the server renders it. `completions` sends token ids,
    for a server whose model has the same tokenizer as the policy. `classify` is for a reward model and
    `judge.mode=reward`: it sends an instruction and an answer, and gets a number (vLLM's /classify with messages). Then
    `base_url` ends before `/classify`."""
    extra_body: dict[str, Any] = field(default_factory=dict)
    """Fields that are added to every request, for what only that server knows. A null takes a field away."""
    api_key_env: str = ""
    """Name of the environment variable that holds the key. The key is read, sent and never stored."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            self.base_url.startswith(("http://", "https://")),
            "engine.base_url",
            self.base_url,
            "engine.name='openai' needs the URL of a server, such as http://host:8000/v1",
        )
        apis = ("chat", "completions", "classify")
        check(self.api in apis, "engine.api", self.api, f"must be one of {', '.join(apis)}")
        reason = "engine.api='classify' needs the model's name, because such a server may list none"
        check(self.api != "classify" or bool(self.model), "engine.model", self.model, reason)
