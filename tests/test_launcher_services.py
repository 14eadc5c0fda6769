"""Services around a job: started, waited for, watched, and never left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from nemo_srl.errors import ConfigError, JobFailedError
from nemo_srl.launchers import keeper, services, supervisor
from nemo_srl.launchers.local import LocalLauncher
from nemo_srl.launchers.services import claimed_port, running
from nemo_srl.launchers.with_services import to_spec
from nemo_srl.protocols import SERVICES_VARIABLE, Job, JobStep, Service
from tests.processes import alive, wait_for

SERVER = """
import http.server, os, subprocess, sys, time
port, directory = int(sys.argv[1]), sys.argv[2]
worker = subprocess.Popen([sys.executable, '-c', {worker!r}], start_new_session={apart})
open(directory + '/pids', 'a').write(f'{{os.getpid()}} {{worker.pid}}\\n')
print('GPUs', os.environ.get('CUDA_VISIBLE_DEVICES'), os.environ.get('COLOR'), flush=True)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if time.monotonic() > ready else 503); self.end_headers()
    def log_message(self, *args): pass
{before}
ready = time.monotonic() + {delay}
server = http.server.HTTPServer(('127.0.0.1', port), Handler)
server.timeout = {lifetime}
server.serve_forever() if {lifetime} is None else [server.handle_request() for _ in range(3)]
print('last words'); sys.exit(7)
"""
IGNORES_TERM = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"


def service(
    directory: Path, name: str = "server", *, delay: float = 0, timeout: float = 60, before: str = "",
    lifetime: float | None = None, worker: str = "import time; time.sleep(600)", apart: bool = False, num_gpus: int = 0,
) -> Service:  # fmt: skip
    code = SERVER.format(delay=delay, before=before, lifetime=lifetime, worker=worker, apart=apart)
    return Service(
        name=name,
        command=[sys.executable, "-c", code, "{port}", str(directory)],
        health_paths=("/health",),
        start_timeout_seconds=timeout,
        num_gpus=num_gpus,
        env={"COLOR": "red"},
    )


def pids(directory: Path) -> list[int]:
    return [int(word) for word in (directory / "pids").read_text().split()]


def job(directory: Path, code: str, *needed: Service) -> Job:
    return Job(name="job", steps=[JobStep(name="run", command=["-c", code])], log_dir=directory, services=needed)


@pytest.fixture(autouse=True)
def _short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(services, "GRACE_SECONDS", 1.0)


def test_a_step_finds_healthy_services_and_they_end_after_it(tmp_path: Path) -> None:
    code = (
        f"import json, os, urllib.request\nfor url in json.loads(os.environ['{SERVICES_VARIABLE}']).values():\n"
        "    print(url, urllib.request.urlopen(url).status)"
    )
    LocalLauncher().run(job(tmp_path, code, service(tmp_path, "a", delay=0.3), service(tmp_path, "b")))
    log = (tmp_path / "job.log").read_text()
    assert log.count(" 200\n") == 2
    assert len(pids(tmp_path)) == 4
    assert not any(map(alive, pids(tmp_path)))
    assert "red" in (tmp_path / "job-a.log").read_text()


def test_a_failing_step_ends_the_services_too(tmp_path: Path) -> None:
    with pytest.raises(JobFailedError, match="exit status 3"):
        LocalLauncher().run(job(tmp_path, "raise SystemExit(3)", service(tmp_path)))
    assert not any(map(alive, pids(tmp_path)))


def test_a_service_that_is_never_healthy_ends_at_its_deadline(tmp_path: Path) -> None:
    slow = service(tmp_path, delay=600, timeout=6)  # it must have said something by then, on a busy machine as well
    with pytest.raises(JobFailedError, match=r"(?s)not ready after 6 s.*/health.*GPUs"), running_(tmp_path, slow):
        pytest.fail("entered")
    assert not any(map(alive, pids(tmp_path)))


def test_a_service_that_ends_while_loading_is_noticed_at_once(tmp_path: Path) -> None:
    broken = service(tmp_path, before="raise RuntimeError('out of GPUs')")
    with pytest.raises(JobFailedError, match=r"(?s)exit status 1 before it was ready.*out of GPUs"):
        LocalLauncher().run(job(tmp_path, "pass", service(tmp_path, "good"), broken))
    assert not any(map(alive, pids(tmp_path)))


def test_a_program_that_is_not_there_is_named(tmp_path: Path) -> None:
    missing = Service(name="s", command=["no-such-program"], health_paths=("/",), start_timeout_seconds=60)
    with pytest.raises(JobFailedError, match=r"(?s)exit status 127.*no-such-program.*No such file"):
        LocalLauncher().run(job(tmp_path, "pass", missing))


def test_a_service_that_dies_again_and_again_ends_the_job_with_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper, "SETTLE_SECONDS", 0.1)
    code = "import time; print('working', flush=True); time.sleep(600)"
    with pytest.raises(JobFailedError, match=r"(?s)server ended with exit status 7 while.*3 restarts.*last words"):
        LocalLauncher().run(job(tmp_path, code, service(tmp_path, lifetime=0.3)))
    assert len(pids(tmp_path)) == 2 * (1 + keeper.NUM_RESTARTS)
    assert "working" in (tmp_path / "job.log").read_text()
    assert not any(map(alive, pids(tmp_path)))


ILL = """
import pathlib
first = not pathlib.Path(directory + '/ill').exists()
def answer(self):
    if first and pathlib.Path(directory + '/ill').exists():
        {does}
    self.send_response({status} if first and pathlib.Path(directory + '/ill').exists() else 200); self.end_headers()
