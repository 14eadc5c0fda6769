"""What TensorRT-LLM is asked, and what it must not be asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nemo_srl.engines.checks import RequestCheck, length_check
from nemo_srl.engines.openai.dialects import CompletionsDialect, Sample
from nemo_srl.engines.served import ending_fields, sequence_limit
from nemo_srl.engines.trtllm.settings import TrtllmSettings
from nemo_srl.models.hf import ModelSpec
from nemo_srl.protocols import GenerationRequest, SamplingParams


@dataclass(frozen=True)
class TrtllmDialect:
    """Token ids to `trtllm-serve`, which refuses fields that it does not know.

    With `add_special_tokens=false` it does not add a second beginning-of-sequence token to a rendered prompt. With
    `detokenize=false` it returns token ids. They are decoded here as in the other engines, and they tell the number of
    tokens of each sample. The server's own usage figures are sums over the n samples.
    """

    completions: CompletionsDialect
    path: str = "/completions"
    choices: str = "choices"

    def body(
        self, request: GenerationRequest, params: SamplingParams, *, model: str, n: int, seed: int
    ) -> dict[str, Any]:
        return {
            **self.completions.body(request, params, model=model, n=n, seed=seed),
            "add_special_tokens": False,
            "detokenize": False,
            # 0 keeps all tokens, and 1 is greedy. What a temperature of 0 means may differ between versions.
            "top_k": 1 if params.temperature == 0 else 0,
            "temperature": params.temperature or 1.0,
            # The server compares token ids. A stop string that the model writes in other tokens does not stop it.
            **ending_fields(request, self.completions.end_token_ids),
            # Without this, the server cuts an end token off the ids and not off the log-probabilities. Then the two
            # lists differ in length, and the answer is an error of status 400.
            "include_stop_str_in_output": True,
        }

    def sample(self, choice: Mapping[str, Any], params: SamplingParams, stop: Sequence[str] = ()) -> Sample:
        return self.completions.sample(choice, params, stop)


def max_seq_len(cfg: TrtllmSettings, spec: ModelSpec) -> int:
    """The most tokens that a prompt and its completion may have together. Raises `ConfigError`."""
    return sequence_limit("max_seq_len", cfg.max_seq_len, spec.max_position_embeddings)


def prompt_check(limit: int) -> RequestCheck:
    """Finds prompts that leave no room for `max_tokens` more."""
    return length_check(limit, "the model's context, or engine.max_seq_len")
