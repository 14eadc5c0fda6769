"""HTTP calls that are tried again after errors that may pass.

Connection errors, attempts past their deadline, 408, 409, 425, 429 and 5xx are tried again, with exponential back-off
and jitter. The next attempt waits as long as `Retry-After` says. Any other status but 200 raises `RefusedError` at
once, with the server's own message. So does an error that is about this one request, whatever its status. The key is in
the headers only. It is cut out of every message.

A server of the job itself may be restarted while it is asked (`restart_seconds`). When all attempts failed because it
is gone or ill, its `/health` is asked until it is well again, and then the attempts begin anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import random
import time
from collections.abc import Mapping
from typing import Any

import httpx

from nemo_srl.engines.openai.refusals import concerns_request
from nemo_srl.engines.openai.settings import ClientSettings
from nemo_srl.errors import EngineError
from nemo_srl.records import FinishReason

MAX_BACKOFF_SECONDS = 30.0
_MAY_PASS = (408, 409, 425, 429)
"""Statuses below 500 after which the same request may succeed: a timeout, a conflict, too early, too many requests."""
MAX_RETRY_AFTER_SECONDS = 300.0
NUM_RESTARTS = 3
"""For so many restarts of its server a request waits at most."""
HEALTH_SECONDS = 1.0
"""Time between two looks at a server that is to come back."""


class RefusedError(EngineError):
    """The server refused a request. It would refuse the same request again.

    `reason` has the status and the server's words. `concerns` is `refused` or `too_long` if the server refused this one
    request, and None if it may refuse all of them.
    """

    def __init__(self, url: str, reason: str, *, status: int, concerns: FinishReason | None) -> None:
        super().__init__(f"{url} refused the request: {reason}")
        self.reason = reason
        self.status = status
        self.concerns = concerns


class GivenUpError(EngineError):
    """A request failed at every attempt. `reason` is the last failure.

    `may_be_its_own` is true for failures that a single request can cause: the status 500, and a time-out.
    `others_were_answered` says whether the server answered other requests after this one had failed for the first time.
    """

    def __init__(self, message: str, *, reason: str, may_be_its_own: bool, others_were_answered: bool) -> None:
        super().__init__(message)
        self.reason = reason
        self.may_be_its_own = may_be_its_own
        self.others_were_answered = others_were_answered


class Transport:
    """One HTTP client. Use it as an asynchronous context manager within one event loop."""

    def __init__(
        self,
        cfg: ClientSettings,
        *,
        api_key: str,
        backoff_seconds: float,
        use_proxies: bool,
        restart_seconds: float = 0,
    ) -> None:
        self._restart_seconds = restart_seconds
        self._well_at: dict[str, float] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self._key = api_key
        self._timeout = cfg.timeout_seconds
        self._max_retries = cfg.max_retries
        self._backoff = backoff_seconds
        self._num_answered = 0
        most = cfg.max_concurrency
        self._client = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=httpx.Timeout(cfg.timeout_seconds, connect=min(cfg.timeout_seconds, 30)),
            trust_env=use_proxies,
            limits=httpx.Limits(max_connections=most, max_keepalive_connections=most),
        )

    async def __aenter__(self) -> Transport:
        await self._client.__aenter__()
        return self

    async def __aexit__(self, *args: Any) -> None:
        await self._client.__aexit__(*args)

    async def get(self, url: str) -> httpx.Response:
        """The server's answer. Its status is 200."""
        return await self._request("GET", url, None)

    async def post(self, url: str, body: Mapping[str, Any]) -> httpx.Response:
        """The server's answer. Its status is 200, and its content is not checked."""
        return await self._request("POST", url, body)

    async def _request(self, method: str, url: str, body: Mapping[str, Any] | None) -> httpx.Response:
        num_restarts = 0
        while True:
            try:
                return await self._attempts(method, url, body)
            except GivenUpError as e:
                if e.may_be_its_own or num_restarts == NUM_RESTARTS or not await self._comes_back(url):
                    raise
                num_restarts += 1

    async def _comes_back(self, url: str) -> bool:
        """Wait until the server at `url` is healthy. Returns whether it is. One of those that wait asks for all."""
        health = httpx.URL(url).copy_with(path="/health", query=None)
        server, began = str(health), time.monotonic()
        async with self._locks.setdefault(server, asyncio.Lock()):
            while self._well_at.get(server, 0.0) < began and time.monotonic() - began < self._restart_seconds:
                with contextlib.suppress(httpx.HTTPError):
                    if (await self._client.get(health, timeout=10)).status_code == 200:
                        self._well_at[server] = time.monotonic()
                        break
                await asyncio.sleep(HEALTH_SECONDS)
        return self._well_at.get(server, 0.0) >= began

    async def _attempts(self, method: str, url: str, body: Mapping[str, Any] | None) -> httpx.Response:
        num_answered = self._num_answered
        for attempt in range(self._max_retries + 1):
            retry_after, may_be_its_own = None, False
            try:
                call = self._client.request(method, url, json=body)
                response = await asyncio.wait_for(call, self._timeout)
            except (asyncio.TimeoutError, httpx.TimeoutException):
                failure, may_be_its_own = f"no answer within engine.timeout_seconds={self._timeout:g}", True
            except httpx.TransportError as e:
                failure = f"{type(e).__name__}: {e}"
            else:
                status = response.status_code
                if status == 200:
                    self._num_answered += 1
                    return response
                may_be_its_own = status == 500
                failure = f"{status} {response.reason_phrase}: {server_message(response)}"
                concerns = concerns_request(status, error_body(response))
                if concerns or (status not in _MAY_PASS and status < 500):
                    raise RefusedError(url, self._without_key(failure), status=status, concerns=concerns)
                retry_after = _retry_after(response)
            if attempt == 0:
                num_answered = self._num_answered
            if attempt < self._max_retries:
                await self.wait(attempt, retry_after)
        failure = self._without_key(failure)
        raise GivenUpError(
            f"{url}: given up after {self._max_retries + 1} attempts. The last one: {failure}",
            reason=failure,
            may_be_its_own=may_be_its_own,
            others_were_answered=self._num_answered > num_answered,
        )

    async def wait(self, attempt: int, retry_after: float | None = None) -> None:
        """The pause before another attempt, after `attempt` that failed before."""
        await asyncio.sleep(self._delay(attempt, retry_after))

    def _delay(self, attempt: int, retry_after: float | None) -> float:
        backoff: float = min(self._backoff * 2**attempt, MAX_BACKOFF_SECONDS)
        # The jitter keeps requests that failed together from coming back together.
        jittered = backoff * random.uniform(0.5, 1)
        return jittered if retry_after is None else max(jittered, min(retry_after, MAX_RETRY_AFTER_SECONDS))

    def _without_key(self, message: str) -> str:
        return message.replace(self._key, "***") if self._key else message


def error_body(response: httpx.Response) -> Any:
    """What the server sent: JSON, or else text."""
    try:
        return response.json()
    except (ValueError, RecursionError):
        return response.text


def server_message(response: httpx.Response) -> str:
    """The server's message about an error, in one of the usual shapes. Otherwise the start of its text."""
    found = error_body(response)
    while isinstance(found, dict):
        found = found.get("error") or found.get("message") or found.get("detail")
    return str(found or response.text)[:500]


def _retry_after(response: httpx.Response) -> float | None:
    """Seconds to wait, from a header that holds seconds or a date. None if there is none that can be read."""
    value = response.headers.get("Retry-After", "")
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError):
        return None
