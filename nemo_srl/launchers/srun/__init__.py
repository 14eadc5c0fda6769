"""Runs every stage as steps inside the Slurm allocation that the orchestrator itself runs in.

Use it with `sbatch recipes/iterate.sbatch`, or in an interactive `salloc`. No stage waits in the queue. On the other
hand, the allocation holds all its nodes while a stage uses fewer. Logs, failures and Ctrl-C are as with the local
launcher. When Slurm tells the steps to save and leave, this raises `StoppedError`, so that the batch script can
requeue.

Raises `ConfigError` outside an allocation, and for more nodes than it has.
"""

from __future__ import annotations

import os
import secrets
import subprocess
from collections.abc import Mapping

from nemo_srl.config import ClusterConfig
from nemo_srl.errors import ConfigError, StoppedError
from nemo_srl.launchers import LauncherBackend
from nemo_srl.launchers.processes import log_file, nodes_key, run_step, step_failed
from nemo_srl.launchers.slurm.settings import SrunSettings
from nemo_srl.launchers.slurm.steps import step_command, step_environment, stopped_file, write_step_files
from nemo_srl.protocols import Job


class SrunLauncher:
    """Implements `nemo_srl.protocols.Launcher`."""

    def __init__(self, launcher: SrunSettings, cluster: ClusterConfig) -> None:
        self._launcher = launcher
        self._cluster = cluster

    def run(self, job: Job) -> None:
        """Run the steps one after the other."""
        _check_allocation(job, os.environ)
        job.log_dir.mkdir(parents=True, exist_ok=True)
        token = secrets.token_hex(8)
        write_step_files(job, token=token)
        own = step_environment(self._cluster, job, token=token)
        stopped = stopped_file(job)
        stopped.unlink(missing_ok=True)
        env = {**os.environ, **_meeting_point(os.environ), **own}
        for step in job.steps:
            rank_idiom = self._launcher.rank_idiom
            command = step_command(step, job, rank_idiom=rank_idiom, cluster=self._cluster, env=own)
            code = run_step([*command.srun, *command.command], env, log_file(job))
            if stopped.exists():
                raise StoppedError(f"{job.name} was asked to stop in its step {step.name!r}. Run again to go on.")
            if code:
                raise step_failed(job, step, code)


def _check_allocation(job: Job, environ: Mapping[str, str]) -> None:
    if "SLURM_JOB_ID" not in environ:
        raise ConfigError(
            "launcher.name=srun: there is no Slurm allocation around this process. Use `sbatch "
            "recipes/iterate.sbatch`, or launcher=slurm, which makes an allocation for every stage."
        )
    if job.num_nodes > (available := int(environ.get("SLURM_NNODES", "1"))):
        raise ConfigError(
            f"{nodes_key(job)}={job.num_nodes}: the allocation has {available} nodes. Ask for more with "
            f"`sbatch --nodes={job.num_nodes}`."
        )


def _meeting_point(environ: Mapping[str, str]) -> dict[str, str]:
    """Where the ranks of a step meet: on the first node of the allocation, which is also the first of every step."""
    nodes = environ["SLURM_JOB_NODELIST"]
    done = subprocess.run(["scontrol", "show", "hostnames", nodes], text=True, capture_output=True, check=False)
    if done.returncode:
        raise ConfigError(f"scontrol show hostnames {nodes}: {done.stderr.strip()}")
    port = 20000 + int(environ["SLURM_JOB_ID"]) % 10000
    return {"MASTER_ADDR": done.stdout.split()[0], "MASTER_PORT": str(port)}


def _ask_job_to_stop(job: Job) -> None:
    """As recipes/iterate.sbatch does: TERM for all steps of the allocation, and not for its script."""
    command = ["scancel", "--signal=TERM", os.environ["SLURM_JOB_ID"]]
    done = subprocess.run(command, text=True, capture_output=True, check=False)
    if done.returncode:
        raise ConfigError(f"{' '.join(command)}: {done.stderr.strip()}")


BACKEND = LauncherBackend(settings=SrunSettings, open=SrunLauncher, ask_to_stop=_ask_job_to_stop)
