"""The report as one HTML page that needs nothing else: no script, no network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from fisherprune.report.figures import style
from fisherprune.report.figures.svg import Figure
from fisherprune.report.pages import words
from fisherprune.report.pages.words import Report
from fisherprune.report.tables import Cell, Group
from fisherprune.runs.reader import WEIGHTS

CSS = Path(__file__).with_name("page.css")


def page(
    report: Report,
    figures: Sequence[Sequence[Figure]],
    compared: Sequence[Figure] = (),
) -> str:
    """Return the page.

    Args:
        report: what to show.
        figures: those of each group, in the order of ``report.groups``.
        compared: those of several groups.
    """
    sections = [
        _alert(report),
        *(_tables(number, each) for number, each in enumerate(report.groups, 1)),
        *(
            _figures(number, each, own)
            for number, (each, own) in enumerate(
                zip(report.groups, figures, strict=True), 1
            )
        ),
        _compared(compared),
        _remarks(report),
        _words(report),
    ]
    body = "\n".join(section for section in sections if section)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<title>fisherprune report</title>\n"
        '<link rel="icon" href="data:,">\n'
        f"<style>\n{CSS.read_text(encoding='utf-8')}</style>\n</head>\n<body>\n"
        f'{_header(report, compared)}\n<main class="wrap">\n{body}\n</main>\n'
        '<footer class="wrap">Written by <code>python -m fisherprune.report</code>; '
        "the same numbers are in report.csv (runs) and summary.csv (cells)."
        "</footer>\n</body>\n</html>\n"
    )


def _header(report: Report, compared: Sequence[Figure]) -> str:
    facts = words.facts(report)
    tally = facts.pop("runs")
    items = [
        f'<li>{escape(each.title)}: <a href="#tables-{number}">tables</a>, '
        f'<a href="#figures-{number}">figures</a></li>'
        for number, each in enumerate(report.groups, 1)
    ]
    if compared:
        items.append('<li><a href="#compared">Settings compared</a></li>')
    if words.remarks(report.study):
        items.append('<li><a href="#remarks">Not in the tables</a></li>')
    items.append('<li><a href="#words">Words</a></li>')
    links = "".join(items)
    return (
        '<header><div class="wrap">\n<h1>fisherprune report</h1>\n'
        f'<p class="tally">Runs: {escape(tally)}</p>\n'
        f"{_definitions(facts, 'facts')}\n"
        f'<nav aria-label="Contents"><ul>{links}</ul></nav>\n</div></header>'
    )


def _definitions(pairs: Mapping[str, str], kind: str) -> str:
    items = "".join(
        f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>\n"
        for key, value in pairs.items()
    )
    return f'<dl class="{kind}">\n{items}</dl>'


def _list(texts: Sequence[str], kind: str) -> str:
    items = "".join(f"<li>{escape(text)}</li>\n" for text in texts)
    return f'<ul class="{kind}">\n{items}</ul>' if texts else ""


def _alert(report: Report) -> str:
    """Say before anything else what could not be read."""
    if not report.study.problems:
        return ""
    found = [f"{x.name}: {x.text}" for x in report.study.problems]
    return (
        '<section class="card alert"><h2>Broken files</h2>\n'
        "<p>What could not be read is not in the tables and figures below.</p>\n"
        f"{_list(found, 'remarks')}</section>"
    )


def _tables(number: int, each: Group) -> str:
    tables = "\n".join(_table(each, weights) for weights in WEIGHTS)
    notes = _list(words.group_notes(each), "notes")
    return (
        f'<section id="tables-{number}">\n<h2>Tables: {escape(each.title)}</h2>\n'
        f'<div class="card">\n<p class="about">{escape(words.group_facts(each))} '
        "Test accuracy in %, mean ± sample standard deviation; the highest mean of a "
        f"row in bold.</p>\n{tables}\n{_seconds(each)}\n{notes}\n"
        "</div>\n</section>"
    )


def _table(each: Group, weights: str) -> str:
    head = "".join(f'<th scope="col">{_method(m)}</th>' for m in each.methods)
    head = head or '<th scope="col">accuracy</th>'
    bodies = [_sparsity(each, sparsity, weights) for sparsity in each.sparsities]
    if each.dense:
        text = _number(each.dense.mean(weights), each.dense.std(weights))
        span = max(1, len(each.methods))
        bodies.append(
            '<tbody class="dense"><tr><th scope="row">dense</th>'
            f'<td colspan="{span}">{text} <small>n = {each.dense.n}</small></td></tr>'
            "</tbody>"
        )
    return (
        f'<div class="scroll"><table{_width(each)}>\n<caption>'
        f"{words.HEADINGS[weights]}</caption>\n"
        f'<thead><tr><th scope="col">sparsity</th>{head}</tr></thead>\n'
        f"{chr(10).join(bodies)}\n</table></div>"
    )


def _width(each: Group) -> str:
    """Give many columns the whole width, and very many smaller letters."""
    if len(each.methods) > 9:
        return ' class="wide tight"'
    return ' class="wide"' if len(each.methods) > 5 else ""


def _sparsity(each: Group, sparsity: float, weights: str) -> str:
    """Return the rows of a sparsity: ours, and the published where there are any."""
    best = each.highest(sparsity, weights)
    ours = "".join(
        _cell(each.cells.get((method, sparsity)), weights, method in best)
        for method in each.methods
    )
    lines = [f'<tr><th scope="row">{sparsity:g}</th>{ours}</tr>']
    for title, *texts in words.published_rows(each, sparsity, weights):
        cells = "".join(f"<td>{escape(text)}</td>" for text in texts)
        lines.append(f'<tr class="theirs"><th scope="row">{title}</th>{cells}</tr>')
    return f"<tbody>{chr(10).join(lines)}</tbody>"


def _method(method: str) -> str:
    color = style.look(method).color
    swatch = f'<span class="swatch" style="background:{color}"></span>'
    # A long name may break after an underscore, but not after the swatch.
    first, *others = escape(style.name(method)).split("_")
    rest = "".join(f"_<wbr>{part}" for part in others)
    return f'<span class="whole">{swatch}{first}</span>{rest}'


def _number(mean: float, std: float | None) -> str:
    deviation = "" if std is None else f' <span class="std">± {std:.2f}</span>'
    return f"{mean:.2f}{deviation}"


def _cell(cell: Cell | None, weights: str, best: bool) -> str:
    if cell is None:
        return '<td class="none">-</td>'
    text = _number(cell.mean(weights), cell.std(weights))
    count = f"<small>n = {cell.n}</small>"
    if best:
        return f'<td class="best"><b>{text}</b>{count}</td>'
    return f"<td>{text}{count}</td>"


def _seconds(each: Group) -> str:
    head, *rows = words.seconds_rows(each)
    columns = "".join(f'<th scope="col">{escape(text)}</th>' for text in head)
    lines = "\n".join(
        f'<tr><th scope="row">{_method_of(row[0])}</th>'
        + "".join(f"<td>{escape(text)}</td>" for text in row[1:])
        + "</tr>"
        for row in rows
    )
    return (
        '<div class="scroll"><table>\n<caption>Time <small>mean seconds per run</small>'
        f"</caption>\n<thead><tr>{columns}</tr></thead>\n<tbody>\n{lines}\n"
        "</tbody></table></div>"
    )


def _method_of(shown: str) -> str:
    return _method("none" if shown == style.name("none") else shown)


def _figures(number: int, each: Group, figures: Sequence[Figure]) -> str:
    inside = "\n".join(_figure(figure) for figure in figures)
    return (
        f'<section id="figures-{number}">\n<h2>Figures: {escape(each.title)}</h2>\n'
        f"{inside}\n</section>"
    )


def _compared(figures: Sequence[Figure]) -> str:
    if not figures:
        return ""
    inside = "\n".join(_figure(figure, whole=True) for figure in figures)
    return f'<section id="compared">\n<h2>Settings compared</h2>\n{inside}\n</section>'


def _figure(figure: Figure, *, whole: bool = False) -> str:
    """Return a figure; its title names the group where no heading above does."""
    kind, _, group = figure.title.partition(": ")
    title = escape(group if whole else kind)
    alone = "" if figure.svg else ' class="alone"'
    return (
        f'<figure id="{figure.id}">\n<h3>{title}</h3>\n{figure.svg or ""}\n'
        f"<figcaption{alone}>{escape(figure.caption)}</figcaption>\n</figure>"
    )


def _remarks(report: Report) -> str:
    found = words.remarks(report.study)
    if not found:
        return ""
    blocks = "\n".join(
        f"<h3>{escape(heading)} ({len(texts)})</h3>\n"
        + _list([f"{x.name}: {x.text}" for x in texts], "remarks")
        for heading, texts in found.items()
    )
    return (
        '<section id="remarks">\n<h2>Not in the tables</h2>\n'
        f'<div class="card">\n{blocks}\n</div>\n</section>'
    )


def _words(report: Report) -> str:
    methods = words.method_lines(words.methods_of(report))
    formulas = (
        '<h3 style="margin-top:18px">Methods</h3>\n'
        f'<p class="about">{escape(words.LEGEND)}</p>\n'
        f"{_definitions(methods, 'words')}\n"
        if methods
        else ""
    )
    return (
        '<section id="words">\n<h2>Words</h2>\n<div class="card">\n'
        f"{_definitions(words.DEFINITIONS, 'words')}\n{formulas}</div>\n</section>"
    )
