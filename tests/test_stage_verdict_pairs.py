"""Verdict pairs: answers of M_t and damaged copies of them, with verdicts that say which one is worse."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from nemo_srl import combinations
from nemo_srl.artifacts import BaseModel, SourceFile, Table, to_line
from nemo_srl.config import Config
from nemo_srl.data import texts
from nemo_srl.errors import ConfigError, DataError
from nemo_srl.judging.points import parse_score
from nemo_srl.protocols import DPORow
from nemo_srl.records import Candidate, EFTExample, FinishReason, Judgement, PreferencePair
from nemo_srl.stages import Context, policy, verdict_pairs
from tests.support import composed, made
from tests.tables import published
from tests.tiny import make_tokenizer

TEXTS = (
    "Rivers carry sand to the sea, and the sea grinds it for years. So beaches grow where the water is slow.",
    "A baker kneads the dough, lets it rest in a warm place, and bakes it at a high heat until it is brown.",
    "Owls hear a mouse under snow. Their ears sit at different heights, so they know where a sound comes from.",
)
SETTINGS = ("judge=checked_5pt", "verdict_pairs.num_prompts=3")


def candidate(number: int, text: str, sample_index: int = 0, reason: FinishReason = "stop") -> Candidate:
    return Candidate(
        prompt_id=f"p{number}", sample_index=sample_index, prompt=f"Question {number}?", response=text, num_tokens=9,
        finish_reason=reason,
    )  # fmt: skip


def run(directory: Path, cfg: Config, answers: Sequence[tuple[Candidate, float | None]]) -> Table[PreferencePair]:
    verdicts = [
        Judgement(candidate_key=c.key, judgement_index=0, verdict="", score=score) for c, score in answers
    ]  # fmt: skip
    table, _ = made(
        verdict_pairs.STAGE,
        cfg,
        directory / "verdict_pairs",
        candidates=published(directory, "candidates", Candidate, [c for c, _ in answers]),
        judgements=published(directory, "judgements", Judgement, verdicts),
    )
    return table


def test_the_answer_keeps_its_points_and_each_damage_costs_what_it_costs(tmp_path: Path) -> None:
    cfg = composed(*SETTINGS)
    pairs = run(tmp_path, cfg, [(candidate(i, text), 4.2) for i, text in enumerate(TEXTS)]).read()
    assert len(pairs) == 6
    costs = []
    for answer, worse in zip(pairs[::2], pairs[1::2], strict=True):
        key = answer.prompt_id.removesuffix("/answer")
        assert worse.prompt_id == f"{key}/damaged"
        number = int(key[1])
        assert TEXTS[number] in answer.prompt
        assert f"Question {number}?" in worse.prompt
        points, fewer = (parse_score(text, max_score=5) for text in (answer.chosen, answer.rejected))
        assert (worse.chosen, worse.rejected) == (answer.rejected, answer.chosen)
        assert points == 4, "the judge's own points, rounded"
        assert fewer is not None
        costs.append(points - fewer)
        assert answer.rejected_score == worse.rejected_score == fewer - points
        is_swapped = any(text in worse.prompt for text in TEXTS if text != TEXTS[number])
        is_cut = TEXTS[number] not in worse.prompt and TEXTS[number][:20] in worse.prompt
        assert is_swapped if costs[-1] == 3 else is_cut or texts.has_loop(worse.prompt)
    assert sorted(costs) == [1.0, 1.0, 3.0], "one of each kind"


def test_the_best_ended_answer_to_each_prompt_is_taken(tmp_path: Path) -> None:
    cfg = composed(*SETTINGS)
    answers = [
        (candidate(0, TEXTS[0]), 2.0), (candidate(0, TEXTS[1], 1), 4.0), (candidate(0, TEXTS[2], 2, "length"), 5.0),
        (candidate(0, "No score here, none at all.", 3), None),
    ]  # fmt: skip
    pairs = run(tmp_path, cfg, answers).read()
    assert [p.prompt_id for p in pairs] == ["p0/answer", "p0/damaged"]
    assert TEXTS[1] in pairs[0].prompt
    again = run(tmp_path / "again", cfg, answers)
    assert again.read() == pairs, "the seed decides what is damaged, and how"


def test_without_an_answer_that_can_lose_a_point_the_error_names_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none of 1 answers .* could be damaged.*verdict_pairs\.num_prompts=0"):
        run(tmp_path, composed(*SETTINGS), [(candidate(0, TEXTS[0]), 0.3)])


def test_dpo_trains_on_both_kinds_of_pairs(tmp_path: Path) -> None:
    def source(name: str, key: str) -> SourceFile[PreferencePair]:
        pair = PreferencePair(
            prompt_id=key, prompt="Name a prime.", chosen="7", rejected="8", chosen_score=5.0, rejected_score=1.0
        )
        (tmp_path / name).write_text(to_line(pair))
        return SourceFile(tmp_path / name, PreferencePair)

    make_tokenizer(tmp_path / "model", ["Name a prime."], vocab_size=300)
    inputs = {"policy": BaseModel(tmp_path / "model", "digest"), "pairs": source("pairs.jsonl", "a")}
    without = Context(Config(), 1, policy.STAGE.inputs(inputs), SimpleNamespace(path=tmp_path))
    inputs["verdict_pairs"] = source("verdicts.jsonl", "b")  # type: ignore[assignment]
    both = Context(Config(), 1, policy.STAGE.inputs(inputs), SimpleNamespace(path=tmp_path))
    assert [len(policy.task(ctx).rows) for ctx in (without, both)] == [1, 2]
    assert all(isinstance(row, DPORow) for row in policy.task(both).rows)


def test_a_judge_that_gives_reasons_or_compares_gets_no_verdict_pairs(tmp_path: Path) -> None:
    make_tokenizer(tmp_path, ["x"], vocab_size=300)
    reasons = [EFTExample(example_id="e1", instruction="a", response="b", justification="It is short.", score=2)]
    for overrides, message in (
        (SETTINGS, r"data\.eft_path teaches verdicts with reasons \(1 of 1 examples, the first is 'e1'\)"),
        ((*SETTINGS, "+judge_mode=pairwise"), r"judge\.mode='pairwise' gives none\. Set verdict_pairs\.num_prompts=0"),
    ):
        with pytest.raises(ConfigError, match=message):
            combinations.check_verdict_pairs(composed(*overrides), reasons)
