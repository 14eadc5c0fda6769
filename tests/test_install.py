"""The installation's own decisions, with pip and uv as they are and a package index of a few empty wheels."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.support import ROOT
from tools import install, lock_check


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels that is all that pip and uv can find."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    for program in ("PIP", "UV"):
        monkeypatch.setenv(f"{program}_NO_INDEX", "1")
        monkeypatch.setenv(f"{program}_FIND_LINKS", str(folder))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return folder


def add_wheel(folder: Path, name: str, version: str, tag: str = "py3-none-any") -> None:
    with zipfile.ZipFile(folder / f"{name}-{version}-{tag}.whl", "w") as wheel:
        info = f"{name}-{version}.dist-info"
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n")
        wheel.writestr(f"{info}/RECORD", "")


def put_nvidia_smi(tmp_path: Path, command: str) -> None:
    """A program of this name, before all others, that runs `command`."""
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\n{command}\n")
    program.chmod(0o755)


def show_a_gpu(tmp_path: Path) -> None:
    put_nvidia_smi(tmp_path, "echo 'GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-0)'")


def show_no_gpu(tmp_path: Path) -> None:
    """Even if this machine has one."""
    put_nvidia_smi(tmp_path, "echo 'No devices were found'; exit 6")


def chosen_file(requirement: str) -> str:
    """The version that pip takes for what was chosen."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--no-deps", requirement]
    return subprocess.run(command, text=True, capture_output=True, check=True).stdout.strip().rpartition("torch-")[2]


def test_the_lock_has_one_exact_pin_of_a_package_for_every_python() -> None:
    lines = [line for line in install.LOCK.read_text().splitlines() if line and not line.startswith("#")]
    pins = [Requirement(line) for line in lines]
    assert all(str(pin.specifier).startswith("==") and "*" not in str(pin.specifier) for pin in pins)
    for python in lock_check.PYTHONS:
        names = [pin.name for pin in pins if not pin.marker or pin.marker.evaluate({"python_version": python})]
        assert len(names) == len(set(names)) > 100
    assert {*lock_check.SOURCE_ONLY, *lock_check.BUILD_TOOLS, *install.BUILD_TOOLS} <= {pin.name for pin in pins}


@pytest.mark.parametrize(
    ("has_gpu", "arguments", "recipe"),
    [
        (False, [], "recipes/iterate.py"),
        (True, [], "recipes/iterate.py recipe=srl-smollm2-135m-checked-large"),
        (True, ["TORCH=cpu"], "recipes/iterate.py"),
        (True, ["ARGS=seed=2 recipe=srl-smollm2-135m-cpu"], "recipes/iterate.py seed=2 recipe=srl-smollm2-135m-cpu"),
    ],
)
def test_make_iterate_takes_more_judging_examples_with_a_gpu(
    tmp_path: Path, has_gpu: bool, arguments: list[str], recipe: str
) -> None:
    (show_a_gpu if has_gpu else show_no_gpu)(tmp_path)
    path = f"{tmp_path / 'bin'}:/usr/bin:/bin"
    command = ["make", "--dry-run", "iterate", f"VENV={tmp_path}", *arguments]
    shown = subprocess.run(command, cwd=ROOT, env={"PATH": path}, text=True, capture_output=True, check=True).stdout
    assert " ".join(shown.splitlines()[-1].split()) == f"{tmp_path}/bin/python {recipe}"


def test_a_pin_without_a_wheel_is_named_for_the_pythons_that_lack_it(index: Path) -> None:
    add_wheel(index, "pure", "1.0")
    add_wheel(index, "compiled", "1.0", "cp312-cp312-manylinux_2_17_x86_64")
    add_wheel(index, "compiled", "2.0", "cp313-cp313-manylinux_2_28_x86_64")
    lock = "# A comment\npure==1.0\njieba==0.42.1\ncompiled==1.0\n"
    assert lock_check.look_for_wheels(lock, "3.12") == ""
    assert "compiled==1.0 has no wheels" in lock_check.look_for_wheels(lock, "3.13")
    by_python = 'compiled==1.0 ; python_version < "3.13"\ncompiled==2.0 ; python_version >= "3.13"\n'
    assert lock_check.look_for_wheels(by_python, "3.12") == ""
    assert lock_check.look_for_wheels(by_python, "3.13") == ""


