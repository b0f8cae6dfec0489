"""The page of `mpo report` in a real browser: it draws, sorts and searches, requests nothing, and never runs texts as HTML."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mpo_megatron.config import ReportConfig
from mpo_megatron.report.report import report
from tests.run_folder import HOSTILE, write_data, write_run
from tests.waiting import TIMEOUT

sync_api = pytest.importorskip("playwright.sync_api")
BROWSER = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)

pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason="needs a chromium (apt-get install chromium)")]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        # Containers run tests as root, without a sandbox.
        opened = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("report")
    data = write_data(folder / "groups", num_groups=120)
    whole, other = write_run(folder / "whole", data), write_run(folder / "other", data, beta=0.5, chosen=2.0)
    young = write_run(folder / "young", data, steps=3, held_out=False)
    sources = {"one": [whole], "two": [whole, other], "young": [young]}
    for name, runs in sources.items():
        report(ReportConfig(runs=[str(run) for run in runs], output=str(folder / f"{name}.html")))
    return {name: folder / f"{name}.html" for name in sources}


def visit(browser: Any, path: Path, **options: Any) -> tuple[Any, list[str]]:
    """The drawn page, and all problems: console errors, exceptions, requests."""
    page = browser.new_page(viewport={"width": 1440, "height": 900}, **options)
    page.set_default_timeout(1000 * TIMEOUT)
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: None if request.url.startswith(("file:", "data:", "blob:")) else wrong.append(request.url))
    page.goto(path.as_uri())
    page.wait_for_selector("html[data-ready]", state="attached")
    return page, wrong


def column(page: Any, number: int) -> list[str]:
    cells: list[str] = page.locator(f"#groups-body tr.group td:nth-child({number})").all_inner_texts()
    return cells


def as_numbers(cells: list[str]) -> list[float]:
    return [float(cell.replace("−", "-").replace("+", "").replace("%", "")) for cell in cells]


def test_charts_are_drawn_and_nothing_is_asked_for(browser: Any, pages: dict[str, Path]) -> None:
    page, wrong = visit(browser, pages["one"])
    titles = page.locator(".chart h3").all_inner_texts()
    charts = ("Loss", "Log-probability drift", "KL from the reference", "Peak memory", "Distribution of log-ratios", "Rewards")
    for title in charts:
        assert title in titles
    assert page.locator(".chart .js-plotly-plot").count() == len(titles)
    drawn = page.evaluate(
        "() => [...document.querySelectorAll('.chart')].every((chart) =>"
        " chart.querySelector('.scatterlayer path.js-line, .scatterlayer .point, .barlayer .point'))"
    )
    assert drawn
    # The drawn held-out losses are the run's.
    data = page.evaluate("() => [...document.querySelectorAll('.js-plotly-plot')][0].data.map((trace) => trace.y)")
    assert data[-1] == pytest.approx([0.7, 0.42457, 0.25752, 0.15619, 0.094735], rel=1e-4)
    # At the first evaluation all log-ratios are 0; at the last they are spread.
    filled = "() => document.querySelectorAll('.wide .js-plotly-plot')[2].data[0].y.filter((count) => count > 0).length"
    assert page.evaluate(filled) > 1
    page.locator("input[aria-label=evaluation]").fill("0")
    assert page.evaluate(filled) == 1
    page.click("#theme")
    page.locator("#log").check()
    assert wrong == []
    page.close()


def test_a_phone_sees_whole_charts(browser: Any, pages: dict[str, Path]) -> None:
    page, wrong = visit(browser, pages["one"], is_mobile=True, has_touch=True, screen={"width": 390, "height": 844})
    page.set_viewport_size({"width": 390, "height": 844})
    assert page.locator(".modebar").count() == 0  # it would cover the legend
    page.wait_for_function("() => [...document.querySelectorAll('.plot svg.main-svg')].every((svg) => svg.clientWidth < 390)")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert wrong == []
    page.close()


def test_groups_sort_filter_search_and_open(browser: Any, pages: dict[str, Path]) -> None:
    page, wrong = visit(browser, pages["one"])
    assert page.locator("#groups-body tr.group").count() == 50
    page.click("text=show more")
    page.click("text=show more")
    margins = as_numbers(column(page, 7))
    assert len(margins) == 120
    assert margins == sorted(margins)
    page.click("th[data-key=margin]")
    assert as_numbers(column(page, 7)) == margins[::-1]
    page.click("th[data-key=id]")
    assert column(page, 1) == [f"group-{index:02d}" for index in range(120)]  # 100 behind 99
    page.click("[data-filter=wrong]")
    assert all(value < 50 for value in as_numbers(column(page, 5)))
    assert 0 < len(column(page, 1)) < 120
    page.click("[data-filter=all]")
    page.fill("#search", "BROKEN")  # in the hostile response of group 3
    assert column(page, 1) == ["group-03"]
    assert column(page, 2) == ["question 3"]
    page.click("tr.group")
    texts = page.locator(".response .text").all_text_contents()
    assert HOSTILE in texts
    assert page.locator(".response img, .response b b, .response script").count() == 0
    assert "broken" not in page.title()
    assert "preferred" in page.locator(".response.s1 .badge").inner_text()
    assert page.locator("svg.spark path").count() == 2
    page.click("tr.group")
    assert page.locator("td.detail").count() == 0
    assert wrong == []
    page.close()


def test_two_runs_are_compared(browser: Any, pages: dict[str, Path]) -> None:
    page, wrong = visit(browser, pages["two"], color_scheme="dark")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    rows = page.locator("#compared tbody tr").all_inner_texts()
    assert [row.split()[0] for row in rows] == ["whole", "other"]
    assert "loss.params.beta" in page.locator("main").inner_text()
    page.locator("select[aria-label=run]").select_option("1")
    assert page.locator("#groups-body tr.group").count() == 50
    assert wrong == []
    page.close()


def test_a_run_of_three_steps_without_held_out_groups(browser: Any, pages: dict[str, Path]) -> None:
    page, wrong = visit(browser, pages["young"])
    assert page.locator(".chip").inner_text() == "running"
    assert "step 3 of 40" in page.locator(".head").inner_text()
    assert "No run has saved held-out groups" in page.locator("main").inner_text()
    assert wrong == []
    page.close()
