"""A server like `trtllm-serve`. It is strict about what it is sent, and it can misbehave.

It has TensorRT-LLM's /v1/completions by the recorded contract, so it refuses unknown fields. It also has the chat of
any OpenAI-style server. Each request that comes uses up one of the `Faults`.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.trtllm_contract import contract, unknown_names

Reply = Callable[[dict[str, Any], int], tuple[list[int], str]]
"""(request body, sample index) -> token ids and finish reason."""


@dataclass
class Faults:
    """How many of the next answers go wrong, and how."""

    error_500: int = 0
    error_429: int = 0
    error_408: int = 0
    error_409: int = 0
    error_425: int = 0
    error_in_200: int = 0
    no_index: int = 0
    parts: int = 0
    """A chat's content is a list of text parts."""
    end_turn: int = 0
    """The finish reason of other servers."""
    hang: int = 0
    drop_choice: int = 0
    malformed: int = 0
    no_finish_reason: int = 0
    last_reason_only: bool = False
    """Only the last of n samples to end, the longest one, has a finish reason, as with TensorRT-LLM 1.1 and 1.2."""
    one_choice: bool = False
    refuse_n: bool = False
    """Refuse requests for more than one sample."""
    same_samples: bool = False
    refuse_logprobs: bool = False
    no_logprobs: bool = False
    status: int = 0
    """Refuse every request with this status."""
    unhealthy_seconds: float = 0
    die_after: int = -1
    """End the process after so many completions. -1: never."""
    slow_seconds: float = 0

    def take(self, name: str) -> bool:
        left: int = getattr(self, name)
        setattr(self, name, left - 1)
        return left > 0


