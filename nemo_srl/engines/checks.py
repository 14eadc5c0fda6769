"""What every engine does first: it finds the samples that are missing, and the requests that it cannot serve."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from nemo_srl.engines.unanswered import unanswered
from nemo_srl.errors import DataError
from nemo_srl.protocols import GenerationRequest, SamplingParams
from nemo_srl.records import Completion, FinishReason

RequestCheck = Callable[[GenerationRequest, SamplingParams], tuple[FinishReason, str] | None]
"""Why an engine cannot serve a request, in words. None if it can. Raises `DataError` if it could serve no request."""


@dataclass(frozen=True, kw_only=True)
class SamplePlan:
    """What an engine has to do for a list of requests."""

    requests: list[GenerationRequest]
    """Those that it can serve, in their order, with or without missing samples."""
    missing: dict[str, list[int]]
    """By request key: the indices of the samples to make. Requests that miss none are left out."""
    unanswered: list[tuple[Completion, ...]]
    """The completions, without an answer, of requests that it cannot serve. They are yielded like others."""


def plan_samples(
    requests: Sequence[GenerationRequest], params: SamplingParams, completed: Collection[str], *, check: RequestCheck
) -> SamplePlan:
    """Plan for the samples that are not in `completed`.

    Raises `DataError` for a key that two requests share, and what `check` raises.
    """
    if repeated := [key for key, count in Counter(r.key for r in requests).items() if count > 1]:
        raise DataError(f"request key {repeated[0]!r} occurs more than once; keys tell completions apart")
    done = set(completed)
    missing = {r.key: [i for i in range(r.n) if f"{r.key}/{i:02d}" not in done] for r in requests}
    refused = {r.key: found for r in requests if (found := check(r, params))}
    return SamplePlan(
        requests=[r for r in requests if r.key not in refused],
        missing={key: indices for key, indices in missing.items() if indices and key not in refused},
        unanswered=[unanswered(key, missing[key], *found) for key, found in refused.items() if missing[key]],
    )


def length_check(limit: int, limited_by: str = "the model's context") -> RequestCheck:
    """A check for prompts without tokens, and for prompts that with `max_tokens` more exceed `limit` tokens.

    It raises `DataError` if `max_tokens` leaves no room for any prompt.
    """

    def check(request: GenerationRequest, params: SamplingParams) -> tuple[FinishReason, str] | None:
        if params.max_tokens >= limit:
            raise DataError(
                f"max_tokens={params.max_tokens}: no prompt has room beside so many tokens in the limit of {limit} "
                f"tokens ({limited_by}). Lower max_tokens."
            )
        length = len(request.prompt_token_ids)
        if not length:
            return "refused", "its prompt has no tokens"
        if length + params.max_tokens > limit:
            return "too_long", (
                f"a prompt of {length} tokens and max_tokens={params.max_tokens} exceed the limit of {limit} tokens "
                f"({limited_by})"
            )
        return None

    return check
