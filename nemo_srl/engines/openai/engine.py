"""`GenerationEngine` over HTTP: many requests are under way at once, and completions are yielded as they arrive.

One HTTP call asks for all n samples of a prompt. So the server computes the prompt once. There is another reason:
TensorRT-LLM's sampler ignores seeds, and two replicas could give the same text for the same prompt.

The usable choices of an answer are yielded. The engine asks again for samples that are missing or malformed, until
`NUM_FRUITLESS` answers in turn had nothing usable. If an answer does not tell how each of its samples ended, none of
them is taken: those that tell it are the longest ones. The request is then asked for one sample at a time. A sample
that never comes, or that the server refuses, is yielded as a completion without an answer. If all requests would fail,
the engine sends no new ones, waits for those under way, and then raises `EngineError`. So nothing that a server
completed is lost.

Not covered: two runs with the same bytes. What a server samples depends on what else it serves.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import queue
import threading
import zlib
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field

import httpx

from nemo_srl.engines.checks import RequestCheck, plan_samples
from nemo_srl.engines.openai.dialects import BadChoiceError, Dialect, Sample, UnknownEndError
from nemo_srl.engines.openai.refusals import concerns_request
from nemo_srl.engines.openai.settings import ClientSettings
from nemo_srl.engines.openai.transport import GivenUpError, RefusedError, Transport, error_body, server_message
from nemo_srl.engines.unanswered import Doubts, unanswered
from nemo_srl.errors import EngineError
from nemo_srl.protocols import GenerationRequest, SamplingParams
from nemo_srl.records import Completion, FinishReason

NUM_FRUITLESS = 3
"""After so many answers to one request, one after the other, without anything usable, it is not asked again."""


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Where the servers are, and how to treat them."""

    base_urls: Sequence[str]
    """URLs up to `/v1`, of replicas of one model."""
    model: str = ""
    """Empty: the only model that the first server lists."""
    check_model: bool = False
    """Every server must list `model`. Otherwise nothing is asked."""
    api_key: str = ""
    client: ClientSettings = field(default_factory=ClientSettings)
    restart_seconds: float = 0
    """A server that is gone or ill may come back in this time, because its job restarts it. 0: nobody does."""
    use_proxies: bool = True
    """Use the proxies of the environment. They are not used if all servers are on this machine."""
    backoff_seconds: float = 0.5
    """Wait before the second attempt. Each further wait is twice as long."""


@dataclass
class _Todo:
    """A request, and the indices of its samples that are still missing."""

    request: GenerationRequest
    missing: list[int]
    is_last_try: bool = False
    """Whether all attempts failed before, so that it comes after all other requests."""


@dataclass(frozen=True)
class _Out:
    """Where completions go. Doubtful failures wait there until the servers have answered something."""

    emit: Callable[[tuple[Completion, ...]], None]
    doubts: Doubts

    def give(self, completions: tuple[Completion, ...], *, doubtful: bool = False) -> None:
        for found in self.doubts.passed(completions, doubtful=doubtful):
            self.emit(found)

    def settle(self, *, at_end: bool) -> None:
        for found in self.doubts.settled(at_end=at_end):
            self.emit(found)


