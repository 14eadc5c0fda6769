"""Serving jobs on a real Slurm: one start of a server for all stages that ask it, and how a killed one comes back."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_srl.artifacts import JOURNAL
from tests.slurm.conftest import PROJECT, Cluster, kill, wait_for
from tests.slurm.test_jobs import is_running, start, write_spec
from tests.tiny_loop import published, tiny_settings

SERVER = """
import http.server, sys, time
time.sleep(1)
http.server.test(http.server.SimpleHTTPRequestHandler, port=int(sys.argv[1]), bind="127.0.0.1")
"""
CALLS = """
import json, os, pathlib, time, urllib.request
(url,) = json.loads(os.environ["NEMO_SRL_SERVICES"]).values()
assert urllib.request.urlopen(url).status == 200
own = pathlib.Path({directory!r}, os.environ["STAGE"])
with own.open("a") as f:
    f.write(os.environ["SLURM_JOB_ID"] + "." + os.environ["SLURM_STEP_ID"] + "\\n")
while not pathlib.Path({directory!r}, "go" + os.environ["STAGE"][-1]).exists():
    time.sleep(0.1)
print("called for", os.environ["STAGE"], flush=True)
"""


def on_one_server(cluster: Cluster, name: str, launcher: str) -> tuple[subprocess.Popen[bytes], Path]:
    """Three stages that ask one server, and a training after them. Stage i waits for the file `go<i>`."""
    directory = cluster.shared / name
    service = {
        "name": "web", "command": [sys.executable, "-c", SERVER, "{port}"], "health_paths": ["/"],
        "start_timeout_seconds": 60,
    }  # fmt: skip
    stages = [{"name": f"stage{i}", "env": {"STAGE": f"stage{i}"}} for i in range(3)]
    spec = write_spec(
        cluster, name, CALLS.format(directory=str(directory)), services=[service], role="engine",
        launcher={"name": launcher, "idle_seconds": 20},
    )  # fmt: skip
    (directory / "trains.py").write_text("print('trained', flush=True)")
    training = {"name": "training", "services": [], "steps": [{"name": "t", "command": [str(directory / "trains.py")]}]}
    text = json.loads(spec.read_text())
    text |= {"job": {**text["job"], **stages[0]}, "more_jobs": [*stages[1:], training]}
    spec.write_text(json.dumps(text))
    around = ["salloc", "--nodes=1", "--time=5"] if launcher == "srun" else []
    orchestrator = cluster.start(
        *around, sys.executable, "-m", "tests.slurm.run_job", str(spec), log=spec.with_name("out")
    )
    return orchestrator, directory


def wait(orchestrator: subprocess.Popen[bytes], directory: Path, condition: Callable[[], object]) -> None:
    """Wait for a condition, as long as the orchestrator runs."""

    def holds() -> object:
        assert orchestrator.poll() is None, (directory / "out").read_text()
        return condition()

    wait_for(holds)


def let_all_go(directory: Path) -> None:
    for stage in range(3):
        (directory / f"go{stage}").touch()


def starts_of(directory: Path) -> int:
    """How often the server was started."""
    return sum(path.read_text().count("$ ") for path in (directory / "logs").glob("servers-*-web.log"))


def steps_of(directory: Path, stage: int) -> list[str]:
    path = directory / f"stage{stage}"
    return path.read_text().split() if path.exists() else []


@pytest.mark.parametrize("launcher", ["slurm", "srun"])
def test_stages_that_ask_one_model_share_one_start_of_its_servers(cluster: Cluster, launcher: str) -> None:
    orchestrator, directory = on_one_server(cluster, f"one_server_{launcher}", launcher)
    let_all_go(directory)
    assert orchestrator.wait(180) == 0, (directory / "out").read_text()
    first = steps_of(directory, 0)
    assert len(first) == 1
    assert steps_of(directory, 1) == steps_of(directory, 2) == first, "one step of one job"
    assert starts_of(directory) == 1
    assert "called for stage2" in (directory / "logs" / "stage2.log").read_text()
    assert "trained" in (directory / "logs" / "training.log").read_text()
    wait_for(lambda: not is_running(str(directory)))


@pytest.mark.parametrize("launcher", ["slurm", "srun"])
def test_servers_that_are_killed_in_each_stage_are_started_again(cluster: Cluster, launcher: str) -> None:
    orchestrator, directory = on_one_server(cluster, f"killed_servers_{launcher}", launcher)
    for stage in range(3):
        wait(orchestrator, directory, lambda: len(steps_of(directory, stage)) == 1)  # noqa: B023
        for pid in processes_of("nemo_srl.launchers.with_services", str(directory)):
            os.kill(pid, signal.SIGKILL)
        wait(orchestrator, directory, lambda: len(steps_of(directory, stage)) == 2)  # noqa: B023
        (directory / f"go{stage}").touch()
    assert orchestrator.wait(180) == 0, (directory / "out").read_text()
    assert starts_of(directory) == 4
    assert "trained" in (directory / "logs" / "training.log").read_text()
    wait_for(lambda: not is_running(str(directory)))


STAGES = ("iter_00/evaluation", "iter_01/prompts", "iter_01/candidates", "iter_01/judgements", "iter_01/anchor")


def on_real_stages(cluster: Cluster, run_dir: Path, faults: str) -> subprocess.Popen[bytes]:
    """All stages that ask a model, on TensorRT-LLM's stand-in: two replicas, one of which is enough for the anchor."""
    path = f"{PROJECT / 'tests' / 'stubs'}:{Path(sys.executable).parent}:/usr/bin:/bin"
    settings = {
        **tiny_settings(run_dir.parent / "tiny"),
        "run_dir": run_dir, "engine": "trtllm", "engine.max_concurrency": 1, "engine.num_replicas": 2,
        "engine.num_replicas_small": 1, "launcher": "slurm", "launcher.poll_seconds": 0.5,
        "launcher.signal_seconds": 30, "cluster.exclusive": "false", "cluster.time": "'30'", "anchor.num_prompts": 3,
        "+cluster.env.PATH": f"'{path}'", "+cluster.env.NEMO_SRL_STUB_FAULTS": f"'{faults}'",
        "+cluster.env.NEMO_SRL_STUB_REPLY": "'Name {number} animals. Score: {score}.'",
    }  # fmt: skip
    command = [sys.executable, "-m", "tests.slurm.run_stages", *(f"{key}={value}" for key, value in settings.items())]
    return cluster.start(*command, log=run_dir.with_suffix(".log"))


