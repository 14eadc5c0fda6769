"""Keeps the checkpoints of a training, of which NeMo itself keeps only the last one.

A kept checkpoint is a second name for the files of NeMo's (hard links), so it takes no time and no further copy. It
stays when NeMo removes its own. Until the export, each takes as much disk as a checkpoint. Needs no torch.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

KEPT_DIR = "kept"


def keep(checkpoint: Path, work_dir: Path) -> None:
    """Keep a complete checkpoint of NeMo, whose name has `-step=<number>-`. One that was kept before stays."""
    step = int(checkpoint.name.split("-step=")[1].split("-")[0])
    target = work_dir / KEPT_DIR / f"step_{step:06d}"
    if not target.exists():
        unfinished = target.with_name(f"{target.name}.tmp")
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.copytree(checkpoint, unfinished, copy_function=os.link)
        unfinished.rename(target)


def kept(work_dir: Path) -> dict[int, Path]:
    """The kept checkpoints by their steps, in order."""
    found = sorted((work_dir / KEPT_DIR).glob("step_*[0-9]"))
    return {int(path.name.removeprefix("step_")): path for path in found}
