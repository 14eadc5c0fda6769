"""A verdict reader: the judge gives a letter, such as `Grade: B`, and gives no number."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from nemo_srl.config import JudgeConfig
from nemo_srl.config.check import check
from nemo_srl.judging import Material, rubrics
from nemo_srl.records import Completion, EFTExample, Judgement

LETTERS = "FEDCBA"
_GRADE = re.compile(r"^Grade: ([A-F])[ \t]*$", re.MULTILINE)


class LetterReader:
    num_logprobs = 0
    absolute = ""  # letters can be compared between models

    def check(self, cfg: JudgeConfig) -> None:
        rubrics.check_holds_once(cfg.rubric, "{instruction}", "{response}", "Grade:", key="judge.rubric")
        reason = f"judge.mode={cfg.mode!r} has {len(LETTERS)} letters, for 0 to {len(LETTERS) - 1} points"
        check(cfg.max_score == len(LETTERS) - 1, "judge.max_score", cfg.max_score, reason)

    def questions(self, material: Material, cfg: JudgeConfig) -> dict[str, str]:
        return {key: rubrics.render(cfg.rubric, instruction=x, response=y) for key, (x, y) in material.items()}

    def stop(self, cfg: JudgeConfig) -> tuple[str, ...]:
        return tuple(f"Grade: {letter}\n" for letter in LETTERS)

    def judgements(
        self, material: Material, completions: Mapping[str, Sequence[Completion]], cfg: JudgeConfig
    ) -> list[Judgement]:
        return [
            Judgement(
                candidate_key=key, judgement_index=c.index, verdict=c.text.strip(), score=points(c), reason=c.reason
            )
            for key in material
            for c in completions[key]
        ]

    def lesson(self, example: EFTExample, cfg: JudgeConfig) -> tuple[str, str]:
        prompt = rubrics.render(cfg.rubric, instruction=example.instruction, response=example.response)
        return prompt, f"{example.justification}\nGrade: {LETTERS[example.score]}"

    def justification(self, verdict: str) -> str:
        return _GRADE.split(verdict)[0].strip()


def points(verdict: Completion) -> float | None:
    """The last letter as points, F to A are 0 to 5. None for a verdict without a letter, or one that was cut off."""
    letters = _GRADE.findall(verdict.text)
    return float(LETTERS.index(letters[-1])) if letters and verdict.finish_reason == "stop" else None


READER = LetterReader()
