"""Launchers: where a stage's processes run."""

from __future__ import annotations

from nemo_srl.config import LauncherConfig
from nemo_srl.errors import ConfigError
from nemo_srl.protocols import Launcher


def open_launcher(cfg: LauncherConfig) -> Launcher:
    """The launcher named by `launcher.name`."""
    match cfg.name:
        case "local":
            from nemo_srl.launchers.local import LocalLauncher

            return LocalLauncher()
        case _:
            raise ConfigError(f"launcher.name={cfg.name!r}: there is no such launcher; expected 'local'")