Handler.do_GET = answer
"""


@pytest.mark.parametrize(("does", "status"), [("pass", 503), ("time.sleep(600)", 200)], ids=["503", "hangs"])
def test_a_service_that_is_ill_is_restarted_on_its_port(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, does: str, status: int
) -> None:
    """It is well until the step writes a file. After its restart it is well again."""
    monkeypatch.setattr(keeper, "HEALTH_SECONDS", 0.1)
    monkeypatch.setattr(keeper, "UNHEALTHY_SECONDS", 0.5)
    step = f"""
import json, os, pathlib, time, urllib.request
(url,) = json.loads(os.environ['{SERVICES_VARIABLE}']).values()
pathlib.Path({str(tmp_path / "ill")!r}).touch()
def well():
    try:
        return urllib.request.urlopen(url, timeout=1).status == 200
    except OSError:
        return False
while not well():
    time.sleep(0.1)
print('well again')
"""
    LocalLauncher().run(job(tmp_path, step, service(tmp_path, before=ILL.format(does=does, status=status))))
    assert "well again" in (tmp_path / "job.log").read_text()
    assert "restarting: the service gave no good answer for 0.5 s" in (tmp_path / "job-server.log").read_text()
    assert len(pids(tmp_path)) == 4
    assert not any(map(alive, pids(tmp_path)))


def test_a_port_that_is_taken_meanwhile_is_replaced(tmp_path: Path) -> None:
    before = (
        "import pathlib; flag = pathlib.Path(directory + '/flag')\n"
        "if not flag.exists(): flag.touch(); raise OSError(98, 'Address already in use')"
    )
    LocalLauncher().run(job(tmp_path, "print('fine')", service(tmp_path, before=before)))
    assert (tmp_path / "job-server.log").read_text().count("\nGPUs ") == 2


def test_free_ports_are_below_9000_and_not_those_taken() -> None:
    first, claim = claimed_port(set())
    claim.close()
    assert first in services.PORTS
    taken = set(services.PORTS) - {first}
    again, claim = claimed_port(taken)
    assert again == first
    with pytest.raises(JobFailedError, match="no port"):
        claimed_port(set(services.PORTS))
    other = f"from tests.test_launcher_services import *; claimed_port(set(services.PORTS) - {{{first}}})"
    with claim:
        done = subprocess.run([sys.executable, "-c", other], capture_output=True, text=True, check=False)
    assert "no port" in done.stderr, "another run on this machine has not bound it yet, but it will"


def test_services_are_kept_for_the_next_job_that_needs_the_same(tmp_path: Path) -> None:
    launcher, needed = LocalLauncher(keep_services=True), service(tmp_path, "a")

    def run(name: str, *needed: Service) -> list[int]:
        step = JobStep(name="run", command=["-c", "pass"])
        launcher.run(Job(name=name, steps=[step], log_dir=tmp_path, services=needed))
        return [pid for pid in pids(tmp_path) if alive(pid)]

    first = run("one", needed)
    assert len(first) == 2
    assert run("two", needed) == first
    assert "kept for two" in (tmp_path / "one-a.log").read_text()
    os.kill(first[0], signal.SIGSTOP)
    third = run("three", needed)
    assert len(third) == 2
    assert not set(third) & set(first), "a server that does not answer is not kept"
    fourth = run("four", service(tmp_path, "a", timeout=61))
    assert not set(fourth) & set(third), "another service"
    assert not run("five"), "a job without services may need their GPUs"
    run("six", needed)
    with pytest.raises(JobFailedError):
        launcher.run(job(tmp_path, "raise SystemExit(3)", needed))
    assert not [pid for pid in pids(tmp_path) if alive(pid)], "an error stops them"
    run("seven", needed)
    launcher.close()
    assert not [pid for pid in pids(tmp_path) if alive(pid)]


def test_what_ignores_term_or_left_its_group_is_ended_all_the_same(tmp_path: Path) -> None:
    for apart in (False, True):
        directory = tmp_path / str(apart)
        directory.mkdir()
        with running_(directory, service(directory, worker=IGNORES_TERM, apart=apart)):
            assert all(map(alive, pids(directory)))
        assert not any(map(alive, pids(directory)))


def test_workers_of_a_server_that_was_killed_are_ended(tmp_path: Path) -> None:
    with running_(tmp_path, service(tmp_path, apart=True)) as found:
        server, worker = pids(tmp_path)
        os.kill(server, signal.SIGKILL)
        wait_for(lambda: not alive(worker))
        wait_for(lambda: len(pids(tmp_path)) == 4)  # it was restarted
        found.check()
    assert not any(map(alive, pids(tmp_path)))


@pytest.mark.parametrize("sig", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_nothing_outlives_an_orchestrator(tmp_path: Path, sig: signal.Signals) -> None:
    orchestrator = (
        "from tests.test_launcher_services import *; services.GRACE_SECONDS = 1.0; d = Path(sys.argv[1])\n"
        "needed = service(d, worker=IGNORES_TERM, apart=True)\n"
        "code = 'import pathlib, sys, time; pathlib.Path(sys.argv[1], \"busy\").touch(); time.sleep(2)'\n"
        "step = JobStep(name='run', command=['-c', code, str(d)])\n"
        "LocalLauncher().run(Job(name='job', steps=[step], log_dir=d, services=[needed]))"
    )
    parent = subprocess.Popen([sys.executable, "-c", orchestrator, str(tmp_path)], stderr=subprocess.DEVNULL)
    wait_for((tmp_path / "busy").exists)
    assert all(map(alive, pids(tmp_path)))
    parent.send_signal(sig)
    parent.wait(60)
    wait_for(lambda: not any(map(alive, pids(tmp_path))))


TOLD_AGAIN = """
import os, runpy, signal, sys
real, told = signal.signal, []
def set_handler(number, handler):
    if handler is signal.SIG_IGN and not told:
        told.append(number)
        os.kill(os.getpid(), number)
    return real(number, handler)
