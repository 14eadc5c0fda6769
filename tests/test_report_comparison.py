"""The page of a comparison: matches with their sign test beside the paper's, IFEval, and every answer with verdicts."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Literal

import pytest

from nemo_srl.artifacts import MANIFEST, SPEC
from nemo_srl.errors import DataError
from nemo_srl.records import Candidate, Comparison, Metric
from nemo_srl.report import comparison
from nemo_srl.report.browser import CHOSEN, NEITHER, REJECTED
from nemo_srl.report.page import render
from nemo_srl.runs import open_run
from tests.report_page import Outline, in_html, written
from tests.run_directory import HOSTILE, make_comparison, make_run


@pytest.fixture(scope="module")
def page(made_comparison: Path) -> str:
    return written(made_comparison)


def test_every_match_has_its_figures_and_the_papers_stand_beside(page: str, made_comparison: Path) -> None:
    found = comparison.matches(open_run(made_comparison))
    assert list(found) == [("m_1", "big"), ("m_1", "m.2")]
    for (a, b), metrics in found.items():
        m = {x.name: x for x in metrics}
        won, low, high = m["win_rate"].value, m["win_rate"].low, m["win_rate"].high
        assert won is not None
        assert f"<th>{a} v {b}</th><td>{in_html(f'{won:.1%} [{low:.0%}, {high:.0%}]')}</td>" in page
        assert f"<td>{m['sign_test_p'].value:.3g}</td>" in page
        assert f"won {100 * won:.1f}%" in page
    assert "<th>M2 v SFT</th><td>49.2%</td><td>36.3%</td><td>14.5%</td>" in page
    assert "Judge: judge-7b, m.2." in page
    assert "no readable verdict" not in page
    assert "Comparison of m_1, big, m.2." in page
    assert re.search(r"<th>m_1</th><td>[\d.]+% <wbr>\[\d+%, \d+%\]</td>.*<td>9</td><td>9</td>", page), "IFEval"
    assert "Pairwise accuracy, ties excluded. this run:" in page


def test_models_text_stays_text(page: str) -> None:
    outline = Outline(page)
    assert [s.get("type") for s in outline.named("script")] == ["application/json", None]
    assert not outline.named("img")
    data = json.loads(outline.island)
    assert set(HOSTILE) <= {p[2] for p in data["prompts"]}
    assert any(v[1].endswith("Winner: tie") for c in data["candidates"] for v in c[7])


def test_an_answer_has_its_result_and_the_verdicts_of_all_its_matches(made_comparison: Path) -> None:
    data = comparison.browser_data(open_run(made_comparison), max_candidates=1000)
    names = data["names"]
    assert len(data["candidates"]) == 20 * 3
    by_question: dict[int, dict[str, list]] = {}
    for c in data["candidates"]:
        by_question.setdefault(c[0], {})[names[c[1]]] = c
    for found in by_question.values():
        assert {name: len(c[7]) for name, c in found.items()} == {"m_1": 4, "m.2": 2, "big": 2}
        for other in ("m.2", "big"):
            shares = [share for share, _ in found[other][7]]
            score = found[other][5]
            assert score == (None if None in shares else 1 if shares == [1, 1] else 0 if shares == [0, 0] else 0.5)
            assert found[other][6] == {1: CHOSEN, 0: REJECTED}.get(score, NEITHER)
    metrics = {m.name: m for m in comparison.matches(open_run(made_comparison))["m_1", "big"]}
    lost = sum(found["big"][5] == 1 for found in by_question.values())
    assert metrics["loss_rate"].value == pytest.approx(lost / metrics["loss_rate"].n)
    cut = comparison.browser_data(open_run(made_comparison), max_candidates=10)
    assert (len(cut["candidates"]), cut["num_omitted"]) == (9, 51), "whole questions"


def test_a_judge_that_says_something_else_is_named() -> None:
    rates = {("a", "b"): 0.75, ("a", "c"): 0.25}
    found = {pair: [Metric(name="unjudged_rate", value=rate, n=4)] for pair, rate in rates.items()}
    (warning,) = comparison.unreadable(found)
    assert warning.startswith("a v b: no readable verdict on 75% of the questions.")


def test_a_part_of_it_is_shown_as_far_as_it_goes(tmp_path: Path) -> None:
    run_dir = make_comparison(tmp_path / "run")
    for path in run_dir.glob(f"iter_00/*/{MANIFEST}"):
        if path.parent.name != "answers_m_1":
            path.unlink()
    page = render(open_run(run_dir))
    assert "Head to head</h2>" not in page
    assert "IFEval" not in page
    assert "20 answers" in page


@pytest.mark.parametrize("kind", ["match", "ifeval", "evaluation"])
def test_each_kind_of_measurement_alone_is_a_comparison(kind: str, tmp_path: Path) -> None:
    """Models that are given as files of answers make none here."""
    run_dir = make_comparison(tmp_path / "run")
    for path in run_dir.glob(f"iter_00/*/{MANIFEST}"):
        if not path.parent.name.startswith(kind):
            path.unlink()
    run = open_run(run_dir)
    assert comparison.is_comparison(run)
    assert {"m_1", "m.2"} <= set(comparison.models(run))


def test_an_older_comparison_has_its_figures_but_no_verdicts(tmp_path: Path) -> None:
    """It has no table of verdicts, and its judge is the input `policy`."""
    run_dir = make_comparison(tmp_path / "run")
    for directory in run_dir.glob("iter_00/match_*"):
        (directory / "verdicts.jsonl").unlink()
        spec = json.loads((directory / SPEC).read_text())
        spec["inputs"]["policy"] = spec["inputs"].pop("judge")
        (directory / SPEC).write_text(json.dumps(spec))
    page = render(open_run(run_dir))
    assert "Judge: judge-7b, m.2." in page
    assert "<th>m_1 v big</th>" in page
    assert {tuple(c[7]) for c in json.loads(Outline(page).island)["candidates"]} == {()}


def test_a_match_is_the_mean_of_its_readable_verdicts() -> None:
    def answer(response: str) -> dict[str, Candidate]:
        c = Candidate(prompt_id="q", sample_index=0, prompt="?", response=response, num_tokens=1, finish_reason="stop")
        return {"q": c}

    def verdict(order: Literal["ab", "ba"], index: int, share: float | None) -> Comparison:
        return Comparison(question_id="q", order=order, verdict_index=index, verdict="", first_share=share)

    said = [verdict("ab", 0, 1.0), verdict("ab", 1, 0.5), verdict("ab", 2, None), verdict("ba", 0, 1.0)]
    (match,) = comparison.matches_of(answer("long"), answer("a"), said)
    assert (match.first, match.second, match.length_difference) == (0.75, 0.0, 3)
    (match,) = comparison.matches_of(answer("long"), answer("a"), said[:3])
    assert (match.second, match.outcome) == (None, None)


def test_a_self_rewarding_run_has_the_other_page(tmp_path: Path) -> None:
    assert "Self-rewarding training of" in render(open_run(make_run(tmp_path / "run")))


def test_a_comparison_that_lacks_answers_is_an_error_that_says_so(made_comparison: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(made_comparison, run_dir)
    (run_dir / "iter_00" / "answers_m.2" / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"lacks answers of one of them"):
        render(open_run(run_dir))
