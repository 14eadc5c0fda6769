"""What tests of all engines do with requests and completions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from nemo_srl.protocols import GenerationRequest
from nemo_srl.records import Completion


def collect(batches: Iterable[tuple[Completion, ...]]) -> dict[str, Completion]:
    """Everything that a `generate` yields, by key."""
    completions = [completion for batch in batches for completion in batch]
    assert len({c.key for c in completions}) == len(completions), "each completion is yielded once"
    return {c.key: c for c in completions}


def keys(requests: Sequence[GenerationRequest]) -> set[str]:
    """The keys of all completions of `requests`."""
    return {f"{r.key}/{i:02d}" for r in requests for i in range(r.n)}
