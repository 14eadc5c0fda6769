"""All errors that this package raises on purpose.

Each message names the key, the value, the reason and the remedy. `ConfigError` and `DataError` are
also `ValueError`s, so callers that do not know this package can handle them.
"""

from __future__ import annotations

import errno
import os

_DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT)
_CANNOT_WRITE = (errno.EACCES, errno.EPERM, errno.EROFS)
OF_THE_DISK = (*_DISK_IS_FULL, *_CANNOT_WRITE)
"""Numbers of errors that say that nothing can be written in a place."""


class NemoSrlError(Exception):
    """Base class of all errors that a user can correct."""


class ConfigError(NemoSrlError, ValueError):
    """A setting that cannot work, found before anything is started."""


class DataError(NemoSrlError, ValueError):
    """Input data that cannot be used: an empty file, a malformed line, a prompt that exceeds the context."""


class InputError(NemoSrlError, TypeError):
    """A stage was called with inputs that it does not take."""


class ModelError(NemoSrlError, ValueError):
    """A model directory that is missing, incomplete or of an unsupported architecture."""


class StaleArtifactError(NemoSrlError):
    """An artifact in the run directory was made with other settings or inputs."""


class DivergedError(NemoSrlError):
    """A training whose loss or gradient is no longer a number."""


class RunDirBusyError(NemoSrlError):
    """Another orchestrator works in the same run directory."""


class JobFailedError(NemoSrlError):
    """A stage's process ended with an error. The message has the end of its log."""


class StoppedError(NemoSrlError):
    """A process was asked to stop (SIGTERM) and saved its work. The next start continues from there."""


class NoPairsError(NemoSrlError):
    """An iteration produced no preference pair, so there is nothing to train on."""


class EngineError(NemoSrlError):
    """A generation engine could not start, answer or finish."""


def explained(error: OSError) -> str | None:
    """What a file's error means for the user. None if the error is not about a file, a directory or a disk."""
    if error.errno is None or (error.filename is None and error.errno not in OF_THE_DISK):
        return None
    place = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
    remedy = ""
    if error.errno in _DISK_IS_FULL:
        remedy = ". All completed work is kept. Free some disk space, and run again to continue."
    elif error.errno in _CANNOT_WRITE:
        remedy = ". Give this user the right to read and write there, or use another directory."
    return f"{place}{os.strerror(error.errno)}{remedy}"
