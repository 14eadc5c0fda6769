"""`report.html`: a run, or a comparison of models, as one file that opens offline and loads nothing.

Text of models is untrusted. The template escapes all of it. The browser's data is escaped JSON, and the script shows it
as text nodes only. The page's content security policy allows no connection and only the page's own script, by its hash.
The script is needed for the browser of candidates alone: charts and tables work without it.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from nemo_srl.artifacts import write_atomic
from nemo_srl.records import Metric
from nemo_srl.report import comparison, evidence, paper, sections
from nemo_srl.report.alarms import alarms
from nemo_srl.report.browser import MAX_CANDIDATES, browser_data, island
from nemo_srl.report.drift import drift
from nemo_srl.report.text import cells, metric_lines
from nemo_srl.runs import Run
from nemo_srl.stages import evaluation, ifeval

_DIRECTORY = Path(__file__).parent


def render(run: Run, *, max_candidates: int = MAX_CANDIDATES) -> str:
    """The page of a self-rewarding run, or of a comparison of models."""
    if comparison.is_comparison(run):
        data = comparison.browser_data(run, max_candidates=max_candidates)
        return _page("page.comparison.html", run, data, _of_comparison(run))
    return _page("page.run.html", run, browser_data(run, max_candidates=max_candidates), _of_run(run))


def _page(template: str, run: Run, data: Mapping[str, Any], values: Mapping[str, Any]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_DIRECTORY), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    script = (_DIRECTORY / "page.js").read_text(encoding="utf-8")
    return environment.get_template(template).render(
        name=run.run_dir.resolve().name,
        num_candidates=len(data["candidates"]),
        num_omitted=data["num_omitted"],
        data=island(data),
        css=Markup((_DIRECTORY / "page.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        **values,
    )


def _of_run(run: Run) -> dict[str, Any]:
    evaluations = run.evaluations()
    length_table, length_charts = sections.lengths(run)
    config = run.config()
    anchor = {t: metrics for t in run.iterations if (metrics := run.table(t, "anchor", Metric))}
    anchor_rows = {m.name: (m.name, m.name.replace("_", " "), "{:.2f}") for metrics in anchor.values() for m in metrics}
    return {
        "base_model": Path(config["model"]["path"]).name,
        "models": list(evaluations),
        "num_iterations": config["num_iterations"],
        "finished": run.find(config["num_iterations"], "evaluation") is not None,
        "anchor": metric_lines({f"iteration {t}": metrics for t, metrics in anchor.items()}, anchor_rows.values()),
        "alarms": [alarm.text for alarm in alarms(anchor)] if anchor else None,
        "drift": drift(run, run.evaluated()),
        "evidence": evidence_cells(run),
        "made_by": evidence.made_by_cells(run, evidence.names_of(run)),
        "judging": sections.metric_charts(evaluations, sections.JUDGING),
        "answering": sections.metric_charts(evaluations, sections.ANSWERING),
        "table": cells(evaluations),
        "paper_answering": paper.ANSWERING,
        "scores": sections.score_charts(run, evaluations),
        "length_table": length_table,
        "length_charts": length_charts,
        "training": sections.training_charts(run),
        "funnels": sections.funnels(run),
        "costs": sections.costs(run),
        "unanswered": sections.unanswered(run),
    }


def _of_comparison(run: Run) -> dict[str, Any]:
    found, evaluations = comparison.matches(run), comparison.measured(run, evaluation.STAGE)
    following = comparison.measured(run, ifeval.STAGE)
    return {
        "evidence": evidence_cells(run),
        "made_by": evidence.made_by_cells(run, comparison.names_of(run)),
        "models": comparison.models(run),
        "judges": comparison.judges(run),
        "unreadable": comparison.unreadable(found),
        "bars": comparison.bars(comparison.match_shares(found)),
        "match_table": comparison.match_cells(found) if found else [],
        "paper_bars": comparison.bars(paper.HEAD_TO_HEAD),
        "paper_table": comparison.paper_cells(),
        "ifeval": comparison.ifeval_cells(following) if following else [],
        "judging": sections.metric_charts(evaluations, sections.JUDGING),
        "table": cells(evaluations),
        "unanswered": sections.unanswered(run),
    }


def evidence_cells(run: Run) -> list[list[str]]:
    """The cells of the page's first table, as `evidence.evidence_cells` describes them."""
    return comparison.evidence_cells(run) if comparison.is_comparison(run) else evidence.of_run(run)


def write_report(run: Run) -> Path:
    """Write `report.html` into the run directory and return its path."""
    path = run.run_dir / "report.html"
    write_atomic(path, render(run))
    return path
