"""The whole loop on a real Slurm, with 2 nodes of 2 ranks (TP=2, DP=2).

Containers are stand-ins. So is TensorRT-LLM, with a replica on each of the 2 nodes.

One run is left alone. Another one meets four faults in turn: the warning before a time limit in the middle of SFT, a
node that dies in the middle of generation, a killed orchestrator, and a node that dies in the middle of DPO. All the
time, its storage shows files late. Both must have published the same bytes. No model call that was completed may be
made again.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_srl.artifacts import JOURNAL
from tests.slurm.conftest import PROJECT, Cluster, kill, wait_for
from tests.slurm.test_jobs import is_running
from tests.support import RECIPE
from tests.tiny_loop import published, tiny_settings

IMAGE = "nvcr.io#nvidia/nemo:25.02"
LATE_SECONDS, FIRST_LATE_SECONDS = 5, 30
"""5 s are longer than a job takes to start, which is what counts. On a cluster it may be half a minute, as here for the
first file of each kind."""


@pytest.fixture(scope="module")
def overrides(cluster: Cluster) -> list[str]:
    """As in tests/test_loop.py, with enough steps in a row for an interruption.

    The model is a directory of links, as in a cache of Hugging Face. A container sees only what is mounted.
    """
    path = f"{PROJECT / 'tests' / 'stubs'}:{Path(sys.executable).parent}:/usr/bin:/bin"
    settings = {
        **tiny_settings(cluster.shared / "tiny"),
        "model.path": str(snapshot_of(cluster.shared / "tiny" / "model", cluster.shared / "hub")),
        "engine": "trtllm",
        "engine.max_concurrency": 1,
        "engine.num_nodes": 2,
        "engine.num_replicas": 2,
        "trainer.num_nodes": 2,
        "trainer.devices": 2,
        "trainer.tensor_model_parallel_size": 2,
        "sft.save_interval": 1000,
        "dpo.max_epochs": 4,
        "anchor.num_prompts": 0,
        "evaluation.num_prompts": 1,
        "launcher": "slurm",
        "launcher.poll_seconds": 0.5,
        "launcher.signal_seconds": 30,
        "cluster.exclusive": "false",
        "cluster.time": "'30'",
        "cluster.gpus_per_node": 8,
        "cluster.mounts": f"['{sys.prefix}:{sys.prefix}']",
        "+cluster.env.PATH": f"'{path}'",
        "+cluster.env.OMP_NUM_THREADS": "'1'",
    }
    for role in ("trainer", "engine"):
        settings |= {f"cluster.{role}.container": f"'{IMAGE}'", f"cluster.{role}.python": sys.executable}
    return [f"{key}={value}" for key, value in settings.items()]


def snapshot_of(model_dir: Path, hub: Path) -> Path:
    """The model, as Hugging Face's cache has it."""
    snapshot = hub / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    shutil.move(model_dir, hub / "blobs")
    for path in (hub / "blobs").iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    return snapshot


