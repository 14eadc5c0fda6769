"""Runs jobs as processes of this machine: one, or one per rank under torchrun.

Everything a job prints goes to `log_dir/<job>.log`; its progress bars (what ends in a carriage return)
are shown on the console as well. A job that fails raises `JobFailedError` with the end of its log. An
interrupt stops the job's whole process group before it goes on upwards. The job's services run around
its steps (see `services`).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from nemo_srl.errors import ConfigError, JobFailedError
from nemo_srl.launchers.console import Console
from nemo_srl.launchers.processes import how_it_ended, tail
from nemo_srl.launchers.services import RunningServices, running
from nemo_srl.protocols import Job, JobStep

GRACE_SECONDS = 30
"""Between TERM and KILL, when a job is stopped."""


class LocalLauncher:
    def run(self, job: Job) -> None:
        """Run the steps one after the other. Raises `JobFailedError`, `ConfigError`."""
        if job.num_nodes > 1:
            raise several_nodes(nodes_key(job), job.num_nodes)
        job.log_dir.mkdir(parents=True, exist_ok=True)
        log_path = job.log_dir / f"{job.name}.log"
        with running(job.services, job_name=job.name, log_dir=job.log_dir) as services:
            for step in job.steps:
                env = {**environment(step, job), **services.environment}
                if code := run_step(_command(step, job), env, log_path, services):
                    services.check()  # a dead service explains the failure better than what the step said
                    how = how_it_ended(code)
                    raise JobFailedError(f"{job.name} failed in its step {step.name!r} {how}\n{tail(log_path)}")


def nodes_key(job: Job) -> str:
    """The setting that says on how many nodes the job runs."""
    return "engine.trtllm.num_nodes" if job.role == "engine" else "trainer.num_nodes"


def several_nodes(key: str, value: int) -> ConfigError:
    """What is wrong with more than one node here."""
    return ConfigError(
        f"{key}={value}: launcher.name='local' runs on this machine only; use {key}=1, or a cluster's launcher "
        "(launcher=slurm cluster=...)"
    )


def _command(step: JobStep, job: Job) -> list[str]:
    command = list(step.command)
    if not step.distributed or job.num_ranks_per_node == 1:
        return [sys.executable, *command]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={job.num_ranks_per_node}"]
    return [sys.executable, *launcher, *command]


def environment(step: JobStep, job: Job) -> dict[str, str]:
    """This process's environment, the job's own, and one share of the cores for each rank."""
    ranks = job.num_ranks_per_node if step.distributed else 1
    threads = max(1, len(os.sched_getaffinity(0)) // ranks)
    return {"OMP_NUM_THREADS": str(threads), **os.environ, "PYTHONUNBUFFERED": "1", **job.env}


def run_step(
    command: Sequence[str], env: Mapping[str, str], log_path: Path, services: RunningServices | None = None
) -> int:
    """Run a command to its end, with its output in the log; returns its exit status."""
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
            _stop(process)
            raise


def _copy_output(source: IO[bytes], log: IO[bytes]) -> None:
    console = Console()
    while block := os.read(source.fileno(), 1 << 16):
        log.write(block)
        log.flush()
        console.feed(block)
    console.end()


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the process group that we started: TERM, a grace period, KILL."""
    for sig in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sig)
            process.wait(GRACE_SECONDS)
            return
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue
