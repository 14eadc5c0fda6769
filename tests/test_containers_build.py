"""The images of containers/. buildah builds them from the Dockerfiles as they are, and they are used as on clusters.

These are real: every instruction of the Dockerfiles, pip's installation of the packages that they name (from wheels of
this machine's package index), the check of versions, the project's code, and its imports of the whole NeMo stack.

These are stand-ins: the bases, which have NVIDIA's names and this environment's packages (see `ngc_base.py`),
`tensorrt_llm` and `trtllm-serve`, which know the recorded contract only, and pyxis, by buildah's mounts.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nemo_srl import worker
from nemo_srl.artifacts import Table
from nemo_srl.config import ClusterConfig, Config, JudgeConfig, ModelConfig, ResourcesConfig
from nemo_srl.engines import trtllm
from nemo_srl.engines.trtllm.settings import TrtllmSettings
from nemo_srl.launchers.slurm.steps import canary_file, services_file, step_command, step_environment
from nemo_srl.launchers.with_services import to_spec
from nemo_srl.protocols import SERVICES_VARIABLE, Job, JobRole, JobStep
from nemo_srl.records import Candidate, Judgement, PreferencePair
from nemo_srl.stages import pairs
from tests import buildah, ngc_base, tiny
from tests.buildah import Buildah, Done
from tests.run_directory import RUBRIC
from tests.tables import published
from tests.trtllm_contract import contract

PROJECT = Path(__file__).resolve().parent.parent
CONTAINERS = PROJECT / "containers"
IMAGES = ("nemo", "trtllm")
ROLES: dict[str, JobRole] = {"nemo": "trainer", "trtllm": "engine"}
REQUIREMENTS = {"nemo": CONTAINERS / "trainer.requirements.txt", "trtllm": CONTAINERS / "engine.requirements.txt"}
ROOTS = {
    # Megatron-Core's checkpointing imports psutil, and none of these packages declares it.
    "nemo": ("nemo-toolkit[nlp]", "nemo-aligner", "megatron-core", "torch", "psutil", "pip"),
    # Packages that the project imports, and that tensorrt-llm's requirements.txt names or brings: openai declares
    # httpx, and nvidia-modelopt declares scipy.
    "trtllm": (
        *("torch", "transformers", "datasets", "numpy", "pandas", "httpx", "scipy", "psutil", "pydantic"),
        *("setuptools", "pip"),
    ),
}
"""The distributions of each base. It also has all that these declare."""
NEMO = {"lightning", "megatron", "nemo", "nemo_aligner", "pytorch_lightning"}
OPTIONAL = {"langdetect", "lm_eval", "nltk", "wandb"}
"""Packages that only the project's optional dependencies name."""

IMPORT_ALL = """
import importlib, json, pkgutil, sys
import nemo_srl
failed = {}
for module in pkgutil.walk_packages(nemo_srl.__path__, "nemo_srl.", onerror=lambda name: None):
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError as e:
        failed[module.name] = e.name
print(json.dumps([nemo_srl.__file__, failed]))
"""
FIND_ALL = """
import ast, importlib.util, json, pathlib, sys
named = set()
for path in [*pathlib.Path("nemo_srl").rglob("*.py"), *pathlib.Path("recipes").glob("*.py")]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            named |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            named.add(node.module.split(".")[0])
print(json.dumps(sorted(n for n in named if n not in sys.stdlib_module_names and not importlib.util.find_spec(n))))
"""
VERSIONS = """
import importlib.metadata, json, re
print(json.dumps({re.sub("[-_.]+", "-", d.name).lower(): d.version for d in importlib.metadata.distributions()}))
"""


def base_name(image: str) -> str:
    found = re.search(r"^FROM (\S+)$", (CONTAINERS / f"{image}.Dockerfile").read_text(), re.MULTILINE)
    assert found is not None
    return found[1]


def pins(image: str) -> dict[str, str]:
    return dict(re.findall(r"^([\w.-]+)==(\S+)", REQUIREMENTS[image].read_text(), re.MULTILINE))


