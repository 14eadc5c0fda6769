"""Runs one job through the Slurm launcher: `python -m tests.slurm.run_job SPEC.json`, an orchestrator for tests.

SPEC.json: `{"job": {...}, "launcher": {...}, "cluster": {...}}`, the fields of the dataclasses.
"""

from __future__ import annotations

import json
import logging
import signal
import sys
from pathlib import Path

from omegaconf import OmegaConf

from nemo_srl.config import ClusterConfig, LauncherConfig
from nemo_srl.errors import NemoSrlError
from nemo_srl.launchers import open_launcher
from nemo_srl.protocols import Job, JobStep, Service


def main(spec_path: Path) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where pytest runs in the background
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    spec = json.loads(spec_path.read_text())
    job = spec["job"]
    launcher = LauncherConfig(**spec["launcher"])
    cluster = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ClusterConfig), spec["cluster"]))
    assert isinstance(cluster, ClusterConfig)
    try:
        open_launcher(launcher, cluster).run(
            Job(**{
                **job,
                "log_dir": Path(job["log_dir"]),
                "paths": [Path(p) for p in job.get("paths", [])],
                "steps": [JobStep(**s) for s in job["steps"]],
                "services": [Service(**s) for s in job.get("services", [])],
            })
        )  # fmt: skip
    except NemoSrlError as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
