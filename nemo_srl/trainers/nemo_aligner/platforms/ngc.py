"""NeMo-Aligner in NVIDIA's containers, with Transformer Engine and Apex: everything is there."""

from __future__ import annotations

import functools
import inspect
import multiprocessing
import signal
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any

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
    else:
        keep_manager_through_a_stop()


def keep_manager_through_a_stop() -> None:
    """Let megatron-core's manager process ignore SIGTERM.

    The writers of a checkpoint report through this process, which lives from the first save to the end. A stop request
    that reaches all processes of a job would end it. The training then could not write the checkpoint that it was asked
    for.
    """
    import megatron.core.dist_checkpointing.strategies.filesystem_async as megatron_filesystem

    @functools.cache
    def results_queue() -> Any:
        manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
        manager.start(signal.signal, (signal.SIGTERM, signal.SIG_IGN))
        return manager.Queue()

    megatron_filesystem._get_write_results_queue = results_queue


def adapt_plan(cfg: DictConfig) -> None:
    """Nothing: the plan is made for this platform."""
