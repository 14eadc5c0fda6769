"""TensorRT-LLM's `LLM` class in this process, behind `GenerationEngine`: one replica, no servers.

Use it on one node, or to look at a failure without HTTP. `tensorrt_llm` is imported when the engine is opened. It must
be installed, as it is in its own container. `max_concurrency` requests are under way at once. They are yielded in the
order of the requests, each with all its samples. A kill loses those under way and no others.

Raises `ConfigError` where `tensorrt_llm` is missing or refuses an option, and `EngineError` if it fails. A request that
it refuses is not answered, unless it refuses everything.
Not covered: several nodes, and the memory of a closed engine. TensorRT-LLM gives it back at the end of the process
only, which is here the end of the stage.
"""

from __future__ import annotations

import importlib
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future
from itertools import chain, islice
from pathlib import Path
from typing import Any

from nemo_srl.engines.checks import plan_samples
from nemo_srl.engines.openai.dialects import BadChoiceError, CompletionsDialect, decode
from nemo_srl.engines.openai.engine import seed_of
from nemo_srl.engines.openai.refusals import concerns_request
from nemo_srl.engines.trtllm.options import llm_options, llm_sizes
from nemo_srl.engines.trtllm.requests import max_seq_len, prompt_check
from nemo_srl.engines.trtllm.settings import TrtllmSettings
from nemo_srl.engines.unanswered import Doubts, unanswered
from nemo_srl.errors import ConfigError, EngineError
from nemo_srl.models.hf import read_spec
from nemo_srl.models.tokenizer import load_tokenizer
from nemo_srl.protocols import GenerationRequest, SamplingParams
from nemo_srl.records import Completion


class InProcessEngine:
    """Serves the Hugging Face directory `model_dir` on this process's GPUs."""

    def __init__(self, cfg: TrtllmSettings, model_dir: Path) -> None:
        if cfg.backend != "pytorch":
            raise ConfigError(f"engine.backend={cfg.backend!r}: engine.in_process=true is for 'pytorch' only")
        self._trtllm = _import()
        spec = read_spec(model_dir)
        limit = max_seq_len(cfg, spec)
        self._check = prompt_check(limit)
        self._window = cfg.max_concurrency
        self._timeout = cfg.timeout_seconds
        self._dialect = CompletionsDialect(load_tokenizer(model_dir), spec.eos_token_ids)
        options = {**llm_sizes(cfg, max_seq_len=limit), **llm_options(cfg)}
        try:
            self._llm = self._trtllm.LLM(model=str(model_dir), **options)
        except (ValueError, TypeError) as e:
            raise ConfigError(f"TensorRT-LLM refuses its options (see engine.extra_options): {e}") from e

    def generate(
        self, requests: Sequence[GenerationRequest], params: SamplingParams, *, completed: Collection[str] = ()
    ) -> Iterator[tuple[Completion, ...]]:
        """See `protocols.GenerationEngine`. Requests are checked in this call, not at the first `next`."""
        plan = plan_samples(requests, params, completed, check=self._check)
        asked = [r for r in plan.requests if r.key in plan.missing]
        return chain(plan.unanswered, self._generate(asked, params, plan.missing, Doubts(completed)))

    def close(self) -> None:
        """Ends TensorRT-LLM's worker processes."""
        self._llm.shutdown()

    def _generate(
        self, requests: list[GenerationRequest], params: SamplingParams, missing: dict[str, list[int]], doubts: Doubts
    ) -> Iterator[tuple[Completion, ...]]:
        todo = iter(requests)
        under_way: deque[tuple[GenerationRequest, Any]] = deque()
        while True:
            if not doubts.are_many:
                room = self._window - len(under_way)
                under_way.extend((r, self._submit(r, params)) for r in islice(todo, room))
            if not under_way:
                yield from doubts.settled(at_end=not doubts.are_many)
                return
            request, future = under_way.popleft()
            try:
                output = future.result(timeout=self._timeout)
                completions = self._completions(request, output.outputs, params)
            except Exception as e:
                concerns = None if isinstance(e, BadChoiceError) else concerns_request(400, str(e))
                # RequestError is TensorRT-LLM's name for a failure of one request. It checks requests by ValueErrors.
                if concerns is None and type(e).__name__ != "RequestError" and not isinstance(e, ValueError):
                    raise EngineError(f"request {request.key!r}: TensorRT-LLM failed: {type(e).__name__}: {e}") from e
                reason = f"TensorRT-LLM: {e}"
                failed = unanswered(request.key, missing[request.key], concerns or "malformed", reason)
                yield from doubts.passed(failed, doubtful=concerns is None)
            else:
                yield from doubts.passed(tuple(c for c in completions if c.index in missing[request.key]))

    def _submit(self, request: GenerationRequest, params: SamplingParams) -> Any:
        greedy = params.temperature == 0
        sampling = self._trtllm.SamplingParams(
            n=1 if greedy else request.n,  # n greedy samples would be the same, and TensorRT-LLM refuses them
            temperature=params.temperature or 1.0,
            top_p=params.top_p,
            top_k=1 if greedy else 0,
            seed=seed_of(request, 0),
            max_tokens=params.max_tokens,
            stop_token_ids=list(self._dialect.end_token_ids),
            stop=list(request.stop) or None,
            include_stop_str_in_output=True,  # else ids and log-probabilities may differ in number
            logprobs=params.num_logprobs or None,
            detokenize=False,
            add_special_tokens=False,
        )
        prompt = {"prompt_token_ids": list(request.prompt_token_ids)}
        try:
            return self._llm.generate_async(prompt, sampling_params=sampling)
        except (ValueError, RuntimeError) as e:  # raised again by whoever takes the result
            refused: Future[Any] = Future()
            refused.set_exception(e)
            return refused

    def _completions(
        self, request: GenerationRequest, outputs: Sequence[Any], params: SamplingParams
    ) -> list[Completion]:
        if params.temperature == 0:
            outputs = [outputs[0]] * request.n
        if len(outputs) != request.n:
            raise EngineError(f"request {request.key!r}: TensorRT-LLM gave {len(outputs)} samples for n={request.n}")
        samples = [self._dialect.sample(self._choice(output, params), params, request.stop) for output in outputs]
        return [Completion(request_key=request.key, index=i, **vars(sample)) for i, sample in enumerate(samples)]

    def _choice(self, output: Any, params: SamplingParams) -> dict[str, Any]:
        """An output, as `trtllm-serve` would send it."""

        def text(token: int) -> str:
            return decode(self._dialect.tokenizer, [token])

        choice = {
            "finish_reason": output.finish_reason,
            "stop_reason": getattr(output, "stop_reason", None),
            "token_ids": list(output.token_ids),
        }
        if params.num_logprobs and output.logprobs:
            rows = list(zip(output.token_ids, output.logprobs, strict=False))
            choice["logprobs"] = {
                "tokens": [text(i) for i, _ in rows],
                "token_logprobs": [None] * len(rows),  # the generated token is among the most probable ones
                "top_logprobs": [{text(j): float(p.logprob) for j, p in top.items()} for _, top in rows],
            }
        return choice


def _import() -> Any:
    try:
        return importlib.import_module("tensorrt_llm")
    except ImportError as e:
        raise ConfigError(
            f"engine.in_process=true: tensorrt_llm cannot be imported ({e}). Run in TensorRT-LLM's container."
        ) from e
