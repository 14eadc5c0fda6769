"""Backends by their names: a setting of another backend is refused, and a dotted path finds the user's own backend."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from hydra.errors import ConfigCompositionException, MissingConfigException

from nemo_srl.artifacts import BaseModel
from nemo_srl.config import ClusterConfig, Config, load
from nemo_srl.engines import EngineBackend
from nemo_srl.engines.openai.settings import OpenAISettings
from nemo_srl.errors import ConfigError
from nemo_srl.experiment import Experiment
from nemo_srl.launchers import LauncherBackend
from nemo_srl.launchers.local import LocalLauncher
from nemo_srl.launchers.slurm.settings import SlurmSettings
from nemo_srl.launchers.srun import SrunSettings
from nemo_srl.protocols import GenerationRequest, Job, SamplingParams
from nemo_srl.records import Completion, Prompt
from nemo_srl.stages import candidates
from tests import tiny
from tests.support import composed
from tests.tables import published

URL = "http://127.0.0.1:1/v1"


@dataclass
class EchoSettings:
    name: str = ""
    suffix: str = "!"


@dataclass(frozen=True)
class EchoEngine:
    """Answers with the text of the prompt and a suffix."""

    settings: EchoSettings
    model_dir: Path

    def generate(
        self, requests: Sequence[GenerationRequest], params: SamplingParams, *, completed: Collection[str] = ()
    ) -> Iterator[tuple[Completion, ...]]:
        for r in requests:
            texts = [f"{r.text}{self.settings.suffix}{i}" for i in range(r.n)]
            yield tuple(
                Completion(request_key=r.key, index=i, text=text, num_tokens=1, finish_reason="stop")
                for i, text in enumerate(texts)
            )

    def close(self) -> None:
        pass


ECHO = EngineBackend(settings=EchoSettings, decisive=("suffix",), open=EchoEngine)


@dataclass
class NotingSettings:
    name: str = ""
    file: str = "notes"


@dataclass(frozen=True)
class NotingLauncher:
    """Notes the jobs and runs them on this machine."""

    settings: NotingSettings
    cluster: ClusterConfig

    def run(self, job: Job) -> None:
        job.log_dir.mkdir(exist_ok=True)
        with (job.log_dir / self.settings.file).open("a") as f:
            f.write(f"{job.name} as {job.role}\n")
        LocalLauncher().run(job)


NOTING = LauncherBackend(settings=NotingSettings, open=NotingLauncher)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"engine": {"name": "openai", "base_url": URL, "dtype": "float32"}},
            r"engine\.dtype='float32': engine\.name='openai' has no such setting\. It has .*base_url.*engine=<name>",
        ),
        (
            {"judge": {"rubric": "r", "engine": {"name": "embedded", "base_url": URL}}},
            r"judge\.engine\.base_url=.*judge\.engine\.name='embedded' has no such setting\. It has .*dtype",
        ),
        ({"launcher": {"name": "srun", "poll_seconds": 1}}, r"launcher\.poll_seconds=1.*'srun'.*It has .*rank_idiom"),
        ({"launcher": {"rank_idiom": "srun"}}, r"launcher\.rank_idiom='srun'.*'local'"),
    ],
)
def test_a_setting_of_another_backend_is_refused_by_name(given: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(given, Config)


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["engine=openai", f"engine.base_url={URL}", "engine.dtype=float32"], r"engine\.dtype"),
        (["+engine@judge.engine=openai", "judge.engine.dtype=float32"], r"judge\.engine\.dtype"),
        (["launcher=local", "launcher.poll_seconds=1"], r"launcher\.poll_seconds"),
    ],
)
def test_a_setting_of_another_backend_is_refused_on_the_command_line(overrides: list[str], key: str) -> None:
    with pytest.raises(ConfigCompositionException, match=rf"(?s){key}"):
        composed(*overrides)
    *chosen, other = overrides
    with pytest.raises(ConfigError, match=rf"{key}=.* has no such setting"):
        composed(*chosen, f"++{other}")  # ++ makes Hydra add a key that is not there


def test_each_backend_has_the_settings_of_its_own() -> None:
    cfg = composed(
        "launcher=slurm", "launcher.poll_seconds=1", "+engine@judge.engine=openai", f"judge.engine.base_url={URL}"
    )
    assert cfg.launcher == SlurmSettings(poll_seconds=1)
    assert cfg.judge.engine == OpenAISettings(base_url=URL)
    assert cfg.engine_for("judge") is cfg.judge.engine
    assert cfg.engine_for("candidates") is cfg.engine
    assert composed("launcher=srun").launcher == SrunSettings()


def test_bad_values_of_a_backend_are_refused_by_their_keys() -> None:
    with pytest.raises(ConfigError, match=r"engine\.max_batch_size=0: must be at least 1"):
        load({"engine": {"name": "embedded", "max_batch_size": 0}}, Config)
    with pytest.raises(ConfigError, match=r"launcher\.max_requeues.*many"):
        load({"launcher": {"name": "slurm", "max_requeues": "many"}}, Config)


@pytest.mark.parametrize(("section", "known"), [("engine", "embedded, openai"), ("launcher", "local, slurm, srun")])
def test_unknown_names_list_what_exists(section: str, known: str) -> None:
    with pytest.raises(ConfigError, match=rf"{section}\.name='nope': unknown name\. Use one of {known}"):
        load({section: {"name": "nope"}}, Config)
    with pytest.raises(MissingConfigException, match=rf"(?s){section}/nope.*{known.split(', ')[0]}"):
        composed(f"{section}=nope")


def test_a_path_that_leads_nowhere_is_named() -> None:
    with pytest.raises(ConfigError, match=r"engine\.name='no\.such\.module': the module cannot be imported"):
        load({"engine": {"name": "no.such.module"}}, Config)
    with pytest.raises(ConfigError, match=r"engine\.name='tests\.tiny': tests\.tiny has no 'BACKEND'"):
        load({"engine": {"name": "tests.tiny"}}, Config)
    with pytest.raises(ConfigError, match=rf"engine\.name='{__name__}:OTHER': {__name__} has no 'OTHER'"):
        load({"engine": {"name": f"{__name__}:OTHER"}}, Config)


def test_an_engine_and_a_launcher_of_the_users_own_run_a_stage(tmp_path: Path) -> None:
    cfg = composed(
        f"run_dir={tmp_path / 'run'}", f"engine={__name__}:ECHO", "engine.suffix='?'",
        f"launcher={__name__}:NOTING", "launcher.file=jobs",
    )  # fmt: skip
    assert type(cfg.engine).__name__ == "EchoSettings"
    assert (cfg.engine.name, cfg.engine.suffix) == (f"{__name__}:ECHO", "?")
    model = BaseModel(tiny.make_model(tmp_path / "model", ["text"], vocab_size=300), "digest")
    prompts = published(tmp_path, "prompts", Prompt, [Prompt(prompt_id="p", text="Why")])
    with Experiment(cfg) as exp:
        made = exp.run(candidates.STAGE, 1, policy=model, prompts=prompts)
    assert [c.response for c in made.read()] == [f"Why?{i}" for i in range(cfg.candidates.num_samples)]
    assert made.identity["engine.name"] == f"{__name__}:ECHO"
    assert made.identity["engine.suffix"] == "?"
    assert (tmp_path / "run" / "logs" / "jobs").read_text() == "iter_01-candidates as engine\n"
