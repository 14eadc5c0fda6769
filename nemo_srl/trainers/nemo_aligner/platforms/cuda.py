"""NeMo-Aligner on NVIDIA GPUs with pip packages alone: neither Transformer Engine nor Apex.

Devices, streams, random states, autocast and NCCL are PyTorch's own, and log-probabilities are NeMo-Aligner's own.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from omegaconf import DictConfig

from nemo_srl.trainers.nemo_aligner.platforms import stand_ins


def tune(work_dir: Path) -> str:
    """Nothing to choose."""
    return ""


def install() -> None:
    stand_ins.prepare_environment()
    if not any(map(shutil.which, ("cc", "gcc", "clang"))):
        # megatron-core compiles small functions by torch.compile, which needs a C compiler.
        torch.compiler.set_stance("force_eager")
    stand_ins.install()


def adapt_plan(cfg: DictConfig) -> None:
    stand_ins.adapt_plan(cfg)
