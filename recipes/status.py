"""Where a run is: `python recipes/status.py run_dir=runs/srl-llama2-70b-8n8g-tp8pp4`.

One line per stage that was begun: published or not, its Slurm job with the state that Slurm gives it, and what there
is of the work (model calls journalled, steps trained). Reads only; runs beside the orchestrator or without one.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING

from nemo_srl.artifacts import JOURNAL, MANIFEST, SPEC
from nemo_srl.cli import read_options
from nemo_srl.errors import DataError, NemoSrlError
from nemo_srl.launchers.slurm import client, read_record, record_file


@dataclass
class Options:
    run_dir: str = MISSING


def lines(run_dir: Path) -> list[str]:
    """A table. Raises `DataError` where there is no run."""
    stages = sorted(run_dir.glob(f"iter_*/*/{SPEC}"), key=lambda path: path.stat().st_mtime)
    if not stages:
        raise DataError(f"run_dir={run_dir}: no stage was begun there")
    rows = [("stage", "state", "job", "progress")]
    for spec in stages:
        directory = spec.parent
        job, state = _job(run_dir, str(directory.relative_to(run_dir)).replace("/", "-"))
        if (directory / MANIFEST).exists():
            seconds = json.loads((directory / MANIFEST).read_text())["seconds"]
            rows.append((str(directory.relative_to(run_dir)), "published", job, f"{seconds:.0f} s"))
        else:
            rows.append((str(directory.relative_to(run_dir)), state or "unfinished", job, _progress(directory)))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _job(run_dir: Path, name: str) -> tuple[str, str]:
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


def _progress(directory: Path) -> str:
    for path, unit in ((directory / JOURNAL, "model calls"), (directory / "training" / "metrics.jsonl", "steps")):
        if path.exists():
            num_lines = path.read_bytes().count(b"\n")
            return f"{num_lines} {unit}"
    return "-"


def main(arguments: list[str]) -> None:
    try:
        print("\n".join(lines(Path(read_options(Options, arguments).run_dir))))
    except NemoSrlError as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    main(sys.argv[1:])
