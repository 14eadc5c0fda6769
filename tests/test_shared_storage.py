"""Storage that several nodes share: files that appear late, and links out of what a container sees."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_srl import worker
from nemo_srl.artifacts import SPEC
from nemo_srl.launchers import with_services
from nemo_srl.launchers.console import Console, LogTail
from nemo_srl.launchers.serving import Handed, Result
from nemo_srl.launchers.slurm import client
from nemo_srl.launchers.slurm.steps import stopped_file, was_stopped
from nemo_srl.protocols import Job, Service
from nemo_srl.shared_storage import VISIBLE_VARIABLE, appears, directories_of

Writes = Callable[[Path, str], None]


@pytest.fixture
def another_node(monkeypatch: pytest.MonkeyPatch) -> Writes:
    """Writes a file that this machine sees when it has listed the directory.

    A client of NFS does this: it remembers for a minute that a file was not there.
    """
    unseen: dict[Path, str] = {}
    listdir = os.listdir

    def list_and_see(directory: Path) -> list[str]:
        for path in [p for p in unseen if p.parent == Path(directory)]:
            path.write_text(unseen.pop(path))
        return listdir(directory)

    monkeypatch.setattr(os, "listdir", list_and_see)
    return unseen.__setitem__


def test_a_file_that_appears_late_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "late"
    assert not appears(path.exists, tmp_path, 0)
    writer = threading.Timer(0.7, path.touch)
    writer.start()
    assert appears(path.exists, tmp_path, 60)
    writer.join()


def test_a_worker_on_another_node_waits_for_the_description_of_its_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    monkeypatch.setattr(worker, "_run_step", lambda directory, name: seen.append((directory / SPEC).exists()))
    monkeypatch.setenv(VISIBLE_VARIABLE, "60")
    writer = threading.Timer(0.7, (tmp_path / SPEC).touch)
    writer.start()
    worker.run_steps(tmp_path, ["run"])
    writer.join()
    assert seen == [True]


def test_the_launcher_sees_at_once_how_steps_ended_on_another_node(tmp_path: Path, another_node: Writes) -> None:
    handed = Handed(tmp_path, "iter_01-candidates", "token")
    assert handed.result() is None
    assert handed.num_taken() == 0
    another_node(tmp_path / "iter_01-candidates.taken", "token\n")
    assert handed.num_taken() == 1
    another_node(tmp_path / "iter_01-candidates.result.json", json.dumps({"code": 0, "step": "run", "token": "token"}))
    assert handed.result() == Result(0, "run")


def test_the_launcher_sees_at_once_that_a_step_was_stopped(tmp_path: Path, another_node: Writes) -> None:
    job = Job(name="sft", steps=[], log_dir=tmp_path)
    assert not was_stopped(job)
    another_node(stopped_file(job), "")
    assert was_stopped(job)


def test_servers_see_at_once_a_model_that_another_node_has_exported(
    tmp_path: Path, another_node: Writes, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, link = tmp_path / "iter_01" / "policy" / "hf", tmp_path / "servers" / "model-0123"
    for directory in (model.parent, link.parent):
        directory.mkdir(parents=True)
    link.symlink_to(model)
    seen: list[bool] = []
    monkeypatch.setattr(with_services, "running", lambda services, **_: seen.append(link.exists()))
    command = ["serve", str(link), "--port", "/dev/absent"]
    service = Service(name="s", command=command, health_paths=("/",), start_timeout_seconds=1)
    another_node(model, "weights")
    with_services.Spec("servers", tmp_path / "logs", 1, [service]).running(0)
    assert seen == [True]


def test_servers_wait_for_their_description(
    tmp_path: Path, another_node: Writes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # the handler of TERM is for a process of its own
    path = tmp_path / "servers.services.json"
    assert with_services.main(path, ["command"]) == 2
    assert f"error: {path}" in capsys.readouterr().err
    monkeypatch.setenv(VISIBLE_VARIABLE, "60")
    text = {"job_name": "servers", "log_dir": str(tmp_path), "num_nodes": 1, "services": []}
    another_node(path, json.dumps(text))
    assert with_services.Spec.read(path).job_name == "servers"


def test_the_exit_status_that_a_forgotten_job_left_is_seen_at_once(
    tmp_path: Path, another_node: Writes, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = tmp_path / "bin"
    commands.mkdir()
    (commands / "scontrol").write_text("#!/bin/sh\necho 'Invalid job id specified' >&2; exit 1\n")
    (commands / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(commands))
    another_node(tmp_path / "job.exit", "7 0\n")
    assert client.state("7", exit_file=tmp_path / "job.exit").name == "COMPLETED"


def test_the_log_of_a_job_is_shown_from_the_second_look_on(
    tmp_path: Path, another_node: Writes, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[bytes] = []
    monkeypatch.setattr(Console, "feed", lambda self, block: shown.append(block))
    tail = LogTail(tmp_path / "job.log", Console())
    another_node(tmp_path / "job.log", "10%")
    tail.show()
    tail.show()
    assert shown == [b"10%"]


def test_a_model_in_a_cache_of_hugging_face_needs_the_directory_of_its_blobs(tmp_path: Path) -> None:
    hub, elsewhere = tmp_path / "hub" / "models--a--b", tmp_path / "disk2" / "blobs"
    snapshot = hub / "snapshots" / "0123"
    for directory in (hub / "blobs", snapshot / "original", elsewhere):
        directory.mkdir(parents=True)
    (hub / "blobs" / "aa").touch()
    (elsewhere / "bb").touch()
    (hub / "blobs" / "bb").symlink_to(elsewhere / "bb")  # such as a large file that was moved to another disk
    (snapshot / "config.json").symlink_to("../../blobs/aa")
    (snapshot / "model.safetensors").symlink_to("../../blobs/bb")
    (snapshot / "original" / "tokenizer.model").symlink_to("../../../blobs/aa")
    (snapshot / "here").symlink_to("config.json")
    assert directories_of(snapshot) == {snapshot, hub / "blobs", elsewhere}
    assert directories_of(snapshot / "config.json") == {snapshot, hub / "blobs"}


def test_a_directory_without_links_needs_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").touch()
    assert directories_of(tmp_path) == directories_of(tmp_path / "data.jsonl") == {tmp_path}


def test_a_link_to_itself_ends(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("a")
    assert directories_of(tmp_path) == {tmp_path}
