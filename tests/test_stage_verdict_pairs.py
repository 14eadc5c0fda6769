"""Verdict pairs: answers of M_t and damaged copies of them, with verdicts that say which one is worse."""

from __future__ import annotations

import re
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
    "A compass needle is a small magnet, and the Earth is a large one. So the needle turns until it points north.",
    "Bees dance to tell the others where the flowers are. The angle of the dance shows the way from the sun.",
    "Glass is made of sand that was melted with soda. If it cools quickly, no crystals grow, and light passes.",
)
SETTINGS = ("judge=checked_5pt", "verdict_pairs.num_prompts=6")


def candidate(number: int, text: str, sample_index: int = 0, reason: FinishReason = "stop") -> Candidate:
    return Candidate(
        prompt_id=f"p{number}", sample_index=sample_index, prompt=f"Question {number}?", response=text, num_tokens=9,
        finish_reason=reason,
    )  # fmt: skip


def run(
    directory: Path, cfg: Config, answers: Sequence[tuple[Candidate, float | None]], *,
    seed: Sequence[EFTExample] = (), iteration: int = 1,
) -> Table[PreferencePair]:  # fmt: skip
    verdicts = [
        Judgement(candidate_key=c.key, judgement_index=0, verdict="", score=score) for c, score in answers
    ]  # fmt: skip
    table, _ = made(
        verdict_pairs.STAGE,
        cfg,
        directory / "verdict_pairs",
        candidates=published(directory, "candidates", Candidate, [c for c, _ in answers]),
        judgements=published(directory, "judgements", Judgement, verdicts),
        eft=published(directory, "eft", EFTExample, seed) if seed else None,
        iteration=iteration,
    )
    return table


def test_the_answer_keeps_its_points_and_each_damage_costs_what_it_costs(tmp_path: Path) -> None:
    cfg = composed(*SETTINGS)
    pairs = run(tmp_path, cfg, [(candidate(i, text), 4.2) for i, text in enumerate(TEXTS)]).read()
    assert len(pairs) == 12
    kinds = []
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
        assert answer.rejected_score == worse.rejected_score == fewer - points
        kinds.append((damage_in(worse.prompt, number), fewer))
    assert sorted(kinds) == [
        ("asked", 2.0), ("cut", 3.0), ("looped", 3.0), ("reversed", 2.0), ("stuck", 3.0), ("swapped", 2.0)
    ], "one of each kind"  # fmt: skip


def damage_in(prompt: str, number: int) -> str:
    """The damage that is seen in the response to question `number`."""
    response = prompt.split("Response: ")[1].split("\nScore:")[0]
    own = TEXTS[number]
    if any(text == response for text in TEXTS if text != own):
        return "swapped"
    if response.startswith("Question "):
        assert response != f"Question {number}?"
        return "asked"
    if response.lower().split()[0].strip(".,") == own.lower().split()[-1].strip(".,"):
        return "reversed"
    assert response.startswith(own.split()[0])
    if not texts.has_loop(response):
        assert own.startswith(response)
        return "cut"
    return "stuck" if set(texts.plain_words(response)) <= set(texts.plain_words(own)[:8]) else "looped"


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


def test_iterations_take_turns_through_the_eft_examples(tmp_path: Path) -> None:
    """Each makes a pair: its own score is better than another one."""
    cfg = composed(*SETTINGS, "verdict_pairs.num_seed=2")
    seed = [
        EFTExample(example_id=f"e{i}", instruction=f"Question {i}?", response=f"Answer {i}.", justification="", score=i)
        for i in range(3)
    ]
    taken = []
    for t in (1, 2, 3):
        answers = [(candidate(i, text), 4.2) for i, text in enumerate(TEXTS)]
        found = run(tmp_path / str(t), cfg, answers, seed=seed, iteration=t).read()
        pairs = [p for p in found if p.prompt_id.endswith("/seed")]
        assert len(found) == 12 + len(pairs)
        for p in pairs:
            right, wrong = (parse_score(text, max_score=5) for text in (p.chosen, p.rejected))
            assert (right, f"Answer {right:.0f}." in p.prompt) == (int(p.prompt_id[1]), True)
            assert wrong is not None
            assert p.rejected_score == -abs(right - wrong) < 0
        taken += [p.prompt_id for p in pairs]
    assert sorted(taken) == [key for i in range(3) for key in [f"e{i}/seed"] * 2]
    assert set(taken[:2]) != set(taken[2:4]) != set(taken[4:])


