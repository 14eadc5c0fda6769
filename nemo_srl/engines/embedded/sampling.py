"""From logits to tokens: greedy, or with temperature and top-p. Each sample has random numbers of its own.

Top-p keeps the smallest set of tokens whose probability reaches `top_p`. The most probable tokens come first, and
equally probable ones by token id. The result is exact, and yet the whole vocabulary is almost never sorted: `topk`
takes the tokens that can matter, and the few rows that need more tokens are done again with more.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_NUM_CANDIDATES = (64, 1024)


def sample_uniforms(seed: int, key: str, index: int, max_tokens: int) -> Tensor:
    """The random numbers of sample `index` of request `key`: one in [0, 1) for each token, [max_tokens] float64."""
    digest = hashlib.sha256(f"{seed}/{index}/{key}".encode()).digest()
    # Always of the CPU's generator, so that a seed means the same on every device.
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    return torch.rand(max_tokens, generator=generator, dtype=torch.float64, device="cpu")


def choose(logits: Tensor, uniforms: Tensor, *, temperature: float, top_p: float) -> Tensor:
    """Choose one token per row: logits [num_rows, vocab_size], uniforms [num_rows] in [0, 1) -> ids [num_rows].

    The id is -1 for a row whose logits are not numbers.
    """
    if temperature == 0:
        chosen = logits.argmax(-1)
        return chosen.masked_fill_(logits.gather(-1, chosen[:, None]).squeeze(-1).isnan(), -1)
    probabilities = torch.softmax(logits.float() / temperature, -1)
    vocab_size = logits.shape[-1]
    first, *more = (*(n for n in _NUM_CANDIDATES if n < vocab_size), vocab_size)
    chosen, settled = _invert(probabilities, uniforms, top_p, first)
    rows = (~settled).nonzero().squeeze(-1)
    for size in more:
        if not rows.numel():
            break
        chosen[rows], settled = _invert(probabilities[rows], uniforms[rows], top_p, size)
        rows = rows[~settled]
    return chosen


def _invert(probabilities: Tensor, uniforms: Tensor, top_p: float, size: int) -> tuple[Tensor, Tensor]:
    """Invert the distribution function over the `size` most probable tokens.

    Returns tokens [num_rows], and for each row whether the whole vocabulary would give the same token.
    """
    vocab_size = probabilities.shape[-1]
    _, ids = probabilities.topk(size, sorted=False)
    ids = ids.sort(-1).values
    values, order = probabilities.gather(-1, ids).sort(dim=-1, descending=True, stable=True)
    ids = ids.gather(-1, order)
    cumulative = values.double().cumsum(-1)
    # The kept set ends with the first token at which the sum reaches top_p.
    reached = cumulative >= top_p
    last = torch.where(reached.any(-1), reached.int().argmax(-1), size - 1)
    mass = cumulative.gather(-1, last[:, None]).squeeze(-1)
    if top_p == 1:
        mass, last = torch.ones_like(mass), torch.full_like(last, size - 1)
    position = torch.searchsorted(cumulative, (uniforms * mass)[:, None], right=True).squeeze(-1)
    position = torch.minimum(position, last)
    tokens = ids.gather(-1, position[:, None]).squeeze(-1)
    if size == vocab_size:
        return tokens.masked_fill_(cumulative[:, -1].isnan(), -1), torch.ones_like(position, dtype=torch.bool)
    # Tokens as probable as the least probable one here may have been left out. If the result depends on that one, the
    # whole vocabulary could give another token.
    decisive = position if top_p == 1 else last
    settled = (values.gather(-1, decisive[:, None]) > values[:, -1:]).squeeze(-1)
    if top_p == 1:
        settled &= uniforms < cumulative[:, -1]
    else:
        settled &= reached.any(-1)
    return tokens, settled
