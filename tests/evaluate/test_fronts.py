"""Pareto fronts against brute force, and which SAEs are compared."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.evaluate.fronts import list_fronts, pareto_front
from pipeline.report.exhibits.fronts import show_fronts

Point = tuple[float, float]
few = st.integers(0, 6).map(float)  # so that ties are common


def beats(one: Point, other: Point) -> bool:
    return one[0] <= other[0] and one[1] <= other[1] and one != other


@given(st.lists(st.tuples(few, few), max_size=15))
def test_the_front_is_what_no_point_beats(points):
    front = pareto_front(points)
    unbeaten = {i for i, p in enumerate(points) if not any(beats(q, p) for q in points)}
    assert set(front) == unbeaten
    assert len(front) == len(unbeaten)
    assert [points[i] for i in front] == sorted(points[i] for i in front)


@pytest.mark.parametrize(
    ("points", "front"),
    [
        ([], []),
        ([(1.0, 1.0)], [0]),
        ([(2.0, 1.0), (1.0, 2.0)], [1, 0]),
        ([(1.0, 2.0), (2.0, 2.0)], [0]),  # as low, and further to the right
        ([(1.0, 2.0), (1.0, 1.0)], [1]),  # at one place only the lowest
        ([(1.0, 1.0), (1.0, 1.0)], [0, 1]),  # equal points do not beat each other
    ],
)
def test_small_fronts(points, front):
    assert pareto_front(points) == front


def make_sae(
    k: int, d_sae: int, loss_added: float, *, beta: float = 0.0, **changes: Any
) -> dict[str, Any]:
    mode = changes.get("mode", "with_gradient")
    return {
        "sae": f"topk-k{k}-d{d_sae}-beta{beta:g}-seed{changes.get('seed', 0)}",
        "architecture": "topk",
        "k": k,
        "beta": beta,
        "gradient": "full",
        "d_sae": d_sae,
        "seed": 0,
        "mode": mode,
        "l0": k - 0.25,
        "nmse": 1 / k,
        "nmse_low": 0.9 / k,
        "nmse_high": 1.1 / k,
        "loss_added": loss_added,
        **changes,
    }


GRID = [
    make_sae(k, d_sae, 1 / (k * d_sae), beta=beta, mode=mode)
    for k in (16, 32, 64)
    for d_sae in (512, 1024)
    for beta in (0.0, 3e4)
    for mode in ("with_gradient", "without_gradient")
]


def test_panels_hold_one_size_fixed_and_kinds_apart():
    """A second seed of one SAE is worse, and so alone of its kind not on the front."""
    worse = make_sae(32, 1024, 1.0, seed=1)
    rows = list_fronts([*GRID, worse])
    assert len(rows) == 3 * (len(GRID) + 1)
    by_panel = {
        (row["panel"], row["fixed"], row["fixed_value"], row["x"])
        for row in rows
        if row["sae"] == GRID[0]["sae"]
    }
    assert by_panel == {
        ("latents_loss", "k", 16, 512),
        ("l0_nmse", "d_sae", 512, 15.75),
        ("l0_loss", "d_sae", 512, 15.75),
    }
    beaten = [(row["panel"], row["sae"]) for row in rows if not row["on_front"]]
    assert beaten == [("latents_loss", worse["sae"]), ("l0_loss", worse["sae"])]


def test_intervals_are_taken_along_where_there_are_some():
    rows = list_fronts([make_sae(32, 512, 0.5)])
    ends = {row["panel"]: (row["y_low"], row["y_high"]) for row in rows}
    assert ends == {
        "latents_loss": (None, None),
        "l0_nmse": (0.9 / 32, 1.1 / 32),
        "l0_loss": (None, None),
    }
    for unknown in (None, math.nan, math.inf):
        assert (
            list_fronts([make_sae(32, 512, 0.5) | {"loss_added": unknown, "nmse": unknown}]) == []
        )


def test_another_sae_has_other_fronts():
    assert list_fronts(GRID) != list_fronts([row | {"loss_added": 1.0} for row in GRID])


def test_a_grid_draws_fronts():
    exhibit = show_fronts({"fronts": list_fronts(GRID)}, {})
    assert exhibit is not None
    titles = [chart.title for chart in exhibit.charts]
    assert titles[:3] == [f"Loss added over latents, k = {k}" for k in (16, 32, 64)]
    assert titles[3:5] == ["NMSE over L0, 512 latents", "NMSE over L0, 1,024 latents"]
    assert len(titles) == 7
    labels = [key.label for key in exhibit.charts[0].keys]
    assert labels == ["topk", "topk, β = 3e4, with ∇", "topk, β = 3e4, without ∇"]
    assert "paper-demo" not in exhibit.protocol


def test_a_single_size_draws_values_and_says_so():
    saes = [make_sae(32, 512, 0.5), make_sae(32, 512, 0.6, l0=31.0, seed=1)]
    exhibit = show_fronts({"fronts": list_fronts(saes)}, {})
    assert exhibit is not None
    assert [chart.title for chart in exhibit.charts] == ["Loss added, k = 32", "NMSE, 512 latents"]
    assert not any(chart.keys for chart in exhibit.charts)
    assert "topk, seed 1" in exhibit.charts[0].svg
    assert "one value of L0 and latents alone" in exhibit.protocol
    assert show_fronts({}, {}) is None
