"""The metrics of every training step, one JSON object a line.

    {"step": 1, "loss": 0.693, "lr": 1e-06, "grad_norm": 4.1, "rewards_chosen": 0.0, ...}

NeMo-Aligner logs the implicit rewards of DPO without their factor beta; here they have it. With the distributed
optimizer it logs no gradient norm, because the clipping happens inside `step`; here it is logged. A training that goes
on from a checkpoint drops the lines of the steps that it repeats.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_srl import jsonio
from nemo_srl.errors import DataError

METRICS_FILE = "metrics.jsonl"

_SAME_NAME = ("loss", "lr", "grad_norm", "preference_loss", "sft_loss", "acc", "padding", "step_time", "epoch")


def step_record(metrics: Mapping[str, float], *, step: int, beta: float | None) -> dict[str, Any]:
    """What NeMo-Aligner reports about one step, in our names and units. The first step is number 1.

    `rewards_chosen`, `rewards_rejected` and `rewards_margin` are beta * (log pi - log pi_ref), summed over
    the response and averaged over the batch (Rafailov et al. 2023, section 4). With the losses `dpo_norm` and `simpo`
    they are averaged over the response's tokens, and `simpo` has no log pi_ref. `acc` is the share of pairs with a
    positive margin. These four are of the pairs that are compared, and are left out if a step has none. `padding` is
    the share of padding in the tokens of rank 0; `step_time` is in seconds; `loss` is before the step's update.
    """
    record = {"step": step, **{key: metrics[key] for key in _SAME_NAME if key in metrics}}
    if beta is not None and "rewards_chosen_mean" in metrics:
        chosen, rejected = beta * metrics["rewards_chosen_mean"], beta * metrics["rewards_rejected_mean"]
        record |= {"rewards_chosen": chosen, "rewards_rejected": rejected, "rewards_margin": chosen - rejected}
    return record


class MetricsFile:
    """What NeMo-Aligner's loops use of a logger, `log_metrics`, over a JSONL file."""

    def __init__(self, path: Path, *, beta: float | None, first_step: int) -> None:
        """Keeps the lines of the first `first_step` steps, which are completed. Only rank 0 makes such a file."""
        self.path, self.beta = path, beta
        self.grad_norm = self.padding = 0.0
        kept = [line for line in read_metrics(path) if line["step"] <= first_step]
        path.write_text("".join(jsonio.dumps(line) + "\n" for line in kept))

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        train = {key.removeprefix("train/"): v for key, v in metrics.items() if key.startswith("train/")}
        if train and step is not None:
            # NeMo-Aligner counts from 0 here.
            record = step_record(
                {**train, "grad_norm": self.grad_norm, "padding": self.padding}, step=step + 1, beta=self.beta
            )
            with self.path.open("a") as file:
                file.write(jsonio.dumps(record) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; empty if there is none. A last line that a killed process cut off is left out."""
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else [""]
    try:
        return [jsonio.loads(line) for line in lines[:-1]]
    except ValueError as e:
        raise DataError(
            f"{path}: damaged ({e}). Delete {path.parent.parent}, the directory of this training's stage. The next "
            "start makes it again, and other stages stay."
        ) from e
