"""What `sft` and `policy` share: a trainer's three steps, and the publication of the model it made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from nemo_srl.artifacts import Model
from nemo_srl.models import hf
from nemo_srl.protocols import TrainingTask
from nemo_srl.stages import Context, Result, Stage, Step
from nemo_srl.trainers import open_trainer


def training_stage(
    name: str,
    task: Callable[[Context], TrainingTask],
    settings: tuple[str, ...],
) -> Stage:
    """A stage that trains what `task` describes and publishes `hf/`."""

    def prepare(ctx: Context) -> None:
        if not exported(ctx):
            open_trainer(ctx.cfg.trainer).prepare(task(ctx), work_dir(ctx))

    def train(ctx: Context) -> None:
        if not exported(ctx):
            open_trainer(ctx.cfg.trainer).train(work_dir(ctx))

    def export(ctx: Context) -> Result:
        metrics = open_trainer(ctx.cfg.trainer).export(work_dir(ctx), ctx.output.model_dir)
        return Result(hf.digest(ctx.output.model_dir), metrics)

    return Stage(
        name=name,
        output=Model,
        settings=settings,
        steps=(Step("prepare", prepare), Step("train", train, distributed=True), Step("export", export)),
    )


def work_dir(ctx: Context) -> Path:
    """Where the trainer keeps its files; after the export only configuration, logs and metrics."""
    path: Path = ctx.output.path / "training"
    return path


def exported(ctx: Context) -> bool:
    """True when only publishing is left: the export appears by rename, and frees what it was made from."""
    found: bool = ctx.output.model_dir.exists()
    return found
