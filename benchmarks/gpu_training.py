"""One training by this project's trainer, measured: `gpu_training.py CASE_FILE RESULT_FILE`.

The time of a step is from the end of one step to the end of the next, with everything in between. The reference's
log-probabilities are computed before the first step, so they are in `first_step_seconds` with the start of the process.
The training is ended after its last measured step, before it would write a checkpoint of 14 bytes per parameter.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

from nemo_srl.config import DPOConfig, SFTConfig
from nemo_srl.protocols import DPORow, SFTRow, TrainingTask
from nemo_srl.trainers import open_trainer
from nemo_srl.trainers.nemo_aligner.metrics import MetricsFile
from nemo_srl.trainers.nemo_aligner.settings import NemoAlignerSettings


class Enough(Exception):
    """All steps are measured."""


def task(case: dict[str, Any]) -> TrainingTask:
    """Every step sees every row, so the order of rows does not matter."""
    rows = json.loads(Path(case["pairs"]).read_text())["rows"][: case["num_pairs"]]
    rate = case["learning_rate"]
    optim = {
        "learning_rate": rate, "min_learning_rate": rate, "max_epochs": case["num_steps"], "save_interval": 10**6,
        "global_batch_size": len(rows), "max_seq_length": case["max_length"],
    }  # fmt: skip
    model_dir = Path(case["model"])
    if case["algorithm"] == "sft":
        sft = [SFTRow(prompt=x["prompt"], response=x["chosen"]) for x in rows]
        return TrainingTask(algorithm="sft", model_dir=model_dir, rows=sft, optim=SFTConfig(**optim), seed=1)
    pairs = [DPORow(**x, chosen_reward=5.0, rejected_reward=0.0) for x in rows]
    return TrainingTask(algorithm="dpo", model_dir=model_dir, rows=pairs, optim=DPOConfig(**optim), seed=1)


def measure(case: dict[str, Any]) -> dict[str, Any]:
    import torch

    started, ends = time.perf_counter(), list[float]()
    on_gpu = case["trainer"]["platform"] == "cuda"
    trainer, work_dir = open_trainer(NemoAlignerSettings(**case["trainer"])), Path(case["work_dir"])
    trainer.prepare(task(case), work_dir)
    prepared = time.perf_counter()
    log_metrics = MetricsFile.log_metrics

    def log_and_measure(self: MetricsFile, metrics: Any, step: int | None = None) -> None:
        log_metrics(self, metrics, step)
        if on_gpu:
            torch.cuda.synchronize()
        ends.append(time.perf_counter())
        if len(ends) == case["num_steps"]:
            raise Enough

    with mock.patch.object(MetricsFile, "log_metrics", log_and_measure), contextlib.suppress(Enough):
        trainer.train(work_dir)
    return {
        "losses": [float(row["loss"]) for row in trainer.metrics(work_dir)],
        "step_seconds": [b - a for a, b in itertools.pairwise(ends)],
        "prepare_seconds": prepared - started,
        "first_step_seconds": ends[0] - prepared,
        "memory": gpu_memory() if on_gpu else None,
    }


def gpu_memory() -> dict[str, int]:
    """Bytes: the peaks of PyTorch's allocator over the whole process, and what the GPU holds beside that."""
    import torch

    free, total = torch.cuda.mem_get_info()
    return {
        "allocated": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.max_memory_reserved(),
        "beside": total - free - torch.cuda.memory_reserved(),
    }


if __name__ == "__main__":
    found = measure(json.loads(Path(sys.argv[1]).read_text()))
    Path(sys.argv[2]).write_text(json.dumps(found))
    sys.stderr.flush()
    os._exit(0)  # the training was left in the middle, so NCCL's threads are not waited for
