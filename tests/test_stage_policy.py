"""DPO trains on the pairs as they are, and knows which answers were cut off."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

from nemo_srl.artifacts import BaseModel, SourceFile
from nemo_srl.config import Config
from nemo_srl.protocols import DPORow
from nemo_srl.records import PreferencePair
from nemo_srl.stages import Context, policy
from tests.tiny import make_tokenizer

OLD = {
    "prompt_id": "p0", "prompt": "Name a prime.", "chosen": "7", "rejected": "8", "chosen_score": 5.0,
    "rejected_score": 1.0,
}  # fmt: skip
"""A line of a table that an older version wrote."""


def test_rows_say_which_answers_were_cut_off_and_answers_of_older_tables_count_as_ended(tmp_path: Path) -> None:
    lines = [OLD, {**OLD, "prompt_id": "p1", "chosen_finish_reason": "stop", "rejected_finish_reason": "length"}]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    make_tokenizer(tmp_path / "model", ["Name a prime."], vocab_size=300)
    inputs = {
        "policy": BaseModel(tmp_path / "model", "digest"),
        "pairs": SourceFile(tmp_path / "pairs.jsonl", PreferencePair),
    }
    ctx = Context(Config(), 1, policy.STAGE.inputs(inputs), SimpleNamespace(path=tmp_path))
    old, cut = policy.task(ctx).rows
    assert isinstance(old, DPORow)
    assert (old.chosen, old.chosen_reward, old.rejected, old.rejected_reward) == ("7", 5.0, "8", 1.0)
    assert (old.chosen_finish_reason, old.rejected_finish_reason) == ("stop", "stop")
    assert isinstance(cut, DPORow)
    assert (cut.chosen_finish_reason, cut.rejected_finish_reason) == ("stop", "length")


def test_pairs_of_earlier_iterations_and_pairs_of_verdicts_are_trained_as_well(tmp_path: Path) -> None:
    """`pairs.accumulate` and `verdict_pairs`. Each pair keeps its own confidence."""
    make_tokenizer(tmp_path / "model", ["Name a prime."], vocab_size=300)

    def table(name: str, chosen: str, **more: float) -> SourceFile[PreferencePair]:
        path = tmp_path / f"{name}.jsonl"
        path.write_text(json.dumps({**OLD, "chosen": chosen, **more}) + "\n")
        return SourceFile(path, PreferencePair)

    inputs = {
        "policy": BaseModel(tmp_path / "model", "digest"), "pairs": table("pairs", "7", confidence=0.75),
        "verdict_pairs": table("verdicts", "Score: 5"), "earlier": [table("t1", "2"), table("t2", "3")],
    }  # fmt: skip
    ctx = Context(Config(), 3, policy.STAGE.inputs(inputs), SimpleNamespace(path=tmp_path))
    found = [(row.chosen, row.confidence) for row in policy.task(ctx).rows if isinstance(row, DPORow)]
    assert found == [("2", 1.0), ("3", 1.0), ("7", 0.75), ("Score: 5", 1.0)]
