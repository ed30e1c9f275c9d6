"""Small charts as inline SVG: pure functions from numbers to markup, coloured by the page's CSS.

The SVG box is the plot area and positions in it are percentages, so that text, dots and line widths
keep their size however wide the page is; tick labels hang outside, in the figure's padding. A
series' CSS classes choose its colour (c0 to c7) and its dash (d0 to d7).
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from markupsafe import Markup

Label = Callable[[float], str]
N_STYLES = 8


class Line(NamedTuple):
    """One series of a chart."""

    label: str
    style: str  # CSS classes
    points: Sequence[tuple[float, float | None]]  # (x, y); None leaves a gap
    marker: str = ""  # "dot" or "ring" at every point


class Axis(NamedTuple):
    """Where values go, from 0 (left, bottom) to 1."""

    place: Callable[[float], float]
    ticks: tuple[tuple[float, str], ...]  # place and text


class Pair(NamedTuple):
    """One row of a pair chart: the same figure with and without the gradient at inference."""

    label: str
    style: str
    filled: float | None
    hollow: float | None


def series_style(index: int) -> str:
    """CSS classes of the index-th series: 64 pairs of colour and dash before one comes back."""
    return f"c{index % N_STYLES} d{(index + index // N_STYLES) % N_STYLES}"


def as_number(value: object) -> float | None:
    """A finite number as a float, and None for anything else."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def plan_linear(values: Iterable[float], *, label: Label, zero: bool = False) -> Axis:
    """A linear axis that ends at round numbers, with three to seven ticks."""
    values = [*values, *([0.0] if zero else [])] or [0.0, 1.0]
    low, high = min(values), max(values)
    if high - low <= 1e-6 * max(abs(low), abs(high)):  # a flat line goes through the middle
        half = abs(low) / 2 or 0.5
        low, high = low - half, high + half
    step = round_step((high - low) / 4)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    start, span = first * step, (last - first) * step
    marks = [_clean(i * step) for i in range(first, last + 1)]

    def place(value: float) -> float:
        return (value - start) / span

    return Axis(place, tuple((place(mark), label(mark)) for mark in marks))


def plan_progress(values: Iterable[float], *, label: Label) -> Axis:
    """A linear axis from 0 to exactly the largest value, with ticks at round numbers."""
    high = max(values, default=0.0) or 1.0
    step = round_step(high / 5)
    marks = [_clean(i * step) for i in range(math.floor(high / step + 1e-9) + 1)]
    return Axis(lambda value: value / high, tuple((mark / high, label(mark)) for mark in marks))


def plan_positive(values: Iterable[float], *, label: Label) -> Axis:
    """A linear axis, or a logarithmic one where all values are positive and span a factor of 3."""
    values = list(values)
    if not values or min(values) <= 0 or max(values) / min(values) < 3:
        return plan_linear(values, label=label)
    low, high = math.log10(min(values)) - 0.05, math.log10(max(values)) + 0.05
    mantissas = (1, 2, 3, 5) if high - low < 1 else (1, 2, 5) if high - low < 2 else (1,)
    marks = (m * 10.0**e for e in range(math.floor(low), math.ceil(high) + 1) for m in mantissas)

    def place(value: float) -> float:
        return (math.log10(value) - low) / (high - low)

    return Axis(place, tuple((place(m), label(m)) for m in marks if 0 <= place(m) <= 1))


def plan_betas(betas: Iterable[float], *, label: Label) -> Axis:
    """A logarithmic axis with every beta as a tick, and 0 at its left end behind a break."""
    betas = sorted(set(betas))
    positive = [math.log10(beta) for beta in betas if beta > 0]
    start = 0.22 if 0 in betas and positive else 0.04
    span = (max(positive) - min(positive)) if positive else 0.0

    def place(beta: float) -> float:
        if beta <= 0:
            return 0.04
        return start + (0.96 - start) * ((math.log10(beta) - min(positive)) / span if span else 1)

    ticks = [(place(beta), label(beta)) for beta in betas]
    if start > 0.04:
        ticks.insert(1, ((0.04 + start) / 2, "//"))
    return Axis(place, tuple(ticks))


def draw_lines(lines: Sequence[Line], *, x: Axis, y: Axis, describe: str) -> Markup:
    """A line chart as one SVG element; `describe` is its text for those who cannot see it."""
    return Markup('<svg class="plot" role="img" aria-label="{}">{}{}{}</svg>').format(
        describe,
        _draw_y_ticks(y),
        _draw_x_ticks(x),
        Markup("").join(_draw_line(line, x, y) for line in lines),
    )


