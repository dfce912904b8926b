"""What the report page draws with: heat maps and bars of HTML boxes, plots of SVG, tables.

Boxes are as wide as the window has room, so a map of 80 blocks fits a phone. A plot is drawn 480 units wide, which are
CSS pixels where there is room and no less than two thirds of one on a phone, and its text stays legible at that.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

__all__ = [
    "BYTES",
    "SECONDS",
    "bars",
    "figure",
    "fold",
    "heat_map",
    "line_plot",
    "measure",
    "number_of",
    "numbers_of",
    "scatter",
    "section",
    "table",
    "text",
]

WIDTH, LEFT, RIGHT, TOP, HEIGHT = 480, 52, 466, 26, 220  # of a plot and its frame
BYTES = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "bytes"))
SECONDS = ((3600, "h"), (60, "min"), (1, "s"))
_LOG_RATIO = 30  # largest to smallest value from which an axis is logarithmic
_MOST_POINTS = 2000

Axis = tuple[dict[float, str], Callable[[float], float], bool]


def number_of(value: Any) -> float | None:
    """A number that can be drawn, else None: reports may hold null, text, or the NaN that Python's JSON allows."""
    drawable = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e18
    return float(value) if drawable else None


def numbers_of(values: Any) -> dict[str, float]:
    """The numbers among the values of a mapping; of anything else none."""
    values = values if isinstance(values, Mapping) else {}
    return {key: number for key, value in values.items() if (number := number_of(value)) is not None}


def text(value: object) -> str:
    """Escaped; control characters and unpaired surrogates, which no page may hold, are replaced."""
    printable = "[^\t\n\r\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]"
    return html.escape(re.sub(printable, "\ufffd", str(value)))


def figure(value: Any, digits: int = 4) -> str:
    """A number with so many digits; nothing for what is none."""
    return "" if (number := number_of(value)) is None else f"{number:.{digits}g}"


def measure(value: Any, units: Sequence[tuple[float, str]]) -> str:
    """In the largest unit that the number fills."""
    if (number := number_of(value)) is None:
        return ""
    factor, unit = next((unit for unit in units if number >= unit[0]), units[-1])
    return f"{number / factor:.4g} {unit}"


def section(heading: str, sentence: str, content: str = "") -> str:
    """A part of the page; without content the sentence is all."""
    return f"<section><h2>{text(heading)}</h2><p>{text(sentence)}</p>{content}</section>" if sentence else ""


def fold(summary: str, content: str) -> str:
    """What is shown when it is asked for."""
    return f"<details><summary>{text(summary)}</summary>{content}</details>" if content else ""


def table(header: Sequence[str], rows: Sequence[Sequence[str]], style: str = "tall") -> str:
    """Columns without content are left out."""
    kept = [column for column in range(1, len(header)) if any(row[column] for row in rows)]
    head = "".join(f'<th scope="col">{text(header[column])}</th>' for column in [0, *kept])
    lines = [[f'<th scope="row">{text(row[0])}</th>', *(f"<td>{text(row[i])}</td>" for i in kept)] for row in rows]
    body = "\n".join(f"<tr>{''.join(line)}</tr>" for line in lines)
    inside = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="{style}" tabindex="0">{inside}</div>'


def bars(rows: Sequence[tuple[str, Sequence[tuple[str, float, str]], str]]) -> str:
    """A bar of parts for each row: label, (hint, value, style) of the parts, note."""
    whole = max((sum(value for _, value, _ in parts) for _, parts, _ in rows), default=0.0)
    if whole <= 0:
        return ""
    lines = []
    for label, parts, note in rows:
        boxes = "".join(
            f'<i class="{style}" style="width:{100 * max(value, 0) / whole:.2f}%" title="{text(hint)}"></i>'
            for hint, value, style in parts
        )
        lines.append(f'<div class="bar"><strong>{text(label)}</strong><span>{boxes}</span><em>{text(note)}</em></div>')
    return "".join(lines)


def heat_map(values: Mapping[str, Mapping[int, float]], unit: str) -> str:
    """A row for each label, a box for each block; its colour goes from the least value of all to the largest."""
    blocks = sorted({block for row in values.values() for block in row})
    everything = [value for row in values.values() for value in row.values()]
    low, high = min(everything), max(everything)
    rows = []
    for label, row in values.items():
        cells = []
        for block in blocks:
            if block not in row:
                cells.append("<i></i>")
                continue
            share = (row[block] - low) / (high - low) if high > low else 0.5
            hint = text(f"{label}, block {block}: {figure(row[block])}")
            cells.append(f'<i style="--v:{100 * share:.0f}%" title="{hint}"></i>')
        rows.append(f'<div class="row"><strong>{text(label)}</strong><span>{"".join(cells)}</span></div>')
    key = f'<p class="key">{figure(low, 3)} <i></i> {figure(high, 3)} {text(unit)}; '
    key += f"blocks {blocks[0]} to {blocks[-1]} from left to right</p>"
    numbers = [[label, *(figure(row.get(block), 3) for block in blocks)] for label, row in values.items()]
    return (
        f'<div class="map">{"".join(rows)}</div>{key}'
        f"{fold('The numbers of this map', table(['', *map(str, blocks)], numbers, 'wide'))}"
    )


