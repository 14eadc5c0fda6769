"""What storage that several nodes share (NFS, Lustre) does otherwise than a disk of one machine.

What one node writes may appear on another one late: it remembers for up to a minute that a file was not there. And a
container sees only what is mounted into it, while links may lead elsewhere.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path

VISIBLE_SECONDS = 90
"""So late may a file appear on another node. NFS asks its server again after 60 s at most (`acdirmax`)."""
VISIBLE_VARIABLE = "NEMO_SRL_VISIBLE_SECONDS"
"""The environment variable that tells a job's processes how long to wait for a file. Without it, they do not wait."""


def appears(is_there: Callable[[], bool], directory: Path, seconds: float) -> bool:
    """Wait until `is_there`, for `seconds` at most. Returns whether it is. What it looks for lies in `directory`."""
    deadline = time.monotonic() + seconds
    while not is_there():
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.5)
        ask_again(directory)
    return True


def ask_again(directory: Path) -> None:
    """Make a network file system ask its server which files a directory has. Without this, one that it has looked for
    in vain may stay invisible here for a minute."""
    with contextlib.suppress(OSError):
        os.listdir(directory)


def seconds_to_wait() -> float:
    """How long this process waits for a file of another node."""
    return float(os.environ.get(VISIBLE_VARIABLE, "0"))


def directories_of(path: Path) -> set[Path]:
    """All directories that a container needs to read a file, or all files of a directory: also where links lead.

    A model in a cache of Hugging Face is a directory of links to `../../blobs`. Every link of a chain counts, by the
    path that it names, because a container goes the same way.
    """
    path = path.absolute()
    below = (Path(parent, name) for parent, folders, files in os.walk(path) for name in (*folders, *files))
    found = {path if path.is_dir() else path.parent}
    for link in (path, *below):
        for _ in range(40):  # the kernel follows no more
            if not link.is_symlink():
                break
            link = Path(os.path.normpath(link.parent / link.readlink()))
            found.add(link if link.is_dir() else link.parent)
    return {d for d in found if not any(d != other and d.is_relative_to(other) for other in found)}
