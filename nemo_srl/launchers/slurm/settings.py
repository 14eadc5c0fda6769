"""Settings of the launchers for Slurm."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_srl.config.check import check

RANK_IDIOMS = ("srun", "torchrun")


@dataclass
class SrunSettings:
    """`launcher=srun`: steps inside the allocation that the orchestrator itself runs in (`recipes/iterate.sbatch`)."""

    name: str = "srun"
    rank_idiom: str = "srun"
    """How the ranks of a training start. srun: one Slurm task per rank, and before a time limit each rank gets the
    signal. torchrun: one task per node, and torch's launcher starts the ranks."""
    idle_seconds: float = 900.0
    """Servers stay for the next stage that asks their model. They end after so long without a stage, in case that the
    orchestrator was killed."""

    def __post_init__(self) -> None:
        check(self.idle_seconds > 0, "launcher.idle_seconds", self.idle_seconds, "must be above 0")
        check(self.rank_idiom in RANK_IDIOMS, "launcher.rank_idiom", self.rank_idiom, f"must be one of {RANK_IDIOMS}")


@dataclass
class SlurmSettings(SrunSettings):
    """`launcher=slurm`: batch jobs, submitted from a login node and followed to their end. There is one for each
    training, and one for all stages in a row that ask one model."""

    name: str = "slurm"
    signal_seconds: int = 600
    """So long before the time limit, a job is told to save and leave. In this time a training ends its step and writes
    a checkpoint. Then the job is requeued."""
    max_requeues: int = 20
    """Restarts of one job after time limits, preemption and dead nodes. After these the job is given up."""
    poll_seconds: float = 10.0
    """Time between two looks at a job's state. Each look asks Slurm's controller."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.signal_seconds >= 1, "launcher.signal_seconds", self.signal_seconds, "must be at least 1")
        check(self.max_requeues >= 0, "launcher.max_requeues", self.max_requeues, "must be 0 or above")
        check(self.poll_seconds > 0, "launcher.poll_seconds", self.poll_seconds, "must be above 0")
