"""Ratings from battles: which of several texts is the best, when a judge compared every two of them in both orders."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy  # loads scipy.optimize when it is first used

_PRIOR = 0.01
"""The weight of a normal prior around 0. Without it, a text that never loses would have no finite rating."""


@dataclass(frozen=True)
class Battle:
    """The judge read text `first` before text `second`. `first_share` is 1 if the first won, 0 if it lost, else 0.5."""

    first: int
    second: int
    first_share: float


def position_weights(battles: Iterable[Battle]) -> tuple[float, float]:
    """How much a win counts of the text that stands first, and of the one that stands second.

    With n1 wins in the first place and n2 in the second, these are n2 / (n1 + n2) and n1 / (n1 + n2). So a judge that
    prefers a place decides little by that (Wu et al. 2024, arXiv 2407.19594, section 2.3). Halves without any win.
    """
    shares = [b.first_share for b in battles]
    in_first, in_second = shares.count(1.0), shares.count(0.0)
    num_wins = in_first + in_second
    return (in_second / num_wins, in_first / num_wins) if num_wins else (0.5, 0.5)


def ratings(num_texts: int, battles: Sequence[Battle], *, weights: tuple[float, float]) -> list[float]:
    """A rating of each text: text m beats n with probability 1 / (1 + exp(n's - m's)), by maximum likelihood.

    This is Elo's scale without its factor of 400 / ln 10. A tie counts for neither. `weights` are those of
    `position_weights`: with both, this is the fit of section 2.3 of that paper, but for the prior.
    """
    wins = np.zeros((num_texts, num_texts))  # wins[m, n]: how much text m won against n
    for b in battles:
        if b.first_share == 1:
            wins[b.first, b.second] += weights[0]
        elif b.first_share == 0:
            wins[b.second, b.first] += weights[1]

    def loss(r: npt.NDArray[np.float64]) -> tuple[float, npt.NDArray[np.float64]]:
        margins = r[:, None] - r[None, :]
        unlikely = wins * scipy.special.expit(-margins)
        value = float((wins * np.logaddexp(0, -margins)).sum() + _PRIOR / 2 * (r @ r))
        return value, unlikely.sum(axis=0) - unlikely.sum(axis=1) + _PRIOR * r

    found = scipy.optimize.minimize(loss, np.zeros(num_texts), jac=True, method="BFGS")
    return [float(x) for x in found.x]
