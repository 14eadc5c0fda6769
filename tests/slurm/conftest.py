"""A real Slurm of three nodes on this machine, for the tests of this directory.

Each node is a set of namespaces (network, processes, mounts, host name) with a slurmd of its own. So
MASTER_ADDR=127.0.0.1 or a file in /tmp fails as on a cluster. `simpyxis.c` takes the options of pyxis and stands in for
containers. Signals reach only the tasks of a step, as with cgroups (`proctrack_leaders.c`). The tests need root, the
right to make namespaces, and Debian's packages. These are installed only if the environment allows it
(`NEMO_SRL_INSTALL_SLURM=1`). Elsewhere the tests are skipped.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests import processes

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parents[1]
SIM = HERE / "slurmsim.sh"
NUM_NODES = 3
INSTALL = "NEMO_SRL_INSTALL_SLURM"
"""Environment variable that allows to install system packages. CI sets it."""


@dataclass(frozen=True)
class Cluster:
    """All nodes see the directory `shared` under the same path."""

    shared: Path
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def run(self, *command: str) -> str:
        """Run a command on the login node, and return its output."""
        done = subprocess.run([str(SIM), "exec", *command], text=True, capture_output=True, check=False)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def start(self, *command: str, log: Path, env: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
        """Start a command on the login node, in the background, in a process group of its own."""
        with log.open("ab") as f:
            process = subprocess.Popen(
                [str(SIM), "exec", *command], stdout=f, stderr=subprocess.STDOUT, cwd=PROJECT, start_new_session=True,
                env={**os.environ, "PYTHONPATH": str(PROJECT), **(env or {})},
            )  # fmt: skip
        self.started.append(process)
        return process

    def control(self, *arguments: str) -> None:
        subprocess.run([str(SIM), *arguments], check=True, capture_output=True)

    def job(self, job_id: str) -> dict[str, str]:
        """The fields of `scontrol show job`."""
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "show", "job", "--oneliner", job_id)))

    def num_jobs(self) -> int:
        return len(self.run("squeue", "--noheader", "--states=all").splitlines())

    def containers(self) -> list[dict[str, Any]]:
        """All that was started in a container so far."""
        path = self.shared.parent / "log" / "containers.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def node_dies(self, node: str) -> None:
        self.control("kill-node", node)

    def node_returns(self, node: str) -> None:
        self.control("boot-node", node)
        wait_for(lambda: self.run("sinfo", "-hNn", node, "-o%T").split()[:1] == ["idle"])


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    if reason := _why_not():
        pytest.skip(reason)
    root = Path(tempfile.mkdtemp(prefix="nemo-srl-slurm-", dir="/tmp"))  # paths of sockets must be short
    # Each node has a /tmp of its own. What this test run needs from the machine's /tmp must be seen there as well.
    needed = {str(Path(p).resolve()) for p in (sys.prefix, sys.base_prefix, PROJECT)}
    os.environ |= {
        "SLURMSIM_ROOT": str(root),
        "SLURMSIM_NODES": str(NUM_NODES),
        "SLURMSIM_PYXIS": str(HERE / "simpyxis.c"),
        "SLURMSIM_PROCTRACK": str(HERE / "proctrack_leaders.c"),
        "SLURMSIM_SHARED": " ".join(sorted(p for p in needed if p.startswith("/tmp/"))),
    }
    started = subprocess.run([str(SIM), "start"], text=True, capture_output=True, check=False)
    if started.returncode:
        shutil.rmtree(root, ignore_errors=True)
        pytest.skip(f"no Slurm on this machine: {started.stderr.strip().splitlines()[-1:]}")
    found = Cluster(root / "shared")
    try:
        yield found
    finally:
        for process in found.started:  # those of tests that failed
            if process.poll() is None:
                kill(process)
        subprocess.run([str(SIM), "stop"], check=False, capture_output=True)
        shutil.rmtree(root, ignore_errors=True)


def _why_not() -> str:
    if os.getuid() != 0:
        return "a Slurm of one's own needs root"
    if shutil.which("slurmctld") is None:
        if shutil.which("apt-get") is None:
            return "there is no Slurm, and no apt-get to install it with"
        if not os.environ.get(INSTALL):
            return f"there is no Slurm; {INSTALL}=1 allows these tests to install Debian's packages"
    if subprocess.run(["unshare", "--net", "--mount", "--pid", "--fork", "true"], capture_output=True).returncode:
        return "this machine does not let its root make namespaces"
    return ""


def wait_for(condition: Callable[[], object], seconds: float = 120) -> None:
    """With the patience that Slurm needs."""
    processes.wait_for(condition, seconds, every=0.2)


def kill(process: subprocess.Popen[bytes], sig: signal.Signals = signal.SIGKILL) -> None:
    """Send a signal to the whole process group, and wait for its leader."""
    os.killpg(process.pid, sig)
    process.wait(120)
