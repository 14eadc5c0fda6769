"""The records that flow between stages: one JSON object a line, in files that `head` can read.

Every record has a `key`, unique within its file; files are sorted by it. Reading refuses unknown and
missing fields, so a file from another version is noticed and not half understood.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, TypeVar, get_args

from nemo_srl.errors import DataError

FinishReason = Literal["stop", "length"]
Order = Literal["ab", "ba"]
"""Which of two models' answers stands first."""
NumberLogprobs = list[tuple[int, dict[str, float]]]
"""Per number in a text: where it begins, and the log-probabilities of the numbers that could stand there."""


class Record(Protocol):
    """Anything that can be a line of a table."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def key(self) -> str: ...


@dataclass(frozen=True, kw_only=True)
class IFTExample:
    """Instruction fine-tuning seed, e.g. `{"instruction": "Name a prime.", "response": "7"}`."""

    example_id: str
    instruction: str
    response: str
    category: str = ""

    @property
    def key(self) -> str:
        return self.example_id


@dataclass(frozen=True, kw_only=True)
class EFTExample:
    """Evaluation fine-tuning seed: an answer, and the verdict a good judge gives on it."""

    example_id: str
    instruction: str
    response: str
    justification: str
    score: int
    category: str = ""

    @property
    def key(self) -> str:
        return self.example_id


@dataclass(frozen=True, kw_only=True)
class RankedAnswers:
    """Answers to one instruction in the order that people give them: `ranks[i]` is that of `responses[i]`,
    0 is the best, and equally good ones share a rank. There are no scores and no reasons, as in Open Assistant."""

    example_id: str
    instruction: str
    responses: list[str]
    ranks: list[int]

    @property
    def key(self) -> str:
        return self.example_id


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One model call as it came back: sample `index` of the request `request_key`.

    `num_tokens` counts generated tokens, the end-of-sequence token included. `number_logprobs` is None
    unless it was asked for; `[[7, {"4": -0.2, "3": -1.8}]]` tells of the number at `text[7]`.
    """

    request_key: str
    index: int
    text: str
    num_tokens: int
    finish_reason: FinishReason
    number_logprobs: NumberLogprobs | None = None

    @property
    def key(self) -> str:
        return f"{self.request_key}/{self.index:02d}"


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One instruction for the policy, e.g. `Prompt(prompt_id="iter1-000003", text="Name a prime.")`."""

    prompt_id: str
    text: str

    @property
    def key(self) -> str:
        return self.prompt_id


@dataclass(frozen=True, kw_only=True)
class Question:
    """One or more turns of a user, each asked after the answer to the one before; `dataset` says where it is from."""

    question_id: str
    turns: list[str]
    dataset: str = ""

    @property
    def key(self) -> str:
        return self.question_id


@dataclass(frozen=True, kw_only=True)
class VerifiablePrompt:
    """A prompt with instructions that code can check (IFEval): `arguments[i]` are those of `instruction_ids[i]`, e.g.
    `{"num_words": 300, "relation": "at least"}` of `length_constraints:number_words`."""

    prompt_id: str
    text: str
    instruction_ids: list[str]
    arguments: list[dict[str, Any]]

    @property
    def key(self) -> str:
        return self.prompt_id


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One sampled response to one prompt."""

    prompt_id: str
    sample_index: int
    prompt: str
    response: str
    num_tokens: int
    finish_reason: FinishReason

    @property
    def key(self) -> str:
        return f"{self.prompt_id}/{self.sample_index:02d}"


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """One verdict of the judge on one candidate; `score` is None when the verdict has none.

    `coverage` is None unless `score` is an expectation (`judge.mode=expected`): then it is the probability
    that the judge gave to the points 0 to max, over which the expectation was taken.
    """

    candidate_key: str
    judgement_index: int
    verdict: str
    score: float | None
    coverage: float | None = None

    @property
    def key(self) -> str:
        return f"{self.candidate_key}/{self.judgement_index:02d}"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One verdict of the judge on two models' answers to one question.

    `first_share` is 1, 0 or 0.5 for the answer that stood first (model a's in order `ab`): it won, lost or tied. It is
    None when the verdict could not be read.
    """

    question_id: str
    order: Order
    verdict_index: int
    verdict: str
    first_share: float | None

    @property
    def key(self) -> str:
        return f"{self.question_id}/{self.order}/{self.verdict_index:02d}"


@dataclass(frozen=True, kw_only=True)
class PreferencePair:
    """One DPO example: `chosen` has the higher mean score of the two. The texts are never equal."""

    prompt_id: str
    prompt: str
    chosen: str
    rejected: str
    chosen_score: float
    rejected_score: float

    @property
    def key(self) -> str:
        return self.prompt_id


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One measured value, over `n` things, with a 95% interval where one was computed.

    `value` is None where nothing could be measured (`n` is 0), which is not the same as zero.
    """

    name: str
    value: float | None
    n: int
    low: float | None = None
    high: float | None = None

    @property
    def key(self) -> str:
        return self.name


R = TypeVar("R", bound=Record)


def to_row(record: Record) -> dict[str, Any]:
    """The record as a JSON object."""
    return dataclasses.asdict(record)


def from_row(cls: type[R], row: object, *, where: str) -> R:
    """Build a record from a JSON object; `where` (file and line) opens the message of the `DataError`."""
    fields = dataclasses.fields(cls)
    expected = [f.name for f in fields]
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected a JSON object with {expected}, found {type(row).__name__}")
    required = {f.name for f in fields if f.default is dataclasses.MISSING}
    if missing := sorted(required - row.keys()):
        raise DataError(f"{where}: field(s) {missing} are missing; a {cls.__name__} has {expected}")
    if unknown := sorted(row.keys() - set(expected)):
        raise DataError(f"{where}: unknown field(s) {unknown}; a {cls.__name__} has {expected}")
    for f in fields:
        if f.name in row and not _fits(row[f.name], str(f.type)):
            raise DataError(f"{where}: {f.name}={row[f.name]!r}: expected {f.type}, found {type(row[f.name]).__name__}")
    return cls(**row)


def _fits(value: object, annotation: str) -> bool:
    """Whether a JSON value fits one of the few annotations that records use (they are strings here)."""
    literals = {"FinishReason": FinishReason, "Order": Order}
    if annotation in literals:
        return value in get_args(literals[annotation])
    if annotation.startswith("list["):
        element = annotation.removeprefix("list[").removesuffix("]")
        return isinstance(value, list) and all(_fits(x, element) for x in value)
    names = {
        "str": (str,), "int": (int,), "float": (int, float), "None": (type(None),), "NumberLogprobs": (list,),
        "dict[str, Any]": (dict,),
    }  # fmt: skip
    kinds = tuple(kind for part in annotation.split(" | ") for kind in names[part])
    return isinstance(value, kinds) and not isinstance(value, bool)
