"""Makes preference pairs from the scored answers to one prompt, or says why there is none.

    scored.py        what a rule gets
    rules.py         the rules of this package
    consistency.py   how far two judges agree, which is the confidence in the pairs

A rule is a pure function of one prompt's scored answers. `pairs.rule` names it: one of `RULES`, or `module:function` of
your own. To add a rule, write a function in `rules.py` and add it to `RULES`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace

from nemo_srl import registry
from nemo_srl.config import PairsConfig
from nemo_srl.pairing.consistency import consistency
from nemo_srl.pairing.rules import all_pairs, anchored, best_worst, length_control, margin
from nemo_srl.pairing.scored import PairRule, Scored, best_complete
from nemo_srl.records import Candidate, PreferencePair

__all__ = ["LABELS", "RULES", "PairRule", "Scored", "best_complete", "build_pairs", "consistency", "rule"]

LABELS: Mapping[str, str] = {
    "tied": "tied",
    "identical": "equal texts",
    "unscored": "no scores",
    "truncated": "all cut off",
    "unanswered": "no answers",
}
"""The reasons why a prompt gives no pair, and their names in a report. A rule may return further reasons."""

RULES: Mapping[str, PairRule] = {
    f.__name__: f for f in (best_worst, length_control, margin, anchored, all_pairs)
}  # fmt: skip


def rule(cfg: PairsConfig) -> PairRule:
    """The rule that `pairs.rule` names. Raises `ConfigError`."""
    return registry.named(RULES, cfg.rule, key="pairs.rule")


def build_pairs(
    candidates: Iterable[Candidate],
    scores: Mapping[str, float],
    cfg: PairsConfig,
    *,
    anchor: Iterable[Candidate] = (),
    anchor_scores: Mapping[str, float] = {},
) -> tuple[list[PreferencePair], Counter[str]]:
    """All pairs, and the number of prompts without a pair by reason. `scores` are mean scores by candidate key.

    `anchor` are answers of an earlier model to the same prompts, and `anchor_scores` the same judge's scores of them. A
    prompt with fewer than two answers of M_t gives no pair, whatever the rule: the reason is `unanswered`.
    """
    make = rule(cfg)
    earlier: dict[str, list[Scored]] = defaultdict(list)
    for c in anchor:
        if c.is_answered and c.key in anchor_scores:
            earlier[c.prompt_id].append(Scored(c, anchor_scores[c.key], is_anchor=True))
    by_prompt: dict[str, list[Candidate]] = defaultdict(list)
    for c in candidates:
        by_prompt[c.prompt_id].append(c)
    pairs: list[PreferencePair] = []
    dropped: Counter[str] = Counter()
    for prompt_id, group in by_prompt.items():
        if len(answers := [c for c in group if c.is_answered]) < min(2, len(group)):
            dropped["unanswered"] += 1
            continue
        own = [Scored(c, scores[c.key]) for c in answers if c.key in scores]
        found = make([*own, *earlier[prompt_id]], cfg)
        if isinstance(found, str):
            dropped[found] += 1
        elif isinstance(found, PreferencePair):
            pairs.append(found)
        else:
            pairs += [replace(p, pair_index=i) for i, p in enumerate(found)]
    return pairs, dropped
