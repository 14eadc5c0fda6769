"""Answers that are damaged on purpose, so that their true score is known.

    cut          broken off inside a sentence               loses complete
    looped       a part of it is repeated                   loses no_loop
    swapped      the answer to another task                 loses on_topic, and with it both constraints
    mismatched   an answer to the same task that was made for other constraints
    broken       one constraint is broken                   loses the points of this constraint
    dropped      an item of a list is left out              loses the points of the number of items
    stuck        nothing but its first words, repeated      loses no_loop
    asked        another instruction instead of an answer   loses the same points as `swapped`
    reversed     its words from the last to the first       loses the same points
    shuffled     its words in a random order                loses the same points
    echoed       the instruction instead of an answer       loses the same points

`Sample` joins what the damage says with what code sees (`truth`). They must agree. Only in words in another order code
cannot see that nothing is said. What a damage says nothing of, such as the constraints that a cut answer keeps, is what
code sees.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace

from nemo_srl.data import texts
from nemo_srl.data.checked.constraints import Constraint
from nemo_srl.data.checked.instructions import CLOSINGS, OPENINGS, QUESTIONS
from nemo_srl.data.checked.truth import CheckedInstruction, TrueScore, true_score
from nemo_srl.data.damage import WORD

_OFF_TOPIC = frozenset({"on_topic", "first_constraint", "second_constraint"})
LOST: Mapping[str, frozenset[str]] = {
    "cut": frozenset({"complete"}),
    "looped": frozenset({"no_loop"}),
    "swapped": _OFF_TOPIC,
    "stuck": frozenset({"no_loop"}),
    "asked": _OFF_TOPIC,
    "reversed": _OFF_TOPIC,
    "shuffled": _OFF_TOPIC,
    "echoed": _OFF_TOPIC,
}
"""The points that an answer loses by a damage, whatever the instruction. `lost_by_breaking` says it of constraints."""

REORDERED = frozenset({"shuffled", "reversed"})
"""Kinds that code takes for an answer, because the words are there."""
_TRIES = 8


@dataclass(frozen=True)
class Sample:
    """An answer and its true score. `kind` has the names of its damages, joined by `+`, or `intact` or `model`."""

    kind: str
    text: str
    true: TrueScore

    @property
    def form(self) -> str:
        """What can be seen of the true score without the instruction: `looped`, `cut` or `clean`."""
        return "looped" if not self.true.no_loop else "clean" if self.true.complete else "cut"


def sample(x: CheckedInstruction, kind: str, text: str, lost: frozenset[str] = frozenset()) -> Sample | None:
    """The sample of a text that lost these points. None if code sees one of them in it."""
    seen = true_score(x, text)
    if kind in REORDERED:
        return Sample(kind, text, replace(seen, **dict.fromkeys(lost, False)))
    return None if any(getattr(seen, point) for point in lost) else Sample(kind, text, seen)


def shuffled(answer: str, rng: random.Random) -> str:
    """The words of the answer in a random order. Marks and line breaks stay where they are."""
    found = WORD.findall(answer)
    rng.shuffle(found)
    return WORD.sub(lambda _: found.pop(), answer)


def without_item(answer: str, rng: random.Random) -> str | None:
    """The answer without one item of its list. The numbers of the other items have no gap."""
    marked = texts.items(answer)
    if not texts.is_list(answer) or len(marked) < 3:
        return None
    lines = answer.split("\n")
    lines.remove(rng.choice(marked))
    number = itertools.count(1)
    return "\n".join(re.sub(r"^\d+\.", lambda _: f"{next(number)}.", line) for line in lines)


def lost_by_breaking(x: CheckedInstruction, constraint: Constraint) -> frozenset[str]:
    """The points that an answer loses when it breaks this constraint of the instruction."""
    points = zip(("first_constraint", "second_constraint"), x.checks, strict=True)
    return frozenset(point for point, check in points if check == constraint)


def broken(x: CheckedInstruction, answer: str, constraint: Constraint, rng: random.Random) -> str | None:
    """The answer, changed so that it breaks this constraint and keeps every other point. None if no way was found."""
    before, lost = asdict(true_score(x, answer)), lost_by_breaking(x, constraint)
    for _ in range(_TRIES):
        text = _BREAK[constraint.kind](answer, constraint.value, rng)
        if text and asdict(true_score(x, text)) == before | dict.fromkeys(lost, False):
            return text
    return None


def _joined(answer: str, *, before: str = "", after: str = "") -> str:
    """The answer with words before or after it: in small letters if it is, and inside its quotation marks."""
    gap = "\n" if "\n" in answer else " "
    quote = '"' if answer.startswith('"') and answer.endswith('"') else ""
    parts = [before, answer.strip('"') if quote else answer, after]
    text = gap.join(filter(None, parts))
    return quote + (text.lower() if answer == answer.lower() else text) + quote


def _longer(answer: str, value: object, rng: random.Random) -> str:
    return _joined(answer, after=rng.choice(CLOSINGS))


def _without_sentence(answer: str, rng: random.Random) -> str:
    """The answer without one of its sentences, which are taken as they end in `. `, `! ` or `? `."""
    parts = re.split(r"(?<=[.!?])\s+", answer)
    parts.pop(rng.randrange(len(parts)))
    return " ".join(parts)


def _other_number(answer: str, value: int, rng: random.Random) -> str:
    return _longer(answer, value, rng) if value == 1 or rng.random() < 0.4 else _without_sentence(answer, rng)


def _too_long(answer: str, value: int, rng: random.Random) -> str:
    text = answer
    for more in rng.sample(CLOSINGS, 4):
        if len(texts.words(text)) <= value:
            text = _joined(text, after=more)
    return text


def _too_short(answer: str, value: int, rng: random.Random) -> str:
    text = answer
    while len(texts.words(text)) >= value:
        text = _without_sentence(text, rng)
    return text


def _without_word(answer: str, word: str, rng: random.Random) -> str:
    parts = re.split(r"(?<=[.!?])\s+", answer)
    rest = [p for p in parts if not texts.occurrences(p, word)]
    if rest and len(rest) < len(parts) and rng.random() < 0.7:
        return " ".join(rest)
    return re.sub(rf"(?<!\w){re.escape(word)}(?!\w)", rng.choice(("something", "it", "others")), answer, flags=re.I)


def _with_word(answer: str, word: str, rng: random.Random) -> str:
    if rng.random() < 0.5:
        return _joined(answer, before=f"About {word}:")
    more = rng.choice(("That is all about {}.", "So much for {}.", "This is what I know about {}."))
    return _joined(answer, after=more.format(word))


def _other_start(answer: str, phrase: str, rng: random.Random) -> str:
    for opening in OPENINGS:
        if opening[:-1] == phrase:
            return re.sub(rf"^(\"?){re.escape(opening)}\s+", r"\1", answer, flags=re.IGNORECASE)
    return _joined(answer, before=rng.choice(OPENINGS))


def _other_end(answer: str, phrase: str, rng: random.Random) -> str:
    for closing in CLOSINGS:
        if closing[:-1] == phrase:
            return _without_end(answer, closing)
    return _longer(answer, phrase, rng)


def _without_end(answer: str, end: str) -> str:
    return re.sub(rf"\s+{re.escape(end)}(\"?)$", r"\1", answer, flags=re.IGNORECASE)


def _no_question(answer: str, value: None, rng: random.Random) -> str:
    for question in QUESTIONS:
        if answer.lower().rstrip('"').endswith(question.lower()) and rng.random() < 0.6:
            return _without_end(answer, question)
    return _longer(answer, value, rng)


def _with_capitals(answer: str, value: None, rng: random.Random) -> str:
    return re.sub(r"(?:^|(?<=[.!?\n] ))\W*[a-z]", lambda m: m[0].upper(), answer, flags=re.MULTILINE)


def _with_comma(answer: str, value: None, rng: random.Random) -> str:
    if " and " in answer:
        return answer.replace(" and ", ", and ", 1)
    return f"Well, {answer[0].lower()}{answer[1:]}"


def _without_quotes(answer: str, value: None, rng: random.Random) -> str:
    return answer.strip('"')


def _in_small_letters(answer: str, word: str, rng: random.Random) -> str:
    return answer.replace(word.upper(), word)


_BREAK: Mapping[str, Callable[..., str | None]] = {
    "sentences": _other_number,
    "items": lambda answer, value, rng: without_item(answer, rng),
    "max_words": _too_long,
    "min_words": _too_short,
    "contains": _without_word,
    "avoids": _with_word,
    "starts_with": _other_start,
    "ends_with": _other_end,
    "lower_case": _with_capitals,
    "no_comma": _with_comma,
    "quoted": _without_quotes,
    "question": _no_question,
    "capital_word": _in_small_letters,
}
"""A way to break each kind of constraint: from an answer, the constraint's value, and a source of randomness."""
