"""Checks that the installed packages are those that the trainer was written for.

`python -m nemo_srl.trainers.nemo_aligner.versions [PLATFORM]` prints the result. Only package metadata is read and
nothing is imported. So a wrong container is reported within a second, and not by an AttributeError minutes later. Patch
releases are accepted, and so are NVIDIA's suffixes (`2.2.0rc3`).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

from nemo_srl.errors import ConfigError

STACK = {"nemo-toolkit": "2.2", "nemo-aligner": "0.7", "megatron-core": "0.11"}
"""Packages and the first two numbers of their versions: NGC's nemo:25.02, and requirements.lock."""
MIN_TORCH = (2, 4)
OF_NGC = ("transformer-engine", "apex")
"""What the platform `ngc` needs beside these. NGC's images have them, in versions of their own numbering."""


def check_versions(platform: str = "", *, installed: Callable[[str], str] = version) -> dict[str, str]:
    """The installed versions of torch and `STACK`, and with the platform `ngc` also of `OF_NGC`.

    Raises `ConfigError` if a package is missing or has another version.
    """
    found: dict[str, str] = {}
    problems = []
    wanted = {"torch": "", **STACK, **(dict.fromkeys(OF_NGC, "") if platform == "ngc" else {})}
    for package, begin in wanted.items():
        shown = f"{package} {begin}.x" if begin else package
        try:
            found[package] = installed(package)
        except PackageNotFoundError:
            problems.append(f"  {shown}: not installed")
            continue
        numbers = re.match(r"(\d+)\.(\d+)", found[package])
        if begin and (numbers is None or numbers[0] != begin):
            problems.append(f"  {shown}: found {found[package]}")
        if package == "torch" and (numbers is None or (int(numbers[1]), int(numbers[2])) < MIN_TORCH):
            problems.append(f"  torch {MIN_TORCH[0]}.{MIN_TORCH[1]} or newer: found {found[package]}")
    if problems:
        raise ConfigError(
            "trainer.name='nemo_aligner': this environment is not the one that the trainer needs:\n"
            + "\n".join(problems)
            + "\nUse the image of containers/nemo.Dockerfile, or `make install` on a machine without GPUs."
        )
    return found


if __name__ == "__main__":
    try:
        print("  ".join(f"{package} {number}" for package, number in check_versions(*sys.argv[1:2]).items()))
    except ConfigError as e:
        sys.exit(f"error: {e}")