class Run:
    """An orchestrator on the login node and its run directory."""

    def __init__(self, cluster: Cluster, name: str, overrides: list[str], *, late: bool = False) -> None:
        self.cluster, self.run_dir, self.log = cluster, cluster.shared / name, cluster.shared / f"{name}.log"
        self._command = ["recipes/iterate.py", f"recipe={RECIPE}", f"run_dir={self.run_dir}", *overrides]
        self._late = late
        self.process = self._start(FIRST_LATE_SECONDS)

    def _start(self, first_late: float = LATE_SECONDS) -> subprocess.Popen[bytes]:
        late = ["-m", "tests.slurm.late_storage", str(LATE_SECONDS), str(first_late)] if self._late else []
        return self.cluster.start(sys.executable, *late, *self._command, log=self.log)

    def restart(self) -> None:
        kill(self.process)
        self.process = self._start()

    def wait_for_lines(self, path: str, number: int) -> None:
        """Wait until a stage has so many calls in its journal, or has trained so many steps."""
        file = self.run_dir / path
        wait_for(lambda: self._going() and file.exists() and file.read_bytes().count(b"\n") >= number, 500)

    def _going(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()[-4000:]
        return True

    def job_id(self, job: str) -> str:
        return str(json.loads((self.run_dir / "logs" / f"{job}.slurm.json").read_text())["job_id"])

    def node_of(self, job: str) -> str:
        """The last node that the job has."""
        nodes = self.cluster.job(self.job_id(job))["NodeList"]
        return self.cluster.run("scontrol", "show", "hostnames", nodes).split()[-1]

    def status(self) -> str:
        command = [sys.executable, str(PROJECT / "recipes" / "status.py"), f"run_dir={self.run_dir}"]
        return self.cluster.run("env", f"PYTHONPATH={PROJECT}", *command)

    def repeated_steps(self, stage: str) -> int:
        """Steps that a training, which has just been ended, made since its last checkpoint."""
        training = self.run_dir / stage / "training"
        num_done = (training / "metrics.jsonl").read_bytes().count(b"\n")
        saved = (training / "nemo" / "checkpoints").glob("*-step=*-last")
        whole = [path.name for path in saved if not path.with_name(f"{path.name}-unfinished").exists()]
        found = [int(name.split("-step=")[1].split("-")[0]) for name in whole]
        return num_done - max(found, default=0)

    def count_in_logs_of_servers(self, words: str) -> int:
        logs = (self.run_dir / "logs").glob("servers-*-trtllm-*.log")
        return sum(log.read_text().count(words) for log in logs)

    def finish(self) -> None:
        assert self.process.wait(600) == 0, self.log.read_text()[-4000:]


def disturb(cluster: Cluster, run: Run, record_property: Callable[[str, object], None]) -> None:
    """Let a run meet all faults, and wait for its end."""
    run.wait_for_lines("iter_00/sft/training/metrics.jsonl", 5)
    # Slurm sends this before the time limit. test_jobs.py tests that it does.
    cluster.run("scancel", "--batch", "--signal=USR1", run.job_id("iter_00-sft"))
    wait_for(lambda: cluster.job(run.job_id("iter_00-sft"))["Restarts"] == "1")
    repeated = run.repeated_steps("iter_00/sft")
    record_property("steps_repeated_after_the_time_limit", repeated)
    assert repeated == 0

    run.wait_for_lines(f"iter_01/candidates/{JOURNAL}", 1)
    first = run.node_of("iter_01-candidates")
    cluster.node_dies(first)
    wait_for(lambda: cluster.job(run.job_id("iter_01-candidates"))["Restarts"] == "1")
    cluster.node_returns(first)

    # Early, so that the job still runs when the new orchestrator looks for it.
    wait_for(lambda: (run.run_dir / "logs" / "iter_01-judgements.log").exists(), 500)
    run.restart()
    candidates = rf"^iter_01/candidates +published +{run.job_id('iter_01-candidates')} +\d+ s$"
    assert re.search(candidates, run.status(), re.M), run.status()
    # The description of a stage is as late as all that the orchestrator writes.
    wait_for(lambda: re.search(r"^iter_01/judgements +(running|pending|completed|published)\b", run.status(), re.M))

    run.wait_for_lines("iter_01/policy/training/metrics.jsonl", 2)
    second = run.node_of("iter_01-policy")
    cluster.node_dies(second)
    repeated = run.repeated_steps("iter_01/policy")
    record_property("steps_repeated_after_a_dead_node", repeated)
    assert repeated <= 2, "a checkpoint after each step; the last step's may not have been finished"
    try:
        run.finish()
    finally:
        cluster.node_returns(second)


@pytest.fixture(scope="module")
def calm(cluster: Cluster, overrides: list[str]) -> Run:
    """A run that was left alone."""
    run = Run(cluster, "calm", overrides)
    run.finish()
    return run


def test_an_undisturbed_run_starts_the_servers_of_each_model_once(cluster: Cluster, calm: Run) -> None:
    assert calm.count_in_logs_of_servers("serving ") == 2 * 3, "two replicas, and once for each of M0, M1 and M2"
    assert {c["image"] for c in cluster.containers()} == {IMAGE}
    assert (calm.run_dir / "report.md").exists()


def test_all_faults_in_one_run_leave_what_an_undisturbed_run_leaves(
    cluster: Cluster, overrides: list[str], calm: Run, record_property: Callable[[str, object], None]
) -> None:
    began = time.monotonic()
    # Slower servers, so that there is a middle of the generation in which a node can die.
    slow = "+cluster.env.NEMO_SRL_STUB_FAULTS='{\"slow_seconds\": 0.5}'"
    run = Run(cluster, "disturbed", [*overrides, slow], late=True)

    disturb(cluster, run, record_property)
    record_property("seconds_disturbed", time.monotonic() - began)
    asked = calm.count_in_logs_of_servers("answered a sample")
    repeated = run.count_in_logs_of_servers("answered a sample") - asked
    record_property("samples", asked)
    record_property("samples_repeated", repeated)
    # After the dead node: another probe, and at most the requests that were under way on the replicas of both nodes.
    assert repeated <= 2 + 2 * 4

    assert published(run.run_dir) == published(calm.run_dir)
    for job in ("iter_00-sft", "iter_01-candidates", "iter_01-policy"):
        assert cluster.job(run.job_id(job))["Restarts"] == "1", job
    assert "is under way, following it" in run.log.read_text()
    for journal in run.run_dir.glob(f"iter_*/*/{JOURNAL}"):
        keys = [(row["request_key"], row["index"]) for row in map(json.loads, journal.read_text().split("\n")[:-1])]
        assert len(keys) == len(set(keys)), "a completed model call was repeated"
    wait_for(lambda: not is_running(str(run.run_dir)))  # the last servers end after the orchestrator
    assert {c["image"] for c in cluster.containers()} == {IMAGE}
    assert (run.run_dir / "report.md").exists()
