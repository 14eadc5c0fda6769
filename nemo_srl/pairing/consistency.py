"""How far two judges agree in their rankings: the confidence in an iteration's pairs."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from statistics import fmean

import scipy

from nemo_srl.records import Candidate


def consistency(
    candidates: Iterable[Candidate], first: Mapping[str, float], second: Mapping[str, float]
) -> float | None:
    """The mean over prompts of (tau + 1) / 2, with Kendall's tau-b between two judges' scores (Wang et al. 2024, arXiv
    2410.12735, CREAM). `first` and `second` are mean scores by candidate key.

    A prompt counts if both judges scored two or more answers and neither ties all of them. None if no prompt counts.
    """
    groups: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for c in candidates:
        if c.key in first and c.key in second:
            groups[c.prompt_id].append((first[c.key], second[c.key]))
    taus = [float(scipy.stats.kendalltau(*zip(*g, strict=True)).statistic) for g in groups.values() if _is_ranked(g)]
    return fmean((tau + 1) / 2 for tau in taus if not math.isnan(tau)) if taus else None


def _is_ranked(scores: list[tuple[float, float]]) -> bool:
    return all(len(set(column)) > 1 for column in zip(*scores, strict=True))
