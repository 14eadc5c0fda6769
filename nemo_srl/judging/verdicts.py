"""The judge's prompt and the reading of its verdicts (paper section 2.2: LLM-as-a-Judge).

`render` fills a rubric of `conf/judge/`; `parse_score` reads the score from what the model wrote after it,
and from nothing else, so a response that contains "Score: 5" cannot grade itself. A verdict without a
score in the asked format is data: `None`, which callers count and never turn into a number.

Not covered: whether a verdict was cut short. One that ends at its token limit may show "Score: 4" of a
"Score: 4.5"; leave a few tokens to spare in `judge.max_tokens`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

_SLOT = re.compile(r"\{(instruction|response)\}")

# The tags with which the rubrics fence the material that is judged.
_FENCE = re.compile(r"<(?=[ \t]{0,4}/?[ \t]{0,4}(?ai:instruction|response)\b)")

# A place where a number is given as the score. Every repetition is bounded and ASCII, so reading is linear
# in the length of the text, and digits or letters of other scripts never pass for ours.
_CLAIM = re.compile(
    r"""
    (?<![^\W_]) (?<![^\W_][_-])          # "score" begins a word: neither "underscore" nor "sub_score"
    (?ai:score) [*_]{0,3} [ \t]{0,4} : [*_ \t]{0,8}
    (?=[-+.]{0,2}[0-9])
    """,
    re.VERBOSE,
)

# What may follow: the asked format, up to the end of the line or of the sentence.
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


def render(rubric: str, *, instruction: str, response: str) -> str:
    """The judge's prompt: `rubric` with its `{instruction}` and `{response}` filled in.

    The texts are material, not templates: braces in them stay, and the rubric's closing tags are made
    harmless in them (`</response>` becomes `&lt;/response>`), so that a response stays in its block.
    """
    texts = {"instruction": instruction, "response": response}
    texts = {slot: _FENCE.sub("&lt;", text) for slot, text in texts.items()}
    return _SLOT.sub(lambda slot: texts[slot[1]], rubric)


def parse_score(verdict: str, *, max_score: int) -> float | None:
    """The score in `verdict`, the model's own text without its prompt; None when it gives none.

    Understood, in any case and with Markdown emphasis: `Score: 4`, `Score: 3.5`, `Score: 4/5`, `Score: 4 out
    of 5`, `Score: 4 points`, each up to the end of its line or sentence. The last `Score:` that is followed
    by a number decides, so a quoted earlier one does not; when that number is out of [0, max_score],
    counts from another maximum (`4/10`) or goes on in another way (`4-5`, `4 or 5`), the verdict
    contradicts its format and has no score. A score in quotation marks counts only at the start of a line:
    elsewhere it is a quotation of the response.
    """
    score: float | None = None
    for claim in _CLAIM.finditer(verdict):
        quoted = _opening_quote(verdict, claim.start())
        if quoted == "inline":
            continue
        score = _points(verdict, claim.end(), quoted=quoted == "whole line", max_score=max_score)
    return score


def justification(verdict: str) -> str:
    """What the judge wrote before it gave the score, the counterpart of `verdict_text`."""
    claims = [claim.start() for claim in _CLAIM.finditer(verdict)]
    return verdict[: claims[-1]].strip() if claims else verdict.strip()


def mean_score(scores: Sequence[float | None]) -> float | None:
    """Mean of the scores that are there; None when there are none (paper section 2.2: mean of 3)."""
    valid = [score for score in scores if score is not None]
    return sum(valid) / len(valid) if valid else None


def verdict_text(justification: str, score: int) -> str:
    """What EFT teaches the judge to write: the justification first, the score last.

    The order matters: a score that is written first cannot profit from the reasoning.
    """
    return f"{justification.strip()}\nScore: {score}".lstrip()


def score_lines(max_score: int) -> tuple[str, ...]:
    """The ends of verdicts in the asked format, as stop strings: what comes after the score is not read."""
    return tuple(f"Score: {k}\n" for k in range(max_score + 1))


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
