"""Runs one job through a cluster's launcher: `python -m tests.slurm.run_job SPEC.json`, an orchestrator for tests.

SPEC.json: `{"job": {...}, "launcher": {...}, "cluster": {...}}`, the fields of the dataclasses.
"""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

from omegaconf import OmegaConf

from nemo_srl import cli, registry
from nemo_srl.config import ClusterConfig
from nemo_srl.launchers import open_launcher
from nemo_srl.protocols import Job, JobStep, Service


def main(spec_path: Path) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # where pytest runs in the background, INT is ignored
    cli.log_to_stderr()
    spec = json.loads(spec_path.read_text())
    job = spec["job"]
    launcher = registry.load("launchers", spec["launcher"]["name"]).settings(**spec["launcher"])
    cluster = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ClusterConfig), spec["cluster"]))
    assert isinstance(cluster, ClusterConfig)
    with cli.one_line_errors():
        open_launcher(launcher, cluster).run(
            Job(**{
                **job,
                "log_dir": Path(job["log_dir"]),
                "paths": [Path(p) for p in job.get("paths", [])],
                "steps": [JobStep(**s) for s in job["steps"]],
                "services": [Service(**s) for s in job.get("services", [])],
            })
        )  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]))
