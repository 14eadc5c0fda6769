"""What EFT teaches the judge is what its verdicts are read for, in every reader."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from house_guest.reader import READER

from nemo_srl.artifacts import BaseModel, SourceFile
from nemo_srl.config import JudgeConfig
from nemo_srl.judging import READERS, VerdictReader
from nemo_srl.judging.points import STATED
from nemo_srl.records import Completion, EFTExample, RankedAnswers
from nemo_srl.stages import eft
from tests.extending.guest import Guest
from tests.support import composed, made

RUBRICS = {"house_guest": "{instruction} {response} Grade:", "nemo_srl": "{instruction} {response} Score:"}


@pytest.mark.parametrize("reader", [*READERS.values(), READER], ids=[*READERS, "guest"])
@pytest.mark.parametrize("score", [0, 3, 5])
def test_a_lesson_holds_its_own_justification(reader: VerdictReader, score: int) -> None:
    cfg = JudgeConfig(rubric=RUBRICS[type(reader).__module__.split(".")[0]])
    example = EFTExample(example_id="x", instruction="Q", response="A", justification="Half of it.", score=score)
    prompt, verdict = reader.lesson(example, cfg)
    assert "Q A" in prompt
    assert reader.justification(verdict) == "Half of it."


@pytest.mark.parametrize("reader", [STATED, READER], ids=["points", "letters"])
@pytest.mark.parametrize("score", [0, 3, 5])
def test_a_lesson_is_read_as_the_score_that_it_teaches(reader: VerdictReader, score: int) -> None:
    cfg = JudgeConfig(rubric="any")
    example = EFTExample(example_id="x", instruction="Q", response="A", justification="Half of it.", score=score)
    _, verdict = reader.lesson(example, cfg)
    said = [
        Completion(request_key="x", index=0, text=verdict, num_tokens=3, finish_reason="stop"),
        Completion(request_key="x", index=1, text=verdict, num_tokens=3, finish_reason="length"),
        Completion(request_key="x", index=2, text="I will not say.", num_tokens=3, finish_reason="stop"),
    ]
    found = reader.judgements({"x": ("Q", "A")}, {"x": said}, cfg)
    assert [j.score for j in found] == [score, None, None], "cut off, and without a score, nothing is read"


@pytest.mark.usefixtures("_registered")
def test_verdicts_that_agree_with_people_are_kept_without_their_letter(tmp_path: Path, guest: Guest) -> None:
    path = tmp_path / "rankings.jsonl"
    rows = [{"example_id": f"r{i}", "instruction": "Q", "responses": ["a", "b"], "ranks": [0, 1]} for i in range(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = ("engine", "engine.words", "judge.mode", "judge.rubric", "judge.max_tokens")
    cfg = composed(*(f"{name}={guest.overrides[name]}" for name in names), "refresh.num_judgements=9")
    kept, metrics = made(
        eft.STAGE, cfg, tmp_path / "eft", judge=BaseModel(guest.model, "d"), rankings=SourceFile(path, RankedAnswers)
    )
    assert metrics["valid_rate"] == 1
    assert kept.read()
    assert not [x for x in kept.read() if "Grade" in x.justification or not x.justification]
