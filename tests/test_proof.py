"""The toy language of the proof, what its arms change, what the oracle measures, and the claims that are checked."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import prove
import pytest
import toy_language
from proof_arms import shuffled

from nemo_srl.artifacts import read_jsonl
from nemo_srl.chat import ChatTemplate
from nemo_srl.judging import points, rubrics
from nemo_srl.models import hf
from nemo_srl.records import EFTExample, IFTExample, Judgement, Prompt, RankedAnswers

ASKED = "4 animal tiny huge !"
RUBRIC = "judge {instruction} answer {response} Score:"


@pytest.mark.parametrize(
    ("response", "missed"),
    [
        ("bee cat pig elk !", ()),
        ("bee cat elk !", (0,)),
        ("bee cat judge pig elk !", (0,)),
        ("bee plum pig elk !", (1,)),
        ("bee cat cat elk !", (1,)),
        ("pig cat bee elk !", (2,)),
        ("bee cat elk pig !", (3,)),
        ("bee cat pig elk ?", (4,)),
        ("bee cat ! pig elk !", (4,)),
        ("", (0, 1, 2, 3, 4)),
    ],
)
def test_each_criterion_is_worth_one_point(response: str, missed: tuple[int, ...]) -> None:
    verdict = toy_language.oracle_verdict(ASKED, response)
    assert [i for i, met in enumerate(verdict) if not met] == list(missed)
    assert toy_language.oracle_score(ASKED, response) == 5 - len(missed)


@pytest.mark.parametrize(("quality", "score"), [(0.0, 0), (1.0, 5)])
def test_demonstrations_have_the_quality_that_was_asked_for(quality: float, score: int) -> None:
    rng = random.Random(1)
    instructions = rng.sample(toy_language.all_instructions(), 300)
    scores = {
        toy_language.oracle_score(str(x), toy_language.demonstration(rng, x, quality=quality)) for x in instructions
    }
    assert scores == {score}


def test_a_justification_says_what_was_found() -> None:
    assert toy_language.justification(ASKED, "bee cat pig elk !") == "4 y animal y tiny y huge y ! y"
    assert toy_language.justification(ASKED, "cow plum plum ?") == "3 n fruit n huge n small n ? n"
    assert toy_language.justification(ASKED, "") == "0 n none n none n none n none n"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> toy_language.SeedFiles:
    sizes = {"num_ift": 300, "num_eft": 200, "num_weak_eft": 20, "num_held_out": 100, "num_rankings": 50}
    directory = tmp_path_factory.mktemp("seed")
    return toy_language.write_seed(directory, seed=1, num_prompts=150, num_iterations=2, **sizes)


def test_held_out_and_new_instructions_are_not_trained_on(files: toy_language.SeedFiles) -> None:
    held_out = {x.instruction for x in read_jsonl(files.eft_eval, EFTExample)}
    trained = {x.instruction for x in read_jsonl(files.ift, IFTExample)}
    trained |= {x.instruction for x in read_jsonl(files.eft, EFTExample)}
    trained |= {x.instruction for x in read_jsonl(files.rankings, RankedAnswers)}
    new = {p.text for t in (1, 2) for p in read_jsonl(Path(str(files.new_prompts).format(iteration=t)), Prompt)}
    assert len(held_out) == 100
    assert not held_out & trained
    assert not held_out & new
    assert not new & trained


def test_rankings_are_in_the_oracles_order_and_the_weak_judge_sees_few_examples(files: toy_language.SeedFiles) -> None:
    for x in read_jsonl(files.rankings, RankedAnswers):
        scores = [toy_language.oracle_score(x.instruction, response) for response in x.responses]
        for a, rank_a in zip(scores, x.ranks, strict=True):
            for b, rank_b in zip(scores, x.ranks, strict=True):
                assert (a > b) == (rank_a < rank_b)
    weak = read_jsonl(files.weak_eft, EFTExample)
    assert len(weak) == 200
    assert len({(x.instruction, x.response) for x in weak}) == 20


def test_verdicts_survive_the_tokenizer_and_the_parser(files: toy_language.SeedFiles, tmp_path: Path) -> None:
    toy_language.write_model(tmp_path, seed=1)
    chat = ChatTemplate(tmp_path)
    tokenizer = chat._tokenizer
    unknown = tokenizer.unk_token_id
    for x in read_jsonl(files.eft, EFTExample):
        prompt = chat.render(rubrics.render(RUBRIC, instruction=x.instruction, response=x.response))
        verdict = chat.response_text(points.verdict_text(x.justification, x.score))
        prompt_ids, ids = chat.encode(prompt), chat.encode(verdict)
        assert unknown not in prompt_ids + ids
        assert chat.encode(prompt + verdict) == prompt_ids + ids
        text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert points.parse_score(text, max_score=5) == x.score
        assert points.justification(text) == x.justification
    spec = hf.read_spec(tmp_path)
    assert spec.vocab_size >= len(set(toy_language.VOCABULARY)) == len(toy_language.VOCABULARY)
    assert tokenizer.eos_token_id in spec.eos_token_ids


def test_shuffled_scores_are_the_same_scores_of_other_candidates() -> None:
    found = [
        Judgement(candidate_key=f"c{i}", judgement_index=k, verdict="", score=float(i % 6))
        for i in range(60)
        for k in range(3)
    ]
    dealt = shuffled(found, random.Random(1))
    assert Counter(j.score for j in dealt) == Counter(j.score for j in found)
    assert {j.key for j in dealt} == {j.key for j in found}
    by_key = {j.key: j.score for j in found}
    assert sum(by_key[j.key] == j.score for j in dealt) < 90
    # All verdicts on one candidate stay together.
    assert all(len({j.score for j in dealt if j.candidate_key == f"c{i}"}) == 1 for i in range(60))


def row(arm: str, model: int, score: float) -> dict[str, object]:
    return {"seed": 1, "arm": arm, "model": model, "oracle_score": score}


def test_the_claims_of_a_run_are_checked() -> None:
    rows = [row("self", 1, 2.0), row("self", 2, 2.5), row("random", 1, 2.0), row("random", 2, 1.9)]
    prove.check(rows, prove.ProofSettings(min_advantage=0.5, max_random_gain=0.0))
    with pytest.raises(prove.ProofError, match=r"\+0\.60 points"):
        prove.check(rows, prove.ProofSettings(min_advantage=0.7))
    rows[-1] = row("random", 2, 2.2)
    with pytest.raises(prove.ProofError, match=r"from 2\.00 to 2\.20"):
        prove.check(rows, prove.ProofSettings(max_random_gain=0.1))
