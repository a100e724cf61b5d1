"""The result file of a GPU run, its report and the README's table."""

import re

import pytest

from benchmarks import readme, record
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu.measure import Goal, row


def made_up(source_hash):
    place = {"device": "NVIDIA X1 (80GB)", "torch": "9.9", "commit": "abc"}
    return {
        "environment": place | {"source_hash": source_hash},
        "rows": [
            row("small", "s", [1.5], Goal(2)),
            row("large", "us", [12345.0], Goal(150)),
            row("plain", "MB", [3.0]),
        ],
        "ceilings": {"copy_gbs": 2.0},
        "tests": {"counts": {"passed": 7}},
        "sanitizer": {"memcheck": {"found": 0}, "initcheck": {"found": None}},
        "profile": {"ours": [{"us": 5.0, "kernel": "window"}]},
        "ncu": ['"ID","Kernel Name"', '"0","dense"'],
        "failed": {"racecheck": {"why": "ran out of time", "tail": ["last"]}},
        "not_run": {"topk-large": "needs 12 GB"},
    }


def test_the_report_shows_all_of_a_record():
    lines = gpu.report(made_up("x")).splitlines()
    small, large, plain = (x.split() for x in lines[1:4])
    assert small[:1] + small[-3:] == ["small", "<=", "2", "yes"]
    assert large[:1] + large[-3:] == ["large", "<=", "150", "NO"]
    assert plain[:1] + plain[-2:] == ["plain", "-", "-"]
    text = "\n".join(lines)
    assert "copy_gbs: 2" in text
    assert "ours\nus  kernel\n 5  window" in text
    assert '"ID","Kernel Name"\n"0","dense"' in text
    assert "tests: {'passed': 7}" in text
    assert "memcheck: {'found': 0}" in text
    assert "racecheck: FAILED, ran out of time\n    last" in text
    assert "topk-large: not run: needs 12 GB" in text


@pytest.fixture
def results(monkeypatch, tmp_path):
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    return tmp_path


MARK = re.compile(r"<!-- (\w+) -->")
TEXT = "before\n<!-- gpu -->\nNone yet.\n<!-- /gpu -->\nafter\n"


def test_the_pages_agree_with_the_committed_results():
    assert readme.main(["--check"]) == 0


def test_readme_keeps_its_words_without_results(results):
    assert readme.filled(TEXT) == TEXT
    marks = {mark for page in readme.PAGES for mark in MARK.findall(page.read_text())}
    assert marks >= {"gpu", "short", "end_to_end", "topk", "curvature", "zoo"}


def test_readme_shows_the_numbers_and_their_age(results, monkeypatch):
    monkeypatch.setattr(readme, "source_hash", lambda path: "now")
    record.write_json(results / "gpu-nvidia-x1.json", made_up("now"))
    text = readme.filled(TEXT)
    assert "| NVIDIA X1 (80GB) | measured | target | holds |" in text
    assert "| small | 1.5 s | <= 2 | yes |" in text
    assert "| large | 12,345 us | <= 150 | **no** |" in text
    assert "| plain | 3 MB |  |  |" in text
    assert "Tests on it: 7 passed." in text
    assert "memcheck found: 0.\ninitcheck found: no summary." in text
    assert "Failed: racecheck.\nNot run: topk-large." in text
    assert text.startswith("before\n<!-- gpu -->\n")
    assert text.endswith("<!-- /gpu -->\nafter\n")
    assert "None yet" not in text
    assert "older kernels" not in text
    assert readme.filled(text) == text
    record.write_json(results / "gpu-nvidia-x1.json", made_up("then"))
    assert "older kernels: sources then, now now" in readme.filled(TEXT)


def test_readme_shows_no_table_of_checks_alone(results):
    record.write_json(results / "gpu-x-sanitizers.json", made_up("x") | {"rows": []})
    text = readme.filled(TEXT)
    assert "measured | target" not in text
    assert "<!-- gpu -->\nTests on it: 7 passed.\n" in text


def test_readme_without_an_end_mark_is_left_alone(results):
    record.write_json(results / "gpu-x.json", made_up("x"))
    cut = TEXT.replace("<!-- /gpu -->", "")
    assert readme.filled(cut) == cut
