"""The services of a job on this machine. They start together, are watched, and are stopped without orphans.

    with running(job.services, job_name=job.name, log_dir=job.log_dir) as services:
        ... run the steps with `services.environment`, each inside `services.ending(process)` ...

Every service runs under `supervisor.py`. It has a port and a log of its own (`log_dir/<job>-<service>.log`). If a
service does not start in time, `JobFailedError` is raised with the end of its log. One that ends later, or does not
answer well, is restarted (`keeper.py`). If that does not help, `JobFailedError` is raised as well, and a step that runs
at that time is ended first. If somebody else took the port of a service, it starts again with another port. Runs on one
machine do not choose each other's ports.

`with_services.py` does this on each node of a job that has several. Not covered: one service that spans nodes.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from nemo_srl.errors import ConfigError, JobFailedError
from nemo_srl.launchers import supervisor
from nemo_srl.launchers.keeper import SETTLE_SECONDS, Keeper
from nemo_srl.launchers.logs import how_it_ended, tail
from nemo_srl.protocols import SERVICES_VARIABLE, Service

GRACE_SECONDS = 20.0
"""Time between TERM and KILL."""
PORTS = range(8100, 9000)
"""From 9000 on, some clusters have ephemeral ports. One of those that is free now may be taken a moment later."""
NUM_STARTS = 5
"""A service whose port is taken is started so often at most."""
POLL_SECONDS = 0.25
LOOPBACK = "127.0.0.1"

_OF_THE_STEP = re.compile(r"SLURM_|PMI_|PMIX_|OMPI_")
"""How the names of variables begin that describe a step to MPI."""
_ADDRESS_IN_USE = re.compile(rb"address already in use|failed to bind|errno 98|EADDRINUSE", re.IGNORECASE)


@dataclass
class _Running:
    """A service that was started. Implements `keeper.Kept`."""

    service: Service
    log_path: Path
    environ: Mapping[str, str]
    host: str = LOOPBACK
    port: int = 0
    log_start: int = 0
    num_starts: int = 0
    healthy: bool = False
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)
    claim: socket.socket | None = field(default=None, repr=False)

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def ended(self) -> int | None:
        """The exit status of a service that has ended. None while it runs."""
        assert self.process is not None
        return self.process.poll()

    @property
    def start_timeout_seconds(self) -> float:
        return self.service.start_timeout_seconds

    def is_well(self) -> bool:
        return is_healthy(self.service, self.host, self.port)

    def restart(self, why: str) -> None:
        self.note(f"restarting: the service {why}")
        if self.process is not None:
            _stop([self.process])
        _start(self)

    def failed(self, how: str) -> str:
        return (
            f"the service {self.service.name} {how}. What was completed is kept, run again to go on.\n"
            f"{tail(self.log_path)}"
        )

    def note(self, text: str) -> None:
        """Add a line to its log."""
        with self.log_path.open("ab") as log:
            log.write(f"$ {text}\n".encode())

    def port_was_taken(self) -> bool:
        """Whether the log of this start says so."""
        with self.log_path.open("rb") as log:
            log.seek(self.log_start)
            return _ADDRESS_IN_USE.search(log.read()) is not None


class RunningServices:
    """The services of a job after all of them were healthy."""

    def __init__(self, services: Sequence[_Running]) -> None:
        self._services = services
        self._keeper = Keeper(services)
        self._interrupted: str | None = None

    def close(self) -> None:
        """Restart none of them any more."""
        self._keeper.close()

    @property
    def ports(self) -> dict[str, int]:
        return {s.service.name: s.port for s in self._services}

    @property
    def urls(self) -> dict[str, str]:
        return {s.service.name: s.url for s in self._services}

    @property
    def environment(self) -> dict[str, str]:
        """The variables by which the steps find the services."""
        return environment_of(self.urls)

    def are_healthy(self) -> bool:
        """Whether all of them run and answer now."""
        return all(s.ended() is None and s.is_well() for s in self._services)

    def note(self, text: str) -> None:
        """Add a line to their logs."""
        for s in self._services:
            s.note(text)

    def expect_end(self) -> None:
        """From now on, a service that ends has not failed. Slurm may end all processes, for example at a time limit."""
        self._keeper.end_is_expected = True

    def failure(self) -> str | None:
        """Which service needed more restarts than it may have, with the end of its log. None if there is none."""
        return None if self._keeper.end_is_expected else self._keeper.failure

    def check(self) -> None:
        """Raise `JobFailedError` if there is a failure."""
        if found := self.failure():
            raise JobFailedError(found)

    @contextmanager
    def ending(
        self, process: subprocess.Popen[bytes], *, elsewhere: Callable[[], str | None] = lambda: None
    ) -> Iterator[None]:
        """Inside, the process gets TERM and then KILL when a service fails. It must lead a process group.

        The same happens when `elsewhere` returns what failed on another node. It is called now and then. At the end,
        this raises `JobFailedError` if something failed.
        """
        done = threading.Event()
        watcher = threading.Thread(target=self._watch, args=(process, done, elsewhere), daemon=True)
        watcher.start()
        try:
            yield
        finally:
            done.set()
            watcher.join()
        if self._interrupted is not None:
            raise JobFailedError(self._interrupted)

    def _watch(
        self, process: subprocess.Popen[bytes], done: threading.Event, elsewhere: Callable[[], str | None]
    ) -> None:
        while not done.wait(POLL_SECONDS):
            failure = self.failure() or elsewhere()
            if failure is None or self._keeper.end_is_expected or done.is_set():
                continue
            self._interrupted = failure
            for sig in (signal.SIGTERM, signal.SIGKILL):
                try:
                    os.killpg(process.pid, sig)
                except ProcessLookupError:
                    return
                if done.wait(GRACE_SECONDS):
                    return
            return


@contextmanager
def running(
    services: Sequence[Service],
    *,
    job_name: str,
    log_dir: Path,
    host: str = LOOPBACK,
    meanwhile: Callable[[], None] = lambda: None,
) -> Iterator[RunningServices]:
    """Start `services`, wait until all are healthy, and stop them at the end, also after an error.

    They listen on `host`, an address of this machine. While they load, `meanwhile` is called. It may raise, which ends
    the waiting.
    """
    devices = _devices(services)

    def prepared(s: Service) -> _Running:
        own = {"CUDA_VISIBLE_DEVICES": found} if (found := devices[s.name]) is not None else {}
        env = {**without_step(os.environ), "PYTHONUNBUFFERED": "1", **s.env, **own}
        return _Running(s, log_dir / f"{job_name}-{s.name}.log", env, host)

    started = [prepared(s) for s in services]
    log_dir.mkdir(parents=True, exist_ok=True)
    try:
        for s in started:
            _claim_port(s, started)
            _start(s)
        _wait_until_healthy(started, meanwhile)
        found = RunningServices(started)
        try:
            yield found
        finally:
            found.close()
    finally:
        _stop([s.process for s in started if s.process is not None])
        for s in started:
            if s.claim is not None:
                s.claim.close()


def check_for_a_moment(failure: Callable[[], str | None]) -> None:
    """Raise `JobFailedError` if a service died. That explains a step's failure better than what the step said."""
    for _ in range(round(2 * SETTLE_SECONDS / POLL_SECONDS)):  # the news may come a moment after the step's end
        if found := failure():
            raise JobFailedError(found)
        time.sleep(POLL_SECONDS)


