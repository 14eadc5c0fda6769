"""The cluster that a check examines: the recipe, and how a check runs a small job through the recipe's own launcher.

Jobs have the recipe's containers, mounts, environment and srun options. They use two nodes at most, and short time
limits, so that they start soon.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from nemo_srl import jsonio
from nemo_srl.artifacts import write_atomic
from nemo_srl.config import ClusterConfig, Config, ResourcesConfig
from nemo_srl.engines import EngineSize, engine_backend
from nemo_srl.errors import JobFailedError
from nemo_srl.launchers import launcher_backend, open_launcher
from nemo_srl.protocols import Job, JobRole, JobStep, Service
from nemo_srl.shared_storage import VISIBLE_SECONDS, appears
from nemo_srl.workload import Assumptions

PROJECT_ROOT = Path(__file__).resolve().parents[2]
TIME_LIMIT = "00:30:00"
"""Of each job. A container of 30 GB may take minutes to start for the first time."""
SIGNAL_SECONDS = 120
"""`launcher.signal_seconds` must be below the time limit."""
MAX_NODES = 2


@dataclass
class Site:
    """What checks know. `directory` is absolute, and all nodes must see it."""

    cfg: Config
    assumptions: Assumptions
    directory: Path
    facts: dict[JobRole, list[dict[str, Any]]] = field(default_factory=dict)
    """What the probes found on each node, by role. See `probe.py`."""
    result_delays: list[float] = field(default_factory=list)
    """Seconds from the end of a job until this machine saw its files."""

    @property
    def trainer_nodes(self) -> int:
        return min(MAX_NODES, int(self.cfg.trainer.num_nodes))

    @property
    def engine_size(self) -> EngineSize:
        return engine_backend(self.cfg.engine).size(self.cfg.engine)

    @property
    def engine_nodes(self) -> int:
        return min(MAX_NODES, self.engine_size.num_nodes)

    @property
    def cluster(self) -> ClusterConfig:
        """The recipe's cluster, with this program's time limits."""
        given = self.cfg.cluster

        def short(role: ResourcesConfig) -> ResourcesConfig:
            return replace(role, time=TIME_LIMIT)

        return replace(given, time=TIME_LIMIT, trainer=short(given.trainer), engine=short(given.engine), stages={})

    @property
    def launcher(self) -> Any:
        """The recipe's launcher. It must warn jobs before the short time limit, and not after it."""
        given = self.cfg.launcher
        return with_known(given, signal_seconds=min(SIGNAL_SECONDS, getattr(given, "signal_seconds", SIGNAL_SECONDS)))

    def job(
        self, name: str, steps: Sequence[JobStep], *, role: JobRole, num_nodes: int = 1, num_ranks_per_node: int = 1,
        num_gpus_per_node: int = 0, services: Sequence[Service] = (),
    ) -> Job:  # fmt: skip
        return Job(
            name=name, steps=steps, log_dir=self.directory / "logs", role=role, paths=[self.directory],
            num_nodes=num_nodes, num_ranks_per_node=num_ranks_per_node, num_gpus_per_node=num_gpus_per_node,
            services=services,
        )  # fmt: skip

    def run(self, job: Job) -> None:
        """Run a job to its end. Raises what the launcher does."""
        launcher = open_launcher(self.launcher, self.cluster)
        try:
            launcher.run(job)
        finally:
            launcher_backend(self.launcher).close(launcher)

    def write(self, name: str, value: Mapping[str, Any]) -> Path:
        """Write what a job reads, as JSON."""
        path = self.directory / name
        write_atomic(path, jsonio.dumps(value, indent=2) + "\n")
        return path

    def read(self, name: str, *, seconds: float = VISIBLE_SECONDS) -> Any:
        """Read what a job wrote. Waits until it is visible here. Raises `JobFailedError` if it does not come."""
        path, began = self.directory / name, time.monotonic()
        if not appears(path.exists, path.parent, seconds):
            raise JobFailedError(
                f"the job has ended, and its file {path} is not visible on this machine after {seconds:g} s"
            )
        self.result_delays.append(time.monotonic() - began)
        return jsonio.loads(path.read_bytes())


def wait_until(condition: Callable[[], object], seconds: float, *, every: float = 0.05) -> bool:
    """Poll until the condition holds or the time is over. Returns whether it holds."""
    deadline = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < deadline:
        time.sleep(every)
    return bool(found)


def with_known(settings: Any, **changes: Any) -> Any:
    """`settings` with those of the `changes` for which it has a field."""
    known = {f.name for f in fields(settings)}
    return replace(settings, **{key: value for key, value in changes.items() if key in known})
