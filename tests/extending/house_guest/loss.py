"""A preference loss: the hinge of SLiC-HF (Zhao et al. 2023, arXiv 2305.10425), on DPO's log-ratios."""

from __future__ import annotations

import torch


def hinge(chosen: torch.Tensor, rejected: torch.Tensor, *, beta: float) -> torch.Tensor:
    """Log-ratios [pairs] -> the loss of each pair [pairs]."""
    return torch.relu(1 - beta * (chosen - rejected))
