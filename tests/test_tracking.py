"""Trackers get every published metric, under a tag that names it and with a step of its own kind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nemo_srl import runs
from nemo_srl.errors import ConfigError
from nemo_srl.report.tracking import scalars, send_to_wandb, write_tensorboard
from nemo_srl.runs import Run, open_run
from tests.run_directory import make_run

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def run(made_run: Path) -> Run:
    return open_run(made_run)


def test_trainings_evaluations_and_stages_have_steps_of_their_own(run: Run) -> None:
    found: dict[str, list[tuple[int, float]]] = {}
    for s in scalars(run):
        found.setdefault(s.tag, []).append((s.step, s.value))
    assert [step for step, _ in found["M1/loss"]] == list(range(1, 31))
    assert len(found["M3/rewards_margin"]) == 20
    assert [step for step, _ in found["evaluation/pairwise_accuracy"]] == [0, 1, 2, 3]
    assert found["stages/policy/seconds"] == [(1, 300.0), (2, 300.0)]


def test_the_trainer_of_the_run_reads_its_own_metrics(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    def read_metrics(name: str, work_dir: Path) -> list[dict[str, Any]]:
        asked.append((name, work_dir.parent.name))
        return [{"step": 7, "loss": 0.5}]

    monkeypatch.setattr(runs, "read_metrics", read_metrics)
    found = [s for s in scalars(run) if s.tag == "M1/loss"]
    assert [(s.step, s.value) for s in found] == [(7, 0.5)]
    assert asked == [("nemo_aligner", "sft"), ("nemo_aligner", "policy"), ("nemo_aligner", "policy")]


def test_tensorboard_reads_back_what_was_written_also_the_second_time(run: Run) -> None:
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    for _ in range(2):
        (path,) = write_tensorboard(run).iterdir()
    read = [(v.tag, e.step) for e in EventFileLoader(str(path)).Load() for v in e.summary.value]
    assert read == [(s.tag, s.step) for s in scalars(run)]


def test_wandb_gets_a_run_that_can_be_sent_again(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[dict[str, float]] = []
    calls: list[dict[str, Any]] = []
    finished: list[bool] = []
    session = SimpleNamespace(
        log=logged.append, define_metric=lambda *a, **k: None, finish=lambda: finished.append(True)
    )

    def init(**arguments: Any) -> Any:
        calls.append(arguments)
        return session

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    for _ in range(2):
        send_to_wandb(run, project="p")
    assert calls[0] == calls[1]
    assert calls[0]["resume"] == "allow"
    assert calls[0]["config"]["dpo"]["beta"] == 0.1
    assert logged[: len(logged) // 2] == [{s.tag: s.value, f"{s.tag.split('/')[0]}/step": s.step} for s in scalars(run)]
    assert finished == [True, True]


READ_BACK = """
import json, sys
from pathlib import Path
from nemo_srl.runs import open_run
from nemo_srl.report.tracking import send_to_wandb
from wandb.proto.wandb_internal_pb2 import Record
from wandb.sdk.internal.datastore import DataStore

run_dir = Path(sys.argv[1])
send_to_wandb(open_run(run_dir), project="p")
(path,) = run_dir.rglob("*.wandb")
store, rows, projects = DataStore(), [], []
store.open_for_scan(str(path))
while data := store.scan_data():
    record = Record.FromString(data)
    if record.WhichOneof("record_type") == "run":
        projects.append(record.run.project)
    if record.WhichOneof("record_type") == "history":
        rows.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item})
print(json.dumps({"projects": projects, "rows": rows}))
"""


def test_the_real_wandb_keeps_everything_offline(tmp_path: Path) -> None:
    """In a process of its own, without a server: what it would upload is read back from its file."""
    made = open_run(make_run(tmp_path / "run"))
    done = subprocess.run(
        [sys.executable, "-c", READ_BACK, str(made.run_dir)],
        env={**os.environ, "WANDB_MODE": "offline", "WANDB_SILENT": "true", "PYTHONPATH": str(ROOT)},
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found["projects"]) == {"p"}
    kept = [{k: v for k, v in row.items() if not k.startswith("_")} for row in found["rows"]]
    wanted = [{s.tag: s.value, f"{s.tag.split('/')[0]}/step": s.step} for s in scalars(made)]
    assert kept == [pytest.approx(row) for row in wanted]


def test_a_missing_wandb_is_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"tracking\.wandb_project='p': .*pip install wandb"):
        send_to_wandb(run, project="p")
