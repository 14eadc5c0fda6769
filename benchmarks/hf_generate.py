"""Generation by transformers' `generate` in static batches. It needs torch alone, so it runs with any transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm


@torch.inference_mode()
def generate(
    model: Any, prompts: Sequence[Sequence[int]], *, n: int, max_tokens: int, batch_size: int, temperature: float,
    top_p: float, end_tokens: Sequence[int] = (),
) -> int:  # fmt: skip
    """Sample `n` continuations of each prompt (token ids) and return the number of their tokens.

    Batches hold left-padded sequences in the order of `prompts`. Every prompt is prefilled once per sample. A batch
    waits for its longest sample, and only the tokens up to an end token count.
    """
    sequences = [prompt for prompt in prompts for _ in range(n)]
    num_tokens = 0
    for first in tqdm(range(0, len(sequences), batch_size), desc="transformers", leave=False, disable=None):
        rows = sequences[first : first + batch_size]
        longest = max(map(len, rows))
        out = model.generate(
            torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows], device=model.device),
            attention_mask=torch.tensor(
                [[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=model.device
            ),
            max_new_tokens=max_tokens,
            do_sample=True,
            temperature=temperature,
            top_p=top_p,
            top_k=0,
            eos_token_id=list(end_tokens) or None,
            pad_token_id=0,
        )[:, longest:].tolist()
        for row in out:
            ends = [i for i, token in enumerate(row) if token in end_tokens]
            num_tokens += ends[0] + 1 if ends else len(row)
    return num_tokens
