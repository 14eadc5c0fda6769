"""`python supervisor.py PARENT_PID GRACE_SECONDS PROGRAM ARGS...`: run a program, and leave nothing of it behind.

This process ends the program and everything that the program started, by TERM, a grace period and KILL, in three cases:

- It gets TERM or INT.
- Its own parent ends in any way, kill -9 included.
- The program itself ends. A server may leave workers behind, which would hold its GPUs.

Descendants that moved to a process group of their own are found as well. MPI's workers do that. The exit status is the
program's. 128 + N stands for signal N.

All of this works on Linux. On other systems, nothing happens when the parent is killed, and only the program's process
group is ended. This file is run by its path and imports nothing of the package, so that it starts at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36


class Stopped(Exception):
    """This process got TERM or INT."""


def prctl(option: int, value: int) -> None:
    """The system call of Linux. Elsewhere it does nothing."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value)


def follow_parent(parent: int, sig: signal.Signals) -> None:
    """Have the kernel send `sig` to this process when its parent ends."""
    prctl(PR_SET_PDEATHSIG, sig)
    if os.getppid() != parent:  # the parent ended before the call
        os.kill(os.getpid(), sig)


def descendants() -> list[int]:
    """All living processes below this one. Orphans are among them, because this process is their subreaper."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError):
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            if state not in "ZX":
                children.setdefault(int(parent), []).append(int(stat.parent.name))
    found, todo = [], [os.getpid()]
    while todo:
        below = children.get(todo.pop(), [])
        found += below
        todo += below
    return found


def send(group: int, sig: signal.Signals) -> None:
    """Send a signal to a process group, and to each descendant that has left it."""
    others = []
    for pid in descendants():
        with contextlib.suppress(ProcessLookupError):
            if os.getpgid(pid) != group:
                others.append(pid)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, sig)
    for pid in others:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, sig)


def end_all(child: subprocess.Popen[bytes], grace_seconds: float) -> None:
    """End the program and all descendants: TERM, a grace period, KILL."""
    for sig in (signal.SIGTERM, signal.SIGKILL):
        send(child.pid, sig)
        deadline = time.monotonic() + grace_seconds
        while time.monotonic() < deadline:
            if child.poll() is not None and not descendants():
                return
            time.sleep(0.02)


def ignore_signals() -> None:
    """Ignore TERM and INT from now on."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def stop(number: int, frame: FrameType | None) -> None:
    """Only the first signal counts. A second one must not end what the first one began."""
    ignore_signals()
    raise Stopped


def main(parent: int, grace_seconds: float, command: list[str]) -> int:
    me = os.getpid()
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    child = None
    try:
        prctl(PR_SET_CHILD_SUBREAPER, 1)
        follow_parent(parent, signal.SIGTERM)
        # If this process itself is killed, the kernel kills the program as well.
        child = subprocess.Popen(command, start_new_session=True, preexec_fn=lambda: follow_parent(me, signal.SIGKILL))
        status = child.wait()
        ignore_signals()
    except Stopped:
        status = -signal.SIGTERM
    except OSError as e:
        print(f"cannot run {command[0]!r}: {e.strerror}", file=sys.stderr)
        return 127
    if child is not None:
        end_all(child, grace_seconds)
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]))
