"""The filter of generated instructions. Every rejection has a reason, so that the caller can count them.

Cheap checks come first. The last one, ROUGE-L with every instruction kept so far, is exact (`dedup`).

Not covered: whether a task makes sense. The checks are heuristics. They rarely drop a good instruction, and miss some
bad ones. All work in any script (`nemo_srl/words.py` says what a word is there), except the one for English.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from typing import Literal

from nemo_srl.config import PromptsConfig
from nemo_srl.data.dedup import RougeLIndex
from nemo_srl.words import is_unspaced, tokenize, words

Reason = Literal[
    "length", "blocked_word", "not_an_instruction", "garbage", "language", "contaminated", "duplicate", "similar"
]

_FUNCTION_WORDS = frozenset([
    "a", "about", "an", "and", "any", "are", "as", "at", "be", "between", "by", "can", "could", "do", "does",
    "each", "for", "from", "give", "had", "has", "have", "how", "i", "if", "in", "into", "is", "it", "its",
    "list", "make", "me", "my", "name", "not", "of", "on", "one", "or", "our", "should", "some", "tell",
    "than", "that", "the", "their", "there", "these", "this", "three", "to", "two", "use", "using", "was",
    "we", "what", "when", "where", "which", "who", "why", "will", "with", "would", "write", "you", "your",
])  # fmt: skip
_MIN_WORDS_TO_JUDGE = 8  # shorter instructions often have no function word ("Summarize climate change briefly.")
_MAX_WORD_LENGTH = 45  # the longest English words have 45 letters; a longer one is noise or an address
_REPEATED_CHARACTER = re.compile(r"([^\s.\d_])\1{4,}")
_BEGINS = frozenset("\"'(\u00bf\u00a1")  # and what `_is_bracket` says
_ENDS = frozenset(
    ".?!:\"')"
    "\u3002\uff0e\uff61\uff1f\uff01\uff1a\u2026\u203d"  # Chinese, Japanese, Korean
    "\u061f\u06d4\u0964\u0965\u0589\u055c\u055e\u1362\u1367\u1368"  # Arabic, Urdu, Hindi, Armenian, Amharic
    "\u17d4\u17d5\u104a\u104b\u0f0d\u0e2f\u0e5a"  # Khmer, Burmese, Tibetan, Thai
)
_GREEK_QUESTION = re.compile(r"[\u0370-\u03ff\u1f00-\u1fff];\Z")
# Blanks of other widths, joiners of Persian and Hindi, and marks of direction. Python calls them unprintable.
_PRINTABLE_TOO = re.compile("[\u00a0\u2002-\u200a\u202f\u3000\u200c-\u200f\u061c\ufe0f]")


def is_garbage(text: str) -> bool:
    """Whether the text looks like a failed generation: repetition, noise, code or addresses."""
    found = words(text.lower())
    if len(found) >= _MIN_WORDS_TO_JUDGE and len(set(found)) < len(found) / 2:
        return True
    letters, visible = sum(map(str.isalpha, text)), sum(not c.isspace() for c in text)
    noisy = 3 * letters < visible or bool(_REPEATED_CHARACTER.search(text))
    return noisy or max(map(len, found), default=0) > _MAX_WORD_LENGTH


def is_whole(text: str) -> bool:
    """Whether the text begins and ends as an instruction does. Scripts without spaces often have no mark at the end,
    and some have no capital letters."""
    first, last = text[:1], text[-1:]
    begins = first in _BEGINS or (first.isalpha() and not first.islower()) or _is_bracket(first, "Ps", "Pi")
    ends = last in _ENDS or is_unspaced(last) or _is_bracket(last, "Pe", "Pf") or _GREEK_QUESTION.search(text)
    return bool(begins and ends) and _PRINTABLE_TOO.sub(" ", text).isprintable()


def _is_bracket(character: str, *categories: str) -> bool:
    """Whether it is a bracket or a quotation mark beyond ASCII."""
    return not character.isascii() and unicodedata.category(character) in categories


def is_english(text: str) -> bool:
    """Whether the text may be English: it has Latin letters, and a function word if it has eight words or more."""
    letters = [c for c in text if c.isalpha()]
    if sum(c.isascii() for c in letters) < 0.9 * len(letters):
        return False
    found = re.findall(r"[a-z]+", text.lower())
    return len(found) < _MIN_WORDS_TO_JUDGE or not _FUNCTION_WORDS.isdisjoint(found)


class PromptFilter:
    """Remembers what it keeps. A new instruction must differ from `seed` and from all kept ones. It must differ from
    `held_out`, too: models are measured on these texts, so nothing similar to them may be used in training."""

    def __init__(self, cfg: PromptsConfig, *, seed: Iterable[str], held_out: Iterable[str]) -> None:
        self._cfg = cfg
        self._blocked = [word for word in map(_in_order, cfg.blocked_words) if word]
        self._known, self._held_out = RougeLIndex(cfg.max_rouge_l, seed), RougeLIndex(cfg.max_rouge_l, held_out)

    def reason_to_drop(self, text: str) -> Reason | None:
        """The reason to reject the instruction. None: it is kept, and remembered."""
        reason = self._form(text) or self._similarity(text)
        if reason is None:
            self._known.add(text)
        return reason

    def _form(self, text: str) -> Reason | None:
        if not self._cfg.min_words <= len(words(text)) <= self._cfg.max_words:
            return "length"
        said = _in_order(text)
        if any(word in said for word in self._blocked):
            return "blocked_word"
        if self._cfg.language == "en" and not is_english(text):
            return "language"
        if not is_whole(text):
            return "not_an_instruction"
        return "garbage" if is_garbage(text) else None

    def _similarity(self, text: str) -> Reason | None:
        if self._held_out.is_duplicate(text):
            return "contaminated"
        if (known := self._known.most_similar(text)) is None:
            return None
        return "duplicate" if known[0] == 1 else "similar"


def _in_order(text: str) -> str:
    """The tokens of a text, each between two line breaks. So a word is in a text if its tokens are in the text's."""
    return "".join(f"\n{token}\n" for token in tokenize(text))
