"""``python -m benchmarks.readme`` writes the tables of README and docs/performance.md.

Each table stands between ``<!-- name -->`` and ``<!-- /name -->`` and comes from
``benchmarks/results/name-cpu.json``, those of GPUs from ``gpu-*.json``; without such a
file the text stays. ``short`` is the README's, a few rows of several files. ``--check``
only says whether they agree.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from benchmarks.record import RESULTS, ROOT, program
from fisherprune.commandline import Parser
from fisherprune.ops.sources import source_hash

PAGES = (ROOT / "README.md", ROOT / "docs" / "performance.md")
README_NETWORKS = (
    *("resnet50", "mobilenet_v3_small", "convnext_tiny", "swin_t"),
    *("vit, 6 blocks of 384", "LSTM, 2 layers of 256", "GPT-2-like", "Llama-like"),
)


def end_to_end(record: dict) -> list[str]:
    """Milliseconds per image of every way, for the two networks."""
    rows = [r for r in record["rows"] if "ms" in r]
    lines = []
    for network, batch in (("resnet18", 32), ("vgg19", 16)):
        lines += [
            "",
            f"| {network}, batch {batch} | ms per image | times ours |",
            "| --- | --- | --- |",
        ]
        for r in rows:
            if (r["network"], r["batch"], r["image"]) != (network, batch, 32):
                continue
            what = f"**{r['what']}**" if r["what"] == "fisherprune" else r["what"]
            several = f", pass of {r['batches']} batches" if r["batches"] > 1 else ""
            lines.append(f"| {what}{several} | {r['ms']:.1f} | {r['to ours']:.2f} |")
    return lines[1:]


def topk(record: dict) -> list[str]:
    """Milliseconds of every way to the masks of ResNet18."""
    lines = ["| 11.2 M scores to masks | ms | times ours |", "| --- | --- | --- |"]
    cases = ("keep 10 %", "sparsities", "new memory")
    rows = [r for r in record["rows"] if r["case"] in cases]
    ours = rows[0]["ms"]
    for r in rows:
        what = f"**{r['what']}**" if r["what"].startswith("global") else r["what"]
        lines.append(f"| {what} | {r['ms']:.1f} | {r['ms'] / ours:.1f} |")
    return lines


def curvature(record: dict) -> list[str]:
    """Milliseconds and errors of every way to the Gauss-Newton diagonal."""
    first = record["rows"][0]
    lines = [
        f"| Gauss-Newton diagonal, {first['network']}, batch {first['batch']} "
        "| ms per image | times ours | error |",
        "| --- | --- | --- | --- |",
    ]
    for r in record["rows"]:
        what = f"**{r['what']}**" if r["what"] == "fisherprune" else r["what"]
        lines.append(
            f"| {what} | {r['ms']:.0f} | {r['to ours']:.2f} | {r['error']:.1e} |"
        )
    return lines


def processes(record: dict) -> list[str]:
    """Time and memory of every way on several processes."""
    first = record["rows"][0]
    lines = [
        f"| {first['network']}, {first['images']} images | processes | ms per image "
        "| times ours | MB a process |",
        "| --- | --- | --- | --- | --- |",
    ]
    for r in record["rows"]:
        what = f"**{r['what']}**" if r["what"] == "fisherprune" else r["what"]
        lines.append(
            f"| {what} | {r['processes']} | {r['ms']:.1f} | {r['to ours']:.2f} "
            f"| {r['MB']:.0f} |"
        )
    return lines


def rounds(record: dict) -> list[str]:
    """Milliseconds of a round of pruning, over its scoring pass."""
    lines = ["| a round of | ms | over its scoring pass |", "| --- | --- | --- |"]
    for r in record["rows"]:
        if r["what"] == "fisherprune":
            place = f"{r['method']}, {r['network']}, {r['images']} images"
            lines.append(f"| {place} | {r['ms']:.0f} | {r['over scoring']:.2f} |")
    return lines


def sparse(record: dict) -> list[str]:
    """Milliseconds of steps and of layers, sparse and dense."""
    return [*_sparse_steps(record), "", *_sparse_layers(record)]


def sparse_inference(record: dict) -> list[str]:
    """Milliseconds of inference, sparse and dense."""
    lines = ["| inference | images | ms | times faster |", "| --- | --- | --- | --- |"]
    for r in record["rows"]:
        if r["case"] == "inference":
            sparsity = f" at {r['sparsity']}" if r["what"].startswith("sparse") else ""
            lines.append(
                f"| {r['network']}, {r['what']}{sparsity} | {r['batch']} "
                f"| {r['ms']:.1f} | {r['over fastest']:.2f} |"
            )
    return lines


def sparse_avx2(record: dict) -> list[str]:
    """Return steps and inference on a processor without AVX-512."""
    return [*_sparse_steps(record), "", *sparse_inference(record)]


def _sparse_steps(record: dict) -> list[str]:
    lines: list[str] = []
    steps = [r for r in record["rows"] if r["case"] == "step"]
    for network in dict.fromkeys(r["network"] for r in steps):
        own = [r for r in steps if r["network"] == network]
        lines += [
            "",
            f"| training step, {network}, batch {own[0]['batch']} | sparsity | ms "
            "| times faster | than bfloat16 | MB of weights, gradients, momenta |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        for r in own:
            half = f"{r['over bfloat16']:.2f}" if "over bfloat16" in r else ""
            lines.append(
                f"| {r['what']} | {r['sparsity'] or ''} | {r['ms']:.0f} "
                f"| {r['over fastest']:.2f} | {half} | {r['state MB']:.1f} |"
            )
    return lines[1:]


def _sparse_layers(record: dict) -> list[str]:
    rows = [r for r in record["rows"] if r["case"] == "layer"]
    ways = list(dict.fromkeys(r["what"] for r in rows))
    lines = [
        f"| 3 x 3 layer, image / stride | kept | {' | '.join(ways)} |",
        "| --- | --- |" + " --- |" * len(ways),
    ]
    for layer, kept in dict.fromkeys((r["layer"], r["kept"]) for r in rows):
        own = {r["what"]: r for r in rows if (r["layer"], r["kept"]) == (layer, kept)}
        times = " | ".join(f"{own[what]['ms']:.1f}" for what in ways)
        lines.append(f"| {layer} | {kept:.0%} | {times} |")
    return lines


def zoo(record: dict) -> list[str]:
    """Time, memory, errors and ways of all parameters of many networks."""
    lines = [
        "| network, batch | over plain | first batch | a further one | least "
        "| MB above | error | vmap(grad), times ours | ways |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    peers = {r["network"]: r["over ours"] for r in record["rows"] if "over ours" in r}
    for r in record["rows"]:
        if r["what"] == "fisherprune":
            peer = peers.get(r["network"])
            lines.append(
                f"| {r['network']}, {r['batch']} | {r['over plain']:.2f} "
                f"| {two(r, 'first batch')} | {two(r, 'further batch')} "
                f"| {two(r, 'least')} "
                f"| {r['MB above plain'] - r['accumulators MB']:.0f} "
                f"| {r['error']:.0e} | {f'{peer:.1f}' if peer else ''} | {r['ways']} |"
            )
    return lines


def two(row: dict, name: str) -> str:
    """Return a number with two digits, nothing where a result has none."""
    return f"{row[name]:.2f}" if name in row else ""


def training(record: dict) -> list[str]:
    """Images a second of an epoch, beside a bare loop of the same steps."""
    lines = [
        "| network, batch | setting | images a second | over a bare loop |",
        "| --- | --- | --- | --- |",
    ]
    for r in record["rows"]:
        place = f"| {r['network']}, {r['batch']} | {r['what']} "
        lines.append(f"{place}| {r['images/s']:.0f} | {r['over bare']:.2f} |")
    return lines


def short(moments: dict, masks: dict, networks: dict) -> list[str]:
    """Show rows of ``end_to_end``, ``topk`` and ``zoo``, one table under the other."""
    end = end_to_end(moments)
    first = [row for row in end[: end.index("")] if "pass of" not in row]
    wanted = "global_topk**", "cat + topk + indices", "sort"
    last = [row for row in topk(masks)[2:] if any(f"{w} |" in row for w in wanted)]
    return [*first, "", *topk(masks)[:2], *last, "", *_all_parameters(networks)]


def _all_parameters(record: dict) -> list[str]:
    """Show one network of each kind."""
    lines = [
        "| all parameters of | time over forward + backward | MB above both it and two "
        "accumulators | error | ways, and parameters that go them |",
        "| --- | --- | --- | --- | --- |",
    ]
    for r in record["rows"]:
        if r["what"] == "fisherprune" and r["network"] in README_NETWORKS:
            above = r["MB above plain"] - r["accumulators MB"]
            lines.append(
                f"| {r['network']} | {r['over plain']:.2f} | {above:.0f} "
                f"| {r['error']:.0e} | {r['ways']} |"
            )
    return lines


def source(record: dict) -> str:
    """Say where and with what a table was measured."""
    e = record["environment"]
    place = (
        e["device"] if e["device"] != "cpu" else f"{e['cpu']}, {e['threads']} threads"
    )
    changes = "+changes" if e.get("dirty") else ""
    return f"{place}, torch {e['torch']}, commit {(e['commit'] or '')[:10]}{changes}."


def number(value: float) -> str:
    """Return three digits, or whole thousands."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def gpu(record: dict) -> list[str]:
    """Every number of a GPU beside its target, and what was checked there."""
    lines = []
    for r in record["rows"]:
        holds = {True: "yes", False: "**no**"}.get(r.get("holds"), "")
        value = f"{number(r['value'])} {r['unit']}"
        lines.append(f"| {r['name']} | {value} | {r.get('target', '')} | {holds} |")
    if lines:
        device = record["environment"]["device"]
        head = [
            f"| {device} | measured | target | holds |",
            "| --- | --- | --- | --- |",
        ]
        lines = [*head, *lines, ""]
    return [*lines, *checked(record)]


