"""The true score of an answer: five points that code can check.

    on_topic            the answer says something about what was asked
    complete            the model ended it, and it ends as a finished text does
    no_loop             it does not repeat itself
    first_constraint    it is on topic and keeps the first constraint of the instruction
    second_constraint   it is on topic and keeps the second one; a constraint that is alone counts for both points

So an answer on another topic has 2 points at most. One on the topic that is complete and has no loop has 3 or more,
whether or not it keeps the constraints. An answer without words has no point. All points but the first are exact, in
the sense of `texts` and `constraints`.

`on_topic` is a check of words. Each instruction has a list of words that it asks with, and of words that answers to it
are likely to have and other texts are not (`topics`). The answer needs two of these words, or one if it has up to five
words. It needs a word that the question does not have. Sentences whose words all stand in the instruction, in the same
order, do not count. So the check takes a false or senseless answer with the right words for relevant, and it misses an
answer with unusual words. `data/checked/README.md` says how often.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from rapidfuzz.distance import LCSseq

from nemo_srl.data import texts
from nemo_srl.data.checked.constraints import Constraint
from nemo_srl.data.checked.topics import stems, without_material
from nemo_srl.errors import DataError
from nemo_srl.records import FinishReason
from nemo_srl.words import tokenize

MAX_SCORE = 5

_SHORT_ANSWER = 5


@dataclass(frozen=True, kw_only=True)
class CheckedInstruction:
    """An instruction with all that the true score needs: a line of `data/checked/instructions.jsonl`.

    `constraints` has one or two objects such as `{"kind": "max_words", "value": 30}`. `asked` are the stems of the
    words that the instruction asks with, and `topic` those of other words that belong to its topic. `response` is a
    good answer, or empty for an instruction that has none.
    """

    instruction_id: str
    task_id: str
    split: str
    category: str
    instruction: str
    constraints: list[dict[str, Any]]
    asked: list[str]
    topic: list[str]
    response: str = ""

    @property
    def key(self) -> str:
        return self.instruction_id

    @cached_property
    def checks(self) -> tuple[Constraint, Constraint]:
        """The first and the second constraint; they are the same when there is only one. Raises `DataError`."""
        if not 1 <= len(self.constraints) <= 2:
            raise DataError(f"{self.key}: {len(self.constraints)} constraints; an instruction has one or two")
        found = [Constraint(**c) for c in self.constraints]
        return found[0], found[-1]


@dataclass(frozen=True, kw_only=True)
class TrueScore:
    """The five points of an answer."""

    on_topic: bool
    complete: bool
    no_loop: bool
    first_constraint: bool
    second_constraint: bool

    @property
    def score(self) -> int:
        """0 to 5."""
        return sum(asdict(self).values())


def true_score(instruction: CheckedInstruction, answer: str, *, finish_reason: FinishReason = "stop") -> TrueScore:
    """The points of `answer`. `finish_reason` is `length` for an answer that was cut off at the token limit."""
    first, second = instruction.checks
    there, on_topic = bool(texts.words(answer)), is_on_topic(instruction, answer)
    return TrueScore(
        on_topic=on_topic,
        complete=there and finish_reason == "stop" and texts.is_ended(answer),
        no_loop=there and not texts.has_loop(answer),
        first_constraint=on_topic and first.holds(answer),
        second_constraint=on_topic and second.holds(answer),
    )


def is_on_topic(instruction: CheckedInstruction, answer: str) -> bool:
    """Whether the answer has words of the topic, and others than those of the question."""
    asked = tokenize(instruction.instruction)
    own = " ".join(s for s in texts.sentences(answer) if not _is_part(tokenize(s), asked))
    said = stems(own)
    needed = 1 if len(texts.words(answer)) <= _SHORT_ANSWER else 2
    has_new_word = not said <= stems(without_material(instruction.instruction))
    return has_new_word and len(said & {*instruction.asked, *instruction.topic}) >= needed


def _is_part(said: list[str], asked: list[str]) -> bool:
    return LCSseq.similarity(asked, said) == len(said)
