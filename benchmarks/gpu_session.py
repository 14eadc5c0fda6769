"""What the parts of gpu.py share: the rows of the table, limits of time, and measurements in their own processes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_MAX_REASON = 300
"""Characters of a log that a row shows."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table. `values` are the figures behind `result`, for the JSON file."""

    part: str
    name: str
    result: str
    goal: str = ""
    reached: bool | None = None
    """Whether the goal is reached. None: there is no goal, or it was not measured."""
    failed: bool = False
    values: Mapping[str, Any] = field(default_factory=dict)


def table(rows: Sequence[Row]) -> str:
    """The rows in Markdown."""
    lines = ["| part | what | result | goal | reached |", "|---" * 5 + "|"]
    for row in rows:
        reached = {True: "yes", False: "NO", None: ""}[row.reached]
        cells = (row.part, row.name, row.result, row.goal, reached)
        lines.append("| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in cells) + " |")
    return "\n".join(lines)


class Session:
    """One run of the benchmark."""

    def __init__(self, *, directory: Path, output: Path, device: str, small: bool, trl_path: Path | None) -> None:
        self.directory, self.device, self.small = directory, device, small
        self.rows: list[Row] = []
        self.about: dict[str, Any] = {"device": device, "small": small}
        """The machine and the options, for the JSON file."""
        self._output, self._trl_path = output, trl_path
        self._lock = threading.Lock()
        self._part, self._ends = "", 0.0
        self._models: dict[str, Path | None] = {}

    def begin(self, part: str, seconds: float) -> None:
        """The rows and measurements that follow belong to `part`, which ends after that time."""
        self._part, self._ends = part, time.monotonic() + seconds

    def add(
        self, name: str, result: str, *, goal: str = "", reached: bool | None = None, failed: bool = False,
        values: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        """Add a row, print it, and write the JSON file with all rows so far."""
        row = Row(
            part=self._part, name=name, result=result, goal=goal, reached=reached, failed=failed, values=values or {}
        )
        with self._lock:
            self.rows.append(row)
            print(table([row]).splitlines()[-1], flush=True)
            text = json.dumps({**self.about, "rows": [asdict(x) for x in self.rows]}, indent=2)
            partial = self._output.with_name(self._output.name + ".partial")
            partial.write_text(text + "\n")
            partial.replace(self._output)

    def fail(self, name: str, reason: str) -> None:
        self.add(name, f"failed: {' '.join(reason.split())[-_MAX_REASON:]}", failed=True)

    def measure(self, name: str, script: str, case: Mapping[str, Any], *, peers: bool = False) -> dict[str, Any] | None:
        """What a script of this folder writes: `script CASE_FILE RESULT_FILE`, in a process of its own.

        With `peers` it sees the packages of `trl_path` instead of ours. Returns None if there is no result. Then a row
        says why: the script failed, its time was over, or it wrote the reason why it cannot measure as "left_out".
        """
        stem = self.directory / re.sub(r"[^\w.]+", "-", f"{self._part}-{name}")
        case_file, result_file, log = (Path(f"{stem}.{end}") for end in ("case.json", "json", "log"))
        case_file.write_text(json.dumps({"device": self.device, **case}, default=str))
        command = [sys.executable, str(ROOT / "benchmarks" / script), str(case_file), str(result_file)]
        if reason := self.run(command, log, peers=peers):
            self.fail(name, reason)
            return None
        found: dict[str, Any] = json.loads(result_file.read_text())
        if "left_out" in found:
            self.add(name, f"left out: {found['left_out']}")
            return None
        return found

    def model(self, shape: str) -> Path | None:
        """The directory that gpu_models.py fills for a shape, once. None if that failed."""
        if shape not in self._models:
            directory = self.directory / "models" / shape
            made = self.measure(f"random {shape}", "gpu_models.py", {"shape": shape, "directory": directory})
            self._models[shape] = directory if made else None
        return self._models[shape]

    def run(self, command: Sequence[str], log: Path, *, peers: bool = False) -> str:
        """Run a command to its end, or to the end of the part's time. Returns why it failed, or an empty string."""
        seconds = self._ends - time.monotonic()
        if seconds <= 0:
            return "the time was over before it began"
        with log.open("w") as file:
            process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=self._environment(peers),
                start_new_session=True,
            )  # fmt: skip
            try:
                status = process.wait(seconds)
            except subprocess.TimeoutExpired:
                return f"not done in {seconds:.0f} s. {_last_line(log)}"
            finally:
                # Also what it started itself, such as the training of a stage.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        return f"exit status {status}: {_last_line(log)}" if status else ""

    def _environment(self, peers: bool) -> dict[str, str]:
        path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        if peers and self._trl_path:
            path = [str(self._trl_path)]
        # Nothing here needs a hub. Without this, some versions of transformers ask it about local models.
        quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        return {**os.environ, **quiet, "PYTHONPATH": os.pathsep.join(path)}


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else "it wrote nothing"
