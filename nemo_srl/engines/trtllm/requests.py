"""What TensorRT-LLM is asked, and what it must not be asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from nemo_srl.engines.checks import check_lengths
from nemo_srl.engines.openai.dialects import CompletionsDialect, Sample
from nemo_srl.engines.trtllm.settings import TrtllmSettings
from nemo_srl.errors import ConfigError
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
            # Compared with token ids there: a string that the model wrote in other tokens does not stop it.
            **({"stop": list(request.stop), "include_stop_str_in_output": True} if request.stop else {}),
        }

    def sample(self, choice: Mapping[str, Any], params: SamplingParams) -> Sample:
        return self.completions.sample(choice, params)


def max_seq_len(cfg: TrtllmSettings, spec: ModelSpec) -> int:
    """Tokens of one prompt and its completion at most."""
    asked, context = cfg.max_seq_len, spec.max_position_embeddings
    if asked is not None and asked > context:
        raise ConfigError(f"engine.max_seq_len={asked}: the model's context has {context} tokens")
    return context if asked is None else asked


def length_check(limit: int) -> Callable[[Sequence[GenerationRequest], SamplingParams], None]:
    """Refuses prompts that leave no room for `max_tokens` more."""
    return partial(check_lengths, limit=limit, limited_by="the model's context, or engine.max_seq_len")
