"""What every engine does first: it refuses requests that it could not serve, and finds the samples that are missing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence

from nemo_srl.errors import DataError
from nemo_srl.protocols import GenerationRequest, SamplingParams

RequestCheck = Callable[[Sequence[GenerationRequest], SamplingParams], None]
"""Raises `DataError` for requests that an engine cannot serve."""


def missing_samples(
    requests: Sequence[GenerationRequest], params: SamplingParams, completed: Collection[str], *, check: RequestCheck
) -> dict[str, list[int]]:
    """By request key: the indices of the samples that are not in `completed`. Requests that miss none are left out.

    Raises `DataError` for a key that two requests share, and what `check` raises.
    """
    if repeated := [key for key, count in Counter(r.key for r in requests).items() if count > 1]:
        raise DataError(f"request key {repeated[0]!r} occurs more than once; keys tell completions apart")
    check(requests, params)
    done = set(completed)
    missing = {r.key: [i for i in range(r.n) if f"{r.key}/{i:02d}" not in done] for r in requests}
    return {key: indices for key, indices in missing.items() if indices}


def length_check(limit: int, limited_by: str = "the model's context") -> RequestCheck:
    """A check that refuses prompts without tokens, and prompts that with `max_tokens` more exceed `limit` tokens."""

    def check(requests: Sequence[GenerationRequest], params: SamplingParams) -> None:
        for request in requests:
            length = len(request.prompt_token_ids)
            if not length:
                raise DataError(f"request {request.key!r}: its prompt has no tokens")
            if length + params.max_tokens > limit:
                raise DataError(
                    f"request {request.key!r}: a prompt of {length} tokens and max_tokens={params.max_tokens} exceed "
                    f"the limit of {limit} tokens ({limited_by}). Shorten the prompt or lower max_tokens."
                )

    return check
