"""A training whose loss or gradient is no longer a number ends at that step, and nothing of it is published.

NeMo-Aligner goes on, and saves weights that are not numbers. Every rank gets the same loss and the same norm, so all of
them end together.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nemo_srl import lineage
from nemo_srl.errors import DivergedError
from nemo_srl.trainers.nemo_aligner.data import TRAIN_FILE


def watch(loop: Any, grad_norm: Callable[[], float], work_dir: Path) -> None:
    """Let `loop`, NeMo-Aligner's for SFT or DPO, raise `DivergedError` after a step that went wrong.

    `grad_norm` returns the norm of the last step's gradient before clipping. Batches have `row`, the numbers of their
    rows; it is taken out.
    """
    inner_step = loop.train_single_step

    def train_single_step(batch: dict[str, Any]) -> Any:
        rows = batch.pop("row").tolist()
        loss, metrics = inner_step(batch)
        if not (math.isfinite(loss) and math.isfinite(grad_norm())):
            raise DivergedError(_message(loop, loss, grad_norm(), rows, work_dir))
        return loss, metrics

    loop.train_single_step = train_single_step


def _message(loop: Any, loss: float, norm: float, rows: list[int], work_dir: Path) -> str:
    of_ranks: list[list[int]] = [[]] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(of_ranks, rows)
    lines = ", ".join(str(row + 1) for row in sorted({row for of_rank in of_ranks for row in of_rank}))
    rate = loop.optimizer.param_groups[0]["lr"]
    return (
        f"step {loop.step + 1}: the loss is {loss} and the norm of the gradient is {norm}, so the weights of this "
        f"training are lost. Nothing was published. The step's rows are the lines {lines} of {work_dir / TRAIN_FILE}. "
        f"If they are as they should be, lower the learning rate (it was {rate:.1e}), and delete "
        f"{_trained_alike(work_dir.parent)} before the next start. What other stages have finished stays."
    )


def _trained_alike(stage_dir: Path) -> str:
    """The directories of the stages that were made with this training's learning rate, and of all made from them."""
    if not (stage_dir / lineage.SPEC).exists():
        return str(stage_dir)
    rates = [key for key in lineage.read_json(stage_dir / lineage.SPEC)["identity"] if key.endswith(".learning_rate")]
    old = lineage.with_settings(stage_dir.parent.parent, rates) or [stage_dir]
    return lineage.removal(old).removeprefix("rm -r ")
