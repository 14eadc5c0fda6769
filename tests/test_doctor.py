"""The doctor: what it says on a machine that works, and on one that does not."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nemo_srl.doctor.machine import examine
from nemo_srl.doctor.tiny import EXPECTED, compare
from nemo_srl.errors import NemoSrlError
from nemo_srl.trainers.nemo_aligner.settings import NemoAlignerSettings

ROOT = Path(__file__).resolve().parent.parent


def test_this_machine_trains_correctly(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "recipes/doctor.py"), f"work_dir={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[:2] for line in lines[:-1]] == [
        ["ok", name] for name in ("python", "platform", "gpus", "memory", "disk", "sft", "dpo", "generation")
    ]
    assert "megatron-core 0.11.0" in lines[1]
    assert lines[-1] == "This machine trains correctly."


def test_a_platform_that_is_not_there_is_found_and_nothing_is_said_to_work(tmp_path: Path) -> None:
    missing = "ngc" if torch.cuda.is_available() else "cuda"
    findings = {x.name: x for x in examine(NemoAlignerSettings(platform=missing), tmp_path)}
    assert [name for name, x in findings.items() if not x.ok] == ["platform", "sft", "dpo", "generation"]
    assert f"trainer.platform='{missing}'" in findings["platform"].text
    assert f"trainer.platform='{missing}'" in findings["sft"].text, "the end of the training's log"
    assert "the SFT failed" in findings["generation"].text


RIGHT = EXPECTED["dpo"]


@pytest.mark.parametrize("losses", [(), RIGHT[:2], (math.nan, *RIGHT[1:]), (*RIGHT[:3], RIGHT[3] + 2e-4)])
def test_wrong_losses_are_shown_beside_the_right_ones(losses: tuple[float, ...]) -> None:
    with pytest.raises(NemoSrlError, match=r"the right ones are 0\.693147.*requirements\.lock.*platform=cpu"):
        compare(losses, RIGHT)


def test_a_difference_that_rounding_explains_is_right_and_later_steps_are_free() -> None:
    close = [x + 5e-5 for x in RIGHT]
    assert "at most 5e-05" in compare([*close, 0.1, 0.2], RIGHT)


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    command = [sys.executable, str(ROOT / "recipes/doctor.py"), f"work_dir={tmp_path}/file/below"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: work_dir={tmp_path}/file/below: ")
