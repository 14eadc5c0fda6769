"""What a pair rule gets: one prompt's answers with their scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nemo_srl.config import PairsConfig
from nemo_srl.records import Candidate, PreferencePair


@dataclass(frozen=True)
class Scored:
    """A candidate with the mean of its valid scores."""

    candidate: Candidate
    score: float
    is_anchor: bool = False
    """Whether an earlier model wrote it (`pairs.anchor`), and not M_t."""

    @property
    def is_complete(self) -> bool:
        """Whether the model ended it itself. A text that was cut off is never chosen, because it would teach the policy
        to stop in the middle of a sentence."""
        return self.candidate.finish_reason == "stop" and bool(self.candidate.response)

    def pair_with(self, rejected: Scored) -> PreferencePair:
        """The pair in which this answer is the chosen one."""
        return PreferencePair(
            prompt_id=self.candidate.prompt_id,
            prompt=self.candidate.prompt,
            chosen=self.candidate.response,
            rejected=rejected.candidate.response,
            chosen_score=self.score,
            rejected_score=rejected.score,
            chosen_finish_reason=self.candidate.finish_reason,
            rejected_finish_reason=rejected.candidate.finish_reason,
        )


PairRule = Callable[[Sequence[Scored], PairsConfig], PreferencePair | Sequence[PreferencePair] | str]
"""Given the scored answers to one prompt, M_t's first and each model's in the order of their samples: a pair, several
pairs with the best one first, or the reason why there is none."""


def best_complete(scored: Sequence[Scored]) -> Scored | None:
    """The best of the answers that the model ended itself, by mean score. The first of equals; None without any."""
    complete = [s for s in scored if s.is_complete]
    return min(complete, key=lambda s: (-s.score, s.candidate.sample_index), default=None)
