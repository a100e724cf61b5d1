"""The page of the report, looked at by a real browser."""

import pytest
import result_trees as trees
from browser import Browser, find_chromium

from fisherprune import report
from fisherprune.report.figures import TABLE_FIGURES

pytest.importorskip("matplotlib")
MEASURE = """
(() => {
  const box = e => { const r = e.getBoundingClientRect(); return [r.width, r.height]; };
  const inside = (e, outer) => {
    const r = e.getBoundingClientRect(), o = outer.getBoundingClientRect();
    return r.left >= o.left - 1 && r.right <= o.right + 1
      && r.top >= o.top - 1 && r.bottom <= o.bottom + 1;
  };
  const all = s => [...document.querySelectorAll(s)];
  return {
    width: document.documentElement.scrollWidth,
    visible: document.documentElement.clientWidth,
    height: document.documentElement.scrollHeight,
    figures: all("figure").map(f => f.id),
    svgs: all("figure > svg").map(s => [s.parentElement.id, ...box(s)]),
    drawn: all("figure > svg").map(s => s.querySelectorAll("path").length),
    cutTexts: all("figure > svg text").filter(t => !inside(t, t.ownerSVGElement))
      .map(t => t.textContent),
    scrolling: all(".scroll").filter(d => d.scrollWidth > d.clientWidth).length,
    tables: all("table").length,
    title: document.title,
  };
})()
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Return what a browser measures in the report of a whole study."""
    program = find_chromium()
    if program is None:
        pytest.skip("no Chromium on this machine")
    folder = tmp_path_factory.mktemp("study")
    for number, method in enumerate(trees.PUBLISHED_METHODS):
        for sparsity in (0.8, 0.9, 0.95, 0.98, 0.99):
            for seed in (0, 42):
                accuracy = 0.9 - 0.01 * number - sparsity / 10 + seed / 9999
                fields = {"method": method, "sparsity": sparsity, "seed": seed}
                trees.add_run(folder, accuracy, **fields)
    trees.add_run(folder, 0.94, method="none", sparsity=0.0)
    trees.add_failed(folder, "out of disk " * 30, method="fts", seed=7)
    _, output = report.write_report([folder])
    browser = Browser(program, tmp_path_factory.mktemp("profile"))
    try:
        path = output / "report.html"
        browser.open(path.as_uri())
        seen = browser.evaluate(MEASURE)
        seen |= {"trouble": [*browser.trouble], "requests": [*browser.requests]}
        yield browser, seen, path
    finally:
        browser.close()


def test_no_errors_and_no_requests(page):
    _, seen, path = page
    assert seen["trouble"] == []
    loaded = [url for url in seen["requests"] if not url.startswith("data:")]
    assert loaded == [path.as_uri()]


def test_all_figures_are_there(page):
    _, seen, _ = page
    kinds = [make.__name__ for _, make in sorted(TABLE_FIGURES.items())]
    assert seen["title"] == "fisherprune report"
    assert seen["figures"] == [f"g1-{kind}" for kind in kinds]
    assert [name for name, *_ in seen["svgs"]] == seen["figures"]
    for name, width, height in seen["svgs"]:
        assert width > 900 and height > 150, name
    assert all(count > 20 for count in seen["drawn"])


def test_nothing_is_cut_off(page):
    _, seen, _ = page
    assert seen["width"] == seen["visible"] > 1150  # 1200 without the scroll bar
    assert (seen["scrolling"], seen["cutTexts"]) == (0, [])
    assert seen["tables"] == 4 and seen["height"] > 3000


def test_trouble_would_be_noticed(page, tmp_path):
    browser, _, _ = page
    bad = tmp_path / "bad.html"
    bad.write_text('<script>console.error("x"); nothing()</script><img src="gone.png">')
    browser.open(bad.as_uri())
    kinds = {message["method"] for message in browser.trouble}
    assert {"Runtime.exceptionThrown", "Network.loadingFailed"} <= kinds
    assert any(url.endswith("gone.png") for url in browser.requests)
