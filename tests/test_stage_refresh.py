"""The refresh trains on verdicts of every iteration and on complete answers of the policy's own."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import toy_language as proof

from nemo_srl.artifacts import BaseModel, SourceFile, to_line
from nemo_srl.config import Config, JudgeConfig, RefreshConfig
from nemo_srl.records import Candidate
from nemo_srl.stages import Context, refresh

RUBRIC = "judge {instruction} answer {response} Score:"


def source(path: Path, records: list[Any]) -> SourceFile[Any]:
    path.write_text("".join(map(to_line, records)))
    return SourceFile(path, type(records[0]))


def test_rows_are_the_verdicts_of_all_iterations_and_complete_answers(tmp_path: Path) -> None:
    proof.write_model(tmp_path / "model", seed=1)
    rng = random.Random(1)
    instructions = rng.sample(proof.all_instructions(), 4)
    eft = [proof.judged(f"e{i}", x, proof.demonstration(rng, x, quality=0.6)) for i, x in enumerate(instructions)]
    own = [
        Candidate(
            prompt_id=f"p{i}", sample_index=0, prompt=str(x), response="ant .", num_tokens=3, finish_reason=reason
        )
        for i, (x, reason) in enumerate(zip(instructions, ("stop", "stop", "length", "stop"), strict=True))
    ]
    ctx = Context(
        cfg=Config(judge=JudgeConfig(rubric=RUBRIC), refresh=RefreshConfig(learning_rate=3e-4, max_epochs=7)),
        iteration=2,
        inputs=refresh.STAGE.inputs(
            {
                "policy": BaseModel(tmp_path / "model", "digest"),
                "own_answers": source(tmp_path / "own.jsonl", own),
                "eft": source(tmp_path / "eft.jsonl", eft[:1]),
                "kept": [
                    source(tmp_path / "eft_1.jsonl", eft[1:2]),
                    source(tmp_path / "eft_2.jsonl", eft[2:]),
                ],
            }
        ),
        output=SimpleNamespace(path=tmp_path),
    )
    task = refresh.task(ctx)
    assert task.algorithm == "sft"
    assert (task.optim.learning_rate, task.optim.max_epochs) == (3e-4, 7), "the settings of the refresh, not of SFT"
    responses = [row.response for row in task.rows]
    assert responses[:3] == ["ant ."] * 3
    assert responses[3:] == [f"{x.justification}\nScore: {x.score}" for x in eft]
