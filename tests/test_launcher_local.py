"""Jobs as processes of this machine: their logs, their failures, and no orphans."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_srl.errors import ConfigError, JobFailedError
from nemo_srl.launchers.local import LocalLauncher
from nemo_srl.protocols import Job, JobStep
from tests.processes import alive, wait_for


def job(tmp_path: Path, *codes: str, num_ranks: int = 1, num_nodes: int = 1) -> Job:
    steps = [JobStep(name=f"step{i}", command=["-c", code], distributed=num_ranks > 1) for i, code in enumerate(codes)]
    return Job(name="job", steps=steps, log_dir=tmp_path, num_nodes=num_nodes, num_ranks_per_node=num_ranks)


def test_steps_run_in_order_and_are_logged(tmp_path: Path) -> None:
    LocalLauncher().run(job(tmp_path, "print('one')", "print('two')"))
    log = (tmp_path / "job.log").read_text()
    assert log.index("one") < log.index("two")


def test_a_failure_carries_the_end_of_the_log_and_stops_the_job(tmp_path: Path) -> None:
    with pytest.raises(JobFailedError) as e:
        LocalLauncher().run(job(tmp_path, "print('reason'); raise SystemExit(3)", "print('never')"))
    assert "reason" in str(e.value)
    assert "exit status 3" in str(e.value)
    assert "never" not in (tmp_path / "job.log").read_text()


def test_a_killed_step_is_named_as_killed(tmp_path: Path) -> None:
    with pytest.raises(JobFailedError, match="SIGKILL"):
        LocalLauncher().run(job(tmp_path, "import os; os.kill(os.getpid(), 9)"))


def test_progress_bars_reach_the_console_and_other_output_does_not(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code = "import sys; print('chatter'); sys.stderr.write('\\r 50% done\\r100% done\\n')"
    LocalLauncher().run(job(tmp_path, code))
    shown = capfd.readouterr().err
    assert "50% done" in shown
    assert "chatter" not in shown
    assert "chatter" in (tmp_path / "job.log").read_text()


def test_several_nodes_need_a_cluster(tmp_path: Path) -> None:
    for role, key in (("trainer", r"trainer\.num_nodes"), ("engine", r"engine\.num_nodes")):
        with pytest.raises(ConfigError, match=rf"{key}=2: launcher\.name='local'.*Use {key}=1"):
            LocalLauncher().run(Job(name="job", steps=[], log_dir=tmp_path, role=role, num_nodes=2))


def test_a_worker_dies_with_a_killed_orchestrator(tmp_path: Path) -> None:
    child = (
        "from nemo_srl.worker import die_with_parent; import os, time; die_with_parent(); "
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    )
    orchestrator = (
        "from tests.test_launcher_local import job; from nemo_srl.launchers.local import LocalLauncher; "
        f"import pathlib; LocalLauncher().run(job(pathlib.Path({str(tmp_path)!r}), {child!r}))"
    )
    parent = subprocess.Popen([sys.executable, "-c", orchestrator])
    wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    pid = int((tmp_path / "pid").read_text())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    wait_for(lambda: not alive(pid))


def test_an_interrupt_stops_the_whole_process_group(tmp_path: Path) -> None:
    child = (
        "import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(p.pid)); time.sleep(60)"
    )
    orchestrator = (
        # A shell starts background processes with SIGINT ignored, and the tests may be one.
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from tests.test_launcher_local import job; from nemo_srl.launchers.local import LocalLauncher; "
        f"import pathlib; LocalLauncher().run(job(pathlib.Path({str(tmp_path)!r}), {child!r}))"
    )
    parent = subprocess.Popen([sys.executable, "-c", orchestrator], stderr=subprocess.DEVNULL)
    wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    parent.send_signal(signal.SIGINT)
    assert parent.wait(60) != 0
    wait_for(lambda: not alive(int((tmp_path / "pid").read_text())))
