"""The page of a run: what it shows, and that text of a model stays text."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from nemo_srl.artifacts import MANIFEST
from nemo_srl.records import Candidate, Judgement, PreferencePair
from nemo_srl.report.browser import CHOSEN, REJECTED, browser_data, island
from nemo_srl.report.charts import ticks
from nemo_srl.report.drift import Drift, drift
from nemo_srl.report.page import render
from nemo_srl.report.sections import costs, funnels, lengths, score_length_correlation
from nemo_srl.runs import open_run
from tests.report_page import Outline, written
from tests.run_directory import HOSTILE, add_anchor, make_run


@pytest.fixture(scope="module")
def page(made_run: Path) -> str:
    return written(made_run)


def test_models_text_stays_text(page: str) -> None:
    outline = Outline(page)
    assert [s.get("type") for s in outline.named("script")] == ["application/json", None]
    assert not outline.named("img")
    assert "\u2028" not in page
    data = json.loads(outline.island)
    texts = {p[2] for p in data["prompts"]} | {c[2] for c in data["candidates"]}
    assert set(HOSTILE) <= texts, "escaping must not change what is read back"


def test_the_page_asks_nothing_of_the_network_and_runs_only_its_own_script(page: str) -> None:
    outline = Outline(page)
    policy = next(m["content"] for m in outline.named("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert "default-src 'none'" in policy
    assert re.search(r"script-src 'sha256-[A-Za-z0-9+/]{43}='", policy)
    links = [v for _, a in outline.elements for k, v in a.items() if k in ("src", "href", "action") and v]
    assert all(link.startswith(("#", "data:")) for link in links), links
    assert not any(k.startswith("on") for _, a in outline.elements for k in a)


@pytest.mark.parametrize("text", [*HOSTILE, "]]>", "<!--", "</SCRIPT >", "\\u003c", "\u2028\u2029"])
def test_an_island_gives_its_strings_back_and_holds_no_markup(text: str) -> None:
    found = str(island({"x": [text]}))
    assert json.loads(found) == {"x": [text]}
    assert not re.search("[<>&\u2028\u2029]", found)


def test_both_axes_stand_beside_the_paper(page: str) -> None:
    assert "Pairwise accuracy, ties excluded. this run:" in page
    assert "the paper (70B): 78.7%, 80.4%, 81.7%" in page
    for heading in (
        "judges",
        "answers",
        "scores are spread",
        "Lengths",
        "prompts to pairs",
        "Training",
        "Time and memory per stage",
    ):
        assert re.search(f"<h2>[^<]*{heading}", page), heading
    assert "DPO: reward margin by step" in page
    assert "Saturation: verdicts with the highest score. this run:" in page
    assert "15.38" in page
    assert "not finished" not in page


def test_alarms_are_said_at_the_top_where_the_anchor_looked(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run")
    assert 'id="alarms"' not in render(open_run(run_dir)), "where nobody looked, nothing is said"
    add_anchor(run_dir, 1, agreement=0.9)
    page = render(open_run(run_dir))
    assert "No alarm" in page
    add_anchor(run_dir, 2, agreement=0.55)
    page = render(open_run(run_dir))
    assert "iteration 2: the anchor prefers the chosen response in 55% of the new pairs" in page
    assert page.index("What looks wrong") < page.index("How well each model judges")
    assert "<th>anchor agreement</th>" in page


def test_a_run_under_way_shows_what_it_has(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run")
    for stage in ("pairs", "policy", "evaluation", "judgements"):
        (run_dir / "iter_02" / stage / MANIFEST).unlink()
    page = render(open_run(run_dir))
    assert "This run is not finished" in page
    assert json.loads(Outline(page).island)["candidates"][-1][5] is None, "not judged yet"
    for path in run_dir.glob(f"iter_0[012]/*/{MANIFEST}"):
        if path.parent.name != "sft":
            path.unlink()
    page = render(open_run(run_dir))
    assert "There are no candidates yet" in page
    assert "SFT: loss by step" in page


def test_the_browser_marks_the_pairs_and_says_what_it_leaves_out(made_run: Path) -> None:
    run = open_run(made_run)
    data = browser_data(run)
    for t in (1, 2):
        pairs = {p.prompt_id: p for p in run.table(t, "pairs", PreferencePair)}
        marked = {
            (data["prompts"][c[0]][1], c[6]): c for c in data["candidates"] if c[6] and data["prompts"][c[0]][0] == t
        }
        assert len(marked) == 2 * len(pairs)
        for key, pair in pairs.items():
            assert (marked[key, CHOSEN][2], marked[key, CHOSEN][5]) == (pair.chosen, pair.chosen_score)
            assert (marked[key, REJECTED][2], marked[key, REJECTED][5]) == (pair.rejected, pair.rejected_score)
    assert len(data["candidates"]) == 2 * 12 * 4
    cut = browser_data(run, max_candidates=40)
    assert len(cut["candidates"]) + cut["num_omitted"] == 2 * 12 * 4
    assert [sum(p[0] == t for p in cut["prompts"]) for t in (1, 2)] == [5, 5], "whole prompts, evenly"


def test_funnel_and_cost_count_everything_once(made_run: Path) -> None:
    run = open_run(made_run)
    for bar, steps in funnels(run):
        assert sum(int(label.split()[-1]) for _, label in bar.legend) == 12
        assert ("answers", "48, 10% cut off") in steps
        assert steps[0] == ("instructions generated and dropped", "5 similar, 3 length")
    found = costs(run)
    assert sum(c.seconds for c in found) == sum(s.manifest.seconds for s in run.stages)
    assert found[0].name == "policy"
    assert found[0].share == 1.0
    cells, _ = lengths(run)
    assert [line[0] for line in cells] == ["iteration", "1", "2"]


def measured_drift(run_dir: Path) -> list[Drift]:
    run = open_run(run_dir)
    return drift(run, run.evaluated())


def test_drift_compares_each_judge_with_the_one_before_on_the_same_answers(made_run: Path) -> None:
    rows = measured_drift(made_run)
    assert [(d.before, d.model, d.n) for d in rows] == [("M0", "M1", 24), ("M1", "M2", 24), ("M2", "M3", 24)]
    assert all(d.spearman is not None and -1 <= d.spearman <= 1 for d in rows)
    assert rows[0].mean_score == rows[1].mean_score_before
    same = made_run / "iter_00" / "evaluation" / "judgements.jsonl"
    old, other = same.read_text(), (made_run / "iter_01" / "evaluation" / "judgements.jsonl").read_text()
    same.write_text(other)
    try:
        assert measured_drift(made_run)[1].spearman == pytest.approx(1.0)
    finally:
        same.write_text(old)


def test_a_run_without_published_judgements_has_no_drift(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run", num_iterations=1)
    for path in run_dir.glob("iter_*/*/judgements.jsonl"):
        path.unlink()
    assert measured_drift(run_dir) == []
    assert "Drift of the judge" not in render(open_run(run_dir))


def test_a_reason_of_another_pair_rule_is_shown_under_its_own_name(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run", num_iterations=1)
    path = run_dir / "iter_01" / "pairs" / MANIFEST
    manifest = json.loads(path.read_text())
    manifest["metrics"] = {"num_pairs": 7, "num_too_short": 3, "num_tied": 2, "pairs_per_100_prompts": 58}
    path.write_text(json.dumps(manifest))
    ((bar, steps),) = funnels(open_run(run_dir))
    assert [label for _, label in bar.legend] == ["a pair 7", "tied 2", "too_short 3"]
    assert steps[-1] == ("pairs", "7 of 12 prompts")


def test_stages_come_in_the_order_of_the_loop(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run", num_iterations=1)
    for name in ("own_answers", "a_users_own"):
        shutil.copytree(run_dir / "iter_01" / "candidates", run_dir / "iter_01" / name)
    path = run_dir / "iter_01" / "a_users_own" / MANIFEST
    path.write_text(path.read_text().replace('"candidates"', '"unheard_of"'))
    names = [s.name for s in open_run(run_dir).stages if s.iteration == 1]
    first = ["prompts", "candidates", "own_answers", "judgements", "pairs", "policy"]
    assert names == [*first, "evaluation", "a_users_own"]


def test_a_judge_that_likes_length_is_seen() -> None:
    def candidate(i: int, response: str) -> Candidate:
        return Candidate(
            prompt_id="p", sample_index=i, prompt="?", response=response, num_tokens=1, finish_reason="stop"
        )

    candidates = [candidate(i, "x" * (i + 1)) for i in range(4)]
    scores = [1.0, 2.0, 3.0, None]
    judged = [
        Judgement(candidate_key=c.key, judgement_index=0, verdict="", score=s)
        for c, s in zip(candidates, scores, strict=True)
    ]
    assert score_length_correlation(candidates, judged) == pytest.approx(1.0)
    assert score_length_correlation(candidates, judged[:1]) is None


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0.62, 0.69, [0.62, 0.64, 0.66, 0.68, 0.7]),
        (3, 3, [1, 2, 3, 4, 5]),
        (float("nan"), 1, [0.0, 1.0]),
    ],
)
def test_ticks_are_round_and_enclose(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == expected
