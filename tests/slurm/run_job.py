"""Runs jobs through a cluster's launcher: `python -m tests.slurm.run_job SPEC.json`, an orchestrator for tests.

SPEC.json: `{"job": {...}, "launcher": {...}, "cluster": {...}}`, the fields of the dataclasses. The jobs of `more_jobs`
follow it. Each has the fields in which it differs.
"""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from nemo_srl import cli, registry
from nemo_srl.config import ClusterConfig
from nemo_srl.protocols import Job, JobStep, Service


def main(spec_path: Path) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # where pytest runs in the background, INT is ignored
    cli.log_to_stderr()
    spec = json.loads(spec_path.read_text())
    backend = registry.load("launchers", spec["launcher"]["name"])
    cluster = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ClusterConfig), spec["cluster"]))
    assert isinstance(cluster, ClusterConfig)
    with cli.one_line_errors():
        launcher = backend.open(backend.settings(**spec["launcher"]), cluster)
        try:
            for more in ({}, *spec.get("more_jobs", [])):
                launcher.run(job_of({**spec["job"], **more}))
        finally:
            backend.close(launcher)


def job_of(job: dict[str, Any]) -> Job:
    return Job(**{
        **job,
        "log_dir": Path(job["log_dir"]),
        "paths": [Path(p) for p in job.get("paths", [])],
        "steps": [JobStep(**s) for s in job["steps"]],
        "services": [Service(**s) for s in job.get("services", [])],
    })  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]))
