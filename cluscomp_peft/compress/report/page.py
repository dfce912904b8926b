"""A compression report as one HTML page: how good the model still is, what it takes, where the errors are.

The page is made of what `compress` noted in `cluscomp_report.json` and of nothing else: styles and plots are inside,
scripts and network are not, so it can be mailed, archived or put beside the weights on a hub. Any part of a report may
be missing, as it is in reports of older versions; its tile, plot or column is then left out. A plot whose values are
all the same is a sentence.

A *kind* is a matrix name without its block number: `model.layers.7.mlp.up_proj` is `mlp.up_proj` of block 7.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping
from statistics import fmean
from typing import Any

from .card import loading_example
from .plots import (
    BYTES,
    SECONDS,
    bars,
    figure,
    fold,
    heat_map,
    line_plot,
    measure,
    number_of,
    numbers_of,
    scatter,
    section,
    table,
    text,
)
from .verdict import judge

__all__ = ["OTHERS", "render_report"]

_MOST_KINDS = 24  # rows of a map
_WORST = 10
_SAME = 0.02  # a map of values that differ by less shows nothing
# True bits and relative error of other methods on normally distributed weights in blocks of 64: NF4 with its scales
# quantised, round to nearest with scale and minimum in fp16.
OTHERS = {"NF4": (4.127, 0.092), "RTN 4": (4.5, 0.09), "RTN 3": (3.5, 0.192), "RTN 2": (2.5, 0.451)}
_SPEC = {"group_size": "g", "num_clusters": "n", "num_blocks": "blocks"}
_STYLE = """
:root { color-scheme: light dark; --page: #fcfcfb; --tile: #f1f0ec; --text: #0b0b0b; --soft: #52514e; --grid: #e1e0d9;
  --bad: #b3261e; --cool: #dfe7f1; --hot: #b3402a }
@media (prefers-color-scheme: dark) {
  :root { --page: #1a1a19; --tile: #262624; --text: #fff; --soft: #c3c2b7; --grid: #383835; --bad: #ff8a80;
    --cool: #2b3542; --hot: #e8785a } }
.c0 { --c: #3987e5 } .c1 { --c: #199e70 } .c2 { --c: #c98500 } .c3 { --c: #008300 } .c4 { --c: #9085e9 }
.c5 { --c: #e66767 } .c6 { --c: #d55181 } .c7 { --c: #d95926 } .rest { --c: #8f8d85 }
* { box-sizing: border-box }
body { background: var(--page); color: var(--text); font: 15px/1.5 system-ui, sans-serif; margin: 0 auto;
  max-width: 880px; padding: 24px 16px; overflow-wrap: anywhere }
h1 { font-size: 26px; line-height: 1.2; margin: 0 } h2 { font-size: 18px; margin: 36px 0 0 } p { margin: 4px 0 12px }
.verdict { border-left: 4px solid var(--c, #199e70); padding: 2px 0 2px 14px; margin: 18px 0 }
.verdict p { margin: 4px 0 }
.bad { --c: var(--bad) } .bad .lead, .warn { color: var(--bad) } .lead { font-size: 19px }
dl { display: flex; flex-wrap: wrap; gap: 10px; margin: 20px 0 0 } dl div { flex: 1 0 140px }
dl div, pre { background: var(--tile); border-radius: 8px; padding: 10px 14px } dd { margin: 0; font-size: 22px }
dt, dd + dd, summary, .key { color: var(--soft); font-size: 13px } summary { cursor: pointer } a { color: inherit }
.wide, .tall { overflow: auto } .tall { max-height: 80vh } pre { white-space: pre-wrap; font-size: 13px }
code { user-select: all } strong, em { font-weight: 500; font-style: normal; font-size: 13px }
em { color: var(--soft) }
.bar, .row { display: grid; grid-template-columns: 170px 1fr; gap: 0 10px; align-items: center; margin: 3px 0 }
.bar { grid-template-columns: 170px 1fr 170px } .bar span, .row span { display: flex; min-width: 0 }
.bar i { background: var(--c); height: 18px } .row i { flex: 1; min-width: 0; height: 18px }
.row i[style], .key i { background: color-mix(in srgb, var(--hot) var(--v), var(--cool)) }
.key i { display: inline-block; width: 90px; height: 10px;
  background: linear-gradient(to right, var(--cool), var(--hot)) }
.key span { border-left: 14px solid var(--c); padding-left: 6px; margin-right: 14px }
@media (max-width: 620px) { .row { grid-template-columns: 1fr } .bar { grid-template-columns: 1fr auto }
  .bar span { grid-column: 1 / 3; grid-row: 2 } }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums }
th, td { padding: 3px 10px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--grid) }
th { font-weight: 500 } th:first-child { text-align: left } thead { position: sticky; top: 0; background: var(--tile) }
.few th { white-space: normal } .few td, .few th { padding: 3px 6px } .few th:first-child { padding-left: 0 }
svg { display: block; width: 100%; max-width: 580px; font: 13px system-ui, sans-serif } text { fill: var(--soft) }
.mid { text-anchor: middle } .name { fill: var(--text) } .end { text-anchor: end }
path { stroke: var(--c); stroke-width: 1.75; fill: none } path.grid { stroke: var(--grid); stroke-width: 1 }
path.limit { stroke: var(--soft); stroke-dasharray: 5 4; stroke-width: 1.25 } path.mark { stroke: var(--text) }
circle { fill: var(--c); fill-opacity: .65; stroke: transparent; stroke-width: 6 }
@media print { .tall { max-height: none } }
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
<section><h2>Method</h2><p>ClusComp: Liao et al., “ClusComp: A Simple Paradigm for Model Compression and Efficient
Finetuning”, Findings of ACL 2025, <a href="https://arxiv.org/abs/2503.13089">arXiv:2503.13089</a>.</p></section>
</body></html>
"""


def render_report(title: str, report: dict[str, Any]) -> str:
    """The page of one compressed checkpoint.

    Args:
        title (`str`): Name of the checkpoint: the heading, and what the loading example loads.
        report (`dict`): Content of `cluscomp_report.json`. Sizes are bytes, times seconds, losses nats per token.

    Returns:
        `str`: HTML that is well-formed XML too; write it as UTF-8.
    """
    summary, matrices = _mapping(report.get("summary")), _matrices(_mapping(report.get("matrices")))
    code = f"<pre><code>{text(loading_example(title))}\n</code></pre>"
    rest = "".join(
        (
            _bytes_by_kind(matrices),
            _block_errors(_mapping(report.get("blocks"))),
            _times(numbers_of(summary.get("stages")), number_of(summary.get("seconds"))),
        )
    )
    sections = [
        _verdict(summary, numbers_of(report.get("losses")), title),
        _tiles(summary, len(matrices)),
        _sizes(summary, matrices),
        _map("Bits by block", "true bits per weight", "true_bits", matrices),
        _map("Error by block", "relative error ‖W − Ŵ‖ / ‖W‖ of the weights", "relative_error", matrices),
        _errors_against_bits(matrices),
        _worst(matrices),
        _made_by(summary),
        section("Load it", "A click selects all of it.", code),
        fold("More: bytes by kind, output errors, times", rest),
        fold(f"Every matrix ({len(matrices)})", _matrix_table(matrices)),
    ]
    return _PAGE.format(title=text(title), style=_STYLE, sections="\n".join(part for part in sections if part))


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


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


def _verdict(summary: Mapping[str, Any], losses: Mapping[str, float], title: str) -> str:
    """What the model lost, or that nobody measured it."""
    numbers, name = numbers_of(summary.get("evaluation")), _mapping(summary.get("evaluation")).get("text")
    evaluation = {**numbers, "text": name} if numbers.keys() >= {"dense", "compressed", "tokens"} else None
    source, reason = summary.get("source") or "DENSE", summary.get("not_calibrated")
    lines, warnings = judge(losses, title, source, reason, evaluation)
    said = [("lead", line) for line in lines] + [("lead" if not lines else "warn", line) for line in warnings]
    paragraphs = "".join(f'<p class="{style}">{text(line)}</p>' for style, line in said)
    return f'<div class="verdict{" bad" if warnings else ""}">{paragraphs}</div>'


def _tiles(summary: Mapping[str, Any], count: int) -> str:
    number = numbers_of(summary)
    size, dense = number.get("bytes"), number.get("source_bytes")
    saved = f"{dense / size:.1f} times smaller than {measure(dense, BYTES)}" if size and dense else ""
    amounts = ", ".join(f"{number[key]:.0f} {key}" for key in ("sequences", "tokens") if key in number)
    bits = f"of {number['bits']:g} allowed" if "bits" in number else ""
    tiles = [
        ("true bits per weight", figure(number.get("true_bits")), bits),
        ("relative error", figure(number.get("relative_error")), "of all clustered weights"),
        ("weight files", measure(size, BYTES), saved),
        ("time", measure(number.get("seconds"), SECONDS), f"{count} matrices"),
        ("peak memory", measure(number.get("peak_memory"), BYTES), ""),
        ("calibration text", summary.get("calibration"), amounts),
        ("made from", summary.get("source"), summary.get("dtype") or ""),
    ]
    cells = (f"<dt>{name}</dt><dd>{text(value)}</dd><dd>{text(note)}</dd>" for name, value, note in tiles if value)
    return f"<dl>{''.join(f'<div>{cell}</div>' for cell in cells)}</dl>"


def _sizes(summary: Mapping[str, Any], matrices: list[dict[str, Any]]) -> str:
    number = numbers_of(summary)
    sizes = [number_of(matrix.get("bytes")) for matrix in matrices]
    total, clustered = number.get("bytes"), sum(size or 0 for size in sizes)
    if not total or not clustered or None in sizes or not 0 < clustered <= total:
        return ""
    parts = [
        (f"codes, codebooks and scales: {measure(clustered, BYTES)}", clustered, "c0"),
        (f"dense: {measure(total - clustered, BYTES)}", total - clustered, "rest"),
    ]
    rows = [("this model", parts, f"{measure(total, BYTES)}")]
    if number.get("source_bytes", 0) > 0:
        size = number["source_bytes"]
        rows.insert(0, ("dense model", [(measure(size, BYTES), size, "rest")], measure(size, BYTES)))
    sentence = (
        f"{measure(clustered, BYTES)} are codes, codebooks and scales (blue), {measure(total - clustered, BYTES)} "
    )
    sentence += "stay dense (grey): embeddings where they are not clustered, norms, biases."
    return section("Size", sentence, bars(rows))


def _map(heading: str, unit: str, key: str, matrices: list[dict[str, Any]]) -> str:
    """Kind by block, means where there are several; a sentence where all are alike or none is in a block."""
    found: dict[str, dict[int, list[float]]] = {}
    for matrix in matrices:
        if matrix["block"] is not None and (value := number_of(matrix.get(key))) is not None:
            found.setdefault(matrix["kind"], {}).setdefault(matrix["block"], []).append(value)
    if not found:
        return ""
    values = {kind: {block: fmean(row[block]) for block in sorted(row)} for kind, row in found.items()}
    everything = [value for row in values.values() for value in row.values()]
    low, high = min(everything), max(everything)
    if high - low <= _SAME * max(abs(low), abs(high)):
        return section(heading, f"All matrices are alike: {figure(low, 3)} {unit}.")
    sentence = f"{unit[0].upper()}{unit[1:]}; point at a box for its number."
    if any(len(several) > 1 for row in found.values() for several in row.values()):
        sentence += " Where a block holds several matrices of a kind, a box is their mean."
    return section(heading, sentence, heat_map(values, unit.partition(" ‖")[0]))


def _errors_against_bits(matrices: list[dict[str, Any]]) -> str:
    points = []
    for matrix in matrices:
        bits, error = number_of(matrix.get("true_bits")), number_of(matrix.get("relative_error"))
        if bits is not None and error is not None and 0 < bits < 64:
            points.append((f"{matrix['name']}: {figure(bits)} bits, error {figure(error)}", bits, error))
    if not points:
        return ""
    sentence = (
        "Each dot is a matrix. Crosses are what NF4 and rounding to nearest make of normal weights, whose "
        "limit, 2 to the minus bits, is dashed. With calibration text codes serve the outputs, not the weights: a dot "
        "may lie above a cross and the model still lose less."
    )
    axes = ("true bits per weight", "relative error")
    return section("Error against bits", sentence, scatter(points, OTHERS, lambda bits: 2.0**-bits, axes))


def _worst(matrices: list[dict[str, Any]]) -> str:
    """The matrices that are furthest from the original: by outputs where they were measured, else by weights."""
    measured = {matrix["name"]: _output_error(matrix) for matrix in matrices}
    by_output = all(error is not None for error in measured.values())
    known = [
        (error, matrix)
        for matrix in matrices
        if (error := measured[matrix["name"]] if by_output else number_of(matrix.get("relative_error"))) is not None
    ]
    if len(known) < 2:
        return ""
    known.sort(key=lambda pair: -pair[0])
    rows = [
        [matrix["name"], _stored(matrix), figure(matrix.get("true_bits"), 3), figure(error, 3)]
        for error, matrix in known[:_WORST]
    ]
    what = "outputs on the calibration text" if by_output else "weights"
    columns = ["matrix", "stored as", "bits", "error"]
    sentence = f"By the relative error of their {what}."
    return section(f"The {len(rows)} worst matrices", sentence, table(columns, rows, "few"))


def _output_error(matrix: Mapping[str, Any]) -> float | None:
    errors = numbers_of(matrix.get("output_error"))
    return errors.get("feedback", errors.get("clustered"))


def _made_by(summary: Mapping[str, Any]) -> str:
    settings, versions = _mapping(summary.get("settings")), _mapping(summary.get("versions"))
    if not settings:
        return ""
    words = ["cluscomp", "compress", shlex.quote(str(summary.get("source") or "DENSE")), "OUT"]
    for name, value in settings.items():
        flag = str(name).replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", shlex.quote(str(value))]
    made = ", ".join(f"{name} {version}" for name, version in versions.items())
    sentence = f"Made with {made}." if made else "The command that makes it again."
    return section("Command", sentence, f"<pre><code>{text(' '.join(words))}\n</code></pre>")


def _bytes_by_kind(matrices: list[dict[str, Any]]) -> str:
    sizes: dict[str, float] = {}
    for matrix in matrices:
        sizes[matrix["kind"]] = sizes.get(matrix["kind"], 0) + (number_of(matrix.get("bytes")) or 0)
    whole = sum(sizes.values())
    if whole <= 0:
        return ""
    rows = [
        (kind, [(kind, size, f"c{number % 8}")], f"{measure(size, BYTES)}, {size / whole:.1%}")
        for number, (kind, size) in enumerate(sorted(sizes.items(), key=lambda item: -item[1]))
    ]
    return section("Bytes by kind", "What the clustered matrices of each kind take.", bars(rows))


def _block_errors(blocks: Mapping[str, Any]) -> str:
    lines: dict[str, dict[int, list[float]]] = {}
    for name, (kind, block) in _places(blocks).items():
        for key, value in numbers_of(blocks[name]).items():
            if key.startswith("error_") and block is not None:
                label = f"{kind} {key.removeprefix('error_')}".strip()
                lines.setdefault(label, {}).setdefault(block, []).append(value)
    means = {label: {block: fmean(line[block]) for block in sorted(line)} for label, line in lines.items()}
    if not means:
        return ""
    sentence = "How far the output of each block is from that of the dense model, before and after it was trained."
    plot = line_plot("Output error by block", "relative output error", means)
    return section("Output error by block", sentence, plot)


def _times(stages: Mapping[str, float], total: float | None) -> str:
    known = sum(stages.values())
    if stages and total is not None and total > 1.01 * known:
        stages = {**stages, "everything else": total - known}
    rows = [(stage, [(stage, seconds, "c0")], measure(seconds, SECONDS)) for stage, seconds in stages.items()]
    content = bars(rows)
    return section("Time by stage", "How long each stage of the compression took.", content) if content else ""


def _stored(matrix: Mapping[str, Any]) -> str:
    spec = _mapping(matrix.get("spec"))
    stored = [f"{sign}={spec[key]}" for key, sign in _SPEC.items() if spec.get(key)]
    return " ".join(stored + ["scales"] * bool(spec.get("scale_in") or spec.get("scale_out")))


def _matrix_table(matrices: list[dict[str, Any]]) -> str:
    rows = []
    for matrix in matrices:
        errors, shape = _mapping(matrix.get("output_error")), matrix.get("shape")
        sides = " × ".join(map(str, shape)) if isinstance(shape, list) else ""
        figures = [matrix.get("true_bits"), matrix.get("relative_error"), errors.get("clustered")]
        figures += [errors.get("feedback"), matrix.get("sensitivity"), matrix.get("seconds")]
        cells = [matrix["name"], sides, _stored(matrix), measure(matrix.get("bytes"), BYTES)]
        rows.append([*cells, *map(figure, figures)])
    columns = ["matrix", "shape", "stored as", "size", "true bits", "relative error", "output error, clustered"]
    return table([*columns, "output error, feedback", "sensitivity", "seconds"], rows) if rows else ""
