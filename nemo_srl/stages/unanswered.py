"""Counts the calls of a stage that get no answer, and stops the stage when they are too many.

A call without an answer is a completed call: it is in the journal, and no later start makes it again. The stage goes on
without it. Above `max_unanswered_share` of the calls of a role, the cause is rather the server or the data as a whole.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from nemo_srl.errors import EngineError
from nemo_srl.judging.intervals import proportion
from nemo_srl.records import Completion, Metric

PREFIX = "calls_"
"""The figures of a manifest that count calls without an answer are `calls_<finish reason>`."""
CALL_LABELS: Mapping[str, str] = {
    "refused": "refused",
    "too_long": "too long for the context",
    "malformed": "malformed",
}
"""The finish reasons of such calls, in words."""
_NUM_SHOWN = 5


class UnansweredCalls:
    """Those of one role in one stage. `engine` is the section of its engine's settings."""

    def __init__(self, *, max_share: float, engine: str, journal: Path) -> None:
        self._max_share = max_share
        self._engine = engine
        self._journal = journal
        self._found: dict[str, Completion] = {}
        self._num_answered = 0
        self._num_calls = 0
        self._num_per_request = 0

    def expect(self, num_calls: int, *, num_per_request: int) -> None:
        """So many more calls are going to be made, and no request makes more than `num_per_request` of them."""
        self._num_calls += num_calls
        self._num_per_request = max(self._num_per_request, num_per_request)

    def count(self, completions: Iterable[Completion]) -> None:
        """These calls are complete."""
        for c in completions:
            if c.is_answered:
                self._num_answered += 1
            else:
                self._found[c.key] = c

    @property
    def are_too_many(self) -> bool:
        return len(self._found) > self._most

    @property
    def _most(self) -> float:
        # One bad item must not end a small stage, whatever its share is.
        return max(self._max_share * self._num_calls, self._num_per_request) if self._max_share else 0

    def check(self, *, title: str, at_end: bool) -> None:
        """Raises `EngineError` when they are too many, or when at the end no call got an answer."""
        if self.are_too_many:
            limit = f"max_unanswered_share={self._max_share:g} allows {int(self._most)}"
            self._stop(f"{title}: {len(self._found)} of {self._num_calls} calls got no answer, and {limit}.")
        if at_end and self._found and not self._num_answered:
            self._stop(f"{title}: none of the {self._num_calls} calls got an answer.")

    def figures(self) -> Counter[str]:
        """The number of calls by finish reason, for a manifest. Empty if all calls were answered."""
        return Counter(PREFIX + c.finish_reason for c in self._found.values())

    def _stop(self, problem: str) -> None:
        shown = "".join(f"\n  {c.key}: {c.finish_reason}: {c.reason}" for c in list(self._found.values())[:_NUM_SHOWN])
        raise EngineError(
            f"{problem} The first reasons:{shown}\n"
            "Answers are kept. To go on without those that are missing, raise max_unanswered_share (1: any share). If "
            f"the server is at fault ({self._engine}), correct it there. Then delete the lines of these calls, so that "
            f'the next start makes them again: sed -i \'/, "reason": "/d\' {shlex.quote(str(self._journal))}'
        )


def missing_rate(name: str, num_missing: int, n: int) -> list[Metric]:
    """The share of missing cases as a metric. Empty if none is missing, as nearly always."""
    return [proportion(num_missing, n).named(name)] if num_missing else []


def reasons_in(metrics: Mapping[str, float]) -> dict[str, int]:
    """The number of calls without an answer by finish reason, from the figures of a manifest."""
    return {name: int(n) for name in CALL_LABELS if (n := metrics.get(PREFIX + name, 0))}
