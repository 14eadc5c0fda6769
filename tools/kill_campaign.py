"""Disturbs a short self-rewarding run again and again, and shows that nothing is lost: `python -m tools.kill_campaign`.

    python -m tools.kill_campaign num_kills=60 num_faults=12 output=benchmarks/results/kills-2026-11-26.json

One run is left alone. Other runs are disturbed and started again until they end. Then they must have published the same
bytes, and no completed model call may have been repeated. This takes about 20 minutes on two cores.

    kill        kill -9 of the orchestrator, of a worker, or of both, at a random moment or while a stage publishes, a
                training saves a checkpoint, or a model is exported
    full disk   the disk is full from a random moment on (a small tmpfs; only root can make one)
    read-only   no directory of the run can be written from a random moment on

After a worker's death, and after a fault, the orchestrator must end by itself with exit status 2 and an error that says
what happened. A traceback is a failure. The program ends with exit status 1 and the list of failures if there are any.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import psutil

from nemo_srl import cli
from nemo_srl.artifacts import DATA, JOURNAL, write_atomic
from tests.tiny_loop import kill_everything, published, start, tiny_settings

Published = dict[str, tuple[str, str]]
"""The digest and the identity of each artifact of a run."""
Victim = Literal["orchestrator", "worker", "both"]
VICTIMS: tuple[Victim, ...] = ("orchestrator", "worker", "both")
MOMENTS = {
    "any time": None,
    "publish": re.compile(rf"({re.escape(DATA)}|\w+\.json)\.tmp$"),
    "checkpoint": re.compile(r"/checkpoints/."),
    "export": re.compile(r"/(hf|hf\.[^/]*|[^/]*tmp[^/]*)/[^/]+\.(safetensors|json)"),
}
"""Moments of a kill, each with the paths whose appearance announces it."""
CLEAR = re.compile(r"No space left|Permission denied|Read-only file system|disk space")
AS_ORDINARY_USER = ("setpriv", "--bounding-set=-dac_override,-dac_read_search") if os.geteuid() == 0 else ()
"""root may write where nobody may. This takes the right away."""
WAIT_SECONDS = 3600


@dataclass
class Options:
    num_kills: int = 60
    num_faults: int = 12
    seed: int = 1
    output: str = ""
    """The file of results, written after each run. Empty: they are printed."""
    settings: list[str] = field(default_factory=list)
    """Further settings of recipes/iterate.py, such as num_iterations=2."""


@dataclass
class Counts:
    """What happened, and what should not have."""

    kills: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    num_runs: int = 0
    num_starts: int = 0
    num_calls: int = 0
    messages: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)


class Disturbed:
    """One run directory that is disturbed until the run ends by itself."""

    def __init__(
        self, directory: Path, overrides: list[str], rng: random.Random, counts: Counts, *, longest: float = 30
    ) -> None:
        """A moment is awaited for `longest` seconds of the processors at most."""
        self.run_dir, self.log = directory / "run", directory / "log"
        self._overrides, self._rng, self._counts, self._longest = overrides, rng, counts, longest
        self._journals: dict[Path, bytes] = {}
        directory.mkdir(parents=True, exist_ok=True)

    def start(self) -> subprocess.Popen[bytes]:
        self._counts.num_starts += 1
        return start(self.run_dir, self._overrides, self.log, prefix=AS_ORDINARY_USER)

    def kill(self) -> bool:
        """Start the run and kill something. False: the run ended before."""
        victim, moment = self._rng.choice(VICTIMS), self._rng.choice(list(MOMENTS))
        size = self._log_size()
        process = self.start()
        children = self._wait(process, moment)
        if process.poll() is not None:
            self._expect(process.returncode == 0, f"ended with {process.returncode} undisturbed", size)
            return False
        if victim == "both":
            kill_everything(process)
        elif victim == "orchestrator" or not children:
            victim = "orchestrator"
            process.kill()
            process.wait()
        else:
            with contextlib.suppress(psutil.NoSuchProcess):
                self._rng.choice(children).kill()
            code = process.wait(WAIT_SECONDS)
            self._expect(code in (0, 2), f"exit status {code} after a worker's death", size)
            self._expect(code == 0 or "error: " in self._log_since(size), "no message after a worker's death", size)
        _, alive = psutil.wait_procs(children, timeout=60)
        self._expect(not alive, f"{len(alive)} processes outlived the {victim}", size)
        self._counts.kills[f"{victim}, {moment}"] += 1
        self._check_journals()
        return True

    def fault(self, kind: str, switch: Callable[[bool], None]) -> bool:
        """Start the run, and let it meet a fault that is switched on and off. False: the run ended before."""
        size = self._log_size()
        process = self.start()
        self._wait(process, "any time")
        if process.poll() is not None:
            return False
        switch(True)
        try:
            code = process.wait(WAIT_SECONDS)
        except subprocess.TimeoutExpired:
            kill_everything(process)
            code = -1
        switch(False)
        text = self._log_since(size)
        self._expect(code in (0, 2), f"exit status {code} after {kind}", size)
        self._expect(code == 0 or bool(CLEAR.search(text)), f"no clear message after {kind}", size)
        self._counts.faults[f"{kind}, {'noticed' if code else 'not noticed'}"] += 1
        if code:
            message = text[text.rfind("error: ") :]
            self._counts.messages[re.sub(r"/[^\s:]+/", ".../", message.strip())[:400]] += 1
        self._check_journals()
        return True

    def finish(self, wanted: Published) -> None:
        """Let the run end, and compare it with the undisturbed one."""
        size = self._log_size()
        code = self.start().wait(WAIT_SECONDS)
        self._expect(code == 0, f"ended with {code}", size)
        self._check_journals()
        found = published(self.run_dir)
        others = {key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key)}
        self._expect(not others, f"published other bytes: {sorted(others)}", size)
        for path in self.run_dir.glob(f"iter_*/*/{JOURNAL}"):
            calls = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
            keys = [(call["request_key"], call["index"]) for call in calls]
            self._counts.num_calls += len(keys)
            self._expect(len(keys) == len(set(keys)), f"{path}: a completed call was repeated", size)
        self._counts.num_runs += 1

    def _wait(self, process: subprocess.Popen[bytes], moment: str) -> list[psutil.Process]:
        """Wait for the moment, or for the end of the run. Returns the processes that the orchestrator started."""
        pattern, before = MOMENTS[moment], set(_paths(self.run_dir))
        # Seconds of the processors, so that a busy machine does not move all kills to the imports.
        longest = self._rng.uniform(1, self._longest) if pattern is None else self._longest
        while process.poll() is None and _cpu_seconds(process.pid) < longest:
            if pattern and any(pattern.search(path) for path in _paths(self.run_dir) if path not in before):
                time.sleep(self._rng.choice((0, 0, 0.01, 0.1, 0.5)))
                break
            time.sleep(0.002 if pattern else 0.05)
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(process.pid).children(recursive=True)
        return []

    def _check_journals(self) -> None:
        """What a journal once held, it holds for ever."""
        for path in self.run_dir.glob(f"iter_*/*/{JOURNAL}"):
            data = path.read_bytes()
            whole = data[: data.rfind(b"\n") + 1]
            self._expect(whole.startswith(self._journals.get(path, b"")), f"{path}: lost a call", self._log_size())
            self._journals[path] = whole

    def _log_size(self) -> int:
        return self.log.stat().st_size if self.log.exists() else 0

    def _log_since(self, size: int) -> str:
        return self.log.read_bytes()[size:].decode(errors="replace")

    def _expect(self, ok: bool, what: str, size: int) -> None:
        text = self._log_since(size)
        for fault in ([] if ok else [what]) + (["a traceback"] if "Traceback" in text else []):
            self._counts.failures.append(f"{self.run_dir}: {fault}\n{text[-3000:]}")
            print(f"FAILURE {self._counts.failures[-1]}", flush=True)


def _cpu_seconds(pid: int) -> float:
    """What a process and all below it have used so far. A child that has ended counts for its parent."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        times = [member.cpu_times() for member in (process, *process.children(recursive=True))]
        return sum(t.user + t.system + t.children_user + t.children_system for t in times)
    return float("inf")


