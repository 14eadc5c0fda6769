"""Reward (`judge.mode=reward`): a reward model behind a server gives a number for an instruction and an answer.

The server is `judge.engine`, with `api=classify` (`nemo_srl/engines/openai/`). A reward r can be any number. Its
logistic function 1 / (1 + exp(-r)) times `judge.max_score` is the score. The order of the rewards stays, and the scores
have the scale of all others. Scores of one reward model can be compared between policies, but not with other judges'.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from nemo_srl.config import JudgeConfig
from nemo_srl.config.check import check
from nemo_srl.judging.points import STATED, Material
from nemo_srl.judging.scores import Score
from nemo_srl.records import Completion, EFTExample, Judgement


class RewardReader:
    """A `VerdictReader` of rewards."""

    num_logprobs = 0
    absolute = ""

    def check(self, cfg: JudgeConfig) -> None:
        STATED.check(cfg)
        api = getattr(cfg.engine, "api", None)
        reason = "judge.mode='reward' needs a server with a reward model. +judge_mode=reward sets this"
        check(api == "classify", "judge.engine.api", api, reason)
        reason = "a reward model gives the same number each time. Set it to 1"
        check(cfg.num_judgements == 1, "judge.num_judgements", cfg.num_judgements, reason)
        check(cfg.temperature == 0, "judge.temperature", cfg.temperature, "a reward is not sampled. Set it to 0")

    def questions(self, material: Material, cfg: JudgeConfig) -> Mapping[str, tuple[str, str]]:
        return material

    def stop(self, cfg: JudgeConfig) -> tuple[str, ...]:
        return ()

    def judgements(
        self, material: Material, completions: Mapping[str, Sequence[Completion]], cfg: JudgeConfig
    ) -> list[Judgement]:
        found = _READ.judgements(material, completions, cfg)
        return [replace(j, verdict=f"reward {j.verdict}" if j.verdict else "") for j in found]

    def lesson(self, example: EFTExample, cfg: JudgeConfig) -> tuple[str, str]:
        return STATED.lesson(example, cfg)

    def justification(self, verdict: str) -> str:
        return STATED.justification(verdict)


REWARD = RewardReader()


def _score(completion: Completion, max_score: int) -> Score:
    """The score of a reward. Empty without a number."""
    try:
        reward = float(completion.text)
    except ValueError:
        return Score(None)
    return Score(max_score * (1 + math.tanh(reward / 2)) / 2 if math.isfinite(reward) else None)


_READ = replace(STATED, score=_score)
"""A reward is read as points are."""
