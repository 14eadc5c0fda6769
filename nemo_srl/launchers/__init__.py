"""Launchers: where a stage's processes run."""

from __future__ import annotations

from nemo_srl.config import ClusterConfig, LauncherConfig
from nemo_srl.errors import ConfigError
from nemo_srl.protocols import Launcher


def open_launcher(cfg: LauncherConfig, cluster: ClusterConfig) -> Launcher:
    """The launcher named by `launcher.name`. Raises `ConfigError` for an unknown name."""
    match cfg.name:
        case "local":
            from nemo_srl.launchers.local import LocalLauncher

            return LocalLauncher()
        case "slurm":
            from nemo_srl.launchers.slurm import SlurmLauncher

            return SlurmLauncher(cfg, cluster)
        case "srun":
            from nemo_srl.launchers.srun import SrunLauncher

            return SrunLauncher(cfg, cluster)
        case _:
            raise ConfigError(
                f"launcher.name={cfg.name!r}: there is no such launcher; choose 'local', 'slurm' or 'srun'"
            )
