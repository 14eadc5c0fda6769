"""The filter of generated instructions. Every rejection has a reason, so that the caller can count them.

Cheap checks come first. The last one, ROUGE-L with every instruction kept so far, is exact (`dedup`).

Not covered: whether a task makes sense. The checks for language and garbage are heuristics for English. They rarely
drop a good instruction, and miss some bad ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal

from nemo_srl.config import PromptsConfig
from nemo_srl.data.dedup import RougeLIndex

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


def is_garbage(text: str) -> bool:
    """Whether the text looks like a failed generation: repetition, noise, code or addresses."""
    words = text.lower().split()
    if len(words) >= _MIN_WORDS_TO_JUDGE and len(set(words)) < len(words) / 2:
        return True
    letters, visible = sum(map(str.isalpha, text)), sum(not c.isspace() for c in text)
    noisy = 3 * letters < visible or bool(_REPEATED_CHARACTER.search(text))
    return noisy or max(map(len, words), default=0) > _MAX_WORD_LENGTH


def is_english(text: str) -> bool:
    """Whether the text may be English: it has Latin letters, and a function word if it has eight words or more."""
    letters = [c for c in text if c.isalpha()]
    if sum(c.isascii() for c in letters) < 0.9 * len(letters):
        return False
    words = re.findall(r"[a-z]+", text.lower())
    return len(words) < _MIN_WORDS_TO_JUDGE or not _FUNCTION_WORDS.isdisjoint(words)


class PromptFilter:
    """Remembers what it keeps. A new instruction must differ from `seed` and from all kept ones. It must differ from
    `held_out`, too: models are measured on these texts, so nothing similar to them may be used in training."""

    def __init__(self, cfg: PromptsConfig, *, seed: Iterable[str], held_out: Iterable[str]) -> None:
        self._cfg = cfg
        self._blocked = set(cfg.blocked_words)
        self._known, self._held_out = RougeLIndex(cfg.max_rouge_l, seed), RougeLIndex(cfg.max_rouge_l, held_out)

    def reason_to_drop(self, text: str) -> Reason | None:
        """The reason to reject the instruction. None: it is kept, and remembered."""
        reason = self._form(text) or self._similarity(text)
        if reason is None:
            self._known.add(text)
        return reason

    def _form(self, text: str) -> Reason | None:
        if not self._cfg.min_words <= len(text.split()) <= self._cfg.max_words:
            return "length"
        if self._blocked & set(re.findall(r"\w+", text.lower())):
            return "blocked_word"
        if self._cfg.language == "en" and not is_english(text):
            return "language"
        if not re.match(r"[A-Z\"'(]", text) or not re.search(r"[.?!:\"')]$", text) or not text.isprintable():
            return "not_an_instruction"
        return "garbage" if is_garbage(text) else None

    def _similarity(self, text: str) -> Reason | None:
        if self._held_out.is_duplicate(text):
            return "contaminated"
        if (known := self._known.most_similar(text)) is None:
            return None
        return "duplicate" if known[0] == 1 else "similar"
