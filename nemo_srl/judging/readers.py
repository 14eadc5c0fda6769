"""Verdict readers: each knows one way to ask the judge and to read what it says.

A reader is one object in a file of its own. `READERS` gives it a name, or `judge.mode` holds its dotted path. It has
no state: everything comes as an argument, so one object serves all judges.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from nemo_srl.config import JudgeConfig
from nemo_srl.errors import ConfigError
from nemo_srl.judging.expected import EXPECTED
from nemo_srl.judging.pairwise import PAIRWISE
from nemo_srl.judging.points import STATED, Material
from nemo_srl.judging.reward import REWARD
from nemo_srl.judging.verifier import VERIFIER
from nemo_srl.records import Completion, EFTExample, Judgement
from nemo_srl.registry import named


@runtime_checkable
class VerdictReader(Protocol):
    """One way to ask the judge and to read its verdicts."""

    @property
    def num_logprobs(self) -> int:
        """How many alternatives the engine reports at each number (`Completion.number_logprobs`); 0 asks for none."""

    @property
    def absolute(self) -> str:
        """Name of the reader for scores that can be compared between models. Empty: this reader's scores can be."""

    def check(self, cfg: JudgeConfig) -> None:
        """Raises `ConfigError` for settings that this reader cannot work with."""

    def questions(self, material: Material, cfg: JudgeConfig) -> Mapping[str, str | tuple[str, str]]:
        """The judge's prompts before the chat template, by a key of the request. Their order is that of the calls.

        A pair of texts is no prompt but an instruction and an answer, for a server that rates such conversations.

        The order of `material` keeps the answers to one prompt together; engines compute their common beginning once.
        Journals hold the keys, so a reader that changes them asks everything again.
        """

    def stop(self, cfg: JudgeConfig) -> tuple[str, ...]:
        """The strings that end a verdict (`GenerationRequest.stop`); they only save tokens."""

    def judgements(
        self, material: Material, completions: Mapping[str, Sequence[Completion]], cfg: JudgeConfig
    ) -> list[Judgement]:
        """What the verdicts say of each answer. `completions` are by the keys of `questions`.

        A `Judgement.candidate_key` is a key of `material`. A verdict that cannot be read is `score=None`. So is a
        completion without an answer (`Completion.is_answered`), whose `reason` the judgement takes over.
        """

    def lesson(self, example: EFTExample, cfg: JudgeConfig) -> tuple[str, str]:
        """What EFT teaches the judge: the prompt before the chat template, and the verdict on it."""

    def justification(self, verdict: str) -> str:
        """What the judge wrote before it gave the score: the `EFTExample.justification` of such a verdict."""


READERS: Mapping[str, VerdictReader] = {
    "sampled": STATED, "expected": EXPECTED, "pairwise": PAIRWISE, "verifier": VERIFIER, "reward": REWARD,
}  # fmt: skip


def asks_models(found: VerdictReader) -> bool:
    """Whether the reader asks a model at all. A reader of results of code says `asks_models = False`."""
    return bool(getattr(found, "asks_models", True))


def all_verdicts(found: VerdictReader, cfg: JudgeConfig) -> tuple[str, ...]:
    """All verdicts that the judge is asked to choose from, for `judge.begin_verdict`. Empty if it may write others.

    A reader that knows them has a method `all_verdicts(cfg)`.
    """
    of_reader = getattr(found, "all_verdicts", None)
    return tuple(of_reader(cfg)) if of_reader else ()


def reader(cfg: JudgeConfig) -> VerdictReader:
    """The reader that `judge.mode` names. Raises `ConfigError` for a name that nothing has."""
    found = named(READERS, cfg.mode, key="judge.mode")
    # A class has the methods, too, but they cannot be called without an object.
    if isinstance(found, type) or not isinstance(found, VerdictReader):
        raise ConfigError(
            f"judge.mode={cfg.mode!r}: {found!r} is not a verdict reader. Name an object that has all that "
            "nemo_srl.judging.VerdictReader has."
        )
    return found
