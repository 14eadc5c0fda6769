"""Chosen: the checkpoint of a training that early stopping chose, as the model of the iteration.

The input `trained` is the whole training, and `checkpoint` one of the models that it published on its way. The weights
are linked where the file system allows it, and copied otherwise.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from nemo_srl.artifacts import Model
from nemo_srl.models import hf
from nemo_srl.protocols import step_of
from nemo_srl.stages.base import MODEL, Context, Result, Stage, Step


def run(ctx: Context) -> Result:
    source, target = Path(ctx.inputs["checkpoint"].model_dir), Path(ctx.output.model_dir)
    unfinished = target.with_name(f"{target.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    if not target.exists():
        shutil.copytree(source, unfinished, copy_function=_link)
        unfinished.rename(target)
    return Result(hf.digest(target), {"num_steps": step_of(source)})


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)


STAGE = Stage(
    name="chosen",
    module=__name__,
    needs={"trained": MODEL, "checkpoint": MODEL},
    output=Model,
    settings=(),
    steps=(Step("run", run),),
)
