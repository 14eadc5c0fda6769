"""Each alarm speaks for its own reason, and a healthy run is silent."""

from __future__ import annotations

from nemo_srl.records import Metric
from nemo_srl.report.alarms import alarms

HEALTHY = {
    "anchor_agreement": 0.95,
    "own_margin": 2.2,
    "anchor_margin": 2.0,
    "self_minus_anchor": 0.02,
    "score_entropy": 0.9,
}


def metrics(**changes: float | None) -> list[Metric]:
    values = {**HEALTHY, **changes}
    return [Metric(name=k, value=v, n=100, low=None if v is None else v - 0.1) for k, v in values.items()]


def test_a_healthy_run_raises_no_alarm() -> None:
    assert alarms({t: metrics() for t in (1, 2, 3)}) == []
    assert alarms({}) == []


def test_each_alarm_names_its_iteration_and_reason() -> None:
    cases = {
        "agreement": metrics(anchor_agreement=0.6),
        "inflation": metrics(self_minus_anchor=0.7),
        "entropy": metrics(score_entropy=0.2),
        "margin": metrics(anchor_margin=0.7),
    }
    for name, bad in cases.items():
        found = alarms({1: metrics(), 2: bad})
        assert [(a.iteration, a.name) for a in found] == [(2, name)]
        assert found[0].text.startswith("iteration 2: ")


def test_an_inflation_that_may_be_chance_raises_no_alarm() -> None:
    assert alarms({1: metrics(self_minus_anchor=0.3)}) == []  # its interval begins at 0.2


def test_what_could_not_be_measured_raises_no_alarm() -> None:
    assert alarms({1: metrics(anchor_margin=None, anchor_agreement=None, score_entropy=None)}) == []
