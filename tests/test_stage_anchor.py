"""The anchor's figures, with scores whose results are computed by hand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from nemo_srl.artifacts import BaseModel
from nemo_srl.config import Config, JudgeConfig
from nemo_srl.records import Candidate, Judgement, PreferencePair
from nemo_srl.stages import anchor as stage
from nemo_srl.stages.anchor import compare, spread
from tests import tiny
from tests.loopback import Loopback, ids_of
from tests.support import made, server
from tests.tables import published


def candidate(prompt: int, index: int) -> Candidate:
    return Candidate(
        prompt_id=f"p{prompt}",
        sample_index=index,
        prompt=f"prompt {prompt}",
        response=f"response {index}",
        num_tokens=3,
        finish_reason="stop",
    )


def pair(prompt: int, chosen: int, rejected: int, margin: float) -> PreferencePair:
    return PreferencePair(
        prompt_id=f"p{prompt}",
        prompt=f"prompt {prompt}",
        chosen=f"response {chosen}",
        rejected=f"response {rejected}",
        chosen_score=margin,
        rejected_score=0.0,
    )


def test_margins_agreement_and_inflation() -> None:
    candidates = [candidate(p, i) for p in range(3) for i in range(2)]
    own = {c.key: 4.0 if c.sample_index == 0 else 1.0 for c in candidates}
    # The anchor agrees on the first prompt, ties the second and turns the third around.
    anchor = dict(zip([c.key for c in candidates], [4.0, 2.0, 3.0, 3.0, 1.0, 2.0], strict=True))
    pairs = [pair(p, 0, 1, 3.0) for p in range(3)]
    found = {m.name: m for m in compare(candidates, pairs, own=own, anchor=anchor, max_score=5)}
    assert found["own_margin"].value == pytest.approx(3.0)
    assert found["anchor_margin"].value == pytest.approx((2 + 0 - 1) / 3)
    assert found["anchor_agreement"].value == pytest.approx((1 + 0.5 + 0) / 3)
    assert found["self_minus_anchor"].value == pytest.approx((0 - 1 + 1 - 2 + 3 - 1) / 6)
    assert found["anchor_score"].value == pytest.approx(15 / 6)
    assert found["self_minus_anchor"].n == 6


def test_candidates_that_one_judge_could_not_score_take_no_part() -> None:
    candidates = [candidate(0, 0), candidate(0, 1)]
    found = {m.name: m for m in compare(candidates, [pair(0, 0, 1, 2.0)], own={"p0/00": 3.0}, anchor={}, max_score=5)}
    assert all(m.value is None and m.n == 0 for m in found.values())


def verdicts(*scores: list[float | None], coverage: float | None = None) -> list[Judgement]:
    """The verdicts on the answers to each prompt, one each."""
    return [
        Judgement(candidate_key=f"p{p}/{i:02d}", judgement_index=0, verdict="", score=score, coverage=coverage)
        for p, found in enumerate(scores)
        for i, score in enumerate(found)
    ]


def test_each_reader_has_its_own_measure_of_a_judge_that_tells_answers_apart() -> None:
    same: list[float | None] = [3.0, 3.0, None]
    (entropy,) = spread(verdicts(same), JudgeConfig(rubric=""))
    assert (entropy.name, entropy.value, entropy.n) == ("score_entropy", 0, 2)
    assert spread(verdicts([3.1, 3.2], coverage=0.9), JudgeConfig(rubric="", mode="expected")) == []
    (ties,) = spread(verdicts([5.0, 2.5, 2.5], [0.0, 5.0, 2.5]), JudgeConfig(rubric="", mode="pairwise"))
    assert (ties.name, ties.value, ties.n) == ("tie_rate", 1 / 6, 6)


def the_first_response_is_best(body: dict[str, Any], index: int) -> tuple[list[int], str]:
    """Compares by the number at the end of the responses. It knows no points."""
    a, b = map(int, re.findall(r"response (\d)", body["messages"][0]["content"]))
    return ids_of(f"Winner: {'A' if a < b else 'B'}"), "stop"


def test_the_anchor_is_asked_in_the_way_of_the_judge(tmp_path: Path) -> None:
    """Both compare in pairs and agree. Then the margins are equal, and there is no level to compare."""
    candidates = [candidate(p, i) for p in range(3) for i in range(3)]
    own = verdicts(*[[5.0, 2.5, 0.0]] * 3)
    pairs = [pair(p, 0, 2, 5.0) for p in range(3)]
    judge = JudgeConfig(
        rubric="{instruction} {response} Score:", mode="pairwise", num_judgements=1,
        pairwise_rubric="{instruction} A: {response_a} B: {response_b} Winner:",
    )  # fmt: skip
    model = tiny.make_model(tmp_path / "model", ["Winner: A"], vocab_size=300)
    with Loopback(the_first_response_is_best).running() as url:
        output, _ = made(
            stage.STAGE, Config(run_dir="run", engine=server(url, api="chat"), judge=judge), tmp_path / "anchor",
            judge=BaseModel(model, "digest"),
            candidates=published(tmp_path, "candidates", Candidate, candidates),
            judgements=published(tmp_path, "judgements", Judgement, own),
            pairs=published(tmp_path, "pairs", PreferencePair, pairs),
        )  # fmt: skip
    found = {m.name: m.value for m in output.read()}
    assert found == {
        "own_margin": 5.0, "anchor_margin": 5.0, "anchor_agreement": 1.0, "tie_rate": 0.0, "distinct_responses": 1.0
    }  # fmt: skip
