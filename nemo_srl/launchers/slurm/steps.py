"""How a step of a job is started under Slurm: srun's options around `task.sh`, which every task runs.

Each special option is here because its absence has failed:
- `--ntasks` is always given with `--ntasks-per-node`. Otherwise a step keeps the task count of its job.
- There is only one `--container-mounts`, because Slurm keeps the last of several.
- `--container-env` names our variables. Otherwise a variable that the image sets wins over ours.
- `--container-name`, where several steps have one image. Otherwise pyxis unpacks 20 GB for each step.
- `--overlap`: otherwise a step waits until Slurm has cleaned up the step before it.
- `--cpu-bind=none`: otherwise each of eight ranks on a node may be confined to one core.
- `--unbuffered`: otherwise progress bars wait for the end of a line.
- Every task first reads the canary, a file with a random token. If a node does not share the run directory, other
  failures would not name the cause.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from nemo_srl.artifacts import digest_of, write_atomic
from nemo_srl.config import ClusterConfig, ResourcesConfig
from nemo_srl.errors import ConfigError
from nemo_srl.launchers.with_services import num_nodes as num_nodes_of
from nemo_srl.launchers.with_services import to_spec
from nemo_srl.protocols import Job, JobStep
from nemo_srl.shared_storage import VISIBLE_SECONDS, VISIBLE_VARIABLE, ask_again

PROJECT_ROOT = Path(__file__).resolve().parents[3]
TASK_SCRIPT = Path(__file__).with_name("task.sh")
REMOVAL_SCRIPT = Path(__file__).with_name("remove_container.sh")


@dataclass(frozen=True)
class StepCommand:
    """`srun` runs `command` in every task."""

    name: str
    srun: tuple[str, ...]
    command: tuple[str, ...]


def resources(cluster: ClusterConfig, job: Job) -> ResourcesConfig:
    """What the job asks for. Its stage's settings win over those of its role, and these over the cluster's."""
    wider = ResourcesConfig(partition=cluster.partition, time=cluster.time, env=cluster.env)
    role: ResourcesConfig = getattr(cluster, job.role)
    chosen: dict[str, Any] = {}
    for layer in (wider, role, cluster.stages.get(job.stage, ResourcesConfig())):
        given = {f.name: getattr(layer, f.name) for f in fields(layer)}
        merged = {key: {**chosen.get(key, {}), **given.pop(key)} for key in ("env", "sbatch")}
        chosen |= {key: value for key, value in given.items() if value is not None} | merged
    return ResourcesConfig(**chosen)


def gpus_per_node(cluster: ClusterConfig, job: Job) -> int | None:
    """How many GPUs to ask Slurm for. None: ask for none. Raises `ConfigError` for more than a node has."""
    if cluster.gpus_per_node is None or job.num_gpus_per_node == 0:
        return None
    if job.num_gpus_per_node > cluster.gpus_per_node:
        remedy = {
            "trainer": "trainer.devices and trainer.num_nodes",
            "engine": "engine.num_replicas, engine.num_nodes and the parallel sizes of engine",
        }[job.role]
        raise ConfigError(
            f"{job.name} needs {job.num_gpus_per_node} GPUs on a node, and cluster.gpus_per_node="
            f"{cluster.gpus_per_node}. Change {remedy}."
        )
    return job.num_gpus_per_node


def step_environment(cluster: ClusterConfig, job: Job, *, token: str) -> dict[str, str]:
    """What every step finds in its environment, beside MASTER_ADDR and MASTER_PORT."""
    return {
        "PYTHONUNBUFFERED": "1",
        **resources(cluster, job).env,
        **job.env,
        VISIBLE_VARIABLE: str(VISIBLE_SECONDS),
        "NEMO_SRL_CANARY": str(canary_file(job)),
        "NEMO_SRL_TOKEN": token,
        "NEMO_SRL_STOPPED": str(stopped_file(job)),
        "NEMO_SRL_RANKS_PER_NODE": str(job.num_ranks_per_node),
    }


def step_command(
    step: JobStep, job: Job, *, rank_idiom: str, cluster: ClusterConfig, env: Iterable[str], container_name: str = ""
) -> StepCommand:
    """The step under srun.

    `env` names the variables that must survive a container's own environment. Steps with the same `container_name`
    share one unpacked image on each node.
    """
    asked = resources(cluster, job)
    assert not (step.distributed and job.services)
    # A step that is not distributed has a task on every node that has services.
    num_nodes = job.num_nodes if step.distributed else num_nodes_of(job)
    kind = rank_idiom.replace("srun", "rank") if step.distributed else "node" if num_nodes > 1 else "one"
    tasks_per_node = job.num_ranks_per_node if kind == "rank" else 1
    srun = [
        f"--nodes={num_nodes}", f"--ntasks={num_nodes * tasks_per_node}", f"--ntasks-per-node={tasks_per_node}",
        "--relative=0", "--overlap", "--kill-on-bad-exit=1", "--wait=60", "--unbuffered", "--cpu-bind=none",
    ]  # fmt: skip
    if asked.cpus_per_task is not None:
        srun.append(f"--cpus-per-task={asked.cpus_per_task * (job.num_ranks_per_node if kind == 'torchrun' else 1)}")
    if (gpus := gpus_per_node(cluster, job)) is not None:
        srun.append(f"--gpus-per-node={gpus}")
    if cluster.mpi is not None:
        srun.append(f"--mpi={cluster.mpi}")
    srun += _where_to_run(asked, cluster, job, env, container_name)
    python = asked.python or ("python" if asked.container else sys.executable)
    command = [python, *step.command]
    if job.services:
        command = [python, "-m", "nemo_srl.launchers.with_services", str(services_file(job)), *command]
    return StepCommand(step.name, ("srun", *srun), ("bash", str(TASK_SCRIPT), kind, *command))


def parts(job: Job) -> list[Job]:
    """The batch jobs for a job: mostly one. A training on several nodes has three.

    The steps before and after the training run on one node. In one job, the other nodes would wait for them: it takes
    minutes to convert a model of 70B parameters, and as long to convert it back. The training's job, which keeps the
    name, begins with the first steps again. They find their work done, and only tidy up what a killed training left.
    """
    distributed = [i for i, step in enumerate(job.steps) if step.distributed]
    if job.num_nodes == 1 or not distributed:
        return [job]
    before, after = job.steps[: distributed[0]], job.steps[distributed[-1] + 1 :]
    single = [replace(job, name=f"{job.name}-{s[0].name}", num_nodes=1, steps=s) for s in (before, after) if s]
    training = replace(job, steps=job.steps[: distributed[-1] + 1])
    return [*single[:1], training, *single[1:]] if before else [training, *single]


def container_name(cluster: ClusterConfig, job: Job, shared_by: str) -> str:
    """The name of the container of all steps with the job's image. `shared_by` names those that share it.

    "" without a container.
    """
    image = resources(cluster, job).container
    return f"nemo_srl-{shared_by}-{digest_of(image)[:8]}" if image else ""


def removal_of(container_name: str, num_nodes: int) -> tuple[str, ...]:
    """The command that removes the unpacked image on the first nodes of a job."""
    nodes = (f"--nodes={num_nodes}", f"--ntasks={num_nodes}", "--ntasks-per-node=1", "--relative=0")
    return "srun", *nodes, "--overlap", "bash", str(REMOVAL_SCRIPT), container_name


def canary_file(job: Job) -> Path:
    """Holds the submission's token. A node that cannot read it does not share the run directory."""
    return job.log_dir / f"{job.name}.canary"


