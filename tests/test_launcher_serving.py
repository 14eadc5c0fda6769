"""How the steps of stages join the job that serves their model, and what is left when either side is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from nemo_srl.errors import JobFailedError
from nemo_srl.launchers import serving
from nemo_srl.launchers.serving import Handed, Result, fits, hand_in, let_end, may_go_on, serving_job
from nemo_srl.protocols import EXIT_STOPPED, Job, JobStep, Service
from tests.processes import wait_for

SERVICES = [
    Service(name=f"s{i}", command=["serve", "model"], health_paths=("/",), start_timeout_seconds=1) for i in range(4)
]


def stage(directory: Path, name: str, *codes: str, num_services: int = 4, env: dict[str, str] | None = None) -> Job:
    return Job(
        name=name, log_dir=directory, steps=[JobStep(name=f"step{i}", command=["-c", c]) for i, c in enumerate(codes)],
        services=SERVICES[:num_services], paths=[directory], env=env or {},
    )  # fmt: skip


def serving_of(job: Job) -> Job:
    return serving_job(job, idle_seconds=60, resources={"container": "image"})


class Program:
    """The program that runs beside the servers."""

    def __init__(self, job: Job) -> None:
        self.job = serving_of(job)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, token: str = "token") -> subprocess.Popen[bytes]:
        (step,) = self.job.steps
        out = (self.job.log_dir / "out").open("ab")
        with out:
            self.process = subprocess.Popen(
                [sys.executable, *step.command], env={**os.environ, "NEMO_SRL_TOKEN": token}, stdout=out, stderr=out
            )
        return self.process


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Program]:
    found = Program(stage(tmp_path, "any"))
    yield found
    if found.process is not None and found.process.poll() is None:
        found.process.kill()
        found.process.wait()


def result_of(handed: Handed) -> Result:
    wait_for(handed.result)
    result = handed.result()
    assert result is not None
    return result


def test_steps_run_one_after_the_other_until_one_fails(tmp_path: Path, program: Program) -> None:
    first = stage(tmp_path, "one", "import os; print(os.environ['COLOR'])", "print('two')", env={"COLOR": "red"})
    handed = hand_in(first, program.job)
    process = program.start()
    assert result_of(handed) == Result(0, "step1")
    assert [line for line in (tmp_path / "one.log").read_text().splitlines() if line[0] != "$"] == ["red", "two"]
    failing = hand_in(stage(tmp_path, "bad", "raise SystemExit(3)", "print('never')"), program.job)
    assert result_of(failing) == Result(3, "step0")
    assert "never" not in (tmp_path / "bad.log").read_text().splitlines()
    let_end(program.job, "of another start")
    assert result_of(hand_in(first, program.job)) == Result(0, "step1"), "a stage may come again"
    let_end(program.job, "token")
    assert process.wait(60) == 0


WAITS = "import os, pathlib, time; d = {d!r}; open(d + '/began', 'a').write('x'); \
exec('while not os.path.exists(d + \"/go\"): time.sleep(0.05)')"


@pytest.mark.parametrize("sig", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_start_is_followed_by_one_that_runs_the_same_steps(
    tmp_path: Path, program: Program, sig: signal.Signals
) -> None:
    handed = hand_in(stage(tmp_path, "one", WAITS.format(d=str(tmp_path))), program.job)
    process = program.start()
    wait_for((tmp_path / "began").exists)
    process.send_signal(sig)
    assert process.wait(60) == (EXIT_STOPPED if sig == signal.SIGTERM else -sig)
    (tmp_path / "go").touch()
    program.start()
    assert result_of(handed) == Result(0, "step0")
    assert (tmp_path / "began").read_text() == "xx"
    assert handed.num_taken() == 2


def test_a_launcher_that_comes_back_finds_its_request_and_no_other(tmp_path: Path, program: Program) -> None:
    one = stage(tmp_path, "one", WAITS.format(d=str(tmp_path)))
    first = hand_in(one, program.job)
    assert hand_in(one, program.job) == first, "it is under way"
    assert hand_in(replace(one, steps=[]), program.job) != first
    hand_in(stage(tmp_path, "two", "pass"), program.job)
    left = [path.name for path in (tmp_path / program.job.name).glob("*.request.json")]
    assert left == ["two.request.json"], "of a launcher that was killed"
    program.start()
    assert result_of(hand_in(stage(tmp_path, "two", "pass"), program.job)).code == 0
    (tmp_path / program.job.name / "two.request.json").write_text("{")
    with pytest.raises(JobFailedError, match=r"two\.request\.json: damaged.*run again"):
        hand_in(stage(tmp_path, "two", "pass"), program.job)


def test_it_ends_when_nothing_is_asked_for_long(tmp_path: Path) -> None:
    assert serving._serve(tmp_path, 0.3) == 0


def test_a_smaller_job_of_the_same_model_fits_and_nothing_else_does(tmp_path: Path) -> None:
    whole = stage(tmp_path, "whole")
    running = serving_of(whole)
    assert fits(stage(tmp_path, "part", num_services=1), running)
    assert not fits(whole, serving_of(stage(tmp_path, "part", num_services=1))), "it has too few replicas"
    assert not fits(stage(tmp_path, "none", num_services=0), running)
    other = [replace(s, command=["serve", "another model"]) for s in SERVICES]
    assert not fits(replace(whole, services=other), running)
    assert not fits(replace(whole, paths=[tmp_path, tmp_path / "data"]), running), "its container does not see them"
    assert serving_of(replace(whole, name="later", stage="judgements", paths=[])).name == running.name
    assert serving_job(whole, idle_seconds=60, resources={"container": "another"}).name != running.name


def test_a_job_may_start_again_only_after_it_had_begun_the_steps(tmp_path: Path) -> None:
    handed = hand_in(stage(tmp_path, "one", "pass"), serving_of(stage(tmp_path, "one")))
    taken = handed.directory / "one.taken"
    allowed = may_go_on(handed)
    for _ in range(serving.MAX_FAILURES):
        with taken.open("a") as f:
            f.write(f"{handed.token}\n")
        assert allowed()
    assert not allowed()
    assert may_go_on(handed)(), "they were begun while another launcher waited for them"
    fresh = hand_in(stage(tmp_path, "two", "pass"), serving_of(stage(tmp_path, "one")))
    assert not may_go_on(fresh)(), "its servers were never ready"
