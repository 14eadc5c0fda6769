"""A module that stands in for `tensorrt_llm`: it knows the recorded names only, and refuses what the real one does."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from tests.trtllm_contract import problem_with_options, unknown_names

Reply = Callable[[list[int], Any, int], Mapping[str, Any]]
"""(prompt, sampling parameters, sample index) -> token_ids, finish_reason and logprobs of an output."""


def install(monkeypatch: pytest.MonkeyPatch, reply: Reply) -> types.ModuleType:
    class SamplingParams(SimpleNamespace):
        def __init__(self, **given: Any) -> None:
            if unknown := unknown_names("sampling_params", given):
                raise TypeError(f"SamplingParams got an unexpected keyword argument {unknown}")
            super().__init__(**{"n": 1, "top_k": None, "top_p": None, "max_tokens": 32, **given})
            greedy = self.top_k == 1 or (self.top_k is None and self.top_p is None)
            if greedy and self.n > 1:
                raise ValueError("Greedy decoding in the LLM API does not allow multiple returns")
            if self.top_k is not None and self.top_k < 0:
                raise ValueError("require top_k >= 0")

    class Future:
        def __init__(self, outputs: list[SimpleNamespace]) -> None:
            self.outputs = outputs

        def result(self, timeout: float | None = None) -> Future:
            return self

    class LLM:
        def __init__(self, model: str, **options: Any) -> None:
            if problem := problem_with_options({"model": model, **options}):
                raise ValueError(problem)
            self.model, self.options, self.is_shut_down = model, options, False
            self.calls: list[tuple[list[int], SamplingParams]] = []
            module.instances.append(self)

        def generate_async(self, inputs: dict[str, list[int]], **given: Any) -> Future:
            assert not unknown_names("generate_async", given)
            sampling, ids = given["sampling_params"], inputs["prompt_token_ids"]
            if len(ids) + sampling.max_tokens > self.options["max_seq_len"]:
                raise ValueError("should not exceed max_seq_len")
            self.calls.append((ids, sampling))
            outputs = [{"index": i, "logprobs": [], **reply(ids, sampling, i)} for i in range(sampling.n)]
            return Future([SimpleNamespace(**output) for output in outputs])

        def shutdown(self) -> None:
            self.is_shut_down = True

    module: Any = types.ModuleType("tensorrt_llm")
    module.LLM, module.SamplingParams, module.instances = LLM, SamplingParams, []
    monkeypatch.setitem(sys.modules, "tensorrt_llm", module)
    found: types.ModuleType = module
    return found
