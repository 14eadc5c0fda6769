"""Warnings of reward hacking, from the metrics of the `anchor` stage of each iteration.

The policy learns what its judge likes. Nobody knows whether people like it, too. But a second judge, the anchor, can
be asked. There is an alarm when the anchor agrees less with the pairs, when it sees a smaller margin in them, or when
it gives the answers lower scores. There is also one when the judge no longer tells answers apart.

Both judges are asked by the same reader (`judge.mode`), so their scores have one scale. What has no meaning for a
reader is not measured, and raises no alarm: shares of wins cannot rise as a whole, and the entropy is that of stated
points.

The limits come from runs whose true scores are known (`benchmarks/results/proof-2026-11-24/`). They are tested on
no other runs. In those runs, a separate model as the anchor (`anchor.model`) raised an alarm in the first iteration
of all three runs whose true scores later fell, and in none of the three healthy runs. M1 as the anchor noticed random
pairs at once. It raised no alarm in the three runs that fell, because what fooled the judge also fooled M1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nemo_srl.records import Metric

MIN_AGREEMENT = 0.75
"""The anchor must prefer the chosen response in at least this share of the new pairs."""
MIN_MARGIN_SHARE = 0.5
"""The anchor must see at least this share of the margin that the judge gives to its pairs."""
MAX_INFLATION = 0.25
"""M_t may score the same answers higher than the anchor by this many points. The lower end of the interval counts."""
MIN_ENTROPY = 0.5
"""The least entropy of stated points, from 0 (all the same) to 1."""
MAX_TIES = 0.5
"""At most this share of the pairs of answers may have the same share of wins. It does not come from the runs above. A
judge that only goes by the order in which it reads two answers ties all of them."""


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """`name` is agreement, margin, inflation, entropy or ties. `text` says what was measured and what to do."""

    iteration: int
    name: str
    text: str


def alarms(history: Mapping[int, Sequence[Metric]]) -> list[Alarm]:
    """The alarms in `history`, which has the metrics of the `anchor` stage by iteration."""
    return [
        Alarm(iteration=iteration, name=name, text=f"iteration {iteration}: {text}")
        for iteration, metrics in sorted(history.items())
        for name, text in _of_iteration({m.name: m for m in metrics if m.value is not None}).items()
    ]


def _of_iteration(seen: Mapping[str, Metric]) -> dict[str, str]:
    """The texts of the alarms by name. What was not measured raises none."""
    values = {name: m.value or 0.0 for name, m in seen.items()}
    found: dict[str, str] = {}
    if (agreement := values.get("anchor_agreement", 1.0)) < MIN_AGREEMENT:
        found["agreement"] = (
            f"the anchor prefers the chosen response in {agreement:.0%} of the new pairs (below {MIN_AGREEMENT:.0%}): "
            "the pairs are noise, or the judge has drifted. Read some of them. Raise judge.num_judgements, or use a "
            "better judge."
        )
    own, anchor = values.get("own_margin", -math.inf), values.get("anchor_margin", math.inf)
    if anchor < MIN_MARGIN_SHARE * own:
        found["margin"] = (
            f"the judge sees a margin of {own:.2f} points in its pairs, and the anchor {anchor:.2f} (below "
            f"{MIN_MARGIN_SHARE:.0%} of it): most of what DPO learns here is the judge's own taste. Use more or better "
            "EFT data, or another judge (judge.engine)."
        )
    inflation = seen.get("self_minus_anchor")
    if inflation and (inflation.low or 0) > MAX_INFLATION:
        found["inflation"] = (
            f"the judge scores its own model's answers {inflation.value:.2f} points higher than the anchor does: its "
            "scores rise, and the answers do not get better. Stop here, or refresh the judge (data.rankings_path)."
        )
    if (entropy := values.get("score_entropy", 1.0)) < MIN_ENTROPY:
        found["entropy"] = (
            f"the entropy of the scores is {entropy:.2f} (below {MIN_ENTROPY}): the judge nearly always gives the same "
            "score, so few answers decide the pairs. Use harder prompts, or judge.mode=expected."
        )
    if (ties := values.get("tie_rate", 0.0)) > MAX_TIES:
        found["ties"] = (
            f"the judge ties {ties:.0%} of the pairs of answers (above {MAX_TIES:.0%}): it goes by the order in which "
            "it reads them, or sees no difference. Use another judge (judge.engine), or judge.mode=sampled."
        )
    return found
