"""Charts with a row per value: name and figures as text that can wrap, below them inline SVG."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from markupsafe import Markup

from pipeline.report.axes import Axis, Label, Number, as_number, draw_x_ticks, percent, plan_linear
from pipeline.report.markers import draw_marker

_MANY = 10  # rows


class Pair(NamedTuple):
    """One row of a pair chart: the same figure with and without the gradient at inference."""

    label: str
    style: str
    filled: Number | None
    hollow: Number | None


class Estimate(NamedTuple):
    """One row of an interval chart: a value and how sure it is."""

    label: str
    style: str  # CSS classes
    value: Number | None
    low: Number | None
    high: Number | None
    marker: str = "dot"


def draw_pairs(pairs: Sequence[Pair], *, label: Label, tick: Label, describe: str) -> Markup:
    """A row per SAE: a dot with the gradient, a ring without it, and a bar between them."""
    values = [value for pair in pairs for value in (pair.filled, pair.hollow)]
    x = plan_linear(values, label=tick, zero=True)
    return _stack((_draw_pair(pair, x, label) for pair in pairs), x, describe)


def draw_estimates(
    rows: Sequence[Estimate], *, label: Label, tick: Label, describe: str, zero: bool = True
) -> Markup:
    """A row per value: its name and figures above, below them the marker on its interval's bar.

    `label` prints the figures and `tick` the axis, which with `zero` includes 0.
    """
    values = [value for row in rows for value in (row.value, row.low, row.high)]
    x = plan_linear(values, label=tick, zero=zero)
    return _stack((_draw_estimate(row, x, label) for row in rows), x, describe)


def _stack(rows: Iterable[tuple[str, str, Markup]], x: Axis, describe: str) -> Markup:
    """Rows of a name, its figures and its marks, over one grid; many of them closer together."""
    placed = [
        Markup(
            '<div class="row"><p><span class="name">{}</span> <span class="values">{}</span></p>'
            '<svg class="marks" aria-hidden="true">{}</svg></div>'
        ).format(*row)
        for row in rows
    ]
    return Markup(
        '<div class="rows{}" role="group" aria-label="{}">'
        '<svg class="back" aria-hidden="true">{}{}</svg>{}</div>'
    ).format(
        " many" if len(placed) > _MANY else "",
        describe,
        draw_x_ticks(x, grid=True),
        _draw_zero(x.place(0.0)),
        Markup("").join(placed),
    )


def _draw_zero(at: float) -> Markup:
    """A stronger line at 0, unless that is an edge or not there."""
    line = Markup('<line class="zero" x1="{0}" x2="{0}" y1="0" y2="100%"/>')
    return line.format(percent(at)) if 0 < at < 1 else Markup("")


def _draw_pair(pair: Pair, x: Axis, label: Label) -> tuple[str, str, Markup]:
    with_, without = (_show(value, label) for value in (pair.filled, pair.hollow))
    bar = Markup("")
    if pair.filled is not None and pair.hollow is not None:
        bar = Markup('<line class="bar {}" x1="{}" x2="{}" y1="8" y2="8"/>').format(
            pair.style, *(percent(x.place(v)) for v in (pair.filled, pair.hollow))
        )
    marks = (
        Markup('<circle class="{} {}" r="{}" cx="{}" cy="8"/>').format(
            kind, pair.style, radius, percent(x.place(value))
        )
        for kind, radius, value in (("ring", 7, pair.hollow), ("dot", 4, pair.filled))
        if value is not None
    )
    return pair.label, f"{with_} with, {without} without", bar + Markup("").join(marks)


def _draw_estimate(row: Estimate, x: Axis, label: Label) -> tuple[str, str, Markup]:
    value, low, high = (as_number(v) for v in (row.value, row.low, row.high))
    figures, bar = _show(value, label), Markup("")
    if low is not None and high is not None:
        figures += f" ({label(low)} to {label(high)})"
        left, right = percent(x.place(low)), percent(x.place(high))
        bar = Markup(
            '<line class="whisker {0}" x1="{1}" x2="{2}" y1="8" y2="8"/>'
            '<line class="whisker {0}" x1="{1}" x2="{1}" y1="3" y2="13"/>'
            '<line class="whisker {0}" x1="{2}" x2="{2}" y1="3" y2="13"/>'
        ).format(row.style, left, right)
    mark = (
        Markup("")
        if value is None
        else draw_marker(row.marker, row.style, percent(x.place(value)), "8")
    )
    return row.label, figures, bar + mark


def _show(value: float | None, label: Label) -> str:
    return "–" if value is None else label(value)
