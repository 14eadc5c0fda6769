"""Shows that requirements.lock can be installed on every Python of the project without a compiler: `make lock-check`.

No other Python is needed than the one that runs this. For each version, uv looks for a wheel of every pin that holds
there, on Linux x86_64. The few pins that have no wheel are in `SOURCE_ONLY`. Those are built here, with compilers that
always fail.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from packaging.requirements import Requirement

from tools import install

PYTHONS = ("3.10", "3.11", "3.12", "3.13")
PLATFORM = "x86_64-manylinux_2_28"
"""Linux with glibc 2.28 (Debian 10, RHEL 8) or newer. The wheels of torch 2.13 need that."""
SOURCE_ONLY = {
    "antlr4-python3-runtime": "Hydra needs 4.9, and the first version with a wheel is 4.11",
    "jieba": "its authors publish no wheels",
    "langdetect": "its authors publish no wheels",
    "megatron-core": "0.11.0 has wheels for Python 3.10 and 3.11 only. Its one C++ module is optional, and is for data "
    "sets that this project does not use",
    "rouge-score": "0.1.2 has no wheel",
    "wget": "its author publishes no wheels",
}
"""Pins that have no wheel on some Python, and why."""
BUILD_TOOLS = ("setuptools", "pybind11")
"""What the packages of `SOURCE_ONLY` are built with. The lock file pins these too."""


def pin(lock: str, name: str) -> str:
    """The one pin of a package in a lock file's text, as `name==version`. Raises `ValueError` if there is not one."""
    (found,) = re.findall(rf"^{re.escape(name)}==[^\s;]+", lock, re.MULTILINE)
    return str(found)


def look_for_wheels(lock: str, python: str) -> str:
    """What uv complains about when it may use wheels only, on a Python ("3.12"). Empty if every pin has a wheel.

    uv may have failed for another reason, such as a package index that only pip can reach. So pip has the last word.
    """
    pins = [Requirement(line) for line in lock.splitlines() if line and not line.startswith("#")]
    here = [x for x in pins if not x.marker or x.marker.evaluate({"python_version": python})]
    wanted = [f"{x.name}{x.specifier}" for x in here if x.name not in SOURCE_ONLY]
    command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", python, "--python-platform", PLATFORM]
    # uv would otherwise download a Python of that version, although it has nothing to run on it.
    command += ["--python", sys.executable, "--no-python-downloads", "-"]
    uv = subprocess.run(command, input="\n".join(wanted), text=True, capture_output=True, env=install.uv_environment())
    return uv.stderr if uv.returncode and not pip_finds_wheels(wanted, python) else ""


def pip_finds_wheels(wanted: list[str], python: str) -> bool:
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--ignore-installed", "--no-deps"]
    command += ["--only-binary=:all:", "--python-version", python, "--target", tempfile.gettempdir()]
    # pip takes the names of platforms literally. uv knows that a newer glibc runs what was made for an older one.
    tags = ["linux", *(f"manylinux{year}" for year in (1, 2010, 2014)), *(f"manylinux_2_{n}" for n in range(5, 29))]
    command += [f"--platform={tag}_x86_64" for tag in tags]
    return subprocess.run([*command, *wanted], capture_output=True).returncode == 0


def build_without_compiler(lock: str) -> list[str]:
    """Build the packages of `SOURCE_ONLY`. Returns the file names of the wheels that were built."""
    pip = [sys.executable, "-m", "pip"]
    with tempfile.TemporaryDirectory() as tools, tempfile.TemporaryDirectory() as wheels:
        pins = [pin(lock, name) for name in BUILD_TOOLS]
        subprocess.run([*pip, "install", "--quiet", "--no-deps", "--target", tools, *pins], check=True)
        # Not from pip's cache: a wheel there may have been built with a compiler.
        command = [
            *pip,
            "wheel",
            "--quiet",
            "--no-deps",
            "--no-build-isolation",
            "--no-cache-dir",
            "--wheel-dir",
            wheels,
        ]
        command += [f"--no-binary={','.join(SOURCE_ONLY)}", *(pin(lock, name) for name in SOURCE_ONLY)]
        subprocess.run(command, check=True, env={**os.environ, "CC": "false", "CXX": "false", "PYTHONPATH": tools})
        return sorted(path.name for path in Path(wheels).iterdir())


def main() -> None:
    lock = install.LOCK.read_text()
    failed = False
    for python in PYTHONS:
        complaint = look_for_wheels(lock, python)
        print(f"Python {python}: {complaint or 'every pin has a wheel, except those that are built below'}", flush=True)
        failed = failed or bool(complaint)
    if failed:
        sys.exit(
            "error: requirements.lock does not hold for every Python. Pin another version where one is missing, with a "
            'marker such as `; python_version >= "3.13"`. Or name the package in SOURCE_ONLY if it needs no compiler.'
        )
    for name in build_without_compiler(lock):
        print(f"built from source without a compiler: {name}")


if __name__ == "__main__":
    main()
