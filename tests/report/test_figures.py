"""Bands, markers and interval rows: what is drawn where, and what is left out."""

import re

import pytest
from markupsafe import Markup

from pipeline.report.axes import Axis, plan_linear, plan_positive
from pipeline.report.charts import Chart, Key, block_charts
from pipeline.report.figures import (
    MARKERS,
    SHAPES,
    Estimate,
    Line,
    draw_estimates,
    draw_key,
    draw_lines,
)

UNIT = Axis(lambda value: value, ((0.0, "0"), (1.0, "1")))


def draw(*lines: Line, y: Axis = UNIT) -> Markup:
    return draw_lines(lines, x=UNIT, y=y, describe="a chart")


def find_path(svg: str, kind: str) -> str:
    (path,) = re.findall(rf'<path class="{kind} c0" d="([^"]*)"', svg)
    return path


def test_a_band_is_an_area_between_its_ends():
    svg = draw(Line("a", "c0", [(0, 0.5)], band=[(1.0, 0.2, 0.6), (0.0, 0.1, 0.5)]))
    # Along the upper ends from left to right, back along the lower ones; down is positive.
    assert find_path(svg, "band") == "M0.0 500.0 L1000.0 400.0 L1000.0 800.0 L0.0 900.0"
    assert find_path(svg, "edge") == "M0.0 500.0 L1000.0 400.0 M0.0 900.0 L1000.0 800.0"
    assert svg.index('class="band') < svg.index('class="line')  # behind it


def test_a_band_ends_at_the_axes_and_leaves_out_what_is_unknown():
    nan = float("nan")
    svg = draw(Line("a", "c0", [], band=[(0, -3.0, 0.5), (0.5, nan, 0.5), (1, 0.5, 9.0)]))
    assert find_path(svg, "band") == "M0.0 500.0 L1000.0 0.0 L1000.0 500.0 L0.0 1000.0"
    y = plan_positive([1.0, 10.0], label=str)
    assert y.place(-1.0) == 0.0  # no logarithm of it
    draw(Line("a", "c0", [], band=[(0, -1.0, 5.0)]), y=y)


def test_many_bands_are_fainter():
    line = Line("a", "c0", [], band=[(0, 0.1, 0.2), (1, 0.1, 0.2)])
    assert "faint" not in draw(*[line] * 3)
    assert "faint" in draw(*[line] * 4)


def test_markers_alone_have_no_line():
    line = Line("a", "c0", [(0.0, 0.5), (0.5, None), (1.0, float("nan"))], "dot")
    assert 'class="line' in draw(line)
    alone = draw(line._replace(joined=False))
    assert 'class="line' not in alone
    assert alone.count("<circle") == 1  # a gap has none
    assert 'class="line' not in draw_key("c0", "dot", joined=False)


def test_the_ends_of_a_step_stay_in_order():
    svg = draw(Line("a", "c0", [(0.0, 0.0), (0.1 + 0.2, 0.0), (0.3, 1.0), (1.0, 1.0)]))
    assert find_path(svg, "line") == "M0.0 1000.0 L300.0 1000.0 L300.0 0.0 L1000.0 0.0"


@pytest.mark.parametrize("marker", [*MARKERS, "ring", *(f"open-{name}" for name in SHAPES)])
def test_every_marker_can_be_drawn(marker):
    svg = draw(Line("a<b", "c0", [(0.5, 0.25)], marker))
    assert re.search(r'c?x="50.00%" c?y="75.00%"', svg)
    assert "a&lt;b" in svg
    assert "a<b" not in svg


def test_markers_differ_without_colour():
    kinds = ["dot", "ring", *SHAPES, *(f"open-{name}" for name in SHAPES if name != "cross")]
    assert len({str(draw_key("c0", marker)) for marker in kinds}) == len(kinds)


def test_estimates_lie_where_they_belong():
    rows = [
        Estimate("a<b", "c0", 1.0, -2.0, 2.0),
        Estimate("alone", "c1", -1.0, None, None, "open-square"),
        Estimate("missing", "c2", None, None, float("nan")),
    ]
    svg = draw_estimates(rows, label=lambda v: f"{v:.1f}!", tick=str, describe="rows")
    assert "1.0! (-2.0! to 2.0!)" in svg
    assert ">-1.0!<" in svg
    assert ">–<" in svg
    assert "a&lt;b" in svg
    assert svg.count('class="whisker c0') == 3  # a bar with two caps
    assert 'class="whisker c1' not in svg
    places = [float(x) for x in re.findall(r'class="whisker c0" x1="([\d.]+)%"', svg)]
    assert places == [0.0, 0.0, 100.0]  # the axis goes from -2 to 2
    assert re.search(r'class="dot c0" r="4.5" cx="75.00%"', svg)
    assert 'class="zero" x1="50.00%"' in svg


def test_estimates_need_no_zero():
    rows = [Estimate("a", "c0", 1.2, 1.1, 1.3)]
    arguments = {"label": str, "tick": str, "describe": "rows"}
    texts = [re.findall(r'tick \w+"[^>]*>([^<]*)<', draw_estimates(rows, zero=zero, **arguments))
             for zero in (True, False)]  # fmt: skip
    assert [text[0] for text in texts] == ["0.0", "1.1"]


def test_rows_come_closer_where_there_are_many():
    few, many = (
        draw_estimates([Estimate("a", "c0", 1.0, 0, 2)] * n, label=str, tick=str, describe="")
        for n in (10, 24)
    )
    assert 'class="rows"' in few
    assert 'class="rows many"' in many


def test_axes_leave_out_what_is_unknown():
    values = [None, float("nan"), 1.0, 4.0, float("inf")]
    for plan in (plan_linear, plan_positive):
        assert plan(values, label=str).ticks == plan([1.0, 4.0], label=str).ticks


def make_chart(*labels: str, marker: str = "", style: str = "c0") -> Chart:
    return Chart("t", "u", "x", draw(), tuple(Key(label, style, marker) for label in labels))


def test_neighbours_of_the_same_series_share_a_key():
    plain, marked = make_chart("a", "b"), make_chart("b", "a", marker="dot")
    other, styled, bare = make_chart("a"), make_chart("a", "b", style="c1"), make_chart()
    assert block_charts([plain, marked]) == [(marked.keys, (plain, marked))]  # which says more
    assert block_charts([plain, other, styled]) == [(None, (plain, other, styled))]
    assert block_charts([bare, bare, plain]) == [(None, (bare, bare, plain))]
    assert block_charts([plain, plain, other, other, bare]) == [
        (plain.keys, (plain, plain)),
        (other.keys, (other, other)),
        (None, (bare,)),
    ]
    assert block_charts([]) == []
