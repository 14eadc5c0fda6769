"""The doctor of a cluster on a real Slurm of 2 nodes, with stand-ins for containers and TensorRT-LLM."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.conftest import PROJECT, Cluster
from tests.tiny_loop import tiny_settings

STUBS = PROJECT / "tests" / "stubs"


def run_doctor(cluster: Cluster, work_dir: Path, settings: dict[str, Any]) -> tuple[int, str]:
    """Exit status and output of recipes/doctor.py on the login node."""
    arguments = [f"{key}={value}" for key, value in settings.items()]
    log = cluster.shared / f"{work_dir.name}.log"
    process = cluster.start(sys.executable, "recipes/doctor.py", f"work_dir={work_dir}", *arguments, log=log)
    return process.wait(1500), log.read_text()


@pytest.fixture(scope="module")
def settings(cluster: Cluster) -> dict[str, Any]:
    """A recipe of 2 nodes with 2 ranks each, and TensorRT-LLM on both."""
    role = {"container": "'nvcr.io#nvidia/nemo:25.02'", "python": sys.executable}
    return {
        **tiny_settings(cluster.shared / "tiny-doctor"),
        "engine": "trtllm",
        "engine.num_nodes": 2,
        "engine.num_replicas": 2,
        "judge.mode": "expected",
        "trainer.num_nodes": 2,
        "trainer.devices": 2,
        "trainer.tensor_model_parallel_size": 2,
        "launcher": "slurm",
        "launcher.poll_seconds": 0.5,
        "launcher.signal_seconds": 30,
        "cluster.exclusive": "false",
        "cluster.gpus_per_node": 8,
        "cluster.mounts": f"['{sys.prefix}:{sys.prefix}']",
        "+cluster.env.PATH": f"'{STUBS}:{Path(sys.executable).parent}:/usr/bin:/bin'",
        "+cluster.env.PYTHONPATH": f"'{STUBS / 'packages'}'",
        "+cluster.env.OMP_NUM_THREADS": "'1'",
        **{f"cluster.{name}.{key}": value for name in ("trainer", "engine") for key, value in role.items()},
    }


@pytest.mark.timeout(1600)  # three minutes on a quiet machine
def test_a_cluster_that_works_is_proved_by_small_jobs_in_both_roles(cluster: Cluster, settings: dict[str, Any]) -> None:
    work_dir = cluster.shared / "doctor-good"
    status, out = run_doctor(cluster, work_dir, settings)
    (report,) = work_dir.glob("*/report.json")
    found = json.loads(report.read_text())
    states = {x["name"]: x["state"] for x in found["findings"]}
    # The stand-ins for GPUs are no GPUs. All else must be right.
    assert {name for name, state in states.items() if state == "WRONG"} == {"gpus.trainer", "gpus.engine"}, out
    assert status == 2, out
    assert not [name for name, state in states.items() if state == "-"], out
    texts = {x["name"]: x["text"] for x in found["findings"]}
    assert "tensorrt-llm 1.2.1" in texts["versions.engine"]
    assert texts["ports"] == "13 of 13 connections", "six of each node, and MASTER_PORT"
    assert "one that another node holds: busy" in texts["storage.locks"]
    assert "went on from step" in texts["stopping"]
    assert "TP=2 PP=2 on 2 nodes" in {x["name"]: x["tried"] for x in found["findings"]}["dpo"]
    assert len({node["host"] for node in found["nodes"]["trainer"]}) == 2
    assert json.loads((report.parent / "trtllm-1.2.1.json").read_text())["serve_backends"]
    assert "Wrong: gpus.trainer, gpus.engine" in report.with_suffix(".md").read_text()
    listed = subprocess.run(["ps", "-ef"], text=True, capture_output=True, check=True).stdout
    assert str(work_dir) not in listed, "nothing is left running"


def test_a_directory_that_nodes_do_not_share_is_found_by_every_check(
    cluster: Cluster, settings: dict[str, Any], tmp_path: Path
) -> None:
    work_dir = Path("/tmp") / f"doctor-{tmp_path.name}"
    try:
        status, out = run_doctor(cluster, work_dir, settings)
        (report,) = work_dir.glob("*/report.json")
        findings = json.loads(report.read_text())["findings"]
    finally:
        subprocess.run(["rm", "-rf", str(work_dir)], check=True)
    assert status == 2, out
    assert {x["name"] for x in findings if x["state"] != "WRONG"} == set()
    assert {"job.trainer", "storage", "ports", "sft", "stopping", "serving"} <= {x["name"] for x in findings}
    assert "shared storage" in findings[0]["remedy"]
