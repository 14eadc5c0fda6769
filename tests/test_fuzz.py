"""A few calls of every program with wrong arguments and damaged files. `tools/fuzz_recipes.py` makes many."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

from nemo_srl.errors import explained
from tools.fuzz_recipes import damaged_json, keys_of

ROOT = Path(__file__).resolve().parent.parent


def test_no_call_ends_with_a_traceback(tmp_path: Path) -> None:
    # In a process of its own, because the calls change what a process has only once.
    command = [
        sys.executable,
        "-m",
        "tools.fuzz_recipes",
        "num_cases=25",
        "seed=5",
        f"output={tmp_path / 'found.json'}",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["num_cases"] == 25
    assert len(found["by_recipe"]) >= 6


def test_damaged_json_is_still_json_and_not_the_same() -> None:
    rows = b"".join(json.dumps({"a": [1, {"b": "x"}], "c": i}).encode() + b"\n" for i in range(5))
    rng = random.Random(1)
    found = {damaged_json(rows, rng) for _ in range(50)}
    assert len(found) > 20
    assert all(len([json.loads(line) for line in data.splitlines()]) == 5 for data in found)
    assert list(keys_of({"a": {"b": 1}, "c": 2})) == ["a", "a.b", "c"]


def test_errors_of_the_disk_are_explained_and_others_are_not() -> None:
    assert "Free some disk space" in str(explained(OSError(28, "x")))
    assert str(explained(PermissionError(13, "x", "/a"))).startswith("/a: Permission denied. Give this user")
    assert explained(FileNotFoundError(2, "x", "/a")) == "/a: No such file or directory"
    assert explained(ConnectionRefusedError(111, "x")) is None
    assert explained(OSError("anything")) is None
