"""Published tables that stages read."""

from __future__ import annotations

from pathlib import Path

from nemo_srl.artifacts import Table
from nemo_srl.records import Candidate, R


def published(directory: Path, name: str, record: type[R], rows: list[R]) -> Table[R]:
    """`rows` as the stage `name` would publish them, in `directory/name`."""
    table = Table(directory / name, {}, record)
    table.publish(stage=name, digest=table.write(rows), metrics={}, seconds=0)
    return table


def answers_to(directory: Path, *answers: tuple[str, str, str]) -> Table[Candidate]:
    """Published candidates, one for each (prompt_id, prompt, response)."""
    rows = [
        Candidate(prompt_id=key, sample_index=0, prompt=prompt, response=text, num_tokens=2, finish_reason="stop")
        for key, prompt, text in answers
    ]
    return published(directory, "candidates", Candidate, rows)
