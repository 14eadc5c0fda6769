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


def no_beta(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    return rejected - chosen
