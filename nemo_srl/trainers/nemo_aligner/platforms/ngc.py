"""NeMo-Aligner in NVIDIA's containers, with Transformer Engine and Apex: everything is there."""

from __future__ import annotations

import inspect
from pathlib import Path

from omegaconf import DictConfig
from torch.distributed.checkpoint import filesystem

from nemo_srl.trainers.nemo_aligner.platforms import stand_ins


def tune(work_dir: Path) -> str:
    """Nothing to choose."""
    return ""


def install() -> None:
    stand_ins.restore_numpy_product()
    # megatron-core 0.11's writer passes five arguments, which is right up to torch 2.6. With a newer torch, the
    # training would end at its first checkpoint.
    if "serialization_format" in inspect.signature(filesystem._write_item).parameters:
        stand_ins.write_checkpoints_in_process()


def adapt_plan(cfg: DictConfig) -> None:
    """Nothing: the plan is made for this platform."""
