"""Artifacts of an older version are kept, and changed settings are refused by name.

`data/run_of_e18f2b0.json` holds the identities of every stage of a real run that the commit e18f2b0 made (two
iterations with a refresh of the judge). That version knew no `pairs.rule`, and it called the judge `policy`.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nemo_srl import records
from nemo_srl.artifacts import SPEC, BaseModel, Model, Schema, SourceFile, Table, write_atomic
from nemo_srl.config import Config
from nemo_srl.errors import StaleArtifactError
from nemo_srl.experiment import Experiment
from nemo_srl.stages import Need, Stage, stage_named
from nemo_srl.trainers import nemo_aligner
from tests.support import composed

OLD: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "data" / "run_of_e18f2b0.json").read_text())
READS_VERDICTS = ("judgements", "eft")
CHANGED = {
    **dict.fromkeys(("sft", "policy", "refresh"), r" trainer\.version: 1 -> 2"),
    **dict.fromkeys(("pairs", "candidates", *READS_VERDICTS), r" version: 1 -> 2"),
    **dict.fromkeys(("prompts", "anchor", "head_to_head"), r" version: 1 -> 3"),
    "evaluation": r" evaluation\.num_bootstrap: 50 -> None\n  version: 1 -> 4",
}
"""The stages that make something else now than in e18f2b0, and what is said of them."""
SETTINGS = {
    "judge.rubric": "'Grade: {instruction} / {response} Score:'", "judge.max_tokens": 12, "judge.temperature": 1.0,
    "judge.stop_at_score": True,  # the default of e18f2b0
    "engine.dtype": "float32", "trainer.precision": "32", "trainer.micro_batch_size": 1,
    "sft.learning_rate": 3e-3, "sft.min_learning_rate": 1e-3, "sft.max_epochs": 20, "sft.global_batch_size": 8,
    "sft.max_seq_length": 128, "sft.save_interval": 20,
    "prompts.num_prompts": 6, "prompts.min_words": 1, "prompts.max_rouge_l": 1.0, "prompts.temperature": 1.0,
    "prompts.top_p": 1.0, "prompts.max_tokens": 24, "prompts.max_rounds": 50, "prompts.language": "any",
    "candidates.temperature": 1.0, "candidates.max_tokens": 24,
    "dpo.global_batch_size": 2, "dpo.max_epochs": 1, "dpo.max_seq_length": 128, "dpo.save_interval": 1,
    "refresh.num_judgements": 15, "refresh.global_batch_size": 4, "refresh.max_seq_length": 128,
    "refresh.learning_rate": 1e-3, "refresh.min_learning_rate": 1e-4,
}  # fmt: skip


class KnownFile(SourceFile[Any]):
    """A file of which only the digest is known."""

    def digest(self) -> str:
        return self.path.name


def settings(run_dir: Path) -> Config:
    return replace(composed(*(f"{k}={v}" for k, v in SETTINGS.items())), run_dir=str(run_dir))


def given(stage: Stage[Any], row: dict[str, Any], elsewhere: Path) -> dict[str, Any]:
    """The stage's inputs by today's names, with the digests that the old run recorded."""
    found: dict[str, Any] = {}
    for name, need in stage.needs.items():
        n = need if isinstance(need, Need) else Need(need)
        if n.many:
            numbered = [f"{n.many}_{i}" for i in range(1, 9) if f"{n.many}_{i}" in row["inputs"]]
            found[name] = [artifact(row, key, elsewhere) for key in numbered]
        elif (key := n.formerly or name) in row["inputs"]:
            found[name] = artifact(row, key, elsewhere)
    return found


def artifact(row: dict[str, Any], key: str, elsewhere: Path) -> Any:
    described, digest = row["inputs"][key], row["identity"][f"input {key}"]
    if described["kind"] == "base_model":
        return BaseModel(elsewhere, digest)
    if described["kind"] == "file":
        return KnownFile(elsewhere / digest, getattr(records, described["record"]))
    path = elsewhere / digest
    made = Model(path, {}) if described["kind"] == "model" else Table(path, {}, getattr(records, described["record"]))
    made.publish(stage="x", digest=digest, metrics={}, seconds=0)
    return made


def old_run(run_dir: Path, *, finished: bool = True) -> None:
    for place, row in OLD.items():
        write_atomic(run_dir / place / SPEC, json.dumps({"identity": row["identity"]}))
        if finished:
            manifest = {"stage": row["stage"], "identity": row["identity"], "digest": row["digest"],
                        "metrics": {}, "seconds": 1.0, "peak_memory_bytes": 0}  # fmt: skip
            write_atomic(run_dir / place / "manifest.json", json.dumps(manifest))


class NoJobs:
    def run(self, job: Any) -> None:
        raise AssertionError(f"{job.name} was to be made again")


def run_again(place: str, tmp_path: Path) -> Any:
    """The artifact that a new start finds in the place of an old one."""
    row, (iteration, directory) = OLD[place], place.removeprefix("iter_").split("/")
    old_run(tmp_path / "run")
    stage = stage_named(row["stage"])
    with Experiment(settings(tmp_path / "run")) as exp:
        exp._launcher = NoJobs()
        inputs = given(stage, row, tmp_path / "elsewhere")
        return exp.run(stage, int(iteration), directory=directory, **inputs)


@pytest.mark.parametrize("place", [place for place in OLD if OLD[place]["stage"] not in CHANGED])
def test_a_run_of_an_older_version_counts_as_kept(tmp_path: Path, place: str) -> None:
    assert run_again(place, tmp_path).digest() == OLD[place]["digest"]


@pytest.mark.parametrize("place", [place for place in OLD if OLD[place]["stage"] in CHANGED])
def test_what_is_made_in_another_way_now_is_refused_and_never_mixed_with_the_old(tmp_path: Path, place: str) -> None:
    with pytest.raises(StaleArtifactError, match=CHANGED[OLD[place]["stage"]] + r" \(.*CHANGELOG\.md") as e:
        run_again(place, tmp_path)
    assert str(e.value).count("->") == CHANGED[OLD[place]["stage"]].count("->"), "nothing else changed"


def test_work_that_an_older_version_began_goes_on(tmp_path: Path) -> None:
    old_run(tmp_path / "run", finished=False)
    row, stage = OLD["iter_01/judgements"], replace(stage_named("judgements"), version=1)
    with Experiment(settings(tmp_path / "run")) as exp:
        exp._launcher = NoJobs()
        with pytest.raises(AssertionError, match="iter_01-judgements was to be made again"):
            exp.run(stage, 1, **given(stage, row, tmp_path / "elsewhere"))


@pytest.mark.parametrize(
    ("section", "changes", "said"),
    [
        ("judge", {"temperature": 0.5}, r"judge\.temperature: 1\.0 -> 0\.5"),
        ("pairs", {"rule": "tests.extending.package.rules:shortest"}, r"pairs\.rule: 'best_worst' -> 'tests\."),
    ],
)
def test_a_changed_setting_is_refused_by_name_whether_the_old_version_knew_it_or_not(
    tmp_path: Path, section: str, changes: dict[str, Any], said: str
) -> None:
    old_run(tmp_path / "run")
    cfg = settings(tmp_path / "run")
    place = {"judge": "judgements", "pairs": "pairs"}[section]
    stage, row = replace(stage_named(place), version=1), OLD[f"iter_01/{place}"]
    setattr(cfg, section, replace(getattr(cfg, section), **changes))
    with Experiment(cfg) as exp, pytest.raises(StaleArtifactError, match=said) as e:
        exp.run(stage, 1, **given(stage, row, tmp_path / "elsewhere"))
    assert str(e.value).count("->") == 1, "nothing else changed"


def test_a_setting_that_joined_an_identity_later_does_not_refuse_an_older_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`judge.mode` existed in e18f2b0, but the identity of `sft` did not have it."""
    monkeypatch.setattr(nemo_aligner, "BACKEND", replace(nemo_aligner.BACKEND, version=1))
    old_run(tmp_path / "run")
    cfg = settings(tmp_path / "run")
    stage, row = stage_named("sft"), OLD["iter_00/sft"]
    with Experiment(replace(cfg, judge=replace(cfg.judge, mode="expected"))) as exp:
        exp._launcher = NoJobs()
        assert exp.run(stage, 0, **given(stage, row, tmp_path / "elsewhere")).digest() == row["digest"]
        assert exp._identity(stage, 0, {})["judge.mode"] == "expected"


