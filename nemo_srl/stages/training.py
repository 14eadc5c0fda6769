"""What `sft`, `policy` and `refresh` share: a trainer's three steps, and the publication of the model it made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nemo_srl.artifacts import Model
from nemo_srl.models import hf
from nemo_srl.protocols import TrainingTask
from nemo_srl.records import Record
from nemo_srl.stages.base import Context, Need, Result, Stage, Step
from nemo_srl.trainers import WORK_DIR, open_trainer


def training_stage(
    name: str,
    task: Callable[[Context], TrainingTask],
    *,
    needs: Mapping[str, Need | type[Record]],
    settings: tuple[str, ...],
    **more: Any,
) -> Stage[Model]:
    """A stage that trains what `task` describes and publishes `hf/`. `more` are further fields of `Stage`."""

    def prepare(ctx: Context) -> None:
        if not _exported(ctx):
            open_trainer(ctx.cfg.trainer).prepare(task(ctx), _work_dir(ctx))

    def train(ctx: Context) -> None:
        if not _exported(ctx):
            open_trainer(ctx.cfg.trainer).train(_work_dir(ctx))

    def export(ctx: Context) -> Result:
        metrics = open_trainer(ctx.cfg.trainer).export(_work_dir(ctx), ctx.output.model_dir)
        return Result(hf.digest(ctx.output.model_dir), metrics)

    return Stage(
        name=name,
        module=task.__module__,
        needs=needs,
        output=Model,
        settings=settings,
        steps=(Step("prepare", prepare), Step("train", train, distributed=True), Step("export", export)),
        **more,
    )


def _work_dir(ctx: Context) -> Path:
    """The trainer's files. After the export only configuration, logs and metrics are left."""
    return Path(ctx.output.path / WORK_DIR)


def _exported(ctx: Context) -> bool:
    """Whether the model is exported. The export appears by rename, and deletes the files that training needs."""
    return bool(ctx.output.model_dir.exists())
