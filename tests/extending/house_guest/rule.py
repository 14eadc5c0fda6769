"""A pair rule: the best answer against the one that comes next, so that the pair is a hard one."""

from __future__ import annotations

from collections.abc import Sequence

from nemo_srl.config import PairsConfig
from nemo_srl.pairing import Scored
from nemo_srl.records import PreferencePair


def best_next(scored: Sequence[Scored], cfg: PairsConfig) -> PreferencePair | str:
    by_score = sorted(scored, key=lambda s: (-s.score, s.candidate.sample_index))
    best = next((s for s in by_score if s.candidate.finish_reason == "stop"), None)
    if best is None:
        return "truncated"
    for other in by_score:
        if best.score - other.score > cfg.min_margin and other.candidate.response != best.candidate.response:
            return best.pair_with(other)
    return "nothing_worse"  # a reason of our own: the stage counts it as num_nothing_worse
