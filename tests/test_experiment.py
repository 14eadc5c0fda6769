"""Stages are kept, refused, resumed and locked. Most tests run the real stage `pairs`."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Timer
from typing import Any

import pytest

from nemo_srl import worker
from nemo_srl.artifacts import MANIFEST, SPEC, BaseModel, SourceFile, Table
from nemo_srl.config import Config, JudgeConfig, load
from nemo_srl.errors import (
    ConfigError,
    DataError,
    InputError,
    JobFailedError,
    NoPairsError,
    RunDirBusyError,
    StaleArtifactError,
)
from nemo_srl.experiment import Experiment
from nemo_srl.launchers import slurm
from nemo_srl.launchers.slurm.settings import SlurmSettings
from nemo_srl.protocols import Job
from nemo_srl.records import Candidate, EFTExample, IFTExample, Judgement
from nemo_srl.stages import judgements, pairs, prompts
from tests.support import server

RUBRIC = "Grade {response} to {instruction}. Score: <points>"


def config(run_dir: Path) -> Config:
    return Config(run_dir=str(run_dir), judge=JudgeConfig(rubric=RUBRIC))


def inputs(directory: Path, scores: tuple[float | None, ...]) -> dict[str, Table[Candidate] | Table[Judgement]]:
    candidates = Table(directory / "candidates", {"made": "by the test"}, Candidate)
    judgements = Table(directory / "judgements", {"scores": list(scores)}, Judgement)
    rows = [
        Candidate(prompt_id="p", sample_index=i, prompt="Q", response=f"answer {i}", num_tokens=2, finish_reason="stop")
        for i in range(len(scores))
    ]
    verdicts = [
        Judgement(candidate_key=c.key, judgement_index=0, verdict="v", score=s)
        for c, s in zip(rows, scores, strict=True)
    ]
    candidates.publish(stage="candidates", digest=candidates.write(rows), metrics={}, seconds=0)
    judgements.publish(stage="judgements", digest=judgements.write(verdicts), metrics={}, seconds=0)
    return {"candidates": candidates, "judgements": judgements}


def test_a_stage_is_made_once_and_then_kept(tmp_path: Path) -> None:
    given = inputs(tmp_path, (1.0, 4.0))
    with Experiment(config(tmp_path / "run")) as exp:
        made = exp.run(pairs.STAGE, 1, **given)
        assert [(p.chosen, p.rejected) for p in made.read()] == [("answer 1", "answer 0")]
        manifest = (made.path / MANIFEST).stat().st_mtime_ns
        assert exp.run(pairs.STAGE, 1, **given).read() == made.read()
        assert (made.path / MANIFEST).stat().st_mtime_ns == manifest


def test_changed_settings_or_inputs_are_refused_by_name_and_placement_is_not(tmp_path: Path) -> None:
    given = inputs(tmp_path, (1.0, 4.0))
    cfg = config(tmp_path / "run")
    with Experiment(cfg) as exp:
        exp.run(pairs.STAGE, 1, **given)
    elsewhere = replace(cfg, trainer=replace(cfg.trainer, tensor_model_parallel_size=2))
    with Experiment(elsewhere) as exp:
        exp.run(pairs.STAGE, 1, **given)
    changed = replace(cfg, pairs=replace(cfg.pairs, min_margin=0.5))
    with Experiment(changed) as exp, pytest.raises(StaleArtifactError, match=r"pairs\.min_margin: 0\.0 -> 0\.5"):
        exp.run(pairs.STAGE, 1, **given)
    with Experiment(cfg) as exp, pytest.raises(StaleArtifactError, match="input judgements"):
        exp.run(pairs.STAGE, 1, **inputs(tmp_path / "other", (5.0, 0.0)))


def test_the_identity_names_what_decides_the_text_of_the_engines_in_use(tmp_path: Path) -> None:
    cfg = config(tmp_path / "run")

    def identity(**engine: Any) -> dict[str, Any]:
        changed = load({"run_dir": cfg.run_dir, "judge": {"rubric": RUBRIC}, "engine": engine}, Config)
        changed.launcher = replace(changed.launcher, name="slurm")
        return Experiment(changed)._identity(judgements.STAGE, 1, {})

    first = identity()
    assert first["engine.dtype"] == "bfloat16"
    assert not [key for key in first if "backend" in key or "base_url" in key]
    assert identity(max_batch_size=3) == first
    assert identity(dtype="float32")["engine.dtype"] == "float32"
    served = identity(name="trtllm", num_replicas=4, extra_options={"a": {"b": 1}})
    assert (served["engine.backend"], served["engine.extra_options.a.b"]) == ("pytorch", 1)
    assert served == identity(name="trtllm", extra_options={"a": {"b": 1}})
    hosted = server("http://judge/v1")
    judged = Experiment(replace(cfg, judge=replace(cfg.judge, engine=hosted)))._identity(judgements.STAGE, 1, {})
    assert judged["judge.engine.base_url"] == "http://judge/v1"
    assert not [key for key in judged if key.startswith("engine.")], "the judge alone decides"


def test_no_pairs_stop_before_training_and_say_what_to_change(tmp_path: Path) -> None:
    with Experiment(config(tmp_path / "run")) as exp, pytest.raises(NoPairsError) as e:
        exp.run(pairs.STAGE, 1, **inputs(tmp_path, (3.0, 3.0, None)))
    message = str(e.value)
    assert "no preference pair in 1 prompts" in message
    assert "1 tied" in message
    assert "raise judge.num_judgements" in message
    assert "1 of 3 verdicts had no score" in " ".join(message.split())
    assert "Traceback" not in message


def test_a_second_orchestrator_says_so_and_leaves(tmp_path: Path) -> None:
    cfg = config(tmp_path / "run")
    with Experiment(cfg):
        code = (
            "from tests.test_experiment import config\nfrom nemo_srl.experiment import Experiment\nimport pathlib\n"
            f"with Experiment(config(pathlib.Path({str(tmp_path / 'run')!r}))): print('entered')"
        )
        second = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert second.returncode != 0
        assert "RunDirBusyError" in second.stderr
        assert "pid " in second.stderr
        assert "entered" not in second.stdout
        with pytest.raises(RunDirBusyError), Experiment(cfg):
            pass
    with Experiment(cfg):
        pass


@pytest.mark.parametrize("seconds", [0.7, None])
def test_what_a_job_on_another_node_publishes_may_appear_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float | None
) -> None:
    """`seconds` after the job's end, or never. Storage that nodes share may take a minute."""

    class OnAnotherNode:
        def run(self, job: Job) -> None:
            directory = Path(job.steps[0].command[2])
            table = Table(directory, json.loads((directory / SPEC).read_text())["identity"], Judgement)
            publish = partial(table.publish, stage="judgements", digest=table.write([]), metrics={}, seconds=0)
            if seconds is not None:
                Timer(seconds, publish).start()

    backend = replace(slurm.BACKEND, visible_seconds=60.0 if seconds else 0.2)
    monkeypatch.setattr(slurm, "BACKEND", backend)
    answers = {"judge": BaseModel(tmp_path, "digest"), "candidates": inputs(tmp_path, (1.0,))["candidates"]}
    cfg = replace(config(tmp_path / "run"), launcher=SlurmSettings())
    with Experiment(replace(cfg, judge=replace(cfg.judge, engine=server("http://judge/v1")))) as exp:
        exp._launcher = OnAnotherNode()
        if seconds:
            assert exp.run(judgements.STAGE, 1, **answers).manifest() is not None
        else:
            with pytest.raises(JobFailedError, match="without publishing"):
                exp.run(judgements.STAGE, 1, **answers)


