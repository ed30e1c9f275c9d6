"""Axes over a model's layers."""

from collections.abc import Iterable

from pipeline.report.axes import Axis

_MOST_TICKS = 13


def plan_layers(layers: Iterable[int]) -> Axis:
    """A linear axis from exactly the lowest to the highest layer, each of them a tick if few."""
    every = sorted(set(layers))
    low, span = every[0], every[-1] - every[0]
    if span == 0:
        return Axis(lambda _: 0.5, ((0.5, str(low)),))

    def place(layer: float) -> float:
        return (layer - low) / span

    marks = every[:: -(-len(every) // _MOST_TICKS)]
    return Axis(place, tuple((place(float(mark)), str(mark)) for mark in marks))
