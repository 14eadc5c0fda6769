"""`python supervisor.py PARENT_PID GRACE_SECONDS PROGRAM ARGS...`: run a program and let nothing of it survive.

The program and whatever it starts are ended, by TERM, a grace period and KILL, when this process gets
TERM or INT, when the process that started it ends in any way (kill -9 included), and when the program
itself ends (a server whose parent died must not leave the workers that hold its GPUs). Descendants that
moved to a group of their own, as MPI's do, are found too. The exit status is the program's; 128 + N
stands for signal N.

Linux only in full: elsewhere nothing follows a killed parent, and only the program's process group is
ended. This file runs by its path and imports nothing of the package, so that it starts at once.
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
    """TERM or INT came."""


def prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value)


def follow_parent(parent: int, sig: signal.Signals) -> None:
    """Have the kernel send `sig` to this process when its parent ends."""
    prctl(PR_SET_PDEATHSIG, sig)
    if os.getppid() != parent:  # it ended before the call
        os.kill(os.getpid(), sig)


def descendants() -> list[int]:
    """All living processes below this one; orphans are among them, since this is their subreaper."""
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
    """Signal a process group, and each descendant that has left it."""
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
    for sig in (signal.SIGTERM, signal.SIGKILL):
        send(child.pid, sig)
        deadline = time.monotonic() + grace_seconds
        while time.monotonic() < deadline:
            if child.poll() is not None and not descendants():
                return
            time.sleep(0.02)


def main(parent: int, grace_seconds: float, command: list[str]) -> int:
    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped

    me = os.getpid()
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    child = None
    try:
        prctl(PR_SET_CHILD_SUBREAPER, 1)
        follow_parent(parent, signal.SIGTERM)
        # Should this process be killed itself, the program still goes with it.
        child = subprocess.Popen(command, start_new_session=True, preexec_fn=lambda: follow_parent(me, signal.SIGKILL))
        status = child.wait()
    except Stopped:
        status = -signal.SIGTERM
    except OSError as e:
        print(f"cannot run {command[0]!r}: {e.strerror}", file=sys.stderr)
        return 127
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if child is not None:
        end_all(child, grace_seconds)
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]))
