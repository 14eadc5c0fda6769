"""Storage that several nodes share: files that appear late, and links out of what a container sees."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from nemo_srl import worker
from nemo_srl.artifacts import SPEC
from nemo_srl.shared_storage import VISIBLE_VARIABLE, appears, directories_of


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
