"""Answers that are damaged on purpose. Each is worse than the answer it was made of, and code knows in which way.

    cut        broken off inside a sentence
    looped     a part of it is repeated
    stuck      it never gets further than its first words
    reversed   its words from the last to the first

Two more kinds need no code: `swapped` is an answer to another instruction, and `asked` is another instruction instead
of an answer.

Nothing here knows how good the answer was. `nemo_srl/data/checked/damage.py` has further kinds, and true scores.
"""

from __future__ import annotations

import random
import re

from nemo_srl.data import texts

WORD = re.compile(r"\w+(?:['\u2019-]\w+)*")


def cut(answer: str, rng: random.Random, *, kept: tuple[float, float] = (0.4, 0.95)) -> str | None:
    """The answer without its last words. `kept` are the smallest and the largest share of words that stay. None for an
    answer of fewer than six words."""
    ends = [m.end() for m in re.finditer(r"\S+", answer)]
    if len(ends) < 6:
        return None
    number = min(len(ends) - 1, max(3, round(len(ends) * rng.uniform(*kept))))
    return answer[: ends[number - 1]].rstrip('.,;:!?"\n -')


def looped(answer: str, rng: random.Random) -> str | None:
    """The answer with a sentence that is said again, or a few words of it that never end."""
    long = [s for s in texts.sentences(answer) if len(texts.words(s)) >= 5]
    if long and rng.random() < 0.6:
        again = rng.choice(long).rstrip('".!?') + "."
        if answer == answer.lower():
            again = again.lower()
        return f"{answer} {' '.join([again] * rng.randint(1, 2))}"
    found = answer.replace("\n", " ").split(" ")
    if len(found) < 6:
        return None
    length = rng.randint(3, 7)
    start = rng.randrange(max(1, len(found) - length))
    return " ".join([*found[:start], *(found[start : start + length] * rng.randint(3, 5))]).rstrip('.,;:!?"')


def stuck(answer: str, rng: random.Random) -> str | None:
    """The first words of the answer, again and again, 40 words at most. None for an answer of fewer than six words."""
    found = answer.replace("\n", " ").split(" ")
    if len(found) < 6:
        return None
    first = found[: rng.randint(4, 8)]
    return " ".join((first * 6)[: max(14, min(len(found), 40))]).rstrip('.,;:!?"')


def in_reverse(answer: str) -> str:
    """The words of the answer from the last to the first. Marks and line breaks stay where they are."""
    found = WORD.findall(answer)
    return WORD.sub(lambda _: found.pop(), answer)
