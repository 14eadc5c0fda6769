"""An Adam in the place of Apex's. Needs neither NeMo nor megatron-core."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.adamw import adamw


class FusedAdam(torch.optim.Optimizer):
    """AdamW with the state of Apex's `FusedAdam`: one step count per group, and moments per parameter.

    The weight decay is decoupled (Loshchilov & Hutter 2019), the moments are bias-corrected (Kingma & Ba 2015).
    """

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
        defaults = {"lr": lr, "bias_correction": True, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = int(group.get("step", 0)) + 1
            parameters = [p for p in group["params"] if p.grad is not None]
            for parameter in parameters:
                if "exp_avg" not in self.state[parameter]:
                    self.state[parameter]["exp_avg"] = torch.zeros_like(parameter)
                    self.state[parameter]["exp_avg_sq"] = torch.zeros_like(parameter)
            if parameters:
                self._update(group, parameters)

    def _update(self, group: dict[str, Any], parameters: list[Any]) -> None:
        """One step for the parameters of a group by PyTorch's fused kernel, which reads and writes each number once."""
        # The kernel counts a step per parameter. So each gets a number of its own, made from the count of the group.
        steps = torch.full((len(parameters),), group["step"] - 1.0, device=parameters[0].device).unbind()
        beta1, beta2 = group["betas"]
        adamw(
            parameters,
            [p.grad.to(p.dtype) for p in parameters],
            [self.state[p]["exp_avg"] for p in parameters],
            [self.state[p]["exp_avg_sq"] for p in parameters],
            [],
            list(steps),
            fused=True, amsgrad=False, maximize=False,
            beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
        )  # fmt: skip