def test_the_eft_examples_of_an_instruction_come_in_one_iteration(tmp_path: Path) -> None:
    cfg = composed(*SETTINGS, "verdict_pairs.num_seed=3")
    seed = [
        EFTExample(example_id=f"e{i}", instruction=f"Question {i % 4}?", response="A.", justification="", score=i % 5)
        for i in range(12)
    ]
    pairs = verdict_pairs.seed_pairs(seed, cfg, 2)
    numbers = [int(p.prompt_id.removeprefix("e").removesuffix("/seed")) for p in pairs]
    assert len(numbers) == 3
    assert len({number % 4 for number in numbers}) == 1


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
    weighted = Context(composed("dpo.verdict_weight=5"), 1, policy.STAGE.inputs(inputs), SimpleNamespace(path=tmp_path))
    assert [row.sft_weight for row in policy.task(weighted).rows] == [1.0, 5.0]  # type: ignore[union-attr]
    apart = Context(composed("dpo.compare_verdicts=false"), 1, weighted.inputs, SimpleNamespace(path=tmp_path))
    assert [row.compared for row in policy.task(both).rows] == [True, True]  # type: ignore[union-attr]
    assert [row.compared for row in policy.task(apart).rows] == [True, False]  # type: ignore[union-attr]
    assert all(isinstance(row, DPORow) for row in policy.task(both).rows)


def test_a_judge_that_gives_reasons_or_compares_gets_no_verdict_pairs(tmp_path: Path) -> None:
    make_tokenizer(tmp_path, ["x"], vocab_size=300)
    reasons = [EFTExample(example_id="e1", instruction="a", response="b", justification="It is short.", score=2)]
    for overrides, message in (
        (
            (*SETTINGS, "judge.justification=true", "judge.begin_verdict=false"),
            r"data\.eft_path teaches verdicts with reasons \(1 of 1 examples, the first is 'e1'\)",
        ),
        ((*SETTINGS, "+judge_mode=pairwise"), r"judge\.mode='pairwise' gives none\. Set verdict_pairs\.num_prompts=0"),
    ):
        with pytest.raises(ConfigError, match=message):
            combinations.check_verdict_pairs(composed(*overrides), reasons)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("dpo.verdict_weight=5", r"dpo\.verdict_weight=5\.0: .* Set dpo\.verdict_weight=1, or"),
        ("dpo.compare_verdicts=false", r"dpo\.compare_verdicts=false: .* Set dpo\.compare_verdicts=true, or"),
    ],
)
def test_what_is_about_a_likelihood_of_verdicts_is_refused_without_one(setting: str, message: str) -> None:
    for overrides in ((setting, "dpo.sft_loss_weight=1"), (*SETTINGS, setting)):
        with pytest.raises(ConfigError, match=message):
            combinations.check_verdict_pairs(composed(*overrides), [])
    combinations.check_verdict_pairs(composed(*SETTINGS, setting, "dpo.sft_loss_weight=1"), [])


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (("verdict_pairs.num_prompts=0",), "verdict_pairs.num_prompts=0 makes no pairs of verdicts"),
        (("verdict_pairs.source=sampled",), "verdict_pairs.source='sampled' is about M_t's own verdicts"),
        ((), "data.eft_path names no examples"),
    ],
)
def test_pairs_of_eft_examples_that_could_not_be_made_are_refused(overrides: tuple[str, ...], reason: str) -> None:
    cfg = composed(*SETTINGS, "verdict_pairs.num_seed=2", *overrides)
    with pytest.raises(ConfigError, match=rf"verdict_pairs\.num_seed=2.*{re.escape(reason)}.*num_seed=0"):
        combinations.check_verdict_pairs(cfg, [])
