"""Which sequences are decoded together, and which tokens their prompts have in common.

Both are pure functions of the list of requests. So a call that was interrupted forms the same batches when it is made
again, and gives the same samples. Nothing here touches a tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from nemo_srl.protocols import GenerationRequest

MIN_SHARED_TOKENS = 16
"""Shorter prefixes are prefilled again and not shared, because a segment has a cost of its own."""

MAX_SEGMENT_TOKENS = 1024
"""Longer segments are cut. The memory of attention grows with the length of a segment times that of its prompt."""


@dataclass(frozen=True)
class SampleSlot:
    """One sequence: sample `index` of `request`."""

    request: GenerationRequest
    index: int

    @property
    def key(self) -> str:
        """The key of the completion that this sequence becomes (`Completion.key`)."""
        return f"{self.request.key}/{self.index:02d}"


@dataclass
class Segment:
    """A run of prompt tokens that follows the tokens of `parent`. All prompts that have it share keys and values."""

    tokens: tuple[int, ...]
    start: int
    """Position of its first token."""
    parent: Segment | None

    path: list[Segment] = field(init=False, repr=False)
    """The segments from the root to this one, itself included. Together they are the tokens [0, end)."""

    def __post_init__(self) -> None:
        self.path = [*(self.parent.path if self.parent else ()), self]

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)


def plan_batches(requests: Sequence[GenerationRequest], max_batch_size: int) -> list[list[SampleSlot]]:
    """All samples of all requests in batches of nearly equal size. The longest prompts come first.

    Samples of one prompt stand together. So do prompts that share most of their tokens. Both save prefill. After that,
    prompts stand by their length, which saves attention over padding.
    """
    slots = [
        SampleSlot(request, index) for family in _families(requests) for request in family for index in range(request.n)
    ]
    if not slots:
        return []
    num_batches = -(-len(slots) // max_batch_size)
    cuts = [round(i * len(slots) / num_batches) for i in range(num_batches + 1)]
    return [slots[a:b] for a, b in pairwise(cuts)]


def _families(requests: Sequence[GenerationRequest]) -> list[list[GenerationRequest]]:
    """Groups of requests with similar prompts, the longest first.

    What all prompts have in common does not count. Of the rest, prompts of a group share at least half.
    """
    ordered = sorted(requests, key=lambda r: (r.prompt_token_ids, r.key))
    if not ordered:
        return []
    common = _shared_length(ordered[0].prompt_token_ids, ordered[-1].prompt_token_ids)
    families = [[ordered[0]]]
    for previous, request in pairwise(ordered):
        shared = _shared_length(previous.prompt_token_ids, request.prompt_token_ids) - common
        own = min(len(previous.prompt_token_ids), len(request.prompt_token_ids)) - common
        if 2 * shared >= own:
            families[-1].append(request)
        else:
            families.append([request])
    families.sort(key=lambda family: -max(len(r.prompt_token_ids) for r in family))
    return families


def prefix_tree(prompts: Sequence[tuple[int, ...]]) -> tuple[list[Segment], dict[tuple[int, ...], Segment]]:
    """Cut prompts, none of them empty, into shared segments.

    Returns the segments, each after its parent, and for every distinct prompt its last segment.
    """
    segments: list[Segment] = []
    ends: dict[tuple[int, ...], Segment] = {}

    def grow(group: Sequence[tuple[int, ...]], start: int, parent: Segment | None) -> None:
        """Add what follows the first `start` tokens of a sorted `group`. On those, which end `parent`, all agree."""
        if parent is not None and len(group[0]) == start:
            ends[group[0]] = parent
            group = group[1:]
        while group:
            first, size = group[0], 1
            while size < len(group) and _shared_length(first, group[size]) >= start + MIN_SHARED_TOKENS:
                size += 1
            end = _shared_length(first, group[size - 1])
            segment = parent
            for cut in range(start, end, MAX_SEGMENT_TOKENS):
                segment = Segment(first[cut : min(cut + MAX_SEGMENT_TOKENS, end)], cut, segment)
                segments.append(segment)
            grow(group[:size], end, segment)
            group = group[size:]

    grow(sorted(set(prompts)), 0, None)
    return segments, ends


def _shared_length(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """Number of leading tokens on which `a` and `b` agree."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))
