"""`python -m nemo_srl.doctor.probe DIRECTORY`: collect facts on one node of a job, in its container.

DIRECTORY/asked.json names the probes and what they need. Each node writes DIRECTORY/facts-<node>.json: by probe what it
found, or `{"error": ...}`. A probe that fails does not end the others. Nothing is judged here.

The launcher starts one process on each node (RANK, WORLD_SIZE). Only Python's own modules are imported at first,
because the container may lack the others. The nodes meet by files in DIRECTORY, which they share.
"""

from __future__ import annotations

import importlib
import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROBES = ("versions", "memory", "storage", "ports")
"""Modules of this package. The function `probe` of each takes a `Node` and returns facts that JSON can hold."""
MEET_SECONDS = 120.0
"""So long, a node waits for a file of another one."""


@dataclass(frozen=True)
class Node:
    """One node of the job. `asked` has what the doctor wants to know."""

    directory: Path
    index: int
    count: int
    asked: Mapping[str, Any]
    seconds: float = MEET_SECONDS

    def file(self, name: str, index: int | None = None) -> Path:
        """A file of this node, or of another one."""
        return self.directory / f"{name}-{self.index if index is None else index}"

    def wait_for(self, path: Path, text: str | None = None) -> bool:
        """Wait until a file is there, and has this text if one is given. Returns whether it came in time."""
        return self.until(lambda: path.exists() if text is None else read_text(path) == text)

    def until(self, condition: Callable[[], object]) -> bool:
        """Poll until the condition holds. Returns False if it did not hold in time."""
        deadline = time.monotonic() + self.seconds
        while not condition():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True


def read_text(path: Path) -> str | None:
    """The text of a file. None if it cannot be read."""
    try:
        return path.read_text()
    except OSError:
        return None


def put(path: Path, text: str) -> None:
    """Write a file. It appears whole."""
    temporary = path.with_name(f".{path.name}.new")
    with temporary.open("w") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def collect(node: Node, names: tuple[str, ...] = PROBES) -> dict[str, Any]:
    """The facts of all probes."""
    facts: dict[str, Any] = {"host": socket.gethostname(), "node": node.index}
    for name in names:
        try:
            facts[name] = importlib.import_module(f"nemo_srl.doctor.{name}").probe(node)
        except Exception as e:
            facts[name] = {"error": f"{type(e).__name__}: {e}", "traceback": traceback.format_exc()}
    return facts


def main(directory: Path) -> None:
    asked = json.loads((directory / "asked.json").read_text())
    node = Node(directory, int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")), asked)
    facts = collect(node, tuple(asked["probes"]))
    put(directory / f"facts-{node.index}.json", json.dumps(facts, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
