"""`python -m tests.slurm.late_storage SECONDS FIRST SCRIPT ARGS...`: an orchestrator on storage that shows files late.

What the orchestrator writes for a job reaches the nodes SECONDS later, and so does what a job publishes reach the
orchestrator. The first file of each kind is late by FIRST seconds. NFS does this, because a client remembers for a
while that a file was not there.
"""

from __future__ import annotations

import runpy
import sys
import threading
import time
from pathlib import Path
from typing import Any

from nemo_srl import artifacts, worker
from nemo_srl.launchers.slurm import steps

KINDS = (artifacts.SPEC, ".canary", ".services.json")
"""How the names of files end that the orchestrator writes for a job."""


def install(seconds: float, first: float) -> None:
    """`first` is not below `seconds`."""
    write, read = artifacts.write_atomic, artifacts.Artifact.manifest
    first_of: dict[str, Path] = {}

    def delay(kind: str, path: Path) -> float:
        return first if first_of.setdefault(kind, path) == path else seconds

    def write_late(path: Path, text: str) -> None:
        if kind := next((kind for kind in KINDS if path.name.endswith(kind)), None):
            path.unlink(missing_ok=True)
            threading.Timer(delay(kind, path), write, [path, text]).start()
        else:
            write(path, text)

    def read_late(self: artifacts.Artifact) -> Any:
        path = self.path / artifacts.MANIFEST
        age = time.time() - path.stat().st_mtime if path.exists() else first
        if age < first and age < delay(artifacts.MANIFEST, path):
            return None
        return read(self)

    run_steps = worker.run_steps

    def run_steps_here(stage_dir: Path, names: Any) -> None:
        # A machine sees its own files at once. Here they are late for the orchestrator, too, so it waits.
        while not (stage_dir / artifacts.SPEC).exists():
            time.sleep(0.1)
        run_steps(stage_dir, names)

    vars(worker)["run_steps"] = run_steps_here
    vars(worker)["write_atomic"] = vars(steps)["write_atomic"] = write_late
    artifacts.Artifact.manifest = read_late  # type: ignore[method-assign]


if __name__ == "__main__":
    install(float(sys.argv[1]), float(sys.argv[2]))
    sys.argv = sys.argv[3:]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    runpy.run_path(sys.argv[0], run_name="__main__")
