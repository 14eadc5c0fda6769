"""What people read about a run: a table in the terminal, a page in the browser, a model card, alarms, trackers."""

from nemo_srl.report.card import model_card
from nemo_srl.report.comparison import ifeval_cells, match_cells, paper_cells, unreadable
from nemo_srl.report.page import evidence_cells, write_report
from nemo_srl.report.text import ROWS, markdown, table

__all__ = [
    "ROWS",
    "evidence_cells",
    "ifeval_cells",
    "markdown",
    "match_cells",
    "model_card",
    "paper_cells",
    "table",
    "unreadable",
    "write_report",
]