class OpenAIEngine:
    """Serves the model that the servers have.

    `check` finds requests that the servers could not take, and they are not sent. With `probe`, the first `generate`
    finds out whether one call gives n samples that differ and whose ends are known. If not, the engine asks for one
    sample at a time, and says so through `warn`.
    """

    def __init__(
        self,
        settings: ServerSettings,
        dialect: Dialect,
        *,
        check: RequestCheck = lambda request, params: None,
        probe: bool = False,
        warn: Callable[[str], None] = print,
    ) -> None:
        self._settings = settings
        self._dialect = dialect
        self._check = check
        self._probe = probe
        self._warn = warn
        self._model = settings.model
        self._one_at_a_time = False
        self._num_unknown_ends = 0

    def generate(
        self, requests: Sequence[GenerationRequest], params: SamplingParams, *, completed: Collection[str] = ()
    ) -> Iterator[tuple[Completion, ...]]:
        """See `protocols.GenerationEngine`. Requests are checked in this call, not at the first `next`."""
        plan = plan_samples(requests, params, completed, check=self._check)
        todo = [_Todo(r, plan.missing[r.key]) for r in plan.requests if r.key in plan.missing]
        return itertools.chain(plan.unanswered, self._stream(todo, params, Doubts(completed)))

    def close(self) -> None:
        """There is nothing to end. Connections belong to each `generate`, and servers to the job."""

    def _stream(self, todo: list[_Todo], params: SamplingParams, doubts: Doubts) -> Iterator[tuple[Completion, ...]]:
        """Run the event loop in a thread of its own, so that callers need no `async`."""
        if not todo:
            return
        results: queue.SimpleQueue[tuple[Completion, ...] | BaseException | None] = queue.SimpleQueue()
        started: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()

        async def work() -> None:
            loop, task = asyncio.get_running_loop(), asyncio.current_task()
            assert task is not None
            started.put(lambda: loop.call_soon_threadsafe(task.cancel))
            await self._ask_all(todo, params, _Out(results.put, doubts))

        def run() -> None:
            try:
                asyncio.run(work())
            except BaseException as e:
                results.put(e)
            else:
                results.put(None)

        thread = threading.Thread(target=run, name="openai-engine", daemon=True)
        thread.start()
        cancel = started.get()
        try:
            while (item := results.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            with contextlib.suppress(RuntimeError):  # the loop may have ended already
                cancel()
            thread.join()

    async def _ask_all(self, todo: list[_Todo], params: SamplingParams, out: _Out) -> None:
        s = self._settings
        are_here = all(httpx.URL(url).host in ("127.0.0.1", "localhost", "::1") for url in s.base_urls)
        transport = Transport(
            s.client, api_key=s.api_key, backoff_seconds=s.backoff_seconds, use_proxies=s.use_proxies and not are_here,
            restart_seconds=s.restart_seconds,
        )  # fmt: skip
        async with transport:
            self._model = self._model or await only_model(transport, s.base_urls[0])
            for url in s.base_urls if s.check_model else ():
                await check_model(transport, url, self._model)
            if self._probe:
                await self._find_out(transport, [one.request for one in todo], params)
            errors: list[EngineError] = []
            queued = deque(todo)

            async def work() -> None:
                while queued and not errors and not out.doubts.are_many:  # all workers take from this one queue
                    one = queued.popleft()
                    try:
                        await self._ask(transport, one, params, out)
                    except GivenUpError as e:
                        if e.may_be_its_own and one.is_last_try:
                            out.give(unanswered(one.request.key, one.missing, "refused", e.reason))
                        elif e.may_be_its_own and e.others_were_answered:
                            one.is_last_try = True
                            queued.append(one)
                        else:
                            errors.append(e)
                    except EngineError as e:
                        errors.append(e)

            while queued and not errors:
                await asyncio.gather(*(work() for _ in range(min(s.client.max_concurrency, len(queued)))))
                if not errors:
                    out.settle(at_end=not queued)
            if errors:
                more = f" ({len(errors) - 1} more requests failed)" if len(errors) > 1 else ""
                raise EngineError(f"{errors[0]}{more}. What was completed is kept; run again to go on.")

    async def _ask(self, transport: Transport, todo: _Todo, params: SamplingParams, out: _Out) -> None:
        """Ask for one request until none of its samples is missing."""
        request, key = todo.request, todo.request.key
        one_at_a_time, refusal = self._one_at_a_time, ""
        num_answers = num_fruitless = 0
        while todo.missing:
            # The first call asks for all n samples, even if only some are missing. Its choice i is sample i, so that a
            # run that goes on asks the same question as before. Later calls ask for the missing samples alone.
            whole = num_answers == 0 and not one_at_a_time
            n = request.n if whole else 1 if one_at_a_time else len(todo.missing)
            if params.temperature == 0:
                n = 1  # all samples are the same, and TensorRT-LLM refuses to give more than one
            # Calls have different seeds, because with the same one a server could repeat itself. One at a time, the
            # index of the sample makes the seed.
            seed = seed_of(request, todo.missing[0] if one_at_a_time else num_answers)
            body = self._dialect.body(request, params, model=self._model, n=n, seed=seed)
            try:
                answer = await transport.post(self._url(request) + self._dialect.path, body)
            except RefusedError as e:
                if e.concerns is None and e.status not in (400, 422):
                    raise
                if e.concerns or n == 1:
                    failed = unanswered(key, todo.missing, e.concerns or "refused", e.reason)
                    return out.give(failed, doubtful=e.concerns is None)
                # Some servers take no n but 1, and llama.cpp's has a limit for n. So the next call asks for one sample.
                one_at_a_time, refusal = True, str(e)
                continue
            if refusal:
                self._takes_one_at_a_time(refusal)
            if concerns := concerns_error(answer):
                return out.give(unanswered(key, todo.missing, concerns, server_message(answer)))
            try:
                samples, problems = self._samples(answer, params, n, request.stop)
            except UnknownEndError as e:
                self._has_unknown_ends(str(e))
                one_at_a_time = True
                continue
            taken = _assigned(samples, todo.missing, greedy=params.temperature == 0, by_index=whole)
            if taken:
                out.give(tuple(Completion(request_key=key, index=i, **vars(s)) for i, s in taken.items()))
                todo.missing = [i for i in todo.missing if i not in taken]
            num_answers, num_fruitless = num_answers + 1, 0 if taken else num_fruitless + 1
            if num_fruitless == NUM_FRUITLESS:
                reason = f"{NUM_FRUITLESS} answers had nothing usable. The last one: {'; '.join(problems)}"
                return out.give(unanswered(key, todo.missing, "malformed", reason), doubtful=True)
            if num_fruitless:
                await transport.wait(num_fruitless - 1)  # an answer of 200 can be an error, too, and may pass

    def _takes_one_at_a_time(self, refusal: str) -> None:
        """The server took n=1, so n was the reason for its refusal. Now all requests ask for one sample at a time."""
        if not self._one_at_a_time:
            self._warn(f"{refusal}. It takes n=1: samples are asked for one at a time, which is slower")
            self._one_at_a_time = True

    def _has_unknown_ends(self, problem: str) -> None:
        """An answer of several samples did not tell how each of them ended. If that is the rule, n is 1 from now on."""
        self._num_unknown_ends += 1
        if self._num_unknown_ends == NUM_FRUITLESS and not self._one_at_a_time:
            self._warn(f"{problem}. {_UNKNOWN_ENDS}")
            self._one_at_a_time = True

    def _url(self, request: GenerationRequest) -> str:
        """The replica of a request. It is always the same one, because that one may still have the prompt."""
        urls = self._settings.base_urls
        return urls[zlib.crc32(request.key.encode()) % len(urls)]

    def _samples(
        self, answer: httpx.Response, params: SamplingParams, n: int, stop: Sequence[str] = ()
    ) -> tuple[dict[int, Sample], list[str]]:
        """The usable choices by index, and what is wrong with the others.

        Raises `UnknownEndError` if one of several choices does not tell how it ended.
        """
        found = error_body(answer)
        name = self._dialect.choices
        choices = found.get(name) if isinstance(found, dict) else None
        if not isinstance(choices, list):
            return {}, [f"no JSON with `{name}`: {answer.text[:200]!r}"]
        samples: dict[int, Sample] = {}
        problems: list[str] = []
        for place, choice in enumerate(choices):
            index = choice.get("index") if isinstance(choice, dict) else -1
            index = place if index is None else index
            if not isinstance(index, int) or not 0 <= index < n or index in samples:
                problems.append(f"a choice with index={index!r} of n={n}")
                continue
            try:
                samples[index] = self._dialect.sample(choice, params, stop)
            except BadChoiceError as e:
                if n > 1 and isinstance(e, UnknownEndError):
                    raise
                problems.append(f"choice {index}: {e}")
        if len(samples) + len(problems) < n:
            problems.append(f"{len(choices)} choices instead of {n}")
        return samples, problems

    async def _find_out(
        self, transport: Transport, requests: Sequence[GenerationRequest], params: SamplingParams
    ) -> None:
        """Ask for two short samples of one request, and adapt to what comes. What is refused for n=2 is asked for n=1.

        Raises `EngineError` if log-probabilities are needed and do not come, or if the server cannot be asked at all.
        """
        self._probe = False
        several = params.temperature > 0 and any(r.n > 1 for r in requests)
        if not several and not params.num_logprobs:
            return
        request = min(requests, key=lambda r: len(r.prompt_token_ids) or len(r.text))
        downgrade = await self._tried(transport, request, params.num_logprobs, n=2 if several else 1)
        if downgrade and await self._tried(transport, request, params.num_logprobs, n=1) is None:
            self._warn(f"{self._url(request)}: {downgrade}: samples are asked for one at a time, which is slower")
            self._one_at_a_time = True

    async def _tried(
        self, transport: Transport, request: GenerationRequest, num_logprobs: int, *, n: int
    ) -> str | None:
        """Why not to ask this server for n samples at once. None if nothing speaks against it.

        The probe is hot. At usual temperatures, two short samples of a trained model are often the same by chance.
        """
        probing = SamplingParams(temperature=_HOT, top_p=1.0, max_tokens=16, num_logprobs=num_logprobs)
        reason: str | None = None
        for number in range(NUM_FRUITLESS):
            body = self._dialect.body(request, probing, model=self._model, n=n, seed=seed_of(request, number))
            try:
                answer = await transport.post(self._url(request) + self._dialect.path, body)
                samples, problems = self._samples(answer, probing, n, request.stop)
            except UnknownEndError as e:
                return f"{e}. {_UNKNOWN_ENDS}"
            except RefusedError as e:
                if e.concerns is not None:
                    return None  # it is about this request alone
                if num_logprobs and "logprobs" in str(e):
                    raise EngineError(f"{_NO_LOGPROBS} It said: {e}") from e
                if e.status not in (400, 422):
                    raise
                return str(e)
            if num_logprobs and not samples and any("logprobs" in p for p in problems):
                raise EngineError(f"{_NO_LOGPROBS} {'; '.join(problems)}")
            if len(samples) == n and (n == 1 or len({s.text for s in samples.values()}) > 1):
                return None
            same = f"gives the same sample {n} times for n={n}"
            reason = same if len(samples) == n else f"gives {len(samples)} usable samples for n={n}"
        return reason


_HOT = 2.0
"""The temperature of the probe: the highest one that OpenAI's API takes."""
_UNKNOWN_ENDS = (
    "The server tells it for the last sample to end only, as TensorRT-LLM 1.1 and 1.2 do. Its answers for n=1 tell it. "
    "TensorRT-LLM gives token ids with engine=trtllm, or with engine.api=completions engine.extra_body={detokenize: "
    "false}. Then all n samples may come in one answer"
)
_NO_LOGPROBS = (
    "judge.mode='expected' needs log-probabilities, and the server gives none for /v1/completions. Use a newer server, "
    "or another engine. Or use judge.mode=sampled with a new run_dir, because M1 learns to judge in this mode."
)


def _assigned(samples: dict[int, Sample], missing: Sequence[int], *, greedy: bool, by_index: bool) -> dict[int, Sample]:
    """Which usable choice becomes which missing sample."""
    if greedy:
        return {i: sample for sample in samples.values() for i in missing}  # there is one choice, for all samples
    if by_index:
        return {i: samples[i] for i in missing if i in samples}
    return dict(zip(missing, samples.values(), strict=False))


def concerns_error(answer: httpx.Response) -> FinishReason | None:
    """Whether an answer of 200 is an error about the one request, as some servers send it."""
    found = error_body(answer)
    is_error = isinstance(found, dict) and found.get("error") and not found.get("choices")
    return concerns_request(200, found) if is_error else None


def seed_of(request: GenerationRequest, salt: int) -> int:
    """A seed of 31 bits for one attempt at a request."""
    digest = hashlib.sha256(f"{request.seed}/{salt}/{request.key}".encode()).digest()
    return int.from_bytes(digest[:4], "little") >> 1


async def check_model(transport: Transport, base_url: str, model: str) -> None:
    """Raise `EngineError` if a server has another model than the one that is to answer."""
    if model not in (names := await _models(transport, base_url)):
        raise EngineError(
            f"{base_url}: this server has {', '.join(names)}, and the stage asks {model}. It belongs to another run or "
            "is a leftover of one. Run again: the stage then starts servers on other ports."
        )


async def only_model(transport: Transport, base_url: str) -> str:
    """The name of the only model that a server lists."""
    names = await _models(transport, base_url)
    if len(names) != 1:
        raise EngineError(f"engine.model='': {base_url} lists {len(names)} models ({', '.join(names[:10])}). Name one.")
    return names[0]


async def _models(transport: Transport, base_url: str) -> list[str]:
    answer = await transport.get(f"{base_url}/models")
    try:
        return [str(m["id"]) for m in answer.json()["data"]]
    except (ValueError, KeyError, TypeError) as e:
        raise EngineError(f"{base_url}/models: not a list of models: {answer.text[:200]!r}") from e
