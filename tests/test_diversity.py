"""Diversity and novelty of texts."""

from __future__ import annotations

import pytest
from rouge_score.rouge_scorer import RougeScorer

from nemo_srl.data.diversity import distinct_n, novelty


def test_repetition_lowers_distinct_n() -> None:
    assert distinct_n(["a b c", "d e f"], 1) == 1
    assert distinct_n(["a b a b", "a b"], 2) == 2 / 4
    assert distinct_n(["a"], 2) is None
    assert distinct_n([], 1) is None


def test_novelty_is_one_less_the_nearest_rouge_l() -> None:
    known = ["Name a prime number.", "Write a short poem about the sea."]
    new = ["Write a long poem about the sea.", "Translate this!", "Name a prime number."]
    scorer = RougeScorer(["rougeL"])
    nearest = [max(scorer.score(k, n)["rougeL"].fmeasure for k in known) for n in new]
    assert novelty(new, known) == pytest.approx(1 - sum(nearest) / 3)
    assert novelty(known, known) == 0
    assert novelty(["x"], ["y"]) == 1
    assert novelty([], known) is None
    assert novelty(new, ["..."]) is None
