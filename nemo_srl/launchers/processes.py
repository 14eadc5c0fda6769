"""What launchers share: they run a step's command in a process group of its own, and explain how it ended."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from nemo_srl.errors import JobFailedError
from nemo_srl.launchers.console import Console
from nemo_srl.launchers.logs import how_it_ended, tail
from nemo_srl.launchers.services import RunningServices
from nemo_srl.protocols import Job, JobStep

GRACE_SECONDS = 30
"""Time between TERM and KILL when a job is stopped."""


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
    command: Sequence[str], env: Mapping[str, str], log_path: Path, services: RunningServices | None = None
) -> int:
    """Run a command to its end and return its exit status. Its output goes to the log."""
    services = services or RunningServices(())
    with log_path.open("ab") as log:
        log.write(f"$ {' '.join(command)}\n".encode())
        log.flush()
        process = subprocess.Popen(
            command, env=dict(env), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        assert process.stdout is not None
        try:
            with process.stdout as output, services.ending(process):
                _copy_output(output, log)
                return process.wait()
        except BaseException:
            stop_group(process)
            raise


def _copy_output(source: IO[bytes], log: IO[bytes]) -> None:
    console = Console()
    while block := os.read(source.fileno(), 1 << 16):
        log.write(block)
        log.flush()
        console.feed(block)
    console.end()


def stop_group(process: subprocess.Popen[bytes]) -> None:
    """End a process that leads a group, with its group: TERM, a grace period, KILL."""
    for sig in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sig)
            process.wait(GRACE_SECONDS)
            return
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue
