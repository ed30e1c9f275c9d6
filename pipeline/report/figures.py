"""Small charts as inline SVG: pure functions from numbers to markup, coloured by the page's CSS.

The SVG box is the plot area and positions in it are percentages, so that text, dots and line widths
keep their size however wide the page is; tick labels hang outside, in the figure's padding. A
series' CSS classes choose its colour (c0 to c7) and its dash (d0 to d7); a marker has a shape.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from markupsafe import Markup

from pipeline.report.axes import (
    Axis,
    Label,
    Number,
    as_number,
    draw_x_ticks,
    draw_y_ticks,
    percent,
    plan_betas,
    plan_linear,
    plan_positive,
    plan_progress,
)
from pipeline.report.markers import MARKERS, SHAPES, draw_key, draw_marker, draw_title
from pipeline.report.row_figures import Estimate, Pair, draw_estimates, draw_pairs

N_STYLES = 8
_MANY = 3  # intervals that overlap in one chart


class Line(NamedTuple):
    """One series of a chart."""

    label: str
    style: str  # CSS classes
    points: Sequence[tuple[Number, Number | None]]  # (x, y); None leaves a gap
    marker: str = ""  # at every point: "dot", "ring", a name of SHAPES, or "open-" and that name
    joined: bool = True  # False: markers alone
    band: Sequence[
        tuple[Number, Number, Number]
    ] = ()  # (x, low, high): an interval around the line


def series_style(index: int) -> str:
    """CSS classes of the index-th series: 64 pairs of colour and dash before one comes back."""
    return f"c{index % N_STYLES} d{(index + index // N_STYLES) % N_STYLES}"


def draw_lines(lines: Sequence[Line], *, x: Axis, y: Axis, describe: str) -> Markup:
    """A line chart as one SVG element; `describe` is its text for those who cannot see it.

    Intervals lie behind all lines, a tint between two thin edges, each with its line's dash; many
    of them are fainter. They are cut off where the axes end, so plan `y` with their ends.
    """
    bands = [_draw_band(line, x, y) for line in lines if line.band]
    return Markup('<svg class="plot" role="img" aria-label="{}">{}{}<g{}>{}</g>{}</svg>').format(
        describe,
        draw_y_ticks(y),
        draw_x_ticks(x),
        Markup(' class="faint"') if len(bands) > _MANY else "",
        Markup("").join(bands),
        Markup("").join(_draw_line(line, x, y) for line in lines),
    )


def average_windows(
    points: Sequence[tuple[float, float | None]], *, most: int = 150
) -> list[tuple[float, float | None]]:
    """At most `most` points: means of equal windows, each at its last x; gaps stay out of them."""
    width = -(-len(points) // most) or 1
    windows = (points[i : i + width] for i in range(0, len(points), width))
    return [(window[-1][0], _mean([y for _, y in window if y is not None])) for window in windows]


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _draw_band(line: Line, x: Axis, y: Axis) -> Markup:
    ends = [(a, as_number(low), as_number(high)) for a, low, high in sorted(line.band)]
    known = [(a, low, high) for a, low, high in ends if low is not None and high is not None]
    lower, upper = (
        [(x.place(end[0]), min(max(y.place(end[side]), 0.0), 1.0)) for end in known]
        for side in (1, 2)
    )
    area = " ".join(_trace([*upper, *reversed(lower)]))
    edges = " ".join([*_trace(upper), *_trace(lower)])
    return _stretch(
        Markup('<path class="band {0}" d="{1}"/><path class="edge {0}" d="{2}"/>').format(
            line.style, area, edges
        )
    )


def _draw_line(line: Line, x: Axis, y: Axis) -> Markup:
    # The two ends of a step are one place, though rounding may part them the wrong way round.
    points = sorted(line.points, key=lambda point: float(f"{point[0]:.12g}"))
    heights = (as_number(b) for _, b in points)
    placed = [
        (x.place(a), None if b is None else y.place(b))
        for (a, _), b in zip(points, heights, strict=True)
    ]
    path = Markup('<path class="line {}" d="{}">{}</path>').format(
        line.style, " ".join(_trace(placed)), draw_title(line.label)
    )
    markers = (
        draw_marker(line.marker, line.style, percent(a), percent(1 - b), line.label)
        for a, b in placed
        if line.marker and b is not None
    )
    return (_stretch(path) if line.joined else Markup("")) + Markup("").join(markers)


def _stretch(paths: Markup) -> Markup:
    """Paths in a box of 1000 by 1000 that is stretched over the plot area."""
    return Markup(
        '<svg class="stretch" viewBox="0 0 1000 1000" preserveAspectRatio="none">{}</svg>'
    ).format(paths)


def _trace(placed: Iterable[tuple[Number, Number | None]]) -> Iterator[str]:
    pen = "M"
    for a, b in placed:
        if b is not None:
            yield f"{pen}{1000 * a:.1f} {1000 * (1 - b):.1f}"
        pen = "M" if b is None else "L"


__all__ = [
    "MARKERS",
    "N_STYLES",
    "SHAPES",
    "Axis",
    "Estimate",
    "Label",
    "Line",
    "Number",
    "Pair",
    "as_number",
    "average_windows",
    "draw_estimates",
    "draw_key",
    "draw_lines",
    "draw_marker",
    "draw_pairs",
    "plan_betas",
    "plan_linear",
    "plan_positive",
    "plan_progress",
    "series_style",
]
