"""Sends a run's metrics to TensorBoard and Weights & Biases. They are read from the published stages.

The run directory is the source, and trackers get copies. So nothing is lost when a tracker fails, and a run can be
sent again at any time. Training and generation do not know about trackers. TensorBoard's files are in
`run_dir/tensorboard` and are replaced each time. The id of the W&B run comes from the run directory's name and path,
so sending the run again updates the same W&B run.

    M2/loss, M2/rewards_margin, ...    step: the training step
    evaluation/pairwise_accuracy, ...  step: the model's number (0 is M0)
    stages/pairs/num_pairs, ...        step: the iteration

Not covered: the metrics of a stage while it runs. They are in its log.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from nemo_srl.artifacts import digest_of
from nemo_srl.config import TrackingConfig
from nemo_srl.errors import ConfigError
from nemo_srl.runs import Run, training_metrics


def track(run: Run, cfg: TrackingConfig) -> None:
    """Send the run's metrics to the trackers that `cfg` names."""
    if cfg.tensorboard:
        write_tensorboard(run)
    if cfg.wandb_project:
        send_to_wandb(run, project=cfg.wandb_project)


def check(cfg: TrackingConfig) -> None:
    """Raise `ConfigError` for a tracker that is not installed."""
    if cfg.wandb_project and not (sys.modules.get("wandb") or importlib.util.find_spec("wandb")):
        raise ConfigError(
            f"tracking.wandb_project={cfg.wandb_project!r}: the package wandb is not installed. Run pip install wandb."
        )


class Scalar(NamedTuple):
    tag: str
    step: int
    value: float


def scalars(run: Run) -> Iterator[Scalar]:
    """Every metric of the run. The values of one tag come in the order of their steps."""
    for model, stage in run.models().items():
        for row in training_metrics(stage.path):
            for name, value in row.items():
                if name != "step":
                    yield Scalar(tag=f"{model}/{name}", step=int(row["step"]), value=float(value))
    for model, metrics in run.evaluations().items():
        for m in metrics:
            if m.value is not None:
                yield Scalar(tag=f"evaluation/{m.name}", step=int(model.removeprefix("M")), value=m.value)
    for s in run.stages:
        for name, value in {**s.manifest.metrics, "seconds": s.manifest.seconds}.items():
            yield Scalar(tag=f"stages/{s.name}/{name}", step=s.iteration, value=float(value))


def write_tensorboard(run: Run) -> Path:
    """Write event files and return their directory. `tensorboard --logdir <run_dir>` shows them."""
    from torch.utils.tensorboard import SummaryWriter

    directory = run.run_dir / "tensorboard"
    if directory.exists():
        shutil.rmtree(directory)
    with SummaryWriter(str(directory)) as writer:
        for s in scalars(run):
            writer.add_scalar(s.tag, s.value, s.step, walltime=0.0)
    return directory


def send_to_wandb(run: Run, *, project: str) -> None:
    """Send everything to a W&B project. W&B reads its key, mode and server from its own environment variables.

    Each group of tags (`M2`, `evaluation`, `stages`) has its own step, because W&B's global step cannot go back.
    """
    check(TrackingConfig(wandb_project=project))
    import wandb

    name = run.run_dir.resolve().name
    identity = digest_of(str(run.run_dir.resolve()))
    session = wandb.init(
        project=project, name=name, id=f"{name}-{identity}", resume="allow", dir=str(run.run_dir), config=run.config()
    )
    try:
        for prefix in {s.tag.split("/")[0] for s in scalars(run)}:
            session.define_metric(f"{prefix}/step")
            session.define_metric(f"{prefix}/*", step_metric=f"{prefix}/step")
        for s in scalars(run):
            session.log({s.tag: s.value, f"{s.tag.split('/')[0]}/step": s.step})
    finally:
        session.finish()
