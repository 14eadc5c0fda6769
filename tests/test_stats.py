"""Reward-model metrics: worked examples, brute force, and scipy."""

import dataclasses
import itertools
import json
import math
import random
from types import SimpleNamespace

import pytest
import scipy.stats

from nemo_srl.errors import DataError
from nemo_srl.judging.agreement import (
    ScoreGroup,
    histogram,
    reward_model_metrics,
    reward_model_sums,
    score_entropy,
)
from nemo_srl.judging.intervals import Estimate
from nemo_srl.records import Metric

NOTHING = Estimate(value=None, n=0, low=None, high=None)


def measured(groups: list[ScoreGroup]) -> SimpleNamespace:
    return SimpleNamespace(**reward_model_metrics(groups, max_score=5))


def metrics(*groups: tuple[list[float], list[float | None]]) -> SimpleNamespace:
    return measured([ScoreGroup(human=human, model=model) for human, model in groups])


def brief(estimate: Estimate) -> tuple[float | None, int]:
    return estimate.value, estimate.n


def random_groups(seed: int, num_groups: int = 80) -> list[ScoreGroup]:
    rng = random.Random(seed)
    groups = []
    for _ in range(num_groups):
        size = rng.randint(0, 6)
        human = [float(rng.randint(0, 5)) for _ in range(size)]
        model = [rng.choice([None, rng.randint(0, 5), h, h, 5, rng.randint(0, 15) / 3]) for h in human]
        groups.append(ScoreGroup(human=human, model=model))
    return groups


def test_a_worked_example() -> None:
    # Six pairs: people order 3 > 2 > 1 > 0; the model ties the first two and swaps the last two.
    m = metrics(([3, 2, 1, 0], [5, 5, 1, 2]))
    assert brief(m.pairwise_accuracy) == (4 / 5, 5)
    assert brief(m.pairwise_accuracy_ties_half) == (4.5 / 6, 6)
    assert brief(m.pairwise_accuracy_ties_wrong) == (4 / 6, 6)
    assert brief(m.tie_rate) == (1 / 6, 6)
    assert brief(m.exact_match) == (0, 1)
    assert brief(m.five_best) == (1 / 2, 2)
    assert m.kendall.value == pytest.approx((4 - 1) / math.sqrt(6 * 5))
    assert m.spearman.value == pytest.approx(3.5 / math.sqrt(5 * 4.5))  # ranks 4 3 2 1 and 3.5 3.5 1 2
    assert brief(m.parse_failure_rate) == (0, 4)


def test_a_perfect_and_a_reversed_judge() -> None:
    perfect = metrics(([1, 3, 5], [1, 3, 5]), ([0, 4], [2, 5]))
    reversed_ = metrics(([1, 3, 5], [5, 3, 1]), ([0, 4], [5, 2]))
    for name in ("pairwise_accuracy", "pairwise_accuracy_ties_half", "pairwise_accuracy_ties_wrong"):
        assert brief(getattr(perfect, name)) == (1, 4)
        assert brief(getattr(reversed_, name)) == (0, 4)
    for name in ("spearman", "kendall"):
        assert getattr(perfect, name).value == pytest.approx(1)
        assert getattr(reversed_, name).value == pytest.approx(-1)
    assert (perfect.exact_match.value, reversed_.exact_match.value) == (1, 0)
    assert (perfect.five_best.value, reversed_.five_best.value) == (1, 0)


def test_a_judge_that_always_says_five() -> None:
    m = metrics(([1, 2, 3], [5, 5, 5]), ([4, 1], [5, 5]))
    assert brief(m.tie_rate) == (1, 4)
    assert m.pairwise_accuracy == NOTHING
    assert brief(m.pairwise_accuracy_ties_half) == (0.5, 4)
    assert brief(m.pairwise_accuracy_ties_wrong) == (0, 4)
    assert brief(m.exact_match) == (0, 2)
    assert brief(m.five_best) == (2 / 5, 5)
    assert m.spearman == m.kendall == NOTHING


def test_a_missing_score_is_not_a_zero() -> None:
    m = metrics(([0, 3, 5], [2, None, 4]))
    assert brief(m.parse_failure_rate) == (1 / 3, 3)
    assert brief(m.pairwise_accuracy_ties_wrong) == (1, 1)  # the pair that has both scores
    assert m.exact_match == NOTHING  # no whole ordering to compare
    assert brief(m.kendall) == (1, 1)
    # The best response keeps its rank when its verdict is lost: calling the second best "5" is wrong.
    assert brief(metrics(([0, 3, 5], [2, 5, None])).five_best) == (0, 1)


