"""One start of a model's servers for all stages that ask the model: a serving job, which the stages' steps join.

The serving job starts the servers (`with_services.py`), and beside them, on its first node, this program:

    python -m nemo_srl.launchers.serving DIRECTORY IDLE_SECONDS

A stage has no job of its own. Its launcher hands in the steps as a file of DIRECTORY, and waits for another file that
says how they ended:

    <stage>.request.json   the steps, their environment and their log
    <stage>.taken          one line each time that they were begun
    <stage>.result.json    how they ended
    end                    the token of the serving job that is to end, because its model is not asked any more

All of these are on the file system that the nodes share, so both sides may die at any time. If the serving job is
killed, its next start finds the request without a result, and runs the steps again: they go on from their journals. If
the launcher is killed, the next one finds its request under way. A serving job without a request ends after
IDLE_SECONDS, so that it does not hold its GPUs for a launcher that never returns.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

from nemo_srl import jsonio
from nemo_srl.artifacts import write_atomic
from nemo_srl.errors import JobFailedError
from nemo_srl.launchers import supervisor
from nemo_srl.launchers.processes import GRACE_SECONDS, log_file
from nemo_srl.protocols import EXIT_STOPPED, Job, JobStep
from nemo_srl.shared_storage import ask_again

POLL_SECONDS = 0.25
MAX_FAILURES = 3
"""A serving job that has begun a stage's steps and is then killed is started again so often for this stage."""
_END = "end"


@dataclass(frozen=True)
class Result:
    """How the steps of a stage ended: the exit status of the last one that ran, and its name."""

    code: int
    step: str


@dataclass(frozen=True)
class Handed:
    """The steps of a stage, as they were handed to a serving job."""

    directory: Path
    name: str
    token: str

    def result(self) -> Result | None:
        """None while the steps run or wait."""
        ask_again(self.directory)
        found = _read(_file(self.directory, self.name, "result.json"))
        return Result(found["code"], found["step"]) if found and found["token"] == self.token else None

    def num_taken(self) -> int:
        """How often the steps were begun. Each time, the servers were ready."""
        ask_again(self.directory)
        taken = _file(self.directory, self.name, "taken")
        return taken.read_text().split().count(self.token) if taken.exists() else 0


def serving_job(job: Job, *, idle_seconds: float, resources: object) -> Job:
    """The job that serves the services of a stage's job. It has the same name for all stages with the same ones.

    `resources` are what else must be the same, such as the container.
    """
    key = json.dumps([[asdict(s) for s in job.services], job.num_nodes, job.num_gpus_per_node, resources], default=str)
    name = f"servers-{hashlib.sha256(key.encode()).hexdigest()[:10]}"
    command = ["-m", "nemo_srl.launchers.serving", str(job.log_dir / name), f"{idle_seconds:g}"]
    return replace(job, name=name, steps=[JobStep(name="serve", command=command)], env={})


def fits(job: Job, serving: Job) -> bool:
    """Whether the serving job has all that a stage's job needs. It may have more replicas of the same model."""
    return bool(job.services) and (
        all(s in serving.services for s in job.services) and set(job.paths) <= set(serving.paths)
    )


def hand_in(job: Job, serving: Job) -> Handed:
    """Give the steps of a stage to a serving job. If they are under way there, nothing changes."""
    directory = serving.log_dir / serving.name
    directory.mkdir(parents=True, exist_ok=True)
    for path in directory.glob("*.request.json"):
        if path != _file(directory, job.name, "request.json"):
            path.unlink(missing_ok=True)  # of a launcher that was killed: a run directory has one at a time
    request = {"steps": [asdict(s) for s in job.steps], "env": dict(job.env), "log": str(log_file(job))}
    before = _read(_file(directory, job.name, "request.json"))
    if before and {**request, "token": before["token"]} == before:
        handed = Handed(directory, job.name, before["token"])
        if handed.result() is None:
            return handed
    token = secrets.token_hex(8)
    write_atomic(_file(directory, job.name, "request.json"), json.dumps({**request, "token": token}) + "\n")
    return Handed(directory, job.name, token)


