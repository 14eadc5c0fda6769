"""Runs every stage as a batch job of a Slurm cluster: submits the job, follows its log, and waits for its end.

    settings.py                   what can be set
    script.py, job.sbatch.jinja   the batch script
    steps.py, task.sh             srun's options, and what a task runs
    client.py                     sbatch, scontrol, sacct, squeue, scancel
    ../with_services.py           a step's servers, on one node or several

For a job `iter_01-policy`, `run_dir/logs/` holds its script (`.sbatch`), its log (`.log`), and the record of its
submission (`.slurm.json`). The record is written before sbatch is called, and completed after it. The job has the
record's token as its comment. So an orchestrator may die at any point: when it is started again, it finds its running
job and follows it, and does not submit a second one.

A job that Slurm stopped (time limit, preemption, dead node) requeues itself. If it did not, it is submitted again here.
Both together happen at most `launcher.max_requeues` times. Ctrl-C cancels the job. A killed orchestrator leaves it
running.

Raises `JobFailedError` with the end of the log when a job fails, and `ConfigError` when Slurm refuses it.
"""

from __future__ import annotations

import json
import logging
import secrets
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from nemo_srl import jsonio
from nemo_srl.artifacts import write_atomic
from nemo_srl.config import ClusterConfig
from nemo_srl.errors import DataError, JobFailedError
from nemo_srl.launchers import LauncherBackend
from nemo_srl.launchers.console import Console
from nemo_srl.launchers.logs import how_it_ended, tail
from nemo_srl.launchers.processes import log_file
from nemo_srl.launchers.slurm import client
from nemo_srl.launchers.slurm.client import JobState, SlurmUnavailableError
from nemo_srl.launchers.slurm.script import render
from nemo_srl.launchers.slurm.settings import SlurmSettings
from nemo_srl.launchers.slurm.steps import write_step_files
from nemo_srl.protocols import EXIT_STOPPED, Job