def test_another_judge_is_refused_under_the_inputs_new_name(tmp_path: Path) -> None:
    old_run(tmp_path / "run")
    stage, row = stage_named("judgements"), OLD["iter_01/judgements"]
    inputs = {**given(stage, row, tmp_path / "elsewhere"), "judge": BaseModel(tmp_path, "another")}
    with Experiment(settings(tmp_path / "run")) as exp, pytest.raises(StaleArtifactError, match="input judge: "):
        exp.run(stage, 1, **inputs)


def test_old_names_of_an_engines_settings_are_understood() -> None:
    schema = Schema({"engine.backend": "pytorch", "engine.dtype": "bfloat16"}, {"engine.old.": "engine."})
    found = {"engine.name": "x", "engine.old.backend": "a", "engine.old.extra.b": 1}
    wanted = {"engine.name": "x", "engine.backend": "a", "engine.extra.b": 1, "engine.dtype": "bfloat16"}
    assert schema.completed(found, wanted) == wanted
    assert schema.completed(found, {})["engine.backend"] == "a", "what is not asked for stays, and is refused"


def test_the_old_name_of_the_share_of_frozen_layers_is_understood(tmp_path: Path) -> None:
    stage, cfg = stage_named("sft"), settings(tmp_path / "run")
    with Experiment(cfg) as exp:
        wanted, schema = exp._identity(stage, 0, {}), exp._schema(stage)
    found = {("trainer.num_frozen_layers" if k == "trainer.frozen_share" else k): v for k, v in wanted.items()}
    assert found.keys() != wanted.keys()
    assert schema.completed(found, wanted) == wanted
