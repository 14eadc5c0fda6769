"""What is sent to a server, and what is read from its answer: token ids to /completions, text to a chat, or a
conversation to a reward model.

An answer is untrusted. A choice that lacks something raises `BadChoiceError`, and the engine asks again for that
sample. A choice that the model or the server's filter refused is a sample without an answer.

A choice may also lack its finish reason. TensorRT-LLM 1.1 and 1.2 give it only to the last of n samples to end
(`tensorrt_llm/executor/result.py`: it is set when the whole request is done). Token ids tell how such a sample ended. A
text does not, and raises `UnknownEndError`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeGuard

from nemo_srl.markers import Markers, for_servers
from nemo_srl.protocols import GenerationRequest, SamplingParams
from nemo_srl.records import FinishReason, NumberLogprobs

FINISH_REASONS: Mapping[str, FinishReason] = {
    "stop": "stop",
    "eos": "stop",
    "eos_token": "stop",
    "end_turn": "stop",
    "stop_sequence": "stop",
    "length": "length",
    "max_tokens": "length",
    # The server's filter, or the model itself, ended the sample. A text up to there is no whole answer.
    "content_filter": "refused",
    "refusal": "refused",
    "safety": "refused",
    "recitation": "refused",
    "prohibited_content": "refused",
    "blocklist": "refused",
}

_NUMBER = re.compile(r"[0-9]+")
_NO_REASON = "finish_reason={!r}: it does not say whether the text is whole or was cut off"


class BadChoiceError(ValueError):
    """A choice in a server's answer that cannot be used as a sample."""


