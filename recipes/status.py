"""Show how far a run is: `python recipes/status.py run_dir=runs/srl-llama2-70b-8n8g-tp8pp4`.

Each stage that was started has one line: whether it is published, its Slurm job with the state that Slurm reports, and
its progress (model calls in the journal, or training steps). The command changes nothing. It works with or without a
running orchestrator.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING

from nemo_srl import cli
from nemo_srl.artifacts import JOURNAL, MANIFEST, SPEC, Artifact
from nemo_srl.errors import DataError, NemoSrlError
from nemo_srl.launchers.slurm import client, read_record, record_file
from nemo_srl.runs import training_metrics


@dataclass
class Options:
    run_dir: str = MISSING


def lines(run_dir: Path) -> list[str]:
    """The lines of the table. Raises `DataError` for a directory without a run."""
    stages = sorted(run_dir.glob(f"iter_*/*/{SPEC}"), key=lambda path: path.stat().st_mtime)
    if not stages:
        raise DataError(f"run_dir={run_dir}: no stage was started in it. Give the run directory of recipes/iterate.py.")
    rows = [("stage", "state", "job", "progress")]
    for spec in stages:
        directory = spec.parent
        job, state = _job(run_dir, str(directory.relative_to(run_dir)).replace("/", "-"))
        if (directory / MANIFEST).exists():
            manifest = Artifact(directory, {}).manifest()
            seconds = manifest.seconds if manifest else 0
            rows.append((str(directory.relative_to(run_dir)), "published", job, f"{seconds:.0f} s"))
        else:
            rows.append((str(directory.relative_to(run_dir)), state or "unfinished", job, _progress(directory)))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _job(run_dir: Path, name: str) -> tuple[str, str]:
    name = _latest(run_dir / "logs", name)
    record = read_record(record_file(run_dir / "logs", name))
    if record is None or record.job_id is None:
        return "-", ""
    try:
        found = client.state(record.job_id, exit_file=run_dir / "logs" / f"{name}.exit")
    except NemoSrlError:
        return record.job_id, "unknown: Slurm does not answer here"
    restarts = f", restart {found.restarts}" if found.restarts else ""
    reason = f" ({found.reason})" if found.name == "PENDING" else ""
    return record.job_id, f"{found.name.lower()}{reason}{restarts}"


def _latest(log_dir: Path, name: str) -> str:
    """The job of a stage that was submitted last. A training on several nodes has one for each of its steps."""
    names = [name, *(f"{name}-{step}" for step in ("prepare", "export"))]
    submitted = [found for found in names if record_file(log_dir, found).exists()]
    return max(submitted, key=lambda found: record_file(log_dir, found).stat().st_mtime, default=name)


def _progress(directory: Path) -> str:
    if (directory / JOURNAL).exists():
        num_calls = (directory / JOURNAL).read_bytes().count(b"\n")
        return f"{num_calls} model calls"
    steps = training_metrics(directory)
    return f"{len(steps)} steps" if steps else "-"


def main(options: Options) -> None:
    print("\n".join(lines(Path(options.run_dir))))


if __name__ == "__main__":
    cli.run_program(Options, main)
