"""The Slurm cluster that work runs on. Nothing here decides a result."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from nemo_srl.config.check import check


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
    """Stages that call models. Nodes and GPUs: the sizes in `engine`."""
    cpu: ResourcesConfig = field(default_factory=ResourcesConfig)
    """Stages that do neither."""
    stages: dict[str, ResourcesConfig] = field(default_factory=dict)
    """What a single stage needs differently, by its name: `{policy: {time: 2-00:00:00}}`."""

    def __post_init__(self) -> None:
        check(self.gpus_per_node is None or self.gpus_per_node >= 1, "cluster.gpus_per_node", self.gpus_per_node,
               "must be at least 1, or null where Slurm does not know GPUs")  # fmt: skip
        for mount in self.mounts:
            check(mount.startswith("/") and "," not in mount, "cluster.mounts", mount, "must be an absolute path")
