"""Makes instructions with constraints from tasks.

A task is a question, with or without a good answer. To a task with an answer, the composer adds constraints that the
answer keeps, or that it keeps after a small change (small letters, a phrase at the end). So every instruction gets an
answer with the full true score. To a task without an answer it adds constraints that a good answer can surely keep.
What is chosen for a task depends on nothing but the task and its topic, so tasks can be added and changed.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from nemo_srl.data import texts
from nemo_srl.data.checked.constraints import Constraint
from nemo_srl.data.checked.topics import Topic, is_content_word, stems
from nemo_srl.data.checked.truth import MAX_SCORE, CheckedInstruction, true_score
from nemo_srl.data.dedup import RougeLIndex

OPENINGS = (
    "Good question!", "Here you go:", "Of course!", "With pleasure:", "Short answer:", "Let me try:", "Sure!",
    "Happy to help!",
)  # fmt: skip
CLOSINGS = (
    "That is all.", "Good luck!", "I hope this helps.", "Thanks for asking!", "Now you know.", "Have a nice day!",
    "Just ask me for more.",
)  # fmt: skip
QUESTIONS = (
    "Does that help?", "Is that clear?", "Shall I go on?", "Would you like to know more?", "What do you think?",
)  # fmt: skip

_SHARE_WITH_TWO = 0.75
_SHARE_BEFORE = 0.15
"""The share of instructions in which a constraint stands before the question."""
_TRIES = 30
_WITH_MATERIAL = ("rewrite", "summarise")
"""Categories whose instructions quote a text to work on."""
_PIECES = (*_WITH_MATERIAL, "story", "email", "letter", "creative", "code", "translation")
"""Categories whose answers are pieces of text, to which an assistant adds no words of its own."""
_CLASHES = [
    {"sentences", "starts_with", "ends_with", "question"}, {"sentences", "items"}, {"max_words", "min_words"},
    {"lower_case", "capital_word"}, {"contains", "capital_word"}, {"quoted", "items"},
]  # fmt: skip
"""Two kinds of one set are not asked for together, because one of them decides the other, or they look odd together."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A question without constraints, and an answer or an empty string: a line of `data/checked/tasks.jsonl`.

    `topic_words` are words that answers are likely to have and other texts are not. A good answer has one or more.
    """

    task_id: str
    split: str
    category: str
    instruction: str
    response: str
    topic_words: list[str]

    @property
    def key(self) -> str:
        return self.task_id


@dataclass(frozen=True)
class _Option:
    """A constraint, and the change after which an answer keeps it. Changes of a lower rank come first."""

    constraint: Constraint
    change: Callable[[str], str] = str
    rank: int = 0


class Composer:
    """Makes the instructions of one task."""

    def __init__(self, task: Task, topic: Topic, rng: random.Random) -> None:
        self._task = task
        self._topic = topic
        self._rng = rng

    def instructions(self, number: int, *, apart_from: RougeLIndex) -> list[CheckedInstruction]:
        """At most `number` instructions, which are similar to none of `apart_from`. No kind of constraint comes twice,
        except that of a list."""
        task, made = self._task, list[CheckedInstruction]()
        options = list(_of_answer(task, self._topic, self._rng) if task.response else _without_answer(task, self._rng))
        for _ in range(_TRIES):
            taken = {c["kind"] for x in made for c in x.constraints} - {"items"}
            chosen = self._chosen([o for o in options if o.constraint.kind not in taken])
            if len(made) == number or not chosen:
                break
            x = self._instruction(chosen, number=len(made))
            good = not x.response or true_score(x, x.response).score == MAX_SCORE
            new = set(x.checks) not in [set(m.checks) for m in made] and not apart_from.is_duplicate(x.instruction)
            if good and new:
                made.append(x)
        return made

    def _chosen(self, options: list[_Option]) -> list[_Option]:
        """One or two options. The number of lines is always asked for when there are lines."""
        chosen: list[_Option] = []
        wanted = 2 if self._rng.random() < _SHARE_WITH_TWO else 1
        while options and len(chosen) < wanted:
            lines = [o for o in options if o.constraint.kind == "items"]
            kind = self._rng.choice(sorted({o.constraint.kind for o in lines or options}))
            option = self._rng.choice([o for o in options if o.constraint.kind == kind])
            chosen.append(option)
            options = [o for o in options if not _clash(o.constraint, option.constraint)]
        return chosen

    def _instruction(self, chosen: list[_Option], *, number: int) -> CheckedInstruction:
        self._rng.shuffle(chosen)
        task, response = self._task, self._task.response
        for option in sorted(chosen, key=lambda o: o.rank):
            response = option.change(response)
        parts = [task.instruction, *(o.constraint.phrase(self._rng.randrange(6)) for o in chosen)]
        if self._rng.random() < _SHARE_BEFORE:
            parts[:2] = parts[1::-1]
        return CheckedInstruction(
            instruction_id=f"{task.key}-{'abcdef'[number]}",
            task_id=task.key,
            split=task.split,
            category=task.category,
            instruction=" ".join(parts),
            constraints=[{k: v for k, v in asdict(o.constraint).items() if v is not None} for o in chosen],
            asked=self._topic.asked,
            topic=self._topic.others,
            response=response,
        )


def _clash(a: Constraint, b: Constraint) -> bool:
    same_words = isinstance(a.value, str) and str(a.value).lower() == str(b.value).lower()
    return a.kind == b.kind or same_words or any({a.kind, b.kind} <= kinds for kinds in _CLASHES)


def _of_answer(task: Task, topic: Topic, rng: random.Random) -> Iterator[_Option]:
    """Constraints that the task's answer keeps, as it is or after a change."""
    answer, in_lines = task.response, "\n" in task.response
    num_words, found = len(texts.words(answer)), texts.plain_words(answer)
    if texts.is_list(answer):
        yield _Option(Constraint("items", len(texts.items(answer))))
    if not in_lines:
        yield _Option(Constraint("sentences", len(texts.sentences(answer))))
        if len(found[0]) >= 3:
            yield _Option(Constraint("starts_with", found[0].capitalize()))
        yield _Option(Constraint("ends_with", re.sub(r"^\W+|\W+$", "", texts.words(answer)[-1])))
    if num_words >= 6:
        yield _Option(Constraint("max_words", 5 * (num_words // 5 + 1)))
    if num_words >= 12:
        yield _Option(Constraint("min_words", 5 * (num_words // 5)))
    if num_words >= 12 and "," not in answer:
        yield _Option(Constraint("no_comma"))
    new = [w for w in dict.fromkeys(found) if _usable(w) and w in answer and not texts.occurrences(task.instruction, w)]
    if new := [w for w in new if stems(w) & set(topic.others)] or new:
        yield _Option(Constraint("contains", rng.choice(new)))
        capital = rng.choice(new)
        yield _Option(Constraint("capital_word", capital), partial(_in_capitals, word=capital), rank=2)
    if task.category not in _PIECES:
        for word in texts.plain_words(task.instruction)[1:]:
            if _usable(word) and stems(word) & set(topic.asked) and not texts.occurrences(answer, word):
                yield _Option(Constraint("avoids", word))
    yield _Option(Constraint("lower_case"), str.lower, rank=3)
    if task.category not in _PIECES:
        yield from _with_own_words(rng, separator="\n" if in_lines else " ")
    if '"' not in answer and not in_lines:
        yield _Option(Constraint("quoted"), lambda a: f'"{a}"', rank=4)
    if answer.endswith("?"):
        yield _Option(Constraint("question"))


def _with_own_words(rng: random.Random, *, separator: str) -> Iterator[_Option]:
    """Constraints that every answer keeps after a few words of an assistant."""
    opening, closing, question = rng.choice(OPENINGS), rng.choice(CLOSINGS), rng.choice(QUESTIONS)
    yield _Option(Constraint("starts_with", opening[:-1]), lambda a: f"{opening}{separator}{a}", rank=1)
    yield _Option(Constraint("ends_with", closing[:-1]), lambda a: f"{a}{separator}{closing}", rank=1)
    yield _Option(Constraint("question"), lambda a: f"{a}{separator}{question}", rank=1)


def _without_answer(task: Task, rng: random.Random) -> Iterator[_Option]:
    """Constraints that a good answer to the task can keep."""
    options: list[tuple[str, Any]] = [("lower_case", None), ("contains", rng.choice(task.topic_words))]
    if task.category not in _PIECES:
        options += [("starts_with", rng.choice(OPENINGS)[:-1]), ("ends_with", rng.choice(CLOSINGS)[:-1])]
        options += [("question", None)]
    if task.category == "list":
        options += [("items", rng.choice((3, 4, 5)))]
    elif task.category in (*_WITH_MATERIAL, "question", "suggest"):
        options += [("max_words", rng.choice((15, 20, 25))), ("quoted", None)]
    else:
        options += [("sentences", rng.choice((1, 2, 3))), ("max_words", rng.choice((20, 25, 30, 40)))]
        options += [("min_words", rng.choice((15, 20, 25))), ("no_comma", None), ("quoted", None)]
    for kind, value in options:
        yield _Option(Constraint(kind, value))


def _usable(word: str) -> bool:
    return word.isalpha() and word.isascii() and len(word) >= 4 and is_content_word(word)


def _in_capitals(text: str, word: str) -> str:
    return re.sub(rf"(?<!\w){re.escape(word)}(?!\w)", word.upper(), text, flags=re.IGNORECASE)