class UnknownEndError(BadChoiceError):
    """A choice without a finish reason, and nothing in it tells whether it is whole or was cut off."""


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that this module needs."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...

    def decode(self, ids: list[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str: ...


def decode(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The text of tokens, without special tokens."""
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@dataclass(frozen=True)
class Sample:
    """One usable choice, or a refused one with its `reason`.

    `num_tokens` counts the end-of-sequence token as well, which is not part of `text`.
    """

    text: str
    num_tokens: int
    finish_reason: FinishReason
    number_logprobs: NumberLogprobs | None
    reason: str = ""


class Dialect(Protocol):
    """How to talk to one kind of server."""

    @property
    def path(self) -> str: ...

    @property
    def choices(self) -> str:
        """The field of an answer that has the list of choices."""
        ...

    def body(
        self, request: GenerationRequest, params: SamplingParams, *, model: str, n: int, seed: int
    ) -> dict[str, Any]: ...

    def sample(self, choice: Mapping[str, Any], params: SamplingParams, stop: Sequence[str] = ()) -> Sample:
        """`stop` are the request's stop strings. Raises `BadChoiceError`."""
        ...


@dataclass(frozen=True)
class CompletionsDialect:
    """Token ids to /completions.

    `extra_body` is added to every request. A null in it takes a field away. Where the server returns token ids, one of
    `end_token_ids` at their end is cut off. A text comes without it.
    """

    tokenizer: Tokenizer
    end_token_ids: tuple[int, ...]
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    path: str = "/completions"
    choices: str = "choices"

    def body(
        self, request: GenerationRequest, params: SamplingParams, *, model: str, n: int, seed: int
    ) -> dict[str, Any]:
        body = {"model": model, "prompt": list(request.prompt_token_ids), **_sampling(params, n=n, seed=seed)}
        if params.num_logprobs:
            body["logprobs"] = params.num_logprobs
        return _with_extra(body, self.extra_body)

    def sample(self, choice: Mapping[str, Any], params: SamplingParams, stop: Sequence[str] = ()) -> Sample:
        ids = choice.get("token_ids")
        if isinstance(ids, list) and all(isinstance(i, int) for i in ids):
            return self._of_ids(choice, ids, params, stop)
        reason = _finish_reason(choice)
        if reason == "refused":
            return _refused(choice, "")
        text = _text(choice.get("text"))
        logprobs = _of_completion(choice.get("logprobs")) if params.num_logprobs else None
        numbers = None if logprobs is None else number_logprobs(text, logprobs)
        return Sample(text, _count(self.tokenizer, text, reason), reason, numbers)

    def _of_ids(self, choice: Mapping[str, Any], ids: list[int], params: SamplingParams, stop: Sequence[str]) -> Sample:
        by_text = isinstance(choice.get("stop_reason"), str)  # the stop string is among the ids
        if choice.get("finish_reason") is None:
            reason, by_text = self._end_of(ids, params, stop)
        else:
            reason = _finish_reason(choice)
        if reason == "refused":
            return _refused(choice, "")
        # Servers differ in whether the token that ended a sample is among its ids.
        kept = ids[:-1] if reason == "stop" and ids and ids[-1] in self.end_token_ids else ids
        num_tokens = len(kept) + (reason == "stop" and not by_text)
        logprobs = _of_completion(choice.get("logprobs")) if params.num_logprobs else None
        numbers = None if logprobs is None else number_logprobs_of_ids(self.tokenizer, kept, logprobs)
        return Sample(decode(self.tokenizer, kept), num_tokens, reason, numbers)

    def _end_of(self, ids: list[int], params: SamplingParams, stop: Sequence[str]) -> tuple[FinishReason, bool]:
        """How a sample without a finish reason ended, and whether a stop string ended it."""
        if ids and ids[-1] in self.end_token_ids:
            return "stop", False
        if stop and any(text in decode(self.tokenizer, ids) for text in stop):
            return "stop", True
        if len(ids) >= params.max_tokens:
            return "length", False
        raise UnknownEndError(_NO_REASON.format(None))


@dataclass(frozen=True)
class ChatDialect:
    """The text of a prompt to /chat/completions, as the user's turn, after the earlier turns.

    The server turns it into tokens, so `markers` are broken up in it.
    """

    tokenizer: Tokenizer
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    path: str = "/chat/completions"
    choices: str = "choices"
    markers: Markers = field(default_factory=lambda: for_servers(()))

    def body(
        self, request: GenerationRequest, params: SamplingParams, *, model: str, n: int, seed: int
    ) -> dict[str, Any]:
        texts = [*_earlier(request), request.text]
        body = {"model": model, "messages": _messages(texts, self.markers), **_sampling(params, n=n, seed=seed)}
        if params.num_logprobs:
            body |= {"logprobs": True, "top_logprobs": params.num_logprobs}
        return _with_extra(body, self.extra_body)

    def sample(self, choice: Mapping[str, Any], params: SamplingParams, stop: Sequence[str] = ()) -> Sample:
        message = choice.get("message")
        content = message.get("content") if isinstance(message, dict) else None
        refusal = _refusal(message, content)
        if refusal:
            return _refused(choice, refusal)
        reason = _finish_reason(choice)
        if reason == "refused":
            return _refused(choice, "")
        text = _text(content)
        logprobs = _of_chat(choice.get("logprobs")) if params.num_logprobs else None
        numbers = None if logprobs is None else number_logprobs(text, logprobs)
        # The server has a tokenizer of its own. The policy's gives a count that can be compared between servers.
        return Sample(text, _count(self.tokenizer, text, reason), reason, numbers)


@dataclass(frozen=True)
class ClassifyDialect:
    """A conversation to /classify of a server with a reward model. The sample's text is the reward, a number.

    The fields are those of vLLM (docs.vllm.ai, Classification API). Without `use_activation`, the server would send the
    logistic function of the reward. High rewards are all 1 then, and tie.
    """

    extra_body: Mapping[str, Any] = field(default_factory=dict)
    markers: Markers = field(default_factory=lambda: for_servers(()))
    path: str = "/classify"
    choices: str = "data"

    def body(
        self, request: GenerationRequest, params: SamplingParams, *, model: str, n: int, seed: int
    ) -> dict[str, Any]:
        # The answer is the last turn, so no turn of the assistant begins after it.
        messages = _messages(_earlier(request), self.markers)
        body = {"model": model, "messages": messages, "add_generation_prompt": False, "use_activation": False}
        return _with_extra(body, self.extra_body)

    def sample(self, choice: Mapping[str, Any], params: SamplingParams, stop: Sequence[str] = ()) -> Sample:
        values = choice.get("probs")
        if not isinstance(values, list) or len(values) != 1 or not _is_number(values[0]):
            raise BadChoiceError(f"probs={str(values)[:100]}: a reward model gives one finite number")
        return Sample(repr(float(values[0])), 0, "stop", None)


@dataclass(frozen=True)
class TokenLogprob:
    """A generated token and the most probable ones in its place, by their texts."""

    token: str
    top: Mapping[str, float]


def number_logprobs(text: str, tokens: Sequence[TokenLogprob]) -> NumberLogprobs:
    """Where numbers begin in `text`, and the log-probabilities of the numbers that could have stood there.

    Only tokens that are a whole number count, here and among the alternatives. Blanks may stand around the number.
    """
    found: NumberLogprobs = []
    for token, offset in zip(tokens, _offsets(text, [t.token for t in tokens]), strict=True):
        number = _NUMBER.fullmatch(token.token.strip())
        if number is None or offset is None:
            continue
        begin = offset + len(token.token) - len(token.token.lstrip())
        found.append((begin, {t: p for t, p in token.top.items() if _NUMBER.fullmatch(t.strip())}))
    return found


def number_logprobs_of_ids(tokenizer: Tokenizer, ids: Sequence[int], tokens: Sequence[TokenLogprob]) -> NumberLogprobs:
    """The same for a text whose token `ids` are known. `tokens` may have more at its end, such as an end token.

    A place is the length of the text before it. The texts of single tokens would not do: a tokenizer such as Llama 2's
    drops the blank before a token that it decodes alone.
    """
    if len(tokens) < len(ids):
        raise BadChoiceError(f"logprobs of {len(tokens)} tokens for {len(ids)} token ids")
    found: NumberLogprobs = []
    for i, token in enumerate(tokens[: len(ids)]):
        if not _NUMBER.fullmatch(token.token.strip()):
            continue
        before, with_it = decode(tokenizer, list(ids[:i])), decode(tokenizer, list(ids[: i + 1]))
        piece = with_it.removeprefix(before)
        if _NUMBER.fullmatch(piece.strip()):
            begin = len(before) + len(piece) - len(piece.lstrip())
            found.append((begin, {t: p for t, p in token.top.items() if _NUMBER.fullmatch(t.strip())}))
    return found


def _offsets(text: str, tokens: Sequence[str]) -> list[int | None]:
    """Where each token begins in `text`. None where it is not known.

    A token of half a character has no text that could be found. So tokens are matched from the beginning up to the
    first such token, and from the end back to the last one. A token that ends the sequence has no place in the text.
    """
    offsets: list[int | None] = [None] * len(tokens)
    position = 0
    for i, token in enumerate(tokens):
        if not text.startswith(token, position):
            break
        offsets[i] = position
        position += len(token)
    position = len(text)
    last = len(tokens) if tokens and text.endswith(tokens[-1]) else len(tokens) - 1
    for i in reversed(range(last)):
        if not text.endswith(tokens[i], 0, position):
            break
        position -= len(tokens[i])
        offsets[i] = position
    return offsets


def _earlier(request: GenerationRequest) -> list[str]:
    """The texts of the earlier turns, the user's and the assistant's by turns."""
    return [text for turn in request.earlier_turns for text in turn]


def _messages(texts: Sequence[str], markers: Markers) -> list[dict[str, str]]:
    """A conversation that the user begins. Markers are broken up in it."""
    return [{"role": ("user", "assistant")[i % 2], "content": markers.broken_up(text)} for i, text in enumerate(texts)]


def _sampling(params: SamplingParams, *, n: int, seed: int) -> dict[str, Any]:
    return {
        "n": n,
        "max_tokens": params.max_tokens,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "seed": seed,
    }


def _with_extra(body: dict[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in {**body, **extra}.items() if value is not None}


def _finish_reason(choice: Mapping[str, Any]) -> FinishReason:
    reason = choice.get("finish_reason")
    if reason is None:
        raise UnknownEndError(_NO_REASON.format(reason))
    if not isinstance(reason, str) or reason.lower() not in FINISH_REASONS:
        raise BadChoiceError(_NO_REASON.format(reason))
    return FINISH_REASONS[reason.lower()]


def _refused(choice: Mapping[str, Any], refusal: str) -> Sample:
    """A sample without an answer. `refusal` is what the model said instead."""
    reason = f"refused: {refusal}" if refusal else f"finish_reason={choice.get('finish_reason')!r}"
    return Sample("", 0, "refused", None, _whole_characters(reason)[:500])


def _refusal(message: object, content: object) -> str:
    """What the model says instead of an answer, where the server tells it apart. Empty if it does not."""
    if not isinstance(message, dict):
        return ""
    parts = [part.get("refusal") for part in content if isinstance(part, dict)] if isinstance(content, list) else []
    refusals = [text for text in (message.get("refusal"), *parts) if isinstance(text, str) and text]
    return "" if isinstance(content, str) and content else " ".join(refusals)


def _text(value: object) -> str:
    """A text, or a list of parts, as some servers give it. Parts of text count, and what the model thought does not."""
    if isinstance(value, list) and all(isinstance(part, dict) for part in value):
        parts = [part for part in value if part.get("type") not in ("thinking", "reasoning")]
        if parts and all(part.get("type") == "text" and isinstance(part.get("text"), str) for part in parts):
            value = "".join(part["text"] for part in parts)
    if not isinstance(value, str):
        raise BadChoiceError(f"its text is {str(value)[:100]!r}")
    if value != _whole_characters(value):
        raise BadChoiceError("its text has half of a character, such as half an emoji")
    return value


def _whole_characters(text: str) -> str:
    """`text` with a question mark for each half of a character, which no file and no tokenizer takes."""
    return text.encode("utf-8", "replace").decode()


def _count(tokenizer: Tokenizer, text: str, reason: FinishReason) -> int:
    return len(tokenizer.encode(text, add_special_tokens=False)) + (reason == "stop")


def _of_completion(logprobs: object) -> list[TokenLogprob]:
    """From the shape of /completions: parallel lists of tokens, their log-probabilities, and the most probable tokens.

    llama.cpp's server gives the shape of a chat here as well.
    """
    if not isinstance(logprobs, dict):
        raise BadChoiceError(f"logprobs={logprobs!r}, although they were asked for")
    if "content" in logprobs:
        return _of_chat(logprobs)
    try:
        rows = zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True)
        return [_token(token, own, (top or {}).items()) for token, own, top in rows]
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise BadChoiceError(f"logprobs of an unknown shape ({type(e).__name__}: {e})") from e


def _of_chat(logprobs: object) -> list[TokenLogprob]:
    """From the shape of /chat/completions: `content` is a list of objects."""
    if not isinstance(logprobs, dict) or not isinstance(logprobs.get("content"), list):
        raise BadChoiceError(f"logprobs={logprobs!r}, although they were asked for")
    try:
        return [
            _token(x["token"], x["logprob"], ((y["token"], y["logprob"]) for y in x.get("top_logprobs") or ()))
            for x in logprobs["content"]
        ]
    except (KeyError, TypeError, ValueError) as e:
        raise BadChoiceError(f"logprobs of an unknown shape ({type(e).__name__}: {e})") from e


def _token(token: object, own: object, top: Iterable[tuple[str, object]]) -> TokenLogprob:
    if not isinstance(token, str):
        raise TypeError(f"token {token!r}")
    # The generated token may be missing among the most probable ones.
    found = {token: float(own)} if _is_number(own) else {}
    return TokenLogprob(token, {**found, **{str(t): float(p) for t, p in top if _is_number(p)}})


def _is_number(value: object) -> TypeGuard[float]:
    """Also not infinite, as some servers write it for a probability of 0. Such a token may be left out."""
    return isinstance(value, (int, float)) and math.isfinite(value)
