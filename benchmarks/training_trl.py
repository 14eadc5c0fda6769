"""Steps of TRL's DPOTrainer on the CPU: `python training_trl.py TASK.json RESULT.json`; see `dpo.py`.

Written for TRL 1.16. Runs in an environment of its own, without this project.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from training_clock import StepClock
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer


class Clock(TrainerCallback):  # type: ignore[misc]
    def __init__(self, clock: StepClock) -> None:
        self.clock = clock

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if "loss" in logs:  # once a step, at its end
            self.clock.step_ended(logs["loss"])


def main(task: dict[str, Any], result: Path) -> None:
    with tempfile.TemporaryDirectory() as directory:
        args = DPOConfig(
            output_dir=directory,
            use_cpu=True,
            bf16=False,
            activation_checkpointing=False,  # it saves memory and takes time
            precompute_ref_log_probs=task["precompute"],
            per_device_train_batch_size=task["micro_batch_size"],
            gradient_accumulation_steps=task["batch_size"] // task["micro_batch_size"],
            max_steps=task["steps"],
            learning_rate=task["learning_rate"],
            lr_scheduler_type="constant",
            beta=task["beta"],
            adam_beta1=0.9,
            adam_beta2=0.98,
            weight_decay=0.0,
            max_grad_norm=1.0,
            max_length=task["max_length"],
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        names = ("prompt", "chosen", "rejected")
        DPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(task["model_dir"], dtype=torch.float32),
            args=args,
            train_dataset=Dataset.from_list([{name: row[name] for name in names} for row in task["rows"]]),
            processing_class=AutoTokenizer.from_pretrained(task["model_dir"]),
            callbacks=[Clock(StepClock(task["steps"], result))],
        ).train()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
