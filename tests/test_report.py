"""The table at the end of a run."""

from __future__ import annotations

from nemo_srl.records import Metric
from nemo_srl.report import ROWS, table
from nemo_srl.report.text import CHECKED


def test_every_row_is_there_with_its_n_and_nothing_measured_is_a_dash() -> None:
    m1 = [
        Metric(name="valid_verdict_rate", value=0.975, n=40),
        Metric(name="self_score", value=None, n=0),
        Metric(name="spearman", value=0.25, n=12, low=0.1, high=0.4),
        Metric(name="score_share_0", value=0.25, n=4),
        Metric(name="score_share_5", value=0.75, n=4),
    ]
    lines = table({"M0": [], "M1": m1}).split("\n")
    assert len(lines) == len(ROWS) - len(CHECKED) + 3, "without the rows of checked data"
    assert len({len(line) for line in lines}) == 1
    cells = {line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:4]] for line in lines}
    assert cells["valid verdicts"] == ["-", "98% (n 40)"]
    assert cells["self-score, 0 to 5"] == ["-", "-"]
    assert cells["Spearman"][1] == "0.250 [0.100, 0.400] (n 12)"
    assert cells["share of scores 0 to 5, %"] == ["-", "25 75"]
