"""NeMo-Aligner's progress bars, corrected: only rank 0 draws them, they show a few metrics, and they end at 100%."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

_SHOWN = {"train_loss": "loss", "train_acc": "acc", "train_lr": "lr"}


class StepBar(tqdm):  # type: ignore[misc]
    """A bar that counts the calls of `set_postfix`, of which NeMo-Aligner makes one for every step.

    NeMo-Aligner iterates over a range and the bar together, the range first. So the bar is never told that the last
    step is done. NeMo-Aligner also lets every rank draw a bar.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.num_done = 0
        super().__init__(*args, **{**kwargs, "disable": os.environ.get("RANK", "0") != "0"})

    def set_postfix(self, metrics: Mapping[str, float], **kwargs: Any) -> None:
        self.num_done += 1
        super().set_postfix({_SHOWN[k]: f"{v:.3g}" for k, v in metrics.items() if k in _SHOWN}, **kwargs)

    def close(self) -> None:
        if not self.disable:
            self.n = self.initial + self.num_done
        super().close()
