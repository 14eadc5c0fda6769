"""Jobs of the cluster's launchers on a real Slurm, with steps of a few lines: scheduling, faults, and no orphans."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.conftest import PROJECT, Cluster, kill, wait_for

IMAGE = "nvcr.io#nvidia/nemo:25.02"
# One write for each line. An unbuffered `print` makes two, and then lines of several ranks mix in the log.
WHO = "import os, socket; os.write(1, f'I am {os.environ[\"RANK\"]} {socket.gethostname()}\\n'.encode()); "
# On its first start it runs until it is told to save. On its second start it ends at once.
TRAINS = """
import pathlib, signal, sys, time
saved = pathlib.Path({saved!r})
if saved.exists():
    sys.exit(0)
def save(*_):
    saved.write_text("step 3")
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
print("training", flush=True)
time.sleep(600)
"""


def write_spec(
    cluster: Cluster, name: str, *codes: str, distributed: bool = False, launcher: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None, **job: Any,
) -> Path:  # fmt: skip
    run_dir = cluster.shared / name
    run_dir.mkdir(exist_ok=True)
    chosen = {"name": "slurm", **(launcher or {})}
    if chosen["name"] == "slurm":
        chosen = {"poll_seconds": 0.5, "signal_seconds": 30, **chosen}
    for i, code in enumerate(codes):
        (run_dir / f"s{i}.py").write_text(code)
    steps = [
        {"name": f"s{i}", "command": [str(run_dir / f"s{i}.py")], "distributed": distributed} for i in range(len(codes))
    ]
    spec = {
        "job": {
            "name": "job", "log_dir": str(run_dir / "logs"), "paths": [str(run_dir)], "role": "trainer", "steps": steps,
            **({"num_nodes": 2, "num_ranks_per_node": 2} if distributed else {}), **job,
        },
        "launcher": chosen,
        "cluster": {"exclusive": False, "time": "5", **(settings or {})},
    }  # fmt: skip
    path = run_dir / "spec.json"
    path.write_text(json.dumps(spec))
    return path


def start(cluster: Cluster, spec: Path) -> subprocess.Popen[bytes]:
    return cluster.start(sys.executable, "-m", "tests.slurm.run_job", str(spec), log=spec.with_name("out"))


def run(cluster: Cluster, spec: Path) -> int:
    return start(cluster, spec).wait(180)


def log_of(spec: Path) -> str:
    path = spec.parent / "logs" / "job.log"
    return path.read_text() if path.exists() else ""


def job_id_of(spec: Path) -> str | None:
    path = spec.parent / "logs" / "job.slurm.json"
    found: str | None = json.loads(path.read_text())["job_id"] if path.exists() else None
    return found


@pytest.mark.parametrize("idiom", ["srun", "torchrun"])
def test_ranks_over_two_nodes_in_containers(cluster: Cluster, idiom: str) -> None:
    settings = {
        "gpus_per_node": 8, "mpi": "pmix", "env": {"PATH_OF_IMAGE": "ours, with a comma"},
        "trainer": {"container": IMAGE, "python": sys.executable}, "mounts": [f"{sys.prefix}:{sys.prefix}"],
        "exclusive": True,
    }  # fmt: skip
    names = ("PATH_OF_IMAGE", "CUDA_VISIBLE_DEVICES", "MASTER_ADDR")
    code = WHO + f"os.write(1, (' '.join(os.environ[n] for n in {names}) + '\\n').encode())"
    spec = write_spec(
        cluster, f"ranks_{idiom}", code, distributed=True, launcher={"rank_idiom": idiom}, settings=settings,
        num_gpus_per_node=2,
    )  # fmt: skip
    assert run(cluster, spec) == 0, spec.with_name("out").read_text() + log_of(spec)
    lines = [line.split() for line in log_of(spec).splitlines() if line.startswith("I am")]
    assert sorted(line[2] for line in lines) == ["0", "1", "2", "3"]
    hosts = {line[2]: line[3] for line in lines}
    assert hosts["0"] == hosts["1"] != hosts["2"] == hosts["3"]
    assert log_of(spec).count(f"ours, with a comma 0,1 {hosts['0']}") == 4
    mine = [c for c in cluster.containers() if c["job"] == int(job_id_of(spec) or 0)]
    assert len(mine) == (4 if idiom == "srun" else 2)
    assert all(c["image"] == IMAGE and str(PROJECT) in c["mounts"] for c in mine)


def test_the_steps_of_a_job_share_one_unpacked_image_which_is_removed_at_the_end(cluster: Cluster) -> None:
    removed = cluster.shared / "image" / "removed"
    settings = {
        "trainer": {"container": IMAGE, "python": sys.executable}, "mounts": [f"{sys.prefix}:{sys.prefix}"],
        "setup": [f"export PATH={removed.parent}/bin:$PATH"],
    }  # fmt: skip
    spec = write_spec(cluster, removed.parent.name, "pass", "pass", settings=settings)
    enroot = removed.parent / "bin" / "enroot"
    enroot.parent.mkdir()
    enroot.write_text(f'#!/bin/sh\necho "$@" >> {removed}\n')
    enroot.chmod(0o755)
    assert run(cluster, spec) == 0, spec.with_name("out").read_text() + log_of(spec)
    job_id = job_id_of(spec) or ""
    first, second = [c for c in cluster.containers() if c["job"] == int(job_id)]
    assert (first["unpacked"], second["unpacked"]) == (True, False)
    wait_for(lambda: removed.exists() and removed.read_text().count("\n") == 2)
    names = [line.split()[-1] for line in removed.read_text().splitlines()]
    assert names == [f"pyxis_{first['name']}", f"pyxis_{job_id}_{first['name']}"]


def test_services_are_healthy_before_the_step_and_gone_after_it(cluster: Cluster) -> None:
    code = (
        "import json, os, urllib.request; u = json.loads(os.environ['NEMO_SRL_SERVICES'])['web']; "
        "print('answered', urllib.request.urlopen(u).status)"
    )
    service = {
        "name": "web",
        "command": [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", "{port}"],
        "health_paths": ["/"],
        "start_timeout_seconds": 60,
    }
    spec = write_spec(cluster, "services", code, services=[service])
    assert run(cluster, spec) == 0, spec.with_name("out").read_text() + log_of(spec)
    assert "answered 200" in log_of(spec)
    assert "http.server" not in subprocess.run(["ps", "-ef"], text=True, capture_output=True, check=True).stdout


def on_two_nodes(cluster: Cluster, name: str, code: str, *, ends_with: str = "", launcher: str = "slurm") -> Path:
    """A job with a service on each of two nodes. The second one prints and ends when the file `ends_with` is there."""
    server = (
        "import http.server, os, socket, sys, threading, time\n"
        f"end = {ends_with!r} if socket.gethostname() != os.environ['FIRST'] else ''\n"
        "def watch():\n"
        "    while not os.path.exists(end): time.sleep(0.1)\n"
        "    os.write(1, b'last words\\n'); os._exit(7)\n"
        "threading.Thread(target=watch, daemon=True).start()\n"
        "http.server.ThreadingHTTPServer((sys.argv[1], int(sys.argv[2])), "
        "http.server.SimpleHTTPRequestHandler).serve_forever()"
    )
    services = [
        {
            "name": f"web{i}", "node": i, "command": ["sh", "-c", 'FIRST=$MASTER_ADDR exec "$0" "$@"', sys.executable,
            "-c", server, "{host}", "{port}"], "health_paths": ["/"], "start_timeout_seconds": 60,
        }
        for i in range(2)
    ]  # fmt: skip
    return write_spec(cluster, name, code, services=services, num_nodes=2, role="engine", launcher={"name": launcher})


def is_running(text: str) -> bool:
    return text in subprocess.run(["ps", "-ef"], text=True, capture_output=True, check=True).stdout


@pytest.mark.parametrize("launcher", ["slurm", "srun"])
def test_services_on_two_nodes_are_all_reached_by_the_step(cluster: Cluster, launcher: str) -> None:
    code = (
        "import json, os, urllib.request\n"
        "for name, url in json.loads(os.environ['NEMO_SRL_SERVICES']).items():\n"
        "    print(f'{name} at {url} answered {urllib.request.urlopen(url).status}')"
    )
    spec = on_two_nodes(cluster, f"two_nodes_{launcher}", code, launcher=launcher)
    around = ["salloc", "--nodes=2", "--time=5"] if launcher == "srun" else []
    done = cluster.start(
        *around, sys.executable, "-m", "tests.slurm.run_job", str(spec), log=spec.with_name("out")
    ).wait(120)
    assert done == 0, spec.with_name("out").read_text() + log_of(spec)
    first, second = [line for line in log_of(spec).splitlines() if "answered 200" in line]
    assert first.startswith("web0 at http://127.0.0.1:")
    assert second.startswith("web1 at http://192.0.2.1"), "the node's own address"
    assert not is_running("http.server")


def test_a_service_that_dies_on_the_second_node_fails_the_job_with_its_log(cluster: Cluster) -> None:
    end = cluster.shared / "dies_on_the_second" / "end"
    spec = on_two_nodes(
        cluster, end.parent.name, f"import time; open({str(end)!r}, 'w'); time.sleep(600)", ends_with=str(end)
    )
    assert run(cluster, spec) == 2
    out = spec.with_name("out").read_text()
    assert "the service web1 ended with exit status 7" in out, out
    assert "| last words" in out
    assert cluster.job(job_id_of(spec) or "")["Restarts"] == "0"
    assert not is_running("http.server")


def test_a_step_with_services_on_two_nodes_saves_before_the_time_limit_and_goes_on_later(cluster: Cluster) -> None:
    saved = cluster.shared / "saves_with_services" / "saved"
    spec = on_two_nodes(cluster, saved.parent.name, TRAINS.format(saved=str(saved)))
    orchestrator = start(cluster, spec)
    wait_for(lambda: "training" in log_of(spec))
    cluster.run("scancel", "--batch", "--signal=USR1", job_id_of(spec) or "")  # as before the time limit
    assert orchestrator.wait(120) == 0, spec.with_name("out").read_text() + log_of(spec)
    assert saved.read_text() == "step 3"
    assert cluster.job(job_id_of(spec) or "")["Restarts"] == "1", "the job that serves, which the record names"
    assert not is_running("http.server")


def test_a_failing_job_ends_with_its_log_and_is_not_repeated(cluster: Cluster) -> None:
    spec = write_spec(cluster, "fails", "print('the reason'); raise SystemExit(2)", "print('never')")
    assert run(cluster, spec) == 2
    out = spec.with_name("out").read_text()
    assert "exit status 2" in out
    assert "the reason" in out
    assert "never" not in log_of(spec)
    assert cluster.job(job_id_of(spec) or "")["Restarts"] == "0"


def test_what_slurm_refuses_is_a_setting_of_the_user(cluster: Cluster) -> None:
    spec = write_spec(cluster, "refused", "pass", settings={"partition": "nowhere"})
    assert run(cluster, spec) == 2
    assert "nvalid partition" in spec.with_name("out").read_text()


def test_a_run_directory_that_nodes_do_not_share_is_named(cluster: Cluster, tmp_path: Path) -> None:
    local = Path("/tmp") / f"not-shared-{tmp_path.name}"
    local.mkdir()
    spec = write_spec(cluster, "not_shared", "pass", log_dir=str(local / "logs"))
    try:
        assert run(cluster, spec) == 2
        assert "is run_dir on a file system that all nodes share" in spec.with_name("out").read_text()
    finally:
        subprocess.run(["rm", "-rf", str(local)], check=True)


def test_a_killed_orchestrator_finds_its_job_again(cluster: Cluster) -> None:
    go = cluster.shared / "found" / "go"
    spec = write_spec(cluster, "found", f"import os, time\nwhile not os.path.exists({str(go)!r}): time.sleep(0.1)")
    first = start(cluster, spec)
    wait_for(lambda: "step s0" in log_of(spec))
    kill(first)
    job_id, before = job_id_of(spec), cluster.num_jobs()
    second = start(cluster, spec)
    wait_for(lambda: f"job {job_id} is under way" in spec.with_name("out").read_text())
    kill(second)
    # The same record as if it had died after sbatch and before it wrote the job's id.
    record = spec.parent / "logs" / "job.slurm.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "job_id": None}))
    third = start(cluster, spec)
    wait_for(lambda: job_id_of(spec) == job_id)
    go.touch()
    assert third.wait(120) == 0
    assert cluster.num_jobs() == before
    assert cluster.job(job_id or "")["JobState"] == "COMPLETED"


def test_after_an_interrupt_the_job_saves_its_work_and_is_not_requeued(cluster: Cluster) -> None:
    saved = cluster.shared / "interrupted" / "saved"
    spec = write_spec(cluster, saved.parent.name, TRAINS.format(saved=str(saved)))
    orchestrator = start(cluster, spec)
    wait_for(lambda: "training" in log_of(spec))
    kill(orchestrator, signal.SIGINT)
    assert orchestrator.returncode != 0
    assert saved.read_text() == "step 3"
    assert "not requeued" in log_of(spec)
    found = cluster.job(job_id_of(spec) or "")
    assert (found["JobState"], found["Restarts"]) == ("FAILED", "0")


def test_a_second_interrupt_cancels_the_job(cluster: Cluster) -> None:
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); "
    spec = write_spec(cluster, "impatient", code + "time.sleep(600)")
    orchestrator = start(cluster, spec)
    wait_for(lambda: "deaf" in log_of(spec))
    os.killpg(orchestrator.pid, signal.SIGINT)
    wait_for(lambda: "Ctrl-C again" in spec.with_name("out").read_text())
    kill(orchestrator, signal.SIGINT)
    assert cluster.job(job_id_of(spec) or "")["JobState"] == "CANCELLED"


def test_after_an_interrupt_a_step_inside_an_allocation_saves_its_work(cluster: Cluster) -> None:
    saved = cluster.shared / "interrupted_inside" / "saved"
    spec = write_spec(cluster, saved.parent.name, TRAINS.format(saved=str(saved)), launcher={"name": "srun"})
    command = (sys.executable, "-m", "tests.slurm.run_job", str(spec))
    outer = cluster.start("salloc", "--nodes=1", "--time=5", *command, log=spec.with_name("out"))
    wait_for(lambda: "training" in log_of(spec))
    (pid,) = processes_of(*command)
    os.kill(pid, signal.SIGINT)
    outer.wait(120)  # salloc ends with 0 when a signal has ended its command
    assert "may save its work" in spec.with_name("out").read_text()
    assert saved.read_text() == "step 3"


def processes_of(*command: str) -> list[int]:
    """The processes with exactly this command line."""
    wanted = b"".join(word.encode() + b"\0" for word in command)
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if path.read_bytes() == wanted:
                found.append(int(path.parent.name))
    return found


def test_before_the_time_limit_a_training_saves_and_goes_on_later(cluster: Cluster) -> None:
    saved = cluster.shared / "time_limit" / "saved"
    spec = write_spec(
        cluster, "time_limit", TRAINS.format(saved=str(saved)), distributed=True, settings={"time": "1"},
        launcher={"signal_seconds": 50},
    )  # fmt: skip
    assert run(cluster, spec) == 0, spec.with_name("out").read_text() + log_of(spec)
    assert saved.read_text() == "step 3"
    assert "requeued, to go on later" in log_of(spec)
    assert cluster.job(job_id_of(spec) or "")["Restarts"] == "1"


def test_requeues_are_capped(cluster: Cluster) -> None:
    spec = write_spec(cluster, "capped", "raise SystemExit(75)", launcher={"max_requeues": 0})
    assert run(cluster, spec) == 2
    assert "launcher.max_requeues" in spec.with_name("out").read_text()


def test_a_dead_node_does_not_end_a_job(cluster: Cluster) -> None:
    done = cluster.shared / "dead" / "second"
    code = WHO + f"import pathlib, time; p = pathlib.Path({str(done)!r}); p.exists() or time.sleep(600)"
    spec = write_spec(cluster, "dead", code, distributed=True)
    orchestrator = start(cluster, spec)
    wait_for(lambda: log_of(spec).count("I am") == 4)
    node = next(line.split()[3] for line in log_of(spec).splitlines() if line.startswith("I am 2"))
    done.touch()
    cluster.node_dies(node)
    try:
        assert orchestrator.wait(180) == 0, spec.with_name("out").read_text() + log_of(spec)
    finally:
        cluster.node_returns(node)
    assert "was requeued (restart 1)" in spec.with_name("out").read_text()


def test_a_whole_run_inside_one_allocation_is_told_of_the_time_limit_and_goes_on(cluster: Cluster) -> None:
    saved = cluster.shared / "inside" / "saved"
    code = WHO + TRAINS.format(saved=str(saved))
    spec = write_spec(cluster, "inside", code, distributed=True, launcher={"name": "srun"}, num_gpus_per_node=2)
    # This stands in for the interpreter. It runs our job instead of recipes/iterate.py.
    python = spec.with_name("python")
    python.write_text(f"#!/bin/sh\nexec {sys.executable} -m tests.slurm.run_job {spec}\n")
    python.chmod(0o755)
    output = spec.with_name("out")
    job_id = cluster.run(
        "env", f"PYTHON={python}", f"PYTHONPATH={PROJECT}", "sbatch", "--parsable", "--nodes=2", "--time=5",
        f"--chdir={PROJECT}", f"--output={output}", str(PROJECT / "recipes" / "iterate.sbatch"),
    ).strip()  # fmt: skip
    wait_for(lambda: log_of(spec).count("training") == 4)
    cluster.run("scancel", "--batch", "--signal=USR1", job_id)
    wait_for(lambda: cluster.job(job_id)["JobState"] == "COMPLETED", 180)
    assert cluster.job(job_id)["Restarts"] == "1"
    assert saved.read_text() == "step 3"
    assert "asked to stop in its step 's0'" in output.read_text()
    ranks = {line.split()[2] for line in log_of(spec).splitlines() if line.startswith("I am")}
    assert ranks == {"0", "1", "2", "3"}


def test_accounting_answers_when_the_controller_has_forgotten(cluster: Cluster) -> None:
    spec = write_spec(cluster, "accounting", "raise SystemExit(3)")
    run(cluster, spec)
    code = (
        "import pathlib; from nemo_srl.launchers.slurm import client; real = client._slurm; "
        "client._slurm = lambda *c: real(*c) if c[0] != 'scontrol' else real('scontrol', 'show', 'job', '999999'); "
        f"print(client.state({job_id_of(spec)!r}, exit_file=pathlib.Path('/nowhere')))"
    )
    wait_for(lambda: "name='FAILED', exit_status=3" in cluster.run(sys.executable, "-c", code), 60)