def test_groups_that_people_do_not_order_decide_nothing() -> None:
    m = metrics(([3, 3], [1, 5]), ([4], [5]), ([], []))
    for name, estimate in vars(m).items():
        if name != "parse_failure_rate":
            assert estimate == NOTHING
    assert brief(m.parse_failure_rate) == (0, 3)


def test_an_exact_match_ties_where_people_tie() -> None:
    assert metrics(([5, 5, 1], [4, 4, 2])).exact_match.value == 1
    assert metrics(([5, 5, 1], [4, 3, 2])).exact_match.value == 0
    assert metrics(([5, 4, 1], [4, 4, 2])).exact_match.value == 0


def test_tied_first_places_are_all_best() -> None:
    assert brief(metrics(([5, 5, 1], [5, 3, 5])).five_best) == (1 / 2, 2)
    assert metrics(([5, 3], [4.67, 2])).five_best == NOTHING


@pytest.mark.parametrize("seed", range(5))
def test_counts_equal_brute_force(seed: int) -> None:
    groups = random_groups(seed)
    right = ties = pairs = 0
    for group in groups:
        both = [(h, m) for h, m in zip(group.human, group.model, strict=True) if m is not None]
        for (h1, m1), (h2, m2) in itertools.combinations(both, 2):
            if h1 != h2:
                pairs += 1
                ties += m1 == m2
                right += (m1 - m2) * (h1 - h2) > 0
    m = measured(groups)
    assert brief(m.pairwise_accuracy) == (right / (pairs - ties), pairs - ties)
    assert brief(m.pairwise_accuracy_ties_half) == ((right + ties / 2) / pairs, pairs)
    assert brief(m.pairwise_accuracy_ties_wrong) == (right / pairs, pairs)
    assert brief(m.tie_rate) == (ties / pairs, pairs)
    missing = [score is None for group in groups for score in group.model]
    assert brief(m.parse_failure_rate) == (sum(missing) / len(missing), len(missing))


@pytest.mark.parametrize("seed", range(5))
def test_correlations_equal_those_of_scipy(seed: int) -> None:
    groups = random_groups(seed)
    spearman, kendall = [], []
    for group in groups:
        both = [(h, m) for h, m in zip(group.human, group.model, strict=True) if m is not None]
        human, model = [h for h, _ in both], [m for _, m in both]
        if len(set(human)) > 1 and len(set(model)) > 1:
            spearman.append(scipy.stats.pearsonr(scipy.stats.rankdata(human), scipy.stats.rankdata(model))[0])
            kendall.append(scipy.stats.kendalltau(human, model, variant="b").statistic)
            if len(human) > 2:  # for two, scipy's p-value warns
                assert spearman[-1] == pytest.approx(scipy.stats.spearmanr(human, model).statistic)
    m = measured(groups)
    assert brief(m.spearman) == (pytest.approx(sum(spearman) / len(spearman)), len(spearman))
    assert brief(m.kendall) == (pytest.approx(sum(kendall) / len(kendall)), len(kendall))


def ranks(values: list[float]) -> list[float]:
    """Ranks from 1; equal values share the mean of theirs."""
    return [sum(v < x for v in values) + (sum(v == x for v in values) + 1) / 2 for x in values]


@pytest.mark.parametrize("seed", range(200))
def test_correlations_of_one_group_equal_brute_force(seed: int) -> None:
    rng = random.Random(seed)
    human, model = ([float(rng.randint(0, 5)) for _ in range(2 + seed % 9)] for _ in range(2))
    m = metrics((human, list(model)))
    pairs = list(itertools.combinations(zip(human, model, strict=True), 2))
    orders = math.prod(sum(x[side] != y[side] for x, y in pairs) for side in (0, 1))
    if not orders:
        assert m.spearman == m.kendall == NOTHING
        return
    products = [(x[0] - y[0]) * (x[1] - y[1]) for x, y in pairs]
    concordant, discordant = sum(p > 0 for p in products), sum(p < 0 for p in products)
    assert m.kendall.value == pytest.approx((concordant - discordant) / math.sqrt(orders), abs=1e-12)
    x, y = ([r - (len(human) + 1) / 2 for r in ranks(values)] for values in (human, model))
    covariance, norms = sum(a * b for a, b in zip(x, y, strict=True)), math.hypot(*x) * math.hypot(*y)
    assert m.spearman.value == pytest.approx(covariance / norms, abs=1e-12)


