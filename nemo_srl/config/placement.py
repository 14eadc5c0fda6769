"""The Slurm cluster that work runs on. Nothing here decides a result."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from nemo_srl.config.check import check


@dataclass
class ResourcesConfig:
    """What one kind of job asks Slurm for. null: the setting of the whole cluster, or else Slurm's default."""

    container: str | None = None
    """Image for pyxis: `nvcr.io#nvidia/nemo:25.02`, or the path of a `.sqsh` file. null: no container."""
    python: str | None = None
    """Interpreter that runs the steps. null: `python` in a container, else the orchestrator's own."""
    partition: str | None = None
    time: str | None = None
    """Time limit in a format of Slurm (`04:00:00`, `2-00:00:00`, minutes)."""
    env: dict[str, str] = field(default_factory=dict)
    """Environment variables, over those of the whole cluster."""
    cpus_per_task: int | None = None
    """null: with `cluster.exclusive`, tasks share all cores of their node."""
    sbatch: dict[str, Any] = field(default_factory=dict)
    """Further options of sbatch by their long names, such as `{constraint: h100}`. null: an option without a value."""


@dataclass
class ClusterConfig:
    """A Slurm cluster, for launcher.name=slurm and srun. `conf/cluster/` has one file per cluster."""

    account: str | None = None
    partition: str | None = None
    """For every job that does not set its own. The same holds for `time`."""
    time: str = "04:00:00"
    gpus_per_node: int | None = None
    """GPUs of a node. null: do not ask Slurm for GPUs, because it has no GRES for them or there are none."""
    exclusive: bool = True
    """true: whole nodes with all their memory. false: nodes are shared with other jobs; then set `cpus_per_task` and
    `sbatch: {mem: ...}`."""
    mpi: str | None = None
    """`srun --mpi`. null: the cluster's default. Containers of NGC mostly need `pmix`."""
    mounts: list[str] = field(default_factory=list)
    """Directories to mount into containers, as `/host` or `/host:/container`. The run directory, this project, models
    and data are always mounted, at their own paths, and also where links in them lead."""
    env: dict[str, str] = field(default_factory=dict)
    """Environment variables of every step. They override those of a container image. `trainer`, `engine` and `stages`
    have variables of their own beside them."""
    setup: list[str] = field(default_factory=list)
    """Shell lines that run on the first node of a job before its steps, outside the container: `module load ...`."""
    trainer: ResourcesConfig = field(default_factory=ResourcesConfig)
    """Stages that train. `trainer` sets their nodes and ranks."""
    engine: ResourcesConfig = field(default_factory=ResourcesConfig)
    """Stages that call models. `engine` sets their nodes and GPUs."""
    stages: dict[str, ResourcesConfig] = field(default_factory=dict)
    """Other values for single stages, by name: `{policy: {time: 2-00:00:00}}`."""

    def __post_init__(self) -> None:
        check(self.gpus_per_node is None or self.gpus_per_node >= 1, "cluster.gpus_per_node", self.gpus_per_node,
               "must be at least 1, or null where Slurm does not know GPUs")  # fmt: skip
        for mount in self.mounts:
            check(mount.startswith("/") and "," not in mount, "cluster.mounts", mount, "must be an absolute path")
