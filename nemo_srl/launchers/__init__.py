"""Launchers: where a stage's processes run. Each folder here that exports `BACKEND` is one; `launcher.name` chooses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from nemo_srl import registry
from nemo_srl.config import ClusterConfig
from nemo_srl.protocols import Job, Launcher

Holding = Literal["machine", "allocation", "jobs"]


@dataclass(frozen=True, kw_only=True)
class LauncherBackend:
    """What a launcher's folder exports as `BACKEND`. No setting of a launcher decides a result."""

    settings: type[Any]
    """A dataclass that has a field `name`."""
    open: Callable[[Any, ClusterConfig], Launcher]
    """From its settings and the cluster's."""
    check: Callable[[Mapping[str, int]], None] = lambda num_nodes: None
    """Raises `ConfigError`, at set-up, for a number of nodes that it cannot use. Given: the setting's key and value."""
    close: Callable[[Any], None] = lambda launcher: None
    """Called at the end of a run, also after an error, with what `open` returned. Stops what the launcher kept."""
    holds: Holding = "machine"
    """What a run holds, for plans. allocation: all its nodes from the beginning to the end. jobs: the nodes of the job
    of the moment, which waited in a queue. There, conversions for a training on several nodes are jobs on one node."""
    visible_seconds: float = 0.0
    """So late may the files of a job appear here, because it runs on another machine."""
    ask_to_stop: Callable[[Job], None] | None = None
    """Tells a running job to save and leave, as it is told before a time limit. None: its jobs have no time limit.

    Raises a `NemoSrlError` if it cannot be told.
    """


def launcher_backend(settings: Any) -> LauncherBackend:
    """The backend that `settings.name` names. Raises `ConfigError`."""
    found: LauncherBackend = registry.load("launchers", settings.name)
    return found


def open_launcher(settings: Any, cluster: ClusterConfig) -> Launcher:
    """A launcher with these settings. Raises `ConfigError`."""
    return launcher_backend(settings).open(settings, cluster)
