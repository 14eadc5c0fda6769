"""What every program does with arguments that cannot be right: one line, and exit status 2."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from nemo_srl import cli, worker
from nemo_srl.errors import ConfigError, DataError

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Options:
    number: int = 1


def ended(capsys: pytest.CaptureFixture[str]) -> str:
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert printed.count("\n") == 1
    return printed


@pytest.mark.parametrize("argument", ['number="', "number=[", "number=x", "other=1", "number", "number=${"])
def test_an_option_that_cannot_be_read_is_named(argument: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.run_program(Options, lambda options: None, [argument])
    assert argument in ended(capsys)
    with pytest.raises(ConfigError):
        cli.read_options(Options, [argument])


@pytest.mark.parametrize("error", [DataError("the reason"), PermissionError(13, "x", "/the reason")])
def test_what_the_user_can_correct_is_one_line(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    def main(options: Options) -> None:
        raise error

    with pytest.raises(SystemExit, match="2"):
        cli.run_program(Options, main, [])
    assert "the reason" in ended(capsys)


@pytest.mark.parametrize("error", [ValueError("a bug"), ConnectionResetError(104, "a bug")])
def test_a_bug_keeps_its_traceback(error: Exception) -> None:
    def main(options: Options) -> None:
        raise error

    with pytest.raises(type(error)):
        cli.run_program(Options, main, [])


def test_a_step_that_fails_because_of_the_disk_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_steps(stage_dir: Path, names: list[str]) -> None:
        raise errors.pop()

    monkeypatch.setattr(worker, "run_steps", run_steps)
    monkeypatch.setattr(worker, "die_with_parent", lambda: None)
    errors: list[Exception] = [OSError(28, "x"), PermissionError(13, "x", "/a")]
    assert (worker.main(tmp_path, []), worker.main(tmp_path, [])) == (2, 2)
    printed = capsys.readouterr().err
    assert f"error: {tmp_path}: /a: Permission denied" in printed
    assert f"error: {tmp_path}: No space left on device. All completed work is kept." in printed
    errors += [RuntimeError("a writer failed"), FileNotFoundError(2, "a bug", "/a"), RuntimeError("a bug")]
    for _ in range(2):
        with pytest.raises((RuntimeError, FileNotFoundError), match="a bug"):
            worker.main(tmp_path, [])
    errors.append(RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"))
    for free in (1 << 29, 0):  # for torch's writer, and for the one that is left above
        usage = shutil._ntuple_diskusage(1 << 40, 1 << 40, free)  # type: ignore[attr-defined]
        monkeypatch.setattr(shutil, "disk_usage", lambda path, usage=usage: usage)
        assert worker.main(tmp_path, []) == 2
        assert "No space left on device" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argument", ["no_such_key=1", "recipe=none", "judge.max_score=[", "engine=nemo_srl.stages:LOOP"]
)
def test_what_hydra_refuses_is_one_line(argument: str) -> None:
    command = [sys.executable, str(ROOT / "recipes" / "iterate.py"), argument]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
