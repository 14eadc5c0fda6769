"""`python -m nemo_srl.launchers.with_services SPEC.json COMMAND...`: run a command while the services of a job run.

For launchers whose jobs start elsewhere: inside an allocation, in a container. SPEC.json is what `to_spec` returns.
Where the services belong to several nodes, every node runs this at once and starts its own; the first one, which is
where MASTER_ADDR and MASTER_PORT lead, waits for all of them, runs the command with all URLs, and ends the others
(`rendezvous.py`). GROUP_RANK is the number of this node.

The exit status is the command's, or 2 when a service failed on any node, whose log's end is then the last thing
printed. Another node ends with 0 once the first one has said that the job has ended, however it has: Slurm would take
any other status for a reason to kill what is still being stopped.

TERM (time limit, preemption, scancel) ends this at once while services load. Later it is the command's to save and
leave; services that Slurm ends together with everything else are no failures then.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from nemo_srl.errors import ConfigError, JobFailedError, NemoSrlError
from nemo_srl.launchers.rendezvous import Leader, Member
from nemo_srl.launchers.services import (
    POLL_SECONDS,
    SETTLE_SECONDS,
    RunningServices,
    environment_of,
    is_healthy,
    running,
)
from nemo_srl.protocols import EXIT_STOPPED, Job, Service

PASS_ON_SECONDS = 1.0
"""Slurm mostly sends TERM to every process of a step. One that got it already should not get a second one while it
leaves, so the command is told only if it is still there after this time."""

_OF_THE_STEP = re.compile(r"SLURM_|PMI_|PMIX_|OMPI_")


@dataclass(frozen=True)
class Spec:
    job_name: str
    log_dir: Path
    num_nodes: int
    services: Sequence[Service]

    @classmethod
    def read(cls, path: Path) -> Spec:
        spec = json.loads(path.read_text())
        services = [Service(**{**s, "health_paths": tuple(s["health_paths"])}) for s in spec["services"]]
        return cls(spec["job_name"], Path(spec["log_dir"]), spec["num_nodes"], services)

    def on(self, node: int) -> list[Service]:
        return [s for s in self.services if s.node == node]

    @property
    def start_timeout_seconds(self) -> float:
        return max(s.start_timeout_seconds for s in self.services)


def to_spec(job: Job) -> dict[str, Any]:
    """SPEC.json of the job."""
    return {
        "job_name": job.name,
        "log_dir": str(job.log_dir),
        "num_nodes": num_nodes(job),
        "services": [asdict(s) for s in job.services],
    }


def num_nodes(job: Job) -> int:
    """On how many nodes the job has services."""
    found = 1 + max((s.node for s in job.services), default=0)
    assert found <= job.num_nodes
    return found


class _Term:
    """What TERM does: at first it is an exit that unwinds through everything that must be stopped, later a note."""

    def __init__(self) -> None:
        self.came_at: float | None = None
        self._services: RunningServices | None = None

    def note_only(self, services: RunningServices) -> None:
        self._services = services

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self._services is None:
            sys.exit(128 + signal.SIGTERM)
        self.came_at = time.monotonic()
        self._services.expect_end()


def main(spec_path: Path, command: Sequence[str]) -> int:
    spec = Spec.read(spec_path)
    term = _Term()
    signal.signal(signal.SIGTERM, term)
    try:
        if spec.num_nodes == 1:
            with running(spec.services, job_name=spec.job_name, log_dir=spec.log_dir) as services:
                return _run(command, services, services.urls, lambda: None, term)
        node = int(_variable("GROUP_RANK"))
        return _lead(spec, command, term) if node == 0 else _follow(spec, node, term)
    except NemoSrlError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2


def _lead(spec: Spec, command: Sequence[str], term: _Term) -> int:
    """The first node: its services are for the command alone and stay on the loopback."""
    leader = Leader(
        port=int(_variable("MASTER_PORT")), token=start_token(os.environ),
        services={node: [s.name for s in spec.on(node)] for node in range(1, spec.num_nodes)},
        timeout_seconds=spec.start_timeout_seconds,
    )  # fmt: skip
    with (
        leader,
        running(
            spec.on(0), job_name=spec.job_name, log_dir=spec.log_dir, environ=without_step(os.environ),
            meanwhile=leader.check,
        ) as services,
    ):  # fmt: skip
        urls = dict(services.urls)
        for node, (host, ports) in sorted(leader.ports(services.check).items()):
            for s in spec.on(node):
                _check_reachable(s, host, ports[s.name])
                urls[s.name] = f"http://{host}:{ports[s.name]}"
        try:
            return _run(command, services, urls, leader.failure, term)
        finally:
            leader.close()  # at once, so that all nodes stop their services together


def _follow(spec: Spec, node: int, term: _Term) -> int:
    """Another node: its services listen at the address that leads to the first one, and nowhere else."""
    member = Member(
        _variable("MASTER_ADDR"), port=int(_variable("MASTER_PORT")), token=start_token(os.environ), node=node,
        timeout_seconds=spec.start_timeout_seconds,
    )  # fmt: skip
    with member:
        try:
            with running(
                spec.on(node), job_name=spec.job_name, log_dir=spec.log_dir, host=member.host,
                environ=without_step(os.environ), meanwhile=member.check,
            ) as services:  # fmt: skip
                term.note_only(services)
                member.ready(services.ports)
                while not member.ended():
                    if (failure := services.failure()) is not None:
                        return _report(member, failure)
                return 0
        except JobFailedError as e:
            return 128 + signal.SIGTERM if term.came_at is not None else _report(member, str(e))


def _report(member: Member, failure: str) -> int:
    """The first node prints what it is told, after it has ended its command."""
    if member.fail(failure):
        return 0
    print(f"error: {failure}", file=sys.stderr)
    return 2


def _check_reachable(service: Service, host: str, port: int) -> None:
    """A firewall between nodes would otherwise look like a server that never answers."""
    for _ in range(3):
        if is_healthy(service, host, port):
            return
    raise JobFailedError(
        f"the service {service.name} is ready on its node {service.node}, but http://{host}:{port} does not answer "
        f"from the first node of the job: nodes must be able to reach each other's ports 8100 to 8999"
    )


def _run(
    command: Sequence[str],
    services: RunningServices,
    urls: Mapping[str, str],
    elsewhere: Callable[[], str | None],
    term: _Term,
) -> int:
    term.note_only(services)
    process = subprocess.Popen(command, env={**os.environ, **environment_of(urls)}, start_new_session=True)
    try:
        with services.ending(process, elsewhere=elsewhere):
            code = _wait(process, term)
        if code not in (0, EXIT_STOPPED) and term.came_at is None:
            _check_for_a_moment(lambda: services.failure() or elsewhere())
        return code
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()


def _check_for_a_moment(failure: Callable[[], str | None]) -> None:
    """A dead service explains the failure of a command better than what the command said."""
    for _ in range(round(2 * SETTLE_SECONDS / POLL_SECONDS)):
        if found := failure():
            raise JobFailedError(found)
        time.sleep(POLL_SECONDS)


def _wait(process: subprocess.Popen[bytes], term: _Term) -> int:
    """The exit status, 128 + N for signal N. Passes TERM on."""
    is_told = False
    while True:
        try:
            code = process.wait(POLL_SECONDS)
            return code if code >= 0 else 128 - code
        except subprocess.TimeoutExpired:
            pass
        if term.came_at is not None and not is_told and time.monotonic() - term.came_at > PASS_ON_SECONDS:
            os.killpg(process.pid, signal.SIGTERM)
            is_told = True


def start_token(environ: Mapping[str, str]) -> str:
    """Of this start of this step: not another submission's, a start's before a requeue, nor another step's."""
    names = ("NEMO_SRL_TOKEN", "SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_STEP_ID")
    return ".".join(environ.get(name, "") for name in names)


def without_step(environ: Mapping[str, str]) -> dict[str, str]:
    """Without the traces of the step. `mpirun` in a server would take the job's nodes for its own, and start its
    workers on the first of them, as every replica would."""
    return {key: value for key, value in environ.items() if not _OF_THE_STEP.match(key)}


def _variable(name: str) -> str:
    try:
        return os.environ[name]
    except KeyError:
        raise ConfigError(f"{name}: not set, and without it the nodes of a job do not find each other") from None


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
