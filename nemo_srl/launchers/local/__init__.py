"""Runs jobs as processes of this machine: one for each step, or one for each rank under torchrun.

Everything that a job prints goes to `log_dir/<job>.log`. Its progress bars are shown on the console as well. A job that
fails raises `JobFailedError` with the end of its log. An interrupt first stops the job's whole process group.

The job's services run as long as its steps do (see `services.py`). In a run, they stay for the next job if that needs
the same ones, or some of them. So all stages in a row that ask one model share one start of its servers. Any other job
stops them first: its model is another one, or it needs their GPUs. An error stops them, too.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from nemo_srl.errors import ConfigError
from nemo_srl.launchers import LauncherBackend
from nemo_srl.launchers.processes import SAVE_SECONDS, log_file, nodes_key, run_step, step_failed
from nemo_srl.launchers.services import RunningServices, check_for_a_moment, running
from nemo_srl.protocols import Job, JobStep, Service


@dataclass
class LocalSettings:
    """`launcher=local`: processes of this machine. There is nothing to set."""

    name: str = "local"


class LocalLauncher:
    """Implements `nemo_srl.protocols.Launcher`. With `keep_services`, services stay until another job or `close`."""

    def __init__(self, *, keep_services: bool = False) -> None:
        self._keep = keep_services
        self._needed: Sequence[Service] = ()
        self._services = RunningServices(())
        self._stopping = ExitStack()

    def run(self, job: Job) -> None:
        """Run the steps one after the other. Raises `JobFailedError` and `ConfigError`."""
        check({nodes_key(job): job.num_nodes})
        job.log_dir.mkdir(parents=True, exist_ok=True)
        try:
            services = self._running(job)
            for step in job.steps:
                env = {**environment(step, job), **services.environment}
                if code := run_step(_command(step, job), env, log_file(job), services):
                    if job.services:
                        check_for_a_moment(services.failure)
                    raise step_failed(job, step, code)
        except BaseException:
            self.close()
            raise
        if not self._keep:
            self.close()

    def close(self) -> None:
        """Stop the services."""
        self._needed = ()
        self._stopping.close()

    def _running(self, job: Job) -> RunningServices:
        """The services of a job: those of the job before, if they are well and all it needs, and otherwise new ones.

        Services are the same if their commands are. So the model is the same: its path and its digest are in there.
        """
        if job.services and all(s in self._needed for s in job.services) and self._services.are_healthy():
            self._services.note(f"kept for {job.name}")
            return self._services
        self.close()
        found = running(job.services, job_name=job.name, log_dir=job.log_dir)
        self._services, self._needed = self._stopping.enter_context(found), job.services
        return self._services


def check(num_nodes: Mapping[str, int]) -> None:
    """Refuse more than one node. Given: the setting's key and value."""
    for key, value in num_nodes.items():
        if value > 1:
            raise ConfigError(
                f"{key}={value}: launcher.name='local' runs on this machine only. Use {key}=1, or a cluster's launcher "
                "(launcher=slurm cluster=...)."
            )


def _command(step: JobStep, job: Job) -> list[str]:
    command = list(step.command)
    if not step.distributed or job.num_ranks_per_node == 1:
        return [sys.executable, *command]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={job.num_ranks_per_node}"]
    return [sys.executable, *launcher, *command]


def environment(step: JobStep, job: Job) -> dict[str, str]:
    """This process's environment, the job's own, and one share of the cores for each rank."""
    ranks = job.num_ranks_per_node if step.distributed else 1
    threads = max(1, len(os.sched_getaffinity(0)) // ranks)
    # So long, torchrun lets ranks save after Ctrl-C. An older torch does not know the variable, and gives them 30 s.
    ours = {"OMP_NUM_THREADS": str(threads), "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SAVE_SECONDS)}
    return {**ours, **os.environ, "PYTHONUNBUFFERED": "1", **job.env}


BACKEND = LauncherBackend(
    settings=LocalSettings,
    open=lambda settings, cluster: LocalLauncher(keep_services=True),
    check=check,
    close=LocalLauncher.close,
)
