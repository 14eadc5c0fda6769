"""Slurm's commands, and what they say about a job.

The controller knows a job's state. Once it has forgotten the job, the accounting database knows it. On clusters without
accounting, or without `sacct` on this node, the job's script leaves a file. If the controller does not answer, that
says nothing about the job, and `SlurmUnavailableError` is raised. The commands are Slurm's own, from PATH.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from nemo_srl.errors import ConfigError, JobFailedError
from nemo_srl.shared_storage import ask_again

TIMEOUT_SECONDS = 60

FINAL = frozenset(
    ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "BOOT_FAIL",
     "DEADLINE", "REVOKED", "GONE")
)  # fmt: skip
"""States in which nothing of a job runs any more. GONE is ours: Slurm does not know the job any more."""
PASSING = frozenset(("NODE_FAIL", "PREEMPTED", "BOOT_FAIL"))
"""Final states that a job also has for a moment on its way back into the queue."""
LAUNCH_FAILED = "launch_failed_requeued_held"
"""Why a job is pending that Slurm could not start, for example because a node's prolog failed. Slurm holds it."""


class SlurmUnavailableError(JobFailedError):
    """Slurm did not answer. The job may be running."""


@dataclass(frozen=True)
class JobState:
    """`exit_status` is the batch script's. `reason` is Slurm's word for why a job is pending."""

    name: str
    exit_status: int | None = None
    reason: str = ""
    restarts: int = 0


def submit(script: Path) -> str:
    """Submit a job and return its id. Raises `ConfigError` with what sbatch said."""
    done = _slurm("sbatch", "--parsable", str(script))
    if done.returncode:
        # Here Slurm refuses what a user asked for wrongly: partition, account, limits.
        raise ConfigError(f"sbatch refused {script}:\n{done.stderr.strip()}\nSee `cluster` in the configuration.")
    return done.stdout.strip().split(";")[0]


def find(comment: str, script: Path) -> str | None:
    """The id of this user's job with that comment, if the controller knows one.

    Some sites write comments of their own. So without such a job, it is the latest job of this script.
    """
    done = _slurm("squeue", "--me", "--noheader", "--states=all", "--sort=-i", "--format=%i|%k|%o")
    if done.returncode:
        raise SlurmUnavailableError(f"squeue: {done.stderr.strip()}")
    jobs = [line.strip().split("|") for line in done.stdout.splitlines()]
    of_comment = [job[0] for job in jobs if comment in job[1:-1]]
    return next(iter(of_comment + [job[0] for job in jobs if job[-1] == str(script)]), None)


def state(job_id: str, *, exit_file: Path) -> JobState:
    """The state of the job. Raises `SlurmUnavailableError`."""
    done = _slurm("scontrol", "show", "job", "--oneliner", job_id)
    if done.returncode == 0 and (name := re.search(r"\bJobState=(\w+)", done.stdout)):
        code = re.search(r"\bExitCode=(\d+):(\d+)", done.stdout)
        reason = re.search(r"\bReason=(\S+)", done.stdout)
        restarts = re.search(r"\bRestarts=(\d+)", done.stdout)
        return JobState(name[1], _exit_status(code), reason[1] if reason else "", int(restarts[1]) if restarts else 0)
    if "Invalid job id" not in done.stderr:
        raise SlurmUnavailableError(f"scontrol: {done.stderr.strip() or done.stdout.strip()}")
    if shutil.which("sacct"):
        command = ("sacct", "--allocations", "--noheader", "--parsable2", "--jobs", job_id, "--format=State,ExitCode")
        done = _slurm(*command)
        if done.returncode == 0 and (rows := done.stdout.split("\n")[:-1]):
            name_field, _, code_field = rows[-1].partition("|")
            status = _exit_status(re.match(r"(\d+):(\d+)", code_field))
            return JobState(name_field.split()[0], status)  # the name may be "CANCELLED by 0"
    ask_again(exit_file.parent)
    if exit_file.exists() and (words := exit_file.read_text().split())[:1] == [job_id]:
        return JobState("COMPLETED" if words[1] == "0" else "FAILED", int(words[1]))
    return JobState("GONE")


def cancel(job_id: str) -> None:
    """End the job at once."""
    _slurm("scancel", job_id)


def ask_to_stop(job_id: str) -> str:
    """Send the job's script what it gets before a time limit. It lets the steps save their work.

    Returns what Slurm says against it. Empty: nothing.
    """
    done = _slurm("scancel", "--batch", "--signal=USR1", job_id)
    return f"scancel --batch --signal=USR1 {job_id}: {done.stderr.strip()}" if done.returncode else ""


def release(job_id: str) -> None:
    """Let a held job start."""
    _slurm("scontrol", "release", job_id)


def _exit_status(code: re.Match[str] | None) -> int | None:
    """Slurm's `status:signal` as a shell would report it."""
    if code is None:
        return None
    status, number = int(code[1]), int(code[2])
    return 128 + number if number else status


def _slurm(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, env=_environment(), text=True, capture_output=True, timeout=TIMEOUT_SECONDS, check=False
        )
    except FileNotFoundError:
        raise ConfigError(
            f"launcher.name=slurm: there is no {command[0]!r} on PATH. Run this on a node that submits to Slurm."
        ) from None
    except subprocess.TimeoutExpired:
        raise SlurmUnavailableError(f"{shlex.join(command)}: no answer in {TIMEOUT_SECONDS} s") from None


def _environment() -> dict[str, str]:
    """Without the variables of a job that the orchestrator may run in: sbatch takes options from these as well."""
    kept = {"SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS"}
    return {
        key: value
        for key, value in os.environ.items()
        if key in kept or not key.startswith(("SLURM_", "SBATCH_", "SRUN_", "PMI", "PMIX_"))
    }
