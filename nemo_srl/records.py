"""The records that stages pass to each other. A file has one JSON object per line, so `head` can show it.

Every record has a `key`, which is unique in its file. Files are sorted by it. Unknown and missing fields are refused,
so a file of another version cannot be misread.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, Protocol, TypeVar, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, Strict, StringConstraints, ValidationError, create_model

from nemo_srl.errors import DataError

Text = Annotated[str, StringConstraints(pattern=r"\S")]
"""A text that is not blank."""
Points = Annotated[int, Field(ge=0)]
FinishReason = Literal["stop", "length", "refused", "too_long", "malformed"]
"""How a model call ended. After `stop` and `length` there is a text. The others are calls without an answer: the server
refused or filtered it, its prompt is too long for the context, or the server gave nothing that can be used."""
ANSWERED: frozenset[FinishReason] = frozenset({"stop", "length"})
"""The finish reasons after which there is a text."""
LEFT_OUT_IF_EMPTY: Mapping[str, Any] = {"left_out_if_empty": True}
"""Metadata of a field that a row has only if it is not the default, because nearly all rows would have the default."""
Order = Literal["ab", "ba"]
"""Which of two models' answers stands first."""
# The tuple is not strict, because JSON has no tuples and writes a list of two instead.
NumberLogprobs = list[Annotated[tuple[int, dict[str, float]], Strict(False)]]
"""For each number in a text: the index where it begins, and the log-probabilities of the numbers possible there."""


class Record(Protocol):
    """A dataclass that can be a line of a table. Its fields have types that JSON has, so lists instead of tuples."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def key(self) -> str: ...


@dataclass(frozen=True, kw_only=True)
class IFTExample:
    """Instruction fine-tuning seed, e.g. `{"instruction": "Name a prime.", "response": "7"}`."""

    example_id: str
    instruction: Text
    response: Text
    category: str = ""

    @property
    def key(self) -> str:
        return self.example_id


@dataclass(frozen=True, kw_only=True)
class EFTExample:
    """Evaluation fine-tuning seed: an answer, and the verdict a good judge gives on it."""

    example_id: str
    instruction: Text
    response: Text
    justification: str
    score: Points
    category: str = ""

    @property
    def key(self) -> str:
        return self.example_id


@dataclass(frozen=True, kw_only=True)
class RankedAnswers:
    """Answers to one instruction, ordered by people: `ranks[i]` is the rank of `responses[i]`. Rank 0 is the best, and
    equally good answers share a rank. People gave neither scores nor reasons, as in Open Assistant."""

    example_id: str
    instruction: str
    responses: list[str]
    ranks: list[int]

    @property
    def key(self) -> str:
        return self.example_id


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What a model generated in one call: sample `index` of the request `request_key`.

    `num_tokens` counts generated tokens, with the end-of-sequence token. `number_logprobs` is None unless the request
    asked for it; `[[7, {"4": -0.2, "3": -1.8}]]` describes the number at `text[7]`. A call without an answer has an
    empty text, no tokens, and says in `reason` why.
    """

    request_key: str
    index: int
    text: str
    num_tokens: int
    finish_reason: FinishReason
    number_logprobs: NumberLogprobs | None = None
    reason: str = field(default="", metadata=LEFT_OUT_IF_EMPTY)
    thinking: str = field(default="", metadata=LEFT_OUT_IF_EMPTY)
    """What the model thought before `text`. In a journal it is still a part of the text."""

    @property
    def key(self) -> str:
        return f"{self.request_key}/{self.index:02d}"

    @property
    def is_answered(self) -> bool:
        return self.finish_reason in ANSWERED

    def after(self, text: str) -> Completion:
        """The same with `text` before its own. The numbers in `text` have no log-probabilities."""
        return self._with_text(text + self.text, moved=len(text))

    def without_first(self, num_characters: int) -> Completion:
        """The same without so many characters of its text, and without the numbers in them."""
        return self._with_text(self.text[num_characters:], moved=-num_characters)

    def _with_text(self, text: str, *, moved: int) -> Completion:
        places = self.number_logprobs and [(at + moved, found) for at, found in self.number_logprobs if at + moved >= 0]
        return dataclasses.replace(self, text=text, number_logprobs=places)


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One instruction for the policy, e.g. `Prompt(prompt_id="iter1-000003", text="Name a prime.")`."""

    prompt_id: str
    text: Text

    @property
    def key(self) -> str:
        return self.prompt_id


@dataclass(frozen=True, kw_only=True)
class Question:
    """One or more turns of a user. Each is asked after the answer to the one before. `dataset` names the source."""

    question_id: str
    turns: list[str]
    dataset: str = ""

    @property
    def key(self) -> str:
        return self.question_id


@dataclass(frozen=True, kw_only=True)
class VerifiablePrompt:
    """A prompt with instructions that code can check (IFEval). `arguments[i]` belongs to `instruction_ids[i]`, e.g.
    `{"num_words": 300, "relation": "at least"}` to `length_constraints:number_words`."""

    prompt_id: str
    text: str
    instruction_ids: list[str]
    arguments: list[dict[str, Any]]

    @property
    def key(self) -> str:
        return self.prompt_id


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One sampled response to one prompt, without the thoughts before it.

    Without an answer, `response` is empty: `reason` says why, or the model was still thinking at `max_tokens`."""

    prompt_id: str
    sample_index: int
    prompt: str
    response: str
    num_tokens: int
    finish_reason: FinishReason
    reason: str = field(default="", metadata=LEFT_OUT_IF_EMPTY)
    thinking: str = field(default="", metadata=LEFT_OUT_IF_EMPTY)

    @property
    def key(self) -> str:
        return f"{self.prompt_id}/{self.sample_index:02d}"

    @property
    def is_answered(self) -> bool:
        is_empty = bool(self.thinking) and not self.response
        return self.finish_reason in ANSWERED and not is_empty


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """One verdict of the judge on one candidate; `score` is None when no score can be read in the verdict.

    `coverage` is None unless `score` is an expectation (`judge.mode=expected`). Then it is the total probability that
    the judge gave to the points 0 to max, over which the expectation is taken. `reason` says why the judge gave no
    verdict at all; then `verdict` is empty.
    """

    candidate_key: str
    judgement_index: int
    verdict: str
    score: float | None
    coverage: float | None = None
    reason: str = field(default="", metadata=LEFT_OUT_IF_EMPTY)

    @property
    def key(self) -> str:
        return f"{self.candidate_key}/{self.judgement_index:02d}"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One verdict of the judge on two models' answers to one question.

    `first_share` is the result of the answer that stood first (model a's in order `ab`): 1 won, 0 lost, 0.5 tied. It is
    None when the verdict could not be read. `reason` says why there is no verdict at all.
    """

    question_id: str
    order: Order
    verdict_index: int
    verdict: str
    first_share: float | None
    reason: str = field(default="", metadata=LEFT_OUT_IF_EMPTY)

    @property
    def key(self) -> str:
        return f"{self.question_id}/{self.order}/{self.verdict_index:02d}"


@dataclass(frozen=True, kw_only=True)
class PreferencePair:
    """One DPO example: `chosen` has the higher mean score of the two. The texts are never equal.

    A finish reason of `length` means that the answer was cut off at `max_tokens`. Older tables have none. `confidence`
    is the probability that the chosen answer is the better one. `pair_index` counts the pairs of one prompt.
    """

    prompt_id: str
    prompt: str
    chosen: str
    rejected: str
    chosen_score: float
    rejected_score: float
    chosen_finish_reason: FinishReason = "stop"
    rejected_finish_reason: FinishReason = "stop"
    confidence: float = field(default=1.0, metadata=LEFT_OUT_IF_EMPTY)
    pair_index: int = field(default=0, metadata=LEFT_OUT_IF_EMPTY)

    @property
    def key(self) -> str:
        return f"{self.prompt_id}/{self.pair_index:02d}" if self.pair_index else self.prompt_id


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One measured value over `n` cases, with a 95% interval where one was computed.

    `value` is None where nothing could be measured (`n` is 0). That is not the same as zero.
    """

    name: str
    value: float | None
    n: int
    low: float | None = None
    high: float | None = None

    @property
    def key(self) -> str:
        return self.name


@dataclass(frozen=True, kw_only=True)
class GroupSum:
    """What the cases of one group, such as an instruction, add to a metric, and how many cases they are.

    The metric is the sum of `total` over its groups, divided by the sum of `n`. With these rows, two models can be
    compared on the same groups.
    """

    metric: str
    group: str
    total: float
    n: int

    @property
    def key(self) -> str:
        return f"{self.metric}/{self.group}"


R = TypeVar("R", bound=Record)


def to_row(record: Record) -> dict[str, Any]:
    """The record as a JSON object."""
    row = dataclasses.asdict(record)
    for f in dataclasses.fields(record):
        if f.metadata == LEFT_OUT_IF_EMPTY and row[f.name] == f.default:
            del row[f.name]
    return row


def from_row(cls: type[R], row: Any, *, where: str) -> R:
    """Build a record from a JSON object. The message of a `DataError` begins with `where` (file and line)."""
    try:
        _checks(cls).__pydantic_validator__.validate_python(row)
    except ValidationError as e:
        raise DataError(f"{where}: {_fault(cls, e)}") from e
    # Not from pydantic's copy: it has 3.0 where the row has 3, and the record would be written with other bytes.
    return cls(**row)


@functools.cache
def _checks(cls: type[Record]) -> type[BaseModel]:
    """A pydantic model of the record's fields. Strict: neither "1" nor true is a number."""
    kinds, none = get_type_hints(cls, include_extras=True), dataclasses.MISSING
    fields: Any = {f.name: (kinds[f.name], ... if f.default is none else None) for f in dataclasses.fields(cls)}
    return create_model(cls.__name__, __config__=ConfigDict(strict=True, extra="forbid"), **fields)


def _fault(cls: type[Record], error: ValidationError) -> str:
    """What is wrong with a row, and what was expected."""
    kinds = {f.name: f.type for f in dataclasses.fields(cls)}
    faults = error.errors(include_url=False)
    if missing := [x["loc"][0] for x in faults if x["type"] == "missing" and len(x["loc"]) == 1]:
        return f"field(s) {missing} are missing; a {cls.__name__} has {list(kinds)}. Add them, or remove the row."
    if unknown := sorted(str(x["loc"][0]) for x in faults if x["type"] == "extra_forbidden"):
        return f"unknown field(s) {unknown}; a {cls.__name__} has {list(kinds)}. Remove or rename them."
    loc, value = faults[0]["loc"], faults[0]["input"]
    if not loc:
        return f"expected a JSON object with {list(kinds)}, found {type(value).__name__}. Correct or remove the row."
    place = f"{loc[0]}{''.join(f'[{x!r}]' for x in loc[1:])}"
    if faults[0]["type"] == "string_pattern_mismatch":
        return f"{place}={value!r}: it is blank. Give it a text, or remove the row."
    if faults[0]["type"] == "greater_than_equal":
        return f"{place}={value!r}: it is below {faults[0]['ctx']['ge']}. Correct it, or remove the row."
    expected = f"expected {kinds[str(loc[0])]} ({faults[0]['msg']}), found {type(value).__name__}"
    return f"{place}={value!r}: {expected}. Correct it, or remove the row."
