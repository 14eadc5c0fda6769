"""Sampling: top-p is exact, frequencies are the probabilities, and each sample has random numbers of its own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nemo_srl.engines.embedded.sampling import choose, sample_uniforms


def brute_force(logits: Tensor, uniform: float, temperature: float, top_p: float) -> int:
    """The definition, token by token."""
    probabilities = torch.softmax(logits.float() / temperature, -1).tolist()
    order = sorted(range(len(probabilities)), key=lambda i: (-probabilities[i], i))
    kept, mass = [], 0.0
    for token in order:
        kept.append(token)
        mass += probabilities[token]
        if mass >= top_p and top_p < 1:
            break
    target, total = uniform * (mass if top_p < 1 else 1.0), 0.0
    for token in kept:
        total += probabilities[token]
        if total > target:
            return token
    return kept[-1]


@pytest.mark.parametrize("vocab_size", [7, 64, 65, 700, 5000])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("spread", [0.1, 3.0])
def test_choice_is_that_of_the_definition(vocab_size: int, top_p: float, spread: float) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    logits = (torch.randn(24, vocab_size, generator=generator) * spread).to(torch.bfloat16)  # bfloat16: many ties
    uniforms = torch.rand(24, generator=generator, dtype=torch.float64)
    chosen = choose(logits, uniforms, temperature=0.7, top_p=top_p).tolist()
    assert chosen == [brute_force(row, u, 0.7, top_p) for row, u in zip(logits, uniforms.tolist(), strict=True)]


def test_frequencies_are_the_renormalised_probabilities() -> None:
    logits = torch.tensor([2.0, 1.5, 1.0, 0.0, -1.0, -4.0])
    draws = 20_000
    uniforms = torch.cat([sample_uniforms(1, f"r{i}", 0, 100) for i in range(draws // 100)])
    chosen = choose(logits.expand(draws, -1), uniforms, temperature=1.0, top_p=0.95)
    probabilities = torch.softmax(logits, -1)
    assert probabilities[:3].sum() < 0.95 < probabilities[:4].sum(), "four tokens are the smallest set"
    expected = probabilities[:4] / probabilities[:4].sum() * draws
    counts = torch.bincount(chosen, minlength=6)
    assert counts[4:].sum() == 0
    chi_square = ((counts[:4] - expected) ** 2 / expected).sum().item()
    assert chi_square < 16.3  # 3 degrees of freedom, p = 0.001; the draws are fixed


def test_temperature_zero_is_greedy() -> None:
    logits = torch.tensor([[0.0, 5.0, 1.0], [9.0, 5.0, 1.0]])
    assert choose(logits, torch.full((2,), 0.99), temperature=0, top_p=1).tolist() == [1, 0]


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("vocab_size", [5, 3000])
def test_logits_that_are_no_numbers_are_told(temperature: float, vocab_size: int) -> None:
    logits = torch.zeros(2, vocab_size)
    logits[1, 3] = torch.nan
    chosen = choose(logits, torch.full((2,), 0.5, dtype=torch.float64), temperature=temperature, top_p=0.9)
    assert chosen[0] >= 0
    assert chosen[1] == -1


def test_uniforms_belong_to_seed_key_and_index() -> None:
    base = sample_uniforms(1, "a", 0, 8)
    assert torch.equal(base, sample_uniforms(1, "a", 0, 8))
    assert torch.equal(base[:3], sample_uniforms(1, "a", 0, 3))
    for other in (sample_uniforms(2, "a", 0, 8), sample_uniforms(1, "b", 0, 8), sample_uniforms(1, "a", 1, 8)):
        assert not torch.equal(base, other)
