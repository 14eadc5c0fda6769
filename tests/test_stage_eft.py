"""The EFT filter: only verdicts that order the answers as people did, and no score too often."""

from __future__ import annotations

import random
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nemo_srl.artifacts import JOURNAL, BaseModel, SourceFile, Table, read_jsonl, to_line
from nemo_srl.config import Config, JudgeConfig, RefreshConfig
from nemo_srl.errors import ConfigError, DataError
from nemo_srl.records import Completion, EFTExample, Judgement, RankedAnswers
from nemo_srl.stages import Context, eft, sft
from nemo_srl.stages.eft import agreeing_verdicts, balanced
from recipes import build_eft
from tests import tiny
from tests.loopback import Loopback, ids_of
from tests.support import made, server

RANKED = RankedAnswers(example_id="x", instruction="Q", responses=["a", "b", "c"], ranks=[1, 0, 1])


def judged(*scores: float | None) -> list[Judgement]:
    return [Judgement(candidate_key="x", judgement_index=i, verdict=str(s), score=s) for i, s in enumerate(scores)]


@pytest.mark.parametrize(
    ("scores", "agrees"),
    [
        ((2.0, 4.0, 2.0), True),
        ((2.0, 4.0, 3.0), False),  # people tie the first and the last
        ((4.0, 2.0, 4.0), False),
        ((3.0, 3.0, 3.0), False),
        ((2.0, 4.0, None), False),
    ],
)
def test_verdicts_agree_only_when_they_give_peoples_order_ties_included(
    scores: tuple[float | None, ...], agrees: bool
) -> None:
    found = agreeing_verdicts(RANKED, [judged(s) for s in scores], random.Random(0))
    assert (found is not None) == agrees
    if found:
        assert tuple(j.score for j in found) == scores


def test_the_commonest_score_is_thinned_out() -> None:
    def example(i: int, score: int) -> EFTExample:
        return EFTExample(example_id=f"{i}", instruction="Q", response="r", justification="j", score=score)

    scores = [4] * 20 + [2] * 5 + [1] * 3
    kept = balanced([example(i, s) for i, s in enumerate(scores)], random.Random(0))
    assert Counter(x.score for x in kept) == {4: 5, 2: 5, 1: 3}
    assert balanced([], random.Random(0)) == []


QUALITY = {"bad": 1, "fair": 3, "good": 5}


def rankings(path: Path) -> SourceFile[RankedAnswers]:
    """Two rankings that the judge below agrees with, and one that it does not agree with."""
    rows = [
        RankedAnswers(example_id="r0", instruction="Q0", responses=["good", "bad"], ranks=[0, 1]),
        RankedAnswers(example_id="r1", instruction="Q1", responses=["bad", "fair", "good"], ranks=[2, 1, 0]),
        RankedAnswers(example_id="r2", instruction="Q2", responses=["bad", "good"], ranks=[0, 1]),
    ]
    path.write_text("".join(map(to_line, rows)))
    return SourceFile(path, RankedAnswers)


def judge_by_word(body: dict[str, Any], index: int) -> tuple[list[int], str]:
    word = re.search(r"bad|fair|good", body["messages"][0]["content"])
    assert word
    return ids_of(f"It is {word[0]}.\nScore: {QUALITY[word[0]]}"), "stop"


def test_the_stage_runs_on_any_engine_and_keeps_reasons_with_scores(tmp_path: Path) -> None:
    policy = BaseModel(tiny.make_model(tmp_path / "model", ["Score: 5"], vocab_size=300), "digest")
    with Loopback(judge_by_word).running() as url:
        judge = JudgeConfig(rubric="{instruction}/{response} Score:", engine=server(url))
        cfg = Config(judge=judge, run_dir=str(tmp_path), refresh=RefreshConfig(num_judgements=2))
        given = rankings(tmp_path / "rankings.jsonl")
        output, metrics = made(eft.STAGE, cfg, tmp_path / "eft", iteration=0, judge=policy, rankings=given)
    assert metrics["num_rankings"] == 3
    assert metrics["agreement_rate"] == pytest.approx(2 / 3)
    assert metrics["valid_rate"] == 1
    found = output.read()
    assert {x.instruction for x in found} == {"Q0", "Q1"}
    assert all((x.justification, x.score) == (f"It is {x.response}.", QUALITY[x.response]) for x in found)


def test_a_model_that_cannot_judge_is_told_with_counts_and_its_verdicts_are_kept(tmp_path: Path) -> None:
    """M0, trained on answers alone, answers the rubric like any instruction. Its calls must not be made again."""
    policy = BaseModel(tiny.make_model(tmp_path / "model", ["Score: 5"], vocab_size=300), "digest")
    thanks = Loopback(lambda body, index: (ids_of("Thank you for asking!"), "stop"))
    with thanks.running() as url:
        judge = JudgeConfig(rubric="{instruction}/{response} Score:", engine=server(url))
        cfg = Config(judge=judge, run_dir=str(tmp_path), refresh=RefreshConfig(num_judgements=2))
        given = rankings(tmp_path / "rankings.jsonl")
        reason = r"3 rankings gave no example\. 0 of 14 verdicts have a score, and 0 rankings agree .*journal\.jsonl"
        for _ in range(2):
            with pytest.raises(DataError, match=reason):
                made(eft.STAGE, cfg, tmp_path / "eft", judge=policy, rankings=given)
            assert len(read_jsonl(tmp_path / "eft" / JOURNAL, Completion)) == 14
            assert thanks.num_calls == 7


def test_a_ranking_without_a_rank_for_each_answer_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rankings.jsonl"
    path.write_text(to_line(replace(RANKED, ranks=[0, 1])))
    ctx = Context(Config(run_dir="x"), 0, {"rankings": SourceFile(path, RankedAnswers)}, None)
    with pytest.raises(DataError, match="'x' has 3 responses and 2 ranks"):
        eft.run(ctx)


def test_the_recipe_judges_with_a_model_that_saw_no_verdicts(tmp_path: Path) -> None:
    """SFT on the IFT seed alone, then the filter. The result is copied to `eft.jsonl`."""
    calls: list[tuple[Any, set[str]]] = []
    verdicts = Table(tmp_path / "eft", {}, EFTExample)
    digest = verdicts.write([EFTExample(example_id="a", instruction="Q", response="r", justification="j", score=3)])
    metrics = {"num_rankings": 1, "valid_rate": 1.0, "agreement_rate": 1.0, "num_examples": 1}
    verdicts.publish(stage="eft", digest=digest, metrics=metrics, seconds=0)

    def run(stage: Any, iteration: int, **inputs: Any) -> Any:
        calls.append((stage, set(inputs)))
        return verdicts

    exp: Any = SimpleNamespace(run=run, run_dir=tmp_path, base_model=lambda: "m0", source=lambda path, record: path)
    cfg = Config(run_dir=str(tmp_path))
    with pytest.raises(ConfigError, match="rankings_path"):
        build_eft.build(cfg, exp)
    cfg.data.rankings_path = "rankings.jsonl"
    path = build_eft.build(cfg, exp)
    assert calls == [(sft.STAGE, {"policy", "ift"}), (eft.STAGE, {"judge", "rankings"})]
    assert path.read_text() == (tmp_path / "eft" / "data.jsonl").read_text()
