"""Stages that ask models, on `launcher=slurm`: one serving job for all stages in a row that ask one model.

The serving job is a batch job like any other, with a name of its own (`servers-<digest>`), so it is found again after
the orchestrator was killed, and requeued after time limits and dead nodes. `../serving.py` says how the steps of a
stage join it. It ends when a job comes that it does not fit: another model, or a training.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict
from typing import Protocol

from nemo_srl.config import ClusterConfig
from nemo_srl.launchers import serving
from nemo_srl.launchers.processes import step_failed
from nemo_srl.launchers.slurm import client
from nemo_srl.launchers.slurm.client import JobState, SlurmUnavailableError
from nemo_srl.launchers.slurm.record import Submission, read_record, record_file, write_record
from nemo_srl.launchers.slurm.settings import SlurmSettings
from nemo_srl.launchers.slurm.steps import resources
from nemo_srl.protocols import Job

log = logging.getLogger(__name__)


class FollowUntil(Protocol):
    """Submits a job or finds the one that runs, and follows it to its end, or until a condition holds.

    `shown` is the job whose log is shown. `again` says whether a job that failed is submitted once more.
    """

    def __call__(
        self, job: Job, *, until: Callable[[], bool], shown: Job, again: Callable[[JobState], bool]
    ) -> object: ...


class ServingJobs:
    """The serving job of the moment."""

    def __init__(self, launcher: SlurmSettings, cluster: ClusterConfig, follow: FollowUntil) -> None:
        self._launcher, self._cluster, self._follow = launcher, cluster, follow
        self._serving: Job | None = None

    def run(self, job: Job) -> None:
        """Run the steps of a stage beside the servers that it needs. Raises `JobFailedError`."""
        if self._serving is None or not serving.fits(job, self._serving):
            self.end()
            self._serving = serving.serving_job(
                job, idle_seconds=self._launcher.idle_seconds, resources=asdict(resources(self._cluster, job))
            )
        running = self._serving
        handed = serving.hand_in(job, running)
        may_go_on = serving.may_go_on(handed)

        def is_done() -> bool:
            submission = read_record(record_file(running.log_dir, running.name))
            if submission is not None and submission != _of(job):
                write_record(job, submission)  # for recipes/status.py
            return handed.result() is not None

        def again(end: JobState) -> bool:
            return end.name in ("FAILED", "OUT_OF_MEMORY") and may_go_on()

        while (result := handed.result()) is None:
            # It returns without a result if the job ended by itself, because nobody had asked for long.
            self._follow(running, until=is_done, shown=job, again=again)
        if result.code:
            raise step_failed(job, next(s for s in job.steps if s.name == result.step), result.code)

    def end(self) -> None:
        """Let the serving job end. It is not waited for."""
        running, self._serving = self._serving, None
        if running is None:
            return
        submission = read_record(record_file(running.log_dir, running.name))
        if submission is None or submission.job_id is None:
            return
        serving.let_end(running, submission.token)
        try:
            state = client.state(submission.job_id, exit_file=running.log_dir / f"{running.name}.exit")
        except SlurmUnavailableError as e:
            log.warning("%s; the servers of job %s end when they are idle", e, submission.job_id)
            return
        if state.name == "PENDING":  # it was requeued, and would start the servers once more to see that it must end
            client.cancel(submission.job_id)


def _of(job: Job) -> Submission | None:
    return read_record(record_file(job.log_dir, job.name))
