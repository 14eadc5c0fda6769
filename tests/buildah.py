"""buildah with a storage of its own. It builds and runs images without a daemon, and leaves nothing behind.

Every command has its own namespaces of mounts and processes. So its mounts are seen nowhere else, and a command that
takes too long ends with all that it started. Nothing is pulled: a base that was not built here is an error. This needs
root. It installs Debian's package only if the environment allows that (`INSTALL`).
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
"""Environment variables. Each of them allows to install system packages. CI sets the second one."""
NAMESPACES = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
BLOB_CACHE = Path("/var/lib/containers")
"""buildah writes here as root, wherever its storage is."""
Done = subprocess.CompletedProcess[str]


def why_not() -> str:
    """Why this machine cannot build images. Empty if it can. Installs buildah where that is allowed."""
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
    """Why that failed. Empty if it did not."""
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
    """`mounts` are the paths of this machine that every container sees, read-only and under another path."""

    directory: Path
    mounts: dict[Path, str]

    def build(self, tag: str, *, dockerfile: Path, context: Path) -> Done:
        """Build as `docker build -f dockerfile -t tag context` does. The caller checks the exit status."""
        return self._buildah(
            "build", *self._isolation(), "--pull=never", f"--file={dockerfile}", f"--tag={tag}", str(context)
        )

    def run(self, image: str, *command: str, writable: Sequence[Path] = (), workdir: Path | None = None) -> Done:
        """Run as `docker run --rm --network=host image command` does. `writable` has the same path inside."""
        made = self._buildah("from", "--pull=never", "--quiet", image)
        assert made.returncode == 0, made.stderr
        container = made.stdout.strip()
        options = [f"--volume={path}:{path}" for path in writable]
        if workdir is not None:
            options.append(f"--workingdir={workdir}")
        try:
            # buildah itself finds programs of the image only, and not those that are mounted. `env` finds both.
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
    """A buildah that keeps its images in `directory`, which is removed at the end."""
    had_cache = BLOB_CACHE.exists()
    (directory / "tmp").mkdir(parents=True)
    # Otherwise buildah makes a directory of networks in /etc.
    (directory / "containers.conf").write_text(f'[network]\nnetwork_config_dir = "{directory}/networks"\n')
    try:
        yield Buildah(directory, mounts)
    finally:
        shutil.rmtree(directory)
        if not had_cache:
            shutil.rmtree(BLOB_CACHE, ignore_errors=True)
