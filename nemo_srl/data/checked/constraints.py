"""Constraints on an answer that code can check, such as "Use exactly two sentences".

`KINDS` is the registry. A kind has the phrases that ask for it and the check. The value of a constraint is a number, a
word or phrase, or nothing. Checks forgive what a reader would forgive: capital letters in phrases, and marks around
the first and the last words.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from nemo_srl.data import texts
from nemo_srl.errors import DataError

Value = int | str | None

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


@dataclass(frozen=True)
class Kind:
    """One kind of constraint."""

    value: type | None
    """int, str, or None for a kind without a value."""
    holds: Callable[[str, Any], bool]
    """Whether an answer with words keeps the constraint with this value."""
    phrases: tuple[str, ...]
    """The ways to ask for it. `{}` is the value, a number up to ten as a word; `{s}` makes the plural."""


@dataclass(frozen=True)
class Constraint:
    """A kind with its value. Raises `DataError` for a kind that does not exist and for a value of another type."""

    kind: str
    value: Value = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise DataError(f"kind={self.kind!r}: no such constraint; the kinds are {', '.join(KINDS)}")
        expected = KINDS[self.kind].value or type(None)
        if type(self.value) is not expected or self.value in (0, ""):
            raise DataError(f"{self.kind}: value={self.value!r}; this constraint takes {expected.__name__}, not empty")

    def holds(self, answer: str) -> bool:
        """Whether the answer keeps the constraint. An answer without words keeps none."""
        return bool(texts.words(answer)) and KINDS[self.kind].holds(answer, self.value)

    def phrase(self, number: int) -> str:
        """The sentence that asks for the constraint. `number` chooses among the ways to say it."""
        phrases, value = KINDS[self.kind].phrases, self.value
        shown = _NUMBERS[value] if isinstance(value, int) and value < len(_NUMBERS) else value
        return phrases[number % len(phrases)].format(shown, s="" if value == 1 else "s")


def _is_question(answer: str, _: None) -> bool:
    return answer.rstrip().rstrip("\"'\u201d\u2019)*").endswith("?")


def _is_quoted(answer: str, _: None) -> bool:
    return re.fullmatch(r'\s*("[^"]+"|\u201c[^\u201c\u201d]+\u201d)\s*', answer) is not None


def _in_capitals(answer: str, word: str) -> bool:
    return set(texts.occurrences(answer, word)) == {word.upper()}


KINDS: Mapping[str, Kind] = {
    "sentences": Kind(
        int,
        lambda answer, n: len(texts.sentences(answer)) == n,
        (
            "Use exactly {} sentence{s}.",
            "Answer in exactly {} sentence{s}.",
            "Write {} sentence{s}, no more and no less.",
        ),
    ),
    "items": Kind(
        int,
        lambda answer, n: len(texts.items(answer)) == n,
        (
            "Give exactly {} item{s}, one on each line.",
            "Make a list of exactly {} line{s}.",
            "Write exactly {} line{s}, one for each item.",
        ),
    ),
    "max_words": Kind(
        int,
        lambda answer, n: len(texts.words(answer)) <= n,
        ("Use at most {} words.", "Do not write more than {} words.", "Stay within {} words."),
    ),
    "min_words": Kind(
        int,
        lambda answer, n: len(texts.words(answer)) >= n,
        ("Use at least {} words.", "Write {} words or more.", "Do not write fewer than {} words."),
    ),
    "contains": Kind(
        str,
        lambda answer, word: bool(texts.occurrences(answer, word)),
        ('Use the word "{}".', 'The word "{}" must be in the answer.', 'Include the word "{}".'),
    ),
    "avoids": Kind(
        str,
        lambda answer, word: not texts.occurrences(answer, word),
        ('Do not use the word "{}".', 'Avoid the word "{}".', 'The word "{}" must not be in the answer.'),
    ),
    "starts_with": Kind(
        str,
        texts.begins_with,
        ('Begin with "{}".', 'Start your answer with "{}".', 'The answer must start with "{}".'),
    ),
    "ends_with": Kind(
        str,
        texts.ends_with,
        ('End with "{}".', 'Finish your answer with "{}".', 'The answer must end with "{}".'),
    ),
    "lower_case": Kind(
        None,
        lambda answer, _: answer == answer.lower(),
        ("Write in lower case only.", "Do not use any capital letters.", "Use small letters only."),
    ),
    "no_comma": Kind(
        None,
        lambda answer, _: "," not in answer,
        ("Do not use any commas.", "Write without commas.", "Use no comma."),
    ),
    "quoted": Kind(
        None,
        _is_quoted,
        ("Put the whole answer in double quotes.", "Wrap your answer in double quotation marks."),
    ),
    "question": Kind(
        None,
        _is_question,
        ("End with a question.", "Finish your answer with a question.", "The last sentence must be a question."),
    ),
    "capital_word": Kind(
        str,
        _in_capitals,
        ('Write the word "{}" in capital letters.', 'Use the word "{}" and write it in capitals.'),
    ),
}
