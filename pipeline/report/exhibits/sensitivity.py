"""Sensitivity of the loss along real and along random directions (Fig. 2)."""

from collections.abc import Mapping

from pipeline.report.axes import plan_positive
from pipeline.report.charts import Chart
from pipeline.report.exhibits.exhibit import Exhibit, Figures, Rows, Tables
from pipeline.report.exhibits.layers import plan_layers
from pipeline.report.exhibits.series import (
    format_interval,
    group_rows,
    index_rows,
    list_band,
    list_keys,
)
from pipeline.report.figures import Line, draw_lines, series_style
from pipeline.report.markers import MARKERS
from pipeline.report.tables import format_count, format_short

_WORDS = {
    "difference": "difference, x − x_j",
    "other_difference": "difference of two others",
    "covariance": "random, with the covariance",
    "isotropic": "random, isotropic",
}
_RATIOS = (
    ("difference", "ratio_to_isotropic", "difference / isotropic"),
    ("difference", "ratio_to_covariance", "difference / covariance"),
    ("other_difference", "ratio_to_isotropic", "two others / isotropic"),
    ("other_difference", "ratio_to_covariance", "two others / covariance"),
)


def show_sensitivity(tables: Tables, styles: Mapping[str, str]) -> Exhibit | None:  # noqa: ARG001
    rows = tables.get("sensitivity")
    if not rows:
        return None
    return Exhibit(
        id="sensitivity",
        title="Sensitivity to directions",
        source="Fig. 2",
        reading=(
            "The first chart is how steep the loss is along a unit vector u at an activation x, on "
            "average over x; the second divides the slope along real differences of activations "
            "by that along random directions, so that 1 is no more than chance. Bands are 95% "
            "intervals over blocks of text, those of a ratio over the same blocks above and below."
        ),
        protocol=(
            f"{format_count(rows[0]['n_rows'])} random rows of {format_count(rows[0]['n_blocks'])} "
            "held-out blocks, one direction of each kind per row, at the residual stream after "
            "every layer; positions that training left out do not count. x_j and the covariance "
            "are of real activations of other held-out blocks. The loss is the cross-entropy "
            "summed over x’s block."
        ),
        label_seen="All of it is of the loss’s gradient, which sees the label; no SAE is involved.",
        paper=(
            "On GPT-2 the paper finds differences clearly above both kinds of random directions "
            "from layer 3 on. It prints a figure without numbers, so compare which line is above "
            "which, not values. It leaves open whether the difference starts at x: both are shown, "
            "and the final norm makes the loss nearly flat along the last layer’s x itself, which "
            "lowers the first there."
        ),
        charts=(_chart_means(rows), _chart_ratios(rows)),
        figures=(_tabulate(rows),),
        data=("sensitivity",),
    )


def _chart_means(rows: Rows) -> Chart:
    groups = group_rows(rows, lambda row: row["direction"])
    lines = [
        _draw(i, words, groups.get(name, ()), "mean")
        for i, (name, words) in enumerate(_WORDS.items())
    ]
    return _chart("Slope of the loss", "|∇L · u|, nats per unit of activation", lines)


def _chart_ratios(rows: Rows) -> Chart:
    groups = group_rows(rows, lambda row: row["direction"])
    lines = [
        _draw(i, words, groups.get(name, ()), key) for i, (name, key, words) in enumerate(_RATIOS)
    ]
    return _chart("Real over random directions", "ratio of mean slopes", lines)


def _draw(index: int, label: str, rows: Rows, figure: str) -> Line:
    return Line(
        label,
        series_style(index),
        [(float(row["layer"]), row[figure]) for row in rows],
        MARKERS[index % len(MARKERS)],
        band=list_band(rows, "layer", figure),
    )


def _chart(title: str, unit: str, lines: list[Line]) -> Chart:
    x = plan_layers(int(layer) for line in lines for layer, _ in line.points)
    heights = [height for line in lines for _, height in line.points]
    heights += [end for line in lines for _, *ends in line.band for end in ends]
    y = plan_positive(heights, label=format_short)
    describe = f"{title} over layers, a line per kind of direction"
    svg = draw_lines(lines, x=x, y=y, describe=describe)
    return Chart(title, unit, "layer", svg, list_keys(lines))


def _tabulate(rows: Rows) -> Figures:
    found = index_rows(rows, "layer", "direction")
    lines = [
        (
            format_count(layer),
            format_interval(found[layer, "difference"], "gradient_norm", format_short),
            *(
                format_interval(found.get((layer, n), {}), key, format_short)
                for n, key, _ in _RATIOS
            ),
        )
        for layer in sorted({row["layer"] for row in rows})
    ]
    return Figures(("Layer", "mean ‖∇L‖", *(words for *_, words in _RATIOS)), tuple(lines))
