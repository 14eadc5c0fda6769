"""Times, losses, memory and profile of a training's steps. Needs PyTorch alone, so that every trainer can use it."""

from __future__ import annotations

import itertools
import json
import resource
import time
from pathlib import Path
from typing import Any

import torch

PRODUCTS = {f"aten::{name}" for name in ("mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_")}
ATTENTION = "aten::_scaled_dot_product"
"""What PyTorch's fused attention kernels and their backward passes begin with. Their products are within."""


class StepClock:
    """A trainer calls `step_ended` at the end of every step. The last step is profiled and not timed.

    A step is everything from the end of one step to the end of the next one. The first one has no such time.
    """

    def __init__(self, num_steps: int, output: Path) -> None:
        """`num_steps` is the number of all steps. The results go to `output` after the last one."""
        self._num_steps, self._output = num_steps, output
        self._ends: list[float] = []
        self._losses: list[float] = []
        self._peak_gb = 0.0
        self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])

    def step_ended(self, loss: float) -> None:
        self._ends.append(time.perf_counter())
        self._losses.append(loss)
        if len(self._ends) == self._num_steps - 1:
            self._peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
            self._profile.start()
        elif len(self._ends) == self._num_steps:
            self._profile.stop()
            self._write()

    def _write(self) -> None:
        timed = self._ends[:-1]
        found: dict[str, Any] = {
            "seconds": [after - before for before, after in itertools.pairwise(timed)],
            "losses": self._losses,
            "peak_gb": self._peak_gb,
            "num_threads": torch.get_num_threads(),
            **shares(self._profile),
        }
        self._output.write_text(json.dumps(found))


def shares(profile: Any) -> dict[str, float]:
    """Which part of the profiled time went into matrix products, and which into fused attention kernels."""
    seconds = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
    total = sum(seconds.values())
    return {
        "products": sum(t for name, t in seconds.items() if name in PRODUCTS) / total,
        "attention": sum(t for name, t in seconds.items() if name.startswith(ATTENTION)) / total,
    }
