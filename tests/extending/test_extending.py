"""The loop runs with an engine, a reader, a rule, a loss, a family, a trainer and a launcher of another package."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from house_guest.trainer import StretchSettings, StretchTrainer
from safetensors.torch import load_file

from nemo_srl.artifacts import MANIFEST, read_jsonl
from nemo_srl.config import Config, PairsConfig, SFTConfig
from nemo_srl.engines import open_engine
from nemo_srl.errors import StaleArtifactError
from nemo_srl.pairing import Scored, best_worst
from nemo_srl.protocols import GenerationRequest, SamplingParams, SFTRow, TrainingTask
from nemo_srl.records import Candidate, Judgement, PreferencePair
from nemo_srl.runs import open_run, training_metrics
from recipes import iterate as iterate_recipe
from tests.extending.guest import PACKAGE, WORDS, Guest, iterate
from tests.support import ROOT, composed

JUDGES_WORDS = "good bad plain short long"


@pytest.fixture(scope="module")
def nemo_run(tmp_path_factory: pytest.TempPathFactory, guest: Guest) -> Path:
    """A run with all of the guest's but the trainer and the launcher."""
    run_dir = tmp_path_factory.mktemp("nemo") / "run"
    settings = {
        "dpo.preference_loss": "house_guest.loss:hinge", "dpo.global_batch_size": "1", "dpo.learning_rate": "1e-4",
        "sft.max_epochs": "1", "sft.max_seq_length": "128", "sft.learning_rate": "1e-4",
        "trainer.micro_batch_size": "1",
    }  # fmt: skip
    done = iterate(run_dir, {**guest.overrides, **settings})
    assert done.returncode == 0, done.stdout[-4000:]
    return run_dir


def own_trainer(guest: Guest) -> dict[str, str]:
    """The settings of a run with the guest's trainer and launcher, and with its engine also for the judge alone."""
    return {
        **guest.overrides, "trainer": "house_guest.trainer", "launcher": "house_guest.launcher",
        "launcher.niceness": "1", "sft.learning_rate": "0.5", "dpo.learning_rate": "0.5", "dpo.max_epochs": "2",
        "+engine@judge.engine": "house_guest.engine", "judge.engine.words": f"'{JUDGES_WORDS}'",
    }  # fmt: skip


@pytest.fixture(scope="module")
def own_run(tmp_path_factory: pytest.TempPathFactory, guest: Guest) -> Path:
    """A run in which the guest trains, too."""
    run_dir = tmp_path_factory.mktemp("own") / "run"
    done = iterate(run_dir, own_trainer(guest))
    assert done.returncode == 0, done.stdout[-4000:]
    return run_dir


def identity(run_dir: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run_dir / name / MANIFEST).read_text())["identity"]
    return found


def weights(model_dir: Path) -> dict[str, Any]:
    return load_file(model_dir / "model.safetensors")


def test_no_file_of_the_project_knows_the_guest() -> None:
    for directory in ("nemo_srl", "conf", "recipes", "examples"):
        for path in (p for p in (ROOT / directory).rglob("*") if p.suffix in (".py", ".yaml", ".md", ".sbatch")):
            assert PACKAGE.name not in path.read_text(), path


def test_the_engine_answers_and_its_decisive_settings_are_part_of_the_identity(nemo_run: Path) -> None:
    found = identity(nemo_run, "iter_01/candidates")
    assert {k: v for k, v in found.items() if k.startswith("engine.")} == {
        "engine.name": "house_guest.engine", "engine.words": WORDS,
    }  # fmt: skip
    answers = read_jsonl(nemo_run / "iter_01/candidates/data.jsonl", Candidate)
    assert len(answers) == 12
    assert {word for c in answers for word in c.response.split()} <= set(WORDS.split())


