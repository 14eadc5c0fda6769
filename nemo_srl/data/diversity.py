"""How varied generated texts are, and how new: the figures fall when a generator repeats itself or its examples.

Novelty is exact: it compares each of at most 500 texts, drawn at random, with each known one.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
from rapidfuzz import process
from rapidfuzz.distance import LCSseq

from nemo_srl.words import tokenize

_MAX_TEXTS = 500


def distinct_n(texts: Sequence[str], n: int) -> float | None:
    """Distinct n-grams divided by all n-grams of all texts (Li et al. 2016, section 5.2); None without an n-gram."""
    tokenized = map(tokenize, texts)
    grams = [tuple(tokens[i : i + n]) for tokens in tokenized for i in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


def novelty(texts: Sequence[str], known: Sequence[str], *, seed: int = 0) -> float | None:
    """Mean over texts of 1 - (the highest ROUGE-L F1 with a known text); None without texts on one of the sides."""
    sample = random.Random(seed).sample(list(texts), min(_MAX_TEXTS, len(texts)))
    ids: dict[str, int] = {}
    tokenized = ([[ids.setdefault(t, len(ids)) for t in tokenize(x)] for x in group] for group in (sample, known))
    new, old = ([x for x in group if x] for group in tokenized)
    if not new or not old:
        return None
    common = process.cdist(new, old, scorer=LCSseq.similarity, dtype=np.int32)
    lengths = np.add.outer([len(x) for x in new], [len(x) for x in old])
    return float((1 - (2 * common / lengths).max(axis=1)).mean())
