"""Figures of the paper (arXiv 2401.10020 v3), shown beside a run's own figures.

The paper used a 70B model, other data and other judges. Its figures show what the method can reach. A small model
should not be expected to reach them. `SFT` is the paper's baseline without EFT data, which this package does not
train. Shares are fractions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

JUDGING: Mapping[str, Mapping[str, float]] = {
    "pairwise_accuracy": {"SFT": 0.651, "M1": 0.787, "M2": 0.804, "M3": 0.817},
    "five_best": {"SFT": 0.396, "M1": 0.415, "M2": 0.443, "M3": 0.432},
    "exact_match": {"SFT": 0.101, "M1": 0.131, "M2": 0.143, "M3": 0.143},
    "spearman": {"SFT": 0.253, "M1": 0.279, "M2": 0.331, "M3": 0.349},
    "kendall": {"SFT": 0.233, "M1": 0.253, "M2": 0.315, "M3": 0.324},
}
"""Table 4, by the names of our metrics. The paper does not say how its pairwise accuracy counts ties."""

LENGTH: Mapping[str, float] = {"M1": 1092, "M2": 1552, "M3": 2552}
"""Mean characters of an answer on AlpacaEval (table 1)."""

HEAD_TO_HEAD: Mapping[str, tuple[float, float, float]] = {
    "M1 v SFT": (0.305, 0.387, 0.309),
    "M2 v SFT": (0.492, 0.363, 0.145),
    "M3 v SFT": (0.625, 0.277, 0.098),
}
"""Won, tied and lost on 256 prompts, judged by GPT-4 in both orders (section 3.2.1)."""

ANSWERING: Sequence[Sequence[str]] = (
    ("", "SFT", "M1", "M2", "M3"),
    ("AlpacaEval 2 win rate, %", "-", "9.94", "15.38", "20.44"),
    ("MT-Bench, 1 to 10", "6.85", "6.78", "7.01", "7.25"),
    ("head to head against SFT: won / tied / lost, %", "-", "31 / 39 / 31", "49 / 36 / 15", "63 / 28 / 10"),
    ("length on AlpacaEval, characters", "-", "1092", "1552", "2552"),
)
"""Instruction following, as the cells of a table."""