def let_end(serving: Job, token: str) -> None:
    """Tell the start of a serving job that has this token (NEMO_SRL_TOKEN) that nobody asks its model any more."""
    directory = serving.log_dir / serving.name
    if directory.exists():
        write_atomic(directory / _END, token)


def may_go_on(handed: Handed) -> Callable[[], bool]:
    """A function to call after each death of a serving job: whether it may start again.

    It may if it had begun the steps. Otherwise its servers never were ready, and would not be the next time. Steps that
    were begun before, while another launcher waited for them, count as well.
    """
    num_taken, num_failures = 0, 0

    def allowed() -> bool:
        nonlocal num_taken, num_failures
        before, num_taken = num_taken, handed.num_taken()
        num_failures += 1
        return num_taken > before and num_failures <= MAX_FAILURES

    return allowed


def _file(directory: Path, name: str, kind: str) -> Path:
    return directory / f"{name}.{kind}"


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = jsonio.loads(path.read_bytes())
        return found
    except FileNotFoundError:
        return None
    except ValueError as e:
        raise JobFailedError(f"{path}: damaged ({e}). Delete {path.parent}, and run again.") from e


class _Stopped(Exception):
    """This process got TERM."""


def main(directory: Path, idle_seconds: float) -> int:
    """Run what is handed in, until the end or a long silence. The exit status of this process is returned."""

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not end what the first one began
        raise _Stopped

    signal.signal(signal.SIGTERM, stop)
    supervisor.follow_parent(os.getppid(), signal.SIGKILL)  # without it, the servers are gone as well
    directory.mkdir(parents=True, exist_ok=True)
    try:
        return _serve(directory, idle_seconds)
    except _Stopped:
        return EXIT_STOPPED  # the steps have kept what was completed, and the next start goes on with them


def _serve(directory: Path, idle_seconds: float) -> int:
    last = time.monotonic()
    while time.monotonic() - last < idle_seconds:
        end = directory / _END
        if end.exists() and end.read_text() == os.environ.get("NEMO_SRL_TOKEN"):
            return 0
        if (found := _next(directory)) is None:
            time.sleep(POLL_SECONDS)
            continue
        name, request = found
        print(f"=== {name}", flush=True)
        result = _run(directory, name, request)
        write_atomic(
            _file(directory, name, "result.json"), json.dumps({**asdict(result), "token": request["token"]}) + "\n"
        )
        last = time.monotonic()
    print(f"=== nothing was asked for {idle_seconds:g} s (launcher.idle_seconds): the servers end", flush=True)
    return 0


def _next(directory: Path) -> tuple[str, dict[str, Any]] | None:
    """A stage that waits, and its request."""
    for path in sorted(directory.glob("*.request.json")):
        name = path.name.removesuffix(".request.json")
        request = _read(path)
        if request and Handed(directory, name, request["token"]).result() is None:
            return name, request
    return None


def _run(directory: Path, name: str, request: Mapping[str, Any]) -> Result:
    """Run the steps of a stage until one fails."""
    with _file(directory, name, "taken").open("a") as taken:
        taken.write(f"{request['token']}\n")
    result = Result(0, "")
    for step in request["steps"]:
        result = Result(_run_step([sys.executable, *step["command"]], request), step["name"])
        if result.code:
            break
    return result


def _run_step(command: list[str], request: Mapping[str, Any]) -> int:
    with Path(request["log"]).open("ab") as log:
        log.write(f"$ {' '.join(command)}\n".encode())
        log.flush()
        process = subprocess.Popen(
            command, env={**os.environ, **request["env"]}, stdin=subprocess.DEVNULL, stdout=log,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            return process.wait()
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(GRACE_SECONDS)
                except subprocess.TimeoutExpired:
                    process.kill()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), float(sys.argv[2])))
