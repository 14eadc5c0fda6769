"""The words that show what a text is about."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_STOP_WORDS = frozenset([
    "a", "about", "add", "after", "again", "all", "also", "am", "an", "and", "answer", "answers", "any", "are",
    "arent", "as", "ask", "asks", "at", "away", "back", "be", "because", "been", "before", "being", "between",
    "big", "brief", "but", "by", "call", "called", "can", "cant", "change", "compare", "could", "day", "days",
    "describe", "did", "difference", "different", "do", "does", "doesnt", "dont", "each", "email", "emails", "end",
    "even", "every", "explain", "find", "first", "five", "for", "four", "from", "get", "give", "go", "good", "had",
    "has", "have", "he", "help", "helpful", "helps", "her", "him", "his", "how", "i", "idea", "ideas", "if", "im",
    "in", "include", "into", "is", "isnt", "it", "its", "ive", "just", "keep", "know", "lets", "like", "line",
    "lines", "list", "ll", "long", "make", "many", "may", "me", "mean", "means", "message", "messages", "more",
    "most", "much", "must", "my", "name", "need", "needs", "new", "no", "not", "number", "of", "off", "often", "on",
    "one", "only", "or", "other", "our", "out", "over", "people", "person", "plan", "plans", "please", "put",
    "question", "questions", "ready", "reason", "reasons", "rewrite", "s", "said", "same", "say", "says",
    "sentence", "sentences", "she", "short", "should", "show", "shows", "simple", "small", "so", "some", "someone",
    "something", "start", "step", "steps", "such", "suggest", "summarise", "sure", "t", "take", "tell", "text",
    "than", "that", "thats", "the", "their", "them", "then", "there", "these", "they", "thing", "things", "this",
    "those", "three", "time", "times", "to", "today", "too", "turn", "two", "under", "until", "up", "us", "use",
    "used", "very", "want", "was", "way", "ways", "we", "well", "were", "weve", "what", "whats", "when", "where",
    "which", "while", "who", "whom", "whose", "why", "will", "with", "without", "wont", "word", "words", "would",
    "write", "yes", "you", "youll", "your", "youre", "youve",
])  # fmt: skip
"""Function words, and words that any instruction or answer may have."""
_MAX_SHARE = 0.03  # a word in more of the tasks says too little about any of them
_MATERIAL = r"(?<!\w)'(.*)'(?!\w)"


def is_content_word(word: str) -> bool:
    """Whether a word in lower case is no function word."""
    return word not in _STOP_WORDS


def stems(text: str) -> set[str]:
    """The stems of the words of a text that are no function words."""
    found = set(re.findall(r"[^\W_]+", re.sub(r"['\u2019](?=\w)", "", text.lower())))
    return {_stem(word) for word in found - _STOP_WORDS}


@dataclass(frozen=True, kw_only=True)
class Topic:
    """Stems of the words that show what an instruction is about: those it asks with, and others."""

    asked: list[str]
    others: list[str]


def topics(tasks: Mapping[str, tuple[str, str, Sequence[str]]]) -> dict[str, Topic]:
    """The topic of each task, from what is asked for, a good answer, and words of its topic.

    A quotation in single quotes in the question is material, so its words are among the others. Words of an answer are
    left out if more than 3% of the tasks have them. The given words of a topic all count.
    """
    split = {key: _split(asked, response) for key, (asked, response, _) in tasks.items()}
    share = Counter(stem for asked, found in split.values() for stem in asked | found)
    common = {stem for stem, count in share.items() if count > max(2, _MAX_SHARE * len(tasks))}
    return {
        key: Topic(asked=sorted(asked), others=sorted((found - common | stems(" ".join(given))) - asked))
        for (key, (asked, found)), (_, _, given) in zip(split.items(), tasks.values(), strict=True)
    }


def _split(asked: str, response: str) -> tuple[set[str], set[str]]:
    material = re.findall(_MATERIAL, asked)
    return stems(without_material(asked)), stems(" ".join([*material, response]))


def without_material(instruction: str) -> str:
    """The instruction without the text in single quotes that it asks to work on."""
    return re.sub(_MATERIAL, " ", instruction)


@functools.cache
def _stem(word: str) -> str:
    """Maps the forms of a word to one: `baking`, `baked` and `bakes` to `bak`. Some other words meet by accident."""
    if len(word) >= 6:
        word = word.replace("our", "or")  # colour, color
    for suffix, shortest in (("ing", 6), ("ed", 5), ("es", 5), ("s", 4)):
        if len(word) >= shortest and word.endswith(suffix) and not word.endswith("ss"):
            word = word[: -len(suffix)]
            break
    word = re.sub(r"([bdfglmnprt])\1$", r"\1", word)  # planning, plan
    return re.sub(r"y$", "i", re.sub(r"(?<=..)e$", "", word))
