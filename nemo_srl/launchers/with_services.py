"""`python -m nemo_srl.launchers.with_services SPEC.json COMMAND...`: run a command while the services of a job run.

Launchers use it for jobs that start elsewhere: inside an allocation, or in a container. SPEC.json is what `to_spec`
returns. If the services belong to several nodes, every node runs this at the same time, and starts its own services.
GROUP_RANK is the number of the node. MASTER_ADDR and MASTER_PORT lead to the first node. That one waits for all the
others, runs the command with the URLs of all services, and then ends the others (`rendezvous.py`).

The exit status is the command's. It is 2 if a service failed on any node, and then the end of that service's log is
printed last. Another node ends with 0 as soon as the first one says that the job has ended, whether well or badly. With
any other status, Slurm would kill what is still being stopped.

TERM comes from a time limit, preemption or scancel. While services load, it ends this at once. Later the command gets
it, saves and leaves. Slurm may then end the services too, which is no failure.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from nemo_srl.errors import ConfigError, JobFailedError, NemoSrlError
from nemo_srl.launchers.rendezvous import Leader, Member
from nemo_srl.launchers.services import (
    POLL_SECONDS,
    RunningServices,
    check_for_a_moment,
    environment_of,
    is_healthy,
    running,
)
from nemo_srl.protocols import EXIT_STOPPED, Job, Service
from nemo_srl.shared_storage import appears, ask_again, seconds_to_wait

PASS_ON_SECONDS = 1.0
"""Some Slurms send TERM to every process of a step. The command should not get a second one while it leaves. So TERM is
passed on only if the command still runs after this time."""
MPIRUN = ("mpirun", "-n", "1", "--oversubscribe", "--bind-to", "none", "--allow-run-as-root")
"""TensorRT-LLM's documents start `trtllm-serve` so under Slurm. `--bind-to none`: else all threads share one core."""


@dataclass(frozen=True)
class Spec:
    """SPEC.json."""

    job_name: str
    log_dir: Path
    num_nodes: int
    services: Sequence[Service]

    @classmethod
    def read(cls, path: Path) -> Spec:
        """Raises `JobFailedError` if this node never sees the file."""
        if not appears(path.exists, path.parent, seconds_to_wait()):
            raise JobFailedError(
                f"{path}: {socket.gethostname()} does not see this file, which the orchestrator wrote before the job. "
                "run_dir must lie on a file system that all nodes share. Run again to go on."
            )
        spec = json.loads(path.read_text())
        services = [
            _started_by_mpi(Service(**{**s, "health_paths": tuple(s["health_paths"])})) for s in spec["services"]
        ]
        return cls(spec["job_name"], Path(spec["log_dir"]), spec["num_nodes"], services)

    def on(self, node: int) -> list[Service]:
        """The services of a node."""
        return [s for s in self.services if s.node == node]

    def running(self, node: int, **options: Any) -> AbstractContextManager[RunningServices]:
        """Run the services of a node, with further `options` of `services.running`.

        At first, it waits for the files of the run directory that they need. A model may just have been exported by
        another node, while this one remembers that it was not there.
        """
        needed = {Path(word) for s in self.on(node) for word in s.command if word.startswith(f"{self.log_dir.parent}/")}
        for path in sorted(needed):
            appears(partial(_is_there, path), path.parent, seconds_to_wait())
        return running(self.on(node), job_name=self.job_name, log_dir=self.log_dir, **options)

    @property
    def start_timeout_seconds(self) -> float:
        return max(s.start_timeout_seconds for s in self.services)


def _is_there(path: Path) -> bool:
    ask_again(path.resolve().parent)  # it may be a link
    return path.exists()


def _started_by_mpi(service: Service) -> Service:
    """Inside a job, a program that uses MPI would take itself for a rank of the step, and wait for the others."""
    return replace(service, command=(*MPIRUN, *service.command)) if service.uses_mpi else service


def to_spec(job: Job) -> dict[str, Any]:
    """The content of SPEC.json for a job."""
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
    """What TERM does. At first it raises `SystemExit`, which stops all that was started. Later it is only noted."""

    def __init__(self) -> None:
        self.came_at: float | None = None
        self._services: RunningServices | None = None

    def note_only(self, services: RunningServices) -> None:
        """From now on, the command decides when to end. `services` may end early without a failure."""
        self._services = services

    def __call__(self, number: int, frame: FrameType | None) -> None:
        came_before = self.came_at is not None
        self.came_at = time.monotonic()
        if self._services is not None:
            self._services.expect_end()
        elif not came_before:  # a second one must not end what the first one began
            sys.exit(128 + signal.SIGTERM)


