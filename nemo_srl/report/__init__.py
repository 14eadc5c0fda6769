"""What a run shows: a table to read in a terminal, a page to open in a browser, and the card of its model."""

from __future__ import annotations

from nemo_srl.report.card import model_card
from nemo_srl.report.comparison import ifeval_cells, match_cells, paper_cells, unreadable
from nemo_srl.report.page import write_report
from nemo_srl.report.text import ROWS, markdown, table

__all__ = [
    "ROWS",
    "ifeval_cells",
    "markdown",
    "match_cells",
    "model_card",
    "paper_cells",
    "table",
    "unreadable",
    "write_report",
]