def test_no_hit_in_few_cases_is_not_certainty() -> None:
    never = metrics(*[([1.0, 2.0], [2.0, 1.0])] * 8).exact_match
    assert (never.value, never.n, never.low) == (0, 8, 0)
    assert never.high == pytest.approx(0.3694, abs=1e-4)
    assert never.named("exact_match") == Metric(name="exact_match", value=0, n=8, low=0, high=never.high)


def test_order_of_groups_and_responses_changes_no_value() -> None:
    groups = random_groups(3)
    mixed = []
    for group in reversed(groups):
        order = list(range(len(group.human)))[::-1]
        mixed.append(ScoreGroup(human=[group.human[i] for i in order], model=[group.model[i] for i in order]))
    a, b = (measured(g) for g in (groups, mixed))
    for name, estimate in vars(a).items():
        assert estimate.value == pytest.approx(getattr(b, name).value)
        assert estimate.n == getattr(b, name).n


def test_intervals_hold_the_value_and_stay_on_their_scale() -> None:
    for name, estimate in vars(measured(random_groups(1))).items():
        lowest = -1 if name in ("spearman", "kendall") else 0
        assert lowest <= estimate.low <= estimate.value <= estimate.high <= 1
        assert estimate.low < estimate.high


def test_in_expected_mode_a_five_is_what_is_rounded_to_five() -> None:
    groups = {"q": ScoreGroup(human=[5, 3, 1], model=[4.6, 4.7, 4.4])}
    assert reward_model_sums(groups, highest=5)["five_best"] == {"q": (0, 0)}
    assert reward_model_sums(groups, highest=4.5)["five_best"] == {"q": (1, 2)}


def test_pairs_of_one_group_are_not_taken_for_independent() -> None:
    # Ten copies of each pair in its group tell no more than one does.
    def width(copies: int) -> float:
        groups = [ScoreGroup(human=[1, 2] * copies, model=([1, 2] if i % 2 else [2, 1]) * copies) for i in range(40)]
        estimate = measured(groups).pairwise_accuracy
        assert estimate.low is not None
        assert estimate.high is not None
        return estimate.high - estimate.low

    assert width(10) == pytest.approx(width(1))


def test_one_group_or_none_has_no_interval() -> None:
    estimate = metrics(([1, 2], [1, 2])).pairwise_accuracy
    assert estimate == Estimate(value=1, n=1, low=None, high=None)
    empty = metrics()
    assert len(vars(empty)) == 9
    assert all(estimate == NOTHING for estimate in vars(empty).values())


def test_results_are_json() -> None:
    m = reward_model_metrics(random_groups(2), max_score=5)
    rows = {name: dataclasses.asdict(estimate) for name, estimate in m.items()}
    read = json.loads(json.dumps(rows, allow_nan=False))
    assert {name: Estimate(**row) for name, row in read.items()} == m


def test_bad_groups_are_refused() -> None:
    with pytest.raises(DataError, match="2 human and 1 model"):
        ScoreGroup(human=[1, 2], model=[1])
    with pytest.raises(DataError, match="no number"):
        ScoreGroup(human=[1, 2], model=[1, float("nan")])


def test_histogram_counts_rounded_scores() -> None:
    assert histogram([0, 0.4, 0.5, 4.5, 5, None, 10 / 3], max_score=5) == (2, 1, 0, 1, 0, 2)
    assert histogram([], max_score=2) == (0, 0, 0)


def test_entropy_runs_from_one_value_to_all() -> None:
    assert score_entropy([5, 5, 5, None], max_score=5) == 0
    assert score_entropy(list(range(6)) * 3, max_score=5) == pytest.approx(1)
    assert score_entropy([0, 5], max_score=5) == pytest.approx(math.log(2) / math.log(6))
    assert score_entropy([None], max_score=5) is None


def test_scores_beyond_the_scale_are_refused() -> None:
    with pytest.raises(DataError, match="0 to 5"):
        histogram([6], max_score=5)
    with pytest.raises(DataError, match="0 to 5"):
        histogram([-1], max_score=5)
