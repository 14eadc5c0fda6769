"""A model whose distribution is known, and whether samples of it are right.

Each next token has the same probability, whatever stands before. Two tokens end an answer. So the share of samples that
end, their lengths and the log-probabilities of digits follow from arithmetic. An engine that ignores one of the ends,
loses short samples, or gives one sample several times, is found.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from nemo_srl.records import ANSWERED, Completion

ENDS = ("<|end|>", "<|turn|>")
P_END = 0.12
"""The probability of each of the two ends."""
NUM_PROMPTS, N, MAX_TOKENS = 32, 4, 8
SIGMAS = 5.0
LOGPROB_TOLERANCE = 0.1
"""bfloat16 has three digits."""
HEADS = 8
"""Attention heads and query groups. Tensor parallel sizes up to this one divide them."""


def logits(num_tokens: int) -> list[float]:
    """The logit of each token. Digits differ, so that their log-probabilities can be told apart."""
    letters = [chr(c) for c in range(ord("!"), ord("~") + 1)]
    texts = [*ENDS, " ", *letters]
    found = [0.2 * int(t) if t.isdigit() else 0.0 for t in texts]
    others = sum(math.exp(x) for x in found[len(ENDS) :])
    end = math.log(P_END / (1 - len(ENDS) * P_END) * others)
    return [end] * len(ENDS) + found[len(ENDS) :]


def digit_logprobs() -> dict[str, float]:
    """The natural logarithm of each digit's probability."""
    found = logits(0)
    total = math.log(sum(map(math.exp, found)))
    first = len(ENDS) + 1 + ord("0") - ord("!")
    return {str(d): found[first + d] - total for d in range(10)}


def write_model(directory: Path) -> None:
    """A Llama of 10M parameters. Its layers add nothing, its hidden state is 1 everywhere, its head has the logits."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from nemo_srl.doctor.tiny import write_tokenizer

    num_tokens, hidden = write_tokenizer(directory, ENDS), 64 * HEADS
    config = LlamaConfig(
        vocab_size=num_tokens, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=4,
        num_attention_heads=HEADS, num_key_value_heads=HEADS, max_position_embeddings=1024, rms_norm_eps=1e-5,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=[0, 1], pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.zero_()
        model.model.embed_tokens.weight.fill_(1.0)
        model.lm_head.weight.copy_(torch.tensor(logits(num_tokens))[:, None].expand(-1, hidden) / hidden)
    model.to(torch.bfloat16).save_pretrained(directory)


def problems(completions: Sequence[Completion]) -> Iterator[str]:
    """What is wrong with `NUM_PROMPTS` x `N` samples of at most `MAX_TOKENS` tokens."""
    if unanswered := [c for c in completions if c.finish_reason not in ANSWERED]:
        yield f"{len(unanswered)} samples are unusable: {unanswered[0].reason}"
    answered = [c for c in completions if c.finish_reason in ANSWERED]
    by_request: dict[str, list[Completion]] = {}
    for c in completions:
        by_request.setdefault(c.request_key, []).append(c)
    if len(by_request) != NUM_PROMPTS or any(len(found) != N for found in by_request.values()):
        yield f"{len(completions)} samples of {len(by_request)} prompts instead of {N} of each of {NUM_PROMPTS}"
    if shown := sorted({end for end in ENDS for c in answered if end in c.text}):
        yield f"the tokens {', '.join(shown)} are part of texts"
    too_long = [c for c in answered if c.num_tokens > MAX_TOKENS]
    uneven = [c for c in answered if len(c.text) != c.num_tokens - (c.finish_reason == "stop")]
    if too_long or uneven:
        yield f"{len(too_long)} samples are over max_tokens={MAX_TOKENS}, and {len(uneven)} have lost or added letters"
    yield from _copies(by_request)
    if answered:
        yield from _distribution(answered)


def wrong_logprobs(completions: Sequence[Completion]) -> Iterator[str]:
    """What is wrong with the log-probabilities of digits."""
    true, digits = digit_logprobs(), 0
    for c in completions:
        if c.number_logprobs is None:
            yield f"{c.request_key}: there are none"
            return
        reported = {at: row for at, row in c.number_logprobs}
        for at, letter in enumerate(c.text):
            if not letter.isdigit() or not letter.isascii():
                continue
            digits += 1
            row = reported.get(at, {})
            if letter not in row:
                yield f"{c.request_key}: the digit at {at} of {c.text!r} has no log-probability of its own"
                return
            if far := {t: p for t, p in row.items() if t in true and abs(p - true[t]) > LOGPROB_TOLERANCE}:
                token, value = next(iter(far.items()))
                yield f"log p({token!r}) is {value:.3f} instead of {true[token]:.3f}"
                return
    if not digits:
        yield "no sample has a digit"


def _copies(by_request: Mapping[str, Sequence[Completion]]) -> Iterator[str]:
    """Long answers to one prompt that are equal. By chance, two equal ones of three letters are rare."""
    equal = sum(
        len(texts) - len(set(texts))
        for found in by_request.values()
        if (texts := [c.text for c in found if len(c.text) >= 3])
    )
    if equal > 1:
        yield f"{equal} samples are copies of another sample of their prompt"


def _distribution(answered: Sequence[Completion]) -> Iterator[str]:
    """Whether the share of samples that end, and the mean length, are what arithmetic says."""
    n, going_on = len(answered), 1 - len(ENDS) * P_END
    p_stop = 1 - going_on**MAX_TOKENS
    stopped = sum(c.finish_reason == "stop" for c in answered) / n
    if abs(stopped - p_stop) > SIGMAS * math.sqrt(p_stop * (1 - p_stop) / n):
        one = 1 - (1 - P_END) ** MAX_TOKENS
        yield f"{stopped:.0%} of the samples ended by themselves instead of {p_stop:.0%} (with one end only: {one:.0%})"
    chances = {k: going_on ** (k - 1) * (1 - going_on) for k in range(1, MAX_TOKENS)} | {
        MAX_TOKENS: going_on ** (MAX_TOKENS - 1)
    }
    mean = sum(k * p for k, p in chances.items())
    deviation = math.sqrt(sum(p * (k - mean) ** 2 for k, p in chances.items()) / n)
    length = sum(c.num_tokens for c in answered) / n
    if abs(length - mean) > SIGMAS * deviation:
        lost = "short" if length > mean else "long"
        yield f"samples have {length:.2f} tokens on average instead of {mean:.2f}: {lost} ones are lost"
