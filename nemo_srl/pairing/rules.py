"""The pair rules: each is a pure function of one prompt's scored answers.

Of equal answers the first one counts. So a rule gives the same pair whenever it is asked.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from nemo_srl.config import PairsConfig
from nemo_srl.pairing.scored import Scored, best_complete
from nemo_srl.records import PreferencePair


def best_worst(scored: Sequence[Scored], cfg: PairsConfig) -> PreferencePair | str:
    """The best answer against the worst, by mean score (paper section 2.3). Ties make no pair."""
    if len(scored) < 2:
        return "unscored"
    if (best := best_complete(scored)) is None:
        return "truncated"
    return _pair(best, _worst(scored), cfg)


def length_control(scored: Sequence[Scored], cfg: PairsConfig) -> PreferencePair | str:
    """The shortest of the good answers against the longest of the bad ones (Wu et al. 2024, arXiv 2407.19594, 2.2).

    Let the scores go from S_min to S_max. Good answers have at least (1 - rho) S_max + rho S_min, and bad ones have at
    most (1 - rho) S_min + rho S_max. Lengths are numbers of tokens. S_max is that of the complete answers.
    """
    if len(scored) < 2:
        return "unscored"
    if (best := best_complete(scored)) is None:
        return "truncated"
    worst = _worst(scored)
    reach = cfg.rho * (best.score - worst.score)
    good = [s for s in scored if s.is_complete and s.score >= best.score - reach]
    bad = [s for s in scored if s.score <= worst.score + reach]
    chosen = min(good, key=lambda s: (s.candidate.num_tokens, s.candidate.sample_index))
    rejected = min(bad, key=lambda s: (-s.candidate.num_tokens, s.candidate.sample_index))
    return _pair(chosen, rejected, cfg)


def margin(scored: Sequence[Scored], cfg: PairsConfig) -> PreferencePair | str:
    """The best answer against the next one that is worse by more than `min_margin`: a pair that is hard to tell."""
    if len(scored) < 2:
        return "unscored"
    if (best := best_complete(scored)) is None:
        return "truncated"
    for other in sorted(scored, key=lambda s: (-s.score, s.candidate.sample_index)):
        if isinstance(pair := _pair(best, other, cfg), PreferencePair):
            return pair
    return _pair(best, _worst(scored), cfg)


def anchored(scored: Sequence[Scored], cfg: PairsConfig) -> PreferencePair | str:
    """The best answer of M_t against the worst one of M_t and of an earlier model (Wang et al. 2025, arXiv 2508.06026,
    anchored rejection). The margin does not shrink when M_t no longer gives bad answers."""
    own = [s for s in scored if not s.is_anchor]
    if not own or len(scored) < 2:
        return "unscored"
    if (best := best_complete(own)) is None:
        return "truncated"
    return _pair(best, _worst(scored), cfg)


def all_pairs(scored: Sequence[Scored], cfg: PairsConfig) -> Sequence[PreferencePair] | str:
    """All pairs of answers with different scores, those with the largest margins first, `num_pairs` at most."""
    if len(scored) < 2:
        return "unscored"
    if best_complete(scored) is None:
        return "truncated"
    found = [_pair(a, b, cfg) for a, b in itertools.permutations(scored, 2) if a.is_complete]
    pairs = [p for p in found if isinstance(p, PreferencePair)]
    pairs.sort(key=lambda p: p.rejected_score - p.chosen_score)
    return pairs[: cfg.num_pairs or None] or ("identical" if "identical" in found else "tied")


def _worst(scored: Sequence[Scored]) -> Scored:
    return min(scored, key=lambda s: (s.score, s.is_anchor, s.candidate.sample_index))


def _pair(chosen: Scored, rejected: Scored, cfg: PairsConfig) -> PreferencePair | str:
    if chosen.score - rejected.score <= cfg.min_margin:
        return "tied"
    if chosen.candidate.response == rejected.candidate.response:
        return "identical"
    return chosen.pair_with(rejected)
