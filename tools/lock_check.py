"""Shows that requirements.lock can be installed on every Python of the project without a compiler: `make lock-check`.

No other Python is needed than the one that runs this. For each version, uv looks for a wheel of every pin that holds
there, on Linux x86_64. The few pins that have no wheel are in `SOURCE_ONLY`. Those are built here, with compilers that
always fail.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Collection
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


def pins_of(lock: str, python: str) -> list[Requirement]:
    """The pins of a lock file's text that hold on a Python ("3.12")."""
    pins = [Requirement(line) for line in lock.splitlines() if line and not line.startswith("#")]
    return [x for x in pins if not x.marker or x.marker.evaluate({"python_version": python})]


def look_for_wheels(lock: str, python: str) -> str:
    """What uv complains about when it may use wheels only, on a Python ("3.12"). Empty if every pin has a wheel.

    uv may have failed for another reason, such as a package index that only pip can reach. So pip has the last word.
    """
    wanted = [f"{x.name}{x.specifier}" for x in pins_of(lock, python) if x.name not in SOURCE_ONLY]
    command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", python, "--python-platform", PLATFORM]
    # uv would otherwise download a Python of that version, although it has nothing to run on it.
    command += ["--python", sys.executable, "--no-python-downloads", "-"]
    uv = subprocess.run(command, input="\n".join(wanted), text=True, capture_output=True, env=install.uv_environment())
    return uv.stderr if uv.returncode and not pip_finds_wheels(wanted, python) else ""


def pip_finds_wheels(wanted: list[str], python: str) -> bool:
    command = [*install.PIP, "install", "--dry-run", "--quiet", "--ignore-installed", *wheels_only(python)]
    return subprocess.run([*command, "--target", tempfile.gettempdir(), *wanted], capture_output=True).returncode == 0


def wheels_only(python: str) -> list[str]:
    """The arguments with which pip takes nothing but wheels for that Python. It then wants a `--target` as well."""
    # pip takes the names of platforms literally. uv knows that a newer glibc runs what was made for an older one.
    tags = ["linux", *(f"manylinux{year}" for year in (1, 2010, 2014)), *(f"manylinux_2_{n}" for n in range(5, 29))]
    platforms = [f"--platform={tag}_x86_64" for tag in tags]
    return ["--no-deps", "--only-binary=:all:", "--python-version", python, *platforms]


def build_without_compiler(lock: str, directory: Path, packages: Collection[str] = tuple(SOURCE_ONLY)) -> list[Path]:
    """Build packages of `SOURCE_ONLY`. Returns the wheels, which are in `directory`."""
    with tempfile.TemporaryDirectory() as tools:
        # Whatever the marker says: the tools are for the packages that are built, and not for this environment.
        pins = [install.pin(lock, name).partition(";")[0].strip() for name in (*BUILD_TOOLS, *packages)]
        tool_pins, package_pins = pins[: len(BUILD_TOOLS)], pins[len(BUILD_TOOLS) :]
        subprocess.run([*install.PIP, "install", "--quiet", "--no-deps", "--target", tools, *tool_pins], check=True)
        # Not from pip's cache: a wheel there may have been built with a compiler.
        command = [*install.PIP, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-cache-dir"]
        command += ["--wheel-dir", str(directory), f"--no-binary={','.join(packages)}", *package_pins]
        subprocess.run(command, check=True, env={**os.environ, "CC": "false", "CXX": "false", "PYTHONPATH": tools})
    return sorted(directory.glob("*.whl"))


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
    with tempfile.TemporaryDirectory() as directory:
        for wheel in build_without_compiler(lock, Path(directory)):
            print(f"built from source without a compiler: {wheel.name}")


if __name__ == "__main__":
    main()
