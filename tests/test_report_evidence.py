"""The evidence of a run: paired changes computed by hand, and what made each table."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from nemo_srl.artifacts import MANIFEST, SPEC
from nemo_srl.judging.intervals import SHARE, paired_change
from nemo_srl.report import comparison, evidence
from nemo_srl.report.drift import Drift
from nemo_srl.report.evidence import evidence_cells, judge_of, made_by_cells, names_of
from nemo_srl.report.page import render
from nemo_srl.runs import open_run
from tests.report_page import in_html
from tests.run_directory import make_run

ACCURACY = "pairwise_accuracy_ties_half"


def sums(*shares: float) -> dict[str, dict[str, tuple[float, float]]]:
    """Ten pairs of answers to each instruction."""
    return {ACCURACY: {f"instruction {i}": (10 * share, 10.0) for i, share in enumerate(shares)}}


def test_each_model_stands_beside_the_one_before_and_the_last_beside_m1() -> None:
    found = {"M0": {}, "M1": sums(0.2, 0.8, 0.5), "M2": sums(0.3, 0.8, 0.6), "M3": sums(0.4, 0.9, 0.5)}
    drift = [Drift("M2", "M1", 30, 0.75, 2.0, 2.0), Drift("M3", "M2", 30, None, 2.0, 2.0)]
    head, *lines = evidence_cells(found, drift)
    assert head == ["", "judge: pairwise accuracy, ties half, %", "change", "agreement with the model before"]
    cells = {line[0]: line[1:] for line in lines}
    assert cells["M0"] == ["-", "-", "-"]
    assert cells["M1"][0].startswith("50.0 [")
    assert cells["M1"][0].endswith("] (n 30)")
    assert cells["M1"][1] == "-", "M0 has no verdicts on the same items"
    change = paired_change(found["M1"][ACCURACY], found["M2"][ACCURACY], SHARE)
    assert change.low is not None
    assert change.high is not None
    assert cells["M2"][1] == f"+6.7 [{100 * change.low:+.1f}, {100 * change.high:+.1f}] (n 3)"
    assert cells["M2"][2] == "0.75 (n 30)"
    assert cells["M3"][2] == "-"
    assert cells["M3 - M1"][0] == ""
    assert cells["M3 - M1"][1].startswith("+10.0 [")


def test_what_was_not_measured_has_no_column_and_nothing_at_all_no_table() -> None:
    assert evidence_cells({"M1": {}}) == evidence_cells({}) == []
    true = {"true_score": {"a": (8.0, 2.0), "b": (4.0, 2.0)}}
    head, line = evidence_cells({"M1": true})
    assert head == ["", "true score, 0 to 5", "change"]
    assert line[0] == "M1"
    assert line[1].startswith("3.00 [")


def test_the_page_has_the_evidence_before_all_charts(made_run: Path, made_comparison: Path) -> None:
    run = open_run(made_run)
    page = render(run)
    assert page.index("<h2>Evidence</h2>") < page.index("<h2>How well each model judges</h2>")
    for line in evidence.of_run(run)[1:]:
        assert f"<th>{line[0]}</th>" + "".join(f"<td>{in_html(cell)}</td>" for cell in line[1:]) in page
    page = render(open_run(made_comparison))
    (_, (name, ifeval, *_), second) = comparison.evidence_cells(open_run(made_comparison))
    assert (name, second[0]) == ("m_1", "m.2")
    assert f"<th>m_1</th><td>{in_html(ifeval)}</td><td>-</td>" in page


def test_every_table_says_which_settings_and_which_judge_made_it(made_run: Path, made_comparison: Path) -> None:
    run = open_run(made_run)
    cells = {line[0]: line[1:] for line in made_by_cells(run, names_of(run))[1:]}
    assert cells["iter_01/judgements"] == ["-", "M1", "sampled, K 3, temperature 0.7"]
    assert cells["iter_02/judgements"][1] == "M2"
    assert cells["iter_00/evaluation_m0"][1] == "M0"
    assert cells["iter_02/evaluation"][1] == "M3"
    assert cells["iter_01/pairs"] == ["pairs.rule=best_worst, pairs.min_margin=0.0", "-", "-"]
    assert cells["iter_01/policy"][0] == "dpo.preference_loss=dpo, dpo.beta=0.1, dpo.sft_loss_weight=0.0"
    assert "iter_01/prompts" not in cells
    run = open_run(made_comparison)
    cells = {line[0]: line[1:] for line in made_by_cells(run, comparison.names_of(run))[1:]}
    assert cells["iter_00/match_m_1_big"] == ["-", "judge-7b", "pairwise, K 3, temperature 0.7"]
    assert cells["iter_00/match_m_1_m.2"][1] == "m.2"
    assert cells["iter_00/ifeval_m_1"] == ["-", "code", "-"]


def test_the_settings_of_a_method_are_shown(tmp_path: Path) -> None:
    """Code checks the answers, the best pairs are taken, and all of them are kept."""
    run_dir = make_run(tmp_path / "run", num_iterations=1)

    def change(stage: str, *, asks: bool = True, name: str = "", **config: dict[str, Any]) -> None:
        path = run_dir / "iter_01" / stage
        spec = json.loads((path / SPEC).read_text())
        for section, settings in config.items():
            spec["config"][section] |= settings
        spec["inputs"] = spec["inputs"] if asks else {}
        (path / SPEC).write_text(json.dumps(spec))
        manifest = json.loads((path / MANIFEST).read_text())
        (path / MANIFEST).write_text(json.dumps({**manifest, "stage": name or manifest["stage"]}))

    shutil.copytree(run_dir / "iter_01/judgements", run_dir / "iter_01/meta_judge")
    change("judgements", asks=False, judge={"mode": "verifier", "verifier": "ifeval"})
    change("pairs", pairs={"rule": "all_pairs", "num_pairs": 10, "second_judge": "m1"})
    change("policy", dpo={"sft_loss_weight": 1.0}, pairs={"accumulate": True})
    change("meta_judge", name="meta_judge", verdict_pairs={"source": "meta_judge", "num_prompts": 9, "max_chars": 50})
    run = open_run(run_dir)
    cells = {line[0]: line[1:] for line in made_by_cells(run, names_of(run))[1:]}
    assert cells["iter_01/judgements"] == ["-", "code", "ifeval"]
    assert cells["iter_01/pairs"][0] == (
        "pairs.rule=all_pairs, pairs.min_margin=0.0, pairs.num_pairs=10, pairs.second_judge=m1"
    )
    assert cells["iter_01/policy"][0].endswith("dpo.sft_loss_weight=1.0, pairs.accumulate=True")
    assert cells["iter_01/meta_judge"] == [
        "verdict_pairs.source=meta_judge, verdict_pairs.num_prompts=9, verdict_pairs.max_chars=50", "M1",
        "two verdicts in both orders, temperature 0.7",
    ]  # fmt: skip


def test_a_judge_has_the_name_of_its_server_or_directory() -> None:
    def spec(path: str, **engine: str) -> dict[str, object]:
        return {"config": {"engine": engine, "judge": {"engine": None}}, "inputs": {"policy": {"path": path}}}

    assert judge_of(spec("/x/hf", model="big"), {"/x/hf": "m"}, "judge", "policy") == "big"
    assert judge_of(spec("/old/place/iter_00/sft"), {"iter_00/sft": "M1"}, "policy") == "M1"
    assert judge_of(spec("/r/iter_01/policy/hf"), {}, "policy") == "iter_01/policy/hf"
    assert judge_of(spec("/models/Llama-7b"), {}, "policy") == "Llama-7b"


def test_a_run_of_an_older_version_has_its_tables_but_no_changes(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run", num_iterations=1)
    for path in run_dir.glob("iter_*/*/groups.jsonl"):
        path.unlink()
    spec = run_dir / "iter_01" / "pairs" / SPEC
    row = json.loads(spec.read_text())
    del row["config"]["pairs"]["rule"]
    spec.write_text(json.dumps(row))
    moved = shutil.move(run_dir, tmp_path / "moved")
    run = open_run(Path(moved))
    assert evidence.of_run(run) == []
    assert "No model has figures by item yet." in render(run)
    cells = {line[0]: line[1:] for line in made_by_cells(run, names_of(run))[1:]}
    assert cells["iter_01/pairs"][0] == "pairs.min_margin=0.0"
    assert cells["iter_01/judgements"][1] == "M1", "the run directory was moved"
