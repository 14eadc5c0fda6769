"""An Adam in the place of Apex's. Needs neither NeMo nor megatron-core."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.adamw import adamw

_MOMENTS = ("exp_avg", "exp_avg_sq")


class FusedAdam(torch.optim.Optimizer):
    """AdamW with the state of Apex's `FusedAdam`: one step count per group, and moments per parameter.

    The weight decay is decoupled (Loshchilov & Hutter 2019), the moments are bias-corrected (Kingma & Ba 2015).
    """

    cpu_offload = False
    """Whether the moments stay in the host's memory (`trainer.optimizer_cpu_offload`). A step then takes those of one
    parameter at a time to the parameter's device and back. Megatron-core constructs this class, so it is set here."""

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
                if not self.state[parameter]:
                    self.state[parameter] = self._new_moments(parameter)
            if not self.cpu_offload:
                if parameters:
                    self._update(group, parameters)
                continue
            for parameter in parameters:
                home = self.state[parameter]
                away = {k: v.to(parameter.device, non_blocking=True, copy=True) for k, v in home.items()}
                self.state[parameter] = away
                self._update(group, [parameter])
                for key in home:
                    home[key].copy_(away[key])
                self.state[parameter] = home

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's. With `cpu_offload`, moments are never on the GPU, which could not hold all of them.

        Megatron-core calls this when it has made its own parameters, so the moments exist from the beginning. It would
        make them on the GPU otherwise, before it reads a checkpoint. And torch would move them to their parameters.
        """
        if not self.cpu_offload:
            super().load_state_dict(state_dict)
            return
        super().load_state_dict({**state_dict, "state": {}})
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            given = state_dict["state"].get(number)
            moments = {key: given[key].cpu() for key in _MOMENTS} if given else self._new_moments(parameter)
            self.state[parameter] = moments

    def _new_moments(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        if not self.cpu_offload:
            return {key: torch.zeros_like(parameter) for key in _MOMENTS}
        # The GPU reads and writes pinned memory at the full speed of its bus.
        shape, dtype, pinned = parameter.shape, parameter.dtype, parameter.is_cuda
        return {key: torch.zeros(shape, dtype=dtype, device="cpu", pin_memory=pinned) for key in _MOMENTS}

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
