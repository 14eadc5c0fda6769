"""Checked data: damage is damage, and the committed files of `data/checked/` are what they are said to be."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean

import pytest

from nemo_srl import cli
from nemo_srl.artifacts import read_jsonl, to_line
from nemo_srl.config.generation import PromptsConfig
from nemo_srl.data.checked import damage, ifeval, rows
from nemo_srl.data.checked.build import MAX_ROUGE_L, CheckedSeed, LargeSeed
from nemo_srl.data.checked.constraints import KINDS
from nemo_srl.data.checked.instructions import Task
from nemo_srl.data.checked.truth import MAX_SCORE, CheckedInstruction, is_on_topic, true_score
from nemo_srl.data.damage import cut, in_reverse, looped, stuck
from nemo_srl.data.dedup import RougeLIndex
from nemo_srl.data.prompt_filter import PromptFilter
from nemo_srl.judging import reader
from nemo_srl.judging.expected import expected_score
from nemo_srl.judging.surface import cross_validated_accuracy, surface_accuracy
from nemo_srl.records import Candidate, EFTExample, IFTExample
from recipes import build_checked_seed
from tests.support import ROOT, composed

DATA = ROOT / "data/checked"
UNSEEN = {"shuffled", "echoed"}


OPTIONS = build_checked_seed.Options(input_dir=str(DATA), seed_dir=str(ROOT / "data/seed"))


@pytest.fixture(scope="module")
def seed() -> CheckedSeed:
    """What the generator makes from the committed input."""
    return build_checked_seed.build(OPTIONS)


@pytest.fixture(scope="module")
def large() -> LargeSeed:
    """The same for `large/`."""
    return build_checked_seed.build_large(OPTIONS)


@pytest.fixture(scope="module")
def instructions(seed: CheckedSeed) -> list[CheckedInstruction]:
    """Those with a good answer."""
    return [*seed.instructions["train"], *seed.instructions["held_out"]]


def lines(records: Sequence[object]) -> str:
    return "".join(map(to_line, records))


def test_the_committed_files_are_the_output_of_the_generator(seed: CheckedSeed, large: LargeSeed) -> None:
    tables: dict[str, Sequence[object]] = {"ift": seed.ift, "eft": seed.eft, "eft_eval": seed.eft_eval}
    tables |= {f"instructions_{split}": xs for split, xs in seed.instructions.items()}
    tables |= {f"prompts_{t}": prompts for t, prompts in enumerate(seed.prompts, start=1)}
    tables["ifeval_held_out"] = list(ifeval.prompts(seed.instructions["held_out"]))
    tables |= {"large/ift": large.ift, "large/eft": large.eft}
    tables |= {f"large/instructions_{r}": large.instructions[r - 1] for r in (2, 3, 4, 5)}
    stale = [name for name, records in tables.items() if (DATA / f"{name}.jsonl").read_text() != lines(records)]
    assert stale == [], "run recipes/build_checked_seed.py"
    written = {*DATA.rglob("*.jsonl")} - {DATA / f"{name}.jsonl" for name in tables}
    assert all(path.name == "tasks.jsonl" or path.name.startswith("answers_") for path in written)
    assert sum(path.stat().st_size for path in DATA.glob("*")) < 2_000_000
    assert sum(path.stat().st_size for path in DATA.glob("large/*")) < 7_000_000


def test_the_program_writes_what_stages_read(
    seed: CheckedSeed,
    large: LargeSeed,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(build_checked_seed, "build", lambda options: seed)
    monkeypatch.setattr(build_checked_seed, "build_large", lambda options: large)
    cli.run_program(build_checked_seed.Options, build_checked_seed.main, [f"output_dir={tmp_path}"])
    assert read_jsonl(tmp_path / "eft.jsonl", EFTExample) == seed.eft
    assert read_jsonl(tmp_path / "ift.jsonl", IFTExample) == seed.ift
    assert read_jsonl(tmp_path / "large/eft.jsonl", EFTExample) == large.eft
    assert read_jsonl(tmp_path / "instructions_held_out.jsonl", CheckedInstruction) == seed.instructions["held_out"]
    assert "surface baseline on eft_eval: 0." in capsys.readouterr().out


def test_sizes(seed: CheckedSeed) -> None:
    assert len(seed.instructions["train"]) >= 300
    assert len(seed.instructions["held_out"]) >= 60
    assert 1790 <= len(seed.eft) <= 1800
    assert len(seed.ift) == 120
    assert [len(prompts) >= 90 for prompts in seed.prompts] == [True, True]
    for split, xs in seed.instructions.items():
        used = Counter(c["kind"] for x in xs for c in x.constraints)
        assert set(used) == set(KINDS) - ({"avoids", "capital_word"} if split == "prompts" else set())
        assert min(used.values()) >= len(xs) / 20


def test_good_answers_are_perfect_and_training_sees_them(
    seed: CheckedSeed, instructions: list[CheckedInstruction]
) -> None:
    assert [x.key for x in instructions if true_score(x, x.response).score != MAX_SCORE] == []
    assert {(x.key, x.response) for x in seed.ift} <= {(x.key, x.response) for x in seed.instructions["train"]}


def test_splits_share_nothing(seed: CheckedSeed) -> None:
    texts = {split: [x.instruction for x in xs] for split, xs in seed.instructions.items()}
    tasks = {task.task_id: task for task in read_jsonl(DATA / "tasks.jsonl", Task)}
    plain: dict[str, list[str]] = defaultdict(list)
    for task in tasks.values():
        plain[task.split].append(task.instruction)
    for name in ("ift", "eft"):
        plain["train"] += [str(x.instruction) for x in read_jsonl(ROOT / f"data/seed/{name}.jsonl", RECORDS[name])]
    held_out = RougeLIndex(MAX_ROUGE_L, texts["held_out"])
    assert [t for t in texts["train"] + texts["prompts"] if held_out.is_duplicate(t)] == []
    without_constraints = RougeLIndex(MAX_ROUGE_L, plain["held_out"])
    near = [t for t in plain["train"] if without_constraints.is_duplicate(t)]
    assert near == []
    trained = {x.response for x in seed.eft} | {x.response for x in seed.ift}
    assert [x.key for x in seed.eft_eval if x.response in trained and x.category != "model"] == []


RECORDS: dict[str, type[IFTExample] | type[EFTExample]] = {"ift": IFTExample, "eft": EFTExample}


def test_prompts_are_new_and_pass_the_filter_of_generated_prompts(seed: CheckedSeed) -> None:
    first, second = ({p.prompt_id.rsplit("-", 1)[0] for p in prompts} for prompts in seed.prompts)
    assert not first & second
    keep = PromptFilter(
        # Two prompts of a task differ in their constraints alone, and `Use the word "music"` is allowed.
        PromptsConfig(max_rouge_l=0.95, blocked_words=[]),
        seed=[x.instruction for x in seed.ift],
        held_out=[x.instruction for x in seed.eft_eval],
    )
    reasons = [keep.reason_to_drop(p.text) for prompts in seed.prompts for p in prompts]
    assert [r for r in reasons if r is not None] == []


def test_large_has_more_of_the_same_kind_and_nothing_that_is_held_out(seed: CheckedSeed, large: LargeSeed) -> None:
    assert len(large.eft) > 11_500
    assert len(large.ift) == 400
    assert {x.key for x in seed.eft} <= {x.key for x in large.eft}
    for records in (large.eft, large.ift, [x for xs in large.instructions for x in xs]):
        assert len({x.key for x in records}) == len(records)
    assert len({(x.instruction, x.response) for x in large.eft}) == len(large.eft)
    texts = {x.instruction for x in [*large.eft, *large.ift]}
    assert texts == {x.instruction for xs in large.instructions for x in xs}
    others = [x.instruction for split in ("held_out", "prompts") for x in seed.instructions[split]]
    known = RougeLIndex(MAX_ROUGE_L, others)
    assert [text for text in texts if known.is_duplicate(text)] == []
    trained = {x.response for x in [*large.eft, *large.ift]}
    assert [x.key for x in seed.eft_eval if x.response in trained and x.category != "model"] == []
    kinds = Counter(x.category for x in large.eft)
    assert not UNSEEN & set(kinds)
    assert kinds["model"] > 1000
    accuracy = surface_accuracy(large.eft, seed.eft_eval, max_score=MAX_SCORE)
    assert accuracy.value < 0.6


def test_every_score_is_what_code_finds_in_the_text(
    seed: CheckedSeed, large: LargeSeed, instructions: list[CheckedInstruction]
) -> None:
    by_text = {x.instruction: x for x in [*instructions, *(x for xs in large.instructions for x in xs)]}
    for example in [*seed.eft, *seed.eft_eval, *large.eft]:
        true = true_score(by_text[example.instruction], example.response)
        if example.category in damage.REORDERED:  # code cannot see that the words make no sense
            true = type(true)(**asdict(true) | dict.fromkeys(damage.LOST["shuffled"], False))
        assert example.score == true.score, example.key
        kinds = example.category.replace("cut_early", "cut").split("+")
        lost = set().union(*(damage.LOST.get(kind, set()) for kind in kinds))
        assert not any(getattr(true, point) for point in lost), example.key
        assert example.justification == ""


def test_damage_takes_what_it_says(instructions: list[CheckedInstruction]) -> None:
    rng = random.Random(1)
    attempts, successes = Counter[str](), Counter[str]()
    for x in rng.sample(instructions, 150):
        others = [y.response for y in instructions if y.task_id != x.task_id]
        for s in rows.samples(x, [], others, [], rng):
            if s.kind == "intact":
                assert s.true.score == MAX_SCORE
            else:
                assert s.true.score < MAX_SCORE, (s.kind, s.text)
                assert s.text != x.response
        for constraint in x.checks:
            attempts[constraint.kind] += 1
            if (text := damage.broken(x, x.response, constraint, rng)) is not None:
                successes[constraint.kind] += 1
                lost = damage.lost_by_breaking(x, constraint)
                assert {p for p, there in asdict(true_score(x, text)).items() if not there} == lost
    assert {kind: n for kind, n in attempts.items() if successes[kind] < n / 2} == {}
    assert set(attempts) == set(KINDS)


def test_each_damage_by_hand() -> None:
    rng = random.Random(1)
    answer = "Yeast makes gas. The gas lifts the dough, and the bread gets light."
    for _ in range(20):
        text = cut(answer, rng)
        assert text is not None
        assert answer.startswith(text)
        assert 3 <= len(text.split()) < len(answer.split())
        assert text[-1].isalpha()
        assert sorted(damage.shuffled(answer, rng).replace(".", "").replace(",", "").split()) == sorted(
            answer.replace(".", "").replace(",", "").split()
        )
        loop = looped(answer, rng)
        assert loop is not None
        assert len(loop.split()) > 5
        assert stuck(answer, rng).split()[:4] == answer.split()[:4]  # type: ignore[union-attr]
    assert cut("One two three.", rng) is None
    assert stuck("One two three.", rng) is None
    assert in_reverse("One, two. Three!") == "Three, two. One!"
    assert [m for m in damage.shuffled(answer, rng) if not m.isalnum() and m != " "] == [".", ",", "."]
    assert damage.without_item("1. A\n2. B\n3. C\nThat is all.", random.Random(2)) in (
        "1. B\n2. C\nThat is all.",
        "1. A\n2. C\nThat is all.",
        "1. A\n2. B\nThat is all.",
    )
    assert damage.without_item("- A\n- B", rng) is None


def test_two_kinds_of_damage_are_held_out(seed: CheckedSeed) -> None:
    trained, measured = (Counter(x.category for x in xs) for xs in (seed.eft, seed.eft_eval))
    assert not UNSEEN & set(trained)
    assert min(measured[kind] for kind in UNSEEN) >= 20
    assert {"intact", "mismatched", "broken", "swapped", "cut", "looped", "model", "asked", "reversed"} <= set(trained)
    assert {"stuck", "cut_early", "swapped+stuck", "swapped+cut_early"} <= set(trained)
    # Questions of the other seed ask for more than code checks, so a model's answer to them has no known score.
    own = [x.example_id for x in seed.eft if x.category.startswith("model")]
    assert len(own) >= 100
    assert all(key.startswith("train-") for key in own)


def test_the_held_out_set_has_four_answers_each_and_half_are_models_own(seed: CheckedSeed) -> None:
    groups: dict[str, list[EFTExample]] = defaultdict(list)
    for x in seed.eft_eval:
        groups[x.instruction].append(x)
    assert {len(group) for group in groups.values()} == {4}
    assert {len({x.response for x in group}) for group in groups.values()} == {4}
    assert min(len({x.score for x in group}) for group in groups.values()) >= 2
    assert sum(x.category == "model" for x in seed.eft_eval) >= 0.49 * len(seed.eft_eval)
    assert list(groups) != sorted(groups)  # the first groups can stand for all


def test_surface_says_little_about_the_score(seed: CheckedSeed) -> None:
    fitted = surface_accuracy(seed.eft, seed.eft_eval, max_score=MAX_SCORE)
    own = cross_validated_accuracy(seed.eft_eval, max_score=MAX_SCORE)
    for found in (fitted, own):
        assert found.value is not None
        assert found.value < 0.6


def test_each_training_instruction_has_a_perfect_answer_and_others_that_are_worse(seed: CheckedSeed) -> None:
    groups: dict[str, list[EFTExample]] = defaultdict(list)
    for x in seed.eft:
        groups[x.instruction].append(x)
    assert Counter(len(group) for group in groups.values()).most_common(1)[0][0] == 6
    assert min(len(group) for group in groups.values()) >= 5
    assert {max(x.score for x in group) for group in groups.values()} == {MAX_SCORE}
    assert fmean(min(x.score for x in group) <= 2 for group in groups.values()) > 0.7
    assert all(len({x.response for x in group}) == len(group) for group in groups.values())


def test_the_check_of_topics_tells_good_answers_from_those_to_other_tasks(
    instructions: list[CheckedInstruction],
) -> None:
    rng = random.Random(1)
    pairs = [(x, y) for x in instructions for y in rng.sample(instructions, 10) if x.task_id != y.task_id]
    assert fmean(is_on_topic(x, y.response) for x, y in pairs) < 0.02
    assert all(is_on_topic(x, x.response) for x in instructions)


def test_answers_to_instructions_that_changed_are_not_used(seed: CheckedSeed) -> None:
    known = {x.instruction for xs in seed.instructions.values() for x in xs}
    found = [a for path in sorted(DATA.glob("answers_*.jsonl")) for a in read_jsonl(path, Candidate)]
    assert fmean(a.prompt in known for a in found) > 0.95, "ask the model again (data/checked/README.md)"


def test_the_rubric_teaches_and_reads_a_score_alone(seed: CheckedSeed) -> None:
    judge = composed("judge=checked_5pt").judge
    found = reader(judge)
    found.check(judge)
    prompt, verdict = found.lesson(seed.eft[0], judge)
    assert verdict == f"Score: {seed.eft[0].score}"
    assert seed.eft[0].response in prompt
    read = expected_score("Score: 4", [(7, {"4": -0.5108256, "2": -0.9162907})], max_score=judge.max_score)
    assert read.value == pytest.approx(0.6 * 4 + 0.4 * 2)
