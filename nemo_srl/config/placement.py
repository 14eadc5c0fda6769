"""Where the work runs: launchers, and the Slurm cluster. Nothing here decides a result."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from nemo_srl.config.check import check


@dataclass
class LauncherConfig:
    name: str = "local"
    """local: processes of this machine. slurm: one batch job per stage, submitted from a login node and
    followed. srun: steps inside the allocation that the orchestrator itself runs in (`recipes/iterate.sbatch`)."""
    rank_idiom: str = "srun"
    """slurm, srun: how the ranks of a training start. srun: one Slurm task per rank; the ranks hear of a time
    limit themselves and save. torchrun: one task per node, and torch's launcher starts the ranks."""
    signal_seconds: int = 600
    """slurm: so long before the time limit a job is told to save and leave; then it is requeued. A training ends
    its step and writes a checkpoint in that time."""
    max_requeues: int = 20
    """slurm: restarts of one job after time limits, preemption and dead nodes, before it is given up."""
    poll_seconds: float = 10.0
    """slurm: between two looks at a job's state and log. Each look at the state asks Slurm's controller."""

    def __post_init__(self) -> None:
        idioms = ("srun", "torchrun")
        check(self.rank_idiom in idioms, "launcher.rank_idiom", self.rank_idiom, f"must be one of {idioms}")
        check(self.signal_seconds >= 1, "launcher.signal_seconds", self.signal_seconds, "must be at least 1")
        check(self.max_requeues >= 0, "launcher.max_requeues", self.max_requeues, "must be 0 or above")
        check(self.poll_seconds > 0, "launcher.poll_seconds", self.poll_seconds, "must be above 0")


@dataclass
class ResourcesConfig:
    """What one kind of job asks Slurm for; null leaves it to the next wider setting, then to Slurm."""

    container: str | None = None
    """Image for pyxis: `nvcr.io#nvidia/nemo:25.02`, or a `.sqsh` file by its path. null: no container."""
    python: str | None = None
    """Interpreter that runs the steps. null: `python` in a container, else the orchestrator's own."""
    partition: str | None = None
    time: str | None = None
    """Time limit, in Slurm's ways of writing one (`04:00:00`, `2-00:00:00`, minutes)."""
    cpus_per_task: int | None = None
    """null: with `cluster.exclusive`, tasks share all cores of their node."""
    sbatch: dict[str, Any] = field(default_factory=dict)
    """Further options of sbatch by their long names, such as `{constraint: h100}`; null for one without value."""


@dataclass
class ClusterConfig:
    """A Slurm cluster, for launcher.name=slurm and srun; one file per cluster in `conf/cluster/`. Placement."""

    account: str | None = None
    partition: str | None = None
    """For every job that does not name its own, as `time` below."""
    time: str = "04:00:00"
    gpus_per_node: int | None = None
    """GPUs of a node. null: Slurm is not asked for GPUs, since it has no GRES for them or there are none."""
    exclusive: bool = True
    """Whole nodes. false shares nodes with other jobs; then say `cpus_per_task`, and `sbatch: {mem: ...}`."""
    mpi: str | None = None
    """`srun --mpi`. null: the cluster's default. `pmix` is what NGC containers are mostly started with."""
    mounts: list[str] = field(default_factory=list)
    """Mounted into containers, as `/host` or `/host:/container`, beside what a job is known to need: the run
    directory, this project, models and data, all at their own paths."""
    env: dict[str, str] = field(default_factory=dict)
    """Environment of every step, over what a container image sets."""
    setup: list[str] = field(default_factory=list)
    """Lines of shell run on the first node of a job before its steps, outside the container: `module load ...`."""
    trainer: ResourcesConfig = field(default_factory=ResourcesConfig)
    """Stages that train. Nodes and ranks: `trainer.num_nodes`, `trainer.devices`."""
    engine: ResourcesConfig = field(default_factory=ResourcesConfig)
    """Stages that call models. Nodes and GPUs: `engine.trtllm`."""
    cpu: ResourcesConfig = field(default_factory=ResourcesConfig)
    """Stages that do neither."""
    stages: dict[str, ResourcesConfig] = field(default_factory=dict)
    """What a single stage needs differently, by its name: `{policy: {time: 2-00:00:00}}`."""

    def __post_init__(self) -> None:
        check(self.gpus_per_node is None or self.gpus_per_node >= 1, "cluster.gpus_per_node", self.gpus_per_node,
               "must be at least 1, or null where Slurm does not know GPUs")  # fmt: skip
        for mount in self.mounts:
            check(mount.startswith("/") and "," not in mount, "cluster.mounts", mount, "must be an absolute path")
