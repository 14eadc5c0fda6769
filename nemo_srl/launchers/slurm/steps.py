"""How a step of a job is started under Slurm: srun's options, and the line of shell that every task runs.

What is special here, each for a reason that was met:
- `--ntasks` is always given with `--ntasks-per-node`, or a step keeps the task count of its job;
- one `--container-mounts` only, since Slurm keeps the last of several;
- variables are named in `--container-env`, or those that an image sets itself win over ours;
- `--cpu-bind=none`, or each of eight ranks on a node may be confined to one core;
- `--unbuffered`, or progress bars wait for the end of a line;
- every task first looks for the canary, a file with a random token, since a run directory that a node does
  not share fails in ways that do not name the cause.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from nemo_srl.config import ClusterConfig, LauncherConfig, ResourcesConfig
from nemo_srl.errors import ConfigError
from nemo_srl.protocols import EXIT_STOPPED, Job, JobStep

STOPPED_VARIABLE = "NEMO_SRL_STOPPED"
"""Names the file that a step leaves when it stopped on request."""
RANK_VARIABLES = ("MASTER_ADDR", "MASTER_PORT", STOPPED_VARIABLE)


@dataclass(frozen=True)
class StepCommand:
    """`srun` runs `bash -c shell` in every task."""

    name: str
    srun: tuple[str, ...]
    shell: str

    @property
    def argv(self) -> list[str]:
        return [*self.srun, "bash", "-c", self.shell]


def resources(cluster: ClusterConfig, job: Job) -> ResourcesConfig:
    """What the job asks for: its stage's settings over those of its role over the cluster's."""
    wider = ResourcesConfig(partition=cluster.partition, time=cluster.time)
    role: ResourcesConfig = getattr(cluster, job.role)
    chosen: dict[str, Any] = {}
    for layer in (wider, role, cluster.stages.get(job.stage, ResourcesConfig())):
        given = {f.name: getattr(layer, f.name) for f in fields(layer)}
        options = {**chosen.get("sbatch", {}), **given.pop("sbatch")}
        chosen |= {key: value for key, value in given.items() if value is not None} | {"sbatch": options}
    return ResourcesConfig(**chosen)


def gpus_per_node(cluster: ClusterConfig, job: Job) -> int | None:
    """GPUs to ask for; None where Slurm is not to be asked. Raises `ConfigError` for more than a node has."""
    if cluster.gpus_per_node is None or job.num_gpus_per_node == 0:
        return None
    if job.num_gpus_per_node > cluster.gpus_per_node:
        remedy = {
            "trainer": "trainer.devices and trainer.num_nodes",
            "engine": "engine.trtllm.num_replicas and its parallel sizes",
            "cpu": "cluster",
        }[job.role]
        raise ConfigError(
            f"{job.name} needs {job.num_gpus_per_node} GPUs on a node, and cluster.gpus_per_node="
            f"{cluster.gpus_per_node}: change {remedy}"
        )
    return job.num_gpus_per_node


def step_command(
    step: JobStep,
    job: Job,
    *,
    launcher: LauncherConfig,
    cluster: ClusterConfig,
    env: Mapping[str, str],
    token: str,
) -> StepCommand:
    """The step under srun. `env` is what the environment already holds and must survive a container's own."""
    asked = resources(cluster, job)
    python = asked.python or ("python" if asked.container else sys.executable)
    distributed = step.distributed and job.num_nodes * job.num_ranks_per_node > 1
    num_nodes = job.num_nodes if distributed else 1
    torchrun = distributed and launcher.rank_idiom == "torchrun"
    tasks_per_node = job.num_ranks_per_node if distributed and not torchrun else 1
    srun = [
        "srun", f"--nodes={num_nodes}", f"--ntasks={num_nodes * tasks_per_node}",
        f"--ntasks-per-node={tasks_per_node}", "--relative=0",
        "--kill-on-bad-exit=1", "--wait=60", "--unbuffered", "--cpu-bind=none",
    ]  # fmt: skip
    if asked.cpus_per_task is not None:
        srun.append(f"--cpus-per-task={asked.cpus_per_task * (job.num_ranks_per_node if torchrun else 1)}")
    if (gpus := gpus_per_node(cluster, job)) is not None:
        srun.append(f"--gpus-per-node={gpus}")
    if cluster.mpi is not None:
        srun.append(f"--mpi={cluster.mpi}")
    srun += _container_options(asked, cluster, job, env)
    lines = [_look_for_canary(job, token)]
    command = [python, *step.command]
    if job.services:
        command = [python, "-m", "nemo_srl.launchers.services", str(services_file(job)), *command]
    if torchrun:
        lines.append(_run(_torchrun(python, step, job)))
    elif distributed:
        lines.append(
            "export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID "
            f"LOCAL_WORLD_SIZE={tasks_per_node} GROUP_RANK=$SLURM_NODEID"
        )
        lines.append(_run(shlex.join(command)))
    else:
        lines.append(_run(shlex.join(command)))
    return StepCommand(step.name, tuple(srun), "\n".join(lines))


def canary_file(job: Job) -> Path:
    return job.log_dir / f"{job.name}.canary"


def services_file(job: Job) -> Path:
    return job.log_dir / f"{job.name}.services.json"


def step_environment(cluster: ClusterConfig, job: Job) -> dict[str, str]:
    return {"PYTHONUNBUFFERED": "1", **cluster.env, **job.env}


def _look_for_canary(job: Job, token: str) -> str:
    path = shlex.quote(str(canary_file(job)))
    message = (
        f"does not see {canary_file(job)}: run_dir must lie on a file system that all nodes share "
        "(in a container: see cluster.mounts)"
    )
    return (
        f'[ "$(cat {path} 2>/dev/null)" = {token} ] || {{ echo "error: $(hostname)" {shlex.quote(message)}; exit 2; }}'
    )


def _run(command: str) -> str:
    # The shell stays, and outlives TERM, to turn the status of a step that stopped on request into the file.
    # Its own trap is not inherited: the program gets TERM as it comes.
    return (
        f"trap : TERM\n{command}\nstatus=$?\n"
        f'if [ "$status" -eq {EXIT_STOPPED} ]; then touch "${STOPPED_VARIABLE}"; exit 0; fi\nexit "$status"'
    )


def _torchrun(python: str, step: JobStep, job: Job) -> str:
    """Static rendezvous: c10d's can end a successful run with a traceback."""
    return (
        f"{shlex.quote(python)} -m torch.distributed.run --nnodes=$SLURM_NNODES --node-rank=$SLURM_NODEID "
        f'--nproc-per-node={job.num_ranks_per_node} --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" '
        f"{shlex.join(step.command)}"
    )


def _container_options(asked: ResourcesConfig, cluster: ClusterConfig, job: Job, env: Mapping[str, str]) -> list[str]:
    project = Path(__file__).resolve().parents[3]
    if asked.container is None:
        return [f"--chdir={project}"]
    paths = sorted({str(p) for p in (project, *job.paths)})
    mounts = [*(f"{p}:{p}" for p in paths), *cluster.mounts]
    for mount in mounts:
        if "," in mount:
            raise ConfigError(f"{mount}: a path with a comma cannot be mounted into a container; rename it")
    return [
        f"--container-image={asked.container}",
        f"--container-mounts={','.join(mounts)}",
        f"--container-workdir={project}",
        "--no-container-mount-home",
        f"--container-env={','.join([*env, *RANK_VARIABLES])}",
    ]
