"""Axes of the report's figures: where a value goes, and which marks stand beside it."""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

from markupsafe import Markup

Number = float | int  # a column of a table may hold whole numbers alone
Label = Callable[[float], str]


class Axis(NamedTuple):
    """Where values go, from 0 (left, bottom) to 1."""

    place: Callable[[float], float]
    ticks: tuple[tuple[float, str], ...]  # place and text


def as_number(value: object) -> float | None:
    """A finite number as a float, and None for anything else."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def plan_linear(values: Iterable[Number | None], *, label: Label, zero: bool = False) -> Axis:
    """A linear axis that ends at round numbers, with three to seven ticks."""
    known = [*_finite(values), *([0.0] if zero else [])] or [0.0, 1.0]
    low, high = min(known), max(known)
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


def plan_progress(values: Iterable[Number | None], *, label: Label) -> Axis:
    """A linear axis from 0 to exactly the largest value, with ticks at round numbers."""
    high = max(_finite(values), default=0.0) or 1.0
    step = round_step(high / 5)
    marks = [_clean(i * step) for i in range(math.floor(high / step + 1e-9) + 1)]
    return Axis(lambda value: value / high, tuple((mark / high, label(mark)) for mark in marks))


def plan_positive(values: Iterable[Number | None], *, label: Label) -> Axis:
    """A linear axis, or a logarithmic one where all values are positive and span a factor of 3.

    On the logarithmic one, what is not positive (the end of an interval) lies at the bottom.
    """
    known = _finite(values)
    if not known or min(known) <= 0 or max(known) / min(known) < 3:
        return plan_linear(known, label=label)
    low, high = math.log10(min(known)) - 0.05, math.log10(max(known)) + 0.05
    mantissas = (1, 2, 3, 5) if high - low < 1 else (1, 2, 5) if high - low < 2 else (1,)
    marks = (m * 10.0**e for e in range(math.floor(low), math.ceil(high) + 1) for m in mantissas)

    def place(value: float) -> float:
        return (math.log10(value) - low) / (high - low) if value > 0 else 0.0

    return Axis(place, tuple((place(m), label(m)) for m in marks if 0 <= place(m) <= 1))


def plan_betas(betas: Iterable[Number], *, label: Label) -> Axis:
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


def percent(place: Number) -> str:
    """A place on an axis as an SVG length."""
    return f"{100 * place:.2f}%"


def draw_y_ticks(y: Axis) -> Markup:
    """Lines across the plot, with their values at its left."""
    tick = Markup(
        '<line class="grid-line" x1="0" x2="100%" y1="{0}" y2="{0}"/>'
        '<text class="tick y" x="0" dx="-8" dy=".32em" y="{0}">{1}</text>'
    )
    return Markup("").join(tick.format(percent(1 - at), text) for at, text in y.ticks)


def draw_x_ticks(x: Axis, *, grid: bool = False) -> Markup:
    """Values below the plot, with short marks, or with `grid` lines over its height."""
    tick = Markup(
        '<line class="{}" x1="{}" x2="{}" y1="{}" y2="100%"/>'
        '<text class="tick {}" x="{}" y="100%" dy="18">{}</text>'
    )
    return Markup("").join(
        tick.format(
            "grid-line" if grid else "mark",
            percent(at),
            percent(at),
            "0" if grid else "99%",
            "start" if grid and at < 0.01 else "end" if grid and at > 0.99 else "x",
            percent(at),
            text,
        )
        for at, text in x.ticks
    )


def _finite(values: Iterable[Number | None]) -> list[float]:
    return [number for value in values if (number := as_number(value)) is not None]


def round_step(rough: float) -> float:
    """The smallest of 1, 2, 2.5 and 5 times a power of ten that is at least `rough`."""
    power = 10.0 ** math.floor(math.log10(rough))
    return power * next(m for m in (1, 2, 2.5, 5, 10) if m * power >= rough * (1 - 1e-9))


def _clean(value: float) -> float:
    """0.3 for 0.30000000000000004."""
    return float(f"{value:.12g}")
