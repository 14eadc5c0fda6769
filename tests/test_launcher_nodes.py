"""Services of a job on two nodes, here two processes of one machine: they meet, they end together, nothing is left."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from nemo_srl.errors import JobFailedError
from nemo_srl.launchers.rendezvous import Leader, Member
from nemo_srl.launchers.services import without_step
from nemo_srl.launchers.with_services import start_token, to_spec
from nemo_srl.protocols import SERVICES_VARIABLE, Job, Service
from tests.ports import free_port
from tests.processes import alive, wait_for
from tests.test_launcher_services import pids, service

REACHES_ALL = (
    f"import json, os, sys, urllib.request\nfor name, url in json.loads(os.environ['{SERVICES_VARIABLE}']).items():\n"
    "    print(name, urllib.request.urlopen(url).status)\nsys.exit(5)"
)
WORKS = "import sys, time; print('working', flush=True); time.sleep(600)"
DIES = """
import threading
def die():
    while not os.path.exists({die!r}):
        time.sleep(0.05)
    print("last words", flush=True)
    os._exit(7)
threading.Thread(target=die).start()
"""
WITHOUT_RESTARTS = """
import pathlib, sys
from nemo_srl.launchers import keeper, with_services
keeper.NUM_RESTARTS = 0
sys.exit(with_services.main(pathlib.Path(sys.argv[1]), sys.argv[2:]))
"""
"""`with_services` that does not restart a service, so that a test of a dead one is short."""
SAVES = """
import pathlib, signal, sys, time
def save(*_):
    time.sleep(0.5)
    print("saved", flush=True)
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
print("working", flush=True)
time.sleep(600)
"""


@dataclass
class Nodes:
    """A job of two nodes with a service on each."""

    directory: Path
    port: int
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, node: int, command: str, *services: Service, **env: str) -> subprocess.Popen[bytes]:
        job = Job(name="job", steps=[], log_dir=self.directory, num_nodes=2, services=services)
        spec = self.directory / "spec.json"
        spec.write_text(json.dumps(to_spec(job)))
        known = {"GROUP_RANK": str(node), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.port)}
        with (self.directory / f"out_{node}").open("ab") as out:
            process = subprocess.Popen(
                [sys.executable, "-c", WITHOUT_RESTARTS, str(spec), sys.executable, "-c", command],
                env={**os.environ, **known, "NEMO_SRL_TOKEN": "token", "SLURM_NTASKS": "2", **env},
                stdout=out, stderr=out, start_new_session=True,
            )  # fmt: skip
        self.started.append(process)
        return process

    def start_both(self, command: str, *services: Service) -> tuple[subprocess.Popen[bytes], subprocess.Popen[bytes]]:
        return self.start(0, command, *services), self.start(1, command, *services)

    def out(self, node: int) -> str:
        return (self.directory / f"out_{node}").read_text()

    def are_all_gone(self) -> bool:
        return not any(map(alive, pids(self.directory)))


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    found = Nodes(tmp_path, free_port())
    yield found
    for process in found.started:
        if process.poll() is None:
            process.kill()
        process.wait(60)


def on(node: int, found: Service) -> Service:
    return dataclasses.replace(found, node=node)


def pair(directory: Path, **second: object) -> tuple[Service, Service]:
    return on(0, service(directory, "a")), on(1, service(directory, "b", **second))  # type: ignore[arg-type]


def test_the_command_reaches_the_services_of_all_nodes_and_all_end_with_it(nodes: Nodes) -> None:
    step = "print('step', os.environ.get('SLURM_NTASKS'), flush=True)"
    first, second = nodes.start_both(REACHES_ALL, *pair(nodes.directory, delay=0.5, before=step))
    assert (first.wait(60), second.wait(60)) == (5, 0), nodes.out(0) + nodes.out(1)
    assert nodes.out(0) == "a 200\nb 200\n"
    assert nodes.out(1) == ""
    assert "step None" in (nodes.directory / "job-b.log").read_text(), "no server takes the step for its own"
    assert len(pids(nodes.directory)) == 4
    assert nodes.are_all_gone()


def test_a_service_that_is_never_healthy_on_the_second_node_ends_the_job_with_its_log(nodes: Nodes) -> None:
    slow = pair(nodes.directory, delay=600, timeout=3)
    first, second = nodes.start_both("print('never')", *slow)
    assert (first.wait(60), second.wait(60)) == (2, 0)
    assert "node 1 of the job (127.0.0.1) failed: the service b was not ready after 3 s" in nodes.out(0)
    assert "| GPUs" in nodes.out(0), "the end of its log"
    assert "never" not in nodes.out(0).splitlines()
    assert nodes.are_all_gone()


def test_a_service_that_dies_in_mid_run_on_the_second_node_ends_the_job_with_its_log(nodes: Nodes) -> None:
    die = nodes.directory / "die"
    dies = DIES.format(die=str(die))
    first, second = nodes.start_both(f"open({str(die)!r}, 'w').close(); {WORKS}", *pair(nodes.directory, before=dies))
    assert (first.wait(60), second.wait(60)) == (2, 0)
    assert nodes.out(0).startswith("working\n")
    assert "the service b ended with exit status 7 while the job needed it" in nodes.out(0)
    assert "| last words" in nodes.out(0)
    assert nodes.are_all_gone()


def test_a_command_that_fails_for_want_of_a_service_is_explained_by_that(nodes: Nodes) -> None:
    die = nodes.directory / "die"
    command = f"import sys, time; open({str(die)!r}, 'w').close(); time.sleep(0.3); sys.exit('no answer')"
    first, second = nodes.start_both(command, *pair(nodes.directory, before=DIES.format(die=str(die))))
    assert (first.wait(60), second.wait(60)) == (2, 0)
    assert "no answer\nerror: node 1 of the job (127.0.0.1) failed: the service b ended" in nodes.out(0)
    assert nodes.are_all_gone()


@pytest.mark.parametrize("killed", [0, 1])
def test_a_node_that_ends_without_a_word_ends_the_other_one(nodes: Nodes, killed: int) -> None:
    both = nodes.start_both(WORKS, *pair(nodes.directory))
    wait_for(lambda: "working" in nodes.out(0))
    both[killed].kill()
    assert both[1 - killed].wait(60) == 2
    assert "is gone" in nodes.out(1 - killed)
    wait_for(nodes.are_all_gone)


def test_a_node_of_an_earlier_start_is_not_believed(nodes: Nodes) -> None:
    services = pair(nodes.directory)
    stale = nodes.start(1, REACHES_ALL, *services, SLURM_RESTART_COUNT="7")
    first = nodes.start(0, REACHES_ALL, *services)
    wait_for(lambda: "is not of this start of the job" in nodes.out(0))
    second = nodes.start(1, REACHES_ALL, *services)
    assert (first.wait(60), second.wait(60)) == (5, 0)
    assert len(pids(nodes.directory)) == 4, "the stale one has started nothing"
    stale.terminate()
    assert stale.wait(60) == 128 + signal.SIGTERM


def test_a_node_that_does_not_come_is_named(nodes: Nodes) -> None:
    services = [dataclasses.replace(s, start_timeout_seconds=3) for s in pair(nodes.directory)]
    first = nodes.start(0, "print('never')", *services)
    assert first.wait(60) == 2
    assert "node 1 of the job did not join in 3 s" in nodes.out(0)
    assert nodes.are_all_gone()


def test_at_the_time_limit_the_command_saves_although_everything_gets_term(nodes: Nodes) -> None:
    first, second = nodes.start_both(SAVES, *pair(nodes.directory))
    wait_for(lambda: "working" in nodes.out(0))
    for pid in pids(nodes.directory):  # Slurm tells every process of a step, servers too
        os.kill(pid, signal.SIGTERM)
    for process in (first, second):
        process.terminate()
    assert (first.wait(60), second.wait(60)) == (75, 0)
    assert nodes.out(0) == "working\nsaved\n"
    assert nodes.are_all_gone()


def test_term_while_services_load_ends_all_at_once(nodes: Nodes) -> None:
    first, second = nodes.start_both("print('never')", *pair(nodes.directory, delay=600))
    wait_for(lambda: (nodes.directory / "pids").exists() and len(pids(nodes.directory)) == 4)
    first.terminate()
    assert (first.wait(60), second.wait(60)) == (128 + signal.SIGTERM, 0)
    assert nodes.are_all_gone()


def test_what_is_no_message_is_refused_and_a_node_is_taken_once() -> None:
    port = free_port()
    with Leader(port=port, token="right", services={1: ["b"]}, timeout_seconds=60) as leader:
        for hello in (b"GET / HTTP/1.1\r\n\r\n", b"[]\n", b'{"token": "wrong", "node": 1}\n', b"x" * (1 << 21)):
            with socket.create_connection(("127.0.0.1", port)) as stranger:
                stranger.setblocking(False)
                sent = 0
                while sent < len(hello):
                    try:
                        sent += stranger.send(hello[sent:])
                    except BlockingIOError:
                        assert leader.failure() is None
                    except OSError:  # refused already
                        break
                wait_for(lambda: leader.failure() is not None or closed(stranger))
        assert leader.failure() is None
        with socket.create_connection(("127.0.0.1", port)) as node:
            node.sendall(b'{"token": "right", "node": 1}\n{"ready": {"b": 8101}}\n')
            assert leader.ports(lambda: None) == {1: ("127.0.0.1", {"b": 8101})}
            with socket.create_connection(("127.0.0.1", port)) as twin:
                twin.sendall(b'{"token": "right", "node": 1}\n')
                wait_for(lambda: leader.failure() is not None or closed(twin))
            assert leader.failure() is None
        wait_for(leader.failure)
        assert "is gone" in str(leader.failure())


def closed(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return connection.recv(100) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def test_a_port_that_is_taken_is_named() -> None:
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(JobFailedError, match=f"MASTER_PORT={port}.*already in use"):
            Leader(port=port, token="t", services={}, timeout_seconds=1)


def test_without_a_first_node_another_one_says_where_it_looked() -> None:
    with pytest.raises(JobFailedError, match=r"127\.0\.0\.1:\d+.*start_timeout_seconds.*refused"):
        Member("127.0.0.1", port=free_port(), token="t", node=1, timeout_seconds=0.5)


def test_each_start_has_a_token_of_its_own_and_servers_see_nothing_of_the_step() -> None:
    env = {"NEMO_SRL_TOKEN": "t", "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "PMIX_RANK": "1", "PATH": "/bin"}
    assert (
        start_token(env)
        != start_token({**env, "SLURM_RESTART_COUNT": "1"})
        != start_token(env | {"SLURM_STEP_ID": "1"})
    )
    assert without_step(env) == {"NEMO_SRL_TOKEN": "t", "PATH": "/bin"}
