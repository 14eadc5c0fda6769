"""Model directories appear whole: written as `<name>.partial`, then renamed, also across a power failure.

A killed writer leaves a `.partial`, which the next one replaces; so a directory under its final name is
complete. Two writers of one directory at a time are not covered: callers hold a lock or own the run.
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
            f"{directory}: exists already. Model directories get their name when they are complete: use it, or remove "
            "it to have it written again."
        )


def fresh_partial(directory: Path) -> Path:
    """A new, empty directory beside `directory`, to be passed to `publish`."""
    partial = directory.with_name(directory.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    return partial


def publish(partial: Path, directory: Path) -> None:
    """Force the files of `partial` to disk and give it its final name."""
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
