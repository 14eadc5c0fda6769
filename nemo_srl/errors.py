"""Every error that this package raises on purpose, in one place.

Each message names the key, the value, the reason and the remedy. `ConfigError` and `DataError` are
also `ValueError`s, so callers that know nothing of this package handle them in the usual way.
"""

from __future__ import annotations


class NemoSrlError(Exception):
    """Base of all errors that a user can do something about."""


class ConfigError(NemoSrlError, ValueError):
    """A setting that cannot work, found before anything is started."""


class DataError(NemoSrlError, ValueError):
    """Input data that cannot be used: an empty file, a malformed line, a prompt over the context."""


class InputError(NemoSrlError, TypeError):
    """A stage was called with inputs that it does not take."""


class ModelError(NemoSrlError, ValueError):
    """A model directory that is missing, incomplete or of an unsupported architecture."""


class StaleArtifactError(NemoSrlError):
    """Something in the run directory was made with other settings or inputs than those asked for."""


class RunDirBusyError(NemoSrlError):
    """Another orchestrator works in the same run directory."""


class JobFailedError(NemoSrlError):
    """A stage's process ended with an error; carries the end of its log."""


class StoppedError(NemoSrlError):
    """A process was asked to stop (SIGTERM), and saved what it had; run again, it goes on from there."""


class NoPairsError(NemoSrlError):
    """An iteration produced no preference pair, so there is nothing to train on."""


class EngineError(NemoSrlError):
    """A generation engine could not start, answer or finish."""
