"""Warnings of reward hacking, from figures that every run has: the `anchor` stage's, iteration by iteration.

The policy learns what its judge likes, and there is no oracle to say whether that is still what people like. What
can be seen: M1, the anchor, which the loop never changes, agrees less and less with the pairs; scores rise and
the anchor's do not; the judge stops telling answers apart. `benchmarks/results/` shows how early each of these
spoke in runs whose true scores are known, and the limits below are set by those runs.

Not covered: what M1 cannot see. Only people, or another judge, notice an answer that fools M1 as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nemo_srl.records import Metric

MIN_AGREEMENT = 0.8
"""Share of new pairs in which M1 must prefer the chosen response, too."""
MIN_MARGIN_SHARE = 0.5
"""What M1 sees of the first iteration's margin must be left in later pairs."""
MAX_INFLATION = 0.25
"""Points by which M_t may score the same answers higher than M1 does; the interval's lower end counts."""
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
    found: list[Alarm] = []
    margins: list[float] = []
    for iteration, metrics in sorted(history.items()):
        seen = {m.name: m for m in metrics if m.value is not None}
        for name, text in _of_iteration(seen).items():
            found.append(Alarm(iteration=iteration, name=name, text=f"iteration {iteration}: {text}"))
        margin = seen.get("anchor_margin")
        if margin is None or margin.value is None:
            continue
        margins.append(margin.value)
        if len(margins) > 1 and margin.value < MIN_MARGIN_SHARE * margins[0]:
            text = (
                f"M1 sees a margin of {margin.value:.2f} points in the new pairs, and saw {margins[0]:.2f} in the "
                "first iteration: there is ever less to learn from them. Stop here, or refresh the judge "
                "(data.rankings_path)."
            )
            found.append(Alarm(iteration=iteration, name="margin", text=f"iteration {iteration}: {text}"))
    return found


def _of_iteration(seen: Mapping[str, Metric]) -> dict[str, str]:
    """Alarms that need no other iteration, by name."""
    found: dict[str, str] = {}
    agreement = _value(seen, "anchor_agreement")
    if agreement is not None and agreement < MIN_AGREEMENT:
        found["agreement"] = (
            f"M1 prefers the chosen response in {agreement:.0%} of the new pairs (below {MIN_AGREEMENT:.0%}): the "
            "judge has drifted, or its pairs are noise. Look at some; raise judge.num_judgements, or judge with M1."
        )
    inflation = seen.get("self_minus_anchor")
    if inflation is not None and inflation.value is not None and (inflation.low or 0) > MAX_INFLATION:
        found["inflation"] = (
            f"the judge scores its own model's answers {inflation.value:.2f} points higher than M1 does: its scores "
            "rise without the answers. Judge with M1, or refresh the judge (data.rankings_path)."
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
