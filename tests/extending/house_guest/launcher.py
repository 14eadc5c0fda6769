"""A launcher: runs jobs as `local` does, at a low priority, and keeps a list of them."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass

from nemo_srl.config import ClusterConfig
from nemo_srl.launchers import LauncherBackend, local
from nemo_srl.protocols import Job, Launcher


@dataclass
class PoliteSettings:
    name: str = "house_guest.launcher"
    niceness: int = 10
    """Added to the priority number of this process and of all that it starts: 0 changes nothing, 19 is the lowest."""
    job_list: str = "jobs.jsonl"
    """A file in the directory of logs. It gets a line for each job."""


class PoliteLauncher:
    def __init__(self, settings: PoliteSettings) -> None:
        self._job_list = settings.job_list
        os.nice(settings.niceness)

    def run(self, job: Job) -> None:
        started = time.monotonic()
        local.LocalLauncher().run(job)
        line = {"name": job.name, "role": job.role, "seconds": round(time.monotonic() - started, 1)}
        with (job.log_dir / self._job_list).open("a") as file:
            file.write(json.dumps(line) + "\n")


def _open(settings: PoliteSettings, cluster: ClusterConfig) -> Launcher:
    return PoliteLauncher(settings)


BACKEND = LauncherBackend(settings=PoliteSettings, open=_open, check=local.check)