def scatter(
    points: Sequence[tuple[str, float, float]],
    others: Mapping[str, tuple[float, float]],
    curve: Callable[[float], float],
    axes: tuple[str, str],
) -> str:
    """Dots (hint, x, y), named marks of others among them, and a curve.

    Args:
        points: Of these at most 2,000 are drawn, every so manyth.
        others: (x, y) by name; those far outside of the points are left out.
        curve: y of every x.
        axes: What x and y are.
    """
    least, most = min(x for _, x, _ in points) - 0.6, max(x for _, x, _ in points) + 0.6
    shown = {name: place for name, place in others.items() if least <= place[0] <= most}
    xs = [x for _, x, _ in points] + [x for x, _ in shown.values()]
    ys = [y for _, _, y in points] + [y for _, y in shown.values()]
    across, up = _axis(xs, log=False), _axis(ys)
    parts = _frame(across, up, axes)

    def at(x: float, y: float) -> tuple[float, float]:
        return RIGHT - (RIGHT - LEFT) * across[1](x), TOP + HEIGHT * up[1](y)

    low, high = min(across[0]), max(across[0])
    line = [at(x, curve(x)) for x in (low + (high - low) * step / 40 for step in range(41))]
    inside = [f"{x:.1f} {y:.1f}" for x, y in line if TOP - 0.5 <= y <= TOP + HEIGHT + 0.5]
    parts.append(f'<path class="limit" d="M{"L".join(inside)}"/>' if inside else "")
    for hint, x, y in points[:: math.ceil(len(points) / _MOST_POINTS)]:
        left, top = at(x, y)
        parts.append(f'<circle class="c0" cx="{left:.1f}" cy="{top:.1f}" r="3"><title>{text(hint)}</title></circle>')
    for number, (name, (x, y)) in enumerate(shown.items()):
        left, top = at(x, y)
        parts.append(f'<path class="mark" d="M{left - 5:.1f} {top:.1f}h10m-5 -5v10"/>')
        parts.append(write(left, top + (16 if number % 2 else -14), "mid name", name))  # neighbours: above and below
    return _svg(" and ".join(axes), TOP + HEIGHT + 44, parts)


def line_plot(title: str, unit: str, lines: Mapping[str, Mapping[int, float]]) -> str:
    """A line over the blocks for each of a few labels."""
    blocks = sorted({block for line in lines.values() for block in line})
    if not blocks:
        return ""
    up = _axis([value for line in lines.values() for value in line.values()])
    place = {block: LEFT + (RIGHT - LEFT) * (i + 0.5) / len(blocks) for i, block in enumerate(blocks)}
    parts = _frame(None, up, ("block", unit))
    keys = []
    for number, (label, line) in enumerate(lines.items()):
        spots = [(block, place[block], TOP + HEIGHT * up[1](value)) for block, value in line.items()]
        path = "L".join(f"{x:.1f} {y:.1f}" for _, x, y in spots)
        parts.append(f'<path class="c{number % 8}" d="M{path}"/>')
        for block, x, y in spots:
            hint = text(f"{label}, block {block}: {figure(line[block])}")
            circle = f'cx="{x:.1f}" cy="{y:.1f}" r="3"'
            parts.append(f'<circle class="c{number % 8}" {circle}><title>{hint}</title></circle>')
        keys.append(f'<span class="c{number % 8}">{text(label)}</span>')
    stride = int(_step(max(len(blocks) / 10, 1)))
    parts += [write(place[block], TOP + HEIGHT + 16, "mid", str(block)) for block in blocks[::stride]]
    rows = [[str(block), *(figure(line.get(block)) for line in lines.values())] for block in blocks]
    numbers = fold("The numbers of this plot", table(["block", *lines], rows, "wide"))
    return f'{_svg(title, TOP + HEIGHT + 44, parts)}<p class="key">{" ".join(keys)}</p>{numbers}'


def write(x: float, y: float, style: str, words: str) -> str:
    """Text of a plot, at most 28 letters of it."""
    shown = words if len(words) <= 28 else "…" + words[-27:]
    return f'<text x="{x:.1f}" y="{y + 4:.1f}" class="{style}">{text(shown)}</text>'


def _svg(title: str, height: float, parts: Iterable[str]) -> str:
    body = "".join(parts)
    return f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img"><title>{text(title)}</title>{body}</svg>'


def _frame(across: Axis | None, up: Axis, axes: tuple[str, str]) -> list[str]:
    """Grid lines and what stands at the axes."""
    parts = [write(0, 6, "", axes[1] + " (logarithmic)" * up[2])]
    for mark, words in up[0].items():
        y = TOP + HEIGHT * up[1](mark)
        parts += [f'<path class="grid" d="M{LEFT} {y:.1f}H{RIGHT}"/>', write(LEFT - 6, y, "end", words)]
    for mark, words in (across[0] if across else {}).items():
        x = RIGHT - (RIGHT - LEFT) * across[1](mark) if across else 0
        parts.append(write(x, TOP + HEIGHT + 16, "mid", words))
    return [*parts, write((LEFT + RIGHT) / 2, TOP + HEIGHT + 34, "mid", axes[0])]


def _step(least: float) -> float:
    """The smallest of …, 0.5, 1, 2, 5, 10, 20, … that is not below `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10, 20) if factor * power >= least)


def _axis(values: Sequence[float], log: bool = True) -> Axis:
    """Ticks with their text; the place of a value, 0 at the last tick and 1 at the first; is the axis logarithmic."""
    log = log and min(values) > 1e-12 and max(values) / min(values) > _LOG_RATIO
    low, high = (math.log10(value) if log else value for value in (min(values), max(values)))
    # At least 5 % from end to end, so that differences in the last digit look as small as they are.
    step = _step(max(high - low, 0.05 * max(abs(low), abs(high)), 1e-9) / 4)
    ticks = [step * count for count in range(math.floor(low / step), math.floor(high / step) + 2)]
    marks = {10**tick: f"{10**tick:.2g}" for tick in ticks} if log else {tick: f"{tick:.6g}" for tick in ticks}
    return marks, lambda value: (ticks[-1] - (math.log10(value) if log else value)) / (ticks[-1] - ticks[0]), log