def main(spec_path: Path, command: Sequence[str]) -> int:
    """Run the command, and return the exit status of this process."""
    term = _Term()
    signal.signal(signal.SIGTERM, term)
    try:
        spec = Spec.read(spec_path)
        if spec.num_nodes == 1:
            with spec.running(0) as services:
                return _run(command, services, services.urls, lambda: None, term)
        node = int(_variable("GROUP_RANK"))
        return _lead(spec, command, term) if node == 0 else _follow(spec, node, term)
    except NemoSrlError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2


def _lead(spec: Spec, command: Sequence[str], term: _Term) -> int:
    """The first node. Only the command needs its services, so they listen on the loopback."""
    leader = Leader(
        port=int(_variable("MASTER_PORT")), token=start_token(os.environ),
        services={node: [s.name for s in spec.on(node)] for node in range(1, spec.num_nodes)},
        timeout_seconds=spec.start_timeout_seconds,
    )  # fmt: skip
    with leader, spec.running(0, meanwhile=leader.check) as services:
        urls = dict(services.urls)
        for node, (host, ports) in sorted(leader.ports(services.check).items()):
            for s in spec.on(node):
                _check_reachable(s, host, ports[s.name])
                urls[s.name] = f"http://{host}:{ports[s.name]}"
        try:
            return _run(command, services, urls, leader.failure, term)
        finally:
            leader.close()  # before the services here are stopped, so that all nodes stop theirs at the same time


def _follow(spec: Spec, node: int, term: _Term) -> int:
    """Another node. Its services listen only at the address at which the first node can reach it."""
    member = Member(
        _variable("MASTER_ADDR"), port=int(_variable("MASTER_PORT")), token=start_token(os.environ), node=node,
        timeout_seconds=spec.start_timeout_seconds,
    )  # fmt: skip
    with member:
        try:
            with spec.running(node, host=member.host, meanwhile=member.check) as services:
                # From here on, the first node says when the job has ended. After TERM, the command may still need these
                # services while it saves.
                term.note_only(services)
                member.ready(services.ports)
                while not member.ended():
                    if (failure := services.failure()) is not None:
                        return _report(member, failure)
                return 0
        except JobFailedError as e:
            # After TERM, the first node may be gone already. That is the end of the job, and not a failure.
            return 128 + signal.SIGTERM if term.came_at is not None else _report(member, str(e))


def _report(member: Member, failure: str) -> int:
    """Send a failure to the first node, which prints it after it has ended its command."""
    if member.fail(failure):
        return 0
    print(f"error: {failure}", file=sys.stderr)
    return 2


def _check_reachable(service: Service, host: str, port: int) -> None:
    """Raise `JobFailedError` if the service cannot be reached, such as through a firewall between the nodes."""
    for _ in range(3):
        if is_healthy(service, host, port):
            return
    raise JobFailedError(
        f"the service {service.name} is ready on its node {service.node}, but http://{host}:{port} cannot be reached "
        f"from the first node of the job. Nodes must be able to reach each other's ports 8100 to 8999."
    )


def _run(
    command: Sequence[str],
    services: RunningServices,
    urls: Mapping[str, str],
    elsewhere: Callable[[], str | None],
    term: _Term,
) -> int:
    """Run the command to its end, and return its exit status."""
    term.note_only(services)
    process = subprocess.Popen(command, env={**os.environ, **environment_of(urls)}, start_new_session=True)
    try:
        with services.ending(process, elsewhere=elsewhere):
            code = _wait(process, term)
        if code not in (0, EXIT_STOPPED) and term.came_at is None:
            check_for_a_moment(lambda: services.failure() or elsewhere())
        return code
    finally:
        if process.poll() is None:  # there was an error, and the command must not outlive its services
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()


def _wait(process: subprocess.Popen[bytes], term: _Term) -> int:
    """The exit status of the command. It is 128 + N for signal N. Passes TERM on."""
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
    """The token of this start of this step. Other submissions, other steps and earlier starts have other tokens."""
    names = ("NEMO_SRL_TOKEN", "SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_STEP_ID")
    return ".".join(environ.get(name, "") for name in names)


def _variable(name: str) -> str:
    try:
        return os.environ[name]
    except KeyError:
        raise ConfigError(
            f"{name}: it is not set, and without it the nodes of a job do not find each other. The launcher sets it."
        ) from None


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
