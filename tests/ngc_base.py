"""Stand-ins for the images of NVIDIA's registry, made of packages of this machine's environment.

A base has the file system of an image (`/etc`, `/opt`, `/tmp`, ...), a virtual environment into which `pip` can
install, and the variables that NGC's images set: `PIP_CONSTRAINT`, and perhaps `PYTHONPATH`. The rest would be
gigabytes. So this machine's `/usr`, its interpreter and its site-packages are mounted and not copied. The base has
links to those packages only that its own packages declare, directly or through others. So if the project imports a
package that neither the base nor the Dockerfile has, the import fails, as on a cluster.

Not covered: CUDA, NVIDIA's own builds and versions (torch, Transformer Engine, Apex, TensorRT-LLM), NGC's entry point.
"""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

SITE_PACKAGES = Path(sysconfig.get_path("purelib"))
PYTHON = Path(sys.executable).resolve()
VENV = Path("opt/venv")
STACK = "/stack"
"""This machine's site-packages are mounted here."""
WHEELS = "/wheels"
"""pip finds packages here."""
CONSTRAINTS = "etc/pip/constraint.txt"
FROM_BASE = "opt/base"
"""The base's own PYTHONPATH names this directory."""

DOCKERFILE = f"""
FROM scratch
COPY root/ /
ENV PATH=/{VENV}/bin:/usr/bin:/bin HOME=/root PIP_CONSTRAINT=/{CONSTRAINTS} PYTHONPATH=/{FROM_BASE}
WORKDIR /workspace
"""


def canonical(name: str) -> str:
    """The name of a distribution, as the package index writes it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(roots: Iterable[str]) -> set[str]:
    """`roots`, and all distributions that they declare, directly or through others. Only those installed here count."""
    found: set[str] = set()
    done: set[str] = set()
    queue = [Requirement(root) for root in roots]
    while queue:
        requirement = queue.pop()
        if str(requirement) in done:
            continue
        done.add(str(requirement))
        name = canonical(requirement.name)
        try:
            needs = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        found.add(name)
        for need in map(Requirement, needs):
            extras = requirement.extras or {""}
            if need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in extras):
                queue.append(need)
    return found


def top_levels(distribution: str) -> set[str]:
    """The entries of site-packages that belong to an installed distribution."""
    record = metadata.distribution(distribution).read_text("RECORD") or ""
    names = {re.split("[/,]", line, maxsplit=1)[0] for line in record.splitlines() if line}
    return names - {"..", "__pycache__"}


def write(directory: Path, distributions: Iterable[str], *, versions: Mapping[str, str], modules: Mapping[str, str],
          programs: Mapping[str, str], constraints: str) -> Path:  # fmt: skip
    """Write the build context of a base, and return its Dockerfile.

    `versions` gives distributions other versions than they have. `modules` adds modules of one file to its PYTHONPATH.
    `programs` adds shell scripts to its PATH.
    """
    root = directory / "root"
    packages = root / VENV / SITE_PACKAGES.relative_to(sys.prefix)
    for name in ("dev", "etc/pip", "proc", "root", "run", "sys", "tmp", "usr", "var/tmp", "workspace", FROM_BASE):
        (root / name).mkdir(parents=True, exist_ok=True)
    for path in _system():
        if path.is_symlink():
            (root / path.name).symlink_to(path.readlink())
    packages.mkdir(parents=True)
    (root / VENV / "bin").mkdir()
    (root / VENV / "pyvenv.cfg").write_text(f"home = {PYTHON.parent}\ninclude-system-site-packages = false\n")
    (root / VENV / "bin" / "python").symlink_to(PYTHON)
    (root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    (root / "etc/group").write_text("root:x:0:\n")
    (root / "etc/pip.conf").write_text(f"[global]\nno-index = true\nfind-links = {WHEELS}\n")
    (root / CONSTRAINTS).write_text(constraints)
    for name in distributions:
        for entry in top_levels(name):
            if not (name in versions and entry.endswith(".dist-info")) and not (packages / entry).is_symlink():
                (packages / entry).symlink_to(f"{STACK}/{entry}")
    for name, version in versions.items():
        info = packages / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    for name, text in modules.items():
        (root / FROM_BASE / f"{name}.py").write_text(text)
    for name, text in programs.items():
        path = root / VENV / "bin" / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
    dockerfile = directory / "Dockerfile"
    dockerfile.write_text(DOCKERFILE)
    return dockerfile


def fetch_wheels(directory: Path, requirements: Path) -> None:
    """Get the packages of a requirements file as wheels, from the index that this machine's pip uses."""
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", f"--wheel-dir={directory}"]
    done = subprocess.run([*pip, "--requirement", str(requirements)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def mounts(wheels: Path) -> dict[Path, str]:
    """The paths of this machine that the containers of these bases need."""
    found = {SITE_PACKAGES: STACK, wheels: WHEELS}
    system = [path for path in _system() if not path.is_symlink()]
    system += [path for path in map(Path, ("/etc/ld.so.cache", "/etc/alternatives")) if path.exists()]
    if not Path(sys.base_prefix).is_relative_to("/usr"):
        system.append(Path(sys.base_prefix))
    return {**found, **{path: str(path) for path in system}}


def _system() -> list[Path]:
    """`/usr`, and the directories that stand beside it or are links into it, depending on the distribution."""
    return [path for path in map(Path, ("/usr", "/bin", "/sbin", "/lib", "/lib64")) if path.exists()]
