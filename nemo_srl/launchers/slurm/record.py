"""The record of a submission, `<job>.slurm.json`: by it, an orchestrator that was killed finds its job again."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from nemo_srl import jsonio
from nemo_srl.artifacts import write_atomic
from nemo_srl.errors import DataError
from nemo_srl.protocols import Job


@dataclass(frozen=True)
class Submission:
    """The record in `<job>.slurm.json`. Without a `job_id`, nobody knows whether sbatch was called."""

    token: str
    job_id: str | None = None
    num_submissions: int = 1

    @property
    def comment(self) -> str:
        return f"nemo_srl:{self.token}"


def record_file(log_dir: Path, name: str) -> Path:
    return log_dir / f"{name}.slurm.json"


def read_record(path: Path) -> Submission | None:
    """The record of the last submission. None if nothing was submitted."""
    try:
        return Submission(**jsonio.loads(path.read_bytes()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as e:
        raise DataError(
            f"{path}: damaged ({e}). See with `squeue --me` that no job of this run is left, and delete this file."
        ) from e


def write_record(job: Job, submission: Submission) -> None:
    write_atomic(record_file(job.log_dir, job.name), json.dumps(asdict(submission)) + "\n")
