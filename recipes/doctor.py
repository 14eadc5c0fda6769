"""Checks this machine in under two minutes, before a run needs it: `python recipes/doctor.py`.

    python recipes/doctor.py platform=cuda work_dir=/scratch/doctor

It shows the versions, the platform of the trainer, GPUs, memory and disk. Then it trains a tiny model with SFT and DPO,
generates with it, and compares the losses and the text with stored ones. Exit status 2 means that something is wrong.
"""

from __future__ import annotations

import platform
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from nemo_srl import cli, doctor
from nemo_srl.errors import ConfigError
from nemo_srl.trainers.nemo_aligner.settings import NemoAlignerSettings


@dataclass
class Options:
    platform: str = "auto"
    """trainer.platform: auto, cpu, cuda or ngc."""
    work_dir: str = ""
    """A directory that keeps the files and logs of the trainings. Without it they are removed at the end."""


def main(options: Options) -> None:
    print(f"ok       python      {platform.python_version()} on {platform.platform()}", flush=True)
    settings = NemoAlignerSettings(precision="32", platform=options.platform)
    try:
        if options.work_dir:
            Path(options.work_dir).mkdir(parents=True, exist_ok=True)
        directory = Path(tempfile.mkdtemp(prefix="doctor-", dir=options.work_dir or None))
    except OSError as e:
        raise ConfigError(f"work_dir={options.work_dir}: {e}. Give a directory that you can write to.") from e
    findings = []
    for x in doctor.examine(settings, directory):
        findings.append(x)
        print(f"{'ok' if x.ok else 'WRONG':8} {x.name:11} {x.text}", flush=True)
    if not options.work_dir:
        shutil.rmtree(directory)
    wrong = [x.name for x in findings if not x.ok]
    if wrong:
        cli.fail(f"{', '.join(wrong)}: see above for what is wrong and what helps.")
    print("This machine trains correctly.")


if __name__ == "__main__":
    cli.run_program(Options, main)
