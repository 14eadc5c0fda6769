"""What every Slurm task runs (`task.sh`), without Slurm: signals, late files, and places for caches."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from nemo_srl.launchers.slurm.steps import TASK_SCRIPT
from tests.ports import free_port
from tests.processes import wait_for

SAVES = """
import pathlib, signal, sys, time
def save(*_):
    pathlib.Path("saved").write_text("step 3")
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
pathlib.Path("trains").touch()
time.sleep(600)
"""
RANKS = """
import os, pathlib, signal, sys, time
def save(*_):
    time.sleep(1.0)  # a second TERM to torchrun in this time would make it leave
    pathlib.Path(f"saved_{os.environ['RANK']}").write_text(os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
pathlib.Path(f"trains_{os.environ['RANK']}").touch()
time.sleep(600)
"""


def start(directory: Path, *arguments: str, seconds: int = 30, **env: str) -> subprocess.Popen[bytes]:
    """A task in `directory`, in a process group of its own. The canary must be written there."""
    known = {
        "NEMO_SRL_CANARY": str(directory / "canary"),
        "NEMO_SRL_TOKEN": "token",
        "NEMO_SRL_VISIBLE_SECONDS": str(seconds),
        "NEMO_SRL_STOPPED": str(directory / "stopped"),
        "NEMO_SRL_RANKS_PER_NODE": "2",
        "SLURM_NNODES": "1", "SLURM_NODEID": "0", "SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    with (directory / "out").open("wb") as out:
        task = subprocess.Popen(
            ["bash", str(TASK_SCRIPT), *arguments], env={**os.environ, **known, **env}, cwd=directory, stdout=out,
            stderr=out, start_new_session=True,
        )  # fmt: skip
    STARTED.append(task)
    return task


STARTED: list[subprocess.Popen[bytes]] = []


@pytest.fixture(autouse=True)
def _end_all() -> Iterator[None]:
    """End what a failed test has left."""
    yield
    while STARTED:
        task = STARTED.pop()
        if task.poll() is None:
            os.killpg(task.pid, signal.SIGKILL)
            task.wait(30)


def said(directory: Path) -> str:
    return (directory / "out").read_text()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "canary").write_text("token")
    return tmp_path


@pytest.mark.parametrize("send", [os.kill, os.killpg], ids=["to_the_leader", "to_all"])
@pytest.mark.parametrize("kind", ["one", "rank"])
def test_term_reaches_the_command_whoever_gets_it(directory: Path, kind: str, send: object) -> None:
    """With cgroups, Slurm signals the leader of a task alone, and otherwise all its processes."""
    (directory / "train.py").write_text(SAVES)
    task = start(directory, kind, sys.executable, "train.py")
    wait_for((directory / "trains").exists)
    assert callable(send)
    send(task.pid, signal.SIGTERM)
    assert task.wait(30) == 0, said(directory)
    assert (directory / "saved").read_text() == "step 3"
    assert (directory / "stopped").exists()


@pytest.mark.parametrize("send", [os.kill, os.killpg], ids=["to_the_leader", "to_all"])
def test_torchrun_gets_one_term_and_lets_its_ranks_save(directory: Path, send: object) -> None:
    (directory / "train.py").write_text(RANKS)
    task = start(directory, "torchrun", sys.executable, "train.py")
    wait_for(lambda: all((directory / f"trains_{i}").exists() for i in range(2)))
    assert callable(send)
    send(task.pid, signal.SIGTERM)
    assert task.wait(60) != 0
    assert all((directory / f"saved_{i}").exists() for i in range(2)), said(directory)
    assert (directory / "saved_0").read_text() == "600", "the time that a newer torchrun gives them"


@pytest.mark.parametrize("status", [0, 3, 75])
def test_the_status_is_the_commands(directory: Path, status: int) -> None:
    task = start(directory, "one", "bash", "-c", f"exit {status}")
    assert task.wait(30) == (0 if status == 75 else status)
    assert (directory / "stopped").exists() == (status == 75)


def test_a_command_that_is_killed_ends_the_task_with_its_signal(directory: Path) -> None:
    assert start(directory, "one", "bash", "-c", "kill -KILL $$").wait(30) == 128 + signal.SIGKILL


def test_a_file_that_storage_shows_late_is_waited_for(tmp_path: Path) -> None:
    task = start(tmp_path, "one", "echo", "began")
    with pytest.raises(subprocess.TimeoutExpired):
        task.wait(1)
    (tmp_path / "canary").write_text("of an earlier submission")
    writer = threading.Timer(1.0, (tmp_path / "canary").write_text, ["token"])
    writer.start()
    assert task.wait(30) == 0
    assert said(tmp_path) == "began\n"
    writer.join()


def test_a_directory_that_is_not_shared_is_named_after_the_wait(tmp_path: Path) -> None:
    task = start(tmp_path, "one", "echo", "began", seconds=1)
    assert task.wait(30) == 2
    assert f"does not see {tmp_path / 'canary'}" in said(tmp_path)
    assert "cluster.mounts" in said(tmp_path)


def test_caches_lie_on_the_nodes_own_storage(directory: Path) -> None:
    """A container may lack the home of its user. Somebody who chose a place keeps it."""
    (directory / "file").touch()
    names = ("HOME", "XDG_CACHE_HOME", "TRITON_CACHE_DIR")
    script = "; ".join(f'echo "${name}"; touch "${name}/x"' for name in names)
    absent = {"HOME": str(directory / "file" / "absent"), "XDG_CACHE_HOME": "", "TRITON_CACHE_DIR": ""}
    assert start(directory, "one", "bash", "-c", script, TMPDIR=str(directory), **absent).wait(30) == 0
    own = directory / f"nemo_srl-{os.getuid()}"
    assert said(directory).split() == [str(own / name) for name in names]

    chosen = {name: str(directory / name.lower()) for name in names}
    assert start(directory, "one", "bash", "-c", script, **chosen).wait(30) == 0
    assert said(directory).split() == list(chosen.values())
