"""The page in a real browser: 10,000 candidates, sorted and searched, without an error or a request.

Needs Chromium (Debian: `apt-get install chromium`). Where there is none these tests are not there, unless
NEMO_SRL_REQUIRE_CHROMIUM is set, as it is in CI.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from nemo_srl.report import write_report
from nemo_srl.runs import open_run
from tests import chromium
from tests.run_directory import make_comparison, make_run

if not os.environ.get("NEMO_SRL_REQUIRE_CHROMIUM") and chromium.find() is None:
    pytest.skip("there is no Chromium on this machine", allow_module_level=True)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[chromium.Page]:
    base = tmp_path_factory.mktemp("browser")
    report = write_report(open_run(make_run(base / "run", num_prompts=1250)))
    with chromium.browser(base / "profile") as tab:
        tab.open(report)
        yield tab


def rows(page: chromium.Page, column: int) -> list[str]:
    """What the drawn rows show in a column."""
    found: list[str] = page.evaluate(
        f"[...document.querySelectorAll('.row')].map(r => r.children[{column}].textContent)"
    )
    return found


def click(page: chromium.Page, column: str) -> None:
    page.evaluate(f"document.querySelector('[data-column={column}]').click()")


def search(page: chromium.Page, text: str) -> Any:
    """Type into the search field; returns the count that is shown afterwards."""
    return page.evaluate(
        "new Promise(done => { const s = document.getElementById('search'); s.value = "
        f"{text!r}; s.dispatchEvent(new Event('input')); setTimeout(() => done("
        "document.getElementById('count').textContent), 1000); })"
    )


def test_it_opens_without_an_error_a_request_or_anything_that_models_wrote_run(page: chromium.Page) -> None:
    assert page.errors == []
    assert [url for url in page.requests if not url.startswith(("file:", "data:"))] == []
    assert page.evaluate("window.hacked === undefined && document.images.length === 0")
    assert page.evaluate("document.getElementById('count').textContent") == "10000 of 10000"


def test_only_the_rows_in_sight_are_drawn_wherever_one_scrolls(page: chromium.Page) -> None:
    first = page.evaluate("document.querySelector('.row').dataset.candidate")
    page.evaluate("document.getElementById('viewport').scrollTop = 150000")
    page.evaluate("new Promise(requestAnimationFrame)")
    assert len(rows(page, 1)) < 60
    assert page.evaluate("document.querySelector('.row').dataset.candidate") != first
    page.evaluate("document.getElementById('viewport').scrollTop = 0")


def test_columns_sort_both_ways_with_missing_values_last(page: chromium.Page) -> None:
    click(page, "score")
    up = [float(x) for x in rows(page, 2)]
    click(page, "score")
    down = [float(x) for x in rows(page, 2)]
    assert up == sorted(up)
    assert down == sorted(down, reverse=True)
    assert up[0] == 0
    assert down[0] == 5
    click(page, "score")


def test_search_finds_what_is_in_prompts_answers_and_verdicts_and_marks_it(page: chromium.Page) -> None:
    assert search(page, "say 777:") == "8 of 10000"
    assert all(text.startswith("Say 777:") for text in rows(page, 1))
    page.evaluate("document.querySelector('.row').click()")
    assert page.evaluate("document.querySelector('#detail .prompt mark').textContent") == "Say 777:"
    assert page.evaluate("document.querySelectorAll('#detail .candidate').length") == 4
    assert search(page, "no such text anywhere") == "0 of 10000"
    assert int(search(page, "window.hacked").split()[0]) > 1000
    assert search(page, "") == "10000 of 10000"
    assert page.evaluate("window.hacked === undefined")
    assert page.errors == []


def select(page: chromium.Page, kind: str) -> int:
    """Filter by `kind`; returns how many are shown."""
    page.evaluate(
        f"(() => {{ const k = document.getElementById('kind'); k.value = '{kind}'; "
        "k.dispatchEvent(new Event('change')); })()"
    )
    return int(page.evaluate("document.getElementById('count').textContent").split()[0])


def test_candidates_are_filtered_by_what_became_of_them(page: chromium.Page) -> None:
    assert set(rows(page, 5)) - {"", "chosen", "rejected"} == set()
    assert select(page, "chosen") == select(page, "rejected") == select(page, "paired") / 2
    assert select(page, "paired") + select(page, "unpaired") == select(page, "all") == 10000


def test_the_keyboard_moves_through_the_list(page: chromium.Page) -> None:
    page.evaluate("document.querySelector('.row').click()")
    for _ in range(30):
        page.evaluate(
            "document.getElementById('viewport').dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowDown'}))"
        )
    selected = page.evaluate("document.querySelector('[aria-selected=true]').dataset.candidate")
    assert selected == "30"
    assert page.evaluate("document.getElementById('viewport').scrollTop") > 0


def test_a_comparison_is_browsed_by_model_and_result(tmp_path_factory: pytest.TempPathFactory) -> None:
    base = tmp_path_factory.mktemp("comparison")
    report = write_report(open_run(make_comparison(base / "run")))
    with chromium.browser(base / "profile") as tab:
        tab.open(report)
        assert tab.errors == []
        assert tab.evaluate("window.hacked === undefined && document.getElementById('iteration').hidden")
        click(tab, "model")
        assert set(rows(tab, 0)) <= {"m_1", "m.2", "big"}
        won = select(tab, "chosen")
        assert set(rows(tab, 5)) == {"won"}
        lost = select(tab, "rejected")
        assert set(rows(tab, 5)) == {"lost"}
        assert won + lost + select(tab, "tied") + select(tab, "unscored") == select(tab, "all") == 60
        tab.evaluate("document.querySelector('.row').click()")
        assert tab.evaluate("document.querySelectorAll('#detail .candidate').length") == 3
        assert tab.evaluate("document.querySelector('#detail .verdict').textContent").count("Winner: ") == 1
        assert tab.errors == []