def checked(record: dict) -> list[str]:
    """Say what the tests and the sanitizers found, what failed and what did not run."""
    counts = record["tests"].get("counts", {})
    words = ", ".join(f"{n} {word}" for word, n in counts.items())
    facts = [f"Tests on it: {words}."] if counts else []
    for tool, result in record["sanitizer"].items():
        found = "no summary" if result["found"] is None else result["found"]
        facts.append(f"{tool} found: {found}.")
    for what, group in (("Failed", "failed"), ("Not run", "not_run")):
        if names := ", ".join(record[group]):
            facts.append(f"{what}: {names}.")
    return facts


def age(record: dict) -> list[str]:
    """Say where the kernels have changed since."""
    measured, now = record["environment"]["source_hash"], source_hash(ROOT / "csrc")
    if measured == now:
        return []
    return [f"These are numbers of older kernels: sources {measured}, now {now}."]


def bodies() -> dict[str, str]:
    """Return what stands between the marks, by mark, as far as there are results."""
    tables = (
        *(end_to_end, topk, curvature, zoo, training, processes),
        *(rounds, sparse, sparse_inference, sparse_avx2),
    )
    records = {
        table.__name__: json.loads(path.read_text())
        for table in tables
        if (path := RESULTS / f"{table.__name__}-cpu.json").exists()
    }
    found = {
        table.__name__: "\n".join([*table(record), "", source(record)])
        for table in tables
        if (record := records.get(table.__name__))
    }
    if {"end_to_end", "topk", "zoo"} <= records.keys():
        of = records["end_to_end"], records["topk"], records["zoo"]
        found["short"] = "\n".join([*short(*of), "", *dict.fromkeys(map(source, of))])
    parts = []
    for path in sorted(RESULTS.glob("gpu-*.json")):
        record = json.loads(path.read_text())
        parts.append("\n".join([*gpu(record), source(record), *age(record)]))
    return found | ({"gpu": "\n\n".join(parts)} if parts else {})


def filled(text: str) -> str:
    """Return a page's text with every table written anew."""
    for mark, body in bodies().items():
        start, end = f"<!-- {mark} -->\n", f"<!-- /{mark} -->"
        before, _, rest = text.partition(start)
        _, ended, after = rest.partition(end)
        text = f"{before}{start}{body}\n{end}{after}" if ended else text
    return text


@program("benchmarks.readme")
def main(argv: Sequence[str] | None = None) -> int:
    """Write or check the pages."""
    parser = Parser("python -m benchmarks.readme", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing")
    options = parser.parse_args(argv)
    texts = {page: page.read_text() for page in PAGES}
    if options.check:
        return int(any(filled(text) != text for text in texts.values()))
    for page, text in texts.items():
        page.write_text(filled(text))
    return 0


if __name__ == "__main__":
    sys.exit(main())
