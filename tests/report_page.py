"""What the tests of the report's pages share: the elements of a page, and its place."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

from nemo_srl.report.page import write_report
from nemo_srl.runs import open_run


def written(run_dir: Path) -> str:
    """Write the report of a run directory, and return its text."""
    return write_report(open_run(run_dir)).read_text(encoding="utf-8")


class Outline(HTMLParser):
    """The elements of a page by name, and the text of its data island."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.island = ""
        self._in_island = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._in_island = dict(attrs).get("id") == "data"

    def handle_endtag(self, tag: str) -> None:
        self._in_island = False

    def handle_data(self, data: str) -> None:
        if self._in_island:
            self.island += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def in_html(cell: str) -> str:
    """A cell of a table. A line may end before an interval and before a number of items, and nowhere else."""
    return cell.replace(" [", " <wbr>[").replace(" (n ", " <wbr>(n ")
