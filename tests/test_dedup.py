"""ROUGE-L search: the same answers as brute force, and the same numbers as rouge-score."""

import random
from itertools import pairwise

import pytest
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenize import tokenize as rouge_tokenize

from nemo_srl.data.dedup import RougeLIndex
from nemo_srl.words import tokenize


def rouge_l(a: str, b: str) -> float:
    """F1 by the textbook recurrence, as an exact quotient."""
    x, y = tokenize(a), tokenize(b)
    row = [0] * (len(y) + 1)
    for token in x:
        previous, row = row, [0]
        for j, other in enumerate(y):
            row.append(previous[j] + 1 if token == other else max(previous[j + 1], row[j]))
    return 2 * row[-1] / (len(x) + len(y)) if x and y else 0.0


def random_texts(rng: random.Random, num_texts: int, *, vocabulary: int, max_words: int) -> list[str]:
    """Texts over few words, many of them variations of an earlier one; some are empty."""
    words = [f"w{i}" for i in range(vocabulary)]
    texts: list[str] = []
    for _ in range(num_texts):
        if texts and rng.random() < 0.6:
            tokens = rng.choice(texts).split()
            for _ in range(rng.randint(0, 3)):
                position = rng.randint(0, len(tokens))
                tokens[position : position + rng.randint(0, 2)] = rng.choices(words, k=rng.randint(0, 2))
        else:
            tokens = rng.choices(words, k=rng.randint(0, max_words))
        texts.append(" ".join(tokens))
    return texts


@pytest.mark.parametrize("threshold", [0.05, 0.3, 0.5, 0.7, 0.9, 1.0])
@pytest.mark.parametrize(("vocabulary", "max_words"), [(4, 6), (30, 12), (300, 25)])
def test_results_equal_brute_force(threshold: float, vocabulary: int, max_words: int) -> None:
    rng = random.Random(f"{threshold}/{vocabulary}")
    texts = random_texts(rng, 110, vocabulary=vocabulary, max_words=max_words)
    index = RougeLIndex(threshold)
    for number, text in enumerate(texts):
        scores = [rouge_l(text, other) for other in texts[:number]]
        best = max(scores, default=0.0)
        expected = (best, scores.index(best)) if best >= threshold else None
        assert index.most_similar(text) == expected
        assert index.is_duplicate(text) == (expected is not None)
        assert index.add(text) == number
    assert len(index) == len(texts)


def test_numbers_are_those_of_rouge_score() -> None:
    rng = random.Random(0)
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    texts = random_texts(rng, 60, vocabulary=20, max_words=15)
    for a, b in pairwise(texts):
        index = RougeLIndex(1e-6)
        index.add(a)
        found = index.most_similar(b)
        expected = scorer.score(a, b)["rougeL"].fmeasure
        assert (found[0] if found else 0.0) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " \t\n",
        "?!...",
        "Hello, World!",
        "don't re-use e.g. this_one",
        "12.5% of 3,000",
        "UPPER lower MiXeD",
    ],
)
def test_tokens_of_ascii_are_those_of_rouge_score(text: str) -> None:
    assert tokenize(text) == rouge_tokenize(text, None)


@pytest.mark.parametrize(("numerator", "denominator"), [(7, 10), (3, 5), (9, 10), (4, 5), (1, 3), (2, 3)])
def test_a_score_that_equals_the_threshold_is_a_duplicate(numerator: int, denominator: int) -> None:
    shared = [f"s{i}" for i in range(numerator)]
    rest = denominator - numerator
    index = RougeLIndex(numerator / denominator)
    index.add(" ".join(shared + [f"a{i}" for i in range(rest)]))
    assert index.most_similar(" ".join(shared + [f"b{i}" for i in range(rest)])) == (numerator / denominator, 0)
    # One unshared token more, and it is below.
    assert index.most_similar(" ".join(shared + [f"b{i}" for i in range(rest + 1)])) is None


def test_order_matters_and_case_does_not() -> None:
    index = RougeLIndex(0.7)
    index.add("name three red fruits")
    assert index.most_similar("Name THREE red fruits!") == (1.0, 0)
    assert index.most_similar("fruits red three name") is None


def test_repeated_words_count_as_often_as_they_occur() -> None:
    index = RougeLIndex(0.7)
    index.add("the the the the")
    assert index.most_similar("the") is None  # 2 * 1 / 5
    assert index.most_similar("the the the") == (6 / 7, 0)


def test_a_text_without_tokens_is_a_duplicate_of_itself_only() -> None:
    index = RougeLIndex(0.7)
    assert index.most_similar("anything") is None
    index.add("")
    index.add("?!  ?!")
    assert index.most_similar("") is None
    assert index.most_similar("?! ?!") == (1.0, 1)
    assert index.most_similar("?!") is None
    assert index.most_similar("anything") is None
    assert len(index) == 2


def test_words_never_seen_before_lower_the_score() -> None:
    index = RougeLIndex(0.7)
    index.add("list two uses of salt")
    assert index.most_similar("list two uses of sugar") == (0.8, 0)
    assert index.most_similar("list two odd uses of brown sugar") is None  # 2 * 4 / 12


def test_the_first_of_equals_is_named() -> None:
    index = RougeLIndex(0.5)
    for text in ("a b c x", "a b c y", "a b c x"):
        index.add(text)
    assert index.most_similar("a b c z") == (0.75, 0)
    assert index.most_similar("a b c x") == (1.0, 0)


def test_searching_changes_nothing() -> None:
    index = RougeLIndex(0.7)
    index.add("tell me a short joke")
    assert [index.most_similar("tell me a long joke") for _ in range(3)] == [(0.8, 0)] * 3
    assert len(index) == 1


@pytest.mark.parametrize("threshold", [0, -0.1, 1.1, float("nan")])
def test_a_threshold_that_means_nothing_is_refused(threshold: float) -> None:
    with pytest.raises(ValueError, match="threshold"):
        RougeLIndex(threshold)
