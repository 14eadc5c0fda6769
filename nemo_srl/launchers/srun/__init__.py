"""Runs every stage as steps inside the Slurm allocation that the orchestrator itself runs in.

For `sbatch recipes/iterate.sbatch`, or an interactive `salloc`. Nothing is queued between stages; in exchange,
all nodes are held while a stage uses fewer. Logs, failures and Ctrl-C are as with the local launcher. When
Slurm has the steps save and leave, this raises `StoppedError`, so that the batch script can requeue.

Raises `ConfigError` outside an allocation, or for more nodes than it has.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from nemo_srl.config import ClusterConfig
from nemo_srl.config.check import check
from nemo_srl.errors import ConfigError, JobFailedError, StoppedError
from nemo_srl.launchers import LauncherBackend, with_services
from nemo_srl.launchers.logs import how_it_ended, tail
from nemo_srl.launchers.processes import nodes_key, run_step
from nemo_srl.launchers.slurm.settings import RANK_IDIOMS
from nemo_srl.launchers.slurm.steps import (
    canary_file,
    services_file,
    step_command,
    step_environment,
    stopped_file,
)
from nemo_srl.protocols import Job, Launcher


@dataclass
class SrunSettings:
    """`launcher=srun`: steps inside the allocation that the orchestrator itself runs in (`recipes/iterate.sbatch`)."""

    name: str = "srun"
    rank_idiom: str = "srun"
    """How the ranks of a training start. srun: one Slurm task per rank. The ranks themselves hear of a time limit, and
    save. torchrun: one task per node, and torch's launcher starts the ranks."""

    def __post_init__(self) -> None:
        check(self.rank_idiom in RANK_IDIOMS, "launcher.rank_idiom", self.rank_idiom, f"must be one of {RANK_IDIOMS}")


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
        canary_file(job).write_text(token)
        if job.services:
            spec = with_services.to_spec(job)
            services_file(job).write_text(json.dumps(spec, indent=2) + "\n")
        own = step_environment(self._cluster, job, token=token)
        stopped = stopped_file(job)
        stopped.unlink(missing_ok=True)
        env = {**os.environ, **_meeting_point(os.environ), **own}
        log_path = job.log_dir / f"{job.name}.log"
        for step in job.steps:
            idiom = self._launcher.rank_idiom
            command = step_command(step, job, rank_idiom=idiom, cluster=self._cluster, env=own)
            code = run_step([*command.srun, *command.command], env, log_path)
            if stopped.exists():
                raise StoppedError(f"{job.name} was asked to stop in its step {step.name!r}; run again to go on")
            if code:
                how = how_it_ended(code)
                raise JobFailedError(f"{job.name} failed in its step {step.name!r} {how}\n{tail(log_path)}")


def _check_allocation(job: Job, environ: Mapping[str, str]) -> None:
    if "SLURM_JOB_ID" not in environ:
        raise ConfigError(
            "launcher.name=srun: there is no Slurm allocation around this process. Use `sbatch "
            "recipes/iterate.sbatch`, or launcher=slurm, which makes an allocation for every stage."
        )
    if job.num_nodes > (available := int(environ.get("SLURM_NNODES", "1"))):
        raise ConfigError(
            f"{nodes_key(job)}={job.num_nodes}: the allocation has {available} nodes; ask for more with "
            f"`sbatch --nodes={job.num_nodes}`"
        )


def _meeting_point(environ: Mapping[str, str]) -> dict[str, str]:
    """Where the ranks of a step meet: its first node is the allocation's first."""
    nodes = environ["SLURM_JOB_NODELIST"]
    done = subprocess.run(["scontrol", "show", "hostnames", nodes], text=True, capture_output=True, check=False)
    if done.returncode:
        raise ConfigError(f"scontrol show hostnames {nodes}: {done.stderr.strip()}")
    port = 20000 + int(environ["SLURM_JOB_ID"]) % 10000
    return {"MASTER_ADDR": done.stdout.split()[0], "MASTER_PORT": str(port)}


def _open(settings: SrunSettings, cluster: ClusterConfig) -> Launcher:
    return SrunLauncher(settings, cluster)


BACKEND = LauncherBackend(settings=SrunSettings, open=_open)