def test_the_reader_teaches_asks_and_reads_letters(nemo_run: Path) -> None:
    for place in ("iter_00/sft", "iter_00/evaluation", "iter_01/judgements"):
        assert identity(nemo_run, place)["judge.mode"] == "house_guest.reader:READER"
    verdicts = read_jsonl(nemo_run / "iter_01/judgements/data.jsonl", Judgement)
    assert len(verdicts) == 36
    assert all(j.score == "FEDCBA".index(j.verdict[-1]) and j.verdict[-9:-1] == "\nGrade: " for j in verdicts)
    assert len({j.score for j in verdicts}) > 2
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(nemo_run / "iter_00/sft/hf")
    rows = (nemo_run / "iter_00/sft/training/train.jsonl").read_text().splitlines()
    taught = "".join(tokenizer.decode(json.loads(row)["response_ids"]) for row in rows)
    assert taught.count("Right.\nGrade: A<|im_end|>") == taught.count("Off.\nGrade: F<|im_end|>") == 6


def test_the_rule_makes_the_pairs(nemo_run: Path) -> None:
    assert identity(nemo_run, "iter_01/pairs")["pairs.rule"] == "house_guest.rule:best_next"
    scores = defaultdict(list)
    for j in read_jsonl(nemo_run / "iter_01/judgements/data.jsonl", Judgement):
        scores[j.candidate_key].append(j.score)
    by_prompt = defaultdict(list)
    for c in read_jsonl(nemo_run / "iter_01/candidates/data.jsonl", Candidate):
        by_prompt[c.prompt_id].append(Scored(c, fmean(scores[c.key])))
    pairs = read_jsonl(nemo_run / "iter_01/pairs/data.jsonl", PreferencePair)
    for pair in pairs:
        ordered = sorted({s.score for s in by_prompt[pair.prompt_id]}, reverse=True)
        assert [pair.chosen_score, pair.rejected_score] == ordered[:2]
    theirs = [best_worst(by_prompt[pair.prompt_id], PairsConfig()) for pair in pairs]
    assert theirs != pairs, "the package's own rule would have made other pairs"


def test_the_loss_is_what_dpo_minimises(nemo_run: Path) -> None:
    assert identity(nemo_run, "iter_01/policy")["dpo.preference_loss"] == "house_guest.loss:hinge"
    run = open_run(nemo_run)
    stage = run.find(1, "policy")
    assert stage is not None
    steps = training_metrics(stage.path)
    assert steps[0]["loss"] == pytest.approx(1.0), "the hinge of a policy that equals its reference"
    assert steps[0]["loss"] != pytest.approx(math.log(2), abs=0.1), "DPO's own would be this"
    assert steps[-1]["rewards_margin"] > 0


def test_the_family_keeps_its_names_through_both_trainings(nemo_run: Path, guest: Guest) -> None:
    m0, m1, m2 = (weights(d) for d in (guest.model, nemo_run / "iter_00/sft/hf", nemo_run / "iter_01/policy/hf"))
    assert m0.keys() == m1.keys() == m2.keys()
    assert {"tokens.weight", "norm.weight", "blocks.1.gate.weight"} < m0.keys()
    for name in m0:
        assert not m0[name].equal(m1[name]), name
    assert any(not m1[name].equal(m2[name]) for name in m1)
    config = json.loads((nemo_run / "iter_01/policy/hf/config.json").read_text())
    assert (config["model_type"], config["depth"]) == ("guest_llama", 2)


def test_the_report_shows_the_guests_verdicts(nemo_run: Path) -> None:
    assert "Grade: " in (nemo_run / "report.html").read_text()
    assert "| M2" in (nemo_run / "report.md").read_text()


def test_the_trainer_makes_the_models(own_run: Path) -> None:
    found = identity(own_run, "iter_01/policy")
    assert {k: v for k, v in found.items() if k.startswith("trainer.")} == {
        "trainer.name": "house_guest.trainer", "trainer.stretch": 0.1, "trainer.version": 1,
    }  # fmt: skip
    m1, m2 = (weights(own_run / place / "hf") for place in ("iter_00/sft", "iter_01/policy"))
    assert [name for name in m1 if not m1[name].equal(m2[name])] == ["tokens.weight"]
    longer = m2["tokens.weight"].norm(dim=-1) - m1["tokens.weight"].norm(dim=-1)
    assert longer.max() > 1e-3
    assert longer.min() < -1e-3
    run = open_run(own_run)
    stage = run.find(1, "policy")
    assert stage is not None
    first, second = training_metrics(stage.path)
    assert (first["step"], second["step"]) == (1, 2)
    assert second["loss"] < first["loss"]
    assert not list((own_run / "iter_01/policy/training").glob("*.safetensors")), "checkpoints are removed"