def test_seed_files_are_read_at_set_up(tmp_path: Path) -> None:
    (tmp_path / "ift.jsonl").write_text('{"example_id": "a"}\n')
    with Experiment(config(tmp_path / "run")) as exp:
        with pytest.raises(DataError, match="line 1"):
            exp.source(str(tmp_path / "ift.jsonl"), IFTExample)
        with pytest.raises(DataError, match="no such file"):
            exp.source("data/seed/none.jsonl", IFTExample)
        assert len(exp.source("data/seed/ift.jsonl", IFTExample).read()) >= 64


def test_a_stage_can_be_run_again_by_hand_from_its_description(tmp_path: Path) -> None:
    with Experiment(config(tmp_path / "run")) as exp:
        made = exp.run(pairs.STAGE, 1, **inputs(tmp_path, (1.0, 4.0)))
    before = made.digest()
    (made.path / MANIFEST).unlink()
    assert worker.main(made.path, ["run"]) == 0
    assert made.digest() == before


def test_a_full_disk_is_said_in_words_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with Experiment(config(tmp_path / "run")) as exp:
        made = exp.run(pairs.STAGE, 1, **inputs(tmp_path, (1.0, 4.0)))
    (made.path / MANIFEST).unlink()
    data = (made.path / "data.jsonl").read_bytes()

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    assert worker.main(made.path, ["run"]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert (made.path / "data.jsonl").read_bytes() == data
    monkeypatch.undo()
    assert worker.main(made.path, ["run"]) == 0


def test_the_description_names_everything_that_decides_the_result(tmp_path: Path) -> None:
    with Experiment(config(tmp_path / "run")) as exp:
        made = exp.run(pairs.STAGE, 1, **inputs(tmp_path, (1.0, 4.0)))
    identity = json.loads((made.path / SPEC).read_text())["identity"]
    assert set(identity) == {
        "stage", "version", "iteration", "pairs.min_margin", "pairs.num_pairs", "pairs.rho", "pairs.rule",
        "input candidates", "input judgements",
    }  # fmt: skip


def test_wrong_missing_and_misspelt_inputs_are_refused_at_the_call_with_the_names_that_exist(tmp_path: Path) -> None:
    given = inputs(tmp_path, (1.0, 4.0))
    with Experiment(config(tmp_path / "run")) as exp:
        with pytest.raises(InputError, match=r"no input 'candidate'\. Its inputs are candidates, judgements"):
            exp.run(pairs.STAGE, 1, candidate=given["candidates"], judgements=given["judgements"])
        with pytest.raises(InputError, match=r"'judgements' is missing\. It needs candidates, judgements"):
            exp.run(pairs.STAGE, 1, candidates=given["candidates"])
        with pytest.raises(
            InputError, match="'judgements' must be a table or file of Judgement, but it is of Candidate"
        ):
            exp.run(pairs.STAGE, 1, candidates=given["candidates"], judgements=given["candidates"])
        with pytest.raises(InputError, match="'judge' must be a model, but it is of Candidate"):
            exp.run(judgements.STAGE, 1, judge=given["candidates"], candidates=given["candidates"])
        given_wrong = {"policy": BaseModel(tmp_path, "d"), "ift": SourceFile(tmp_path, IFTExample)}
        held_out = SourceFile(tmp_path, EFTExample)
        with pytest.raises(InputError, match="'earlier' must be a table or file of Prompt"):
            prompts.STAGE.inputs({**given_wrong, "eft_eval": held_out, "earlier": [given["candidates"]]})
    assert not list((tmp_path / "run").glob("iter_*")), "nothing was started"


def test_a_stage_without_engine_and_ranks_starts_no_job(tmp_path: Path) -> None:
    class Refuses:
        def run(self, job: Any) -> None:
            raise AssertionError(f"a job was started: {job.name}")

    with Experiment(config(tmp_path / "run")) as exp:
        exp._launcher = Refuses()
        assert exp.run(pairs.STAGE, 1, **inputs(tmp_path, (1.0, 4.0))).manifest() is not None


def test_a_description_with_a_setting_that_this_version_does_not_have_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"pairs\.best_of: Key 'best_of' not in 'PairsConfig'"):
        load({"run_dir": "x", "pairs": {"best_of": 3}}, Config)
