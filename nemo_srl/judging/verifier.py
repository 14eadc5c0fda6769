"""Verification (`judge.mode=verifier`): code checks whether an answer does what its prompt asks. No model is asked.

`judge.verifier` names the check. The score of an answer is the share of what was asked that it does, times
`judge.max_score`. So pairs are made of it as of any other score.

Not covered: scores of answers to prompts that the check does not know, such as the held-out ones. So evaluations ask
M_t for points (`absolute`), as the EFT seed teaches it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from nemo_srl import registry
from nemo_srl.config import JudgeConfig
from nemo_srl.config.check import check
from nemo_srl.data import verifiable
from nemo_srl.errors import DataError
from nemo_srl.judging.points import STATED, Material
from nemo_srl.records import Completion, EFTExample, Judgement, VerifiablePrompt

Check = Callable[[str, str], float | None]
"""Given the prompt's text and the answer: the share of what was asked that the answer does, from 0 to 1. None if the
check cannot tell."""
IFEVAL = "ifeval"


@dataclass(frozen=True)
class VerifierReader:
    """A `VerdictReader` whose verdicts are results of code."""

    prompts: Sequence[VerifiablePrompt] = ()
    """For `judge.verifier=ifeval`: the prompts of `judge.verifier_path`."""
    num_logprobs = 0
    absolute = "sampled"
    asks_models = False

    def check(self, cfg: JudgeConfig) -> None:
        STATED.check(cfg)
        reason = "judge.mode='verifier' needs a check: ifeval, or your own function, my.module:function"
        check(cfg.verifier != "", "judge.verifier", cfg.verifier, reason)
        has_path = bool(cfg.verifier_path)
        if _named(cfg) is None:
            check(has_path, "judge.verifier_path", "", "judge.verifier='ifeval' needs a file of IFEval's prompts")
        else:
            reason = "only judge.verifier='ifeval' reads it. Leave it empty"
            check(not has_path, "judge.verifier_path", cfg.verifier_path, reason)

    def questions(self, material: Material, cfg: JudgeConfig) -> dict[str, str]:
        return {}

    def stop(self, cfg: JudgeConfig) -> tuple[str, ...]:
        return ()

    def judgements(
        self, material: Material, completions: Mapping[str, Sequence[Completion]], cfg: JudgeConfig
    ) -> list[Judgement]:
        """One judgement of each answer. Raises `DataError` for a share that is not in [0, 1]."""
        found: list[Judgement] = []
        share_of = _named(cfg) or share_followed(self.prompts, verifiable.Verifier())
        for key, (instruction, response) in material.items():
            share = share_of(instruction, response)
            if share is not None and not 0 <= share <= 1:
                raise DataError(
                    f"judge.verifier={cfg.verifier!r}: it returned {share} for the answer {key!r}. It must return a "
                    "share, from 0 to 1, or None."
                )
            text = "not checked" if share is None else f"does {share:.0%} of what was asked"
            score = None if share is None else float(share) * cfg.max_score
            found.append(Judgement(candidate_key=key, judgement_index=0, verdict=text, score=score))
        return found

    def lesson(self, example: EFTExample, cfg: JudgeConfig) -> tuple[str, str]:
        return STATED.lesson(example, cfg)

    def justification(self, verdict: str) -> str:
        return STATED.justification(verdict)


VERIFIER = VerifierReader()


def read_checked(path: Path) -> list[VerifiablePrompt]:
    """The prompts of `judge.verifier_path`. Raises `DataError` for one that cannot be checked."""
    try:
        return verifiable.read_prompts(path, verifiable.Verifier())
    except DataError as e:
        raise DataError(f"judge.verifier_path={e}") from e


def share_followed(prompts: Sequence[VerifiablePrompt], verifier: verifiable.Verifier) -> Check:
    """The share of a prompt's instructions that are followed strictly. None for a prompt that is not among these."""
    by_text = {p.text: p for p in prompts}

    def share(instruction: str, response: str) -> float | None:
        prompt = by_text.get(instruction)
        return None if prompt is None else fmean(verifier.followed(prompt, response).strict)

    return share


def _named(cfg: JudgeConfig) -> Check | None:
    """The user's function; None for `ifeval`. Raises `ConfigError`."""
    found = registry.named({IFEVAL: None}, cfg.verifier, key="judge.verifier")
    reason = f"this is a {type(found).__name__}. Name a function of the prompt's text and the answer"
    check(found is None or callable(found), "judge.verifier", cfg.verifier, reason)
    return found