def environment_of(urls: Mapping[str, str]) -> dict[str, str]:
    """The variables by which steps find services (`protocols.SERVICES_VARIABLE`)."""
    return {SERVICES_VARIABLE: json.dumps(dict(urls))} if urls else {}


def without_step(environ: Mapping[str, str]) -> dict[str, str]:
    """Without the variables of a Slurm step or of MPI. With them, a server that uses MPI would take the job's nodes for
    its own: every replica would start its workers on the first node, or wait for ranks that do not exist."""
    return {key: value for key, value in environ.items() if not _OF_THE_STEP.match(key)}


def _claim_port(s: _Running, started: Sequence[_Running]) -> None:
    """Another port for the service than it has, and than the others have."""
    if s.claim is not None:
        s.claim.close()
    s.port, s.claim = claimed_port({x.port for x in started}, host=s.host)


def _start(s: _Running) -> None:
    """Start the service on its port."""
    s.num_starts += 1
    command = [part.replace("{port}", str(s.port)).replace("{host}", s.host) for part in s.service.command]
    with s.log_path.open("ab") as log:
        log.write(f"$ {' '.join(command)}\n".encode())
        log.flush()
        s.log_start = log.tell()
        s.process = subprocess.Popen(
            [sys.executable, "-I", supervisor.__file__, str(os.getpid()), str(GRACE_SECONDS), *command],
            env=dict(s.environ), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip


def _wait_until_healthy(started: Sequence[_Running], meanwhile: Callable[[], None]) -> None:
    begin = time.monotonic()
    while waiting := [s for s in started if not s.healthy]:
        meanwhile()
        for s in waiting:
            if (code := s.ended()) is not None:
                if s.num_starts < NUM_STARTS and s.port_was_taken():
                    _claim_port(s, started)
                    _start(s)
                    continue
                how = how_it_ended(code)
                name = s.service.name
                raise JobFailedError(f"the service {name} ended {how} before it was ready\n{tail(s.log_path)}")
            if time.monotonic() - begin > s.service.start_timeout_seconds:
                raise JobFailedError(
                    f"the service {s.service.name} was not ready after {s.service.start_timeout_seconds:g} s "
                    f"(start_timeout_seconds). It was asked for {', '.join(s.service.health_paths)}\n{tail(s.log_path)}"
                )
            # If the service has ended, it was another program that answered on this port.
            s.healthy = is_healthy(s.service, s.host, s.port) and s.ended() is None
        time.sleep(POLL_SECONDS if any(not s.healthy for s in started) else 0)


def is_healthy(service: Service, host: str, port: int) -> bool:
    """Whether the service answers 200 at all its health paths."""
    return all(_answers(host, port, path) for path in service.health_paths)


def _answers(host: str, port: int, path: str) -> bool:
    connection = http.client.HTTPConnection(host, port, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Tell all supervisors at once to end what they started, because each may need its grace period. Then wait."""
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
    for process in processes:
        try:
            process.wait(3 * GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def claimed_port(taken: set[int], *, host: str = LOOPBACK) -> tuple[int, socket.socket]:
    """A port that is free now on `host`, an address of this machine, and that is not in `taken`.

    A server may bind it a minute later. Until the returned socket is closed, no other run on this machine gets this
    port here. The end of this process closes it as well.
    """
    for port in random.sample(PORTS, len(PORTS)):
        if port in taken:
            continue
        claim = socket.socket(socket.AF_UNIX)
        try:
            if sys.platform == "linux":
                claim.bind(f"\0nemo_srl-port-{port}")  # a name without a file, which only one process can have
            with socket.socket() as s:
                s.bind((host, port))
        except OSError:
            claim.close()
            continue
        return port, claim
    raise JobFailedError(
        f"no port in {PORTS.start}..{PORTS.stop - 1} is free on this machine. End the programs that "
        "use them (ss -ltnp shows them), and run again."
    )


def _devices(services: Sequence[Service]) -> dict[str, str | None]:
    """`CUDA_VISIBLE_DEVICES` of each service: its share of the GPUs that this process may use. None: it gets none."""
    needed = sum(s.num_gpus for s in services)
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    visible = [d for d in allowed.split(",") if d] if allowed is not None else [str(i) for i in range(needed)]
    if needed > len(visible):
        raise ConfigError(
            f"the services {', '.join(s.name for s in services)} need {needed} GPUs, and CUDA_VISIBLE_DEVICES="
            f"{allowed!r} has {len(visible)}. Lower engine.num_replicas, tensor_parallel_size or "
            "pipeline_parallel_size, or raise engine.num_nodes."
        )
    shares: dict[str, str | None] = {}
    for s in services:
        mine, visible = visible[: s.num_gpus], visible[s.num_gpus :]
        shares[s.name] = ",".join(mine) if mine else None
    return shares
