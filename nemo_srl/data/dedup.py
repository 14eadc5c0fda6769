"""Near-duplicate prompts: an exact ROUGE-L search that scales to hundreds of thousands of texts.

Self-Instruct keeps a new prompt only if its ROUGE-L F1 with every kept prompt is below 0.7. Two texts of a and b tokens
with a longest common subsequence of L tokens have F1 = 2 L / (a + b). `RougeLIndex` compares the query, of b tokens,
with few texts, and still finds every text whose F1 is at least a threshold t:

1. L is at most the number of common tokens. So a text of a tokens must have o = ceil(t (a + b) / 2) tokens in common
   with the query. This excludes texts that are too short or too long: a outside [b t / (2 - t), b (2 - t) / t].
2. A match lacks at most b - o of the query's tokens. So it has at least k - (b - o) of any k of them. An inverted index
   counts these for the k rarest tokens of the query, whose lists are short.
3. The texts that remain, usually a few, are compared exactly with rapidfuzz.

The bounds exclude no match: results equal those of brute force. In English, tokens are those of rouge-score: lower
case, runs of letters and digits, no stemming. Other scripts have tokens, too (`nemo_srl/words.py`). A text without any
token, such as "??", is a duplicate of the same text, and similar to no other.
"""

from __future__ import annotations

import itertools
import math
from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import cast

import numpy as np
import numpy.typing as npt
from rapidfuzz import process
from rapidfuzz.distance import LCSseq

from nemo_srl.words import normalised, tokenize

# Makes the bounds wider than their rounding errors: a text too many is compared, but none is missed.
_SLACK = 1e-9

# How many more token lists are counted than the bound needs. These lists are longer, but each halves the number of
# candidates. Three were fastest with 60,000 texts (benchmarks/dedup.py).
_NUM_EXTRA_LISTS = 3

_Element = tuple[int, int]
"""A token and the number of its occurrence: the second "the" of a text matches only another second "the"."""


class RougeLIndex:
    """A set of texts, and a search for those whose ROUGE-L F1 with a query is at least `threshold`, in (0, 1].

    The set begins with `texts`. Memory: about 30 bytes a token, and a few hundred bytes a text.
    """

    def __init__(self, threshold: float, texts: Iterable[str] = ()) -> None:
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold={threshold!r}: must be above 0 and at most 1, as ROUGE-L F1 is")
        self._threshold = threshold
        self._token_ids: dict[str, int] = {}
        self._texts: list[tuple[int, ...]] = []
        self._lengths = array("i")
        self._postings: dict[_Element, array[int]] = {}
        self._first_index: dict[tuple[int, ...] | str, int] = {}
        for text in texts:
            self.add(text)

    def __len__(self) -> int:
        return len(self._texts)

    def add(self, text: str) -> int:
        """Add a text, even if it is similar to others; returns its index, which counts from 0."""
        index = len(self._texts)
        tokens = tuple(self._token_ids.setdefault(t, len(self._token_ids)) for t in tokenize(text))
        for element in _elements(tokens):
            self._postings.setdefault(element, array("i")).append(index)
        self._texts.append(tokens)
        self._lengths.append(len(tokens))
        if same := tokens or normalised(text):
            self._first_index.setdefault(same, index)
        return index

    def most_similar(self, text: str) -> tuple[float, int] | None:
        """The highest ROUGE-L F1 with an added text, and the index of that text (of the first, if several have it).
        None if this F1 is below the threshold."""
        # A token that no text has gets an id that no text has: it matches nothing, but counts in the length.
        tokens = tuple(self._token_ids.get(t, -2 - i) for i, t in enumerate(tokenize(text)))
        if (same := self._first_index.get(tokens or normalised(text))) is not None:
            return 1.0, same
        if not tokens or not len(candidates := self._candidates(tokens)):
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
        """Ascending indices of the texts that the bounds do not exclude."""
        t, length = self._threshold, len(tokens)
        shortest = math.ceil(t * length / (2 - t) - _SLACK)
        longest = math.floor((2 - t) * length / t + _SLACK)
        fewest = length - math.ceil(t * (shortest + length) / 2 - _SLACK) + 1
        num_rarest = min(length, fewest + _NUM_EXTRA_LISTS)
        postings = sorted((self._postings.get(e, array("i")) for e in _elements(tokens)), key=len)
        found = [np.frombuffer(p, dtype=np.intc) for p in postings[:num_rarest] if p]
        if not found:
            return np.empty(0, dtype=np.intp)
        counts = np.bincount(np.concatenate(found))
        indices = np.flatnonzero(counts > 0)  # much faster than `flatnonzero(counts)`, which takes integers
        lengths = np.frombuffer(self._lengths, dtype=np.intc)[indices]
        needed = num_rarest - length + np.ceil(t * (lengths + length) / 2 - _SLACK)
        possible = (counts[indices] >= needed) & (lengths >= shortest) & (lengths <= longest)
        return cast("npt.NDArray[np.intp]", indices[possible])


def _elements(tokens: Sequence[int]) -> list[_Element]:
    """The tokens as a set: each token with the number of its occurrence."""
    counters: dict[int, Iterator[int]] = defaultdict(itertools.count)
    return [(token, next(counters[token])) for token in tokens]
