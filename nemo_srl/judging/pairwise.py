"""Pairwise judging (`judge.mode=pairwise`): the judge compares every two answers to a prompt, in both orders.

Judges prefer the answer that they read first. Two orders even this out: an answer that wins only when it stands first
wins half of its comparisons. The score of an answer is its share of wins times `judge.max_score`. It is the mean over
`Judgement`s of 0, half of `max_score`, or `max_score`, so pairs are made of it as of any other score. N answers take
N (N - 1) prompts, with `judge.num_judgements` verdicts each.

Not covered: scores that can be compared between models. Shares of wins against a model's own answers cannot, so
evaluations ask for points (`absolute`). The EFT seed does not teach the format of comparisons either, so a small M1
needs another judge for it (`judge.engine`).
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from nemo_srl.config import JudgeConfig
from nemo_srl.config.check import check
from nemo_srl.judging import rubrics
from nemo_srl.judging.form import AskedForm
from nemo_srl.judging.points import STATED, Material
from nemo_srl.records import Completion, EFTExample, Judgement

_FORM = AskedForm("winner", begins=r"(?ai:A|B|tie)\b", value=r"(?P<value>A|B|(?ai:tie)) [*_\])>}]{0,4}")
WINNER_LINES = ("\nWinner: A\n", "\nWinner: B\n", "\nWinner: tie\n")
"""The ends of verdicts in the asked format, as stop strings."""
_FIRST_SHARE: Mapping[str, float] = {"a": 1.0, "b": 0.0, "tie": 0.5}


class PairwiseReader:
    """A `VerdictReader` of comparisons between answers to the same prompt."""

    num_logprobs = 0
    absolute = "sampled"

    def check(self, cfg: JudgeConfig) -> None:
        check_rubric(cfg)
        STATED.check(cfg)

    def questions(self, material: Material, cfg: JudgeConfig) -> dict[str, str]:
        return {
            _request_key(a, b): comparison(cfg, instruction=material[a][0], a=material[a][1], b=material[b][1])
            for a, b in pairings(material)
        }

    def stop(self, cfg: JudgeConfig) -> tuple[str, ...]:
        return WINNER_LINES

    def judgements(
        self, material: Material, completions: Mapping[str, Sequence[Completion]], cfg: JudgeConfig
    ) -> list[Judgement]:
        """Two judgements from every verdict, one for each of the two answers."""
        found: list[Judgement] = []
        count: dict[str, int] = defaultdict(int)
        for a, b in pairings(material):
            for completion in completions[_request_key(a, b)]:
                share, reason = first_share(completion), completion.reason
                verdict = "" if reason else f"[A is {a}, B is {b}] {completion.text.strip()}"
                for key, mine in ((a, share), (b, None if share is None else 1 - share)):
                    found.append(
                        Judgement(
                            candidate_key=key, judgement_index=count[key], verdict=verdict,
                            score=None if mine is None else mine * cfg.max_score, reason=reason,
                        )
                    )  # fmt: skip
                    count[key] += 1
        return found

    def lesson(self, example: EFTExample, cfg: JudgeConfig) -> tuple[str, str]:
        return STATED.lesson(example, cfg)

    def justification(self, verdict: str) -> str:
        return STATED.justification(verdict)


PAIRWISE = PairwiseReader()


def pairings(material: Material) -> Iterator[tuple[str, str]]:
    """The keys of every two answers to one prompt, in both orders; those of a prompt follow one another.

    Answers to one prompt have the same key up to the last slash (`Candidate.key`).
    """
    by_prompt: dict[str, list[str]] = defaultdict(list)
    for key in material:
        by_prompt[key.rsplit("/", 1)[0]].append(key)
    for keys in by_prompt.values():
        yield from itertools.permutations(keys, 2)


def comparison(cfg: JudgeConfig, *, instruction: str, a: str, b: str) -> str:
    """The judge's prompt to compare two responses; `a` stands first."""
    return rubrics.render(cfg.pairwise_rubric, instruction=instruction, response_a=a, response_b=b)


def first_share(verdict: Completion) -> float | None:
    """1, 0 or 0.5 for the answer that stood first, as the verdict says A, B or tie.

    None when the verdict names no winner in the asked format, or was cut off.
    """
    winner, _ = _FORM.find(verdict.text)
    if winner is None or verdict.finish_reason != "stop":
        return None
    return _FIRST_SHARE[winner["value"].lower()]


def check_rubric(cfg: JudgeConfig) -> None:
    """Raises `ConfigError` unless the judge can be asked to compare two answers."""
    key, rubric = "judge.pairwise_rubric", cfg.pairwise_rubric
    check(rubric != "", key, rubric, "a comparison needs a rubric; +judge_mode=pairwise sets one")
    rubrics.check_holds_once(rubric, "{instruction}", "{response_a}", "{response_b}", "Winner:", key=key)


def _request_key(a: str, b: str) -> str:
    return f"{a}-vs-{b.rsplit('/', 1)[-1]}"
