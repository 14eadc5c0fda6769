"""Calls that get no answer. One of them must not end a stage, so each becomes a completion that says why.

Some reasons are certain: a server's filter, or a prompt that is too long. Others may be the fault of the request or of
the server as a whole, such as a refusal without a known code, or an answer that cannot be used. `Doubts` tells them
apart: a server that has answered another request is not at fault.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from nemo_srl.errors import EngineError
from nemo_srl.records import Completion, FinishReason

MAX_DOUBTS = 8
"""After so many doubtful failures without any answer, no new requests are sent."""
_MAX_CHARACTERS = 500


def unanswered(
    request_key: str, indices: Sequence[int], finish_reason: FinishReason, reason: str
) -> tuple[Completion, ...]:
    """Completions without an answer, for the samples `indices` of a request."""
    reason = reason.encode("utf-8", "replace").decode()[:_MAX_CHARACTERS]
    return tuple(
        Completion(
            request_key=request_key, index=i, text="", num_tokens=0, finish_reason=finish_reason,
            reason=reason or "no reason was given",
        )
        for i in indices
    )  # fmt: skip


class Doubts:
    """Holds doubtful failures until something is answered. `completed` are the keys of an earlier start's calls."""

    def __init__(self, completed: Collection[str]) -> None:
        self._held: list[tuple[Completion, ...]] = []
        self._is_answered = False
        self._is_resumed = bool(completed)

    def passed(self, completions: tuple[Completion, ...], *, doubtful: bool = False) -> list[tuple[Completion, ...]]:
        """The completions that can be yielded now: these ones, or none, or these ones and those that were held."""
        self._is_answered |= any(c.is_answered for c in completions)
        if doubtful and not self._is_answered:
            self._held.append(completions)
            return []
        return [completions, *self._released()] if self._is_answered else [completions]

    @property
    def are_many(self) -> bool:
        """Whether to wait for the requests under way before others are sent."""
        return len(self._held) >= MAX_DOUBTS

    def settled(self, *, at_end: bool) -> list[tuple[Completion, ...]]:
        """What is still held, when no request is under way; `at_end` says that no request is left.

        Raises `EngineError` if nothing was answered. At the end, an earlier start's answers count as well.
        """
        if self._held and not self._is_answered and not (at_end and self._is_resumed):
            first = self._held[0][0]
            more = f" ({len(self._held) - 1} more requests ended in the same way)" if len(self._held) > 1 else ""
            raise EngineError(f"request {first.request_key!r}: {first.reason}. Nothing else was answered{more}.")
        return self._released()

    def _released(self) -> list[tuple[Completion, ...]]:
        held, self._held = self._held, []
        return held