def test_a_wheel_for_a_newer_glibc_does_not_count(index: Path) -> None:
    add_wheel(index, "compiled", "1.0", "cp312-cp312-manylinux_2_39_x86_64")
    assert "compiled==1.0 has no wheels" in lock_check.look_for_wheels("compiled==1.0\n", "3.12")


def test_a_machine_without_a_gpu_gets_the_cpu_build(index: Path) -> None:
    add_wheel(index, "torch", "2.13.0")
    add_wheel(index, "torch", "2.13.0+cpu")
    requirement, description = install.choose_torch("auto", "2.13.0")
    assert chosen_file(requirement) == "2.13.0+cpu"
    assert "no NVIDIA GPU" in description
    assert "0.2 GB" in description


def test_where_there_is_no_cpu_build_the_size_and_the_remedy_are_said(index: Path) -> None:
    add_wheel(index, "torch", "2.13.0")
    requirement, description = install.choose_torch("auto", "2.13.0")
    assert chosen_file(requirement) == "2.13.0"
    assert "2.7 GB" in description
    assert "PIP_EXTRA_INDEX_URL" in description


def test_a_machine_with_a_gpu_gets_the_cuda_build(index: Path, tmp_path: Path) -> None:
    show_a_gpu(tmp_path)
    add_wheel(index, "torch", "2.13.0")
    add_wheel(index, "torch", "2.13.0+cpu")
    requirement, description = install.choose_torch("auto", "2.13.0")
    assert chosen_file(requirement) == "2.13.0"
    assert "an NVIDIA GPU" in description
    assert chosen_file(install.choose_torch("cpu", "2.13.0")[0]) == "2.13.0+cpu"


@pytest.mark.parametrize(
    ("installed", "build", "fits"),
    [
        ("2.13.0+cpu", "auto", True),
        ("2.13.0", "auto", True),
        ("2.13.0", "cuda", True),
        ("2.13.0+cpu", "cuda", False),
        ("2.12.0+cpu", "auto", False),
    ],
)
def test_torch_is_installed_again_only_if_it_does_not_fit(
    installed: str, build: str, fits: bool, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(install, "version", lambda package: installed)
    assert install.is_installed(build, "2.13.0") == fits


def test_temporary_files_go_where_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usual = Path(tempfile.gettempdir())
    free = {usual: 500_000_000, tmp_path: 90_000_000_000}
    monkeypatch.setattr(install, "ROOT", tmp_path)
    monkeypatch.setattr(install, "free_bytes", free.__getitem__)
    monkeypatch.setenv("TMPDIR", "")  # so that it is as before after the test
    monkeypatch.delenv("TMPDIR")
    install.choose_temporary_directory()
    assert os.environ["TMPDIR"] == str(tmp_path / "build" / "tmp")
    assert (tmp_path / "build" / "tmp").is_dir()
    assert f"{usual} has only 0.5 GB free" in capsys.readouterr().out


@pytest.mark.parametrize("free", [(500_000_000, 400_000_000), (9_000_000_000, 90_000_000_000)])
def test_temporary_files_stay_where_they_are_if_that_is_no_worse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: tuple[int, int]
) -> None:
    monkeypatch.setattr(install, "ROOT", tmp_path)
    monkeypatch.setattr(
        install, "free_bytes", dict(zip((Path(tempfile.gettempdir()), tmp_path), free, strict=True)).__getitem__
    )
    monkeypatch.setenv("TMPDIR", "")  # so that it is as before after the test
    monkeypatch.delenv("TMPDIR")
    install.choose_temporary_directory()
    assert "TMPDIR" not in os.environ


def test_an_installation_that_fails_tells_the_space_on_the_disks(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise subprocess.CalledProcessError(1, ["pip", "install", "torch"])

    monkeypatch.setattr(install, "install_torch", full)
    monkeypatch.setattr(sys, "argv", ["install", "cpu"])
    monkeypatch.setenv("TMPDIR", tempfile.gettempdir())
    with pytest.raises(SystemExit, match=r"(?s)pip install torch.*GB free for the environment.*\(TMPDIR\)"):
        install.main()
