"""Checked data: what code sees in an answer, the constraints, the topic, and the true score."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from nemo_srl.data import texts
from nemo_srl.data.checked.constraints import KINDS, Constraint
from nemo_srl.data.checked.topics import stems, topics
from nemo_srl.data.checked.truth import CheckedInstruction, true_score
from nemo_srl.errors import DataError


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("Bees make honey.", 3),
        ("- Bees make honey\n2. Wasps - do not", 6),  # markers and a lone dash are no words
        ("It costs 12,50 euros (about).", 5),
        ("... !", 0),
        ("", 0),
    ],
)
def test_words_are_counted_as_a_person_counts_them(text: str, number: int) -> None:
    assert len(texts.words(text)) == number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("Bees make honey.", 1),
        ("Bees make honey", 1),
        ("Bees fly. Do they sleep? Yes!", 3),
        ("bees fly. do they sleep? yes!", 3),
        ("It costs 2.5 euros.", 1),
        ("Ask Mr. Lane, e.g. on Monday.", 1),
        ('"Stay," he said. "Why?" asked the robin.', 2),
        ('He said "Stop!" Then he left.', 2),
        ("Dear Ada,\n\nThank you.", 2),
        ("1. Dig a hole.\n2. Plant the tree.", 2),
        ("Well... No.", 2),
        ("", 0),
    ],
)
def test_sentences(text: str, number: int) -> None:
    assert len(texts.sentences(text)) == number


def test_items_are_the_lines_with_a_marker_or_all_lines() -> None:
    assert texts.items("Here you go:\n- A\n* B\n3. C\n4) D\nThat is all.") == ["- A", "* B", "3. C", "4) D"]
    assert texts.items("One line\n\nand another") == ["One line", "and another"]
    assert not texts.is_list("- only one item")


@pytest.mark.parametrize(
    ("text", "loop"),
    [
        ("We are here now. Yes, we are here now.", False),
        ("we are here now, we are here now", False),
        ("we are here now, we are here now, we are here now", True),
        ("Rain is good. Rain is good.", False),  # short sentences may be said twice
        ("Rain is good for us. Sun! Rain is good for us.", True),
        ("very very very very very very", True),
    ],
)
def test_a_loop_is_a_phrase_said_three_times_or_a_sentence_said_twice(text: str, loop: bool) -> None:
    assert texts.has_loop(text) == loop


@pytest.mark.parametrize(
    ("text", "ended"),
    [
        ("Bees make honey.", True),
        ("Bees make", False),
        ("Bees make,", False),
        ('He said: "Stop!"', True),
        ("Bees make honey (and wax)", True),
        ("- Bees\n- Wasps", True),
        ("- Bees.\n- Was", False),  # the other items have a mark
        ("- Bees\n- Wasps\nThat is", False),
        ("Thank you.\n\nKind regards,\nAda Brown", True),
        ("First we looked,\nand then we went down to the river in the evening", False),
        ("", False),
    ],
)
def test_the_form_of_the_end_shows_whether_a_text_is_complete(text: str, ended: bool) -> None:
    assert texts.is_ended(text) == ended


CASES: dict[tuple[str, Any], tuple[list[str], list[str]]] = {
    ("sentences", 2): (["Bees fly. They sting."], ["Bees fly.", "Bees fly. They sting. Run!"]),
    ("items", 2): (["- A\n- B", "A list:\n- A\n- B"], ["- A", "- A\n- B\n- C"]),
    ("max_words", 3): (["Bees make honey.", "Bees"], ["Bees make good honey."]),
    ("min_words", 3): (["Bees make honey.", "Bees make good honey."], ["Bees fly."]),
    ("contains", "gas"): (["The Gas burns.", "It is gas"], ["All gases burn.", "Gasoline burns."]),
    ("avoids", "gas"): (["All gases burn."], ["The gas burns.", "GAS!"]),
    ("starts_with", "Of course"): (["Of course! Yes.", '"of course'], ["Of courses", "Well, of course."]),
    ("ends_with", "good luck"): (["Go. Good luck!", 'Go. "Good luck."'], ["Good luck to you.", "No good lucks"]),
    ("lower_case", None): (["bees fly.", "12 bees"], ["Bees fly.", "bees fly to Rome."]),
    ("no_comma", None): (["Bees fly."], ["Bees, too."]),
    ("quoted", None): (['"Bees fly."', " \u201cBees.\u201d\n"], ['"Bees" fly.', '"A," he said. "B."', "Bees.", '"']),
    ("question", None): (["Bees fly. Why?", '"Why?"'], ["Why? Because.", "Why"]),
    ("capital_word", "fly"): (["Bees FLY."], ["Bees fly.", "Bees FLY, and birds fly.", "Bees."]),
}


@pytest.mark.parametrize(("kind", "value"), CASES)
def test_constraints(kind: str, value: Any) -> None:
    constraint = Constraint(kind, value)
    kept, broken = CASES[kind, value]
    assert [a for a in kept if not constraint.holds(a)] == []
    assert [a for a in broken if constraint.holds(a)] == []
    assert not constraint.holds("")
    assert not constraint.holds(" ... ")


def test_every_kind_of_constraint_has_cases_and_says_its_value() -> None:
    assert {kind for kind, _ in CASES} == set(KINDS)
    for (kind, value), number in ((case, n) for case in CASES for n in range(3)):
        phrase = Constraint(kind, value).phrase(number)
        assert {2: "two", 3: "three", None: ""}.get(value, value) in phrase
        assert phrase.endswith(".")
    assert Constraint("sentences", 1).phrase(0) == "Use exactly one sentence."
    assert Constraint("max_words", 30).phrase(0) == "Use at most 30 words."


@pytest.mark.parametrize(("kind", "value"), [("rhyme", 2), ("max_words", "30"), ("contains", ""), ("no_comma", 1)])
def test_a_constraint_that_makes_no_sense_is_refused(kind: str, value: Any) -> None:
    with pytest.raises(DataError, match="no such constraint" if kind == "rhyme" else "this constraint takes"):
        Constraint(kind, value)


def test_forms_of_a_word_have_one_stem() -> None:
    assert stems("Baking bakes baked") == {"bak"}
    assert stems("The colour of colors") == {"color"}
    assert stems("berries and a berry; grinning, grin; don't") == {"berri", "grin"}
    assert stems("It freezes at 0\u00b0C") == {"freez", "0", "c"}


def test_a_topic_has_the_words_of_question_answer_and_list_but_no_common_ones() -> None:
    tasks = {f"t{i}": (f"What is number {i}?", f"A common riddle {i}.", ["riddles"]) for i in range(20)}
    tasks["mine"] = ("Rewrite politely: 'Close the window.'", "Please shut the window, friend.", ["kindly"])
    found = topics(tasks)
    assert found["mine"].asked == ["politeli"]
    assert set(found["mine"].others) == stems("close window shut friend kindly")
    assert "common" not in found["t7"].others  # all answers have it
    assert "riddl" in found["t7"].others  # given as a word of the topic


BREAD = CheckedInstruction(
    instruction_id="bread-a",
    task_id="bread",
    split="train",
    category="explain",
    instruction='Explain why bread dough rises. Use at most ten words. Include the word "gas".',
    constraints=[{"kind": "max_words", "value": 10}, {"kind": "contains", "value": "gas"}],
    asked=["bread", "dough", "ris"],
    topic=["bubbl", "gas", "yeast"],
)
LONG = "Yeast gives off gas, and this gas makes the dough rise in the end."


@pytest.mark.parametrize(
    ("answer", "points"),
    [
        ("Yeast makes gas, so the dough rises.", "11111"),
        (LONG, "11101"),
        ("Yeast makes bubbles, so the dough rises.", "11110"),
        ("Yeast makes gas, so the dough", "10111"),
        ("Yeast makes gas in dough. Yeast makes gas in dough.", "11011"),
        ("Yeast.", "11110"),  # one word of the topic is enough in a short answer
        ("Bread contains gas.", "11111"),
        ("My uncle bakes every Sunday morning for the whole village.", "01100"),
        ("A cat runs with gas.", "11111"),  # limit: a short senseless answer with a word of the topic
        (BREAD.instruction, "01100"),
        ("Explain why bread dough rises.", "01100"),
        ("So bread dough rises.", "01100"),  # nothing new
        ("", "00000"),
        ("...", "00000"),
    ],
)
def test_the_five_points(answer: str, points: str) -> None:
    true = true_score(BREAD, answer)
    found = (true.on_topic, true.complete, true.no_loop, true.first_constraint, true.second_constraint)
    assert "".join(str(int(p)) for p in found) == points
    assert true.score == points.count("1")


def test_an_answer_that_was_cut_off_is_not_complete_even_after_a_full_stop() -> None:
    answer = "Yeast makes gas, so the dough rises."
    assert true_score(BREAD, answer).score == 5
    assert not true_score(BREAD, answer, finish_reason="length").complete


def test_a_constraint_that_is_alone_counts_twice() -> None:
    alone = replace(BREAD, constraints=BREAD.constraints[:1])
    assert true_score(alone, LONG).score == 3
    assert true_score(alone, "Yeast makes bubbles, so the dough rises.").score == 5
    with pytest.raises(DataError, match="bread-a: 0 constraints"):
        true_score(replace(BREAD, constraints=[]), LONG)
