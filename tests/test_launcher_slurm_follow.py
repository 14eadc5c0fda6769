"""The Slurm launcher with a scripted controller: every way in which a job can end, and the reaction to it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from nemo_srl.config import ClusterConfig
from nemo_srl.errors import JobFailedError
from nemo_srl.launchers import slurm
from nemo_srl.launchers.slurm import SlurmLauncher, client
from nemo_srl.launchers.slurm.client import JobState, SlurmUnavailableError
from nemo_srl.launchers.slurm.settings import SlurmSettings
from nemo_srl.protocols import Job, JobStep

Answers = list[JobState | Exception]


@pytest.fixture
def controller(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """`controller(answers, known=...)` scripts what Slurm says in turn; returns the calls that it got."""

    def install(answers: Answers, *, known: str | None = None) -> list[str]:
        calls: list[str] = []

        def submit(script: Path) -> str:
            calls.append("submit")
            return str(calls.count("submit"))

        def state(job_id: str, *, exit_file: Path) -> JobState:
            answer = answers.pop(0) if len(answers) > 1 else answers[0]
            if isinstance(answer, Exception):
                raise answer
            return answer

        def find(comment: str, script: Path) -> str | None:
            calls.append(f"find {comment}")
            return known

        def cancel(job_id: str) -> None:
            calls.append(f"cancel {job_id}")

        def ask_to_stop(job_id: str) -> None:
            calls.append(f"ask {job_id}")

        def release(job_id: str) -> None:
            calls.append(f"release {job_id}")

        for function in (submit, state, find, cancel, ask_to_stop, release):
            monkeypatch.setattr(client, function.__name__, function)
        monkeypatch.setattr(slurm, "SETTLE_SECONDS", 5.0)
        return calls

    return install


def job(tmp_path: Path) -> Job:
    return Job(name="job", log_dir=tmp_path / "logs", steps=[JobStep(name="s", command=["-c", "pass"])])


def launcher(max_requeues: int = 2) -> SlurmLauncher:
    return SlurmLauncher(SlurmSettings(poll_seconds=0.01, max_requeues=max_requeues), ClusterConfig())


RUNNING, COMPLETED = JobState("RUNNING"), JobState("COMPLETED", 0)


@pytest.mark.parametrize(
    "end", [JobState("TIMEOUT", 0), JobState("NODE_FAIL", 1), JobState("PREEMPTED", 0), JobState("FAILED", 75)]
)
def test_what_slurm_stopped_and_did_not_requeue_is_submitted_anew(
    tmp_path: Path, controller: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch, end: JobState
) -> None:
    calls = controller([JobState("PENDING", reason="Priority"), RUNNING, end, RUNNING, COMPLETED])
    monkeypatch.setattr(slurm, "SETTLE_SECONDS", 0.0)
    launcher().run(job(tmp_path))
    # The first is cancelled, in case that Slurm requeues it after all.
    assert calls == ["submit", "cancel 1", "submit"]


def test_new_submissions_are_capped(tmp_path: Path, controller: Callable[..., list[str]]) -> None:
    calls = controller([JobState("TIMEOUT", 0)])
    with pytest.raises(JobFailedError, match=r"cluster\.engine\.time"):
        launcher(max_requeues=2).run(job(tmp_path))
    assert calls == ["submit", "cancel 1", "submit", "cancel 2", "submit"]


def test_a_job_that_passes_through_a_dead_node_is_followed_on(
    tmp_path: Path, controller: Callable[..., list[str]]
) -> None:
    node_fail, requeued = JobState("NODE_FAIL", 1), replace(RUNNING, restarts=1)
    calls = controller([RUNNING, node_fail, JobState("PENDING", reason="BeginTime", restarts=1), requeued, COMPLETED])
    launcher().run(job(tmp_path))
    assert calls == ["submit"]


def test_a_job_that_slurm_has_forgotten_may_leave_its_exit_status_late(
    tmp_path: Path, controller: Callable[..., list[str]]
) -> None:
    calls = controller([RUNNING, JobState("GONE"), JobState("GONE"), COMPLETED])
    launcher().run(job(tmp_path))
    assert calls == ["submit"]


@pytest.mark.parametrize(
    ("end", "said"),
    [
        (JobState("FAILED", 2), "exit status 2"),
        (JobState("FAILED", 137), "SIGKILL"),
        (JobState("OUT_OF_MEMORY", 137), "more memory"),
        (JobState("CANCELLED", 75), "cancelled from outside"),
        (JobState("GONE"), "does not know it any more"),
    ],
)
def test_an_end_that_is_nobodys_time_limit_is_an_error_with_the_log(
    tmp_path: Path, controller: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch, end: JobState, said: str
) -> None:
    calls = controller([RUNNING, end])
    monkeypatch.setattr(slurm, "LATE_SECONDS", 0.1)
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "job.log").write_text("the last words\n")
    with pytest.raises(JobFailedError, match=said) as e:
        launcher().run(job(tmp_path))
    assert "the last words" in str(e.value)
    assert calls == ["submit"]


def test_a_controller_that_does_not_answer_ends_nothing(tmp_path: Path, controller: Callable[..., list[str]]) -> None:
    away = SlurmUnavailableError("scontrol: Unable to contact slurm controller")
    calls = controller([RUNNING, away, away, RUNNING, COMPLETED])
    launcher().run(job(tmp_path))
    assert calls == ["submit"]


def test_a_submission_without_an_id_is_looked_for_before_another_is_made(
    tmp_path: Path, controller: Callable[..., list[str]]
) -> None:
    record = tmp_path / "logs" / "job.slurm.json"
    record.parent.mkdir()
    record.write_text(json.dumps({"token": "abc", "job_id": None, "num_submissions": 1}))
    assert controller([RUNNING, COMPLETED], known="17") == []
    launcher().run(job(tmp_path))
    assert json.loads(record.read_text())["job_id"] == "17"

    record.write_text(json.dumps({"token": "abc", "job_id": None, "num_submissions": 1}))
    calls = controller([RUNNING, COMPLETED])
    launcher().run(job(tmp_path))
    assert calls == ["find nemo_srl:abc", "submit"]


def test_a_finished_job_of_an_earlier_start_is_not_followed(
    tmp_path: Path, controller: Callable[..., list[str]]
) -> None:
    record = tmp_path / "logs" / "job.slurm.json"
    record.parent.mkdir()
    record.write_text(json.dumps({"token": "abc", "job_id": "5", "num_submissions": 1}))
    calls = controller([JobState("FAILED", 1), RUNNING, COMPLETED])
    launcher().run(job(tmp_path))
    assert calls == ["submit"]


def training(tmp_path: Path) -> Job:
    """A training on two nodes."""
    steps = [JobStep(name=name, command=["-c", "pass"], distributed=name == "train") for name in STEPS]
    return Job(name="job", log_dir=tmp_path / "logs", steps=steps, role="trainer", num_nodes=2)


STEPS = ("prepare", "train", "export")


def test_a_training_holds_its_nodes_only_while_it_trains(tmp_path: Path, controller: Callable[..., list[str]]) -> None:
    calls = controller([COMPLETED])
    launcher().run(training(tmp_path))
    assert calls == ["submit"] * 3
    for name, nodes, steps in (("job-prepare", 1, STEPS[:1]), ("job", 2, STEPS[:2]), ("job-export", 1, STEPS[2:])):
        script = (tmp_path / "logs" / f"{name}.sbatch").read_text()
        assert f"#SBATCH --nodes={nodes}\n" in script
        assert [line.split()[1] for line in script.splitlines() if line.startswith("run_step ")] == list(steps)


def test_a_training_under_way_is_followed_and_not_prepared_beside_it(
    tmp_path: Path, controller: Callable[..., list[str]]
) -> None:
    calls = controller([COMPLETED, RUNNING, COMPLETED])
    (tmp_path / "logs").mkdir()
    for job_id, name in (("5", "job-prepare"), ("6", "job")):
        record = {"token": name, "job_id": job_id, "num_submissions": 1}
        (tmp_path / "logs" / f"{name}.slurm.json").write_text(json.dumps(record))
    launcher().run(training(tmp_path))
    assert calls == ["submit"]
    assert (tmp_path / "logs" / "job-export.sbatch").exists()


HELD = JobState("PENDING", reason="launch_failed_requeued_held")


def test_a_job_that_slurm_could_not_start_and_holds_is_released(
    tmp_path: Path, controller: Callable[..., list[str]]
) -> None:
    calls = controller([HELD, RUNNING, COMPLETED])
    launcher().run(job(tmp_path))
    assert calls == ["submit", "release 1"]


def test_a_job_that_slurm_can_never_start_is_given_up(tmp_path: Path, controller: Callable[..., list[str]]) -> None:
    calls = controller([HELD])
    with pytest.raises(JobFailedError, match=r"could not start job 1 in 4 tries.*exclude in cluster\.engine\.sbatch"):
        launcher().run(job(tmp_path))
    assert calls == ["submit", "release 1", "release 1", "release 1", "cancel 1"]


class Interrupted(Answers):
    """The user presses Ctrl-C while the state is asked for, at each of these places."""

    def __init__(self, *places: int, answers: Answers) -> None:
        super().__init__(answers)
        self._places, self._asked = places, 0

    def pop(self, index: int = -1) -> JobState | Exception:  # type: ignore[override]
        self._asked += 1
        if self._asked in self._places:
            raise KeyboardInterrupt
        return super().pop(index)


def test_ctrl_c_lets_a_job_save_its_work_and_ctrl_c_again_cancels_it(
    tmp_path: Path, controller: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm, "LOG_SECONDS", 0.01)
    stopped = JobState("FAILED", 75)
    calls = controller(Interrupted(2, answers=[RUNNING, RUNNING, stopped, stopped]))
    with pytest.raises(KeyboardInterrupt):
        launcher().run(job(tmp_path))
    assert calls == ["submit", "ask 1"]
    assert (tmp_path / "logs" / "job.cancelled").exists(), "the job must not be requeued"

    # The second start goes on where the job stopped, and the user is less patient.
    calls = controller(Interrupted(3, 4, answers=[stopped, RUNNING, stopped, stopped]))
    with pytest.raises(KeyboardInterrupt):
        launcher().run(job(tmp_path))
    assert calls == ["submit", "ask 1", "cancel 1"]


def test_ctrl_c_cancels_a_job_that_is_pending(
    tmp_path: Path, controller: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm, "LOG_SECONDS", 0.01)
    pending, cancelled = JobState("PENDING", reason="Priority"), JobState("CANCELLED")
    calls = controller(Interrupted(2, answers=[pending, pending, cancelled, cancelled]))
    with pytest.raises(KeyboardInterrupt):
        launcher().run(job(tmp_path))
    assert calls == ["submit", "ask 1", "cancel 1"]


def test_progress_bars_of_the_log_reach_the_console(
    tmp_path: Path, controller: Callable[..., list[str]], capfd: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "logs" / "job.log"

    class Writes(Answers):
        def pop(self, index: int = -1) -> JobState | Exception:  # type: ignore[override]
            with log.open("a") as f:
                f.write("chatter\n\r 50% done\r")
            return super().pop(index)

    controller(Writes([RUNNING, RUNNING, COMPLETED]))
    launcher().run(job(tmp_path))
    shown = capfd.readouterr().err
    assert "50% done" in shown
    assert "chatter" not in shown
