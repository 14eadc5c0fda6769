"""Checks a machine or a cluster before a run needs it: `python recipes/doctor.py`.

    python recipes/doctor.py                                        # this machine, in under two minutes
    python recipes/doctor.py platform=cuda work_dir=/scratch/doctor
    python recipes/doctor.py recipe=srl-llama2-70b-8n8g-tp8pp4 launcher=slurm cluster=dgx-h100 cluster.account=NAME

On a machine, it shows the versions, the platform of the trainer, GPUs, memory and disk. Then it trains a tiny model
with SFT and DPO, generates with it, and compares the losses and the text with stored ones.

With settings of conf/ (as `recipes/iterate.py` takes them), it examines a cluster. It runs small jobs on one or two
nodes through the recipe's own launcher, in the containers of the trainer and of the engine. For each check it says what
was tried, what was found and what to set. A bad check does not end the others. `work_dir` must then be on storage that
all nodes share (default: runs/doctor). It gets report.md and report.json, which you can attach to an issue.

Exit status 2 means that something is wrong.
"""

from __future__ import annotations

import platform
import shutil
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from hydra import compose, initialize_config_dir

from nemo_srl import cli, worker
from nemo_srl.config import Config, load
from nemo_srl.doctor import cluster, machine, report
from nemo_srl.doctor.findings import Finding
from nemo_srl.doctor.site import Site
from nemo_srl.errors import ConfigError
from nemo_srl.trainers.nemo_aligner.settings import NemoAlignerSettings
from nemo_srl.workload import assumptions

ROOT = Path(__file__).resolve().parent.parent
OWN = ("platform", "work_dir")


@dataclass
class Options:
    platform: str = "auto"
    """trainer.platform: auto, cpu, cuda or ngc. For this machine only: on a cluster, the recipe has it."""
    work_dir: str = ""
    """A directory that keeps the files and logs. On one machine, they are removed at the end without it."""


def new_directory(work_dir: str | None) -> Path:
    """A new directory below `work_dir`, or in the system's place for temporary files."""
    try:
        if work_dir:
            Path(work_dir).mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix="doctor-", dir=work_dir or None)).absolute()
    except OSError as e:
        raise ConfigError(f"work_dir={work_dir}: {e}. Give a directory that you can write to.") from e


def conclude(wrong: Iterable[str], good: str) -> None:
    if names := ", ".join(dict.fromkeys(wrong)):
        cli.fail(f"{names}: see above for what is wrong and what helps.")
    print(good)


def examine_machine(options: Options) -> None:
    print(f"ok       python      {platform.python_version()} on {platform.platform()}", flush=True)
    settings = NemoAlignerSettings(precision="32", platform=options.platform)
    directory = new_directory(options.work_dir)
    findings = []
    for x in machine.examine(settings, directory):
        findings.append(x)
        print(f"{x.state:8} {x.name:11} {x.text}", flush=True)
    if not options.work_dir:
        shutil.rmtree(directory)
    conclude((x.name for x in findings if not x.ok), "This machine trains correctly.")


def examine_cluster(overrides: list[str], work_dir: str) -> None:
    """Examine the cluster that the settings in `overrides` describe."""
    cli.register_schemas(overrides, schema=Config)
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        cfg = load(compose("iterate", ["run_dir=runs/doctor", *overrides]), Config)
    worker.set_up(cfg)
    site = Site(cfg, assumptions(cfg.assume), new_directory(work_dir or "runs/doctor"))
    site.directory.chmod(0o755)  # a container may run as another user
    cluster.check_launcher(site)
    findings: list[Finding] = []
    for x in cluster.examine(site):
        findings.append(x)
        print(report.line(x), flush=True)
        path = report.write(site, overrides, findings)
    print(f"\nThe report is in {path} and {path.with_suffix('.json')}. The logs of the jobs are in {path.parent}/logs.")
    conclude((x.name for x in findings if not x.ok), "This cluster works for this recipe.")


def main(arguments: list[str]) -> None:
    own = [x for x in arguments if x.partition("=")[0] in OWN]
    overrides = [x for x in arguments if x not in own]
    is_hydra = all("=" in x and not x.startswith("-") for x in overrides)
    options = cli.read_options(Options, own if is_hydra else arguments)
    if not overrides:
        return examine_machine(options)
    if options.platform != "auto":
        raise ConfigError(f"platform={options.platform}: on a cluster, give trainer.platform={options.platform}")
    examine_cluster(overrides, options.work_dir)


if __name__ == "__main__":
    cli.log_to_stderr()
    with cli.one_line_errors():
        main(sys.argv[1:])
