"""What vLLM is asked, and what is read from its answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nemo_srl.engines.openai.dialects import BadChoiceError, CompletionsDialect, Sample, decode
from nemo_srl.engines.served import ending_fields
from nemo_srl.protocols import GenerationRequest, SamplingParams

_TOKEN_ID = "token_id:"


@dataclass(frozen=True)
class VllmDialect:
    """Token ids to `vllm serve`, and token ids back.

    vLLM ignores fields that it does not know, so a test compares them with its record. The text in its answer is not
    used: at the beginning it may have characters of the prompt, where a token is part of a character. The ids include
    the token that ended the sample. Log-probabilities come by token ids as well, because the text that vLLM gives to a
    token depends on the tokens before it.
    """

    completions: CompletionsDialect
    path: str = "/completions"
    choices: str = "choices"

    def body(
        self, request: GenerationRequest, params: SamplingParams, *, model: str, n: int, seed: int
    ) -> dict[str, Any]:
        return {
            **self.completions.body(request, params, model=model, n=n, seed=seed),
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            **ending_fields(request, self.completions.end_token_ids),
        }

    def sample(self, choice: Mapping[str, Any], params: SamplingParams, stop: Sequence[str] = ()) -> Sample:
        if not isinstance(choice.get("token_ids"), list):
            raise BadChoiceError(f"token_ids={choice.get('token_ids')!r}, although they were asked for")
        if not params.num_logprobs:
            return self.completions.sample(choice, params, stop)
        return self.completions.sample({**choice, "logprobs": self._with_texts(choice.get("logprobs"))}, params, stop)

    def _with_texts(self, logprobs: Any) -> dict[str, Any]:
        """The log-probabilities of a choice, by the texts of the tokens."""
        try:
            return {
                "tokens": [self._text(token) for token in logprobs["tokens"]],
                "token_logprobs": logprobs["token_logprobs"],
                "top_logprobs": [
                    {self._text(token): p for token, p in (top or {}).items()} for top in logprobs["top_logprobs"]
                ],
            }
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise BadChoiceError(f"logprobs of an unknown shape ({type(e).__name__}: {e})") from e

    def _text(self, token: str) -> str:
        return decode(self.completions.tokenizer, [int(token.removeprefix(_TOKEN_ID))])
