"""Stages that ask models, on `launcher=srun`: one serving step for all stages in a row that ask one model.

The serving step runs in the background of the allocation. `../serving.py` says how the steps of a stage join it. It
ends when a job comes that it does not fit, and then its GPUs are free. If it is killed, it is started again.
"""

from __future__ import annotations

import logging
import secrets
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict

from nemo_srl.config import ClusterConfig
from nemo_srl.errors import JobFailedError, StoppedError
from nemo_srl.launchers import serving
from nemo_srl.launchers.console import Console, LogTail
from nemo_srl.launchers.logs import how_it_ended, tail
from nemo_srl.launchers.processes import GRACE_SECONDS, log_file, step_failed, stop_group
from nemo_srl.launchers.serving import Handed
from nemo_srl.launchers.slurm.settings import SrunSettings
from nemo_srl.launchers.slurm.steps import resources, was_stopped
from nemo_srl.protocols import Job

POLL_SECONDS = 0.25

log = logging.getLogger(__name__)

Commands = Callable[[Job, str], tuple[dict[str, str], list[list[str]]]]
"""(job, token) -> the environment of its steps, and their commands under srun."""


class ServingSteps:
    """The serving step of the moment."""

    def __init__(self, launcher: SrunSettings, cluster: ClusterConfig, commands: Commands) -> None:
        self._launcher, self._cluster, self._commands = launcher, cluster, commands
        self._serving: Job | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._token = ""

    def run(self, job: Job) -> None:
        """Run the steps of a stage beside the servers that it needs. Raises `JobFailedError` and `StoppedError`."""
        if self._serving is None or not serving.fits(job, self._serving):
            self.end()
            self._serving = serving.serving_job(
                job, idle_seconds=self._launcher.idle_seconds, resources=asdict(resources(self._cluster, job))
            )
        handed = serving.hand_in(job, self._serving)
        console = Console()
        try:
            self._wait(job, self._serving, handed, LogTail(log_file(job), console))
        except BaseException:
            self._kill()
            raise
        finally:
            console.end()
        result = handed.result()
        assert result is not None
        if result.code:
            raise step_failed(job, next(s for s in job.steps if s.name == result.step), result.code)

    def end(self) -> None:
        """Let the serving step end, and wait for that."""
        running, self._serving = self._serving, None
        if running is not None and self._process is not None and self._process.poll() is None:
            serving.let_end(running, self._token)
            try:
                self._process.wait(2 * GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                self._kill()
        self._process = None

    def _wait(self, job: Job, running: Job, handed: Handed, shown: LogTail) -> None:
        may_go_on = serving.may_go_on(handed)
        while handed.result() is None:
            shown.show()
            if self._process is None:
                self._process = self._start(running)
            if (code := self._process.poll()) is None:
                time.sleep(POLL_SECONDS)
                continue
            self._process = None
            if was_stopped(running):
                raise StoppedError(f"{job.name} was asked to stop. Run again to go on.")
            if code and not may_go_on():
                raise JobFailedError(
                    f"{job.name}: its servers ({running.name}) ended {how_it_ended(code)}\n{tail(log_file(running))}"
                )
            log.warning("%s: %s ended %s, starting it again", job.name, running.name, how_it_ended(code))
        shown.show()

    def _start(self, running: Job) -> subprocess.Popen[bytes]:
        self._token = secrets.token_hex(8)
        env, (command,) = self._commands(running, self._token)
        with log_file(running).open("ab") as out:
            out.write(f"$ {' '.join(command)}\n".encode())
            out.flush()
            return subprocess.Popen(
                command, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip

    def _kill(self) -> None:
        if self._process is not None and self._process.poll() is None:
            stop_group(self._process)
        self._process = None
