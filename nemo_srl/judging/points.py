"""Points: the judge grades one answer, and the last line of its verdict states the score, such as `Score: 4`.

This is the paper's way (section 2.2). The reader `STATED` takes the score that the verdict states;
`nemo_srl.judging.expected` asks in the same way and reads the score in another.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from nemo_srl.config import JudgeConfig
from nemo_srl.config.check import check
from nemo_srl.judging import rubrics
from nemo_srl.judging.scores import Score
from nemo_srl.records import Completion, EFTExample, Judgement

Material = Mapping[str, tuple[str, str]]
"""What is judged: by the answer's key, its instruction and the response."""

# A place where a number is given as the score. Every repetition is bounded, so reading takes time that is linear in the
# length of the text. Only ASCII matches: digits and letters of other scripts are not taken for ours.
_CLAIM = re.compile(
    r"""
    (?<![^\W_]) (?<![^\W_][_-])          # "score" begins a word: neither "underscore" nor "sub_score"
    (?ai:score) [*_]{0,3} [ \t]{0,4} : [*_ \t]{0,8}
    (?=[-+.]{0,2}[0-9])
    """,
    re.VERBOSE,
)

# What must follow: the asked format, up to the end of the line or of the sentence.
_VALUE = re.compile(
    r"""
    (?P<points> (?:0|[1-9][0-9]{0,3}) (?:\.[0-9]{1,6})? ) [*_]{0,3}
    (?: [ \t]{0,4} (?: / | (?ai:out[ ]of) ) [ \t]{0,4} (?P<maximum>[0-9]{1,4}) [*_]{0,3} )?
    (?: [ \t]{1,4} (?ai:points?) [*_]{0,3} )?
    (?P<quote>["'`\u201d\u2019]?) [*_]{0,3}
    (?: (?=[ \t]*(?:[\r\n]|\Z)) | [.!] (?=[*_"'`\u201d\u2019]{0,4}(?:[\r\n]|\Z|[ \t]+(?![ \t0-9]))) )
    """,
    re.VERBOSE,
)

# Typographic quotation marks are written as escapes: \u2018 \u2019 single, \u201c \u201d double, \u00ab.
_OPENING_QUOTE = re.compile(r"""["'`\u201c\u2018\u00ab][*_]{0,3}\Z""")
_LINE_START = re.compile(r"(?:\A|[\r\n])[ \t>#*_-]*\Z")
_WINDOW = 16  # characters looked back at; a bound keeps the reading linear


def parse_score(verdict: str, *, max_score: int) -> float | None:
    """The score in `verdict`, the model's own text without its prompt; None when it gives none.

    These are read: `Score: 4`, `Score: 3.5`, `Score: 4/5`, `Score: 4 out of 5` and `Score: 4 points`, in upper or
    lower case, with or without Markdown emphasis, each up to the end of its line or sentence.
    The last `Score:` before a number decides, so an earlier one that the judge quotes does not. The verdict has no
    score if that number is out of [0, max_score], has another maximum (`4/10`), or goes on (`4-5`, `4 or 5`).
    A score in quotation marks counts only at the start of a line. Elsewhere it is a quotation of the response.

    Not covered: a verdict that was cut off. `stated_score` sees to it.
    """
    score: float | None = None
    for claim in _CLAIM.finditer(verdict):
        quoted = _opening_quote(verdict, claim.start())
        if quoted == "inline":
            continue
        score = _points(verdict, claim.end(), quoted=quoted == "whole line", max_score=max_score)
    return score


def verdict_text(justification: str, score: int) -> str:
    """What EFT teaches the judge to write: the justification first, the score last.

    The order matters: a score that is written first cannot profit from the reasoning.
    """
    return f"{justification.strip()}\nScore: {score}".lstrip()


def score_lines(max_score: int) -> tuple[str, ...]:
    """The ends of verdicts in the asked format, as stop strings: what comes after the score is not read."""
    return tuple(f"Score: {k}\n" for k in range(max_score + 1))


@dataclass(frozen=True)
class PointsReader:
    """A `VerdictReader` of verdicts that end with a line `Score: <points>`, 0 to `judge.max_score`."""

    score: Callable[[Completion, int], Score]
    """The score in a verdict, given `judge.max_score`."""
    max_digits: int
    """Points that have more digits cannot be read."""
    num_logprobs: int = 0
    absolute: str = ""

    def check(self, cfg: JudgeConfig) -> None:
        rubrics.check_holds_once(cfg.rubric, "{instruction}", "{response}", key="judge.rubric")
        asks = "Score:" in cfg.rubric
        check(asks, "judge.rubric", rubrics.excerpt(cfg.rubric), "must ask for a line `Score: <points>`")
        most = 10**self.max_digits - 1
        reason = f"judge.mode={cfg.mode!r} reads points of {self.max_digits} digit(s), so they go up to {most} at most"
        check(cfg.max_score <= most, "judge.max_score", cfg.max_score, reason)

    def questions(self, material: Material, cfg: JudgeConfig) -> dict[str, str]:
        return {key: rubrics.render(cfg.rubric, instruction=x, response=y) for key, (x, y) in material.items()}

    def stop(self, cfg: JudgeConfig) -> tuple[str, ...]:
        return score_lines(cfg.max_score)

    def judgements(
        self, material: Material, completions: Mapping[str, Sequence[Completion]], cfg: JudgeConfig
    ) -> list[Judgement]:
        return [
            Judgement(
                candidate_key=key, judgement_index=c.index, verdict=c.text.strip(), score=s.value, coverage=s.coverage
            )
            for key in material
            for c, s in ((c, self.score(c, cfg.max_score)) for c in completions[key])
        ]

    def lesson(self, example: EFTExample, cfg: JudgeConfig) -> tuple[str, str]:
        prompt = rubrics.render(cfg.rubric, instruction=example.instruction, response=example.response)
        return prompt, verdict_text(example.justification, example.score)

    def justification(self, verdict: str) -> str:
        claims = [claim.start() for claim in _CLAIM.finditer(verdict)]
        return verdict[: claims[-1]].strip() if claims else verdict.strip()


def stated_score(verdict: Completion, max_score: int) -> Score:
    """The score that the verdict states."""
    # A verdict that was cut off gets a mark at its end, because its `Score: 4` may be half of a `Score: 4.5`.
    text = verdict.text if verdict.finish_reason == "stop" else verdict.text + "\u2026"
    return Score(parse_score(text, max_score=max_score))


STATED = PointsReader(score=stated_score, max_digits=4)
"""`judge.mode=sampled`. Four digits are what `parse_score` reads."""


def _opening_quote(verdict: str, position: int) -> Literal["none", "inline", "whole line"]:
    """Whether a quotation opens right before `position`, and whether it opens its line, too."""
    start = max(0, position - _WINDOW)
    quote = _OPENING_QUOTE.search(verdict, start, position)
    if quote is None:
        return "none"
    return "whole line" if _LINE_START.search(verdict, start, quote.start()) else "inline"


def _points(verdict: str, position: int, *, quoted: bool, max_score: int) -> float | None:
    """The number that is given at `position`, if what follows is in the asked format."""
    value = _VALUE.match(verdict, position)
    if value is None or (value["quote"] and not quoted):
        return None
    if value["maximum"] is not None and int(value["maximum"]) != max_score:
        return None
    points = float(value["points"])
    return points if points <= max_score else None
