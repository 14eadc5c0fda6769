"""Checks that the installed packages are those that the trainer was written for.

`python -m nemo_srl.trainers.nemo_aligner.versions` prints the result. Only package metadata is read and nothing is
imported. So a wrong container is reported within a second, and not by an AttributeError minutes later. Patch releases
are accepted, and so are NVIDIA's suffixes (`2.2.0rc3`).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

from nemo_srl.errors import ConfigError

STACK = {"nemo-toolkit": "2.2", "nemo-aligner": "0.7", "megatron-core": "0.11"}
"""Packages and the first two numbers of their versions: NGC's nemo:25.02, and requirements.lock."""


def check_versions(*, installed: Callable[[str], str] = version) -> dict[str, str]:
    """The installed versions of `STACK`. Raises `ConfigError` if a package is missing or has another version."""
    found: dict[str, str] = {}
    problems = []
    for package, wanted in STACK.items():
        try:
            found[package] = installed(package)
        except PackageNotFoundError:
            problems.append(f"  {package} {wanted}.x: not installed")
            continue
        numbers = re.match(r"\d+\.\d+", found[package])
        if numbers is None or numbers[0] != wanted:
            problems.append(f"  {package} {wanted}.x: found {found[package]}")
    if problems:
        raise ConfigError(
            "trainer.name='nemo_aligner': this environment is not the one that the trainer needs:\n"
            + "\n".join(problems)
            + "\nUse the image of containers/nemo.Dockerfile, or `make install` on a machine without GPUs."
        )
    return found


if __name__ == "__main__":
    try:
        print("  ".join(f"{package} {number}" for package, number in check_versions().items()))
    except ConfigError as e:
        sys.exit(f"error: {e}")
