"""Runs stages as batch jobs of a Slurm cluster: submits a job, follows its log, and waits for its end.

A stage that trains has a job of its own. Stages in a row that ask one model join one serving job (`servers.py`).

    settings.py                   what can be set
    script.py, job.sbatch.jinja   the batch script
    steps.py, task.sh             srun's options, and what a task runs
    client.py                     sbatch, scontrol, sacct, squeue, scancel
    record.py                     the record of a submission
    servers.py, ../serving.py     one job with servers, for all stages that ask one model
    ../with_services.py           a step's servers, on one node or several

For a job `iter_01-policy`, `run_dir/logs/` holds its script (`.sbatch`), its log (`.log`), and the record of its
submission (`.slurm.json`). The record is written before sbatch is called, and completed after it. The job has the
record's token as its comment. So an orchestrator may die at any point: when it is started again, it finds its running
job and follows it, and does not submit a second one.

A training on several nodes is three jobs, since its first and last step need one node only: `iter_01-policy-prepare`,
`iter_01-policy` and `iter_01-policy-export`.

A job that Slurm stopped (time limit, preemption, dead node) requeues itself. If it did not, it is submitted again here.
Both together happen at most `launcher.max_requeues` times. After Ctrl-C, the job saves its work and ends. A second
Ctrl-C cancels it at once. A killed orchestrator leaves it running.

Raises `JobFailedError` with the end of the log when a job fails, and `ConfigError` when Slurm refuses it.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from nemo_srl.artifacts import write_atomic
from nemo_srl.config import ClusterConfig
from nemo_srl.errors import JobFailedError
from nemo_srl.launchers import LauncherBackend
from nemo_srl.launchers.console import Console, LogTail
from nemo_srl.launchers.logs import how_it_ended, tail
from nemo_srl.launchers.processes import log_file
from nemo_srl.launchers.slurm import client
from nemo_srl.launchers.slurm.client import JobState, SlurmUnavailableError
from nemo_srl.launchers.slurm.record import Submission, read_record, record_file, write_record
from nemo_srl.launchers.slurm.script import render
from nemo_srl.launchers.slurm.servers import ServingJobs
from nemo_srl.launchers.slurm.settings import SlurmSettings
from nemo_srl.launchers.slurm.steps import cancelled_file, parts, write_step_files
from nemo_srl.protocols import EXIT_STOPPED, Job
from nemo_srl.shared_storage import VISIBLE_SECONDS

SETTLE_SECONDS = 45.0
"""If a state such as NODE_FAIL lasts longer, the job has ended. A job that is requeued has it as well, for a moment."""
LATE_SECONDS = VISIBLE_SECONDS
"""If Slurm does not know a job, the file with its exit status may come so late."""
LOG_SECONDS = 1.0
"""Time between two looks at the log."""
CANCEL_SECONDS = 60.0
"""The launcher waits so long for a cancelled job to end."""
MAX_RELEASES = 3
"""A job that Slurm could not start is released so often."""

LAUNCH_FAILED = "LAUNCH_FAILED"
"""Our name for the end of a job that Slurm could not start."""

log = logging.getLogger(__name__)


class SlurmLauncher:
    """Implements `nemo_srl.protocols.Launcher`."""

    def __init__(self, launcher: SlurmSettings, cluster: ClusterConfig) -> None:
        self._launcher = launcher
        self._cluster = cluster
        self._serving = ServingJobs(launcher, cluster, self._run_until)

    def run(self, job: Job) -> None:
        """Run the job, or follow the one that runs already."""
        if job.services:
            return self._serving.run(job)
        self.close()
        job.log_dir.mkdir(parents=True, exist_ok=True)
        found = [(part, self._find(part)) for part in parts(job)]
        under_way = [i for i, (_, submission) in enumerate(found) if submission is not None]
        for part, submission in found[max(under_way, default=0) :]:
            self._go_on(part, submission, until=lambda: False, shown=part, again=lambda end: False)

    def close(self) -> None:
        """Let the servers end."""
        self._serving.end()

    def _run_until(self, job: Job, *, until: Callable[[], bool], shown: Job, again: Callable[[JobState], bool]) -> None:
        """See `servers.FollowUntil`."""
        job.log_dir.mkdir(parents=True, exist_ok=True)
        self._go_on(job, self._find(job), until=until, shown=shown, again=again)

    def _go_on(
        self, job: Job, submission: Submission | None, *, until: Callable[[], bool], shown: Job,
        again: Callable[[JobState], bool],
    ) -> None:  # fmt: skip
        """Follow the submission, or submit the job."""
        if submission is not None:
            log.info("%s: job %s is under way, following it", job.name, submission.job_id)
        else:
            submission = self._submit(job, num_submissions=1)
        while True:
            end = self._follow(job, submission, until, shown)
            if end is None or end.name == "COMPLETED":
                return
            if end.name == LAUNCH_FAILED:
                client.cancel(submission.job_id or "")
            if not (_was_stopped(end) or again(end)) or submission.num_submissions > self._launcher.max_requeues:
                raise JobFailedError(_explain(job, submission, end))
            log.info("%s: job %s ended as %s and was not requeued", job.name, submission.job_id, end.name)
            if submission.job_id is not None:
                client.cancel(submission.job_id)  # if Slurm requeued it after all, there would be two jobs
            submission = self._submit(job, num_submissions=submission.num_submissions + 1)

    def _submit(self, job: Job, *, num_submissions: int) -> Submission:
        submission = Submission(secrets.token_hex(8), num_submissions=num_submissions)
        text = render(job, launcher=self._launcher, cluster=self._cluster, token=submission.token)
        script = _script_file(job)
        write_atomic(script, text)
        write_step_files(job, token=submission.token)
        cancelled_file(job).unlink(missing_ok=True)
        write_record(job, submission)
        submission = replace(submission, job_id=client.submit(script))
        write_record(job, submission)
        log.info("%s: submitted as job %s", job.name, submission.job_id)
        return submission

    def _find(self, job: Job) -> Submission | None:
        """The submission of this job that has not ended, if there is one."""
        found = read_record(record_file(job.log_dir, job.name))
        if found is None:
            return None
        while True:
            try:
                if found.job_id is None:
                    job_id = client.find(found.comment, _script_file(job))
                    if job_id is None:
                        return None  # the orchestrator died before sbatch had submitted the job
                    found = replace(found, job_id=job_id)
                    write_record(job, found)
                assert found.job_id is not None
                state = client.state(found.job_id, exit_file=_exit_file(job))
                return None if state.name in client.FINAL - client.PASSING else found
            except SlurmUnavailableError as e:
                # To submit now could start a second job beside a running one.
                log.warning("%s; waiting for Slurm, since a job may be running", e)
                time.sleep(self._launcher.poll_seconds)

    def _follow(self, job: Job, submission: Submission, until: Callable[[], bool], shown: Job) -> JobState | None:
        assert submission.job_id is not None
        console = Console()
        try:
            follower = _Follower(job, submission.job_id, console, self._launcher.poll_seconds, shown)
            return follower.to_the_end(until)
        except KeyboardInterrupt:
            self._stop(job, submission.job_id)
            raise
        finally:
            console.end()

    def _stop(self, job: Job, job_id: str) -> None:
        """After Ctrl-C: let the job save its work. A checkpoint of 70B parameters takes minutes."""
        log.warning("%s: job %s saves its work and ends. Ctrl-C again cancels it at once.", job.name, job_id)
        try:
            cancelled_file(job).touch()
            client.ask_to_stop(job_id)
            if self._ends(job, job_id, self._launcher.signal_seconds):
                return
        except KeyboardInterrupt:
            pass
        log.warning("%s: cancelling job %s", job.name, job_id)
        client.cancel(job_id)
        self._ends(job, job_id, CANCEL_SECONDS)

    def _ends(self, job: Job, job_id: str, seconds: float) -> bool:
        """Wait for a job that was told to end. Returns whether it did. One that is pending does not by itself."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                state = client.state(job_id, exit_file=_exit_file(job))
                if state.name in client.FINAL or state.name == "PENDING":
                    return state.name in client.FINAL
            except SlurmUnavailableError as e:
                log.warning("%s", e)
            time.sleep(LOG_SECONDS)
        return False


