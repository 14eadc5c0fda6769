"""Runs every stage as steps inside the Slurm allocation that the orchestrator itself runs in.

Use it with `sbatch recipes/iterate.sbatch`, or in an interactive `salloc`. No stage waits in the queue. On the other
hand, the allocation holds all its nodes while a stage uses fewer. Each node unpacks an image once. Stages in a row that
ask one model join one step with its servers (`servers.py`). Logs, failures and Ctrl-C are as with the local launcher.
When Slurm tells the steps to save and leave, this raises `StoppedError`, so that the batch script can requeue.

Raises `ConfigError` outside an allocation, and for more nodes than it has.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
from collections.abc import Mapping
from functools import partial

from nemo_srl.config import ClusterConfig
from nemo_srl.errors import ConfigError, StoppedError
from nemo_srl.launchers import LauncherBackend
from nemo_srl.launchers.processes import log_file, nodes_key, run_step, step_failed
from nemo_srl.launchers.slurm.settings import SrunSettings
from nemo_srl.launchers.slurm.steps import (
    container_name,
    removal_of,
    step_command,
    step_environment,
    stopped_file,
    was_stopped,
    write_step_files,
)
from nemo_srl.launchers.srun.servers import ServingSteps
from nemo_srl.protocols import Job
from nemo_srl.shared_storage import VISIBLE_SECONDS


class SrunLauncher:
    """Implements `nemo_srl.protocols.Launcher`."""

    def __init__(self, launcher: SrunSettings, cluster: ClusterConfig) -> None:
        self._launcher = launcher
        self._cluster = cluster
        self._containers: dict[str, int] = {}
        """The names of unpacked images, and the number of nodes that may have them."""
        self._serving = ServingSteps(launcher, cluster, self._commands)

    def run(self, job: Job) -> None:
        """Run the steps one after the other."""
        _check_allocation(job, os.environ)
        job.log_dir.mkdir(parents=True, exist_ok=True)
        if job.services:
            return self._serving.run(job)
        self._serving.end()  # the job needs the GPUs
        token = secrets.token_hex(8)
        env, commands = self._commands(job, token)
        for step, command in zip(job.steps, commands, strict=True):
            code = run_step(command, env, log_file(job), ask_to_stop=partial(_ask_to_stop, _name_of_steps(token)))
            if was_stopped(job):
                raise StoppedError(f"{job.name} was asked to stop in its step {step.name!r}. Run again to go on.")
            if code:
                raise step_failed(job, step, code)

    def close(self) -> None:
        """End the servers, wait for that, and remove the unpacked images."""
        self._serving.end()
        for name, num_nodes in self._containers.items():
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                subprocess.run(removal_of(name, num_nodes), capture_output=True, timeout=120, check=False)
        self._containers = {}

    def _commands(self, job: Job, token: str) -> tuple[dict[str, str], list[list[str]]]:
        """The environment and the commands of a job's steps, after their files were written."""
        write_step_files(job, token=token)
        stopped_file(job).unlink(missing_ok=True)
        own = step_environment(self._cluster, job, token=token)
        container = container_name(self._cluster, job, os.environ["SLURM_JOB_ID"])
        if container:
            self._containers[container] = max(job.num_nodes, self._containers.get(container, 0))
        commands = []
        for step in job.steps:
            command = step_command(
                step, job, rank_idiom=self._launcher.rank_idiom, cluster=self._cluster, env=own,
                container_name=container,
            )  # fmt: skip
            srun, *options = command.srun
            commands.append([srun, f"--job-name={_name_of_steps(token)}", *options, *command.command])
        return {**os.environ, **_meeting_point(os.environ), **own}, commands


def _name_of_steps(token: str) -> str:
    return f"nemo_srl-{token}"


def _ask_to_stop(name: str) -> None:
    """Send TERM to the tasks of the step with this name. srun itself would end them at once."""
    command = ["squeue", "--steps", "--noheader", f"--jobs={os.environ['SLURM_JOB_ID']}", "--format=%i|%j"]
    for line in subprocess.run(command, text=True, capture_output=True, check=False).stdout.splitlines():
        step, _, found = line.strip().partition("|")
        if found == name:
            subprocess.run(["scancel", "--signal=TERM", step], capture_output=True, check=False)


def _check_allocation(job: Job, environ: Mapping[str, str]) -> None:
    if "SLURM_JOB_ID" not in environ:
        raise ConfigError(
            "launcher.name=srun: there is no Slurm allocation around this process. Use `sbatch "
            "recipes/iterate.sbatch`, or launcher=slurm, which submits jobs."
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


BACKEND = LauncherBackend(
    settings=SrunSettings,
    open=SrunLauncher,
    close=SrunLauncher.close,
    ask_to_stop=_ask_job_to_stop,
    holds="allocation",
    visible_seconds=VISIBLE_SECONDS,
)
