"""Steps of this project's trainer on the CPU: `python training_nemo_srl.py TASK.json RESULT.json`; see `dpo.py`.

The package `nemo_srl` is the one that PYTHONPATH names, which may be an earlier version. So only what has not changed
for long is used.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Any

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as nemo_srl.worker, which trains, sets it for torch

from training_clock import StepClock

from nemo_srl.config import DPOConfig, OptimConfig, SFTConfig
from nemo_srl.protocols import DPORow, SFTRow, TrainingTask
from nemo_srl.trainers import open_trainer
from nemo_srl.trainers.nemo_aligner.metrics import MetricsFile
from nemo_srl.trainers.nemo_aligner.settings import NemoAlignerSettings


def main(task: dict[str, Any], result: Path) -> None:
    common = {
        "learning_rate": task["learning_rate"],
        "min_learning_rate": task["learning_rate"],
        "global_batch_size": task["batch_size"],
        "max_seq_length": task["max_length"],
        "max_epochs": task["epochs"],
        "save_interval": 10**6,
        "gradient_clip_val": 1.0,
    }
    is_sft = task["algorithm"] == "sft"
    optim: OptimConfig = SFTConfig(**common) if is_sft else DPOConfig(beta=task["beta"], **common)
    kind: Any = SFTRow if is_sft else DPORow
    known = {field.name for field in fields(kind)}  # an earlier version may have fewer
    rows = [kind(**{name: value for name, value in row.items() if name in known}) for row in task["rows"]]
    tell(StepClock(task["steps"], result))
    settings = NemoAlignerSettings(precision="32", platform="cpu", micro_batch_size=task["micro_batch_size"])
    training = TrainingTask(
        algorithm=task["algorithm"], model_dir=Path(task["model_dir"]), rows=rows, optim=optim, seed=1234
    )
    with tempfile.TemporaryDirectory() as directory:
        trainer = open_trainer(settings)
        trainer.prepare(training, Path(directory) / "training")
        trainer.train(Path(directory) / "training")


def tell(clock: StepClock) -> None:
    """Let the trainer tell `clock` of its steps, when it writes their metrics."""
    log_metrics = MetricsFile.log_metrics

    def log_and_tell(self: MetricsFile, metrics: Any, step: int | None = None) -> None:
        log_metrics(self, metrics, step)
        if "train/loss" in metrics:
            clock.step_ended(metrics["train/loss"])

    MetricsFile.log_metrics = log_and_tell  # type: ignore[method-assign]


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