class _Follower:
    """Follows one job: shows its log on the console, and asks for its state until it has ended."""

    def __init__(self, job: Job, job_id: str, console: Console, poll_seconds: float, shown: Job) -> None:
        self._job, self._job_id, self._console = job, job_id, console
        self._poll_seconds = poll_seconds
        self._log = LogTail(log_file(shown), console)
        self._restarts = 0
        self._releases = 0

    def to_the_end(self, until: Callable[[], bool]) -> JobState | None:
        """The state in which the job ended. None if `until` holds before."""
        next_poll, settled_at, warned = 0.0, float("inf"), False
        while True:
            self._log.show()
            if until():
                return None
            if time.monotonic() >= next_poll:
                next_poll = time.monotonic() + self._poll_seconds
                try:
                    state = client.state(self._job_id, exit_file=_exit_file(self._job))
                except SlurmUnavailableError as e:
                    if not warned:
                        log.warning("%s; the job goes on, asking again every %g s", e, self._poll_seconds)
                    warned = True
                else:
                    warned = False
                    self._tell(state)
                    if state.reason == client.LAUNCH_FAILED and not self._release():
                        return JobState(LAUNCH_FAILED)
                    # A final state that another one may follow counts only after it has lasted for some time.
                    if (seconds := _seconds_to_settle(state)) == 0:
                        settled_at = float("inf")
                    elif settled_at == float("inf"):
                        settled_at = time.monotonic() + seconds
                    if state.name in client.FINAL and not time.monotonic() < settled_at < float("inf"):
                        self._log.show()
                        return state
            time.sleep(min(LOG_SECONDS, self._poll_seconds))

    def _tell(self, state: JobState) -> None:
        if state.restarts > self._restarts:
            log.info("%s: job %s was requeued (restart %d)", self._job.name, self._job_id, state.restarts)
            self._restarts = state.restarts
        if state.name == "PENDING":
            self._console.show(f"job {self._job_id} is pending ({state.reason})")

    def _release(self) -> bool:
        """Let Slurm try again to start the job. Returns False after several times."""
        self._releases += 1
        if self._releases > MAX_RELEASES:
            return False
        log.warning("%s: Slurm could not start job %s and holds it; releasing it", self._job.name, self._job_id)
        client.release(self._job_id)
        return True


