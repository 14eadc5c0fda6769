"""Warnings of reward hacking, from figures that every run has: the `anchor` stage's, iteration by iteration.

The policy learns what its judge likes, and there is no oracle to say whether that is still what people like. What
can be seen is another judge, the anchor, that agrees less with the pairs, sees less of their margin, or gives the
answers lower scores; and a judge that stops telling answers apart. The limits are set by runs whose true scores
are known (`benchmarks/results/proof-2026-11-24/`), and tested on no others. In these, an anchor of its own
(`anchor.model`) spoke in the first iteration of the three runs that later fell, and in none of the three healthy ones;
M1 as the anchor noticed noise at once, and was silent in the runs that fell: what fooled the judge fooled M1, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nemo_srl.records import Metric

MIN_AGREEMENT = 0.75
"""Share of new pairs in which the anchor must prefer the chosen response, too."""
MIN_MARGIN_SHARE = 0.5
"""Of the margin that the judge gives to its pairs, what the anchor must see."""
MAX_INFLATION = 0.25
"""Points by which M_t may score the same answers higher than the anchor; the interval's lower end counts."""
MIN_ENTROPY = 0.5
"""Of the scores; 0 says that all are the same."""


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """`name` is one of agreement, margin, inflation, entropy; `text` says what was seen and what to do."""

    iteration: int
    name: str
    text: str


def alarms(history: Mapping[int, Sequence[Metric]]) -> list[Alarm]:
    """What looks wrong in `history`: the `anchor` stage's metrics by iteration."""
    return [
        Alarm(iteration=iteration, name=name, text=f"iteration {iteration}: {text}")
        for iteration, metrics in sorted(history.items())
        for name, text in _of_iteration({m.name: m for m in metrics}).items()
    ]


def _of_iteration(seen: Mapping[str, Metric]) -> dict[str, str]:
    """Alarms by name."""
    found: dict[str, str] = {}
    agreement = _value(seen, "anchor_agreement")
    if agreement is not None and agreement < MIN_AGREEMENT:
        found["agreement"] = (
            f"the anchor prefers the chosen response in {agreement:.0%} of the new pairs (below {MIN_AGREEMENT:.0%}): "
            "they are noise, or the judge has drifted. Read some; raise judge.num_judgements, or take a better judge."
        )
    own, anchor = _value(seen, "own_margin"), _value(seen, "anchor_margin")
    if own is not None and anchor is not None and anchor < MIN_MARGIN_SHARE * own:
        found["margin"] = (
            f"the judge sees a margin of {own:.2f} points in its pairs, and the anchor {anchor:.2f} (below "
            f"{MIN_MARGIN_SHARE:.0%} of it): most of what DPO learns here is the judge's own taste. More or better EFT "
            "data, or judge.engine for another judge."
        )
    inflation = seen.get("self_minus_anchor")
    if inflation is not None and inflation.value is not None and (inflation.low or 0) > MAX_INFLATION:
        found["inflation"] = (
            f"the judge scores its own model's answers {inflation.value:.2f} points higher than the anchor does: its "
            "scores rise without the answers. Stop here, or refresh the judge (data.rankings_path)."
        )
    entropy = _value(seen, "score_entropy")
    if entropy is not None and entropy < MIN_ENTROPY:
        found["entropy"] = (
            f"the scores' entropy is {entropy:.2f} (below {MIN_ENTROPY}): the judge gives nearly always the same "
            "score. Pairs rest on what little is left; harder prompts, or judge.mode=expected, tell answers apart."
        )
    return found


def _value(seen: Mapping[str, Metric], name: str) -> float | None:
    return seen[name].value if name in seen else None
