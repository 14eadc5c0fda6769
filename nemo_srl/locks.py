"""Locks of directories: one orchestrator in a run directory, one worker in the directory of a stage, one process that
makes a model in a cache.

The kernel's lock (flock) ends with its process, however that ends. Some network file systems have none: NFS without its
lock service (ENOLCK), Lustre without `-o flock` (ENOSYS). There, the lock is a file that names its owner. It stays when
a node dies. It is taken over if its owner is surely gone: a process of this machine that has ended, an earlier start of
the same Slurm job, or an earlier submission of a stage's job, which its launcher has seen ending. In other cases, the
error says who the owner was, and which file to delete.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from nemo_srl.errors import RunDirBusyError

_HELD = (errno.EACCES, errno.EAGAIN)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
SETTLE_SECONDS = 1.0
"""Two processes may take over one file at the same time. After so long, both see who was the last."""
POLL_SECONDS = 0.5

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Owner:
    """A process that holds a lock."""

    host: str
    pid: int
    began: str
    """The time of the process's start, as the kernel counts. Numbers of processes are used again."""
    job: str = ""
    """Its Slurm job."""
    restart: str = ""
    """The start of this job: 0 for the first, 1 for the first after a requeue."""
    submission: str = ""
    """The launcher's token of the job, for processes of a stage's job."""

    @classmethod
    def me(cls) -> Owner:
        job, pid = os.environ.get("SLURM_JOB_ID", ""), os.getpid()
        restart = os.environ.get("SLURM_RESTART_COUNT", "0") if job else ""
        return cls(socket.gethostname(), pid, _began(pid), job, restart, os.environ.get("NEMO_SRL_TOKEN", ""))

    def is_gone(self, me: Owner) -> bool:
        """Whether the process has surely ended."""
        if self.host == me.host:
            return _began(self.pid) != self.began
        if self.job and self.job == me.job:
            return self.restart != me.restart
        return bool(self.submission and me.submission) and self.submission != me.submission

    def __str__(self) -> str:
        return f"pid {self.pid} on {self.host}" + (f" in the Slurm job {self.job}" if self.job else "")


class DirectoryLock:
    """A lock, as a context manager. `path` is its file, which stays.

    `busy` is the message of the `RunDirBusyError` when another process still has the lock after `wait_seconds`.
    `{owner}` in it is replaced.
    """

    def __init__(self, path: Path, *, busy: str, wait_seconds: float = 0.0) -> None:
        self._path, self._busy, self._wait_seconds = path, busy, wait_seconds
        self._owner_path = path.with_name(f"{path.name}-owner")
        self._me = Owner.me()
        self._file: int | None = None

    def __enter__(self) -> DirectoryLock:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        deadline, is_told = time.monotonic() + self._wait_seconds, False
        while True:
            try:
                self._take()
                return self
            except RunDirBusyError as e:
                if time.monotonic() >= deadline:
                    raise
                if not is_told:
                    log.info("waiting up to %g s: %s", self._wait_seconds, e)
                is_told = True
                time.sleep(POLL_SECONDS)

    def _take(self) -> None:
        file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            os.close(file)
            if e.errno in _HELD:
                raise self._error(_read(self._path)) from None
            if e.errno not in _NO_LOCKS:
                raise
            self._become_owner()
        else:
            self._file = file
            os.ftruncate(file, 0)
            os.write(file, self._text)

    def __exit__(self, *args: object) -> None:
        if self._file is not None:
            os.close(self._file)  # ends the kernel's lock
            self._file = None
        elif _read(self._owner_path) == self._me:
            self._owner_path.unlink()

    @property
    def _text(self) -> bytes:
        return json.dumps(asdict(self._me)).encode() + b"\n"

    def _become_owner(self) -> None:
        """Take the lock where the kernel has none."""
        try:
            file = os.open(self._owner_path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            found = _read(self._owner_path)
            if found is None or not found.is_gone(self._me):
                raise self._error(found, f" If that process is gone, delete {self._owner_path}.") from None
            own = self._owner_path.with_name(f"{self._owner_path.name}-{self._me.host}-{self._me.pid}")
            own.write_bytes(self._text)
            own.replace(self._owner_path)
            time.sleep(SETTLE_SECONDS)
            if (last := _read(self._owner_path)) != self._me:
                raise self._error(last) from None
        else:
            os.write(file, self._text)
            os.close(file)

    def _error(self, owner: Owner | None, remedy: str = "") -> RunDirBusyError:
        return RunDirBusyError(self._busy.replace("{owner}", str(owner or "an unknown process")) + remedy)


def _read(path: Path) -> Owner | None:
    try:
        return Owner(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def _began(pid: int) -> str:
    """When a process of this machine began. "" if there is none, and where there is no /proc."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