def _seconds_to_settle(state: JobState) -> float:
    """So long must a final state last to be the job's last one."""
    if state.name in client.PASSING:
        return SETTLE_SECONDS
    return LATE_SECONDS if state.name == "GONE" else 0.0


def _was_stopped(end: JobState) -> bool:
    """Whether Slurm stopped the job, and not an error or a user. Then the same job may go on."""
    return end.name in client.PASSING | {"TIMEOUT"} or (end.name == "FAILED" and end.exit_status == EXIT_STOPPED)


def _explain(job: Job, submission: Submission, end: JobState) -> str:
    log_path = log_file(job)
    how = end.name
    if end.name == "FAILED" and end.exit_status is not None:
        how = f"FAILED {how_it_ended(end.exit_status)}"
    hints = {
        "TIMEOUT": f" Give it more time (cluster.{job.role}.time) or an earlier warning (launcher.signal_seconds).",
        "OUT_OF_MEMORY": f" Ask for more memory (mem in cluster.{job.role}.sbatch) or use whole nodes.",
        "CANCELLED": " It was cancelled from outside. Run again to go on.",
        "GONE": " Slurm does not know it any more, and it left no exit status.",
    }
    hint = hints.get(end.name, "")
    if end.name == LAUNCH_FAILED:
        return (
            f"{job.name} failed: Slurm could not start job {submission.job_id} in {MAX_RELEASES + 1} tries. `sinfo -R` "
            f"may name a bad node. Leave it out (exclude in cluster.{job.role}.sbatch), and run again to go on."
        )
    if not log_path.exists():
        hint += f" Slurm could not write {log_path}: is run_dir on a file system that all nodes share?"
    return f"{job.name} failed: Slurm job {submission.job_id} ended as {how}.{hint}\n{tail(log_path)}"


def _script_file(job: Job) -> Path:
    return job.log_dir / f"{job.name}.sbatch"


def _exit_file(job: Job) -> Path:
    return job.log_dir / f"{job.name}.exit"


def _ask_job_to_stop(job: Job) -> None:
    submission = read_record(record_file(job.log_dir, job.name))
    assert submission is not None
    assert submission.job_id is not None
    if problem := client.ask_to_stop(submission.job_id):
        raise JobFailedError(problem)


BACKEND = LauncherBackend(
    settings=SlurmSettings,
    open=SlurmLauncher,
    close=SlurmLauncher.close,
    ask_to_stop=_ask_job_to_stop,
    holds="jobs",
    visible_seconds=VISIBLE_SECONDS,
)
