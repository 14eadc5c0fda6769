"""Preference losses as a user would write them, in a module of their own; what is wrong with some is their name."""

from __future__ import annotations

import torch

NUMBER = 3


def dpo(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    *,
    beta: float,
    chosen_rewards: torch.Tensor,
    rejected_rewards: torch.Tensor,
) -> torch.Tensor:
    """Rafailov et al. 2023, equation 7."""
    return torch.log1p(torch.exp(-beta * (chosen - rejected)))


def rpo_sq(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    *,
    beta: float,
    chosen_rewards: torch.Tensor,
    rejected_rewards: torch.Tensor,
) -> torch.Tensor:
    """Nemotron-4 340B technical report, section 3.3.2, with the squared distance."""
    return (beta * (chosen - rejected) - (chosen_rewards - rejected_rewards)) ** 2


def mean_dpo(chosen: torch.Tensor, rejected: torch.Tensor, **kwargs: object) -> torch.Tensor:
    return dpo(chosen, rejected, **kwargs).mean()  # type: ignore[arg-type]


def other_names(winner: torch.Tensor, loser: torch.Tensor, *, beta: float) -> torch.Tensor:
    return beta * (loser - winner)


def unlikelihood(policy_rejected_logps: torch.Tensor, *, rejected_lengths: torch.Tensor) -> torch.Tensor:
    """It needs no reference."""
    return policy_rejected_logps / rejected_lengths


def weighed_lengths(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    *,
    chosen_lengths: torch.Tensor,
    rejected_lengths: torch.Tensor,
    confidence: torch.Tensor,
) -> torch.Tensor:
    """Not a loss to train with: it shows what a pair comes with."""
    return confidence * (chosen_lengths + 10 * rejected_lengths) + 0 * chosen


def everything(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    policy_chosen_logps: torch.Tensor,
    policy_rejected_logps: torch.Tensor,
    reference_chosen_logps: torch.Tensor,
    reference_rejected_logps: torch.Tensor,
    *,
    chosen_lengths: torch.Tensor,
    rejected_lengths: torch.Tensor,
    chosen_rewards: torch.Tensor,
    rejected_rewards: torch.Tensor,
    confidence: torch.Tensor,
    beta: float,
    label_smoothing: float,
    simpo_gamma: float,
    rdpo_alpha: float,
    of_its_own: int = 3,
) -> torch.Tensor:
    return chosen


def temperature(chosen: torch.Tensor, rejected: torch.Tensor, *, temperature: float) -> torch.Tensor:
    return rejected - chosen
