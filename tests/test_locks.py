"""Locks of directories, with the kernel's locks and on file systems that have none."""

from __future__ import annotations

import errno
import fcntl
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from nemo_srl import locks, worker
from nemo_srl.errors import RunDirBusyError
from nemo_srl.locks import DirectoryLock, Owner

ME = Owner("here", 17, "100", job="7", restart="1", submission="mine")


def refusing(number: int) -> Callable[[int, int], None]:
    """A `flock` of a file system without locks."""

    def refuse(file: int, operation: int) -> None:
        raise OSError(number, "no locks")

    return refuse


@pytest.fixture(params=[errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def no_locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS without its lock service, Lustre without `-o flock`, and others."""

    monkeypatch.setattr(fcntl, "flock", refusing(request.param))
    monkeypatch.setattr(locks, "SETTLE_SECONDS", 0.0)


def lock(directory: Path, *, wait_seconds: float = 0.0) -> DirectoryLock:
    return DirectoryLock(directory / ".lock", busy="in use by {owner}. Wait.", wait_seconds=wait_seconds)


def owned_by(directory: Path, owner: Owner) -> Path:
    path = directory / ".lock-owner"
    path.write_text(json.dumps(asdict(owner)))
    return path


def test_a_held_lock_names_its_owner_and_ends_with_its_process(tmp_path: Path) -> None:
    code = (
        "import sys, time; from tests.test_locks import lock; from pathlib import Path\n"
        f"with lock(Path({str(tmp_path)!r})): print('has it', flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"has it\n"
        with pytest.raises(RunDirBusyError, match=rf"in use by pid {other.pid} on \S+\. Wait\.$"), lock(tmp_path):
            pass
        other.kill()
        other.wait()
        with lock(tmp_path):
            pass


@pytest.mark.usefixtures("no_locks")
def test_without_locks_of_the_kernel_a_file_names_the_owner(tmp_path: Path) -> None:
    with lock(tmp_path), pytest.raises(RunDirBusyError, match=r"If that process is gone, delete .*/\.lock-owner"):
        lock(tmp_path).__enter__()
    with lock(tmp_path):
        assert (tmp_path / ".lock-owner").exists()
    assert not (tmp_path / ".lock-owner").exists()


@pytest.mark.parametrize("storage", ["with_locks", "no_locks"])
def test_a_lock_may_be_waited_for(tmp_path: Path, storage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if storage == "no_locks":
        monkeypatch.setattr(fcntl, "flock", refusing(errno.ENOSYS))
    monkeypatch.setattr(locks, "POLL_SECONDS", 0.05)
    held = lock(tmp_path)
    held.__enter__()
    with pytest.raises(RunDirBusyError, match="in use by pid"), lock(tmp_path, wait_seconds=0.1):
        pass
    order = ["held"]
    release = threading.Timer(0.3, lambda: (order.append("released"), held.__exit__()))
    release.start()
    with lock(tmp_path, wait_seconds=60):
        assert order == ["held", "released"]
    release.join()


@pytest.mark.usefixtures("no_locks")
def test_a_file_that_a_process_of_this_machine_left_is_taken_over(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", "pass"])
    ended.wait()
    me = Owner.me()
    for owner in (replace(me, pid=ended.pid), replace(me, began="0")):
        owned_by(tmp_path, owner)
        with lock(tmp_path):
            assert json.loads((tmp_path / ".lock-owner").read_text())["began"] == me.began


@pytest.mark.usefixtures("no_locks")
def test_of_two_that_take_over_one_file_the_last_one_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stale, rival = replace(Owner.me(), began="0"), Owner("elsewhere", 18, "200")
    owned_by(tmp_path, stale)
    monkeypatch.setattr(locks.time, "sleep", lambda seconds: owned_by(tmp_path, rival))
    with pytest.raises(RunDirBusyError, match="in use by pid 18 on elsewhere"), lock(tmp_path):
        pass


@pytest.mark.parametrize(
    ("gone", "owner"),
    [
        (True, Owner("dead-node", 5, "1", job="7", restart="0", submission="mine")),  # an earlier start of this job
        (True, Owner("dead-node", 5, "1", job="6", restart="0", submission="earlier")),  # the launcher submitted again
        (False, Owner("node", 5, "1", job="7", restart="1", submission="mine")),  # this start of this job
        (False, Owner("login", 5, "1")),  # somebody's shell
        (False, Owner("node", 5, "1", job="6", restart="0")),  # another run's orchestrator
    ],
)
def test_what_is_known_of_owners_on_other_nodes(owner: Owner, gone: bool) -> None:
    assert owner.is_gone(ME) == gone


def test_other_errors_of_storage_are_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(file: int, operation: int) -> None:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(OSError, match="broken"), lock(tmp_path):
        pass


def test_rank_0_has_the_lock_for_all_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Sequence[str]] = []
    monkeypatch.setattr(worker, "_run_step", lambda directory, name: ran.append(name))
    with lock(tmp_path):
        monkeypatch.setenv("RANK", "1")
        worker.run_steps(tmp_path, ["train"])
        monkeypatch.setenv("RANK", "0")
        with pytest.raises(RunDirBusyError, match="another worker still runs"):
            worker.run_steps(tmp_path, ["train"])
    assert ran == ["train"]
