"""What TensorRT-LLM is asked, and what it must not be asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nemo_srl.config import EngineConfig
from nemo_srl.engines.openai.dialects import CompletionsDialect, Sample
from nemo_srl.errors import ConfigError, DataError
from nemo_srl.models.hf import ModelSpec
from nemo_srl.protocols import GenerationRequest, SamplingParams


@dataclass(frozen=True)
class TrtllmDialect:
    """Token ids to `trtllm-serve`, which refuses fields that it does not know.

    It would add a second beginning-of-sequence token to a rendered prompt, hence `add_special_tokens=false`.
    With `detokenize=false` it returns token ids, which are decoded here exactly as the other engines do and
    give each sample's own number of tokens; its usage figures are sums over n.
    """

    completions: CompletionsDialect
    path: str = "/completions"

    def body(
        self, request: GenerationRequest, params: SamplingParams, *, model: str, n: int, seed: int
    ) -> dict[str, Any]:
        return {
            **self.completions.body(request, params, model=model, n=n, seed=seed),
            "add_special_tokens": False,
            "detokenize": False,
            # 0 keeps all tokens; 1 is greedy, whatever the version makes of a temperature of 0.
            "top_k": 1 if params.temperature == 0 else 0,
            "temperature": params.temperature or 1.0,
            "stop_token_ids": list(self.completions.end_token_ids),
        }

    def sample(self, choice: Mapping[str, Any], params: SamplingParams) -> Sample:
        return self.completions.sample(choice, params)


def max_seq_len(cfg: EngineConfig, spec: ModelSpec) -> int:
    """Tokens of one prompt and its completion at most."""
    asked, context = cfg.trtllm.max_seq_len, spec.max_position_embeddings
    if asked is not None and asked > context:
        raise ConfigError(f"engine.trtllm.max_seq_len={asked}: the model's context has {context} tokens")
    return context if asked is None else asked


def length_check(limit: int) -> Callable[[Sequence[GenerationRequest], SamplingParams], None]:
    """Refuses prompts that leave no room for `max_tokens` more."""

    def check(requests: Sequence[GenerationRequest], params: SamplingParams) -> None:
        for request in requests:
            length = len(request.prompt_token_ids)
            if not length:
                raise DataError(f"request {request.key!r}: its prompt has no tokens")
            if length + params.max_tokens > limit:
                raise DataError(
                    f"request {request.key!r}: prompt of {length} tokens + max_tokens={params.max_tokens} exceed the "
                    f"limit of {limit} tokens (the model's context, or engine.trtllm.max_seq_len). Shorten the prompt "
                    "or lower max_tokens."
                )

    return check
