"""Messages name a remedy that the run accepts. These tests do what a message says, and start again."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nemo_srl import lineage, worker
from nemo_srl.artifacts import JOURNAL, MANIFEST, SPEC, BaseModel, SourceFile
from nemo_srl.config import CandidatesConfig, Config, JudgeConfig, SFTConfig
from nemo_srl.errors import ConfigError, DataError, NoPairsError, StaleArtifactError
from nemo_srl.experiment import Experiment
from nemo_srl.protocols import Job
from nemo_srl.records import EFTExample, IFTExample, Metric, PreferencePair, Prompt
from nemo_srl.stages import candidates, evaluation, judgements, pairs, sft
from tests import tiny
from tests.loopback import Loopback, ids_of
from tests.support import server

HELD_OUT = [
    EFTExample(example_id=f"h{i}", instruction="Name a color.", response=f"Red {i}.", justification="So.", score=i)
    for i in range(3)
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    return BaseModel(tiny.make_model(tmp_path_factory.mktemp("model") / "hf", ["Score: 4"], vocab_size=300), "digest")


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(vars(row)) + "\n" for row in rows))
    return path


class FickleJudge:
    """Answers differently each time, and gives all answers the same score until it `sees`."""

    sees = False

    def __call__(self, body: dict[str, Any], index: int) -> tuple[list[int], str]:
        text = body["messages"][-1]["content"]
        if "Score:" not in text:
            return ids_of(f"Answer {index}."), "stop"
        return ids_of(f"Score: {re.findall(r'(?:Answer|Red) ([0-9])', text)[0] if self.sees else 3}"), "stop"


@pytest.fixture
def judge() -> Iterator[tuple[FickleJudge, Loopback, str]]:
    reply = FickleJudge()
    loopback = Loopback(reply)
    with loopback.running() as url:
        yield reply, loopback, url


class Here:
    """Runs the steps of a job in this process, because to start a process takes seconds."""

    def run(self, job: Job) -> None:
        for step in job.steps:
            _, _, stage_dir, *names = step.command
            worker.run_steps(Path(stage_dir), names)


def settings(run_dir: Path, url: str) -> Config:
    rubric = "{instruction} {response} Score:"
    return Config(
        run_dir=str(run_dir),
        engine=server(url, model="m"),
        judge=JudgeConfig(rubric=rubric, num_judgements=2),
        candidates=CandidatesConfig(num_samples=3),
    )


def loop(cfg: Config, directory: Path, model: BaseModel) -> list[PreferencePair]:
    """The stages of the loop up to the pairs of its first iteration. Instead of trainings, there is one model."""
    prompts = [Prompt(prompt_id=f"p{i}", text=f"Say {i}.") for i in range(2)]
    x = SourceFile(write_rows(directory / "prompts.jsonl", prompts), Prompt)
    held_out = SourceFile(write_rows(directory / "held_out.jsonl", HELD_OUT), EFTExample)
    with Experiment(cfg) as exp:
        exp._launcher = Here()
        exp.run(evaluation.STAGE, 0, policy=model, eft_eval=held_out)
        y = exp.run(candidates.STAGE, 1, policy=model, prompts=x)
        r = exp.run(judgements.STAGE, 1, judge=model, candidates=y)
        return exp.run(pairs.STAGE, 1, candidates=y, judgements=r).read()


def named_for_deletion(message: str) -> list[Path]:
    (line,) = [line for line in message.splitlines() if "rm -r" in line]
    return [Path(path) for path in shlex.split(line[line.index("rm -r") :])[2:]]


def test_after_no_pairs_the_named_stages_are_deleted_and_the_run_goes_on(
    tmp_path: Path, model: BaseModel, judge: tuple[FickleJudge, Loopback, str]
) -> None:
    reply, _, url = judge
    run_dir = tmp_path / "run"
    cfg = settings(run_dir, url)
    with pytest.raises(NoPairsError) as e:
        loop(cfg, tmp_path, model)
    (line,) = [line for line in str(e.value).splitlines() if "judge.num_judgements (now 2)" in line]
    first = lineage.with_settings(run_dir, ["judge.num_judgements"])
    assert [str(path.relative_to(run_dir)) for path in first] == ["iter_00/evaluation", "iter_01/judgements"]

    reply.sees = True
    more = replace(cfg, judge=replace(cfg.judge, num_judgements=3))
    with pytest.raises(StaleArtifactError) as stale:
        loop(more, tmp_path, model)
    assert set(named_for_deletion(str(stale.value))) >= {run_dir / "iter_00"}

    # What the first message names also has the candidates, because it allows to change `candidates.num_samples`.
    for path in named_for_deletion(line):
        shutil.rmtree(path)
    assert len(loop(more, tmp_path, model)) == 2


@pytest.mark.parametrize("setting", ["candidates.temperature", "pairs.min_margin", "judge.num_judgements"])
def test_a_changed_setting_is_refused_until_exactly_the_named_stages_are_gone(
    tmp_path: Path, model: BaseModel, judge: tuple[FickleJudge, Loopback, str], setting: str
) -> None:
    reply, loopback, url = judge
    reply.sees = True
    cfg = settings(tmp_path / "run", url)
    made = loop(cfg, tmp_path, model)
    section, name = setting.split(".")
    part = getattr(cfg, section)
    changed = replace(cfg, **{section: replace(part, **{name: getattr(part, name) + 1})})  # type: ignore[arg-type]
    with pytest.raises(StaleArtifactError, match=f"{setting}: ") as e:
        loop(changed, tmp_path, model)
    named, num_calls = named_for_deletion(str(e.value)), loopback.num_calls
    for path in named:
        shutil.rmtree(path)
    kept = {path.parent for path in (tmp_path / "run").glob(f"iter_*/*/{MANIFEST}")}
    before = {path: (path / MANIFEST).stat().st_mtime_ns for path in kept}
    assert [p.key for p in loop(changed, tmp_path, model)] == [p.key for p in made]
    assert {path: (path / MANIFEST).stat().st_mtime_ns for path in kept} == before, "what is not named stays"
    assert bool(kept) == (setting != "candidates.temperature")
    assert loopback.num_calls > num_calls


def test_a_stage_that_has_made_nothing_begins_anew_with_other_settings(tmp_path: Path, model: BaseModel) -> None:
    """SFT is refused for too few rows. Its message names a setting, and nothing needs to be deleted."""
    rows = [IFTExample(example_id=f"i{i}", instruction="Name a color.", response="Red.") for i in range(3)]
    ift = SourceFile(write_rows(tmp_path / "ift.jsonl", rows), IFTExample)
    trained = SFTConfig(global_batch_size=16, max_seq_length=128)
    cfg = Config(run_dir=str(tmp_path / "run"), sft=trained, judge=JudgeConfig(rubric="{instruction}{response}Score:"))

    def prepare(cfg: Config) -> None:
        """The first step of SFT, in this process."""
        with Experiment(cfg) as exp:
            given = sft.STAGE.inputs({"policy": model, "ift": ift})
            output = sft.STAGE.output(exp.run_dir / "iter_00" / "sft", exp._identity(sft.STAGE, 0, given))
            lineage.forget_begun(output.path)
            assert not output.is_published()
            worker.describe(sft.STAGE, cfg, 0, given, output)
            worker.run_steps(output.path, ["prepare"])

    with pytest.raises(ConfigError, match=r"only 3 training rows") as e:
        prepare(cfg)
    size = int(re.findall(r"set sft\.global_batch_size to at most (\d+)", str(e.value))[0])
    prepare(replace(cfg, sft=replace(trained, global_batch_size=size)))
    with pytest.raises(StaleArtifactError, match="was begun"):  # now there is work
        prepare(cfg)


def test_rows_that_are_all_too_long_name_the_length_that_fits(tmp_path: Path) -> None:
    from nemo_srl.models import hf
    from nemo_srl.trainers.nemo_aligner import feasibility
    from nemo_srl.trainers.nemo_aligner.data import DataStatistics
    from nemo_srl.trainers.nemo_aligner.settings import NemoAlignerSettings

    spec = hf.read_spec(tiny.make_model(tmp_path / "hf", ["a"], vocab_size=300))
    none = DataStatistics(num_rows=0, num_rows_too_long=4, shortest_too_long=77)
    with pytest.raises(ConfigError, match=r"max_seq_length=64: all 4 .*shortest has 77 tokens") as e:
        feasibility.check(SFTConfig(max_seq_length=64), NemoAlignerSettings(), spec=spec, train=none)
    assert "global_batch_size" not in str(e.value)
    assert "Set it to 77 or more" in str(e.value)
    with pytest.raises(ConfigError, match=r"sft: there are no training rows\. Give more rows \(data\.ift_path"):
        feasibility.check(SFTConfig(), NemoAlignerSettings(), spec=spec, train=DataStatistics(num_rows=0))
    for num_rows, devices, micro in ((7, 2, 2), (3, 2, 2), (1, 4, 1)):
        trainer, few = NemoAlignerSettings(devices=devices, micro_batch_size=micro), DataStatistics(num_rows=num_rows)
        with pytest.raises(ConfigError, match="not enough for one step") as e:
            feasibility.check(SFTConfig(global_batch_size=16), trainer, spec=spec, train=few)
        named = {key: int(value) for key, value in re.findall(r"(\w+_batch_size)(?: to at most |=)(\d+)", str(e.value))}
        size = int(re.findall(r"set sft\.global_batch_size(?: to at most |=)(\d+)", str(e.value))[0])
        ranks = re.findall(r"on (\d+) data-parallel", str(e.value))
        trainer = replace(trainer, micro_batch_size=named.get("micro_batch_size", micro))
        trainer = replace(trainer, devices=int(ranks[0]) if ranks else devices)
        feasibility.check(SFTConfig(global_batch_size=size), trainer, spec=spec, train=few)


def test_a_damaged_file_of_a_run_names_what_to_delete(
    tmp_path: Path, model: BaseModel, judge: tuple[FickleJudge, Loopback, str]
) -> None:
    reply, loopback, url = judge
    reply.sees = True
    cfg = settings(tmp_path / "run", url)
    made = loop(cfg, tmp_path, model)
    stage = tmp_path / "run" / "iter_01" / "judgements"
    for name, content in ((MANIFEST, b'{"stage": "ju'), (MANIFEST, b"[" * 100_000), (SPEC, b"\xff{}")):
        if name == SPEC:
            (stage / MANIFEST).unlink()
        (stage / name).write_bytes(content)
        with pytest.raises(DataError, match=rf"{name}: damaged \(.*\)\. Delete {stage}\. The next start makes") as e:
            loop(cfg, tmp_path, model)
        assert "\n" not in str(e.value)
        shutil.rmtree(stage)
        assert loop(cfg, tmp_path, model) == made
    # A line in the middle of a journal: only its call is made again.
    (stage / MANIFEST).unlink()
    lines = (stage / JOURNAL).read_bytes().splitlines(keepends=True)
    lines[2] = b'{"request_key": "p\x00\xff\n'
    (stage / JOURNAL).write_bytes(b"".join(lines))
    with pytest.raises(DataError, match=r"journal\.jsonl, line 3: damaged \(.*\)\. Remove this line"):
        loop(cfg, tmp_path, model)
    (stage / JOURNAL).write_bytes(b"".join(lines[:2] + lines[3:]))
    num_calls = loopback.num_calls
    assert loop(cfg, tmp_path, model) == made
    assert loopback.num_calls == num_calls + 1


def test_nan_is_never_written_and_is_read_as_null(tmp_path: Path) -> None:
    from nemo_srl.artifacts import Table

    table = Table(tmp_path, {}, Metric)
    table.write([Metric(name="a", value=float("nan"), n=3, low=float("-inf"), high=0.5)])
    assert '"value": null' in (tmp_path / "data.jsonl").read_text()
    assert table.read()[0] == Metric(name="a", value=None, n=3, low=None, high=0.5)
    (tmp_path / "data.jsonl").write_text('{"name": "a", "value": NaN, "n": 1, "low": -Infinity, "high": null}\n')
    assert table.read()[0].value is None
    table.publish(stage="s", digest="d", metrics={"x": float("nan")}, seconds=1.0)
    assert "NaN" not in (tmp_path / MANIFEST).read_text()
