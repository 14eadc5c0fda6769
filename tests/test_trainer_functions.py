"""The functions that the platform `cpu` puts in the place of others: the same values and the same gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F

from nemo_srl.trainers.nemo_aligner.platforms import attention
from nemo_srl.trainers.nemo_aligner.platforms.functions import (
    RMSNorm,
    SwiGLU,
    embedding,
    rms_norm,
    with_fast_rotary,
)
from nemo_srl.trainers.nemo_aligner.shared_beginnings import Tree, pack

SEQUENCE, BATCH, HEADS, SIZE = 7, 2, 3, 8


def assert_same(
    ours: Callable[..., torch.Tensor],
    theirs: Callable[..., torch.Tensor],
    *inputs: torch.Tensor,
    tolerance: float = 1e-5,
) -> None:
    """Both compute the same of `inputs`, and have the same gradients with respect to each of them."""
    results = []
    for function in (ours, theirs):
        copies = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in inputs]
        value = function(*copies)
        gradient = torch.randn(value.shape, generator=torch.Generator().manual_seed(1)).to(value.dtype)
        results.append([value, *torch.autograd.grad(value, copies, gradient)])
    for actual, expected in zip(*results, strict=True):
        assert actual.dtype == expected.dtype
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("eps", [1e-5, 0.5])
def test_rms_norm(eps: float) -> None:
    x, weight = 3 * random(SEQUENCE, BATCH, SIZE), random(SIZE, seed=1)
    assert_same(lambda x, w: RMSNorm.apply(x, w, eps), lambda x, w: F.rms_norm(x, (SIZE,), w, eps), x, weight)


def test_rms_norm_of_keys_which_are_a_part_of_each_group() -> None:
    """Neither they nor their gradient lie in memory in the order of their dimensions."""
    mixed, weight = random(SEQUENCE, BATCH, 2, 3 * SIZE), random(SIZE, seed=1)

    def of_keys(norm: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        return lambda x, w: norm(x[..., SIZE : 2 * SIZE], w).permute(1, 2, 0, 3)

    ours, theirs = (lambda x, w: RMSNorm.apply(x, w, 1e-5)), (lambda x, w: F.rms_norm(x, (SIZE,), w, 1e-5))
    assert_same(of_keys(ours), of_keys(theirs), mixed, weight)


def test_rms_norm_in_bfloat16_and_under_autocast_is_pytorchs_own() -> None:
    x, weight = random(SEQUENCE, BATCH, SIZE), random(SIZE, seed=1)
    expected = F.rms_norm(x.bfloat16(), (SIZE,), weight.bfloat16(), 1e-5)
    assert torch.equal(rms_norm(x.bfloat16(), weight.bfloat16(), 1e-5), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(rms_norm(x, weight, 1e-5), F.rms_norm(x, (SIZE,), weight, 1e-5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu(dtype: torch.dtype) -> None:
    def swiglu(x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, dim=-1)
        return gate * torch.sigmoid(gate) * up

    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    assert_same(SwiGLU.apply, swiglu, 2 * random(SEQUENCE, 2 * SIZE).to(dtype), tolerance=tolerance)


def refused(*_: object) -> torch.Tensor:
    raise AssertionError("the original was called")


def test_rotary_embedding_turns_pairs_by_their_angles() -> None:
    """As complex numbers: (a + ib) e^(i angle)."""
    angles = torch.outer(torch.arange(SEQUENCE), torch.tensor([1.0, 0.3, 0.1, 0.03]))[:, None, None]

    def turned(x: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, dim=-1)
        numbers = torch.complex(a, b) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([numbers.real, numbers.imag], dim=-1)

    freqs = torch.cat([angles, angles], dim=-1)
    # Keys are a part of the product of queries, keys and values.
    keys = random(SEQUENCE, BATCH, HEADS, 3 * SIZE)
    ours = with_fast_rotary(refused)
    assert_same(lambda x: ours(x[..., :SIZE], freqs), lambda x: turned(x[..., :SIZE]), keys)


def test_other_rotary_embeddings_are_left_to_megatron_core() -> None:
    calls = []
    apply = with_fast_rotary(lambda *arguments: calls.append(arguments[2:]) or arguments[0])  # type: ignore[func-returns-value]
    x, freqs = random(SEQUENCE, BATCH, HEADS, SIZE), random(SEQUENCE, 1, 1, SIZE)
    apply(x, freqs, rotary_interleaved=True)
    apply(x, freqs, multi_latent_attention=True)
    apply(x, freqs, mscale=2.0)
    apply(x, freqs[..., : SIZE // 2])
    assert calls == [(True, False, 1.0), (False, True, 1.0), (False, False, 2.0), (False, False, 1.0)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_embedding_adds_its_gradient_to_the_buffer(dtype: torch.dtype) -> None:
    weight = torch.nn.Parameter(random(5, SIZE).to(dtype))
    ids, gradient = torch.tensor([[3, 1, 3], [0, 3, 1]]), random(2, 3, SIZE, seed=1).to(dtype)
    value = embedding(ids, weight)  # has no buffer yet, so this is PyTorch's own
    value.backward(gradient)
    assert weight.grad is not None
    expected, weight.grad = weight.grad, None

    weight.main_grad = torch.ones(5, SIZE)  # type: ignore[attr-defined]
    with_buffer = embedding(ids, weight)
    assert torch.equal(with_buffer, value)
    with_buffer.backward(gradient)
    assert weight.grad is None
    tolerance = 1e-6 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(weight.main_grad, 1 + expected.float(), rtol=tolerance, atol=tolerance)  # type: ignore[attr-defined]


TREES = {
    "one sequence": ["abcdefghijk"],
    "nothing shared": ["abc", "defgh", "i"],
    "one beginning": ["abcdefg", "abcdh", "abcdi"],
    "several beginnings": [
        "abcdefghijklm",
        "abcdefghixyz",
        "abcq",
        "zzz",
        "abcdefghijkln",
        "abcdefghijklm",
        "abcdefgh",
    ],
}


def tree_of(texts: list[str]) -> Tree:
    ids = torch.tensor([[ord(c) for c in text.ljust(max(map(len, texts)))] for text in texts])
    return pack(ids, torch.tensor([len(text) for text in texts]), multiple=8)


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Sets the sizes of blocks and batches. They are no part of what `batches_of` remembers its results by."""
    attention.batches_of.cache_clear()
    yield lambda **values: [monkeypatch.setattr(attention, name, value) for name, value in values.items()]  # type: ignore[func-returns-value]
    attention.batches_of.cache_clear()


