"""Near-duplicate prompts: exact ROUGE-L search that scales to hundreds of thousands of texts.

Self-Instruct keeps a new prompt only if its ROUGE-L F1 with every prompt kept so far is below 0.7. With
a and b tokens and a longest common subsequence of L tokens, F1 = 2 L / (a + b). `RougeLIndex` finds every
text at or above a threshold t without comparing with all:

1. L cannot exceed the number of tokens in common, so a text of a tokens must share o = ceil(t (a + b) / 2)
   of them. Lengths that cannot (a outside [b t / (2 - t), b (2 - t) / t]) are out.
2. Of the query's b tokens, a match misses at most b - o. Hence it holds at least k - (b - o) of any k of
   them. An inverted index counts this over the query's k rarest tokens, whose lists are short.
3. What is left, usually a handful, is compared exactly with rapidfuzz.

The bounds never lose a match: results equal those of brute force. Tokens are rouge-score's: lower case,
runs of ASCII letters and digits, no stemming. So a text in another script has no tokens and resembles
nothing, as with rouge-score; compare such texts in other ways.
"""

from __future__ import annotations

import math
import re
from array import array
from collections import Counter
from collections.abc import Sequence
from typing import cast

import numpy as np
import numpy.typing as npt
from rapidfuzz import process
from rapidfuzz.distance import LCSseq

_TOKEN = re.compile(r"[a-z0-9]+")

# Guards the bounds against rounding: they may let through one text too many, never one too few.
_SLACK = 1e-9

# Token lists counted beyond the fewest that the bound needs. The further ones are longer, but each leaves
# about half of the candidates; measured best at 60,000 texts (benchmarks/dedup.py).
_NUM_EXTRA_LISTS = 3

_NOWHERE = array("i")

_Element = tuple[int, int]
"""A token and which of its occurrences: the second "the" of a text only meets another second "the"."""


class RougeLIndex:
    """The texts seen so far, searchable by ROUGE-L F1 of at least `threshold`, which is in (0, 1].

    Memory: about 30 bytes a token, and a few hundred a text.
    """

    def __init__(self, threshold: float) -> None:
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold={threshold!r}: ROUGE-L F1 is searched above 0 and up to 1")
        self._threshold = threshold
        self._token_ids: dict[str, int] = {}
        self._texts: list[tuple[int, ...]] = []
        self._lengths = array("i")
        self._postings: dict[_Element, array[int]] = {}
        self._first_index: dict[tuple[int, ...], int] = {}

    def __len__(self) -> int:
        return len(self._texts)

    def add(self, text: str) -> int:
        """Add a text, similar to others or not; returns its index, which counts from 0."""
        index = len(self._texts)
        tokens = tuple(self._token_ids.setdefault(t, len(self._token_ids)) for t in tokenize(text))
        for element in _elements(tokens):
            self._postings.setdefault(element, array("i")).append(index)
        self._texts.append(tokens)
        self._lengths.append(len(tokens))
        self._first_index.setdefault(tokens, index)
        return index

    def most_similar(self, text: str) -> tuple[float, int] | None:
        """Highest ROUGE-L F1 with an added text and that text's index (the first, if several are as
        similar); None if it is below the threshold. A text without tokens is similar to none."""
        # Unknown tokens match nothing; each gets an id of its own kind, so that it still counts.
        tokens = tuple(self._token_ids.get(t, -2 - i) for i, t in enumerate(tokenize(text)))
        if not tokens:
            return None
        if (same := self._first_index.get(tokens)) is not None:
            return 1.0, same
        candidates = self._candidates(tokens)
        if not len(candidates):
            return None
        others = [self._texts[i] for i in candidates]
        common = process.cdist([tokens], others, scorer=LCSseq.similarity, dtype=np.int32)[0]
        scores = 2 * common / (len(tokens) + np.fromiter(map(len, others), dtype=np.int64, count=len(others)))
        best = int(np.argmax(scores))
        score = float(scores[best])
        return (score, int(candidates[best])) if score >= self._threshold else None

    def is_duplicate(self, text: str) -> bool:
        """Whether an added text reaches the threshold."""
        return self.most_similar(text) is not None

    def _candidates(self, tokens: Sequence[int]) -> npt.NDArray[np.intp]:
        """Indices, ascending, of the texts that the bounds cannot exclude."""
        t, length = self._threshold, len(tokens)
        shortest = math.ceil(t * length / (2 - t) - _SLACK)
        longest = math.floor((2 - t) * length / t + _SLACK)
        fewest = length - math.ceil(t * (shortest + length) / 2 - _SLACK) + 1
        num_rarest = min(length, fewest + _NUM_EXTRA_LISTS)
        postings = sorted((self._postings.get(e, _NOWHERE) for e in _elements(tokens)), key=len)
        found = [np.frombuffer(p, dtype=np.intc) for p in postings[:num_rarest] if p]
        if not found:
            return np.empty(0, dtype=np.intp)
        counts = np.bincount(np.concatenate(found))
        indices = np.flatnonzero(counts > 0)  # compared first: much faster than over integers
        lengths = np.frombuffer(self._lengths, dtype=np.intc)[indices]
        needed = num_rarest - length + np.ceil(t * (lengths + length) / 2 - _SLACK)
        possible = (counts[indices] >= needed) & (lengths >= shortest) & (lengths <= longest)
        return cast("npt.NDArray[np.intp]", indices[possible])


def tokenize(text: str) -> list[str]:
    """rouge-score's default tokens: lower case, runs of ASCII letters and digits."""
    return _TOKEN.findall(text.lower())


def _elements(tokens: Sequence[int]) -> list[_Element]:
    """The multiset of tokens as a set: each with its number among equal ones."""
    seen: Counter[int] = Counter()
    elements = []
    for token in tokens:
        elements.append((token, seen[token]))
        seen[token] += 1
    return elements
