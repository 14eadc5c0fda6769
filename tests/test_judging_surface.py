"""The surface baseline: it learns what the surface tells, and nothing else."""

from __future__ import annotations

import random

import numpy as np

from nemo_srl.judging.surface import SurfaceBaseline, cross_validated_accuracy, features, surface_accuracy
from nemo_srl.records import EFTExample


def examples(number: int, *, surface_tells: bool, seed: int) -> list[EFTExample]:
    """Two answers to each instruction. Either the better one is longer, or its length says nothing."""
    rng = random.Random(seed)
    found = []
    for i in range(number):
        lengths = [rng.randint(3, 8), rng.randint(12, 20)]
        if not surface_tells:
            rng.shuffle(lengths)
        for score, length in enumerate(lengths):
            answer = " ".join(rng.choice(("sun", "rain", "wind", "snow")) for _ in range(length))
            row = {"instruction": f"Question {i}?", "response": answer, "justification": "", "score": score}
            found.append(EFTExample(example_id=f"{seed}-{i}-{score}", **row))
    return found


def test_thirteen_finite_features_of_any_text() -> None:
    for text in ("", " ", "Yes.", "- a\n- b: 12, c"):
        assert len(features(text)) == 13
        assert np.isfinite(features(text)).all()
    assert features("Ab, c.")[:3] == [2, 6, np.log(2)]


def test_it_finds_what_the_surface_tells() -> None:
    train, held_out = (examples(60, surface_tells=True, seed=seed) for seed in (1, 2))
    found = surface_accuracy(train, held_out, max_score=5)
    assert (found.value, found.n) == (1.0, 60)
    found = cross_validated_accuracy(held_out, max_score=5)
    assert (found.value, found.n) == (1.0, 60)


def test_it_is_at_chance_when_the_surface_tells_nothing() -> None:
    train, held_out = (examples(300, surface_tells=False, seed=seed) for seed in (1, 2))
    found = surface_accuracy(train, held_out, max_score=5)
    assert found.low is not None
    assert found.high is not None
    assert found.low < 0.5 < found.high
    # Each instruction is left out with all its answers, so nothing is learned about it.
    found = cross_validated_accuracy(train, max_score=5)
    assert found.n == 300


def test_it_does_not_see_the_instruction() -> None:
    train = examples(20, surface_tells=True, seed=1)
    row = {"response": "Rain.", "justification": "", "score": 1}
    a, b = (EFTExample(example_id=q, instruction=q, **row) for q in ("What falls?", "What shines?"))
    first, second = SurfaceBaseline(train).scores([a, b])
    assert first == second


def test_of_few_instructions_each_is_left_out_once() -> None:
    row = {"justification": "", "category": ""}
    examples = [
        EFTExample(example_id=f"{q}{s}", instruction=q, response="word " * (s + 1), score=s, **row)
        for q in ("What falls?", "What shines?")
        for s in range(4)
    ]
    assert cross_validated_accuracy(examples, max_score=5).value == 1