@pytest.mark.parametrize("texts", TREES.values(), ids=TREES)
@pytest.mark.parametrize(("groups", "padded"), [(1, 1.3), (2, 1.3), (4, 1.3), (2, 1), (2, 1000)])
def test_attention_over_a_tree(texts: list[str], groups: int, padded: float, sizes: Callable[..., None]) -> None:
    """In blocks of four queries: short, full, and several of them. The reference sees a mask over the whole tree.

    Batches have some padding, none, or all blocks whatever their sizes. In bfloat16, only inputs and results are
    rounded. Scores are so large that it would show if they were, too.
    """
    sizes(BLOCK=4, PADDED=padded)
    heads, scale = 4, 0.3
    tree = tree_of(texts)
    length = tree.tokens.shape[1]
    visible = torch.eye(length, dtype=torch.bool)  # padding sees itself; a softmax over nothing is no number
    for places, text in zip(tree.places, texts, strict=True):
        path = places[: len(text)]
        visible[path[:, None], path] = torch.ones(len(text), len(text), dtype=torch.bool).tril()
    is_node = torch.arange(length) < tree.num_tokens

    def pytorchs(*inputs: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.float().permute(1, 2, 0, 3) for x in inputs)
        with torch.autocast("cpu", enabled=False):
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale, enable_gqa=True)
        return (out.permute(2, 0, 1, 3).flatten(2) * is_node[:, None, None]).to(inputs[0].dtype)

    query = 8 * random(length, 1, heads, SIZE)
    # Keys and values are views of one tensor, as in a training.
    both = random(length, 1, groups, 2 * SIZE, seed=1)

    def check(dtype: torch.dtype, tolerance: float) -> None:
        assert_same(
            lambda q, x: attention.TreeAttention.apply(q, *x.chunk(2, dim=-1), scale, tree.branches),
            lambda q, x: pytorchs(q, *x.chunk(2, dim=-1)),
            query.to(dtype),
            both.to(dtype),
            tolerance=tolerance,
        )

    check(torch.float32, 1e-5)
    check(torch.bfloat16, 0.01)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check(torch.bfloat16, 0.01)


def num_computed(batch: attention.Batch) -> int:
    return batch.mask.numel()


@pytest.mark.parametrize("texts", TREES.values(), ids=TREES)
def test_batches_have_each_node_once_and_little_padding(texts: list[str], sizes: Callable[..., None]) -> None:
    sizes(BLOCK=4)
    tree = tree_of(texts)
    batches = attention.batches_of(tree.branches)
    nodes = [node for batch in batches for node in batch.queries.flatten().tolist() if node >= 0]
    assert sorted(nodes) == [*range(tree.num_tokens)]
    for batch in batches:
        num_queries = (batch.queries >= 0).sum(1)
        last = batch.mask[torch.arange(len(num_queries)), 0, 0, num_queries - 1]  # of the real ones; it sees all keys
        assert num_computed(batch) <= attention.PADDED * int((num_queries * (last == 0).sum(1)).sum())


def test_the_scores_of_a_batch_are_limited(sizes: Callable[..., None]) -> None:
    """All blocks of a long sequence at once would take as much memory as its length squared."""
    tree = tree_of(["a" * 600, "b" * 500])
    sizes(BLOCK=50, PADDED=1000, BATCH=2**20)
    assert len(attention.batches_of(tree.branches)) == 1
    attention.batches_of.cache_clear()
    sizes(BATCH=60_000)
    batches = attention.batches_of(tree.branches)
    assert len(batches) > 5
    assert all(num_computed(batch) <= 60_000 for batch in batches)


def test_a_block_of_its_own_may_have_more_scores(sizes: Callable[..., None]) -> None:
    sizes(BATCH=10)
    (batch,) = attention.batches_of(tree_of(["abcdefghijk"]).branches)
    assert num_computed(batch) == 11 * 11
