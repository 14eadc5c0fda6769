"""Installs requirements.lock and this project into the environment of the Python that runs this. `make` calls it.

The argument says which build of torch is wanted: "cuda", "cpu", or "auto" for what suits this machine. First pip
installs torch with the packages that this build needs. Then uv installs the rest of the lock file as it is.

Why two programs (measured 2026-11-26 on two busy cores, empty caches, Python 3.11): pip took 227 to 258 s for the rest,
uv 16 s, and both installed the same set. But uv reads no settings of pip. Where pip is set up to find a CPU build of
torch, or one on the disk, uv would download the CUDA build. And where uv fails, pip installs the rest too.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements.lock"
PIP = [sys.executable, "-m", "pip"]
LOCKED = ["install", "--no-deps", "--no-build-isolation", "--requirement", str(LOCK)]
"""Without isolation, packages are built with the pinned build tools instead of the newest ones."""
BUILD_TOOLS = ("setuptools", "pybind11", "uv")
TEMPORARY_BYTES = 8_000_000_000
"""pip unpacks the CUDA build and its libraries here before it moves them: 2.7 GB packed, 4.8 GB unpacked."""


def has_nvidia_gpu() -> bool:
    """Whether NVIDIA's driver shows a GPU."""
    if not shutil.which("nvidia-smi"):
        return False
    return "GPU " in subprocess.run(["nvidia-smi", "-L"], text=True, capture_output=True).stdout


def choose_torch(build: str, number: str) -> tuple[str, str]:
    """What pip is asked for to get torch at version `number`, and what to tell the user about it."""
    reason = f"{build} was asked for"
    if build == "auto":
        build = "cuda" if has_nvidia_gpu() else "cpu"
        reason = f"this machine has {'an' if build == 'cuda' else 'no'} NVIDIA GPU"
    if build == "cuda":
        return f"torch=={number},!={number}+cpu", f"the CUDA build ({reason}): about 2.7 GB to download, 4.8 GB on disk"
    cpu_build = f"torch=={number}+cpu"
    looked = subprocess.run(
        [*PIP, "install", "--dry-run", "--ignore-installed", "--no-deps", cpu_build], text=True, capture_output=True
    )
    if looked.returncode == 0:
        return cpu_build, f"the CPU build ({reason}): about 0.2 GB to download, 0.8 GB on disk"
    return f"torch=={number}", (
        f"the build that the package index has for this Python. {reason[0].upper()}{reason[1:]}, but pip found no CPU "
        "build.\n  On PyPI it is a CUDA build: about 2.7 GB to download, 4.8 GB on disk. To avoid that, stop this and\n"
        "  point pip at PyTorch's CPU wheels (PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS)."
    )


def is_installed(build: str, number: str) -> bool:
    """Whether the torch that is there will do: it has this version, and is no CPU build where CUDA is wanted."""
    try:
        installed, _, local = version("torch").partition("+")
    except PackageNotFoundError:
        return False
    wants_cuda = build == "cuda" or (build == "auto" and has_nvidia_gpu())
    return installed == number and not (wants_cuda and local == "cpu")


def pin(lock: str, name: str) -> str:
    """The one line of a lock file's text that pins a package: `name==version`, and its marker if it has one.

    Raises `ValueError` if there is not exactly one.
    """
    (line,) = re.findall(rf"^{re.escape(name)}==.*", lock, re.MULTILINE)
    return str(line)


def install_torch(build: str, lock: str) -> None:
    """Install torch with its dependencies, and the tools that the rest is installed with."""
    number = pin(lock, "torch").partition("==")[2]
    pins = [pin(lock, name) for name in BUILD_TOOLS]
    if is_installed(build, number):
        print(f"torch {version('torch')} is installed already.", flush=True)
    else:
        wanted, description = choose_torch(build, number)
        print(f"Installing torch {number}: {description}", flush=True)
        pins.append(wanted)
    subprocess.run([*PIP, "install", "--quiet", "--constraint", str(LOCK), *pins], check=True)


def uv_environment() -> dict[str, str]:
    """The environment in which uv trusts the certificates that pip trusts, and uses pip's mirror if pip has one."""
    environment = {"UV_SYSTEM_CERTS": "1", **os.environ}
    settings = subprocess.run([*PIP, "config", "list"], text=True, capture_output=True).stdout
    if index := re.search(r"\.index-url='(.+)'", settings):
        environment.setdefault("UV_DEFAULT_INDEX", index[1])
    return environment


def install_rest() -> None:
    """Install every pin of the lock file, without looking at what the packages themselves ask for."""
    print("Installing the rest of requirements.lock: about 0.4 GB to download, 1.5 GB on disk", flush=True)
    # megatron-core's build runs the `python3` of PATH and expects pybind11 there.
    environment = {**uv_environment(), "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    uv = [sys.executable, "-m", "uv", "pip", *LOCKED, "--quiet", "--python", sys.executable]
    if subprocess.run(uv, env=environment).returncode:
        print("uv failed, for the reason above. Trying again with pip, which takes minutes.", flush=True)
        subprocess.run([*PIP, *LOCKED, "--quiet"], check=True, env=environment)
    subprocess.run([*PIP, "install", "--quiet", "--no-deps", "--no-build-isolation", "--editable", ROOT], check=True)


def free_bytes(directory: Path) -> int:
    """The bytes that this user may still write where `directory` lies."""
    return shutil.disk_usage(directory).free


def choose_temporary_directory() -> None:
    """Let pip and uv unpack on the disk of this checkout if the usual place for temporary files has less space there.

    Many clusters have a small /tmp, often in memory. pip needs room there for the whole of torch.
    """
    usual = Path(tempfile.gettempdir())
    if "TMPDIR" in os.environ or free_bytes(usual) >= min(TEMPORARY_BYTES, free_bytes(ROOT)):
        return
    roomy = ROOT / "build" / "tmp"
    roomy.mkdir(parents=True, exist_ok=True)
    os.environ["TMPDIR"] = str(roomy)
    print(f"{usual} has only {free_bytes(usual) / 1e9:.1f} GB free, so temporary files go to {roomy}", flush=True)


def free_space() -> str:
    """What to tell the user about the disks that an installation writes to."""
    # Python looks for a directory by writing a file to it, which fails where the disk is full.
    temporary = Path(os.environ.get("TMPDIR") or tempfile.gettempdir())
    places = {"the environment": Path(sys.prefix), "temporary files (TMPDIR)": temporary, "caches": Path.home()}
    return "\n".join(
        f"  {free_bytes(place) / 1e9:6.1f} GB free for {name}: {place}"
        for name, place in places.items()
        if place.exists()
    )


def main() -> None:
    (build,) = sys.argv[1:]
    if build not in ("auto", "cpu", "cuda"):
        sys.exit(f"error: TORCH={build}: it must be auto, cpu or cuda.")
    lock = LOCK.read_text()
    choose_temporary_directory()
    try:
        install_torch(build, lock)
        install_rest()
    except subprocess.CalledProcessError as e:
        sys.exit(
            f"error: this failed, for the reason above: {' '.join(map(str, e.cmd))}\n"
            f"If it was the space on a disk, make room there, or set TMPDIR or VENV to another disk:\n{free_space()}"
        )


if __name__ == "__main__":
    main()