def _paths(directory: Path) -> Iterator[str]:
    for folder, _, files in os.walk(directory):
        yield from (f"{folder}/{name}" for name in files)


@contextlib.contextmanager
def small_disk(directory: Path) -> Iterator[Callable[[bool], None]]:
    """A tmpfs on the directory. The function that comes back fills it (True), or makes room (False)."""
    directory.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1g", "tmpfs", str(directory)], check=True)

    def fill(full: bool) -> None:
        for _ in range(100):
            stat = os.statvfs(directory)
            used = (stat.f_blocks - stat.f_bfree) * stat.f_frsize
            size = used if full else 1 << 30
            if not subprocess.run(
                ["mount", "-o", f"remount,size={size}", str(directory)], capture_output=True
            ).returncode:
                return

    try:
        yield fill
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


def set_protected(directory: Path, protected: bool) -> None:
    """Take or give back the right to write to a directory and all below it."""
    for folder, _, _ in os.walk(directory):
        os.chmod(folder, 0o555 if protected else 0o755)


def kill_one_run(most: int, run: Disturbed, counts: Counts, wanted: Published) -> None:
    while counts.kills.total() < most and run.kill():
        print(f"{counts.kills.total()} kills, {counts.num_runs} runs ended", flush=True)
    run.finish(wanted)


