"""The pair rules on tables whose results are computed by hand."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from nemo_srl.config import PairsConfig
from nemo_srl.errors import ConfigError
from nemo_srl.pairing import build_pairs, consistency
from nemo_srl.records import Candidate, FinishReason, PreferencePair

Row = tuple[str, float, int]
"""Text, score, tokens. A text that begins with ~ was cut off."""


def candidates(rows: Sequence[Row], prompt_id: str = "p") -> tuple[list[Candidate], dict[str, float]]:
    found, scores = [], {}
    for i, (text, score, num_tokens) in enumerate(rows):
        reason: FinishReason = "length" if text.startswith("~") else "stop"
        c = Candidate(
            prompt_id=prompt_id, sample_index=i, prompt="Q", response=text, num_tokens=num_tokens, finish_reason=reason
        )
        found.append(c)
        scores[c.key] = score
    return found, scores


def texts(rows: Sequence[Row], earlier: Sequence[Row] = (), **settings: object) -> list[tuple[str, str]] | str:
    """The texts of the pairs of one prompt, or why there is none."""
    (mine, scores), (other, other_scores) = candidates(rows), candidates(earlier)
    cfg = PairsConfig(**settings)  # type: ignore[arg-type]
    pairs, dropped = build_pairs(mine, scores, cfg, anchor=other, anchor_scores=other_scores)
    return [(p.chosen, p.rejected) for p in pairs] if pairs else "".join(dropped)


# Scores from 0 to 5: with rho 0.32, good is 3.4 or more and bad is 1.6 or less.
FIVE = [("best, long", 5, 90), ("good, short", 4, 20), ("middle", 3, 5), ("bad, long", 1, 80), ("worst, short", 0, 10)]


@pytest.mark.parametrize(
    ("rho", "pair"),
    [
        (0.0, ("best, long", "worst, short")),
        (0.2, ("good, short", "bad, long")),  # 4.0 and 1.0 are just reached
        (0.19, ("best, long", "worst, short")),
        (0.32, ("good, short", "bad, long")),
        (0.4, ("middle", "bad, long")),
    ],
)
def test_length_control_takes_the_shortest_good_and_the_longest_bad_answer(rho: float, pair: tuple[str, str]) -> None:
    assert texts(FIVE, rule="length_control", rho=rho) == [pair]


def test_length_control_breaks_ties_by_length_and_never_chooses_a_text_that_was_cut_off() -> None:
    rows = [("a", 5, 9), ("b", 5, 3), ("~c", 5, 1), ("d", 0, 4), ("~e", 0, 9)]
    assert texts(rows, rule="length_control") == [("b", "~e")]
    assert texts([("a", 3, 1), ("b", 3, 2)], rule="length_control", rho=0.3) == "tied"
    assert texts([("~a", 3, 1), ("~b", 4, 2)], rule="length_control") == "truncated"


def test_margin_takes_the_next_answer_that_is_worse_by_enough() -> None:
    assert texts(FIVE, rule="margin") == [("best, long", "good, short")]
    assert texts(FIVE, rule="margin", min_margin=1.0) == [("best, long", "middle")]
    assert texts(FIVE, rule="margin", min_margin=4.5) == [("best, long", "worst, short")]
    assert texts(FIVE, rule="margin", min_margin=5.0) == "tied"
    assert texts([("a", 5, 1), ("a", 3, 1), ("b", 1, 1)], rule="margin") == [("a", "b")]


def test_anchored_rejects_the_worst_answer_of_both_models_and_chooses_among_the_own_ones() -> None:
    own = [("mine", 4, 1), ("my worst", 2, 1)]
    assert texts(own, [("early", 1, 1), ("early best", 5, 1)], rule="anchored") == [("mine", "early")]
    assert texts(own, [("early", 3, 1)], rule="anchored") == [("mine", "my worst")]
    assert texts(own, [("early", 2, 1)], rule="anchored") == [("mine", "my worst")]  # of equals, M_t's own
    assert texts(own, rule="anchored") == [("mine", "my worst")]
    assert texts([("a", 4, 1), ("a", 4, 1)], [("b", 1, 1)], rule="anchored") == [("a", "b")]


def test_all_pairs_are_ordered_by_their_margins_and_have_keys_of_their_own() -> None:
    rows = [("a", 5, 1), ("b", 3, 1), ("~c", 4, 1), ("d", 3, 1)]
    everything = [("a", "b"), ("a", "d"), ("a", "~c")]
    assert texts(rows, rule="all_pairs") == everything
    assert texts(rows, rule="all_pairs", num_pairs=2) == everything[:2]
    assert texts([("a", 1, 1), ("b", 1, 1)], rule="all_pairs") == "tied"
    assert texts([("a", 1, 1), ("a", 2, 1)], rule="all_pairs") == "identical"
    pairs, _ = build_pairs(*candidates(rows), PairsConfig(rule="all_pairs"))
    assert [p.key for p in pairs] == ["p", "p/01", "p/02"]


@pytest.mark.parametrize("rule", ["best_worst", "length_control", "margin", "anchored", "all_pairs"])
@pytest.mark.parametrize("rows", [FIVE, [("a", 1, 1), ("b", 1, 1), ("~c", 9, 1)], [("a", 2, 1), ("a", 1, 1)]])
def test_whatever_the_rule_the_chosen_answer_has_the_higher_score_and_another_text(rule: str, rows: list[Row]) -> None:
    pairs, dropped = build_pairs(*candidates(rows), PairsConfig(rule=rule, rho=0.5))
    assert all(p.chosen_score > p.rejected_score and p.chosen != p.rejected for p in pairs)
    assert bool(pairs) != bool(dropped)


def test_consistency_is_the_mean_of_scaled_taus_by_hand() -> None:
    three = [("a", 0.0, 1), ("b", 0.0, 1), ("c", 0.0, 1)]
    mine = [*candidates(three, "p")[0], *candidates(three, "q")[0], *candidates(three, "r")[0]]
    keys = [c.key for c in mine]
    first = dict(zip(keys, [3, 2, 1, 3, 2, 1, 2, 2, 2], strict=True))
    # p: the same order, tau 1. q: one of three pairs is turned round, tau 1/3. r: the first judge ties all: no case.
    second = dict(zip(keys, [5, 4, 0, 2, 3, 1, 3, 2, 1], strict=True))
    assert consistency(mine, first, second) == pytest.approx((1 + (1 / 3 + 1) / 2) / 2)
    reversed_ = {key: -score for key, score in first.items()}
    assert consistency(mine, first, reversed_) == 0
    assert consistency(mine, first, {keys[0]: 1.0}) is None


def test_a_confidence_of_one_leaves_no_trace_in_a_table() -> None:
    from nemo_srl.records import from_row, to_row

    texts = {"prompt_id": "p", "prompt": "Q", "chosen": "a", "rejected": "b"}
    sure = PreferencePair(**texts, chosen_score=1.0, rejected_score=0.0)
    assert not {"confidence", "pair_index"} & to_row(sure).keys()
    unsure = PreferencePair(**texts, chosen_score=1.0, rejected_score=0.0, confidence=0.75)
    assert from_row(PreferencePair, to_row(unsure), where="x") == unsure


def test_settings_out_of_range_are_refused() -> None:
    for key, value in (("rho", 0.6), ("num_pairs", -1), ("min_margin", -1.0), ("anchor", "http://host/v1")):
        with pytest.raises(ConfigError, match=rf"pairs\.{key}="):
            PairsConfig(**{key: value})  # type: ignore[arg-type]