class CharTokenizer:
    """One token per character. Token 0 ends a sequence."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return [ord(c) for c in text]

    def decode(self, ids: list[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
        return "".join(chr(i) for i in ids if i or not skip_special_tokens)


def ids_of(text: str) -> list[int]:
    return [*map(ord, text), 0]


@dataclass
class Loopback:
    """Answers with `reply`. `requests` holds the bodies that it accepted."""

    reply: Reply
    decode: Callable[[list[int]], str] = lambda ids: "".join(map(chr, ids))
    faults: Faults = field(default_factory=Faults)
    bad: Callable[[dict[str, Any]], tuple[int, object] | None] = lambda body: None
    """(request body) -> status and body of the answer to a request that does not get a good one."""
    top: Callable[[str], dict[str, float]] = lambda token: _top(token)
    """(text of a token) -> the most probable tokens in its place, with their log-probabilities."""
    api_key: str = ""
    model: str = "policy"
    requests: list[dict[str, Any]] = field(default_factory=list)
    num_calls: int = 0
    max_at_once: int = 0
    started: float = field(default_factory=time.monotonic)
    _now: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def server(self, port: int = 0, host: str = "127.0.0.1") -> ThreadingHTTPServer:
        loopback = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if time.monotonic() - loopback.started < loopback.faults.unhealthy_seconds:
                    return self.answer(503, {})
                models = {"object": "list", "data": [{"id": loopback.model, "object": "model"}]}
                self.answer(200 if self.path in ("/health", "/v1/models") else 404, models)

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if loopback.api_key and self.headers.get("Authorization") != f"Bearer {loopback.api_key}":
                    got = self.headers.get("Authorization")
                    return self.answer(401, {"error": {"message": f"Incorrect API key provided: {got}"}})
                with loopback._lock:
                    loopback.num_calls += 1
                    loopback._now += 1
                    loopback.max_at_once = max(loopback.max_at_once, loopback._now)
                try:
                    status, found = loopback.answer(self.path, body)
                finally:
                    with loopback._lock:
                        loopback._now -= 1
                self.answer(status, found)

            def answer(self, status: int, found: object) -> None:
                data = found.encode() if isinstance(found, str) else json.dumps(found).encode()
                with contextlib.suppress(OSError):
                    self.send_response(status)
                    if status == 429:
                        self.send_header("Retry-After", "0")
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)

            def log_message(self, *args: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            request_queue_size = 128  # connections that wait; with the default of 5, clients try again after a second

        return Server((host, port), Handler)

    @contextlib.contextmanager
    def running(self) -> Iterator[str]:
        server = self.server()
        server.daemon_threads = True
        server.block_on_close = False
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1"
        finally:
            server.shutdown()
            thread.join()
            server.server_close()

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, object]:
        f = self.faults
        with self._lock:
            if f.status:
                return f.status, {"object": "error", "message": "no such thing here"}
            for status in (500, 429, 408, 409, 425):
                if f.take(f"error_{status}"):
                    return status, {"message": "try again"}
            if f.take("error_in_200"):
                return 200, {"error": {"message": "overloaded"}}
            hang = f.take("hang")
            malformed, dropped, nameless = f.take("malformed"), f.take("drop_choice"), f.take("no_finish_reason")
        if (bad := self.bad(body)) is not None:
            return bad
        if hang:
            time.sleep(3)
        time.sleep(f.slow_seconds)
        chat = path == "/v1/chat/completions"
        if problem := "" if chat else self._problem(body):
            return 400, {"object": "error", "message": problem, "type": "invalid_request_error", "code": 400}
        if f.refuse_n and body.get("n", 1) > 1:
            return 400, {"error": {"message": "only one completion choice is allowed"}}
        with self._lock:
            if f.die_after == 0:
                os._exit(9)
            f.die_after -= 1
            self.requests.append(body)
        n = 1 if f.one_choice else body.get("n", 1)
        choices = [self._choice(body, i, chat=chat) for i in range(n)]
        if dropped:
            del choices[-1]
        if nameless:
            choices[-1]["finish_reason"] = None
        if f.last_reason_only:
            lengths = [len(self.reply(body, i)[0]) for i in range(n)]
            for i, choice in enumerate(choices):
                if i != lengths.index(max(lengths)):
                    choice["finish_reason"] = None
        for choice in choices:
            self._other_shapes(choice)
        if malformed:
            return 200, '{"choices": [{"index": 0, "te'
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        return 200, {"id": "x", "object": "text_completion", "model": self.model, "choices": choices, "usage": usage}

    def _other_shapes(self, choice: dict[str, Any]) -> None:
        if self.faults.take("no_index"):
            del choice["index"]
        if self.faults.take("parts") and "message" in choice:
            text = choice["message"]["content"]
            choice["message"]["content"] = [{"type": "text", "text": text[:2]}, {"type": "text", "text": text[2:]}]
        if self.faults.take("end_turn") and choice["finish_reason"] == "stop":
            choice["finish_reason"] = "end_turn"

    def _problem(self, body: dict[str, Any]) -> str:
        """What the validation of the real server, or its engine, would refuse. Empty if nothing."""
        if unknown := unknown_names("completion_request", body):
            return f"Extra inputs are not permitted: {unknown}"
        if body.get("logprobs") and self.faults.refuse_logprobs:
            return "logprobs is not supported"
        prompt = body.get("prompt")
        if not isinstance(prompt, list) or not prompt or not all(isinstance(i, int) for i in prompt):
            return "prompt: expected token ids"
        greedy = body.get("top_k") == 1 or body.get("temperature") == 0
        if greedy and body.get("n", 1) > 1:
            return "Greedy decoding in the LLM API does not allow multiple returns"
        wanted = {"model", "max_tokens", "add_special_tokens", "stop_token_ids", "include_stop_str_in_output"}
        missing = wanted - body.keys()
        return f"this test wants {missing} to be sent" if missing else ""

    def _choice(self, body: dict[str, Any], index: int, *, chat: bool) -> dict[str, Any]:
        ids, reason = self.reply(body, 0 if self.faults.same_samples else index)
        kept = ids[:-1] if reason == "stop" else ids
        text = self.decode(kept)
        with_logprobs = body.get("logprobs") and not self.faults.no_logprobs
        tokens = [self.decode([i]) for i in kept]
        if chat:
            content = [
                {
                    "token": t,
                    "logprob": -0.1,
                    "top_logprobs": [{"token": u, "logprob": p} for u, p in self.top(t).items()],
                }
                for t in tokens
            ]
            logprobs: object = {"content": content} if with_logprobs else None
            message = {"role": "assistant", "content": text}
            return {"index": index, "message": message, "finish_reason": reason, "logprobs": logprobs}
        logprobs = {
            "text_offset": [],
            "token_logprobs": [-0.1] * len(tokens),
            "tokens": tokens,
            "top_logprobs": [self.top(t) for t in tokens],
        }
        choice = {
            "index": index,
            "text": text if body.get("detokenize", True) else "",
            "token_ids": None if body.get("detokenize", True) else ids,
            "finish_reason": reason,
            "stop_reason": None,
            "logprobs": logprobs if with_logprobs else None,
        }
        assert not set(choice) - set(contract()["completion_choice"])
        return choice


def _top(token: str) -> dict[str, float]:
    """A digit has the probability 0.75, and the next lower one 0.25."""
    digit = token.strip()
    if digit.isdigit() and digit != "0":
        return {token: -0.2876820724517809, str(int(digit) - 1): -1.3862943611198906}
    return {token: 0.0}
