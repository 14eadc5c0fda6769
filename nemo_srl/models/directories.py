"""A model directory is written as `<name>.partial` and renamed when it is complete and on disk.

So a directory with its final name is complete, also after a power failure. A killed writer leaves a `.partial`, which
the next writer replaces. Not covered: two writers of one directory at a time. Callers hold a lock, or own the run.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from nemo_srl.errors import ModelError


def refuse_existing(directory: Path) -> None:
    """Raise `ModelError` unless `directory` is free to be written (absent, or empty)."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ModelError(
            f"{directory}: exists already. A model directory with its final name is complete. Use it, or remove it to "
            "have it written again."
        )


def fresh_partial(directory: Path) -> Path:
    """Make a new, empty directory beside `directory`. The caller fills it and passes it to `publish`."""
    partial = directory.with_name(directory.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    return partial


def publish(partial: Path, directory: Path) -> None:
    """Force the files of `partial` to disk and give it its final name, `directory`."""
    for path in [*partial.iterdir(), partial]:
        _fsync(path)
    partial.replace(directory)
    _fsync(directory.parent)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
