"""Firing frequencies, medians and dead latents of activities whose answer is known."""

import statistics

import pytest
import torch

from pipeline.evaluate import activity as activity_module
from pipeline.evaluate.activity import Activity
from pipeline.evaluate.bootstrap import draw_weights
from pipeline.evaluate.density import (
    find_median,
    list_firing_curves,
    measure_dead,
    measure_medians,
)
from pipeline.report.exhibits.dead import show_dead
from pipeline.report.exhibits.density import show_density

N_ROWS = 100
# The middle one of the live latents fires on 20 of 100 rows, the fourth of all seven on 10.
FIRINGS = (0, 0, 5, 10, 20, 50, 100)


def make_activity(firings: tuple[int, ...] = FIRINGS) -> Activity:
    """Latent i fires on the first firings[i] rows, in batches of 25."""
    activity = Activity(len(firings))
    fires = torch.arange(N_ROWS)[:, None] < torch.tensor(firings)
    for batch in fires.split(25):
        activity.add(*batch.nonzero(as_tuple=True), n_rows=len(batch))
    return activity


def make_activities(firings: tuple[int, ...] = FIRINGS) -> dict[str, dict[str, Activity]]:
    activity = make_activity(firings)
    return {"it": {"with_gradient": activity, "without_gradient": activity}}


def test_curves_are_quantiles_of_the_frequencies():
    rows = list_firing_curves(make_activities())
    assert list(rows[0]) == ["sae", "mode", "fraction_of_latents", "firing_frequency"]
    curve = {
        round(row["fraction_of_latents"], 2): row["firing_frequency"]
        for row in rows
        if row["mode"] == "without_gradient"
    }
    assert len(rows) == 2 * len(curve) == 202
    assert [curve[q] for q in (0, 0.5, 1)] == pytest.approx([0, 0.1, 1])
    assert curve[0.75] == pytest.approx(0.35)  # half way from the fifth latent to the sixth


def test_medians_over_live_latents_and_over_all():
    (row, other) = measure_medians(make_activities(FIRINGS * 2), {"it": 4}, draws=200)
    assert (row["sae"], row["mode"], row["k"], row["live"]) == ("it", "with_gradient", 4, 10)
    assert other == row | {"mode": "without_gradient"}
    assert (row["median_live"], row["median_all"]) == pytest.approx((0.2, 0.1))
    assert 0.05 <= row["median_live_low"] < 0.2 < row["median_live_high"] <= 1
    assert 0 <= row["median_all_low"] < 0.1 < row["median_all_high"] <= 1


@pytest.mark.parametrize("n", [8, 11, 14])
def test_medians_of_resamplings_equal_those_of_lists(n):
    values = torch.rand(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    weights = draw_weights(n, draws=50)
    ordered = sorted(values.tolist())
    medians = [
        statistics.median_low([v for v, w in zip(ordered, row, strict=True) for _ in range(w)])
        for row in weights.int().tolist()
    ]
    found = find_median(values, draws=50)
    drawn = torch.tensor(medians[1:], dtype=torch.float64)
    ends = torch.quantile(drawn, torch.tensor([0.025, 0.975], dtype=torch.float64))
    assert found == pytest.approx((medians[0], *ends.tolist()))


def test_few_latents_have_no_interval():
    rows = measure_medians(make_activities(), {"it": 4}, draws=20)
    rows += measure_dead(make_activities(), {"it": 4}, draws=20)
    for row in rows:
        ends = [value for key, value in row.items() if key.endswith(("_low", "_high"))]
        assert set(ends) == {None}
    assert rows[0]["median_live"] == 0.2


def test_no_row_at_all_is_no_firing():
    activities = {"it": {"without_gradient": Activity(9)}}
    (row,) = measure_medians(activities, {"it": 4}, draws=20)
    assert (row["live"], row["median_all"], row["median_live"]) == (0, 0, None)
    assert {row["firing_frequency"] for row in list_firing_curves(activities)} == {0}


def test_no_live_latent_has_no_median():
    (row, _) = measure_medians(make_activities((0, 0, 0)), {"it": 1}, draws=10)
    assert (row["live"], row["median_live"], row["median_live_low"]) == (0, None, None)
    assert row["median_all"] == 0


def test_dead_latents_by_both_counts(monkeypatch):
    """Windows of 50 rows end at rows 50, 75 and 100: latents that stop after rows 0, 5, 10 and 20
    are dead at 75 and 100, those that never fire at all three.
    """
    monkeypatch.setattr(activity_module, "DEAD_WINDOW_ROWS", 50)
    activities = make_activities(FIRINGS * 2)
    (row, other) = measure_dead(activities, {"it": 4}, draws=500)
    at_50, at_75, at_100 = 2, 5, 6  # the latent that fires on rows 0 to 49 is dead at 100
    expected = (at_50 + at_75 + at_100) / 3 / 7
    assert row["dead_paper"] == pytest.approx(expected)
    assert row["dead_paper"] == pytest.approx(activities["it"]["with_gradient"].dead_fraction)
    assert row["dead_held_out"] == pytest.approx(2 / 7)
    for key in ("dead_paper", "dead_held_out"):
        assert 0 <= row[f"{key}_low"] < row[key] < row[f"{key}_high"] <= 1
    assert other == row | {"mode": "without_gradient"}


def test_too_few_rows_for_the_paper_s_count():
    (row, _) = measure_dead(make_activities(), {"it": 4}, draws=10)
    assert row["dead_paper"] is row["dead_paper_low"] is row["dead_paper_high"] is None
    assert row["dead_held_out"] == pytest.approx(2 / 7)


def tables(firings: tuple[int, ...] = FIRINGS, ks: tuple[int, ...] = (4,)) -> dict:
    activities = {f"k{k}": make_activities(firings)["it"] for k in ks}
    by_name = {f"k{k}": k for k in ks}
    facts = {"architecture": "topk", "beta": 0.0, "d_sae": len(firings), "seed": 0}
    return {
        "firing": list_firing_curves(activities),
        "density_medians": measure_medians(activities, by_name, draws=20),
        "dead": measure_dead(activities, by_name, draws=20),
        "saes": [
            {"sae": name, "k": k, "mode": mode, **facts}
            for name, k in by_name.items()
            for mode in ("with_gradient", "without_gradient")
        ],
    }


def test_exhibits_show_the_tables():
    styles = {"k4": "c0 d0", "k8": "c1 d1"}
    density = show_density(tables(), styles)
    assert density is not None
    row = density.figures[0].rows[0]
    assert row[:3] == ("k4", "4", "5")
    assert [cell.split(" (")[0] for cell in row[3:]] == ["20.0%", "20.0%", "10.0%", "10.0%"]
    assert [chart.svg.count('class="line') for chart in density.charts] == [1, 1]
    single = show_dead(tables(), styles)
    assert single is not None
    assert "28.6%" in single.figures[0].rows[0][4]
    assert single.figures[0].rows[0][2] == "–"  # the paper's count needs 20,480 rows
    several = show_dead(tables(ks=(4, 8)), styles)
    assert several is not None
    assert [chart.across for chart in several.charts] == ["k"]
    assert [key.label for key in several.charts[0].keys] == ["topk"]
    assert show_density({}, {}) is None
    assert show_dead({"dead": []}, {}) is None


def test_another_sae_has_other_tables():
    one, other = tables(), tables((1, 2, 3, 0, 60, 70, 80))
    assert all(one[name] != other[name] for name in ("firing", "density_medians", "dead"))
