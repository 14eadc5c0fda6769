"""The stage that judges an iteration's answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_srl.artifacts import BaseModel, Table
from nemo_srl.config import Config, JudgeConfig
from nemo_srl.records import Candidate
from nemo_srl.stages import judgements
from tests import tiny
from tests.loopback import Loopback, ids_of
from tests.support import made, server


def candidates(count: int) -> list[Candidate]:
    return [
        Candidate(prompt_id=p, sample_index=i, prompt="Q", response=f"r{i}", num_tokens=1, finish_reason="stop")
        for p in ("p", "q")
        for i in range(count)
    ]


def test_the_stage_compares_and_publishes_ordinary_judgements(tmp_path: Path) -> None:
    def prefers_r1(body: dict[str, Any], index: int) -> tuple[list[int], str]:
        _, first, _ = body["messages"][0]["content"].split(maxsplit=2)
        return ids_of(f"Winner: {'A' if first == 'r1' else 'B'}"), "stop"

    table = Table(tmp_path / "candidates", {}, Candidate)
    table.publish(stage="candidates", digest=table.write(candidates(2)), metrics={}, seconds=0)
    policy = BaseModel(tiny.make_model(tmp_path / "model", ["Winner: A"], vocab_size=300), "digest")
    with Loopback(prefers_r1).running() as url:
        judge = JudgeConfig(
            rubric="{instruction} {response} Score:",
            mode="pairwise",
            pairwise_rubric="{instruction} {response_a} {response_b} Winner:",
            num_judgements=2,
            engine=server(url),
        )
        cfg = Config(judge=judge, run_dir=str(tmp_path))
        output, metrics = made(judgements.STAGE, cfg, tmp_path / "judgements", judge=policy, candidates=table)
    assert metrics == {"num_judgements": 16, "valid_rate": 1}
    scores = {c.key: [j.score for j in output.read() if j.candidate_key == c.key] for c in candidates(2)}
    assert scores == {"p/00": [0] * 4, "p/01": [5] * 4, "q/00": [0] * 4, "q/01": [5] * 4}
