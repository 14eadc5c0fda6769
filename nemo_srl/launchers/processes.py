"""What launchers share: they run a step's command in a process group of its own, and explain how it ended."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO

from nemo_srl.errors import JobFailedError
from nemo_srl.launchers.console import Console
from nemo_srl.launchers.logs import how_it_ended, tail
from nemo_srl.launchers.services import RunningServices
from nemo_srl.protocols import Job, JobStep

SAVE_SECONDS = 600
"""After Ctrl-C, a step may save its work for so long. A checkpoint of 70B parameters takes minutes."""
GRACE_SECONDS = 30
"""Time between TERM and KILL when a step is ended."""

log = logging.getLogger(__name__)


def nodes_key(job: Job) -> str:
    """The setting that says on how many nodes the job runs."""
    return "engine.num_nodes" if job.role == "engine" else "trainer.num_nodes"


def log_file(job: Job) -> Path:
    """Everything that the job's steps print."""
    return job.log_dir / f"{job.name}.log"


def step_failed(job: Job, step: JobStep, code: int) -> JobFailedError:
    """The error for a step that ended with exit status `code`."""
    return JobFailedError(f"{job.name} failed in its step {step.name!r} {how_it_ended(code)}\n{tail(log_file(job))}")


def run_step(
    command: Sequence[str], env: Mapping[str, str], log_path: Path, services: RunningServices | None = None,
    ask_to_stop: Callable[[], None] | None = None,
) -> int:  # fmt: skip
    """Run a command to its end and return its exit status. Its output goes to the log.

    After Ctrl-C, `ask_to_stop` is called, which lets it save its work and end. By default, it gets TERM.
    """
    services = services or RunningServices(())
    with log_path.open("ab") as file:
        file.write(f"$ {' '.join(command)}\n".encode())
        file.flush()
        process = subprocess.Popen(
            command, env=dict(env), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        assert process.stdout is not None
        try:
            with process.stdout as output, services.ending(process):
                _copy_output(output, file)
                return process.wait()
        except BaseException as e:
            if isinstance(e, KeyboardInterrupt):
                log.warning("stopping: what runs may save its work. Ctrl-C again ends it at once.")
            _stop(process, ask_to_stop or (lambda: send(process, signal.SIGTERM)))
            raise


def _copy_output(source: IO[bytes], log: IO[bytes]) -> None:
    console = Console()
    while block := os.read(source.fileno(), 1 << 16):
        log.write(block)
        log.flush()
        console.feed(block)
    console.end()


def send(process: subprocess.Popen[bytes], sig: signal.Signals) -> None:
    """Send a signal to the process group that `run_step` started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, sig)


def stop_group(process: subprocess.Popen[bytes]) -> None:
    """End a process that leads a group, with its group: TERM, a grace period, KILL."""
    _end(process, _ways_to_end(process))


def _stop(process: subprocess.Popen[bytes], ask: Callable[[], None]) -> None:
    """Ask the step to save its work and end. Then TERM, a grace period, and KILL. Ctrl-C ends the waiting."""
    _end(process, [(ask, SAVE_SECONDS), *_ways_to_end(process)])


_Way = tuple[Callable[[], None], float]
"""What to do, and how long to wait for the end then."""


def _ways_to_end(process: subprocess.Popen[bytes]) -> list[_Way]:
    return [(partial(send, process, sig), GRACE_SECONDS) for sig in (signal.SIGTERM, signal.SIGKILL)]


def _end(process: subprocess.Popen[bytes], ways: Sequence[_Way]) -> None:
    for way, seconds in ways:
        try:
            way()
            process.wait(seconds)
            return
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            continue
