"""TensorRT-LLM's `LLM` class in this process, behind `GenerationEngine`: one replica, no servers.

For one node, or to look at a failure without HTTP. `tensorrt_llm` is imported when the engine is opened and
must be installed, as it is in its own container. `max_concurrency` requests are under way at once;
they are yielded in the order of the requests, each with all its samples, so a kill loses at most those.

Raises `ConfigError` where `tensorrt_llm` is missing or refuses an option, `EngineError` for a request that
fails. Not covered: several nodes, and the memory of a closed engine, which TensorRT-LLM gives back only at
the end of the process (here: the stage's).
"""

from __future__ import annotations

import importlib
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from nemo_srl.engines.checks import check_keys
from nemo_srl.engines.openai.dialects import FINISH_REASONS, TokenLogprob, load_tokenizer, number_logprobs
from nemo_srl.engines.openai.engine import seed_of
from nemo_srl.engines.trtllm.options import llm_options, llm_sizes
from nemo_srl.engines.trtllm.requests import length_check, max_seq_len
from nemo_srl.engines.trtllm.settings import TrtllmSettings
from nemo_srl.errors import ConfigError, EngineError
from nemo_srl.models.hf import read_spec
from nemo_srl.protocols import GenerationRequest, SamplingParams
from nemo_srl.records import Completion


class InProcessEngine:
    """Serves the Hugging Face directory `model_dir` on this process's GPUs."""

    def __init__(self, cfg: TrtllmSettings, model_dir: Path) -> None:
        if cfg.backend != "pytorch":
            raise ConfigError(f"engine.backend={cfg.backend!r}: engine.in_process=true is for 'pytorch' only")
        self._trtllm = _import()
        spec = read_spec(model_dir)
        self._end_token_ids = spec.eos_token_ids
        self._limit = max_seq_len(cfg, spec)
        self._window = cfg.max_concurrency
        self._timeout = cfg.timeout_seconds
        self._tokenizer = load_tokenizer(model_dir)
        options = {**llm_sizes(cfg, max_seq_len=self._limit), **llm_options(cfg)}
        try:
            self._llm = self._trtllm.LLM(model=str(model_dir), **options)
        except (ValueError, TypeError) as e:
            raise ConfigError(f"TensorRT-LLM refuses its options (see engine.extra_options): {e}") from e

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        params: SamplingParams,
        *,
        completed: Collection[str] = (),
    ) -> Iterator[tuple[Completion, ...]]:
        """See `protocols.GenerationEngine`."""
        check_keys(requests)
        length_check(self._limit)(requests, params)
        done = set(completed)
        todo = [r for r in requests if any(f"{r.key}/{i:02d}" not in done for i in range(r.n))]
        return self._generate(todo, params, done)

    def close(self) -> None:
        """Ends TensorRT-LLM's worker processes."""
        self._llm.shutdown()

    def _generate(
        self, requests: list[GenerationRequest], params: SamplingParams, done: set[str]
    ) -> Iterator[tuple[Completion, ...]]:
        todo = iter(requests)
        under_way = deque((r, self._submit(r, params)) for r in islice(todo, self._window))
        while under_way:
            request, future = under_way.popleft()
            try:
                output = future.result(timeout=self._timeout)
            except Exception as e:
                raise EngineError(f"request {request.key!r}: TensorRT-LLM failed: {type(e).__name__}: {e}") from e
            under_way.extend((r, self._submit(r, params)) for r in islice(todo, 1))
            completions = self._completions(request, output.outputs, params)
            if new := tuple(c for c in completions if c.key not in done):
                yield new

    def _submit(self, request: GenerationRequest, params: SamplingParams) -> Any:
        greedy = params.temperature == 0
        sampling = self._trtllm.SamplingParams(
            n=1 if greedy else request.n,  # n greedy samples are the same, and refused
            temperature=params.temperature or 1.0,
            top_p=params.top_p,
            top_k=1 if greedy else 0,
            seed=seed_of(request, 0),
            max_tokens=params.max_tokens,
            stop_token_ids=list(self._end_token_ids),
            stop=list(request.stop) or None,
            include_stop_str_in_output=bool(request.stop),
            logprobs=params.num_logprobs or None,
            detokenize=False,
            add_special_tokens=False,
        )
        try:
            prompt = {"prompt_token_ids": list(request.prompt_token_ids)}
            return self._llm.generate_async(prompt, sampling_params=sampling)
        except (ValueError, RuntimeError) as e:
            raise EngineError(f"request {request.key!r}: TensorRT-LLM refuses it: {e}") from e

    def _completions(
        self, request: GenerationRequest, outputs: Sequence[Any], params: SamplingParams
    ) -> list[Completion]:
        if params.temperature == 0:
            outputs = [outputs[0]] * request.n
        if len(outputs) != request.n:
            raise EngineError(f"request {request.key!r}: TensorRT-LLM gave {len(outputs)} samples for n={request.n}")
        return [self._completion(request, i, output, params) for i, output in enumerate(outputs)]

    def _completion(self, request: GenerationRequest, index: int, output: Any, params: SamplingParams) -> Completion:
        reason = FINISH_REASONS.get(str(output.finish_reason))
        if reason is None:
            raise EngineError(f"request {request.key!r}: sample {index} ended with {output.finish_reason!r}")
        ids = list(output.token_ids)
        kept = ids[:-1] if reason == "stop" and ids and ids[-1] in self._end_token_ids else ids
        text = self._decode(kept)
        numbers = None
        if params.num_logprobs:
            if not output.logprobs:
                raise EngineError(f"request {request.key!r}: TensorRT-LLM gave no log-probabilities")
            numbers = number_logprobs(text, self._token_logprobs(ids, output.logprobs)[: len(kept)])
        return Completion(
            request_key=request.key,
            index=index,
            text=text,
            num_tokens=len(kept) + (reason == "stop"),
            finish_reason=reason,
            number_logprobs=numbers,
        )

    def _token_logprobs(self, ids: list[int], logprobs: Sequence[Mapping[int, Any]]) -> list[TokenLogprob]:
        return [
            TokenLogprob(self._decode([i]), {self._decode([j]): float(p.logprob) for j, p in top.items()})
            for i, top in zip(ids, logprobs, strict=False)
        ]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _import() -> Any:
    try:
        return importlib.import_module("tensorrt_llm")
    except ImportError as e:
        raise ConfigError(
            f"engine.in_process=true: tensorrt_llm cannot be imported ({e}). Run in TensorRT-LLM's container."
        ) from e
