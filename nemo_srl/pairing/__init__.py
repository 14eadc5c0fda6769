"""Makes a preference pair from the scored answers to one prompt, or says why there is none.

A rule is a pure function of one prompt's scored answers. `pairs.rule` names it: one of `RULES`, or `module:function` of
your own. To add a rule, write a module here and add its function to `RULES`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from nemo_srl import registry
from nemo_srl.config import PairsConfig
from nemo_srl.records import Candidate, PreferencePair

LABELS: Mapping[str, str] = {
    "tied": "tied",
    "identical": "equal texts",
    "unscored": "no scores",
    "truncated": "all cut off",
    "unanswered": "no answers",
}
"""The reasons why a prompt gives no pair, and their names in a report. A rule may return further reasons."""


@dataclass(frozen=True)
class Scored:
    """A candidate with the mean of its valid scores."""

    candidate: Candidate
    score: float

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


PairRule = Callable[[Sequence[Scored], PairsConfig], PreferencePair | str]
"""Given the scored answers to one prompt, in the order of their samples: a pair, or the reason why there is none."""


def best_complete(scored: Sequence[Scored]) -> Scored | None:
    """The best of the answers that the model ended itself, by mean score. The first of equals; None without any."""
    complete = [s for s in scored if s.candidate.finish_reason == "stop" and s.candidate.response]
    return min(complete, key=lambda s: (-s.score, s.candidate.sample_index), default=None)


def best_worst(scored: Sequence[Scored], cfg: PairsConfig) -> PreferencePair | str:
    """The best answer against the worst, by mean score (paper section 2.3).

    Ties make no pair. An answer that was cut off at `max_tokens` is never chosen, because it would teach the policy to
    stop in the middle of a sentence.
    """
    if len(scored) < 2:
        return "unscored"
    if (best := best_complete(scored)) is None:
        return "truncated"
    worst = min(scored, key=lambda s: (s.score, s.candidate.sample_index))
    if best.score - worst.score <= cfg.min_margin:
        return "tied"
    if best.candidate.response == worst.candidate.response:
        return "identical"
    return best.pair_with(worst)


RULES: Mapping[str, PairRule] = {"best_worst": best_worst}


def rule(cfg: PairsConfig) -> PairRule:
    """The rule that `pairs.rule` names. Raises `ConfigError`."""
    return registry.named(RULES, cfg.rule, key="pairs.rule")


def build_pairs(
    candidates: Iterable[Candidate], scores: Mapping[str, float], cfg: PairsConfig
) -> tuple[list[PreferencePair], Counter[str]]:
    """All pairs, and the number of prompts without a pair by reason. `scores` are mean scores by candidate key.

    A prompt with fewer than two answers gives no pair, whatever the rule: the reason is `unanswered`.
    """
    make_pair = rule(cfg)
    by_prompt: dict[str, list[Candidate]] = defaultdict(list)
    for c in candidates:
        by_prompt[c.prompt_id].append(c)
    pairs: list[PreferencePair] = []
    dropped: Counter[str] = Counter()
    for group in by_prompt.values():
        if len(answers := [c for c in group if c.is_answered]) < min(2, len(group)):
            dropped["unanswered"] += 1
            continue
        pair = make_pair([Scored(c, scores[c.key]) for c in answers if c.key in scores], cfg)
        if isinstance(pair, PreferencePair):
            pairs.append(pair)
        else:
            dropped[pair] += 1
    return pairs, dropped
