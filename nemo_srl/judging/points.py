"""Points: the judge grades one answer, and the last line of its verdict states the score, such as `Score: 4`.

This is the paper's way (section 2.2). The reader `STATED` takes the score that the verdict states;
`nemo_srl.judging.expected` asks in the same way and reads the score in another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from nemo_srl.config import JudgeConfig
from nemo_srl.config.check import check
from nemo_srl.judging import rubrics
from nemo_srl.judging.form import AskedForm
from nemo_srl.judging.scores import Score
from nemo_srl.records import Completion, EFTExample, Judgement

Material = Mapping[str, tuple[str, str]]
"""What is judged: by the answer's key, its instruction and the response."""

_FORM = AskedForm(
    "score",
    begins=r"[-+.]{0,2}[0-9]",
    value=r"""
    (?P<value> (?:0|[1-9][0-9]{0,3}) (?:\.[0-9]{1,6})? ) [*_\])>}]{0,4}
    (?: [ \t]{0,4} \(? (?: / | (?ai:out[ ]of) ) [ \t]{0,4} (?P<maximum>[0-9]{1,4}) (?:\.0{1,6})? [*_)]{0,3} )?
    (?: [ \t]{1,4} (?ai:points?) [*_]{0,3} )?
    """,
)


def parse_score(verdict: str, *, max_score: int) -> float | None:
    """The score in `verdict`, the model's own text without its prompt; None when it gives none.

    `form.py` says which place counts. These are read there: `4`, `3.5`, `4/5`, `4 out of 5`, `4 (out of 5)`,
    `4 points`, `<4>`, `[[4]]`, `\\boxed{4}`, with or without Markdown, and JSON. The verdict has no score if the
    number is out of [0, max_score], has another maximum (`4/10`), or goes on (`4-5`, `4 or 5`).

    Not covered: a verdict that was cut off. `stated_score` sees to it.
    """
    value, _ = _FORM.find(verdict)
    if value is None or (value["maximum"] is not None and int(value["maximum"]) != max_score):
        return None
    points = float(value["value"])
    return points if points <= max_score else None


def verdict_text(justification: str, score: int) -> str:
    """What EFT teaches the judge to write: the justification first, the score last.

    The order matters: a score that is written first cannot profit from the reasoning.
    """
    return f"{justification.strip()}\nScore: {score}".lstrip()


def score_lines(max_score: int) -> tuple[str, ...]:
    """The ends of verdicts in the asked format, as stop strings: what comes after the score is not read."""
    return tuple(f"\nScore: {k}\n" for k in range(max_score + 1))


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

    def all_verdicts(self, cfg: JudgeConfig) -> tuple[str, ...]:
        """Those with the score alone. None where other points than whole ones are read."""
        if cfg.justification or not self.num_logprobs:
            return ()
        return tuple(verdict_text("", k) for k in range(cfg.max_score + 1))

    def judgements(
        self, material: Material, completions: Mapping[str, Sequence[Completion]], cfg: JudgeConfig
    ) -> list[Judgement]:
        return [
            Judgement(
                candidate_key=key,
                judgement_index=c.index,
                verdict=c.text.strip(),
                score=s.value,
                coverage=s.coverage,
                reason=c.reason,
            )
            for key in material
            for c, s in ((c, self.score(c, cfg.max_score)) for c in completions[key])
        ]

    def lesson(self, example: EFTExample, cfg: JudgeConfig) -> tuple[str, str]:
        prompt = rubrics.render(cfg.rubric, instruction=example.instruction, response=example.response)
        return prompt, verdict_text(example.justification if cfg.justification else "", example.score)

    def justification(self, verdict: str) -> str:
        return verdict[: _FORM.find(verdict)[1]].strip()


def stated_score(verdict: Completion, max_score: int) -> Score:
    """The score that the verdict states."""
    # A verdict that was cut off gets a mark at its end, because its `Score: 4` may be half of a `Score: 4.5`.
    text = verdict.text if verdict.finish_reason == "stop" else verdict.text + "\u2026"
    return Score(parse_score(text, max_score=max_score))


STATED = PointsReader(score=stated_score, max_digits=4)
"""`judge.mode=sampled`. Four digits are what `parse_score` reads."""