def test_the_launcher_runs_every_stage_that_needs_a_job(own_run: Path) -> None:
    jobs = [json.loads(line) for line in (own_run / "logs/jobs.jsonl").read_text().splitlines()]
    assert [(job["name"], job["role"]) for job in jobs] == [
        ("iter_00-sft", "trainer"), ("iter_00-evaluation_m0", "engine"), ("iter_00-evaluation", "engine"),
        ("iter_01-candidates", "engine"), ("iter_01-judgements", "engine"), ("iter_01-policy", "trainer"),
        ("iter_01-evaluation", "engine"),
    ]  # fmt: skip


def test_the_judge_may_have_an_engine_of_its_own(own_run: Path) -> None:
    found = identity(own_run, "iter_01/judgements")
    assert found["judge.engine.words"] == JUDGES_WORDS
    assert not [key for key in found if key.startswith("engine.")]
    verdicts = read_jsonl(own_run / "iter_01/judgements/data.jsonl", Judgement)
    assert {word for j in verdicts for word in j.verdict.split("\n")[0].split()} <= set(JUDGES_WORDS.split())


def test_a_finished_run_is_kept_and_placement_may_change(own_run: Path, guest: Guest) -> None:
    again = iterate(own_run, {**own_trainer(guest), "engine.batch_size": "3", "launcher.niceness": "0"})
    assert again.returncode == 0, again.stdout
    assert again.stdout.count(" kept\n") == 8


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"trainer.stretch": "0.5"}, "trainer.stretch: 0.1 -> 0.5"),
        ({"judge.engine.words": "'good bad plain'"}, f"judge.engine.words: '{JUDGES_WORDS}' -> 'good bad plain'"),
        ({"pairs.rule": "best_worst"}, "pairs.rule: 'house_guest.rule:best_next' -> 'best_worst'"),
        ({"judge.mode": "sampled", "judge.rubric": "'{instruction} {response} Score:'"},
         "judge.mode: 'house_guest.reader:READER' -> 'sampled'"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("_registered")
def test_a_changed_setting_of_the_guests_is_refused_by_name(
    own_run: Path, guest: Guest, change: dict[str, str], said: str
) -> None:
    settings = {**own_trainer(guest), "launcher.niceness": "0", **change}
    cfg = composed(*(f"{k}={v}" for k, v in settings.items()))
    with pytest.raises(StaleArtifactError, match=re.escape(said)):
        iterate_recipe.run(replace(cfg, run_dir=str(own_run)))


@pytest.mark.usefixtures("_registered")
def test_the_trainer_takes_up_a_training_that_was_killed(tmp_path: Path, guest: Guest) -> None:
    rows = [SFTRow(prompt="Name color.", response="red"), SFTRow(prompt="Name animal.", response="cat")]
    optim = SFTConfig(learning_rate=1, max_epochs=3)
    task = TrainingTask(algorithm="sft", model_dir=guest.model, rows=rows, optim=optim, seed=1)
    trainer = StretchTrainer(StretchSettings())
    trainer.prepare(task, tmp_path / "whole")
    trainer.train(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    (tmp_path / "killed/3.safetensors").unlink()  # the step's metrics are written before its checkpoint
    trainer.prepare(task, tmp_path / "killed")
    trainer.train(tmp_path / "killed")
    assert trainer.metrics(tmp_path / "killed") == trainer.metrics(tmp_path / "whole")
    summaries = [trainer.export(tmp_path / name, tmp_path / f"{name}_hf") for name in ("whole", "killed")]
    assert summaries[0] == summaries[1]
    a, b = (weights(tmp_path / f"{name}_hf") for name in ("whole", "killed"))
    assert all(a[name].equal(b[name]) for name in a)


@pytest.mark.usefixtures("_registered")
def test_the_embedded_engine_serves_the_family(guest: Guest) -> None:
    engine = open_engine(Config().engine, guest.model)
    request = GenerationRequest(key="a", prompt_token_ids=(1, 5, 6), n=2, seed=1)
    params = SamplingParams(temperature=1.0, top_p=1.0, max_tokens=4)
    found = [c for together in engine.generate([request], params) for c in together]
    assert sorted(c.key for c in found) == ["a/00", "a/01"]