signal.signal = set_handler
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name='__main__')
"""
"""Runs a supervisor that gets another TERM just before it ignores the next ones."""


@pytest.mark.parametrize("ends_itself", [False, True])
def test_a_supervisor_that_is_told_to_end_twice_leaves_nothing(tmp_path: Path, ends_itself: bool) -> None:
    """A restarted service is told twice: by the end of the thread that started it, and by its orchestrator."""
    port, claim = claimed_port(set())
    command = [part.replace("{port}", str(port)) for part in service(tmp_path, apart=True).command]
    arguments = [sys.executable, "-c", TOLD_AGAIN, supervisor.__file__, str(os.getpid()), "1", *command]
    told = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: (tmp_path / "pids").exists() and len(pids(tmp_path)) == 2)
    if ends_itself:
        os.kill(pids(tmp_path)[0], signal.SIGKILL)
    else:
        told.terminate()
    errors = told.communicate(timeout=60)[1]
    claim.close()
    assert not any(map(alive, pids(tmp_path)))
    assert "Traceback" not in errors


def test_a_service_whose_orchestrator_is_gone_already_never_starts(tmp_path: Path) -> None:
    marker = tmp_path / "started"
    nobody = subprocess.Popen(["true"])
    nobody.wait()
    command = [sys.executable, supervisor.__file__, str(nobody.pid), "1", "touch", str(marker)]
    assert subprocess.run(command, check=False).returncode == 128 + signal.SIGTERM
    assert not marker.exists()


def test_gpus_are_shared_out_of_those_that_are_visible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = [service(tmp_path, "a", num_gpus=2), service(tmp_path, "b", num_gpus=2)]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,6,7")
    LocalLauncher().run(job(tmp_path, "pass", *needed))
    assert "GPUs 3,5 " in (tmp_path / "job-a.log").read_text()
    assert "GPUs 6,7 " in (tmp_path / "job-b.log").read_text()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    with pytest.raises(ConfigError, match=r"need 4 GPUs.*num_replicas"):
        LocalLauncher().run(job(tmp_path, "pass", *needed))


def test_around_a_command_in_an_allocation(tmp_path: Path) -> None:
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps(to_spec(job(tmp_path, "", service(tmp_path, delay=0.2)))))
    script = f"import os, sys; print(os.environ['{SERVICES_VARIABLE}']); sys.exit(5)"
    command = [sys.executable, "-m", "nemo_srl.launchers.with_services", str(spec), sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, json.loads(done.stdout).keys()) == (5, {"server"})
    assert not any(map(alive, pids(tmp_path)))
    broken = service(tmp_path, before="raise RuntimeError('out of GPUs')")
    spec.write_text(json.dumps(to_spec(job(tmp_path, "", broken))))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "out of GPUs" in done.stderr


STEP = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "64", "PMIX_RANK": "0", "PMI_SIZE": "64"}
TELLS = "print(sorted(k for k in os.environ if k.startswith(('SLURM', 'PMI'))), flush=True)"


def test_no_server_takes_the_step_of_slurm_for_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On one node of an allocation with several, and also where a user starts the whole run inside a step."""
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    LocalLauncher().run(job(tmp_path, "pass", service(tmp_path, "local", before=TELLS)))
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps(to_spec(job(tmp_path, "", service(tmp_path, "one-node", before=TELLS)))))
    subprocess.run([sys.executable, "-m", "nemo_srl.launchers.with_services", str(spec), "true"], check=True)
    for name in ("local", "one-node"):
        assert "\n[]\n" in (tmp_path / f"job-{name}.log").read_text(), name


def test_in_a_job_of_slurm_a_server_that_uses_mpi_is_started_by_mpirun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stubs = Path(__file__).with_name("stubs")  # its mpirun refuses other options, and the variables of a step
    monkeypatch.setenv("PATH", str(stubs), prepend=os.pathsep)
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps(to_spec(job(tmp_path, "", replace(service(tmp_path), uses_mpi=True)))))
    subprocess.run([sys.executable, "-m", "nemo_srl.launchers.with_services", str(spec), "true"], check=True)
    log = (tmp_path / "job-server.log").read_text()
    assert log.startswith("$ mpirun -n 1 --oversubscribe --bind-to none --allow-run-as-root ")
    LocalLauncher().run(job(tmp_path, "pass", replace(service(tmp_path, "local"), uses_mpi=True)))
    assert "mpirun" not in (tmp_path / "job-local.log").read_text()


def running_(directory: Path, *needed: Service):  # type: ignore[no-untyped-def]
    return running(needed, job_name="job", log_dir=directory)
