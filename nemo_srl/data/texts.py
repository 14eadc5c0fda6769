"""What code sees in an answer: its words, sentences and items, whether it repeats itself, and whether it ends.

These are rules for plain English in Latin script. They do not parse. `sentences` takes a full stop that it does not
know (`approx. ten`) for an end. `has_loop` sees only literal repetition. `is_ended` sees the form of the end only.
"""

from __future__ import annotations

import re
from collections import Counter

_MARKER = re.compile(r"^[ \t]*(?:[-*\u2022]|\d{1,2}[.)])[ \t]+", re.MULTILINE)
_ABBREVIATION = re.compile(r"\b(Mr|Mrs|Ms|Dr|St|vs|No|e\.g|i\.e|a\.m|p\.m)\.(?=\s)", re.IGNORECASE)
# Marks that end a sentence. After a closing quotation mark, a small letter shows that the sentence goes on.
_END = re.compile(r"[.!?\u2026]+(?:[)\]]*(?=\s|$)|[\"\u201d'\u2019*]+[)\]]*(?=\s+[^a-z\s]|\s*$))|\n+")
_ENDED = re.compile(r"[.!?\u2026][\"\u201d'\u2019)\]*_]*$|[\])]$")
_SIGNATURE = re.compile(r",[ \t]*\n+[^\n]{1,40}$")

_LOOP_WORDS, _LOOP_TIMES = 4, 3
_SAME_SENTENCE_WORDS = 5


def words(text: str) -> list[str]:
    """The words of a text, as a person counts them: parts between spaces with a letter or digit. The markers of list
    items (`-`, `2.`) are no words."""
    return [w for w in _MARKER.sub("", text).split() if any(map(str.isalnum, w))]


def plain_words(text: str) -> list[str]:
    """The words in lower case and without punctuation around them."""
    return [re.sub(r"^\W+|\W+$", "", w).lower() for w in words(text)]


def sentences(text: str) -> list[str]:
    """The sentences of a text. A line break ends a sentence, too, so each item of a list is one."""
    body = _ABBREVIATION.sub(r"\1", _MARKER.sub("", text))
    return [part.strip() for part in _END.split(body) if part and any(map(str.isalnum, part))]


def items(text: str) -> list[str]:
    """The items of a list: the lines with a marker. Without any marker, every line with words is an item."""
    lines = [line for line in text.split("\n") if any(map(str.isalnum, line))]
    return [line for line in lines if _MARKER.match(line)] or lines


def is_list(text: str) -> bool:
    """Whether the text has two or more lines with the marker of an item."""
    return len(_MARKER.findall(text)) >= 2


def occurrences(text: str, phrase: str) -> list[str]:
    """Where a word or phrase stands in the text as a whole, in any case. `gas` is not in `gases`."""
    return re.findall(rf"(?<!\w){re.escape(phrase)}(?!\w)", text, re.IGNORECASE)


def begins_with(text: str, phrase: str) -> bool:
    """Whether the text begins with the phrase, in any case. Marks before it, such as a quotation mark, do not count."""
    return re.match(rf"\W*{re.escape(phrase)}(?!\w)", text, re.IGNORECASE) is not None


def ends_with(text: str, phrase: str) -> bool:
    """Whether the text ends with the phrase, in any case. Marks after it, such as a full stop, do not count."""
    return re.search(rf"(?<!\w){re.escape(phrase)}\W*\Z", text, re.IGNORECASE) is not None


def has_loop(text: str) -> bool:
    """Whether the text repeats itself: the same four words three times, or a sentence of five or more words twice."""
    found = plain_words(text)
    grams = Counter(tuple(found[i : i + _LOOP_WORDS]) for i in range(len(found) - _LOOP_WORDS + 1))
    if max(grams.values(), default=0) >= _LOOP_TIMES:
        return True
    same = Counter(tuple(w) for s in sentences(text) if len(w := plain_words(s)) >= _SAME_SENTENCE_WORDS)
    return max(same.values(), default=0) > 1


def is_ended(text: str) -> bool:
    """Whether the text ends as a finished text does: with a mark such as `.`, with a closing bracket, with a signature
    (a line of at most 40 characters after a line that ends in a comma), or with an item of a list whose items all have
    no mark at their ends. So a list without marks that was cut off counts as ended."""
    text = text.rstrip()
    if _ENDED.search(text) or _SIGNATURE.search(text):
        return True
    last_is_item = _MARKER.match(text.split("\n")[-1]) is not None
    return last_is_item and is_list(text) and not any(_ENDED.search(item.rstrip()) for item in items(text))
