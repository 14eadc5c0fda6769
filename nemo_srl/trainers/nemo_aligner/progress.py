"""NeMo-Aligner's progress bars, put right: one rank draws them, with what is worth seeing, and they end at 100%."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

_SHOWN = {"train_loss": "loss", "train_acc": "acc", "train_lr": "lr", "val_loss": "val_loss"}


class StepBar(tqdm):  # type: ignore[misc]
    """A bar that counts the steps whose metrics it was told.

    NeMo-Aligner zips its bar behind a range, so the bar never hears that the last step was made; and every
    rank draws one.
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
