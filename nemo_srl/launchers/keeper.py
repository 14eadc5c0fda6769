"""Keeps the services of a job well while the job needs them.

A thread looks at each service. One that has ended, or that has not answered well for `UNHEALTHY_SECONDS`, is restarted
on its own port, so that its URL stays. `/health` tells it: TensorRT-LLM answers 503 there once its executor has failed,
and a server that hangs does not answer at all. Meanwhile the steps wait (`engines/openai/transport.py`). A service that
needs more than `NUM_RESTARTS` restarts, with less than `STEADY_SECONDS` between them, is a failure of the job.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from nemo_srl.launchers.logs import how_it_ended

POLL_SECONDS = 0.25
SETTLE_SECONDS = 1.0
"""A signal for all processes of a step may reach a server a moment before it reaches this process."""
HEALTH_SECONDS = 15.0
"""Time between two questions to a service that was well."""
UNHEALTHY_SECONDS = 120.0
"""A service without a good answer for so long is restarted. One that is busy may be slow to answer."""
NUM_RESTARTS = 3
STEADY_SECONDS = 1800.0


class Kept(Protocol):
    """A service, as its keeper sees it."""

    @property
    def start_timeout_seconds(self) -> float: ...

    def ended(self) -> int | None:
        """Its exit status. None while it runs."""

    def is_well(self) -> bool:
        """Whether it answers well. Takes seconds at most."""

    def restart(self, why: str) -> None:
        """End it if it runs, and start it on the same port. Does not wait until it is ready."""

    def failed(self, how: str) -> str:
        """The failure in words, with the end of its log."""


@dataclass
class _State:
    service: Kept
    well_at: float
    next_look: float = 0.0
    is_starting: bool = False
    num_restarts: int = 0
    restarted_at: float = 0.0


class Keeper:
    """Looks after services from its creation, when all are well, until `close`."""

    def __init__(self, services: Sequence[Kept]) -> None:
        self.failure: str | None = None
        """What cannot be mended. None if all is well, or will be."""
        self.end_is_expected = False
        """From now on, a service that ends has not failed."""
        now = time.monotonic()
        self._states = [_State(s, well_at=now, next_look=now + HEALTH_SECONDS) for s in services]
        self._closing = threading.Event()
        # The kernel ends what this thread started when the thread ends. So it lives until the services are stopped.
        self._thread = threading.Thread(target=self._run, name="keeper", daemon=True)
        if services:
            self._thread.start()

    def close(self) -> None:
        """Restart nothing any more."""
        self._closing.set()
        if self._states:
            self._thread.join()

    def _run(self) -> None:
        while not self._closing.wait(POLL_SECONDS):
            for state in self._states:
                if self.failure is None and not self._is_over():
                    self.failure = self._look(state)

    def _is_over(self) -> bool:
        return self.end_is_expected or self._closing.is_set()

    def _look(self, state: _State) -> str | None:
        """Look at a service, and restart it if it needs that. Returns what cannot be mended."""
        if (problem := _problem(state)) is None:
            return None
        if state.service.ended() is not None and self._closing.wait(SETTLE_SECONDS):
            return None
        if self._is_over():  # this process has got the signal as well
            return None
        if time.monotonic() - state.restarted_at > STEADY_SECONDS:
            state.num_restarts = 0
        if state.num_restarts == NUM_RESTARTS:
            return state.service.failed(f"{problem} while the job needed it, and {NUM_RESTARTS} restarts did not help")
        state.num_restarts += 1
        state.service.restart(problem)
        state.is_starting, state.next_look = True, 0.0
        state.restarted_at = state.well_at = time.monotonic()
        return None


def _problem(state: _State) -> str | None:
    """What is wrong with a service for too long. None if nothing is."""
    if (code := state.service.ended()) is not None:
        return f"ended {how_it_ended(code)}"
    now = time.monotonic()
    if now < state.next_look:
        return None
    if state.service.is_well():
        state.is_starting, state.well_at, state.next_look = False, now, now + HEALTH_SECONDS
        return None
    limit = state.service.start_timeout_seconds if state.is_starting else UNHEALTHY_SECONDS
    if now - state.well_at < limit:
        state.next_look = now + min(1.0, HEALTH_SECONDS)
        return None
    return f"gave no good answer for {limit:g} s"