def disturb_one_run(most: int, run: Disturbed, counts: Counts, wanted: Published) -> None:
    with small_disk(run.run_dir) if os.geteuid() == 0 else contextlib.nullcontext() as fill:
        protect = partial(set_protected, run.run_dir)
        going = True
        while going and counts.faults.total() < most:
            full = fill is not None and counts.faults.total() % 2 == 0
            going = run.fault("full disk", fill) if fill and full else run.fault("read-only", protect)
            print(f"{counts.faults.total()} faults", flush=True)
        run.finish(wanted)


def report(options: Options, counts: Counts, **figures: float) -> None:
    """Write the results so far."""
    plain = {key: dict(x) if isinstance(x, Counter) else x for key, x in vars(counts).items()}
    result = {
        "machine": platform.machine(), "cores": os.cpu_count(), "options": asdict(options), **figures,
        "num_kills": counts.kills.total(), "num_faults": counts.faults.total(), **plain,
    }  # fmt: skip
    text = json.dumps(result, indent=2) + "\n"
    if options.output:
        write_atomic(Path(options.output), text)
    else:
        print(text, flush=True)


def campaign(options: Options) -> None:
    rng, counts = random.Random(options.seed), Counts()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="kill-campaign-") as name:
        base = Path(name)
        overrides = [f"{key}={value}" for key, value in tiny_settings(base / "tiny").items()] + options.settings
        undisturbed = Disturbed(base / "undisturbed", overrides, rng, counts)
        if undisturbed.start().wait(WAIT_SECONDS):
            cli.fail(f"the undisturbed run failed: {undisturbed.log.read_text()[-2000:]}")
        wanted = published(undisturbed.run_dir)
        seconds = time.monotonic() - began
        print(f"the undisturbed run took {seconds:.0f} s", flush=True)
        while counts.kills.total() < options.num_kills or counts.faults.total() < options.num_faults:
            directory = base / f"run-{counts.num_runs}"
            if counts.kills.total() < options.num_kills:
                kill_one_run(options.num_kills, Disturbed(directory, overrides, rng, counts), counts, wanted)
            else:
                disturb_one_run(options.num_faults, Disturbed(directory, overrides, rng, counts), counts, wanted)
            report(options, counts, undisturbed_seconds=seconds, seconds=time.monotonic() - began)
    sys.exit(1 if counts.failures else 0)


if __name__ == "__main__":
    cli.run_program(Options, campaign)
