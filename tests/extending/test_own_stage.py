"""A stage and a recipe of another package: kept, refused and taken up again like those of this one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from house_guest import recipe
from house_guest.stage import STAGE, SecondOpinion

from nemo_srl.artifacts import JOURNAL, MANIFEST
from nemo_srl.config import Config, load
from nemo_srl.errors import ConfigError, InputError, StaleArtifactError
from nemo_srl.experiment import Experiment
from nemo_srl.protocols import Job
from tests.extending.guest import RUBRIC, WORDS, Guest, program


class NoJobs:
    def run(self, job: Job) -> None:
        raise AssertionError(f"a job was started: {job.name}")


def settings(run_dir: Path, guest: Guest, **changes: Any) -> dict[str, Any]:
    return {
        "run_dir": str(run_dir),
        "model": {"path": str(guest.model), "family": "house_guest.family"},
        "engine": {"name": "house_guest.engine", "words": WORDS},
        "prompts": {"path": str(guest.prompts)},
        "judge": {"mode": "house_guest.reader:READER", "rubric": RUBRIC, "num_judgements": 2},
        **changes,
    }


def run_recipe(directory: Path, guest: Guest) -> str:
    path = directory / "settings.yaml"
    path.write_text(yaml.safe_dump(settings(directory / "run", guest)))
    done = program("-m", "house_guest.recipe", str(path))
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def asked_twice(tmp_path_factory: pytest.TempPathFactory, guest: Guest) -> Path:
    directory = tmp_path_factory.mktemp("recipe")
    assert run_recipe(directory, guest).count("p0/0") == 4
    return directory


def opinions(cfg: Config) -> list[SecondOpinion]:
    with Experiment(cfg) as exp:
        exp._launcher = NoJobs()
        return recipe.ask_twice(exp).read()


@pytest.mark.usefixtures("_registered")
def test_its_record_comes_back_with_its_type(asked_twice: Path, guest: Guest) -> None:
    found = opinions(load(settings(asked_twice / "run", guest), Config))
    assert len(found) == 12
    assert isinstance(found[0], SecondOpinion)
    assert any(x.first != x.second for x in found)
    manifest = json.loads((asked_twice / "run/iter_01/second_opinion" / MANIFEST).read_text())
    assert manifest["metrics"]["mean_difference"] > 0
    assert manifest["identity"]["engine.words"] == WORDS


@pytest.mark.usefixtures("_registered")
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": 5}, "seed: 1234 -> 5"),
        ({"engine": {"name": "house_guest.engine", "words": "a b c"}}, "engine.words: .* -> 'a b c'"),
    ],
)
def test_changed_settings_are_refused_by_name(
    asked_twice: Path, guest: Guest, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(StaleArtifactError, match=said):
        opinions(load(settings(asked_twice / "run", guest, **changes), Config))


@pytest.mark.usefixtures("_registered")
def test_wrong_inputs_are_refused_before_anything_starts(asked_twice: Path, guest: Guest) -> None:
    with Experiment(load(settings(asked_twice / "run", guest), Config)) as exp:
        exp._launcher = NoJobs()
        m0, twice = exp.base_model(), recipe.ask_twice(exp)
        with pytest.raises(InputError, match=r"second_opinion: it has no input 'policy'. Its inputs are judge, cand"):
            exp.run(STAGE, 1, policy=m0)
        with pytest.raises(InputError, match="'candidates' must be a table or file of Candidate, but it is of SecondO"):
            exp.run(STAGE, 1, judge=m0, candidates=twice, judgements=twice)


def test_an_interrupted_stage_asks_only_for_what_is_missing(asked_twice: Path, guest: Guest) -> None:
    directory = asked_twice / "run/iter_01/second_opinion"
    published = json.loads((directory / MANIFEST).read_text())["digest"]
    lines = (directory / JOURNAL).read_text().splitlines(keepends=True)
    (directory / MANIFEST).unlink()
    (directory / JOURNAL).write_text("".join(lines[:9]))
    output = run_recipe(asked_twice, guest)
    assert output.count("kept") == 2
    assert "9/24" in output, "nine calls were already made"
    assert (directory / JOURNAL).read_text().splitlines(keepends=True)[:9] == lines[:9]
    assert json.loads((directory / MANIFEST).read_text())["digest"] == published


@pytest.mark.parametrize(
    ("engine", "said"),
    [
        ({"name": "house_guest.engine", "words": WORDS, "dtype": "float32"},
         "engine.dtype='float32': engine.name='house_guest.engine' has no such setting. It has name, words, batch_si"),
        ({"name": "house_guest.engine"}, r"engine.words=\?\?\?: engine.name='house_guest.engine' needs this setting"),
        ({"name": "house_guest.engine", "words": "a"}, "engine.words='a': must hold at least 3 words"),
        ({"name": "house_guest.no_engine"}, "engine.name='house_guest.no_engine': the module cannot be imported"),
        ({"name": "house_guest.rule"}, "engine.name='house_guest.rule': house_guest.rule has no 'BACKEND'"),
        ({"name": "guest"}, "engine.name='guest': unknown name. Use one of embedded, .*, or the dotted path"),
    ],
)  # fmt: skip
def test_an_engine_that_cannot_be_used_is_refused_by_name(
    tmp_path: Path, guest: Guest, engine: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        load(settings(tmp_path, guest, engine=engine), Config)