def draw_pairs(pairs: Sequence[Pair], *, label: Label, tick: Label, describe: str) -> Markup:
    """A row per SAE: a dot with the gradient, a ring without it, and a bar between them."""
    row_px = 46
    values = [v for pair in pairs for v in (pair.filled, pair.hollow) if v is not None]
    x = plan_linear(values, label=tick, zero=True)
    rows = (_draw_pair(pair, x, i * row_px, label) for i, pair in enumerate(pairs))
    return Markup(
        '<svg class="pairs" style="height:{}px" role="img" aria-label="{}">{}{}</svg>'
    ).format(row_px * len(pairs) + 8, describe, _draw_x_ticks(x, grid=True), Markup("").join(rows))


def average_windows(
    points: Sequence[tuple[float, float | None]], *, most: int = 150
) -> list[tuple[float, float | None]]:
    """At most `most` points: means of equal windows, each at its last x; gaps stay out of them."""
    width = -(-len(points) // most) or 1
    windows = (points[i : i + width] for i in range(0, len(points), width))
    return [(window[-1][0], _mean([y for _, y in window if y is not None])) for window in windows]


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def round_step(rough: float) -> float:
    """The smallest of 1, 2, 2.5 and 5 times a power of ten that is at least `rough`."""
    power = 10.0 ** math.floor(math.log10(rough))
    return power * next(m for m in (1, 2, 2.5, 5, 10) if m * power >= rough * (1 - 1e-9))


def _clean(value: float) -> float:
    """0.3 for 0.30000000000000004."""
    return float(f"{value:.12g}")


def _percent(place: float) -> str:
    return f"{100 * place:.2f}%"


def _draw_y_ticks(y: Axis) -> Markup:
    tick = Markup(
        '<line class="grid-line" x1="0" x2="100%" y1="{0}" y2="{0}"/>'
        '<text class="tick y" x="0" dx="-8" dy=".32em" y="{0}">{1}</text>'
    )
    return Markup("").join(tick.format(_percent(1 - at), text) for at, text in y.ticks)


def _draw_x_ticks(x: Axis, *, grid: bool = False) -> Markup:
    tick = Markup(
        '<line class="{}" x1="{}" x2="{}" y1="{}" y2="100%"/>'
        '<text class="tick {}" x="{}" y="100%" dy="18">{}</text>'
    )
    return Markup("").join(
        tick.format(
            "grid-line" if grid else "mark",
            _percent(at),
            _percent(at),
            "0" if grid else "99%",
            "start" if grid and at < 0.01 else "end" if grid and at > 0.99 else "x",
            _percent(at),
            text,
        )
        for at, text in x.ticks
    )


def _draw_line(line: Line, x: Axis, y: Axis) -> Markup:
    placed = [
        (x.place(a), None if b is None else y.place(b))
        for a, b in sorted(line.points, key=lambda point: point[0])
    ]
    path = Markup('<path class="line {}" d="{}"><title>{}</title></path>').format(
        line.style, " ".join(_trace(placed)), line.label
    )
    stretched = Markup(
        '<svg class="stretch" viewBox="0 0 1000 1000" preserveAspectRatio="none">{}</svg>'
    )
    markers = (
        Markup('<circle class="{} {}" r="4.5" cx="{}" cy="{}"><title>{}</title></circle>').format(
            line.marker, line.style, _percent(a), _percent(1 - b), line.label
        )
        for a, b in placed
        if line.marker and b is not None
    )
    return stretched.format(path) + Markup("").join(markers)


def _trace(placed: Iterable[tuple[float, float | None]]) -> Iterator[str]:
    pen = "M"
    for a, b in placed:
        if b is not None:
            yield f"{pen}{1000 * a:.1f} {1000 * (1 - b):.1f}"
        pen = "M" if b is None else "L"


def _draw_pair(pair: Pair, x: Axis, top: int, label: Label) -> Markup:
    def text(value: float | None) -> str:
        return "–" if value is None else label(value)

    middle = top + 32
    name = Markup(
        '<text class="name" x="0" y="{}">{}</text>'
        '<text class="figures" x="100%" y="{}">{} with, {} without</text>'
    ).format(top + 17, pair.label, top + 17, text(pair.filled), text(pair.hollow))
    bar = Markup("")
    if pair.filled is not None and pair.hollow is not None:
        bar = Markup('<line class="bar {}" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(
            pair.style, *(_percent(x.place(v)) for v in (pair.filled, pair.hollow)), middle, middle
        )
    marks = (
        Markup('<circle class="{} {}" r="{}" cx="{}" cy="{}"/>').format(
            kind, pair.style, radius, _percent(x.place(value)), middle
        )
        for kind, radius, value in (("ring", 7, pair.hollow), ("dot", 4, pair.filled))
        if value is not None
    )
    return name + bar + Markup("").join(marks)