SETTLE_SECONDS = 45.0
"""If a state such as NODE_FAIL lasts longer, the job has ended. A job that is requeued has it as well, for a moment."""
LOG_SECONDS = 1.0
"""Time between two looks at the log."""
CANCEL_SECONDS = 60.0
"""After Ctrl-C, the launcher waits so long for the cancelled job to end."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Submission:
    """The record in `<job>.slurm.json`. Without a `job_id`, nobody knows whether sbatch was called."""

    token: str
    job_id: str | None = None
    num_submissions: int = 1

    @property
    def comment(self) -> str:
        return f"nemo_srl:{self.token}"


def record_file(log_dir: Path, name: str) -> Path:
    return log_dir / f"{name}.slurm.json"


def read_record(path: Path) -> Submission | None:
    """The record of the last submission. None if nothing was submitted."""
    try:
        return Submission(**jsonio.loads(path.read_bytes()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as e:
        raise DataError(
            f"{path}: damaged ({e}). See with `squeue --me` that no job of this run is left, and delete this file."
        ) from e


class SlurmLauncher:
    """Implements `nemo_srl.protocols.Launcher`."""

    def __init__(self, launcher: SlurmSettings, cluster: ClusterConfig) -> None:
        self._launcher = launcher
        self._cluster = cluster

    def run(self, job: Job) -> None:
        """Run the job, or follow the one that runs already."""
        job.log_dir.mkdir(parents=True, exist_ok=True)
        submission = self._find(job)
        if submission is not None:
            log.info("%s: job %s is under way, following it", job.name, submission.job_id)
        else:
            submission = self._submit(job, num_submissions=1)
        while True:
            end = self._follow(job, submission)
            if end.name == "COMPLETED":
                return
            if not _was_stopped(end) or submission.num_submissions > self._launcher.max_requeues:
                raise JobFailedError(_explain(job, submission, end))
            log.info("%s: job %s ended as %s and was not requeued", job.name, submission.job_id, end.name)
            if submission.job_id is not None:
                client.cancel(submission.job_id)  # if Slurm requeued it after all, there would be two jobs
            submission = self._submit(job, num_submissions=submission.num_submissions + 1)

    def _submit(self, job: Job, *, num_submissions: int) -> Submission:
        submission = Submission(secrets.token_hex(8), num_submissions=num_submissions)
        text = render(job, launcher=self._launcher, cluster=self._cluster, token=submission.token)
        script = job.log_dir / f"{job.name}.sbatch"
        write_atomic(script, text)
        write_step_files(job, token=submission.token)
        record = record_file(job.log_dir, job.name)
        write_atomic(record, json.dumps(asdict(submission)) + "\n")
        submission = replace(submission, job_id=client.submit(script))
        write_atomic(record, json.dumps(asdict(submission)) + "\n")
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
                    job_id = client.find(found.comment)
                    if job_id is None:
                        return None  # the orchestrator died before sbatch had submitted the job
                    found = replace(found, job_id=job_id)
                    write_atomic(record_file(job.log_dir, job.name), json.dumps(asdict(found)) + "\n")
                assert found.job_id is not None
                state = client.state(found.job_id, exit_file=_exit_file(job))
                return None if state.name in client.FINAL - client.PASSING else found
            except SlurmUnavailableError as e:
                # To submit now could start a second job beside a running one.
                log.warning("%s; waiting for Slurm, since a job may be running", e)
                time.sleep(self._launcher.poll_seconds)

    def _follow(self, job: Job, submission: Submission) -> JobState:
        assert submission.job_id is not None
        console = Console()
        try:
            return _Follower(job, submission.job_id, console, self._launcher.poll_seconds).to_the_end()
        except KeyboardInterrupt:
            log.warning("%s: cancelling job %s", job.name, submission.job_id)
            self._cancel(job, submission.job_id)
            raise
        finally:
            console.end()

    def _cancel(self, job: Job, job_id: str) -> None:
        client.cancel(job_id)
        deadline = time.monotonic() + CANCEL_SECONDS
        while time.monotonic() < deadline:
            try:
                if client.state(job_id, exit_file=_exit_file(job)).name in client.FINAL:
                    return
            except SlurmUnavailableError as e:
                log.warning("%s", e)
            time.sleep(LOG_SECONDS)


class _Follower:
    """Follows one job: shows its log on the console, and asks for its state until it has ended."""

    def __init__(self, job: Job, job_id: str, console: Console, poll_seconds: float) -> None:
        self._job, self._job_id, self._console = job, job_id, console
        self._poll_seconds = poll_seconds
        self._log_path = log_file(job)
        self._position = self._log_path.stat().st_size if self._log_path.exists() else 0
        self._restarts = 0

    def to_the_end(self) -> JobState:
        """The state in which the job ended."""
        next_poll, settled_at, warned = 0.0, float("inf"), False
        while True:
            self._show_log()
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
                    # A final state through which jobs may pass counts only after it has lasted for SETTLE_SECONDS.
                    if state.name not in client.PASSING:
                        settled_at = float("inf")
                    elif settled_at == float("inf"):
                        settled_at = time.monotonic() + SETTLE_SECONDS
                    if state.name in client.FINAL and not time.monotonic() < settled_at < float("inf"):
                        self._show_log()
                        return state
            time.sleep(min(LOG_SECONDS, self._poll_seconds))

    def _tell(self, state: JobState) -> None:
        if state.restarts > self._restarts:
            log.info("%s: job %s was requeued (restart %d)", self._job.name, self._job_id, state.restarts)
            self._restarts = state.restarts
        if state.name == "PENDING":
            self._console.show(f"job {self._job_id} is pending ({state.reason})")

    def _show_log(self) -> None:
        try:
            with self._log_path.open("rb") as f:
                f.seek(self._position)
                while block := f.read(1 << 16):
                    self._console.feed(block)
                self._position = f.tell()
        except FileNotFoundError:
            return


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
    if not log_path.exists():
        hint += f" Slurm could not write {log_path}: is run_dir on a file system that all nodes share?"
    return f"{job.name} failed: Slurm job {submission.job_id} ended as {how}.{hint}\n{tail(log_path)}"


def _exit_file(job: Job) -> Path:
    return job.log_dir / f"{job.name}.exit"


def _ask_job_to_stop(job: Job) -> None:
    submission = read_record(record_file(job.log_dir, job.name))
    assert submission is not None
    assert submission.job_id is not None
    if problem := client.ask_to_stop(submission.job_id):
        raise JobFailedError(problem)


BACKEND = LauncherBackend(settings=SlurmSettings, open=SlurmLauncher, ask_to_stop=_ask_job_to_stop)
