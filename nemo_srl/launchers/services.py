"""The services of a job on this machine: started together, waited for, watched, and stopped without orphans.

    with running(job.services, job_name=job.name, log_dir=job.log_dir) as services:
        ... run the steps with `services.environment`, each inside `services.ending(process)` ...

Every service runs under `supervisor.py` with a port of its own and a log of its own
(`log_dir/<job>-<service>.log`). A service that does not start in time, or that ends before the job does,
raises `JobFailedError` with the end of its log; in mid-step the step is ended first. A port that somebody
else took in between is replaced by another one.

`python -m nemo_srl.launchers.services SPEC.json COMMAND...` does the same around one command, for launchers
whose jobs start elsewhere: inside an allocation, in a container. SPEC.json is what `to_spec` returns.

Not covered: services that span nodes.
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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nemo_srl.errors import ConfigError, JobFailedError, NemoSrlError
from nemo_srl.launchers import supervisor
from nemo_srl.launchers.processes import how_it_ended, tail
from nemo_srl.protocols import SERVICES_VARIABLE, Service

GRACE_SECONDS = 20.0
"""Between TERM and KILL."""
PORTS = range(8100, 9000)
"""Some clusters hand out ephemeral ports from 9000 on, so a port that is free now may be taken a moment later."""
NUM_STARTS = 5
"""Attempts to start a service whose port turns out to be taken."""
POLL_SECONDS = 0.25

_ADDRESS_IN_USE = re.compile(rb"address already in use|failed to bind|errno 98|EADDRINUSE", re.IGNORECASE)


@dataclass
class _Running:
    service: Service
    log_path: Path
    port: int = 0
    log_start: int = 0
    num_starts: int = 0
    healthy: bool = False
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ended(self) -> int | None:
        """The exit status of a service that is no longer there."""
        assert self.process is not None
        return self.process.poll()

    def port_was_taken(self) -> bool:
        with self.log_path.open("rb") as log:
            log.seek(self.log_start)
            return _ADDRESS_IN_USE.search(log.read()) is not None


class RunningServices:
    """Healthy services."""

    def __init__(self, services: Sequence[_Running]) -> None:
        self._services = services
        self._interrupted = False

    @property
    def environment(self) -> dict[str, str]:
        """What the steps find them by (`protocols.SERVICES_VARIABLE`)."""
        urls = {s.service.name: s.url for s in self._services}
        return {SERVICES_VARIABLE: json.dumps(urls)} if urls else {}

    def check(self) -> None:
        """Raise `JobFailedError` if one has ended."""
        for s in self._services:
            if (code := s.ended()) is not None:
                raise JobFailedError(
                    f"the service {s.service.name} ended {how_it_ended(code)} while the job needed it; what was "
                    f"completed is kept, run again to go on\n{tail(s.log_path)}"
                )

    @contextmanager
    def ending(self, process: subprocess.Popen[bytes]) -> Iterator[None]:
        """Within: should a service end, the process (a group's leader) is sent TERM, then KILL.

        Raises `JobFailedError` at its end if that happened.
        """
        done = threading.Event()
        watcher = threading.Thread(target=self._watch, args=(process, done), daemon=True)
        if self._services:
            watcher.start()
        try:
            yield
        finally:
            done.set()
            if self._services:
                watcher.join()
        if self._interrupted:
            self.check()

    def _watch(self, process: subprocess.Popen[bytes], done: threading.Event) -> None:
        while not done.wait(POLL_SECONDS):
            if all(s.ended() is None for s in self._services):
                continue
            self._interrupted = True
            for sig in (signal.SIGTERM, signal.SIGKILL):
                try:
                    os.killpg(process.pid, sig)
                except ProcessLookupError:
                    return
                if done.wait(GRACE_SECONDS):
                    return
            return


@contextmanager
def running(services: Sequence[Service], *, job_name: str, log_dir: Path) -> Iterator[RunningServices]:
    """Start `services`, wait until all are healthy, and stop them at the end, whatever that is."""
    devices = _devices(services)
    started = [_Running(s, log_dir / f"{job_name}-{s.name}.log") for s in services]
    log_dir.mkdir(parents=True, exist_ok=True)
    try:
        for s in started:
            _start(s, devices[s.service.name], taken={other.port for other in started})
        _wait_until_healthy(started, devices)
        yield RunningServices(started)
    finally:
        _stop([s.process for s in started if s.process is not None])


def _start(s: _Running, devices: str | None, *, taken: set[int]) -> None:
    s.port = free_port(taken)
    s.num_starts += 1
    command = [part.replace("{port}", str(s.port)) for part in s.service.command]
    env = {**os.environ, "PYTHONUNBUFFERED": "1", **s.service.env}
    if devices is not None:
        env["CUDA_VISIBLE_DEVICES"] = devices
    with s.log_path.open("ab") as log:
        log.write(f"$ {' '.join(command)}\n".encode())
        log.flush()
        s.log_start = log.tell()
        s.process = subprocess.Popen(
            [sys.executable, "-I", supervisor.__file__, str(os.getpid()), str(GRACE_SECONDS), *command],
            env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip


def _wait_until_healthy(started: Sequence[_Running], devices: Mapping[str, str | None]) -> None:
    begin = time.monotonic()
    while waiting := [s for s in started if not s.healthy]:
        for s in waiting:
            if (code := s.ended()) is not None:
                if s.num_starts < NUM_STARTS and s.port_was_taken():
                    _start(s, devices[s.service.name], taken={other.port for other in started})
                    continue
                how = how_it_ended(code)
                name = s.service.name
                raise JobFailedError(f"the service {name} ended {how} before it was ready\n{tail(s.log_path)}")
            if time.monotonic() - begin > s.service.start_timeout_seconds:
                raise JobFailedError(
                    f"the service {s.service.name} was not ready after {s.service.start_timeout_seconds:g} s "
                    f"(start_timeout_seconds); it was asked for {', '.join(s.service.health_paths)}\n{tail(s.log_path)}"
                )
            # One that ended was not the one that answered: another program sits on this port.
            s.healthy = all(_answers(s.port, path) for path in s.service.health_paths) and s.ended() is None
        time.sleep(POLL_SECONDS if any(not s.healthy for s in started) else 0)


def _answers(port: int, path: str) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Have the supervisors end everything below them; all at once, since each may take its grace period."""
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
    for process in processes:
        try:
            process.wait(3 * GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def free_port(taken: set[int]) -> int:
    """A port of 127.0.0.1 that is free now, not in `taken`."""
    for port in random.sample(PORTS, len(PORTS)):
        with socket.socket() as s:
            if port in taken:
                continue
            try:
                s.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise JobFailedError(f"no port in {PORTS.start}..{PORTS.stop - 1} is free on this machine")


def _devices(services: Sequence[Service]) -> dict[str, str | None]:
    """`CUDA_VISIBLE_DEVICES` of each service: its share of what this process may use."""
    needed = sum(s.num_gpus for s in services)
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    visible = [d for d in allowed.split(",") if d] if allowed is not None else [str(i) for i in range(needed)]
    if needed > len(visible):
        raise ConfigError(
            f"the services {', '.join(s.name for s in services)} need {needed} GPUs, and CUDA_VISIBLE_DEVICES="
            f"{allowed!r} has {len(visible)}: lower engine.trtllm.num_replicas, tensor_parallel_size or "
            "pipeline_parallel_size"
        )
    shares: dict[str, str | None] = {}
    for s in services:
        mine, visible = visible[: s.num_gpus], visible[s.num_gpus :]
        shares[s.name] = ",".join(mine) if mine else None
    return shares


def to_spec(services: Sequence[Service], *, job_name: str, log_dir: Path) -> dict[str, Any]:
    """What `main` reads, as a JSON object."""
    return {"job_name": job_name, "log_dir": str(log_dir), "services": [asdict(s) for s in services]}


def main(spec_path: Path, command: Sequence[str]) -> int:
    """Run `command` while the services of a spec run; returns its exit status, 2 if a service failed."""
    spec = json.loads(spec_path.read_text())
    services = [Service(**{**s, "health_paths": tuple(s["health_paths"])}) for s in spec["services"]]
    # As an exception, TERM (a time limit, scancel) unwinds through everything that must be stopped.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        with running(services, job_name=spec["job_name"], log_dir=Path(spec["log_dir"])) as ready:
            process = subprocess.Popen(command, env={**os.environ, **ready.environment}, start_new_session=True)
            try:
                with ready.ending(process):
                    return process.wait()
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGTERM)
                    process.wait()
    except NemoSrlError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