def build_base(builder: Buildah, directory: Path, image: str, versions: dict[str, str]) -> None:
    """Build a base under the name that the Dockerfile has. Its constraints would refuse what is to be installed."""
    stubs = PROJECT / "tests" / "stubs"
    trtllm = f'__version__ = "{contract()["version"]}"\nclass LLM: ...\nclass SamplingParams: ...\n'
    dockerfile = ngc_base.write(
        directory,
        ngc_base.declared(ROOTS[image]) - pins(image).keys(),
        versions=versions,
        modules={"of_the_base": ""} | ({"tensorrt_llm": trtllm} if image == "trtllm" else {}),
        programs={
            "trtllm-serve": f'exec python "{stubs}/trtllm-serve" "$@"',
            "mpirun": f'exec bash "{stubs}/mpirun" "$@"',
        }
        if image == "trtllm"
        else {},
        constraints="".join(f"{name}<0.1\n" for name in pins(image)),
    )
    done = builder.build(base_name(image), dockerfile=dockerfile, context=directory)
    assert done.returncode == 0, done.stderr


def build(builder: Buildah, image: str) -> Done:
    return builder.build(f"nemo-srl-{image}", dockerfile=CONTAINERS / f"{image}.Dockerfile", context=PROJECT)


def printed(done: Done) -> Any:
    """The last line, as JSON."""
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="nemo-srl-images-") as directory:
        yield Path(directory)


@pytest.fixture(scope="module")
def builder(scratch: Path) -> Iterator[Buildah]:
    if reason := buildah.why_not():
        pytest.skip(reason)
    for requirements in REQUIREMENTS.values():
        ngc_base.fetch_wheels(scratch / "wheels", requirements)
    mounts = {**ngc_base.mounts(scratch / "wheels"), PROJECT: str(PROJECT)}
    with buildah.storage(scratch / "buildah", mounts) as made:
        yield made
    assert str(scratch) not in Path("/proc/self/mountinfo").read_text()


@pytest.fixture(scope="module")
def images(builder: Buildah, scratch: Path) -> dict[str, Done]:
    """Builds both images, and returns the ended builds. In "other", the base had another NeMo-Aligner and no Apex."""
    of_ngc = {"nemo": {"transformer-engine": "2.0.0", "apex": "0.1"}, "trtllm": {}}
    other = {"nemo-aligner": "0.6.0", "transformer-engine": "2.0.0"}
    build_base(builder, scratch / "base-other", "nemo", versions=other)
    done = {"other": build(builder, "nemo")}
    for image in IMAGES:
        build_base(builder, scratch / f"base-{image}", image, versions=of_ngc[image])
        done[image] = build(builder, image)
        assert done[image].returncode == 0, done[image].stdout + done[image].stderr
    return done


def run(builder: Buildah, image: str, *command: str, **options: Any) -> Done:
    return builder.run(f"nemo-srl-{image}", *command, **options)


def test_the_build_probes_its_base(images: dict[str, Done]) -> None:
    stack = "nemo-toolkit 2.2.1  nemo-aligner 0.7.0  megatron-core 0.11.0  transformer-engine 2.0.0  apex 0.1"
    assert stack in images["nemo"].stdout
    assert f"/{ngc_base.VENV}/bin/trtllm-serve" in images["trtllm"].stdout


def test_a_base_with_another_stack_stops_the_build(images: dict[str, Done]) -> None:
    done = images["other"]
    assert done.returncode != 0
    assert "nemo-aligner 0.7.x: found 0.6.0" in done.stderr
    assert "apex: not installed" in done.stderr
    assert "megatron-core 0.11.x" not in done.stderr
    assert "COMMIT" not in done.stdout


@pytest.mark.parametrize("image", IMAGES)
def test_of_the_base_nothing_is_lost_or_changed(builder: Buildah, images: dict[str, Done], image: str) -> None:
    """pip adds the packages of the requirements file, and changes no other."""
    before = printed(builder.run(base_name(image), "python", "-c", VERSIONS))
    assert not before.keys() & pins(image).keys()
    assert printed(run(builder, image, "python", "-c", VERSIONS)) == {**before, **pins(image)}
    assert run(builder, image, "python", "-c", "import of_the_base").returncode == 0


@pytest.mark.parametrize("image", IMAGES)
def test_every_module_of_the_role_imports(builder: Buildah, images: dict[str, Done], image: str) -> None:
    """The trainer's image imports all of them. The engine's imports all but those that run inside of NeMo-Aligner."""
    where, failed = printed(run(builder, image, "python", "-W", "ignore", "-c", IMPORT_ALL))
    assert where == "/opt/nemo_srl/nemo_srl/__init__.py"
    if image == "nemo":
        assert failed == {}
    else:
        trainer = "nemo_srl.trainers.nemo_aligner"
        assert {name.rpartition(".")[0] for name in failed} == {trainer, f"{trainer}.platforms"}
        assert {module.split(".")[0] for module in failed.values()} <= NEMO


