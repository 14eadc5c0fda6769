"""The toy language of the proof, what its arms change, what the oracle measures, and the claims that are checked."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import prove
import pytest
import toy_language
import true_scores
from hydra import compose, initialize_config_dir
from proof_arms import shuffled

from nemo_srl import cli
from nemo_srl.artifacts import Table, digest_of, read_jsonl
from nemo_srl.chat import ChatTemplate
from nemo_srl.config import load
from nemo_srl.errors import ConfigError, DataError
from nemo_srl.judging import points, rubrics
from nemo_srl.models import hf
from nemo_srl.records import (
    Candidate,
    EFTExample,
    IFTExample,
    Judgement,
    Metric,
    PreferencePair,
    Prompt,
    RankedAnswers,
    Record,
)
from nemo_srl.runs import open_run
from tests.support import ROOT

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
    sizes = {"num_ift": 300, "num_eft": 200, "num_weak_eft": 20, "num_held_out": 100, "num_rankings": 50,
             "num_meta": 40}  # fmt: skip
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
        assert points.STATED.justification(text) == x.justification
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


def published(path: Path, records: list[Record], metrics: dict[str, float], **parts: list[Record]) -> None:
    """What a stage would have published at `path`."""
    table = Table(path, {}, Record)
    for name, rows in {"": records, **parts}.items():
        table.write(rows, name)
    table.publish(stage=path.name, digest=digest_of(str(path)), metrics=metrics, seconds=1.0)


def answers(*responses: str) -> list[Record]:
    return [
        Candidate(prompt_id="p", sample_index=i, prompt=ASKED, response=r, num_tokens=5, finish_reason="stop")
        for i, r in enumerate(responses)
    ]


def metrics(self_score: float | None) -> list[Record]:
    return [Metric(name="self_score", value=self_score, n=2), Metric(name="score_share_5", value=0.5, n=2)]


def test_the_oracle_measures_what_the_stages_published(tmp_path: Path) -> None:
    perfect, without_mark = "bee cat pig elk !", "bee cat pig elk"
    m1, arm = tmp_path / "m1", tmp_path / "self"
    published(m1 / "iter_00/evaluation", metrics(4.0), {}, answers=answers(without_mark, without_mark))
    texts = {"prompt_id": "p", "prompt": ASKED, "chosen_score": 5.0, "rejected_score": 0.0}
    pair = PreferencePair(chosen=perfect, rejected=without_mark, **texts)
    published(arm / "iter_01/pairs", [pair], {"num_tied": 3})
    published(arm / "iter_01/anchor", [Metric(name="anchor_agreement", value=0.9, n=1)], {})
    published(arm / "iter_01/evaluation", metrics(None), {}, answers=answers(perfect, without_mark))
    first, second = true_scores.measure(open_run(arm), open_run(m1))
    assert (first["model"], first["oracle_score"], first["perfect"], first["distinct"]) == (1, 4.0, 0.0, 0.5)
    assert (first["self_score"], first["self_minus_true"]) == (4.0, 0.0)
    assert (first["num_pairs"], first["num_tied"], first["true_margin"], first["true_pair_sign"]) == (1, 3, 1, 1)
    assert first["anchor.anchor_agreement"] == 0.9
    assert "score_share_5" not in first
    assert second == {"model": 2, "oracle_score": 4.5, "perfect": 0.5, "distinct": 1.0, "self_score": None}


def test_an_evaluation_without_its_answers_is_refused(tmp_path: Path) -> None:
    published(tmp_path / "iter_00/evaluation", metrics(4.0), {})
    with pytest.raises(DataError, match=r"iter_00/evaluation: it has no table of answers"):
        true_scores.measure_model(open_run(tmp_path), 0)


def proof_config(*overrides: str, name: str = "srl-proof-cpu") -> prove.ProofConfig:
    cli.register_schemas(overrides, proof_schema=prove.ProofConfig)
    with initialize_config_dir(str(ROOT / "examples/proof/conf"), version_base="1.3"):
        return load(compose(name, overrides=list(overrides)), prove.ProofConfig)


def test_arms_of_one_judge_share_its_m1_and_differ_in_nothing_that_was_not_asked_for() -> None:
    cfg = proof_config("run_dir=/runs/x")
    assert (cfg.engine.name, cfg.trainer.name, cfg.launcher.name) == ("embedded", "nemo_aligner", "local")
    configs = {}
    for name, arm in cfg.proof.arms.items():
        base = prove.seed_config(cfg, 2, arm.eft)
        configs[name] = prove.arm_config(base, name, arm)
        m1 = {"weak_judge": "m1_weak", "no_eft": "m1_no_eft"}.get(name, "m1")
        assert base.run_dir == f"/runs/x/seed_2/{m1}"
        assert configs[name].run_dir == f"/runs/x/seed_2/{name}"
    mine = configs["self"]
    assert (mine.seed, mine.model.path, mine.sft) == (2, "/runs/x/seed_2/m0", cfg.sft)
    for name in ("random", "refresh", "oracle"):
        assert replace(configs[name], run_dir=mine.run_dir) == mine
    frozen = replace(configs["frozen"], run_dir=mine.run_dir)
    assert (frozen.judge.model, replace(frozen, judge=mine.judge)) == ("m1", mine)
    assert configs["weak_judge"].data.eft_path == "/runs/x/seed_2/data/eft_weak.jsonl"
    assert configs["weak_judge"].num_iterations == 4
    assert configs["positives_only"].sft.learning_rate == cfg.dpo.learning_rate


def test_the_arms_of_methods_have_their_settings() -> None:
    cfg = proof_config("run_dir=/runs/x", name="srl-proof-cpu-methods")
    configs = {
        name: prove.arm_config(prove.seed_config(cfg, 1, cfg.proof.arms[name].eft), name, cfg.proof.arms[name])
        for name in cfg.proof.only
    }
    assert {arm.method for name, arm in cfg.proof.arms.items() if name in configs} == {
        p.stem for p in prove.METHODS.glob("*")
    }
    assert configs["cream"].pairs.second_judge == "previous"
    assert configs["meta_rewarding"].verdict_pairs.meta_rubric == toy_language.META_RUBRIC
    assert configs["meta_rewarding"].run_dir.endswith("seed_1/meta_rewarding")
    assert (
        configs["self_meta"].data.ift_path == configs["meta_rewarding"].data.ift_path != configs["self"].data.ift_path
    )
    with pytest.raises(ConfigError, match=r"proof\.arms\.x\.method='dream': no such method"):
        prove.arm_config(configs["self"], "x", prove.ArmConfig(method="dream"))


def test_comparisons_of_verdicts_choose_the_true_one_and_fit_the_tokenizer(files: toy_language.SeedFiles) -> None:
    rows = [x for x in read_jsonl(files.meta_ift, IFTExample) if x.example_id.startswith("meta-")]
    assert len(rows) == 40
    assert {x.response for x in rows} == {"Winner: A", "Winner: B"}
    for x in rows:
        words = x.instruction.split()
        assert set(words) <= set(toy_language.VOCABULARY)
        asked, _, rest = x.instruction.removeprefix("compare ").partition(" answer ")
        response, first, second = rest.removesuffix(" Winner:").split(" judge ")
        true = f"{toy_language.justification(asked, response)} Score: {toy_language.oracle_score(asked, response)}"
        assert (first, second)["AB".index(x.response[-1])] == true
        assert first != second
    assert toy_language.share_of_criteria(ASKED, "bee cat pig elk ?") == 0.8


def test_an_arm_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"proof\.only=\['selfish'\]: no such arm"):
        prove.Runs(proof_config("proof.only=[selfish]", name="srl-proof-cpu-small"))
    with pytest.raises(ConfigError, match=r"judge='us': must be one of self, shuffled"):
        prove.ArmConfig(judge="us")


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
