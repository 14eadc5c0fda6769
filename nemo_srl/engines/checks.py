"""What every engine refuses before it does any work: requests that cannot be told apart or cannot be served."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from nemo_srl.errors import DataError
from nemo_srl.protocols import GenerationRequest, SamplingParams


def check_keys(requests: Sequence[GenerationRequest]) -> None:
    """Raise `DataError` for a key that two requests share."""
    if repeated := [key for key, count in Counter(r.key for r in requests).items() if count > 1]:
        raise DataError(f"request key {repeated[0]!r} occurs more than once; keys tell completions apart")


def check_lengths(
    requests: Sequence[GenerationRequest],
    params: SamplingParams,
    *,
    limit: int,
    limited_by: str = "the model's context",
) -> None:
    """Raise `DataError` for a prompt without tokens, or one that with `max_tokens` more exceeds `limit` tokens."""
    for request in requests:
        length = len(request.prompt_token_ids)
        if not length:
            raise DataError(f"request {request.key!r}: its prompt has no tokens")
        if length + params.max_tokens > limit:
            raise DataError(
                f"request {request.key!r}: prompt of {length} tokens + max_tokens={params.max_tokens} exceed the limit "
                f"of {limit} tokens ({limited_by}). Shorten the prompt or lower max_tokens."
            )