def test_each_stage_goes_on_when_what_serves_it_is_killed(cluster: Cluster) -> None:
    shared = cluster.shared / "real_stages"
    shared.mkdir()
    calm, killed = shared / "calm", shared / "killed"
    assert on_real_stages(cluster, calm, "{}").wait(900) == 0, calm.with_suffix(".log").read_text()
    run = on_real_stages(cluster, killed, '{"slow_seconds": 1.0}')

    def going() -> bool:
        assert run.poll() is None, killed.with_suffix(".log").read_text()
        return True

    for stage in STAGES:
        journal = killed / stage / JOURNAL
        wait_for(lambda: going() and journal.exists() and journal.read_bytes().count(b"\n"), 240)  # noqa: B023
        for pid in processes_of("nemo_srl.launchers.with_services", str(killed)):
            os.kill(pid, signal.SIGKILL)
        (taken,) = (killed / "logs").glob(f"servers-*/{stage.replace('/', '-')}.taken")
        wait_for(lambda: going() and taken.read_bytes().count(b"\n") == 2, 240)  # noqa: B023
    assert run.wait(900) == 0, killed.with_suffix(".log").read_text()
    assert published(killed) == published(calm)
    for stage in STAGES:
        lines = (killed / stage / JOURNAL).read_text().split("\n")[:-1]
        keys = [(row["request_key"], row["index"]) for row in map(json.loads, lines)]
        assert len(keys) == len(set(keys)), "a completed model call was repeated"
    starts = [
        sum(log.read_text().count("serving ") for log in (d / "logs").glob("servers-*.log")) for d in (calm, killed)
    ]
    assert starts == [2, 2 * (1 + len(STAGES))], "of both replicas"
    wait_for(lambda: not is_running(str(shared)))


def test_an_orchestrator_that_was_killed_finds_its_stage_on_the_servers(cluster: Cluster) -> None:
    orchestrator, directory = on_one_server(cluster, "killed_orchestrator", "slurm")
    wait(orchestrator, directory, lambda: steps_of(directory, 0))
    kill(orchestrator)
    again = start(cluster, directory / "spec.json")
    wait_for(lambda: "is under way, following it" in (directory / "out").read_text())
    let_all_go(directory)
    assert again.wait(180) == 0, (directory / "out").read_text()
    assert len(steps_of(directory, 0)) == 1, "the stage was not begun again"
    assert starts_of(directory) == 1


def test_servers_without_a_stage_end_after_a_while(cluster: Cluster) -> None:
    orchestrator, directory = on_one_server(cluster, "idle_servers", "slurm")
    wait(orchestrator, directory, lambda: steps_of(directory, 0))
    kill(orchestrator)
    ended = steps_of(directory, 0)[0].split(".")[0]
    let_all_go(directory)
    wait_for(lambda: cluster.job(ended)["JobState"] == "COMPLETED")
    wait_for(lambda: not is_running(str(directory)))
    assert "nothing was asked for 20 s" in "".join(p.read_text() for p in (directory / "logs").glob("servers-*.log"))


def processes_of(*words: str) -> list[int]:
    """Processes of this machine and of the nodes on it whose command has these words, and that are Python's."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            command = path.read_bytes().split(b"\0")
            if b"python" in command[0] and all(any(w.encode() in part for part in command) for w in words):
                found.append(int(path.parent.name))
    return found
