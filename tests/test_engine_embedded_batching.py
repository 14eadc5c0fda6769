"""Batches and prefix trees: every sample is there once, every prompt is found again, and the longest come first."""

from __future__ import annotations

import random

from nemo_srl.engines.embedded.batching import MAX_SEGMENT_TOKENS, plan_batches, prefix_tree
from nemo_srl.engines.embedded.kv_cache import rows_without
from nemo_srl.protocols import GenerationRequest
from tests import completions


def request(key: str, tokens: tuple[int, ...], n: int = 1) -> GenerationRequest:
    return GenerationRequest(key=key, prompt_token_ids=tokens, n=n, seed=0)


def test_every_prompt_is_the_path_to_its_segment() -> None:
    rng = random.Random(0)
    rubric = tuple(range(100))
    prompts = [
        rubric + tuple([task] * 40) + tuple(rng.randrange(5) for _ in range(rng.randrange(50)))
        for task in range(6)
        for _ in range(4)
    ]
    prompts += [rubric, rubric[:50], (7,), tuple(range(3 * MAX_SEGMENT_TOKENS)), prompts[0]]
    segments, ends = prefix_tree(prompts)
    for prompt in prompts:
        path = ends[prompt].path
        assert sum((segment.tokens for segment in path), ()) == prompt
        assert [segment.start for segment in path] == [0] + [segment.end for segment in path[:-1]]
    assert max(len(segment.tokens) for segment in segments) <= MAX_SEGMENT_TOKENS
    seen: set[int] = set()
    for segment in segments:
        assert segment.parent is None or id(segment.parent) in seen, "parents come first"
        seen.add(id(segment))


def test_a_shared_prefix_is_there_once() -> None:
    rubric = tuple(range(200))
    segments, _ = prefix_tree([(*rubric, 300 + i) for i in range(32)])
    assert sum(len(segment.tokens) for segment in segments) == 200 + 32


def test_every_sample_is_in_one_batch_and_the_order_of_requests_does_not_matter() -> None:
    rng = random.Random(1)
    requests = [request(f"r{i}", tuple(rng.randrange(9) for _ in range(5 + i)), n=1 + i % 4) for i in range(30)]
    batches = plan_batches(requests, 16)
    keys = [slot.key for batch in batches for slot in batch]
    assert sorted(keys) == sorted(completions.keys(requests))
    assert max(map(len, batches)) <= 16
    assert max(map(len, batches)) - min(map(len, batches)) <= 1
    rng.shuffle(requests)
    assert [[slot.key for slot in batch] for batch in plan_batches(requests, 16)] == [
        [slot.key for slot in batch] for batch in batches
    ]
    assert plan_batches([], 16) == []


def test_batches_put_long_prompts_first_and_relatives_together() -> None:
    requests = [request(f"{i}-{j}", (1, 2, *[10 + i] * 10 * (i + 1), j)) for j in range(3) for i in range(4)]
    keys = [slot.request.key for slot in plan_batches(requests, 100)[0]]
    assert keys == [f"{i}-{j}" for i in (3, 2, 1, 0) for j in range(3)]


def test_rows_stay_dense_and_few_move() -> None:
    assert rows_without(5, [1]) == [0, 4, 2, 3]
    assert rows_without(5, [0, 4]) == [3, 1, 2]
    assert rows_without(5, [3, 4]) == [0, 1, 2]
    assert rows_without(3, [0, 1, 2]) == []
