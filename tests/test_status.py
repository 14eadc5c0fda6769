"""`recipes/status.py`: a line per stage, from the files of a run directory and from what Slurm's commands printed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_srl import cli
from nemo_srl.artifacts import JOURNAL, MANIFEST
from nemo_srl.errors import DataError
from nemo_srl.launchers.slurm import record_file
from recipes import status
from tests.run_directory import make_run

ROOT = Path(__file__).resolve().parent.parent

# Slurm 22.05, `scontrol show job --oneliner`, shortened in the middle: a job that waits for nodes, one that was
# requeued after a node had died, one that it has forgotten.
WAITING = (
    "JobId=41 JobName=demo.iter_01-policy UserId=root(0) GroupId=root(0) MCS_label=N/A Priority=4294901752 Nice=0 "
    "Account=test QOS=normal JobState=PENDING Reason=Resources Dependency=(null) Requeue=1 Restarts=0 BatchFlag=1 "
    "Reboot=0 ExitCode=0:0 RunTime=00:00:00 TimeLimit=04:00:00 TimeMin=N/A NumNodes=8 NumCPUs=8"
)
RUNNING_AGAIN = (
    "JobId=42 JobName=demo.iter_01-judgements UserId=root(0) GroupId=root(0) MCS_label=N/A Priority=4294901751 Nice=0 "
    "Account=test QOS=normal JobState=RUNNING Reason=None Dependency=(null) Requeue=1 Restarts=2 BatchFlag=1 Reboot=0 "
    "ExitCode=0:0 RunTime=00:10:32 TimeLimit=04:00:00 TimeMin=N/A NodeList=node[1-2] NumNodes=2 NumCPUs=2"
)
FORGOTTEN = "slurm_load_jobs error: Invalid job id specified"
ANSWERS = {"41": (WAITING, "", 0), "42": (RUNNING_AGAIN, "", 0), "43": ("", FORGOTTEN, 1)}
SACCT = "FAILED|2:0\n"


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run", num_iterations=1)


def begin(run_dir: Path, stage: str) -> Path:
    """Make the published stage look unfinished."""
    (run_dir / stage / MANIFEST).unlink()
    return run_dir / stage


def rows(run_dir: Path) -> dict[str, list[str]]:
    """The table's cells by stage; columns are at least two spaces apart."""
    head, *lines = status.lines(run_dir)
    assert head.split() == ["stage", "state", "job", "progress"]
    cells = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines]
    return {stage: others for stage, *others in cells}


def submitted(run_dir: Path, stage: str, job_id: str | None) -> None:
    record = record_file(run_dir / "logs", stage.replace("/", "-"))
    record.parent.mkdir(exist_ok=True)
    record.write_text(json.dumps({"token": "abc", "job_id": job_id, "num_submissions": 1}))


def test_a_local_run_shows_what_is_published_and_how_far_the_rest_is(run_dir: Path) -> None:
    all_published = rows(run_dir)
    assert set(all_published) >= {"iter_00/sft", "iter_01/candidates", "iter_01/policy", "iter_01/evaluation"}
    assert {(state, job) for state, job, *_ in all_published.values()} == {("published", "-")}
    assert all(progress.endswith(" s") for _, _, progress in all_published.values())

    (begin(run_dir, "iter_01/judgements") / JOURNAL).write_text('{"a": 1}\n{"b": 2}\n{"half a li')
    metrics = begin(run_dir, "iter_01/policy") / "training" / "metrics.jsonl"
    metrics.write_text('{"step": 1}\n' * 7)
    begin(run_dir, "iter_01/pairs")
    found = rows(run_dir)
    assert found["iter_01/judgements"] == ["unfinished", "-", "2 model calls"]
    assert found["iter_01/policy"] == ["unfinished", "-", "7 steps"]
    assert found["iter_01/pairs"] == ["unfinished", "-", "-"]
    assert found["iter_01/candidates"] == all_published["iter_01/candidates"]


def test_a_run_on_slurm_shows_jobs_with_slurms_states(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = (
        f"#!{sys.executable}\nimport pathlib, sys\nanswers = {ANSWERS!r}\n"
        f"if pathlib.Path(sys.argv[0]).name == 'sacct':\n    sys.stdout.write({SACCT!r}); sys.exit()\n"
        "out, err, code = answers[sys.argv[-1]]\nprint(out)\nprint(err, file=sys.stderr)\nsys.exit(code)\n"
    )
    for name in ("scontrol", "sacct"):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(program)
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    for stage, job_id in (
        ("iter_01/policy", "41"), ("iter_01/judgements", "42"), ("iter_01/pairs", "43"), ("iter_01/evaluation", None),
    ):  # fmt: skip
        begin(run_dir, stage)
        submitted(run_dir, stage, job_id)
    submitted(run_dir, "iter_01/candidates", "42")
    found = rows(run_dir)
    assert found["iter_01/policy"][:2] == ["pending (Resources)", "41"]
    assert found["iter_01/judgements"][:2] == ["running, restart 2", "42"]
    assert found["iter_01/pairs"][:2] == ["failed", "43"]
    assert found["iter_01/evaluation"][:2] == ["unfinished", "-"], "sbatch was perhaps never called"
    assert found["iter_01/candidates"][:2] == ["published", "42"]


def test_without_slurm_the_job_is_shown_with_an_unknown_state(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    begin(run_dir, "iter_01/policy")
    submitted(run_dir, "iter_01/policy", "41")
    assert rows(run_dir)["iter_01/policy"][:2] == ["unknown: Slurm does not answer here", "41"]


def test_a_directory_without_a_run_is_named(tmp_path: Path) -> None:
    for directory in (tmp_path, tmp_path / "none"):
        with pytest.raises(DataError, match=rf"run_dir={directory}: no stage was started in it"):
            status.lines(directory)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [([], r"run_dir=\?\?\?: must be given"), (["run_dir=/nowhere"], "no stage"), (["rundir=x"], "rundir")],
)
def test_the_command_says_what_is_missing_without_a_traceback(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.run_program(status.Options, status.main, arguments)
    assert re.fullmatch(rf"error: .*{said}.*\n", capsys.readouterr().err)


def test_the_command_prints_the_table(run_dir: Path) -> None:
    command = [sys.executable, str(ROOT / "recipes" / "status.py"), f"run_dir={run_dir}"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "\n".join(status.lines(run_dir)) + "\n"


def test_of_the_jobs_of_a_training_the_latest_is_shown(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    begin(run_dir, "iter_01/policy")
    for time, (job, job_id) in enumerate([("policy-prepare", "41"), ("policy", "42"), ("policy-export", "43")]):
        submitted(run_dir, f"iter_01/{job}", job_id)
        os.utime(record_file(run_dir / "logs", f"iter_01-{job}"), (time, time))
        assert rows(run_dir)["iter_01/policy"][1] == job_id
