"""The anchor's figures, with scores whose results are computed by hand."""

from __future__ import annotations

import pytest

from nemo_srl.records import Candidate, PreferencePair
from nemo_srl.stages.anchor import compare


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
    found = {m.name: m for m in compare(candidates, pairs, own=own, anchor=anchor, seed=1)}
    assert found["own_margin"].value == pytest.approx(3.0)
    assert found["anchor_margin"].value == pytest.approx((2 + 0 - 1) / 3)
    assert found["anchor_agreement"].value == pytest.approx((1 + 0.5 + 0) / 3)
    assert found["self_minus_anchor"].value == pytest.approx((0 - 1 + 1 - 2 + 3 - 1) / 6)
    assert found["anchor_score"].value == pytest.approx(15 / 6)
    assert found["self_minus_anchor"].n == 6


def test_candidates_that_one_judge_could_not_score_take_no_part() -> None:
    candidates = [candidate(0, 0), candidate(0, 1)]
    found = {m.name: m for m in compare(candidates, [pair(0, 0, 1, 2.0)], own={"p0/00": 3.0}, anchor={}, seed=1)}
    assert all(m.value is None and m.n == 0 for m in found.values())