@pytest.mark.parametrize("image", IMAGES)
def test_every_package_that_the_role_names_is_there(builder: Buildah, images: dict[str, Done], image: str) -> None:
    """This includes packages that are imported within functions."""
    absent = set(printed(run(builder, image, "python", "-c", FIND_ALL)))
    # The orchestrator tracks a run, and it never runs in the engine's image.
    assert absent - OPTIONAL <= {"nemo": set(), "trtllm": NEMO | {"tensorboard"}}[image]


def as_srun_starts(builder: Buildah, image: str, job: Job) -> Done:
    """Run the first step of a job with the launcher's command and environment, from the mounted checkout."""
    cluster = ClusterConfig(**{job.role: ResourcesConfig(container="its image")})
    env = {**step_environment(cluster, job, token="token"), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "20000"}
    canary_file(job).write_text("token")
    services_file(job).write_text(json.dumps(to_spec(job)))
    step = step_command(job.steps[0], job, rank_idiom="srun", cluster=cluster, env=env)
    assert f"--container-workdir={PROJECT}" in step.srun
    variables = [f"{key}={value}" for key, value in env.items()]
    return run(builder, image, *variables, *step.command, workdir=PROJECT, writable=[job.log_dir])


@pytest.mark.parametrize("image", IMAGES)
def test_a_step_runs_from_the_mounted_checkout(
    builder: Buildah, images: dict[str, Done], image: str, tmp_path: Path
) -> None:
    where = run(builder, image, "python", "-c", "import nemo_srl; print(nemo_srl.__file__)", workdir=PROJECT)
    assert Path(where.stdout.strip()).is_relative_to(PROJECT)
    stage_dir = describe_pairs(tmp_path)
    step = JobStep(name="run", command=["-m", "nemo_srl.worker", str(stage_dir), "run"])
    done = as_srun_starts(builder, image, Job(name="job", steps=[step], log_dir=tmp_path, role=ROLES[image]))
    assert done.returncode == 0, done.stderr
    output = Table(stage_dir, {}, PreferencePair)
    assert output.is_published()
    assert [(p.chosen, p.rejected) for p in output.read()] == [("right", "wrong")]


def describe_pairs(directory: Path) -> Path:
    """A `pairs` stage, ready to run, and its inputs."""
    texts = {"right": 5.0, "wrong": 0.0}
    rows = [
        Candidate(prompt_id="p", sample_index=i, prompt="Q", response=text, num_tokens=1, finish_reason="stop")
        for i, text in enumerate(texts)
    ]
    verdicts = [Judgement(candidate_key=c.key, judgement_index=0, verdict="v", score=texts[c.response]) for c in rows]
    inputs = {
        "candidates": published(directory, "candidates", Candidate, rows),
        "judgements": published(directory, "judgements", Judgement, verdicts),
    }
    output = Table(directory / "pairs", {}, PreferencePair)
    output.path.mkdir()
    cfg = Config(run_dir=str(directory), model=ModelConfig(path="none"), judge=JudgeConfig(rubric=RUBRIC))
    worker.describe(pairs.STAGE, cfg, 1, inputs, output)
    return output.path


@pytest.mark.parametrize("image", IMAGES)
def test_the_image_alone_composes_a_recipe(builder: Buildah, images: dict[str, Done], image: str) -> None:
    """`docker run` starts it in this way, from the image's own copy."""
    done = run(
        builder, image, "python", "recipes/iterate.py", "recipe=srl-llama3.1-8b-1n8g-tp8", "engine=openai",
        "engine.base_url=http://127.0.0.1:8000/v1", "--cfg", "job",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "base_url: http://127.0.0.1:8000/v1" in done.stdout


def test_a_step_finds_the_servers_of_the_engines_image(
    builder: Buildah, images: dict[str, Done], tmp_path: Path
) -> None:
    """`trtllm-serve` comes from the image's PATH, and gets the flags of the engine."""
    model_dir = tiny.make_model(tmp_path / "model", ["some text"], num_layers=1)
    (service,) = trtllm.services(TrtllmSettings(), model_dir, tmp_path)
    step = JobStep(name="run", command=["-c", f"import os; print(os.environ['{SERVICES_VARIABLE}'])"])
    job = Job(
        name="job", steps=[step], log_dir=tmp_path, role="engine", env={"NEMO_SRL_STUB_REPLY": "yes"},
        services=[replace(service, num_gpus=0)],
    )  # fmt: skip
    assert printed(as_srun_starts(builder, "trtllm", job)).keys() == {service.name}
    assert f"serving {model_dir}" in (tmp_path / f"job-{service.name}.log").read_text()
