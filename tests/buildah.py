"""buildah with a storage of its own: images are built and run without a daemon, and nothing stays behind.

Every command has namespaces of mounts and processes of its own. What it mounts is seen nowhere else, and a command
that takes too long ends with all that it started. Nothing is ever pulled: a base that was not built here is an error.
Needs root; Debian's package is installed only where the environment allows it (`INSTALL`).
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

INSTALL = ("NEMO_SRL_INSTALL_BUILDAH", "NEMO_SRL_INSTALL_SLURM")
"""Environment variables each of which allows to install system packages; CI sets the second."""
NAMESPACES = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
BLOB_CACHE = Path("/var/lib/containers")
"""Written by buildah as root wherever its storage is."""
Done = subprocess.CompletedProcess[str]


def why_not() -> str:
    """The reason why this machine cannot build images; empty if it can. Installs buildah where that is allowed."""
    if os.getuid() != 0:
        return "building images with buildah needs root"
    if subprocess.run([*NAMESPACES, "true"], capture_output=True).returncode:
        return "this machine does not let its root make namespaces"
    if shutil.which("buildah") is None:
        if shutil.which("apt-get") is None:
            return "there is no buildah, and no apt-get to install it with"
        if not any(os.environ.get(variable) for variable in INSTALL):
            return f"there is no buildah; {INSTALL[0]}=1 allows these tests to install Debian's package"
        return _install()
    return ""


def _install() -> str:
    """The reason why that failed, if it did."""
    apt = ["apt-get", "-qq", "-o", "Dpkg::Use-Pty=0", "-o", "DPkg::Lock::Timeout=120"]
    install = [*apt, "install", "-y", "--no-install-recommends", "buildah"]
    for command in (install, [*apt, "update"], install):
        done = subprocess.run(
            command, env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"}, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300,
        )  # fmt: skip
        if shutil.which("buildah"):
            return ""
    return f"apt-get could not install buildah: {done.stdout.strip().splitlines()[-1:]}"


@dataclass(frozen=True)
class Buildah:
    """`mounts` are what every container sees of this machine, read-only and under the given path."""

    directory: Path
    mounts: dict[Path, str]

    def build(self, tag: str, *, dockerfile: Path, context: Path) -> Done:
        """Build as `docker build -f dockerfile -t tag context`; the caller looks at the exit status."""
        return self._buildah(
            "build", *self._isolation(), "--pull=never", f"--file={dockerfile}", f"--tag={tag}", str(context)
        )

    def run(self, image: str, *command: str, writable: Sequence[Path] = (), workdir: Path | None = None) -> Done:
        """Run as `docker run --rm --network=host image command`; `writable` is mounted where it is here."""
        made = self._buildah("from", "--pull=never", "--quiet", image)
        assert made.returncode == 0, made.stderr
        container = made.stdout.strip()
        options = [f"--volume={path}:{path}" for path in writable]
        if workdir is not None:
            options.append(f"--workingdir={workdir}")
        try:
            # buildah itself looks for programs in the image only, and not in what is mounted.
            return self._buildah("run", *self._isolation(), *options, container, "--", "/usr/bin/env", *command)
        finally:
            self._buildah("rm", container)

    def _isolation(self) -> list[str]:
        volumes = [f"--volume={here}:{there}:ro" for here, there in self.mounts.items()]
        return ["--isolation=chroot", "--network=host", *volumes]

    def _buildah(self, command: str, *arguments: str, timeout: float = 300) -> Done:
        storage = [f"--root={self.directory}/storage", f"--runroot={self.directory}/run", "--storage-driver=vfs"]
        env = {
            "PATH": os.environ["PATH"],
            "TMPDIR": str(self.directory / "tmp"),
            "CONTAINERS_CONF": str(self.directory / "containers.conf"),
        }
        return subprocess.run(
            [*NAMESPACES, "buildah", *storage, command, *arguments], env=env, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=timeout,
        )  # fmt: skip


@contextmanager
def storage(directory: Path, mounts: dict[Path, str]) -> Iterator[Buildah]:
    """A buildah whose images live in `directory`, which is removed at the end."""
    had_cache = BLOB_CACHE.exists()
    (directory / "tmp").mkdir(parents=True)
    # Or buildah makes a directory of networks in /etc.
    (directory / "containers.conf").write_text(f'[network]\nnetwork_config_dir = "{directory}/networks"\n')
    try:
        yield Buildah(directory, mounts)
    finally:
        shutil.rmtree(directory)
        if not had_cache:
            shutil.rmtree(BLOB_CACHE, ignore_errors=True)
