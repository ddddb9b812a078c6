"""The page on a telephone, a desk and paper, as a browser lays it out."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from server.evaluation.participation import Presence
from server.evaluation.report import figures
from server.evaluation.report.figures import STYLES
from server.evaluation.report.page import render
from tests.helpers.report_page import MANIFEST, PLAN, TRAINING, Texts, evaluation_of

ARMS = ("public", "local", "local_dp", "federated", "federated_clipped", "federated_dp", "pooled")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
MEASURE = """
const found = {};
for (const frame of document.querySelectorAll("iframe")) {
  const page = frame.contentDocument, width = page.documentElement.clientWidth;
  page.querySelectorAll("details").forEach(part => part.open = true);
  const seen = element => element.getClientRects().length > 0;
  found[frame.width] = {
    wider: page.documentElement.scrollWidth - width,
    scrolled: [...page.querySelectorAll(".scroll")].filter(part => part.scrollWidth > part.clientWidth + 1)
      .map(part => part.textContent.trim().slice(0, 60)),
    unseen: [...page.querySelectorAll("td.unseen")].filter(seen)
      .filter(cell => cell.getBoundingClientRect().right > width).length,
    cells: [...page.querySelectorAll("td.unseen")].filter(seen).length,
    letters: Math.min(...[...page.querySelectorAll("svg.figure text")].filter(seen)
      .map(text => parseFloat(text.getAttribute("font-size")) * text.getScreenCTM().a)),
    requests: frame.contentWindow.performance.getEntriesByType("resource").length,
    keys: [...page.querySelectorAll("a[href], summary")].filter(part => part.tabIndex !== 0).length,
    small: [...page.querySelectorAll("td, th, p, li, caption")].filter(seen)
      .filter(part => parseFloat(getComputedStyle(part).fontSize) < 10).length,
    cut: [...page.querySelectorAll("svg.figure text")].filter(seen).filter(text => {
      const box = text.getBoundingClientRect(), whole = text.ownerSVGElement.getBoundingClientRect();
      return box.left < whole.left - 1 || box.right > whole.right + 1 || box.bottom > whole.bottom + 1;
    }).map(text => text.textContent),
  };
}
document.body.innerHTML = "";
const result = document.createElement("pre");
result.textContent = JSON.stringify(found);
document.body.append(result);
"""


MANY = {
    "nine hospitals": (ARMS, tuple(f"hospital-{letter}" for letter in "abcdefg")),
    "fourteen hospitals": (("public", "federated"), tuple(f"hospital-{letter}" for letter in "abcdefghijkl")),
}
"""Arms and training sites, beside two held out."""


@pytest.fixture(scope="module", params=["en", "zh", "nine hospitals", "fourteen hospitals"])
def page(request: pytest.FixtureRequest) -> str:
    if request.param in MANY:
        arms, training = MANY[request.param]
        values = evaluation_of(arms, training=training, held_out=("hospital-x", "hospital-y"))
        return render(values, MANIFEST, PLAN)
    rows = {site: Presence(rounds=6, invited=6, counted=5, codes={"deadline"}) for site in TRAINING}
    participation = {arm: rows for arm in ARMS if arm not in ("public", "pooled")}
    return render(evaluation_of(ARMS), MANIFEST, PLAN, language=request.param, participation=participation)


@pytest.fixture(scope="module")
def layout(page: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Width in pixels -> what a browser measured of the page, all parts open; 690: A4 without margins."""
    if CHROMIUM is None:
        pytest.skip("chromium is not installed: the page is not laid out")
    free = re.sub(r"<meta http-equiv=[^>]*>", "", page)
    frames = "".join(
        f'<iframe width="{width}" height="900" srcdoc="{html.escape(free)}"></iframe>'
        for width in (390, 690, 1280)
    )
    folder = tmp_path_factory.mktemp("layout")
    harness = folder / "harness.html"
    harness.write_text(
        f'<body>{frames}<script>addEventListener("load", () => {{{MEASURE}}})</script>', encoding="utf-8"
    )
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    shown = subprocess.run(
        [CHROMIUM, *options, "--virtual-time-budget=5000", "--dump-dom", harness.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout
    measured = re.search(r"<pre>(\{.*\})</pre>", shown)
    assert measured, shown[-500:]
    return json.loads(html.unescape(measured[1]))


@pytest.mark.parametrize("width", ["390", "690", "1280"])
def test_nothing_lies_beside_the_page(layout: dict[str, Any], width: str) -> None:
    found = layout[width]
    assert found["wider"] <= 0
    assert found["scrolled"] == []
    assert found["cells"] > 40
    assert found["unseen"] == 0


@pytest.mark.parametrize("width", ["390", "690", "1280"])
def test_the_page_asks_nothing_of_the_network_and_everything_is_reached_by_key(
    layout: dict[str, Any], width: str
) -> None:
    assert layout[width]["requests"] == 0
    assert layout[width]["keys"] == 0
    assert layout[width]["small"] == 0


def test_arms_are_told_without_colour() -> None:
    shapes = [(style.marker, style.dash) for style in STYLES.values()]
    assert len(set(shapes)) == len(shapes)


def test_words_on_the_darkest_shade_have_the_contrast_of_wcag() -> None:
    """Level AA, 4.5 : 1. axe found 4.42 where an AUROC was near 1."""

    def luminance(colour: str) -> float:
        values = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4 for one in values]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    style = Path(figures.__file__).with_name("page.css").read_text(encoding="utf-8")
    grey = re.search(r"^\.interval, \.note \{.* color: #(\w)(\w)(\w);", style, re.M)
    assert grey
    words = luminance("#" + "".join(2 * digit for digit in grey.groups()))
    assert f"linear-gradient(90deg, #fff, {figures.shade(1.0)})" in style, (
        "the key has the colours of the map"
    )
    assert (luminance(figures.shade(1.0)) + 0.05) / (words + 0.05) >= 4.5


@pytest.mark.parametrize("width", ["390", "690", "1280"])
def test_words_of_figures_are_whole_and_legible(layout: dict[str, Any], width: str) -> None:
    assert layout[width]["cut"] == []
    assert layout[width]["letters"] >= (7.5 if width == "690" else 9.5)  # paper is finer than a screen


def test_every_cell_of_a_table_that_stacks_says_its_column(page: str) -> None:
    """Without a browser: on a telephone the heads are not shown."""
    tables = re.findall(r"<table.*?</table>", page, re.S)
    for table in tables:
        columns = table.split("</thead>")[0].count("<th ")
        if "stack" not in table.split(">")[0]:
            assert columns <= 3 or "<thead>" not in table, table[:200]
            continue
        cells = [attributes for tag, attributes in Texts(table).tags if tag == "td"]
        assert cells
        assert all(cell.get("data-label") for cell in cells), table[:200]


def test_paper_is_not_filled_with_one_cell_a_line(tmp_path: Path) -> None:
    """Tables that stack on a telephone do not stack on paper: 91 pages of A4 otherwise."""
    if CHROMIUM is None:
        pytest.skip("chromium is not installed: the page is not printed")
    source, printed = tmp_path / "page.html", tmp_path / "page.pdf"
    source.write_text(render(evaluation_of(ARMS), MANIFEST, PLAN), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    subprocess.run(
        [CHROMIUM, *options, f"--print-to-pdf={printed}", source.as_uri()],
        capture_output=True,
        timeout=120,
        check=True,
    )
    pages = re.findall(rb"/Type /Page\b", printed.read_bytes())
    assert 5 < len(pages) < 40
