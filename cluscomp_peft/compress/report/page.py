"""A compression report as one HTML page: how many bits went where, what they cost in error, and where the time went.

The page is made of what `compress` noted in `cluscomp_report.json` and of nothing else: styles and plots (SVG) are
inside, scripts and network are not, so it can be mailed, archived or put beside the weights on a hub. Any part of a
report may be missing, as it is in reports of older versions; its tile, plot or column is then left out.

A *kind* is a matrix name without its block number: `model.layers.7.mlp.up_proj` is `mlp.up_proj` of block 7.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from .card import loading_example

__all__ = ["render_report"]

_WIDTH, _LEFT, _RIGHT, _TOP = 900, 64, 680, 28  # of a plot and its frame, in CSS pixels where the window has them
_BAR_LEFT, _BAR_RIGHT = 205, 700
_MOST_KINDS = 24  # lines of a plot
_MOST_TOGETHER = 4  # lines in one frame; more are drawn below each other
_LOG_RATIO = 30  # largest to smallest value from which an axis is logarithmic
_BYTES = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "bytes"))
_SECONDS = ((3600, "h"), (60, "min"), (1, "s"))
_SPEC = {"group_size": "g", "num_clusters": "n", "num_blocks": "blocks"}
_STYLE = """
:root { color-scheme: light dark; --page: #fcfcfb; --tile: #f1f0ec; --text: #0b0b0b; --soft: #52514e; --grid: #e1e0d9 }
@media (prefers-color-scheme: dark) {
  :root { --page: #1a1a19; --tile: #262624; --text: #fff; --soft: #c3c2b7; --grid: #383835 } }
.c0 { --c: #3987e5 } .c1 { --c: #199e70 } .c2 { --c: #c98500 } .c3 { --c: #008300 } .c4 { --c: #9085e9 }
.c5 { --c: #e66767 } .c6 { --c: #d55181 } .c7 { --c: #d95926 } .rest { --c: #8f8d85 }
body { background: var(--page); color: var(--text); font: 15px/1.5 system-ui, sans-serif; margin: 0 auto;
  max-width: 940px; padding: 24px 16px; overflow-wrap: anywhere }
h1 { font-size: 26px; line-height: 1.2; margin: 0 } h2 { font-size: 18px; margin: 36px 0 0 } p { margin: 4px 0 12px }
dl { display: flex; flex-wrap: wrap; gap: 10px; margin: 20px 0 0 } dl div { flex: 1 0 140px }
dl div, pre { background: var(--tile); border-radius: 8px; padding: 10px 14px } dd { margin: 0; font-size: 22px }
dt, dd + dd, summary { color: var(--soft); font-size: 13px } summary { cursor: pointer } a { color: inherit }
.wide, .tall { overflow: auto } .tall { max-height: 80vh } pre { overflow: auto; font-size: 13px }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums }
th, td { padding: 3px 10px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--grid) }
th { font-weight: 500 } th:first-child { text-align: left } thead { position: sticky; top: 0; background: var(--tile) }
svg { display: block; width: 100%; min-width: 640px; font: 12px system-ui, sans-serif } text { fill: var(--soft) }
.mid { text-anchor: middle } .name { fill: var(--text) } rect { fill: var(--c) } .end { text-anchor: end }
path { stroke: var(--c); stroke-width: 1.75; fill: none } path.grid { stroke: var(--grid); stroke-width: 1 }
path.lead { stroke-width: 1; opacity: .5 } circle { fill: var(--c); stroke: transparent; stroke-width: 8 }
g:hover .data { stroke-width: 4 } @media print { .tall { max-height: none } }
"""
_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"/>
<meta name="viewport" content="width=device-width, initial-scale=1"/>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'"/>
<title>{title}: compression report</title>
<style>{style}</style></head>
<body>
<h1>{title}</h1>
{sections}
<h2>Load it</h2>
<pre><code>{example}
</code></pre>
<h2>Method</h2>
<p>ClusComp: Liao et al., “ClusComp: A Simple Paradigm for Model Compression and Efficient Finetuning”, Findings of ACL
2025, <a href="https://arxiv.org/abs/2503.13089">arXiv:2503.13089</a>.</p>
<h2>Every matrix</h2>
{table}
</body></html>
"""
_BITS = "Bits that one weight of each matrix takes in the file; codes, codebooks and scales are counted."
_ERROR = "How far the stored weights of each matrix are from the original ones, ‖W − Ŵ‖ / ‖W‖; lower is better."
_BUDGET = "The weight files, laid end to end: the bytes of each kind of matrix, and of what was not clustered."
_BLOCKS = "How far the output of each block is from that of the dense model, after each stage; lower is better."

_Bar = tuple[str, float, float, str, str]  # label, values where the bar starts and ends, note beside it, class


def render_report(title: str, report: dict[str, Any]) -> str:
    """The page of one compressed checkpoint.

    Args:
        title (`str`): Name of the checkpoint: the heading, and what the loading example loads.
        report (`dict`): Content of `cluscomp_report.json`. Sizes are bytes, times seconds, losses nats per token.

    Returns:
        `str`: HTML that is well-formed XML too; write it as UTF-8.
    """
    summary, matrices = _mapping(report.get("summary")), _matrices(_mapping(report.get("matrices")))
    sections = [
        _tiles(summary, len(matrices)),
        _by_kind("True bits by block", _BITS, "true_bits", "true bits per weight", matrices),
        _by_kind("Relative error by block", _ERROR, "relative_error", "relative error", matrices),
        _budget(matrices, _number(summary.get("bytes"))),
        _block_errors(_mapping(report.get("blocks"))),
        _losses(_numbers(report.get("losses"))),
        _times(_numbers(summary.get("stages")), _number(summary.get("seconds"))),
    ]
    example = _text(loading_example(title))
    table = _matrix_table(matrices)
    return _PAGE.format(title=_text(title), example=example, style=_STYLE, sections="\n".join(sections), table=table)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _number(value: Any) -> float | None:
    """A number that can be drawn, else None: reports may hold null, text, or the NaN that Python's JSON allows."""
    drawable = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e18
    return float(value) if drawable else None


def _numbers(values: Any) -> dict[str, float]:
    return {key: number for key, value in _mapping(values).items() if (number := _number(value)) is not None}


def _places(names: Iterable[str]) -> dict[str, tuple[str, int | None]]:
    """Kind and block number of every name; what comes before the number is dropped where it is the same in all."""
    numbers = re.compile(r"(?:^|\.)([0-9]{1,6})(?=\.|$)")
    found = {name: numbers.search(name) for name in names}
    several = len({name[: match.start()] for name, match in found.items() if match}) > 1
    places: dict[str, tuple[str, int | None]] = {}
    for name, match in found.items():
        places[name] = (name, None)
        if match:  # further numbers are those of experts
            kind = (name[: match.start()] if several else "") + numbers.sub(".*", name[match.end() :])
            places[name] = (kind.strip("."), int(match[1]))
    return places


def _matrices(entries: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The entries with their name, kind and block."""
    places = _places(entries)
    kinds = list(dict.fromkeys(kind for kind, _ in places.values()))
    shown = set(kinds if len(kinds) <= _MOST_KINDS else kinds[: _MOST_KINDS - 1])
    return [
        {**_mapping(entries[name]), "name": name, "kind": kind if kind in shown else "other kinds", "block": block}
        for name, (kind, block) in places.items()
    ]


def _text(value: object) -> str:
    """Escaped; control characters and unpaired surrogates, which no page may hold, are replaced."""
    printable = "[^\t\n\r\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]"
    return html.escape(re.sub(printable, "\ufffd", str(value)))


def _figure(value: Any, digits: int = 4) -> str:
    return "" if (number := _number(value)) is None else f"{number:.{digits}g}"


def _measure(value: Any, units: Sequence[tuple[float, str]]) -> str:
    """In the largest unit that the number fills."""
    if (number := _number(value)) is None:
        return ""
    factor, unit = next((unit for unit in units if number >= unit[0]), units[-1])
    return f"{number / factor:.4g} {unit}"


def _tiles(summary: Mapping[str, Any], count: int) -> str:
    number = _numbers(summary)
    size, dense = number.get("bytes"), number.get("source_bytes")
    saved = f"{dense / size:.1f} times smaller than {_measure(dense, _BYTES)}" if size and dense else ""
    amounts = ", ".join(f"{number[key]:.0f} {key}" for key in ("sequences", "tokens") if key in number)
    bits = f"of {number['bits']:g} allowed" if "bits" in number else ""
    tiles = [
        ("true bits per weight", _figure(number.get("true_bits")), bits),
        ("relative error", _figure(number.get("relative_error")), "of all clustered weights"),
        ("weight files", _measure(size, _BYTES), saved),
        ("time", _measure(number.get("seconds"), _SECONDS), f"{count} matrices"),
        ("peak memory", _measure(number.get("peak_memory"), _BYTES), ""),
        ("calibration text", summary.get("calibration"), amounts),
        ("made from", summary.get("source"), summary.get("dtype") or ""),
    ]
    cells = (f"<dt>{name}</dt><dd>{_text(value)}</dd><dd>{_text(note)}</dd>" for name, value, note in tiles if value)
    return f"<dl>{''.join(f'<div>{cell}</div>' for cell in cells)}</dl>"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns without content are left out."""
    kept = [column for column in range(1, len(header)) if any(row[column] for row in rows)]
    head = "".join(f'<th scope="col">{_text(header[column])}</th>' for column in [0, *kept])
    lines = [[f'<th scope="row">{_text(row[0])}</th>', *(f"<td>{_text(row[i])}</td>" for i in kept)] for row in rows]
    body = "\n".join(f"<tr>{''.join(line)}</tr>" for line in lines)
    return f'<div class="tall" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _plot(heading: str, sentence: str, height: float, parts: list[str], table: str) -> str:
    return f"""<section><h2>{heading}</h2><p>{_text(sentence)}</p>
<div class="wide"><svg viewBox="0 0 {_WIDTH} {height:.0f}" role="img"><title>{heading}</title>
{"".join(parts)}
</svg></div><details><summary>The numbers of this plot</summary>{table}</details></section>"""


def _write(x: float, y: float, style: str, text: str) -> str:
    shown = text if len(text) <= 28 else "…" + text[-27:]
    return f'<text x="{x:.1f}" y="{y + 4:.1f}" class="{style}">{_text(shown)}</text>'


def _step(least: float) -> float:
    """The smallest of …, 0.5, 1, 2, 5, 10, 20, … that is not below `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10, 20) if factor * power >= least)


def _axis(values: list[float]) -> tuple[dict[float, str], Callable[[float], float], bool]:
    """Ticks with their text; the place of a value, 0 at the last tick and 1 at the first; is the axis logarithmic."""
    log = min(values) > 1e-12 and max(values) / min(values) > _LOG_RATIO
    low, high = (math.log10(value) if log else value for value in (min(values), max(values)))
    # At least 5 % from bottom to top, so that differences in the last digit look as small as they are.
    step = _step(max(high - low, 0.05 * max(abs(low), abs(high)), 1e-9) / 4)
    ticks = [step * count for count in range(math.floor(low / step), math.floor(high / step) + 2)]
    marks = {10**tick: f"{10**tick:.2g}" for tick in ticks} if log else {tick: f"{tick:.6g}" for tick in ticks}
    return marks, lambda value: (ticks[-1] - (math.log10(value) if log else value)) / (ticks[-1] - ticks[0]), log


def _means(values: Iterable[tuple[str, int | None, Any]]) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, list[float]]] = {}
    for label, block, value in values:
        if block is not None and (number := _number(value)) is not None:
            found.setdefault(label, {}).setdefault(block, []).append(number)
    return {label: {block: fmean(line[block]) for block in sorted(line)} for label, line in found.items()}


def _line(label: str, points: list[tuple[str, float, float]], style: str, place: float) -> str:
    """Through (hint, x, y), with the label at height `place`."""
    dots = [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2"><title>{_text(hint)}</title></circle>' for hint, x, y in points]
    data = "L".join(f"{x:.1f} {y:.1f}" for _, x, y in points)
    lead = f"{data.rpartition('L')[2]}L{_RIGHT + 12} {place:.1f}"
    paths = f'<path class="data" d="M{data}"/><path class="lead" d="M{lead}"/>'
    return f'<g class="{style}">{paths}{"".join(dots)}{_write(_RIGHT + 18, place, "name", label)}</g>'


def _line_plot(heading: str, sentence: str, unit: str, lines: dict[str, dict[int, float]]) -> str:
    """A line over the blocks for each label, on one scale: in one frame, or in a frame each if there are many."""
    if not lines:
        return ""
    blocks = sorted({block for line in lines.values() for block in line})
    x = {block: _LEFT + (_RIGHT - _LEFT) * (i + 0.5) / len(blocks) for i, block in enumerate(blocks)}
    marks, share, log = _axis([value for line in lines.values() for value in line.values()])
    together = len(lines) <= _MOST_TOGETHER
    frames, height = ([[*lines]], 220) if together else ([[label] for label in lines], 36)
    styles = {label: f"c{index % 8}" for index, label in enumerate(lines)}
    parts, top = [_write(0, 8, "", unit + " (logarithmic)" * log)], _TOP
    for frame in frames:
        for mark in marks if together else [*marks][:: len(marks) - 1]:
            y = top + height * share(mark)
            parts += [f'<path class="grid" d="M{_LEFT} {y:.1f}H{_RIGHT}"/>', _write(_LEFT - 8, y, "end", marks[mark])]
        for place, label in enumerate(sorted(frame, key=lambda label: share([*lines[label].values()][-1]))):
            places = {block: (x[block], top + height * share(value)) for block, value in lines[label].items()}
            points = [(f"{label}, block {i}: {_figure(lines[label][i])}", *at) for i, at in places.items()]
            parts.append(_line(label, points, styles[label], top + height * (place + 0.5) / len(frame)))
        top += height + 16
    stride = int(_step(max(len(blocks) / 16, 1)))
    parts += [_write(x[block], top + 2, "mid", str(block)) for block in blocks[::stride]]
    parts.append(_write((_LEFT + _RIGHT) / 2, top + 20, "mid", "block"))
    rows = [[str(block), *(_figure(line.get(block)) for line in lines.values())] for block in blocks]
    return _plot(heading, sentence, top + 30, parts, _table(["block", *lines], rows))


def _bar_plot(heading: str, sentence: str, bars: list[_Bar]) -> str:
    if not bars:
        return ""
    edges = [edge for _, start, end, _, _ in bars for edge in (start, end)]
    scale = (_BAR_RIGHT - _BAR_LEFT) / ((max(edges) - min(edges)) or 1)
    parts = []
    for row, (label, start, end, note, style) in enumerate(bars):
        y, left = 12 + 24 * row, _BAR_LEFT + (min(start, end) - min(edges)) * scale
        width = max(abs(end - start) * scale, 1.5)
        bar = f'<rect class="{style}" x="{left:.1f}" y="{y - 8}" width="{width:.1f}" height="16"/>'
        parts += [_write(_BAR_LEFT - 8, y, "end", label), bar, _write(left + width + 6, y, "name", note)]
    table = _table(["", "value"], [[label, note] for label, _, _, note, _ in bars])
    return _plot(heading, sentence, 24 * len(bars) + 4, parts, table)


def _by_kind(heading: str, sentence: str, key: str, unit: str, matrices: list[dict[str, Any]]) -> str:
    places = [(matrix["kind"], matrix["block"]) for matrix in matrices]
    if len(set(places)) < len(places):
        sentence += " Where a block holds several matrices of a kind, a point is their mean."
    if any(block is None for _, block in places):
        sentence += " Matrices outside the blocks are in the last table only."
    return _line_plot(heading, sentence, unit, _means((m["kind"], m["block"], m.get(key)) for m in matrices))


def _budget(matrices: list[dict[str, Any]], total: float | None) -> str:
    sizes: dict[str, float] = {}
    for matrix in matrices:
        sizes[matrix["kind"]] = sizes.get(matrix["kind"], 0) + (_number(matrix.get("bytes")) or 0)
    styles = {kind: f"c{index % 8}" for index, kind in enumerate(sizes)}
    clustered = sum(sizes.values())
    parts = sorted(sizes.items(), key=lambda item: -item[1]) if clustered > 0 else []
    if parts and total is not None and total > clustered and all(_number(matrix.get("bytes")) for matrix in matrices):
        parts.append(("not clustered", total - clustered))
    bars, start, whole = [], 0.0, sum(size for _, size in parts)
    for kind, size in parts:
        note = f"{_measure(size, _BYTES)}, {size / whole:.1%}"
        bars.append((kind, start, start + size, note, styles.get(kind, "rest")))
        start += size
    return _bar_plot("Where the bytes went", _BUDGET, bars)


def _block_errors(blocks: Mapping[str, Any]) -> str:
    values = [
        (f"{kind} {key.removeprefix('error_')}".strip(), block, value)
        for name, (kind, block) in _places(blocks).items()
        for key, value in _mapping(blocks[name]).items()
        if key.startswith("error_")
    ]
    return _line_plot("Output error by block", _BLOCKS, "output error", _means(values))


def _losses(losses: dict[str, float]) -> str:
    first = "dense" if "dense" in losses else min(losses, key=losses.__getitem__, default="")
    gains = {stage: loss - losses[first] for stage, loss in losses.items()}
    notes = {stage: f"{loss:.4f}" + f" ({gains[stage]:+.4f})" * (stage != first) for stage, loss in losses.items()}
    bars = [(stage, 0.0, gains[stage], notes[stage], "c0") for stage in losses]
    return _bar_plot("Loss by stage", f"Mean loss per token, in nats, and how much it is above {first}.", bars)


def _times(stages: dict[str, float], total: float | None) -> str:
    known = sum(stages.values())
    if stages and total is not None and total > 1.01 * known:
        stages = {**stages, "everything else": total - known}
    whole = sum(stages.values()) or 1.0
    notes = {stage: f"{_measure(seconds, _SECONDS)}, {seconds / whole:.1%}" for stage, seconds in stages.items()}
    bars = [(stage, 0.0, seconds, notes[stage], "c0") for stage, seconds in stages.items()]
    return _bar_plot("Time by stage", "How long each stage of the compression took.", bars)


def _matrix_table(matrices: list[dict[str, Any]]) -> str:
    rows = []
    for matrix in matrices:
        spec, errors, shape = _mapping(matrix.get("spec")), _mapping(matrix.get("output_error")), matrix.get("shape")
        sides = " × ".join(map(str, shape)) if isinstance(shape, list) else ""
        stored = [f"{sign}={spec[key]}" for key, sign in _SPEC.items() if spec.get(key)]
        stored += ["scales"] if spec.get("scale_in") or spec.get("scale_out") else []
        figures = [matrix.get("true_bits"), matrix.get("relative_error"), errors.get("clustered")]
        figures += [errors.get("feedback"), matrix.get("sensitivity"), matrix.get("seconds")]
        cells = [matrix["name"], sides, " ".join(stored), _measure(matrix.get("bytes"), _BYTES)]
        rows.append([*cells, *map(_figure, figures)])
    columns = ["matrix", "shape", "stored as", "size", "true bits", "relative error", "output error, clustered"]
    return _table([*columns, "output error, feedback", "sensitivity", "seconds"], rows)
