"""Held-out instructions as IFEval's prompts, so that IFEval's own checks (Zhou et al. 2023) can judge the answers.

These checks are another's code (`nemo_srl/data/verifiable.py`), so they are a second opinion on the constraints. IFEval
knows no exact number of sentences, so it gets two limits. Some kinds of constraints are left out, because IFEval has
nothing like them, or checks them in another way. Its lists need bullets, for example, and an answer that has to end
with a word must have no full stop after it.

    python recipes/evaluate.py '++evaluate.models={m2: ...}' evaluate.ifeval=data/checked/ifeval_held_out.jsonl
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from nemo_srl.data.checked.truth import CheckedInstruction

Check = tuple[str, dict[str, Any]]
"""The name of an instruction of IFEval, and its arguments."""


def _num_words(relation: str, number: int) -> list[Check]:
    return [("length_constraints:number_words", {"relation": relation, "num_words": number})]


def _num_sentences(number: int) -> list[Check]:
    limits = (("at least", number), ("less than", number + 1))
    return [("length_constraints:number_sentences", {"relation": r, "num_sentences": n}) for r, n in limits]


AS_IFEVAL: Mapping[str, Callable[[Any], list[Check]]] = {
    "sentences": _num_sentences,
    "max_words": lambda n: _num_words("less than", n + 1),
    "min_words": lambda n: _num_words("at least", n),
    "contains": lambda word: [("keywords:existence", {"keywords": [word]})],
    "avoids": lambda word: [("keywords:forbidden_words", {"forbidden_words": [word]})],
    "lower_case": lambda _: [("change_case:english_lowercase", {})],
    "no_comma": lambda _: [("punctuation:no_comma", {})],
    "quoted": lambda _: [("startend:quotation", {})],
}
"""Kinds of constraints, and what checks a value of them in IFEval."""


@dataclass(frozen=True, kw_only=True)
class IFEvalRow:
    """A row as IFEval publishes it."""

    key: str
    prompt: str
    instruction_id_list: list[str]
    kwargs: list[dict[str, Any]]


def prompts(instructions: Iterable[CheckedInstruction]) -> Iterator[IFEvalRow]:
    """Of those instructions that have a constraint which IFEval can check."""
    for x in instructions:
        known = [c for c in dict.fromkeys(x.checks) if c.kind in AS_IFEVAL]
        checks = [check for c in known for check in AS_IFEVAL[c.kind](c.value)]
        if checks:
            names, arguments = zip(*checks, strict=True)
            yield IFEvalRow(
                key=x.key, prompt=x.instruction, instruction_id_list=list(names), kwargs=list(arguments)
            )  # fmt: skip
