"""A launcher of a user's own: it notes the jobs and runs them on this machine."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_srl.config import ClusterConfig
from nemo_srl.launchers import LauncherBackend
from nemo_srl.launchers.local import LocalLauncher
from nemo_srl.protocols import Job


@dataclass
class NotingSettings:
    name: str = "tests.user_launcher"
    file: str = "notes"


class NotingLauncher:
    def __init__(self, settings: NotingSettings, cluster: ClusterConfig) -> None:
        self._file = settings.file

    def run(self, job: Job) -> None:
        job.log_dir.mkdir(exist_ok=True)
        with (job.log_dir / self._file).open("a") as f:
            f.write(f"{job.name} as {job.role}\n")
        LocalLauncher().run(job)


BACKEND = LauncherBackend(settings=NotingSettings, open=NotingLauncher)