def stopped_file(job: Job) -> Path:
    """It is there if a step was asked to stop and saved its work."""
    return job.log_dir / f"{job.name}.stopped"


def was_stopped(job: Job) -> bool:
    """Whether a step was asked to stop and saved its work. Another node may just have said so."""
    ask_again(job.log_dir)
    return stopped_file(job).exists()


def cancelled_file(job: Job) -> Path:
    """It is there after Ctrl-C: the job ends when its work is saved, and must not be requeued."""
    return job.log_dir / f"{job.name}.cancelled"


def services_file(job: Job) -> Path:
    """Tells `with_services` which servers the job's steps need."""
    return job.log_dir / f"{job.name}.services.json"


def write_step_files(job: Job, *, token: str) -> None:
    """Write what `task.sh` and `with_services` read. The canary is last: who sees it sees the other file, too."""
    if job.services:
        write_atomic(services_file(job), json.dumps(to_spec(job), indent=2) + "\n")
    write_atomic(canary_file(job), token)


def _where_to_run(
    asked: ResourcesConfig, cluster: ClusterConfig, job: Job, env: Iterable[str], container_name: str
) -> list[str]:
    """Options of srun for the project's directory, from which Python finds `-m nemo_srl...`, and for the container."""
    if asked.container is None:
        return [f"--chdir={PROJECT_ROOT}"]
    paths = dict.fromkeys(str(p) for p in (PROJECT_ROOT, *job.paths))  # each once, in the order of the job
    mounts = [*(f"{p}:{p}" for p in paths), *cluster.mounts]
    for mount in mounts:
        if "," in mount:
            raise ConfigError(f"{mount}: a path with a comma cannot be mounted into a container. Rename it.")
    return [
        f"--container-image={asked.container}",
        *([f"--container-name={container_name}"] if container_name else []),
        f"--container-mounts={','.join(mounts)}",
        f"--container-workdir={PROJECT_ROOT}",
        "--no-container-mount-home",
        f"--container-env={','.join([*env, 'MASTER_ADDR', 'MASTER_PORT'])}",
    ]
